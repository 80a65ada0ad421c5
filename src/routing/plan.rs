//! The dispatch plan: the kept slots of an [`Assignment`] sorted by expert, the order in which experts want them.
//!
//! A counting sort (as in ScatterMoE, arXiv 2403.08245): `offsets[e]..offsets[e + 1]` are the slots of expert `e`, within an
//! expert in token order. Knows nothing of weights of experts or hidden states.
//!
//! ```
//! use phase_moe::routing::{assignment::Assignment, plan::DispatchPlan};
//!
//! let assignment = Assignment::from_parts(3, 2, &[2, 0, 2, -1], &[0.6, 0.4, 0.9, 0.0])?;
//! let plan = DispatchPlan::new(&assignment);
//! assert_eq!(plan.offsets(), [0, 1, 1, 3]);
//! assert_eq!(plan.tokens(), [0, 0, 1]);
//! assert_eq!(plan.weights(), [0.4, 0.6, 0.9]);
//! # Ok::<(), phase_moe::error::Error>(())
//! ```

use std::ops::Range;

use crate::routing::assignment::{Assignment, EMPTY};

/// Kept slots sorted by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchPlan {
    offsets: Vec<u32>,
    tokens: Vec<u32>,
    slots: Vec<u32>,
    weights: Vec<f32>,
}

impl DispatchPlan {
    /// Sorts the kept slots of `assignment` by expert, then by token.
    pub fn new(assignment: &Assignment) -> Self {
        let (chosen, width) = (assignment.raw(), assignment.width() as u32);
        let mut offsets = vec![0u32; assignment.experts() + 1];
        for &expert in chosen.iter().filter(|&&expert| expert != EMPTY) {
            offsets[usize::from(expert) + 1] += 1;
        }
        for expert in 1..offsets.len() {
            offsets[expert] += offsets[expert - 1];
        }
        let kept = offsets.last().copied().unwrap_or(0) as usize;
        let (mut tokens, mut slots, mut weights) = (vec![0; kept], vec![0; kept], vec![0.0; kept]);
        let mut next = offsets.clone();
        for (slot, (&expert, &weight)) in chosen.iter().zip(assignment.weights()).enumerate() {
            if expert != EMPTY {
                let at = next[usize::from(expert)] as usize;
                next[usize::from(expert)] += 1;
                (tokens[at], slots[at], weights[at]) = (slot as u32 / width, slot as u32, weight);
            }
        }
        Self { offsets, tokens, slots, weights }
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
