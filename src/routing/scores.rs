//! Gate scores: what the gate thinks each expert is worth to each token, `[tokens, experts]` in `f32`.
//!
//! softmax: `score = exp(logit − max) / Σ exp(logit − max)`, sigmoid: `score = 1 / (1 + exp(−logit))`, both the same bits on
//! every CPU. A score below 2^−126 is 0. Sparse mixer: see [`ScoreFunction::SparseMixer`].
//! Two numbers per pair matter: the **gate score** is what combine weights are made of; the **selection score** is what
//! decides which experts are chosen. They differ in a sparse mixer, where a model adds a selection bias (DeepSeek-V3, arXiv 2408.15664) or limits a
//! token to some groups of experts (DeepSeek-V2, arXiv 2405.04434): experts outside are masked with −∞.
//!
//! ```
//! use phase_moe::{Logits, Scoring};
//!
//! let logits = Logits::new(&[0.0, 0.0, f32::NEG_INFINITY], 1, 3)?;
//! let scores = Scoring::softmax().scores(&logits, None)?;
//! assert_eq!(scores.gate(0), [0.5, 0.5, 0.0]);
//! assert!(!scores.is_allowed(0, 2));
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of capacities or routers.

use std::cmp::Ordering;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::routing::logits::Logits;
pub use crate::routing::score_function::{GroupLimit, GroupScore, ScoreFunction};
use crate::routing::score_function::{MixRows, ScoreRows, mask_groups};
use crate::routing::select::{Hint, Selector};
use crate::routing::slots::check_top_k;
use crate::simd::Isa;

/// How a model turns logits into scores and scores into combine weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scoring {
    /// Softmax or sigmoid.
    pub function: ScoreFunction,
    /// Whether combine weights are divided by their sum over the token's selection.
    pub normalize: bool,
    /// Constant factor on the combine weights (`routed_scaling_factor`).
    pub scale: f32,
    /// Limit to the best groups, where the model has one.
    pub groups: Option<GroupLimit>,
}

/// Below this many values the rows are scored on the calling thread: waking another costs more. Run by `examples/router_table`.
const PARALLEL_VALUES: usize = 1 << 15;

impl Scoring {
    /// Softmax, weights as they are: OLMoE and Qwen1.5-MoE.
    pub const fn softmax() -> Self {
        Self { function: ScoreFunction::Softmax, normalize: false, scale: 1.0, groups: None }
    }

    /// A sparse mixer, weights as they are.
    pub(crate) const fn sparse_mixer(jitter: f32) -> Self {
        Self { function: ScoreFunction::SparseMixer { jitter }, normalize: false, scale: 1.0, groups: None }
    }

    /// Sigmoid, weights as they are.
    pub const fn sigmoid() -> Self {
        Self { function: ScoreFunction::Sigmoid, normalize: false, scale: 1.0, groups: None }
    }

    /// The same with combine weights divided by their sum over the selection, or not.
    pub const fn normalized(self, normalize: bool) -> Self {
        Self { normalize, ..self }
    }

    /// The scores of `logits`; `bias` (`[experts]`) is added for selection only.
    ///
    /// # Errors
    /// [`Error::Shape`] for a bias of another length, [`Error::Parameter`] for a bias, a scale or a jitter that is not finite, a negative
    /// jitter, and for groups that do not divide the experts or are more than there are.
    pub fn scores(&self, logits: &Logits<'_>, bias: Option<&[f32]>) -> Result<Scores> {
        let mut scores = Scores::default();
        self.scores_into(logits, bias, &mut scores)?;
        Ok(scores)
    }

