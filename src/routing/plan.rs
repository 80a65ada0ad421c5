//! The dispatch plan: the kept slots of an [`Assignment`] sorted by expert, the order in which experts want them.
//!
//! A counting sort (as in ScatterMoE, arXiv 2403.08245): `offsets[e]..offsets[e + 1]` are the slots of expert `e`, within an
//! expert in token order. Knows nothing of weights of experts or hidden states.
//!
//! ```
//! use phase_moe::{Assignment, DispatchPlan};
//!
//! let assignment = Assignment::from_parts(3, 2, &[2, 0, 2, -1], &[0.6, 0.4, 0.9, 0.0])?;
//! let plan = DispatchPlan::from(&assignment);
//! assert_eq!(plan.offsets(), [0, 1, 1, 3]);
//! assert_eq!(plan.tokens(), [0, 0, 1]);
//! assert_eq!(plan.weights(), [0.4, 0.6, 0.9]);
//! # Ok::<(), phase_moe::Error>(())
//! ```

use std::ops::Range;

use crate::expert::{ExpertId, ExpertSet};
use crate::routing::assignment::Assignment;
use crate::routing::slots::EMPTY;

/// Kept slots sorted by expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DispatchPlan {
    offsets: Vec<u32>,
    tokens: Vec<u32>,
    slots: Vec<u32>,
    weights: Vec<f32>,
}

impl From<&Assignment> for DispatchPlan {
    fn from(assignment: &Assignment) -> Self {
        let mut plan = Self::default();
        plan.refill(assignment);
        plan
    }
}

impl DispatchPlan {
    /// Sorts the kept slots of `assignment` by expert, then by token, in place of what the plan held before; nothing is allocated once it has held as many slots and experts.
    pub fn refill(&mut self, assignment: &Assignment) {
        let Self { offsets, tokens, slots, weights } = self;
        let (chosen, width) = (assignment.raw(), assignment.width().max(1));
        // Two places further on than in the end: counts become starts in one of them and, as slots are placed, ends.
        offsets.clear();
        offsets.resize(assignment.experts() + 2, 0);
        for &expert in chosen.iter().filter(|&&expert| expert != EMPTY) {
            offsets[usize::from(expert) + 2] += 1;
        }
        for expert in 2..offsets.len() {
            offsets[expert] += offsets[expert - 1];
        }
        let kept = offsets.last().copied().unwrap_or(0) as usize;
        tokens.resize(kept, 0);
        slots.resize(kept, 0);
        weights.resize(kept, 0.0);
        let rows = chosen.chunks_exact(width).zip(assignment.weights().chunks_exact(width));
        for ((token, slot), (chosen, values)) in (0u32..).zip((0u32..).step_by(width)).zip(rows) {
            for ((slot, &expert), &weight) in (slot..).zip(chosen).zip(values) {
                if expert != EMPTY {
                    let next = &mut offsets[usize::from(expert) + 1];
                    let at = *next as usize;
                    *next += 1;
                    (tokens[at], slots[at], weights[at]) = (token, slot, weight);
                }
            }
        }
        offsets.pop();
    }

    /// The slots of some experts and of tokens that are here, in `into` and place of what that held: `index_of[token]` is the number that a
    /// token has here, `u32::MAX` where it is elsewhere. Slots keep their order.
    pub(crate) fn here(&self, experts: &ExpertSet, index_of: &[u32], into: &mut Self) {
        let Self { offsets, tokens, slots, weights } = into;
        offsets.clear();
        tokens.clear();
        slots.clear();
        weights.clear();
        offsets.push(0);
        for (expert, pair) in self.offsets.windows(2).enumerate() {
            let is_here = experts.contains(ExpertId::from_raw(expert as u16));
            for slot in (pair[0] as usize..pair[1] as usize).filter(|_| is_here) {
                let index = index_of[self.tokens[slot] as usize];
                if index != u32::MAX {
                    tokens.push(index);
                    slots.push(self.slots[slot]);
                    weights.push(self.weights[slot]);
                }
            }
            offsets.push(tokens.len() as u32);
        }
    }

    /// Where each expert's slots begin, `[experts + 1]`; the last is the number of kept slots.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Token of each sorted slot.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Position of each sorted slot in the assignment, `token · width + slot`.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Combine weight of each sorted slot.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Experts that have slots, lowest first, each with its range of sorted slots.
    pub fn busy_experts(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let ranges = self.offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize);
        ranges.enumerate().filter(|(_, range)| !range.is_empty())
    }
}
