//! What experts are made of and where they are: their activation, the logical resident set and the bound that no eviction
//! policy can beat.
//!
//! Knows nothing of tensors, files or time: everything advances step by step, so that routing never depends on when a read arrives.

pub mod activation;
pub mod belady;
pub mod engine;
mod fused;
pub mod matrix;
pub mod residency;
