//! What computes an expert: its activation, weights as they lie in memory, and the engine that runs many at once on the CPU.
//!
//! Knows nothing of where weights come from, or of tensors.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod engine;
mod fused;
mod linear;
pub(crate) mod matrix;
pub(crate) mod mxfp4;
pub(crate) mod recurrent;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod threads;
pub(crate) mod work;

pub use self::activation::{Activation, Function};
pub use self::engine::Engine;
pub use self::matrix::{Dtype, Matrix};
pub use self::work::{ExpertWeights, ProjectionWeights, Work};
