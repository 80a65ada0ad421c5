//! Gate scores: what the gate thinks each expert is worth to each token, `[tokens, experts]` in `f32`.
//!
//! softmax: `score = exp(logit − max) / Σ exp(logit − max)`, sigmoid: `score = 1 / (1 + exp(−logit))`.
//! Two numbers per pair matter: the **gate score** is what combine weights are made of; the **selection score** is what
//! decides who is chosen. They differ where a model adds a selection bias (DeepSeek-V3, arXiv 2408.15664) or limits a
//! token to some groups of experts (DeepSeek-V2, arXiv 2405.04434): experts outside are masked with −∞.
//!
//! ```
//! use phase_moe::routing::{logits::Logits, scores::Scoring};
//!
//! let logits = Logits::new(&[0.0, 0.0, f32::NEG_INFINITY], 1, 3)?;
//! let scores = Scoring::softmax().scores(&logits, None)?;
//! assert_eq!(scores.gate(0), [0.5, 0.5, 0.0]);
//! assert!(!scores.is_allowed(0, 2));
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of capacities or routers.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::routing::logits::Logits;

/// How a logit becomes a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScoreFunction {
    /// Over all experts of the token; the scores of a row sum to 1.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
}

/// What a group of experts is worth when a model limits a token to its best groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupScore {
    /// The best selection score of the group (DeepSeek-V2).
    Max,
    /// The sum of its two best (DeepSeek-V3).
    TopTwo,
}

/// Experts in `groups` equal contiguous groups, of which a token may use its best `top_groups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupLimit {
    /// Groups the experts are cut into.
    pub groups: usize,
    /// Groups a token may use.
    pub top_groups: usize,
    /// What ranks the groups.
    pub score: GroupScore,
}

/// How a model turns logits into scores and scores into combine weights.
#[derive(Clone, Copy, Debug, PartialEq)]
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

/// Below this many values the rows are scored on the calling thread: waking another costs more.
const PARALLEL_VALUES: usize = 1 << 15;

impl Scoring {
    /// Softmax, weights as they are: OLMoE and Qwen1.5-MoE.
    pub const fn softmax() -> Self {
        Self { function: ScoreFunction::Softmax, normalize: false, scale: 1.0, groups: None }
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
    /// [`Error::Shape`] for a bias of another length, [`Error::Parameter`] for a bias or a scale that is not finite and for
    /// groups that do not divide the experts or are more than there are.
    pub fn scores(&self, logits: &Logits<'_>, bias: Option<&[f32]>) -> Result<Scores> {
        let experts = logits.experts();
        if !self.scale.is_finite() {
            return Err(Error::parameter("scale", self.scale, "a finite number"));
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

        let mut gate = vec![0f32; logits.values().len()];
        let score = |(gate, logits): (&mut [f32], &[f32])| score_row(self.function, logits, gate);
        if gate.len() < PARALLEL_VALUES {
            gate.chunks_exact_mut(experts).zip(logits.values().chunks_exact(experts)).for_each(score);
        } else {
            gate.par_chunks_exact_mut(experts).zip(logits.values().par_chunks_exact(experts)).for_each(score);
        }

        let masked = logits.values().contains(&f32::NEG_INFINITY);
        let selection = (masked || bias.is_some() || self.groups.is_some()).then(|| {
            let mut selection = gate.clone();
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
                    mask_groups(selection, limit);
                }
            }
            selection
        });
        Ok(Scores { gate, selection, tokens: logits.tokens(), experts, normalize: self.normalize, scale: self.scale })
    }
}

/// One row: logits to scores. A masked expert gets 0; a row with nothing else is all 0.
fn score_row(function: ScoreFunction, logits: &[f32], scores: &mut [f32]) {
    match function {
        ScoreFunction::Sigmoid => {
            for (score, &logit) in scores.iter_mut().zip(logits) {
                *score = 1.0 / (1.0 + (-logit).exp());
            }
        }
        ScoreFunction::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if max == f32::NEG_INFINITY {
                return scores.fill(0.0);
            }
            let mut sum = 0.0;
            for (score, &logit) in scores.iter_mut().zip(logits) {
                *score = (logit - max).exp();
                sum += *score;
            }
            scores.iter_mut().for_each(|score| *score /= sum);
        }
    }
}

/// Masks every group but the best `top_groups` (ties to the lower group).
fn mask_groups(selection: &mut [f32], limit: GroupLimit) {
    let width = selection.len() / limit.groups;
    let mut ranked: Vec<(f32, usize)> = selection
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
        .zip(0..)
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for &(_, group) in &ranked[limit.top_groups..] {
        selection[group * width..(group + 1) * width].fill(f32::NEG_INFINITY);
    }
}

/// Gate scores of a batch, with what selection and combine weights need to know beside them.
#[derive(Clone, Debug)]
pub struct Scores {
    gate: Vec<f32>,
    /// Only where it differs from `gate`.
    selection: Option<Vec<f32>>,
    tokens: usize,
    experts: usize,
    normalize: bool,
    scale: f32,
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
        let all = self.selection.as_ref().unwrap_or(&self.gate);
        &all[token * self.experts..(token + 1) * self.experts]
    }

    /// False where the expert is masked for this token.
    ///
    /// # Panics
    /// When `token` is not below [`Scores::tokens`] or `expert` not below [`Scores::experts`].
    pub fn is_allowed(&self, token: usize, expert: usize) -> bool {
        self.selection(token)[expert] > f32::NEG_INFINITY
    }

    /// True when some expert is masked for some token.
    pub fn has_masks(&self) -> bool {
        self.selection.as_ref().is_some_and(|selection| selection.contains(&f32::NEG_INFINITY))
    }

    /// Whether combine weights are divided by their sum over the selection.
    pub fn normalize(&self) -> bool {
        self.normalize
    }

    /// Constant factor on the combine weights.
    pub fn scale(&self) -> f32 {
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
    }
}
