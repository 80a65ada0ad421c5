//! The logical resident set: which experts of a layer are in fast memory, advanced step by step.
//!
//! `hits + misses = distinct experts of the step`. Experts that a step uses are pinned while it runs: a miss takes free room or that
//! of an expert the step does not use, chosen by the [`Policy`]. Where a step needs more experts than fit, the rest are streamed:
//! used and not kept, which counts as a miss.
//!
//! ```
//! use phase_moe::experts::residency::{Policy, Residency};
//! use phase_moe::expert::{ExpertId, ExpertSet};
//!
//! let set = |ids: &[usize]| -> phase_moe::error::Result<ExpertSet> {
//!     let mut set = ExpertSet::new(8)?;
//!     for &id in ids {
//!         set.insert(ExpertId::new(id, 8)?);
//!     }
//!     Ok(set)
//! };
//! let mut cache = Residency::new(8, 2, Policy::Lru)?;
//! assert_eq!(cache.advance(&set(&[1, 2])?)?.misses, 2);
//! let step = cache.advance(&set(&[2, 5])?)?;
//! assert_eq!((step.hits, step.misses, step.evictions), (1, 1, 1));
//! assert_eq!(cache.resident(), &set(&[2, 5])?);
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of bytes, reads or threads.

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};

/// Who leaves when a miss needs room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The expert whose last use is longest ago (ties: lowest id).
    Lru,
    /// The expert that the fewest steps have used (ties: longest ago, then lowest id).
    Lfu,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 2] = [Self::Lru, Self::Lfu];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
        }
    }
}

impl std::str::FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| Error::UnknownName {
            kind: "policy",
            got: name.into(),
            expected: Self::ALL.map(Self::name).join(", "),
        })
    }
}

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

/// The experts of one layer that are in fast memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    policy: Policy,
    capacity: usize,
    resident: ExpertSet,
    /// Step of the last use and steps that used it, per expert, resident or not.
    uses: Vec<(u64, u64)>,
    step: u64,
}

impl Residency {
    /// An empty fast memory for `capacity` of the `experts` of a layer; with 0 everything is streamed.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts, [`Error::Parameter`] for a capacity above `experts`.
    pub fn new(experts: usize, capacity: usize, policy: Policy) -> Result<Self> {
        let resident = ExpertSet::new(experts)?;
        if capacity > experts {
            return Err(Error::parameter("cached experts", capacity, format!("0 to experts {experts}")));
        }
        Ok(Self { policy, capacity, resident, uses: vec![(0, 0); experts], step: 0 })
    }

    /// The experts in fast memory: what routers read.
    pub fn resident(&self) -> &ExpertSet {
        &self.resident
    }

    /// Experts that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Runs one step that uses the experts `used`; misses are taken in from the lowest id on, while there is room that the step
    /// does not use.
    ///
    /// # Errors
    /// [`Error::Shape`] for a set of another layer.
    pub fn advance(&mut self, used: &ExpertSet) -> Result<Step> {
        if used.experts() != self.resident.experts() {
            return Err(Error::shape(
                "used experts",
                format!("a set of {} experts", self.resident.experts()),
                format!("one of {}", used.experts()),
            ));
        }
        self.step = self.step.saturating_add(1);
        let mut step = Step::default();
        for expert in used.iter() {
            let (last, count) = &mut self.uses[expert.index()];
            (*last, *count) = (self.step, count.saturating_add(1));
            match self.resident.contains(expert) {
                true => step.hits += 1,
                false => step.misses += 1,
            }
        }
        let mut room = self.capacity - self.resident.len();
        let missing: Vec<ExpertId> = used.iter().filter(|&expert| !self.resident.contains(expert)).collect();
        for expert in missing {
            if room > 0 {
                room -= 1;
            } else if let Some(victim) = self.victim(used) {
                self.resident.remove(victim);
                step.evictions += 1;
            } else {
                break;
            }
            self.resident.insert(expert);
        }
        Ok(step)
    }

