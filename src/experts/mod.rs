//! What computes an expert: its activation, weights as they lie in memory, and the engine that runs many at once on the CPU.
//!
//! Knows nothing of where weights come from, or of tensors.

pub mod activation;
pub mod engine;
mod fused;
pub mod matrix;
pub(crate) mod mxfp4;
