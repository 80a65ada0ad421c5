//! How an expert cache is made.

use crate::experts::residency::Policy;

/// Whose the room is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every layer has its own share: as many experts as the others, one more for the first ones where that fits.
    #[default]
    PerLayer,
    /// All layers share it.
    Global,
}

/// How a cache is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes of all slabs together, whatever they are for.
    pub budget_bytes: usize,
    /// Whose the room is.
    pub scope: Scope,
    /// Who leaves.
    pub policy: Policy,
    /// Bytes of the budget that no resident gets, so that there is always room to read ahead. Without, reads ahead take what is free.
    pub prefetch_bytes: usize,
    /// Threads that read, at least 1.
    pub readers: usize,
}

impl CacheOptions {
    /// Per layer, least recently used first, nothing set aside, two reads in flight.
    pub fn new(budget_bytes: usize) -> Self {
        let (scope, policy, prefetch_bytes, readers) = (Scope::PerLayer, Policy::Lru, 0, 2);
        Self { budget_bytes, scope, policy, prefetch_bytes, readers }
    }
}
