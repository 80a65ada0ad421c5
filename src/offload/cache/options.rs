//! How an expert cache is made.

use crate::offload::admission::Admission;
use crate::offload::residency::Policy;
use crate::offload::store::ExpertStore;

/// Whose the room is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every layer has its own share: as many experts as the others, one more for the first ones where that fits.
    #[default]
    PerLayer,
    /// All layers share it.
    Global,
}

/// Whether a model on the cache guesses what its next layer will use, and has it read while this one works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prefetch {
    /// Never.
    Off,
    /// Where trials say that it helps.
    #[default]
    Auto,
    /// Always: to see what it does.
    Always,
}

/// How a cache is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CacheOptions {
    /// Bytes of all slabs together, whatever they are for.
    pub budget_bytes: usize,
    /// Whose the room is.
    pub scope: Scope,
    /// Which expert leaves.
    pub policy: Policy,
    /// Which misses stay.
    pub admission: Admission,
    /// Bytes of the budget that no resident gets, so that there is always room for experts that are read ahead or do not stay.
    /// Without, reads ahead take what is free, and those that do not stay take residents' room for a while.
    pub spare_bytes: usize,
    /// Threads that read, at least 1.
    pub readers: usize,
    /// Whether experts are read before they are asked for; the cache itself only does what it is told.
    pub prefetch: Prefetch,
}

impl CacheOptions {
    /// Per layer, all misses stay, least recently used first to leave, nothing set aside, reads ahead where they help, four
    /// readers: one reads while others check what they have read.
    pub fn new(budget_bytes: usize) -> Self {
        let (scope, policy, admission) = (Scope::PerLayer, Policy::Lru, Admission::All);
        Self { budget_bytes, scope, policy, admission, spare_bytes: 0, readers: 4, prefetch: Prefetch::Auto }
    }

    /// The same with room for as many experts as can be read at once set aside, as far as that is a quarter of the budget at most; none
    /// of what residents need where all experts fit.
    pub fn sparing(self, store: &ExpertStore) -> Self {
        let layers = 0..store.layers();
        let largest = layers.clone().map(|layer| store.slab_bytes(layer)).max().unwrap_or(0);
        let most = layers.clone().map(|layer| self.room_to_read(store, layer)).max().unwrap_or(0);
        let all: usize = layers.map(|layer| store.experts(layer) * store.slab_bytes(layer)).sum();
        let most = match self.budget_bytes.checked_sub(all) {
            Some(left) => most.min(left),
            None => most.min((self.budget_bytes / 4).checked_div(largest).unwrap_or(0) * largest),
        };
        Self { spare_bytes: most, ..self }
    }

    /// Room for experts of a layer that keeps all readers busy, two at least: one is used while the next one is read.
    pub(super) fn room_to_read(&self, store: &ExpertStore, layer: usize) -> usize {
        let slabs = store.keys(layer).map(|key| store.slab_bytes_of(key).len()).max().unwrap_or(1);
        self.readers.div_ceil(slabs.max(1)).max(2) * store.slab_bytes(layer)
    }
}
