//! Which experts of every layer are in fast memory while a model runs: what routers read, and what their choice makes of it.
//!
//! One logical [`Residency`] a layer, advanced once a layer and step: `counted(layer) → router → assignment →
//! advance(layer)`. `hits + misses = requests`, a request being a distinct expert of a layer and step. This is the whole seam
//! between routing and an expert cache: what owns bytes follows it, and routing never waits to know.
//!
//! Before a miss comes to the [`Policy`] it passes [`Admission`]: one that is used once and not again would only drive out
//! a better one, so it is streamed. That is what makes a memory smaller than one token's experts useful at all, and why the
//! policy behind it matters little.
//!
//! Knows nothing of bytes, reads, scores or text.

use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::offload::admission::{Admission, Admitted};
use crate::offload::residency::{Policy, Residency, Step};
use crate::routing::assignment::Assignment;

/// The logical resident set of one layer.
#[derive(Clone, Debug)]
struct Layer {
    residency: Residency,
    admitted: Admitted,
}

/// The logical resident set of every MoE layer, and the requests that it met.
#[derive(Clone, Debug)]
pub struct ExpertMemory {
    layers: Vec<Layer>,
    experts: usize,
    asked: ExpertSet,
    requests: u64,
    hits: u64,
}

impl ExpertMemory {
    /// Empty, with room for `cached` of the `experts` of each of `layers` layers.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts, [`Error::Parameter`] for an admission that cannot be.
    pub fn new(layers: usize, experts: usize, cached: usize, policy: Policy, admission: Admission) -> Result<Self> {
        let residency = Residency::new(experts, cached, policy)?;
        let layer = Layer { residency, admitted: Admitted::new(experts, admission)? };
        Ok(Self { layers: vec![layer; layers], experts, asked: ExpertSet::default(), requests: 0, hits: 0 })
    }

    /// Layers.
    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Experts of a layer, in fast memory or not.
    pub(crate) fn experts(&self) -> usize {
        self.experts
    }

    /// The experts of `layer` that are in fast memory; `None` for a layer that there is not.
    pub fn resident(&self, layer: usize) -> Option<&ExpertSet> {
        self.layers.get(layer).map(|layer| layer.residency.resident())
    }

    /// The experts of `layer` that a router should count as resident: see [`Residency::counted_in`]. `None` for a layer that there is
    /// not.
    pub(crate) fn counted(&self, layer: usize) -> Option<&ExpertSet> {
        self.layers.get(layer).and_then(|layer| layer.residency.counted_in(0))
    }

    /// Runs a step of `layer` that uses the experts of `assignment`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that there is not, or an assignment of other experts; nothing has changed then.
    pub(crate) fn advance(&mut self, layer: usize, assignment: &Assignment) -> Result<Step> {
        let (layers, experts) = (self.layers.len(), self.experts());
        let Some(layer) = self.layers.get_mut(layer) else {
            return Err(Error::shape("layer", format!("one of {layers}"), layer));
        };
        if assignment.experts() != experts {
            let got = format!("one of {}", assignment.experts());
            return Err(Error::shape("assignment", format!("one of {experts} experts"), got));
        }
        assignment.used_experts(&mut self.asked)?;
        let asked = &self.asked;
        let Layer { residency, admitted } = layer;
        let (requests, resident) = (asked.len(), residency.resident());
        let hits = asked.iter().filter(|&expert| resident.contains(expert)).count();
        let used = admitted.admit(asked, resident, residency.capacity())?;
        let evictions = residency.advance(used)?.evictions;
        self.requests += requests as u64;
        self.hits += hits as u64;
        Ok(Step { hits, misses: requests - hits, evictions })
    }

