//! What is where: the store that reads experts from files, the cache that keeps some of them in fast memory, the logical resident
//! set behind it and the bound that no eviction policy can beat.
//!
//! Knows nothing of tensors: what is resident advances step by step, so that routing never depends on when a read arrives.

pub mod admission;
pub mod belady;
pub mod cache;
mod policy;
pub mod requests;
pub mod residency;
pub mod slab;
pub mod store;
