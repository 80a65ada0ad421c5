//! Belady's bound: the most hits that any policy could have had on a known sequence of requests.
//!
//! All experts of a step must be served; one that was resident before the step is a hit. After it any of the residents and of
//! the step's experts may stay, as many as fit; none has to (bypass). So every stay of an expert from one of its uses to the next is
//! an interval worth one hit, at most `cached` may overlap, and keeping those that end first is optimal (Belady 1966; Mattson et al.
//! 1970).
//!
//! ```
//! use phase_moe::{ExpertId, ExpertSet};
//! use phase_moe::offload::RequestLog;
//!
//! let mut log = RequestLog::default();
//! for id in [1, 2, 1, 3, 2] {
//!     let mut step = ExpertSet::new(4)?;
//!     step.insert(ExpertId::new(id, 4)?);
//!     log.push(&step);
//! }
//! assert_eq!((log.most_hits(1), log.most_hits(2)), (1, 2));
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of how the requests came about; those of a memory-aware router depend on what was resident, and the bound is for
//! the sequence as it was.

use crate::expert::ExpertSet;

/// The distinct experts of every step of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestLog {
    experts: Vec<u16>,
    /// End of each step in `experts`.
    ends: Vec<usize>,
}

/// No further use.
const NEVER: usize = usize::MAX;

impl RequestLog {
    /// Adds a step.
    pub fn push(&mut self, used: &ExpertSet) {
        self.experts.extend(used.iter().map(|expert| expert.index() as u16));
        self.ends.push(self.experts.len());
    }

    /// The most hits of any policy with room for `cached` experts, from an empty memory.
    pub fn most_hits(&self, cached: usize) -> usize {
        let next = self.next_uses();
        let start = |step: usize| if step == 0 { 0 } else { self.ends[step - 1] };
        // Step of the next use of each resident expert. One that is due now is among the step's own requests.
        let (mut resident, mut hits): (Vec<usize>, usize) = (Vec::new(), 0);
        for step in 0..self.ends.len() {
            let before = resident.len();
            resident.retain(|&due| due != step);
            hits += before - resident.len();
            resident.extend(next[start(step)..self.ends[step]].iter().filter(|&&due| due != NEVER));
            if resident.len() > cached {
                resident.sort_unstable();
                resident.truncate(cached);
            }
        }
        hits
    }

    /// For each request the step of the same expert's next one.
    fn next_uses(&self) -> Vec<usize> {
        let most = self.experts.iter().max().map_or(0, |&expert| usize::from(expert) + 1);
        let (mut upcoming, mut next) = (vec![NEVER; most], vec![NEVER; self.experts.len()]);
        for step in (0..self.ends.len()).rev() {
            let start = if step == 0 { 0 } else { self.ends[step - 1] };
            let of_step = start..self.ends[step];
            for (next, &expert) in next[of_step.clone()].iter_mut().zip(&self.experts[of_step]) {
                *next = std::mem::replace(&mut upcoming[usize::from(expert)], step);
            }
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expert::ExpertId;
    use crate::offload::residency::{Policy, Residency};
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn set(bits: u8) -> ExpertSet {
        let mut set = ExpertSet::new(8).unwrap();
        for id in (0..8).filter(|id| bits >> id & 1 == 1) {
            set.insert(ExpertId::new(id, 8).unwrap());
        }
        set
    }

    fn log(steps: &[u8]) -> RequestLog {
        let mut log = RequestLog::default();
        steps.iter().for_each(|&bits| log.push(&set(bits)));
        log
    }

    /// The oracle tries every set that may stay after every step.
    fn brute_force(steps: &[u8], cached: u32) -> usize {
        let mut best: HashMap<u8, usize> = HashMap::from([(0, 0)]);
        for &used in steps {
            let mut after: HashMap<u8, usize> = HashMap::new();
            for (resident, hits) in best {
                let hits = hits + (resident & used).count_ones() as usize;
                for stay in (0..=u8::MAX).filter(|stay| stay & !(resident | used) == 0 && stay.count_ones() <= cached) {
                    let known = after.entry(stay).or_default();
                    *known = hits.max(*known);
                }
            }
            best = after;
        }
        best.into_values().max().unwrap_or(0)
    }

    #[test]
    fn nothing_asked_is_nothing_hit() {
        assert_eq!(RequestLog::default().most_hits(3), 0);
        assert_eq!(log(&[0, 0]).most_hits(1), 0);
        assert_eq!(log(&[1, 1]).most_hits(0), 0);
    }

    proptest! {
        #[test]
        fn it_is_the_optimum(steps in prop::collection::vec(0u8..32, 0..9), cached in 0u32..5) {
            prop_assert_eq!(log(&steps).most_hits(cached as usize), brute_force(&steps, cached));
        }

        #[test]
        fn no_policy_beats_it(steps in prop::collection::vec(any::<u8>(), 0..60), cached in 0usize..=8) {
            for policy in Policy::ALL {
                let mut cache = Residency::new(8, cached, policy).unwrap();
                let hits: usize = steps.iter().map(|&bits| cache.advance(&set(bits)).unwrap().hits).sum();
                prop_assert!(hits <= log(&steps).most_hits(cached), "{policy:?}");
            }
        }
    }
}