    /// Distinct experts per layer and step, summed.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Requests whose expert was in fast memory.
    pub fn hits(&self) -> u64 {
        self.hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expert::ExpertId;
    use crate::routing::affinity::{Affinity, Decay};
    use proptest::prelude::*;

    const EXPERTS: usize = 12;

    fn assignment(ids: &[usize]) -> Assignment {
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        Assignment::from_parts(EXPERTS, 4, &ids, &vec![0.1; ids.len()]).unwrap()
    }

    fn ids(memory: &ExpertMemory) -> Vec<usize> {
        memory.resident(0).unwrap().iter().map(ExpertId::index).collect()
    }

    #[test]
    fn a_miss_that_is_used_once_is_streamed() {
        let mut memory = ExpertMemory::new(1, 8, 2, Policy::Lru, Admission::default()).unwrap();
        let often = Assignment::from_parts(8, 2, &[3, 5], &[0.6, 0.4]).unwrap();
        let once = Assignment::from_parts(8, 2, &[3, 7], &[0.6, 0.4]).unwrap();
        assert_eq!(memory.advance(0, &often).unwrap().misses, 2);
        assert_eq!(memory.advance(0, &often).unwrap().hits, 2);
        assert_eq!(memory.advance(0, &once).unwrap().misses, 1); // 7 is streamed: 5 is used more
        assert_eq!(memory.advance(0, &often).unwrap().hits, 2);
        assert_eq!((memory.requests(), memory.hits()), (8, 5));
    }

    #[test]
    fn what_does_not_fit_leaves_the_best_in_place() {
        let mut memory = ExpertMemory::new(1, EXPERTS, 1, Policy::Lru, Admission::default()).unwrap();
        for step in 0..20 {
            memory.advance(0, &assignment(&[step % 3, 3, 4 + step % 7, 11])).unwrap();
        }
        assert_eq!(ids(&memory), [3]);
        assert_eq!((memory.requests(), memory.hits()), (80, 18), "of two alike the one that is in stays");
        let nothing = ExpertMemory::new(1, EXPERTS, 0, Policy::Lru, Admission::default());
        assert_eq!(nothing.unwrap().advance(0, &assignment(&[1, 2, 3, 4])).unwrap().misses, 4);
    }

    #[test]
    fn what_is_wrong_changes_nothing() {
        let mut memory = ExpertMemory::new(2, EXPERTS, 3, Policy::Lru, Admission::default()).unwrap();
        memory.advance(1, &assignment(&[1, 2, 3, 4])).unwrap();
        let other = Assignment::from_parts(8, 1, &[3], &[0.5]).unwrap();
        let message = memory.advance(1, &other).unwrap_err().to_string();
        assert_eq!(message, "assignment: expected one of 12 experts, got one of 8");
        assert_eq!(
            memory.advance(2, &assignment(&[1, 2, 3, 4])).unwrap_err().to_string(),
            "layer: expected one of 2, got 2"
        );
        assert_eq!((memory.requests(), memory.resident(1).unwrap().len(), memory.resident(2)), (4, 3, None));
    }

    proptest! {
        /// The oracle ranks all experts by affinity and lets in those of the step that are among the first.
        #[test]
        fn the_most_used_may_enter(
            steps in prop::collection::vec(prop::sample::subsequence((0..EXPERTS).collect::<Vec<_>>(), 4), 1..60),
            cached in 0usize..=EXPERTS,
        ) {
            let mut memory = ExpertMemory::new(1, EXPERTS, cached, Policy::Lru, Admission::default()).unwrap();
            let mut plain = Residency::new(EXPERTS, cached, Policy::Lru).unwrap();
            let mut affinity = Affinity::new(EXPERTS, Decay::SLOW).unwrap();
            for (used, step) in steps.iter().zip(1u64..) {
                let before = ids(&memory);
                used.iter().for_each(|&id| affinity.use_expert(ExpertId::from_raw(id as u16), step));
                let value = |id: usize| affinity.at(ExpertId::from_raw(id as u16), step);
                let mut ranked: Vec<usize> = (0..EXPERTS).filter(|id| before.contains(id) || used.contains(id)).collect();
                ranked.sort_by(|&a, &b| {
                    value(b).total_cmp(&value(a)).then(before.contains(&b).cmp(&before.contains(&a))).then(a.cmp(&b))
                });
                ranked.truncate(cached);
                let mut admitted = ExpertSet::new(EXPERTS).unwrap();
                used.iter().filter(|id| before.contains(id) || ranked.contains(id)).for_each(|&id| {
                    admitted.insert(ExpertId::from_raw(id as u16));
                });
                plain.advance(&admitted).unwrap();
                let step = memory.advance(0, &assignment(used)).unwrap();
                prop_assert_eq!(step.hits, used.iter().filter(|id| before.contains(id)).count());
                prop_assert_eq!(step.hits + step.misses, 4);
                prop_assert_eq!(memory.resident(0).unwrap(), plain.resident());
            }
        }
    }
}
