//! Score functions, and the groups that a model may limit a token to: what they are, and the kernels that score rows with them.
//!
//! Knows nothing of selection biases or combine weights.

use serde::{Deserialize, Serialize};

use crate::simd::score::{any_masked, sigmoid, softmax};
use crate::simd::{Kernel, Lanes};

/// How a logit becomes a score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum ScoreFunction {
    /// Over all experts of the token; the scores of a row sum to 1.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
    /// Two experts picked one after the other, each weighed by a softmax over those that are left and near it (SparseMixer at
    /// inference, arXiv 2409.12136; Phi-3.5-MoE). An expert is near a pick with logit `m` where
    /// `(m − logit) / max(|logit|, m) ≤ 2 · jitter`.
    ///
    /// The best expert's gate score is its share among those near it. Of every other it is the share in the second pick, so
    /// 0 far from the second best: a router that gives a token another expert than these two weighs it as if it had been in
    /// their place. The selection score is the softmax over all, since the weight of the second pick may be above that
    /// of the first.
    SparseMixer {
        /// How near is near, at least 0.
        jitter: f32,
    },
}

/// What a group of experts is worth when a model limits a token to its best groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GroupScore {
    /// The best selection score of the group (DeepSeek-V2).
    Max,
    /// The sum of its two best (DeepSeek-V3).
    TopTwo,
}

/// Experts in `groups` equal contiguous groups, of which a token may use its best `top_groups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupLimit {
    /// Groups the experts are cut into.
    pub groups: usize,
    /// Groups a token may use.
    pub top_groups: usize,
    /// What ranks the groups.
    pub score: GroupScore,
}

/// Scores a run of rows; true when some logit is masked.
pub(super) struct ScoreRows<'a> {
    pub(super) function: ScoreFunction,
    pub(super) experts: usize,
    pub(super) logits: &'a [f32],
    pub(super) gate: &'a mut [f32],
}

impl Kernel for ScoreRows<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> bool {
        let mut masked = false;
        for (logits, gate) in self.logits.chunks_exact(self.experts).zip(self.gate.chunks_exact_mut(self.experts)) {
            masked |= any_masked(lanes, logits);
            match self.function {
                // A sparse mixer's selection scores are these; its gate scores are made of them.
                ScoreFunction::Softmax | ScoreFunction::SparseMixer { .. } => softmax(lanes, logits, gate),
                ScoreFunction::Sigmoid => sigmoid(lanes, logits, gate),
            }
        }
        masked
    }
}

/// Makes the gate scores of a sparse mixer of softmax scores.
pub(super) struct MixRows<'a> {
    pub(super) jitter: f32,
    pub(super) logits: &'a [f32],
    /// Room for the logits of a row.
    pub(super) near: &'a mut [f32],
    pub(super) gate: &'a mut [f32],
}

impl Kernel for MixRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let experts = self.near.len();
        for (logits, gate) in self.logits.chunks_exact(experts).zip(self.gate.chunks_exact_mut(experts)) {
            let Some(first) = best(logits, None) else { continue };
            let second = best(logits, Some(first));
            near(logits, logits[first], self.jitter, self.near);
            softmax(lanes, self.near, gate);
            let share = gate[first];
            match second {
                Some(second) => {
                    near(logits, logits[second], self.jitter, self.near);
                    self.near[first] = f32::NEG_INFINITY;
                    softmax(lanes, self.near, gate);
                }
                None => gate.fill(0.0),
            }
            gate[first] = share;
        }
    }
}

/// The largest logit but that of `other`, the first of equals; `None` where all are masked.
fn best(logits: &[f32], other: Option<usize>) -> Option<usize> {
    let others = (0..logits.len()).filter(|&expert| Some(expert) != other && logits[expert] > f32::NEG_INFINITY);
    others.reduce(|best, expert| if logits[expert] > logits[best] { expert } else { best })
}

/// The logits that are near the largest of those that count, −∞ for the others.
fn near(logits: &[f32], largest: f32, jitter: f32, near: &mut [f32]) {
    for (near, &logit) in near.iter_mut().zip(logits) {
        let distance = (largest - logit) / logit.abs().max(largest);
        *near = if distance > 2.0 * jitter { f32::NEG_INFINITY } else { logit };
    }
}

/// Masks every group but the best `top_groups` (ties to the lower group).
pub(super) fn mask_groups(selection: &mut [f32], limit: GroupLimit, ranked: &mut Vec<(f32, usize)>) {
    let width = selection.len() / limit.groups;
    let scored = selection
        .chunks_exact(width)
        .map(|group| {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &score in group {
                if score > first {
                    (first, second) = (score, first);
                } else if score > second {
                    second = score;
                }
            }
            match limit.score {
                GroupScore::TopTwo if second > f32::NEG_INFINITY => first + second,
                _ => first,
            }
        })
        .zip(0..);
    ranked.clear();
    ranked.extend(scored);
    ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for &(_, group) in &ranked[limit.top_groups..] {
        selection[group * width..(group + 1) * width].fill(f32::NEG_INFINITY);
    }
}