    /// The same into `scores`, whatever that held before; nothing is allocated once it has held as many.
    ///
    /// # Errors
    /// Those of [`Scoring::scores`]; `scores` is then as it was.
    pub fn scores_into(&self, logits: &Logits<'_>, bias: Option<&[f32]>, scores: &mut Scores) -> Result<()> {
        let experts = logits.experts();
        self.check(experts, bias)?;
        (scores.tokens, scores.experts) = (logits.tokens(), experts);
        (scores.normalize, scores.scale) = (self.normalize, self.scale);
        scores.gate.resize(logits.values().len(), 0.0);
        let isa = scores.isa;
        let parallel = logits.values().len() >= PARALLEL_VALUES && rayon::current_num_threads() > 1;
        let rows =
            |gate: &mut [f32], logits: &[f32]| isa.run(ScoreRows { function: self.function, experts, logits, gate });
        scores.masked = if parallel {
            let chunk = experts * (PARALLEL_VALUES / 4).div_ceil(experts);
            let chunks = scores.gate.par_chunks_mut(chunk).zip(logits.values().par_chunks(chunk));
            chunks.map(|(gate, logits)| rows(gate, logits)).reduce(|| false, |a, b| a | b)
        } else {
            rows(&mut scores.gate, logits.values())
        };

        let mixed = matches!(self.function, ScoreFunction::SparseMixer { .. });
        scores.adjusted = scores.masked || mixed || bias.is_some() || self.groups.is_some();
        if scores.adjusted {
            scores.selection.resize(scores.gate.len(), 0.0);
            scores.selection.copy_from_slice(&scores.gate);
            if let ScoreFunction::SparseMixer { jitter } = self.function {
                let Scores { gate, near, .. } = &mut *scores;
                near.resize(experts, 0.0);
                isa.run(MixRows { jitter, logits: logits.values(), near, gate });
            }
            let Scores { selection, groups, .. } = scores;
            for (selection, logits) in selection.chunks_exact_mut(experts).zip(logits.values().chunks_exact(experts)) {
                if let Some(bias) = bias {
                    selection.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
                }
                for (score, &logit) in selection.iter_mut().zip(logits) {
                    if logit == f32::NEG_INFINITY {
                        *score = f32::NEG_INFINITY;
                    }
                }
                if let Some(limit) = self.groups {
                    mask_groups(selection, limit, groups);
                }
            }
            scores.masked |= self.groups.is_some_and(|limit| limit.top_groups < limit.groups && logits.tokens() > 0);
        }
        Ok(())
    }

    /// Checks that the scale of combine weights is a number.
    pub(crate) fn check_scale(&self) -> Result<()> {
        match self.scale.is_finite() {
            true => Ok(()),
            false => Err(Error::parameter("scale", self.scale, "a finite number")),
        }
    }

    fn check(&self, experts: usize, bias: Option<&[f32]>) -> Result<()> {
        self.check_scale()?;
        if let ScoreFunction::SparseMixer { jitter } = self.function
            && !(jitter.is_finite() && jitter >= 0.0)
        {
            return Err(Error::parameter("jitter", jitter, "0 or a positive finite number"));
        }
        if let Some(bias) = bias {
            if bias.len() != experts {
                return Err(Error::shape(
                    "selection bias",
                    format!("{experts} values"),
                    format!("{} values", bias.len()),
                ));
            }
            if let Some(bad) = bias.iter().find(|value| !value.is_finite()) {
                return Err(Error::parameter("selection bias", bad, "finite numbers"));
            }
        }
        if let Some(limit) = self.groups {
            if limit.groups == 0 || !experts.is_multiple_of(limit.groups) {
                return Err(Error::parameter("groups", limit.groups, format!("a divisor of experts {experts}")));
            }
            if limit.top_groups == 0 || limit.top_groups > limit.groups {
                return Err(Error::parameter("top_groups", limit.top_groups, format!("1 to groups {}", limit.groups)));
            }
        }
        Ok(())
    }
}

