//! What experts are made of and where they are: their activation, the store that reads them from files, the cache that keeps some
//! of them in fast memory, the logical resident set behind it and the bound that no eviction policy can beat.
//!
//! Knows nothing of tensors: what is resident advances step by step, so that routing never depends on when a read arrives.

pub mod activation;
pub mod admission;
pub mod belady;
pub mod cache;
pub mod engine;
mod fused;
pub mod matrix;
pub mod mxfp4;
mod policy;
pub mod residency;
pub mod slab;
pub mod store;
