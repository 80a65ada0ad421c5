//! The logical resident set of a cache: one for each layer, or one for all, with as many experts as the budget holds.
//!
//! Knows nothing of slabs or reads.

use super::Scope;
use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::experts::residency::{Paging, Policy, Residency, Step};
use crate::experts::store::ExpertStore;

/// The sets.
pub(super) struct Logical {
    scope: Scope,
    /// One for each layer, or the only one.
    sets: Vec<Residency>,
}

impl Logical {
    /// Empty, for as many experts as `bytes` hold.
    pub(super) fn new(store: &ExpertStore, bytes: usize, scope: Scope, policy: Policy) -> Result<Self> {
        let experts: Vec<usize> = (0..store.layers()).map(|layer| store.experts(layer)).collect();
        let sizes: Vec<usize> = (0..store.layers()).map(|layer| store.slab_bytes(layer)).collect();
        if scope == Scope::Global {
            let largest = sizes.iter().copied().max().unwrap_or(1).max(1);
            let capacity = (bytes / largest).min(experts.iter().sum());
            return Ok(Self { scope, sets: vec![Residency::shared(&experts, capacity, policy)?] });
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
        Ok(Self { scope, sets: sets.collect::<Result<_>>()? })
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

    /// Runs one step: see [`Residency::page`].
    ///
    /// # Errors
    /// Those of [`Logical::check`]; nothing has changed then.
    pub(super) fn page(&mut self, layer: usize, used: &ExpertSet, paging: &mut Paging) -> Result<Step> {
        self.check(layer, used)?;
        let (set, inside) = self.place(layer);
        let step = self.sets[set].page(inside, used, paging)?;
        if self.scope == Scope::PerLayer {
            paging.out.iter_mut().for_each(|(of, _)| *of = layer);
        }
        Ok(step)
    }
}
