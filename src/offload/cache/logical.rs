//! The logical resident set of a cache: one for each layer, or one for all, with as many experts as the budget holds.
//!
//! Knows nothing of slabs or reads.

use super::{CacheOptions, Scope};
use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::offload::admission::Admitted;
use crate::offload::residency::{Paging, Residency, Step};
use crate::offload::store::ExpertStore;

/// The sets.
pub(super) struct Logical {
    scope: Scope,
    /// One for each layer, or the only one.
    sets: Vec<Residency>,
    /// Of each layer.
    admitted: Vec<Admitted>,
}

impl Logical {
    /// Empty, for as many experts as `bytes` hold.
    pub(super) fn new(store: &ExpertStore, bytes: usize, options: CacheOptions) -> Result<Self> {
        let CacheOptions { scope, policy, admission, .. } = options;
        let experts: Vec<usize> = (0..store.layers()).map(|layer| store.experts(layer)).collect();
        let sizes: Vec<usize> = (0..store.layers()).map(|layer| store.slab_bytes(layer)).collect();
        let admitted = experts.iter().map(|&experts| Admitted::new(experts, admission)).collect::<Result<_>>()?;
        if scope == Scope::Global {
            let largest = sizes.iter().copied().max().unwrap_or(1).max(1);
            let capacity = (bytes / largest).min(experts.iter().sum());
            return Ok(Self { scope, sets: vec![Residency::shared(&experts, capacity, policy)?], admitted });
        }
        let (mut capacities, mut left) = (vec![0; experts.len()], bytes);
        for round in 0..experts.iter().copied().max().unwrap_or(0) {
            for layer in (0..experts.len()).filter(|&layer| round < experts[layer]) {
                if capacities[layer] == round && sizes[layer] <= left {
                    capacities[layer] += 1;
                    left -= sizes[layer];
                }
            }
        }
        let sets = experts.iter().zip(capacities).map(|(&experts, capacity)| Residency::new(experts, capacity, policy));
        Ok(Self { scope, sets: sets.collect::<Result<_>>()?, admitted })
    }

    /// The number of the set that a layer belongs to, and the layer's number in it.
    fn place(&self, layer: usize) -> (usize, usize) {
        match self.scope {
            Scope::PerLayer => (layer, 0),
            Scope::Global => (0, layer),
        }
    }

    /// The experts of a layer that are resident.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that is not there.
    pub(super) fn resident(&self, layer: usize) -> Result<&ExpertSet> {
        let (set, inside) = self.place(layer);
        let resident = self.sets.get(set).and_then(|set| set.resident_in(inside));
        resident.ok_or_else(|| Error::shape("layer", "one of the cache's", layer))
    }

    /// The experts of a layer that a router should count as resident.
    ///
    /// # Errors
    /// Those of [`Logical::resident`].
    pub(super) fn counted(&self, layer: usize) -> Result<&ExpertSet> {
        let (set, inside) = self.place(layer);
        let counted = self.sets.get(set).and_then(|set| set.counted_in(inside));
        counted.ok_or_else(|| Error::shape("layer", "one of the cache's", layer))
    }

    /// Experts that stay.
    pub(super) fn capacity(&self, layer: usize) -> usize {
        let (set, inside) = self.place(layer);
        let set = self.sets.get(set).filter(|set| set.resident_in(inside).is_some());
        set.map_or(0, Residency::capacity)
    }

    /// Checks that a set is one of a layer's experts.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not.
    pub(super) fn check(&self, layer: usize, used: &ExpertSet) -> Result<()> {
        let experts = self.resident(layer)?.experts();
        if used.experts() != experts {
            let expected = format!("a set of {experts} experts");
            return Err(Error::shape("used experts", expected, format!("one of {}", used.experts())));
        }
        Ok(())
    }

    /// Runs one step: see [`Residency::page`]. Misses that are not admitted are streamed.
    ///
    /// # Errors
    /// Those of [`Logical::check`]; nothing has changed then.
    pub(super) fn page(&mut self, layer: usize, used: &ExpertSet, paging: &mut Paging) -> Result<Step> {
        self.check(layer, used)?;
        let (set, inside) = self.place(layer);
        let residency = &mut self.sets[set];
        // Where layers share the room, those of the others count as nobody: a layer's use says nothing of theirs.
        let resident = residency.resident_in(inside).unwrap_or(used);
        let hits = used.iter().filter(|&expert| resident.contains(expert)).count();
        let admitted = self.admitted[layer].admit(used, resident, residency.capacity())?;
        let evictions = residency.page(inside, admitted, paging)?.evictions;
        for expert in used.iter().filter(|&expert| !admitted.contains(expert)) {
            paging.urgent.insert(expert);
            paging.streamed.insert(expert);
        }
        let step = Step { hits, misses: used.len() - hits, evictions };
        if self.scope == Scope::PerLayer {
            paging.out.iter_mut().for_each(|(of, _)| *of = layer);
        }
        Ok(step)
    }
}
