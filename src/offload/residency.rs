//! The logical resident set: which experts are in fast memory, advanced step by step.
//!
//! `hits + misses = distinct experts of the step`. Experts that a step uses are pinned while it runs: a miss takes free room or that
//! of an expert the step does not use, chosen by the [`Policy`]. Where a step needs more experts than fit, the rest are streamed:
//! used and not kept, which counts as a miss. Room belongs to one layer (`Residency::new`) or to several that share it
//! (`Residency::shared`).
//!
//! A step costs O(experts it uses) beside a look at its set, whatever the policy. Knows nothing of bytes, reads or threads.

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet, check_expert_count};
use crate::offload::policy::Order;
pub use crate::offload::policy::Policy;

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Distinct experts used that were resident.
    pub hits: usize,
    /// Distinct experts used that were not.
    pub misses: usize,
    /// Experts that left to make room.
    pub evictions: usize,
}

/// What a step asks of those who own the memory: read `urgent`, drop `streamed` after use, and `out` before the reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paging {
    /// Experts of the step that were not resident.
    pub urgent: ExpertSet,
    /// Those of them that there is no room to keep.
    pub streamed: ExpertSet,
    /// Which left to make room: layer and expert.
    pub out: Vec<(usize, ExpertId)>,
}

/// The experts that are in fast memory, of one layer or of several that share it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Residency {
    policy: Policy,
    capacity: usize,
    /// Experts resident, all layers together.
    length: usize,
    layers: Vec<ExpertSet>,
    /// All experts of each layer.
    all: Vec<ExpertSet>,
    /// Key of each layer's first expert; keys count the experts of all layers.
    first: Vec<usize>,
    layer_of: Vec<u16>,
    order: Order,
}

impl Residency {
    /// An empty fast memory for `capacity` of the `experts` of a layer; with 0 everything is streamed.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts, [`Error::Parameter`] for a capacity above `experts`.
    pub(crate) fn new(experts: usize, capacity: usize, policy: Policy) -> Result<Self> {
        Self::shared(&[experts], capacity, policy)
    }

    /// An empty fast memory for `capacity` experts of layers with so many `experts` each, which share it.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for a layer without experts, and for too many in one or all; [`Error::Parameter`] for a capacity above
    /// their sum.
    pub(crate) fn shared(experts: &[usize], capacity: usize, policy: Policy) -> Result<Self> {
        let all = experts.iter().fold(0usize, |sum, &experts| sum.saturating_add(experts));
        check_expert_count(all)?;
        if capacity > all {
            return Err(Error::parameter("cached experts", capacity, format!("0 to experts {all}")));
        }
        let layers = experts.iter().map(|&experts| ExpertSet::new(experts)).collect::<Result<Vec<_>>>()?;
        let mut all_of = layers.clone();
        all_of.iter_mut().for_each(ExpertSet::fill);
        let first = experts.iter().scan(0, |next, &experts| Some(std::mem::replace(next, *next + experts))).collect();
        let layer_of = experts.iter().zip(0u16..).flat_map(|(&experts, layer)| vec![layer; experts]).collect();
        let order = Order::new(policy, all, capacity)?;
        Ok(Self { policy, capacity, length: 0, layers, all: all_of, first, layer_of, order })
    }

    /// The experts of the first layer, or of the only one, in fast memory.
    pub(crate) fn resident(&self) -> &ExpertSet {
        &self.layers[0]
    }

    /// The experts of a layer in fast memory; `None` for a layer that is not there.
    pub(crate) fn resident_in(&self, layer: usize) -> Option<&ExpertSet> {
        self.layers.get(layer)
    }

    /// The experts of a layer that a router should count as resident: those in fast memory, and all of them while there is room. For
    /// then each that is read stays, and to prefer another one would save nothing. `None` for a layer that is not there.
    pub(crate) fn counted_in(&self, layer: usize) -> Option<&ExpertSet> {
        let sets = if self.length < self.capacity { &self.all } else { &self.layers };
        sets.get(layer)
    }

    /// Experts that fit.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Runs one step of the first layer, or of the only one: see [`Residency::advance_in`].
    ///
    /// # Errors
    /// Those of [`Residency::advance_in`].
    pub(crate) fn advance(&mut self, used: &ExpertSet) -> Result<Step> {
        self.advance_in(0, used)
    }

    /// Runs one step of a layer that uses its experts `used`; misses are taken in from the lowest id on, while there is room that
    /// the step does not use.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that is not there or a set of another one; nothing has changed then.
    pub(crate) fn advance_in(&mut self, layer: usize, used: &ExpertSet) -> Result<Step> {
        self.check(layer, used)?;
        Ok(self.step(layer, used, |_, _| ()))
    }

    /// The same, and says which experts have to be read and which have left, in place of what `paging` held.
    ///
    /// # Errors
    /// Those of [`Residency::advance_in`]; then neither the memory nor `paging` has changed.
    pub(crate) fn page(&mut self, layer: usize, used: &ExpertSet, paging: &mut Paging) -> Result<Step> {
        self.check(layer, used)?;
        for set in [&mut paging.urgent, &mut paging.streamed] {
            set.reset(used.experts())?;
        }
        paging.out.clear();
        paging.urgent.insert_missing(used, Some(&self.layers[layer]));
        let step = self.step(layer, used, |layer, expert| paging.out.push((layer, expert)));
        paging.streamed.insert_missing(used, Some(&self.layers[layer]));
        Ok(step)
    }

    fn check(&self, layer: usize, used: &ExpertSet) -> Result<()> {
        let Some(resident) = self.layers.get(layer) else {
            return Err(Error::shape("layer", format!("one of {}", self.layers.len()), layer));
        };
        if used.experts() != resident.experts() {
            let expected = format!("a set of {} experts", resident.experts());
            return Err(Error::shape("used experts", expected, format!("one of {}", used.experts())));
        }
        Ok(())
    }

    fn step(&mut self, layer: usize, used: &ExpertSet, mut out: impl FnMut(usize, ExpertId)) -> Step {
        let first = self.first[layer];
        let mut step = Step::default();
        self.order.begin();
        for expert in used.iter() {
            self.order.use_key(first + expert.index());
            match self.layers[layer].contains(expert) {
                true => step.hits += 1,
                false => step.misses += 1,
            }
        }
        // All that the step does not use may leave.
        let mut taken = step.misses.min(self.capacity - step.hits);
        while self.length + taken > self.capacity
            && let Some(key) = self.order.evict()
        {
            let layer = usize::from(self.layer_of[key]);
            let expert = ExpertId::from_raw((key - self.first[layer]) as u16);
            self.layers[layer].remove(expert);
            self.length -= 1;
            step.evictions += 1;
            out(layer, expert);
        }
        for expert in used.iter() {
            if !self.layers[layer].contains(expert) {
                if taken == 0 {
                    continue;
                }
                taken -= 1;
                self.length += 1;
                self.layers[layer].insert(expert);
            }
            self.order.keep(first + expert.index());
        }
        step
    }
}

#[cfg(test)]
mod tests;
