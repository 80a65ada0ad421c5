//! Mixture-of-Experts routing for Candle.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod checkpoint;
#[cfg(feature = "candle")]
pub mod decoder;
pub mod error;
#[cfg(feature = "candle")]
pub mod eval;
pub mod expert;
#[cfg(feature = "candle")]
pub mod layer;
#[cfg(feature = "candle")]
pub mod report;
pub mod routing;
pub mod spec;
pub mod zoo;