/// Gate scores of a batch, with what selection and combine weights need to know beside them.
///
/// The default holds none, and grows with the first [`Scoring::scores_into`].
#[derive(Clone, Debug, Default)]
pub struct Scores {
    gate: Vec<f32>,
    /// Meant only where `adjusted` is set: else selection scores are the gate scores.
    selection: Vec<f32>,
    adjusted: bool,
    masked: bool,
    tokens: usize,
    experts: usize,
    normalize: bool,
    scale: f32,
    isa: Isa,
    /// Room to rank groups in.
    groups: Vec<(f32, usize)>,
    /// Room for a row of a sparse mixer.
    near: Vec<f32>,
}

impl Scores {
    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The gate scores of one token, `[experts]`, in `[0, 1]`; a masked expert has 0.
    ///
    /// # Panics
    /// When `token` is not below [`Scores::tokens`].
    pub fn gate(&self, token: usize) -> &[f32] {
        &self.gate[token * self.experts..(token + 1) * self.experts]
    }

    /// The selection scores of one token, `[experts]`: gate score plus bias, −∞ where masked.
    ///
    /// # Panics
    /// When `token` is not below [`Scores::tokens`].
    pub fn selection(&self, token: usize) -> &[f32] {
        let all = if self.adjusted { &self.selection } else { &self.gate };
        &all[token * self.experts..(token + 1) * self.experts]
    }

    /// False where the expert is masked for this token.
    ///
    /// # Panics
    /// When `token` is not below [`Scores::tokens`] or `expert` not below [`Scores::experts`].
    pub fn is_allowed(&self, token: usize, expert: usize) -> bool {
        self.selection(token)[expert] > f32::NEG_INFINITY
    }

    /// Multiplies the selection scores by `worth` (`[tokens, experts]`, row-major), but never lets an expert past the token's
    /// own `top_k`: where no expert has to move, nothing changes. Combine weights and masks stay. A bound on gate mass found with
    /// such scores is as valid as any, only looser.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of values, [`Error::Parameter`] for one that is negative or not finite, or that
    /// gives a product that is not finite; the scores are then as they were. [`Error::TopKZero`],
    /// [`Error::TopKExceedsExperts`].
    pub(crate) fn weigh_selection(&mut self, worth: &[f32], top_k: usize) -> Result<()> {
        check_top_k(top_k, self.experts)?;
        if worth.len() != self.gate.len() {
            let expected = format!("{} tokens of {} experts", self.tokens, self.experts);
            return Err(Error::shape("worth", expected, format!("{} values", worth.len())));
        }
        let mut weighed = if self.adjusted { self.selection.clone() } else { self.gate.clone() };
        let mut selector = Selector::new(self.experts, top_k);
        for (row, worth) in weighed.chunks_exact_mut(self.experts).zip(worth.chunks_exact(self.experts)) {
            selector.select(row, None, Hint::NONE);
            for (score, &worth) in row.iter_mut().zip(worth).filter(|(score, _)| **score > f32::NEG_INFINITY) {
                *score *= worth;
                if !(worth.is_finite() && worth >= 0.0 && score.is_finite()) {
                    return Err(Error::parameter("worth", worth, "finite numbers, at least 0"));
                }
            }
            let own = |expert: usize| selector.ids().iter().any(|&id| usize::from(id) == expert);
            let least = selector.ids().iter().map(|&id| row[usize::from(id)]).fold(f32::INFINITY, f32::min);
            let others = row.iter_mut().enumerate().filter(|(expert, _)| !own(*expert));
            others.for_each(|(_, score)| *score = score.min(least.next_down()));
        }
        (self.selection, self.adjusted) = (weighed, true);
        Ok(())
    }

