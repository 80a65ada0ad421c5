//! What is where: the store that reads experts from files, the cache that keeps some of them in fast memory, the logical resident
//! set behind it, the bound that no eviction policy can beat, and one layer of a cache as a layer sees it.
//!
//! Knows nothing of tensors: what is resident advances step by step, so that routing never depends on when a read arrives.

pub(crate) mod admission;
pub(crate) mod belady;
pub(crate) mod cache;
pub(crate) mod cached;
mod policy;
pub(crate) mod residency;
pub(crate) mod slab;
pub(crate) mod store;
#[cfg(test)]
mod tests;

pub use self::admission::Admission;
pub use self::belady::RequestLog;
pub use self::cache::{CacheOptions, ExpertCache, Prefetch, PrefetchStatistics, Scope, Statistics, StreamWarning};
pub use self::cached::CachedExperts;
pub use self::residency::{Policy, Step};
pub use self::store::{ExpertStore, LoadedExpert, Part};