    /// Who would leave next, of the residents that the step does not use.
    fn victim(&self, pinned: &ExpertSet) -> Option<ExpertId> {
        let rank = |expert: &ExpertId| {
            let (last, count) = self.uses[expert.index()];
            match self.policy {
                Policy::Lru => (last, 0),
                Policy::Lfu => (count, last),
            }
        };
        self.resident.iter().filter(|&expert| !pinned.contains(expert)).min_by_key(rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(ids: impl IntoIterator<Item = usize>) -> ExpertSet {
        let mut set = ExpertSet::new(8).unwrap();
        ids.into_iter().for_each(|id| assert!(set.insert(ExpertId::new(id, 8).unwrap())));
        set
    }

    fn run(policy: Policy, capacity: usize, steps: &[&[usize]]) -> (Vec<Step>, ExpertSet) {
        let mut cache = Residency::new(8, capacity, policy).unwrap();
        let steps = steps.iter().map(|ids| cache.advance(&set(ids.iter().copied())).unwrap()).collect();
        (steps, cache.resident)
    }

    #[test]
    fn the_policies_evict_whom_they_say() {
        let steps: &[&[usize]] = &[&[0], &[0], &[1], &[2]];
        assert_eq!(run(Policy::Lru, 2, steps).1, set([1, 2]));
        assert_eq!(run(Policy::Lfu, 2, steps).1, set([0, 2]));
        assert_eq!(run(Policy::Lfu, 2, &[&[0], &[1], &[2]]).1, set([1, 2]), "the older of two as rare ones goes");
    }

    #[test]
    fn a_step_that_does_not_fit_is_streamed() {
        let (steps, resident) = run(Policy::Lru, 2, &[&[5], &[1, 2, 3, 5], &[1, 5]]);
        assert_eq!(steps[1], Step { hits: 1, misses: 3, evictions: 0 });
        assert_eq!(steps[2], Step { hits: 2, misses: 0, evictions: 0 });
        assert_eq!(resident, set([1, 5]));
        let (steps, resident) = run(Policy::Lfu, 0, &[&[5], &[5]]);
        assert_eq!((steps[1].misses, resident.len()), (1, 0));
    }

    #[test]
    fn mistakes_are_named() {
        let message = Residency::new(8, 9, Policy::Lru).unwrap_err().to_string();
        assert_eq!(message, "cached experts is 9: expected 0 to experts 8");
        assert!(Residency::new(0, 0, Policy::Lru).is_err());
        let mut cache = Residency::new(8, 2, Policy::Lru).unwrap();
        let message = cache.advance(&ExpertSet::new(9).unwrap()).unwrap_err().to_string();
        assert_eq!(message, "used experts: expected a set of 8 experts, got one of 9");
        assert_eq!(
            "fifo".parse::<Policy>().unwrap_err().to_string(),
            "unknown policy `fifo`: expected one of lru, lfu"
        );
    }

    proptest! {
        /// The oracle keeps a list in order of use and walks it from its old end.
        #[test]
        fn lru_matches_a_list(steps in prop::collection::vec(prop::collection::btree_set(0usize..8, 0..6), 0..30), capacity in 0usize..=8) {
            let mut cache = Residency::new(8, capacity, Policy::Lru).unwrap();
            let mut list: Vec<usize> = Vec::new();
            for used in steps {
                let step = cache.advance(&set(used.iter().copied())).unwrap();
                let hits: Vec<usize> = list.iter().copied().filter(|expert| used.contains(expert)).collect();
                prop_assert_eq!((step.hits, step.misses), (hits.len(), used.len() - hits.len()));
                list.retain(|expert| !used.contains(expert));
                let misses: Vec<usize> = used.iter().copied().filter(|expert| !hits.contains(expert)).collect();
                let taken = misses.len().min(capacity - hits.len());
                let stay = (capacity - hits.len() - taken).min(list.len());
                prop_assert_eq!(step.evictions, list.len() - stay);
                list.drain(..list.len() - stay);
                let mut now: Vec<usize> = hits.into_iter().chain(misses.into_iter().take(taken)).collect();
                now.sort();
                list.extend(now);
                prop_assert_eq!(cache.resident(), &set(list.iter().copied()));
            }
        }
    }
}