    /// Becomes the scores of one token of `all`, a batch of its own, in place of what it held.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a token that is not there; nothing has changed then.
    pub(crate) fn refill_from(&mut self, all: &Self, token: usize) -> Result<()> {
        if token >= all.tokens {
            return Err(Error::parameter("token", token, format!("below {}", all.tokens)));
        }
        let row = token * all.experts..(token + 1) * all.experts;
        self.gate.clear();
        self.gate.extend_from_slice(&all.gate[row.clone()]);
        self.selection.clear();
        if all.adjusted {
            self.selection.extend_from_slice(&all.selection[row]);
        }
        (self.adjusted, self.masked) = (all.adjusted, all.masked);
        (self.tokens, self.experts) = (1, all.experts);
        (self.normalize, self.scale) = (all.normalize, all.scale);
        Ok(())
    }

    /// Orders two tokens by what their rows hold, selection scores first: equal only where the rows are identical.
    pub(crate) fn compare_rows(&self, token: usize, other: usize) -> Ordering {
        let content = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| a.total_cmp(b)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
        };
        content(self.selection(token), self.selection(other)).then_with(|| content(self.gate(token), self.gate(other)))
    }

    /// True when some expert is masked for some token.
    pub(crate) fn has_masks(&self) -> bool {
        self.masked
    }

    /// Whether combine weights are divided by their sum over the selection.
    pub(crate) fn normalize(&self) -> bool {
        self.normalize
    }

    /// Constant factor on the combine weights.
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(scoring: Scoring, values: &[f32], experts: usize, bias: Option<&[f32]>) -> Scores {
        scoring.scores(&Logits::new(values, values.len() / experts, experts).unwrap(), bias).unwrap()
    }

    #[test]
    fn softmax_rows_sum_to_one_at_any_size() {
        for row in [[1000.0, 999.0, -1000.0], [f32::MAX, f32::MIN, 0.0], [1e-40, -1e-40, -0.0]] {
            let scores = scores(Scoring::softmax(), &row, 3, None);
            let sum: f32 = scores.gate(0).iter().sum();
            assert!((sum - 1.0).abs() < 1e-6, "{row:?}: {sum}");
        }
    }

    #[test]
    fn a_row_of_masks_scores_zero_and_allows_nothing() {
        for scoring in [Scoring::softmax(), Scoring::sigmoid()] {
            let scores = scores(scoring, &[f32::NEG_INFINITY; 3], 3, None);
            assert_eq!(scores.gate(0), [0.0; 3]);
            assert!((0..3).all(|expert| !scores.is_allowed(0, expert)));
        }
    }

    #[test]
    fn the_bias_moves_selection_and_not_the_gate() {
        let scores = scores(Scoring::sigmoid(), &[0.0, 0.0], 2, Some(&[0.0, 0.25]));
        assert_eq!(scores.gate(0), [0.5, 0.5]);
        assert_eq!(scores.selection(0), [0.5, 0.75]);
    }

    #[test]
    fn worth_moves_selection_within_the_own_choice_and_neither_gate_nor_masks() {
        let logits = [1.0, 0.0, -1.0, f32::NEG_INFINITY];
        let mut scores = scores(Scoring::sigmoid(), &logits, 4, None);
        let gate = scores.gate(0).to_vec();
        scores.weigh_selection(&[0.5, 3.0, 9.0, 9.0], 2).unwrap();
        assert_eq!(scores.gate(0), gate);
        let least = 0.5 * gate[0];
        assert_eq!(scores.selection(0), [least, 1.5, least.next_down(), f32::NEG_INFINITY]);
        assert!(scores.weigh_selection(&[1.0; 2], 2).is_err() && scores.weigh_selection(&[1.0; 4], 5).is_err());
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let before = scores.clone();
            assert!(scores.weigh_selection(&[bad, 1.0, 1.0, 1.0], 2).is_err(), "{bad}");
            assert_eq!(scores.selection(0), before.selection(0), "{bad}");
        }
    }

    #[test]
    fn a_sparse_mixer_weighs_each_pick_among_those_near_it() {
        let share = |among: &[f32], of: f32| of.exp() / among.iter().map(|logit| logit.exp()).sum::<f32>();
        // 1.8 is near 2.0 and 1.7 is near 1.8, but not 2.0; all others are far.
        let logits = [-1.0, 1.8, f32::NEG_INFINITY, 2.0, 1.7, 0.0];
        let got = scores(Scoring::sparse_mixer(0.06), &logits, 6, None);
        let wanted = [0.0, share(&[1.8, 1.7], 1.8), 0.0, share(&[2.0, 1.8], 2.0), share(&[1.8, 1.7], 1.7), 0.0];
        for (got, wanted) in got.gate(0).iter().zip(wanted) {
            assert!((got - wanted).abs() < 1e-6, "{got}, not {wanted}");
        }
        let plain = scores(Scoring::softmax(), &logits, 6, None);
        assert_eq!(got.selection(0), plain.selection(0));
        // A second pick that is alone counts in full, more than the first one that is not.
        let alone = scores(Scoring::sparse_mixer(0.01), &[1.0, 0.5, 1.0], 3, None);
        assert_eq!((alone.gate(0)[0], alone.gate(0)[2], alone.gate(0)[1]), (0.5, 1.0, 0.0));
        let negative = scores(Scoring::sparse_mixer(0.1), &[-1.0, -1.1, -9.0], 3, None);
        assert_eq!(negative.gate(0)[1..], [1.0, 0.0]);
        assert!((negative.gate(0)[0] - share(&[-1.0, -1.1], -1.0)).abs() < 1e-6);
        let one = scores(Scoring::sparse_mixer(0.1), &[f32::NEG_INFINITY, 3.0], 2, None);
        assert_eq!((one.gate(0), one.is_allowed(0, 0)), ([0.0, 1.0].as_slice(), false));
        let none = scores(Scoring::sparse_mixer(0.1), &[f32::NEG_INFINITY; 2], 2, None);
        assert_eq!(none.gate(0), [0.0; 2]);
    }

    #[test]
    fn group_limits_rank_by_max_or_by_the_best_two() {
        let row = [0.9, 0.0, 0.5, 0.6f32].map(|score: f32| (score / (1.0 - score)).max(1e-6).ln());
        for (score, allowed) in
            [(GroupScore::Max, [true, true, false, false]), (GroupScore::TopTwo, [false, false, true, true])]
        {
            let scoring =
                Scoring { groups: Some(GroupLimit { groups: 2, top_groups: 1, score }), ..Scoring::sigmoid() };
            let scores = scores(scoring, &row, 4, None);
            assert_eq!([0, 1, 2, 3].map(|expert| scores.is_allowed(0, expert)), allowed, "{score:?}");
        }
    }

    #[test]
    fn contradictory_parameters_are_named() {
        let logits = [0.0; 6];
        let logits = Logits::new(&logits, 1, 6).unwrap();
        let groups = |groups, top_groups| Scoring {
            groups: Some(GroupLimit { groups, top_groups, score: GroupScore::Max }),
            ..Scoring::softmax()
        };
        let message = |scoring: Scoring, bias: Option<&[f32]>| scoring.scores(&logits, bias).unwrap_err().to_string();
        assert_eq!(message(groups(4, 1), None), "groups is 4: expected a divisor of experts 6");
        assert_eq!(message(groups(3, 4), None), "top_groups is 4: expected 1 to groups 3");
        assert_eq!(message(Scoring::softmax(), Some(&[0.0])), "selection bias: expected 6 values, got 1 values");
        assert_eq!(message(Scoring::softmax(), Some(&[f32::NAN; 6])), "selection bias is NaN: expected finite numbers");
        assert_eq!(
            message(Scoring { scale: f32::NAN, ..Scoring::softmax() }, None),
            "scale is NaN: expected a finite number"
        );
        for jitter in [-0.1, f32::NAN, f32::INFINITY] {
            let expected = format!("jitter is {jitter}: expected 0 or a positive finite number");
            assert_eq!(message(Scoring::sparse_mixer(jitter), None), expected);
        }
    }
}
