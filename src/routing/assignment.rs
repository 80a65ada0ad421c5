//! The result of routing: [`Assignment`], which experts each token got and with which combine weights.
//!
//! Shape `[tokens, width]`; the width is the request's `top_k`, and more where a router gives a token more experts than it
//! asked for. A slot without an expert was dropped: its weight is 0 and it is not given to its neighbours,
//! because weights are made from the whole selection before drops:
//! `weight = gate score · scale` or, where the model normalises, `gate score / Σ gate scores of the selection · scale`.
//!
//! Knows nothing of how the choice was made.

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet, check_expert_count};
use crate::routing::request::RouteRequest;
use crate::routing::scores::Scores;
use crate::routing::select::copy_few;
use crate::routing::slots::check_slots;
pub(crate) use crate::routing::slots::{EMPTY, check_top_k};

/// Experts and combine weights of every token, `[tokens, width]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assignment {
    tokens: usize,
    experts: usize,
    top_k: usize,
    width: usize,
    chosen: Vec<u16>,
    /// The selection before drops, only where some slot was dropped.
    selection: Option<Vec<u16>>,
    weights: Vec<f32>,
    gate_mass_bound: Option<f64>,
    /// The selection was made elsewhere, so it may lie outside the groups that a token may use.
    outside_groups: bool,
}

impl Assignment {
    /// From a selection (`[tokens, width]` ids, [`EMPTY`] allowed) and which of its slots were kept (all, if `None`).
    pub(crate) fn from_chosen(scores: &Scores, top_k: usize, chosen: Vec<u16>, kept: Option<&[bool]>) -> Self {
        let (tokens, experts) = (scores.tokens(), scores.experts());
        let width = chosen.len().checked_div(tokens).unwrap_or(top_k);
        let weights = vec![0f32; chosen.len()];
        let mut made = Self { tokens, experts, top_k, width, chosen, weights, ..Self::default() };
        for (token, (chosen, weights)) in
            made.chosen.chunks_exact(width).zip(made.weights.chunks_exact_mut(width)).enumerate()
        {
            weigh(scores, scores.gate(token), chosen, weights);
        }
        made.drop_slots(kept.unwrap_or_default().iter().copied());
        made
    }

    /// Makes it one of no tokens, as the default is; the memory stays.
    pub(crate) fn clear(&mut self) {
        (self.tokens, self.experts, self.top_k, self.width) = (0, 0, 0, 0);
        (self.selection, self.gate_mass_bound, self.outside_groups) = (None, None, false);
        self.chosen.clear();
        self.weights.clear();
    }

    /// Makes it one for `scores` with nothing dropped, and lends its ids and weights (`[tokens, top_k]`, whatever they held
    /// before) to be written.
    pub(crate) fn refill(&mut self, scores: &Scores, top_k: usize) -> (&mut [u16], &mut [f32]) {
        (self.tokens, self.experts) = (scores.tokens(), scores.experts());
        (self.top_k, self.width) = (top_k, top_k);
        (self.selection, self.gate_mass_bound, self.outside_groups) = (None, None, false);
        self.chosen.resize(self.tokens * top_k, EMPTY);
        self.weights.resize(self.tokens * top_k, 0.0);
        (&mut self.chosen, &mut self.weights)
    }

    /// Makes it one token's, with nothing dropped.
    #[inline]
    pub(crate) fn refill_token(&mut self, experts: usize, chosen: &[u16], weights: &[f32]) {
        (self.tokens, self.experts) = (1, experts);
        (self.top_k, self.width) = (chosen.len(), chosen.len());
        (self.selection, self.gate_mass_bound, self.outside_groups) = (None, None, false);
        self.chosen.resize(chosen.len(), EMPTY);
        self.weights.resize(weights.len(), 0.0);
        copy_few(&mut self.chosen, chosen);
        copy_few(&mut self.weights, weights);
    }

    /// Empties the slots that are not `kept`; weights are made already, from the whole selection.
    pub(crate) fn drop_slots(&mut self, kept: impl Iterator<Item = bool>) {
        for (slot, _) in kept.enumerate().filter(|(_, kept)| !kept) {
            if self.chosen[slot] != EMPTY {
                self.selection.get_or_insert_with(|| self.chosen.clone());
                (self.chosen[slot], self.weights[slot]) = (EMPTY, 0.0);
            }
        }
    }

