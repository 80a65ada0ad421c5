#![cfg_attr(feature = "candle", doc = include_str!("../README.md"))]
#![cfg_attr(not(feature = "candle"), doc = "Mixture-of-Experts routing, without any tensor framework.")]
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod checkpoint;
#[cfg(feature = "candle")]
pub mod decoder;
pub mod error;
#[cfg(feature = "candle")]
pub mod eval;
pub mod expert;
pub mod experts;
#[cfg(feature = "candle")]
pub mod layer;
#[cfg(feature = "candle")]
pub mod report;
pub mod routing;
pub mod simd;
pub mod spec;
pub mod zoo;

/// The examples of the guide are tests.
#[cfg(all(doctest, feature = "candle"))]
#[doc = include_str!("../docs/swap.md")]
struct SwapGuide;
