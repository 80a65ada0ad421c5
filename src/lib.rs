//! Mixture-of-Experts routing for Candle.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod error;
pub mod expert;
pub mod routing;
