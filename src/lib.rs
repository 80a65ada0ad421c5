#![cfg_attr(feature = "model", doc = include_str!("../README.md"))]
#![cfg_attr(not(feature = "model"), doc = "Mixture-of-Experts routing, without any tensor framework.")]
#![deny(missing_docs)]
#![deny(unsafe_code)]

// Checkpoints are little-endian, and what lies in them is used as it lies.
#[cfg(target_endian = "big")]
compile_error!("phase-moe reads weights where they lie, which are little-endian: big-endian targets are not supported");

pub mod checkpoint;
#[cfg(feature = "model")]
pub mod decoder;
pub mod error;
#[cfg(feature = "model")]
pub mod eval;
pub mod expert;
pub mod experts;
#[cfg(feature = "layer")]
pub mod layer;
pub mod offload;
pub mod routing;
pub mod simd;
pub mod spec;
pub mod weights;
pub mod zoo;

/// The examples of the guide are tests.
#[cfg(all(doctest, feature = "model"))]
#[doc = include_str!("../docs/swap.md")]
struct SwapGuide;