    /// The same, with every slot [`EMPTY`] until `fill` writes the selection; then come the weights.
    pub(crate) fn refill_with(&mut self, scores: &Scores, top_k: usize, fill: impl FnOnce(&mut [u16])) {
        let (chosen, weights) = self.refill(scores, top_k);
        chosen.fill(EMPTY);
        fill(chosen);
        for (token, (chosen, weights)) in chosen.chunks_exact(top_k).zip(weights.chunks_exact_mut(top_k)).enumerate() {
            weigh(scores, scores.gate(token), chosen, weights);
        }
    }

    /// The answer to `request` with this `selection` (`[tokens, width]` ids, −1 where empty; `width` is `top_k` or more), of which
    /// the slots that are not `kept` were dropped (none, if `None`). Combine weights are made here, of the selection before drops.
    ///
    /// Masks, padding, distinct experts and limits are not looked at: see [`check_assignment`](crate::routing::check::check_assignment).
    ///
    /// # Errors
    /// [`Error::Shape`] when the selection is not as many rows of `top_k` or more as the request has tokens, or `kept` is of another
    /// length; [`Error::ExpertOutOfRange`] for an id below −1 or not below the experts.
    pub fn from_selection(request: &RouteRequest<'_>, selection: &[i32], kept: Option<&[bool]>) -> Result<Self> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let (tokens, experts) = (scores.tokens(), scores.experts());
        let width = selection.len().checked_div(tokens).unwrap_or(top_k);
        if width < top_k || tokens.checked_mul(width) != Some(selection.len()) {
            let expected = format!("{tokens} tokens of {top_k} or more slots");
            return Err(Error::shape("selection", expected, format!("{} values", selection.len())));
        }
        check_slots(tokens, width)?;
        if let Some(kept) = kept.filter(|kept| kept.len() != selection.len()) {
            let expected = format!("{} values", selection.len());
            return Err(Error::shape("kept slots", expected, format!("{} values", kept.len())));
        }
        let mut chosen = Vec::with_capacity(selection.len());
        for (slot, &id) in selection.iter().enumerate() {
            match usize::try_from(id) {
                Ok(expert) if expert < experts => chosen.push(expert as u16),
                Err(_) if id == -1 => chosen.push(EMPTY),
                _ => return Err(out_of_range(id, format!("0 to {} or -1 (token {})", experts - 1, slot / width))),
            }
        }
        Ok(Self::from_chosen(scores, top_k, chosen, kept))
    }

    /// The same experts and drops for other scores, with weights of these.
    pub(crate) fn again(&self, scores: &Scores) -> Self {
        let kept: Vec<bool> = self.chosen.iter().map(|&expert| expert != EMPTY).collect();
        let made = Self::from_chosen(scores, self.top_k, self.raw_selection().to_vec(), Some(&kept));
        Self { outside_groups: scores.has_masks(), ..made }
    }

    /// Whether its experts may lie outside the groups that a token may use.
    pub(crate) fn is_outside_groups(&self) -> bool {
        self.outside_groups
    }

    /// The distinct experts of the kept slots, in place of what `set` held before: what a step asks of an expert cache.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for an assignment that was never filled.
    pub fn used_experts(&self, set: &mut ExpertSet) -> Result<()> {
        set.reset(self.experts)?;
        for &expert in self.raw().iter().filter(|&&expert| expert != EMPTY) {
            set.insert(ExpertId::from_raw(expert));
        }
        Ok(())
    }

    /// From ids and weights of a caller, `[tokens, top_k]` each; id −1 is an empty slot.
    ///
    /// # Errors
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`], [`Error::ExpertCount`]; [`Error::Shape`] when lengths differ or do
    /// not divide by `top_k`; [`Error::ExpertOutOfRange`] for an id below −1, not below `experts`, or twice in a token;
    /// [`Error::Parameter`] for a weight that is not finite or not 0 in an empty slot.
    pub fn from_parts(experts: usize, top_k: usize, ids: &[i32], weights: &[f32]) -> Result<Self> {
        check_expert_count(experts)?;
        check_top_k(top_k, experts)?;
        check_slots(ids.len() / top_k, top_k)?;
        if !ids.len().is_multiple_of(top_k) {
            return Err(Error::shape(
                "expert ids",
                format!("a multiple of top_k {top_k} values"),
                format!("{} values", ids.len()),
            ));
        }
        if weights.len() != ids.len() {
            return Err(Error::shape(
                "combine weights",
                format!("{} values", ids.len()),
                format!("{} values", weights.len()),
            ));
        }
        let mut chosen = Vec::with_capacity(ids.len());
        for (row, ids) in ids.chunks_exact(top_k).enumerate() {
            for (at, &id) in ids.iter().enumerate() {
                if id < -1 || id >= experts as i32 {
                    return Err(out_of_range(id, format!("0 to {} or -1 (token {row})", experts - 1)));
                }
                if id >= 0 && ids[..at].contains(&id) {
                    return Err(out_of_range(id, format!("distinct experts in token {row}")));
                }
                let weight = weights[row * top_k + at];
                if !weight.is_finite() || (id < 0 && weight != 0.0) {
                    return Err(Error::parameter("combine weight", weight, "a finite number, 0 in an empty slot"));
                }
                chosen.push(if id < 0 { EMPTY } else { id as u16 });
            }
        }
        let tokens = ids.len() / top_k;
        let weights = weights.to_vec();
        Ok(Self { tokens, experts, top_k, width: top_k, chosen, weights, ..Self::default() })
    }

    /// States an upper bound on the gate mass of any assignment of at most `top_k` experts a token under the same capacity.
    pub fn set_gate_mass_bound(&mut self, bound: f64) {
        self.gate_mass_bound = Some(bound);
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Experts of the layer.
    pub(crate) fn experts(&self) -> usize {
        self.experts
    }

    /// Slots a token asked for.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Slots in a row of the tables: [`Assignment::top_k`], or more where some token got more experts than it asked for.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The kept slots of a token: expert and combine weight.
    ///
    /// # Panics
    /// When `token` is out of range.
    pub fn slots(&self, token: usize) -> impl Iterator<Item = (ExpertId, f32)> + '_ {
        let range = token * self.width..(token + 1) * self.width;
        self.chosen[range.clone()]
            .iter()
            .zip(&self.weights[range])
            .filter(|(expert, _)| **expert != EMPTY)
            .map(|(&expert, &weight)| (ExpertId::from_raw(expert), weight))
    }

    /// Combine weights, `[tokens, width]` row-major; 0 where dropped.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Expert ids, `[tokens, width]` row-major; −1 where dropped.
    pub fn ids(&self) -> impl Iterator<Item = i32> + '_ {
        self.chosen.iter().map(|&expert| shown(expert))
    }

    /// Raw ids, [`EMPTY`] where dropped.
    pub(crate) fn raw(&self) -> &[u16] {
        &self.chosen
    }

    /// Slots with an expert.
    pub fn kept(&self) -> usize {
        self.chosen.iter().filter(|&&expert| expert != EMPTY).count()
    }

    /// The experts that the router selected, `[tokens, width]`, before slots were dropped: what combine weights are made of, and what the balance
    /// losses of training look at. −1 where there is none.
    pub fn selection(&self) -> impl Iterator<Item = i32> + '_ {
        self.raw_selection().iter().map(|&expert| shown(expert))
    }

    /// Raw ids of the same.
    pub(crate) fn raw_selection(&self) -> &[u16] {
        self.selection.as_deref().unwrap_or(&self.chosen)
    }

    /// Kept slots per expert, `[experts]`.
    pub fn load(&self) -> Vec<u32> {
        let mut load = vec![0; self.experts];
        for &expert in self.chosen.iter().filter(|&&expert| expert != EMPTY) {
            load[usize::from(expert)] += 1;
        }
        load
    }

    /// Certified upper bound on the gate mass of *any* assignment under the capacity this one was made for, where the
    /// router computes one.
    pub fn gate_mass_bound(&self) -> Option<f64> {
        self.gate_mass_bound
    }
}

fn out_of_range(id: i32, expected: String) -> Error {
    Error::ExpertOutOfRange { operand: "expert ids".into(), id: id.into(), expected }
}

/// An id, −1 for none.
fn shown(expert: u16) -> i32 {
    if expert == EMPTY { -1 } else { expert.into() }
}

/// Combine weights of one token's selection, before drops.
#[inline(always)]
pub(crate) fn weigh(scores: &Scores, gate: &[f32], chosen: &[u16], weights: &mut [f32]) {
    for (weight, &expert) in weights.iter_mut().zip(chosen) {
        *weight = if expert == EMPTY { 0.0 } else { gate[usize::from(expert)] };
    }
    scale_weights(weights, scores.normalize(), scores.scale());
}

/// Combine weights from the gate scores of one token's selection, in place.
#[inline(always)]
pub(crate) fn scale_weights(weights: &mut [f32], normalize: bool, scale: f32) {
    let sum: f32 = if normalize { weights.iter().sum() } else { 0.0 };
    let factor = if sum > 0.0 { scale / sum } else { scale };
    if factor.is_finite() {
        // Plus 0: an empty slot weighs 0, not −0, whatever the sign of the scale.
        weights.iter_mut().for_each(|weight| *weight = *weight * factor + 0.0);
    } else {
        // Scores near the smallest number there is: their share is a number, the factor is not.
        weights.iter_mut().for_each(|weight| *weight = *weight / sum * scale + 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_come_back_from_a_caller_are_checked() {
        let parts = |ids: &[i32], weights: &[f32]| {
            Assignment::from_parts(4, 2, ids, weights).map_err(|error| error.to_string())
        };
        let assignment = parts(&[0, 3, 2, -1], &[0.5, 0.5, 1.0, 0.0]).unwrap();
        assert_eq!((assignment.kept(), assignment.load()), (3, vec![1, 0, 1, 1]));
        assert_eq!(assignment.ids().collect::<Vec<_>>(), [0, 3, 2, -1]);
        assert_eq!(
            parts(&[0, 4], &[0.5; 2]).unwrap_err(),
            "expert ids: expert 4 is out of range, expected 0 to 3 or -1 (token 0)"
        );
        assert_eq!(
            parts(&[0, -2], &[0.5; 2]).unwrap_err(),
            "expert ids: expert -2 is out of range, expected 0 to 3 or -1 (token 0)"
        );
        assert_eq!(
            parts(&[1, 1], &[0.5; 2]).unwrap_err(),
            "expert ids: expert 1 is out of range, expected distinct experts in token 0"
        );
        assert_eq!(parts(&[1], &[0.5]).unwrap_err(), "expert ids: expected a multiple of top_k 2 values, got 1 values");
        assert_eq!(parts(&[1, 2], &[0.5]).unwrap_err(), "combine weights: expected 2 values, got 1 values");
        assert_eq!(
            parts(&[1, 2], &[0.5, f32::NAN]).unwrap_err(),
            "combine weight is NaN: expected a finite number, 0 in an empty slot"
        );
        assert_eq!(
            parts(&[1, -1], &[0.5, 0.5]).unwrap_err(),
            "combine weight is 0.5: expected a finite number, 0 in an empty slot"
        );
    }

    #[test]
    fn a_selection_is_weighed_before_drops() {
        use crate::routing::{capacity::Capacity, logits::Logits, router::RouteContext, scores::Scoring};
        let logits = Logits::new(&[0.0; 8], 2, 4).unwrap();
        let scores = Scoring::softmax().normalized(true).scores(&logits, None).unwrap();
        let capacity = Capacity::unlimited(4).unwrap();
        let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
        let made = |ids: &[i32], kept: Option<&[bool]>| Assignment::from_selection(&request, ids, kept);
        let dropped = made(&[0, 3, 2, -1], Some(&[true, false, true, true])).unwrap();
        assert_eq!(dropped.ids().collect::<Vec<_>>(), [0, -1, 2, -1]);
        assert_eq!((dropped.weights(), dropped.raw_selection()), (&[0.5, 0.0, 1.0, 0.0][..], &[0, 3, 2, EMPTY][..]));
        assert_eq!(made(&[0, 1, 2, 3, -1, -1], None).unwrap().width(), 3);
        let message = |ids: &[i32], kept: Option<&[bool]>| made(ids, kept).unwrap_err().to_string();
        assert_eq!(message(&[0, 1], None), "selection: expected 2 tokens of 2 or more slots, got 2 values");
        assert_eq!(message(&[0; 5], None), "selection: expected 2 tokens of 2 or more slots, got 5 values");
        assert_eq!(message(&[0; 4], Some(&[true])), "kept slots: expected 4 values, got 1 values");
        for bad in [4, -2, i32::MIN] {
            let expected = format!("expert ids: expert {bad} is out of range, expected 0 to 3 or -1 (token 1)");
            assert_eq!(message(&[0, 1, bad, 2], None), expected);
        }
    }

    #[test]
    fn top_k_is_checked() {
        assert_eq!(Assignment::from_parts(8, 9, &[], &[]).unwrap_err().to_string(), "top_k 9 exceeds experts 8");
        assert_eq!(Assignment::from_parts(8, 0, &[], &[]).unwrap_err().to_string(), "top_k is 0: expected at least 1");
    }
}
