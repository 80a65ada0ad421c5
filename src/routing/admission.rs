//! Admission: which slots get in where they compete for room, the same whatever place in the batch they have.
//!
//! The higher score goes first; equal scores go by the tokens' source mass, then by the content of their rows, then by
//! expert. Only slots of identical rows are told apart by index.
//!
//! Knows nothing of how the slots came to want what they want.

use std::cell::OnceCell;
use std::cmp::Ordering;

use crate::routing::router::RouteRequest;
use crate::routing::slots::{EMPTY, sort_slots};

/// One slot and the expert it asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Wish {
    pub(crate) score: f32,
    pub(crate) token: u32,
    pub(crate) expert: u16,
    /// Position in the table that the caller keeps.
    pub(crate) slot: usize,
}

/// The order in which wishes of one batch are granted.
pub(crate) struct Precedence<'a> {
    request: &'a RouteRequest<'a>,
    rank: OnceCell<Vec<u32>>,
}

impl<'a> Precedence<'a> {
    pub(crate) fn new(request: &'a RouteRequest<'a>) -> Self {
        Self { request, rank: OnceCell::new() }
    }

    /// Position of each token in the order in which tokens lose: the least source mass first.
    ///
    /// Made when first asked for: most batches have no equal scores.
    pub(crate) fn rank(&self) -> &[u32] {
        self.rank.get_or_init(|| {
            let scores = self.request.scores();
            let row = |token| row_mass(scores.gate(token), scores.selection(token), self.request.top_k());
            let mass: Vec<f32> = (0..scores.tokens()).map(row).collect();
            let mut tokens: Vec<u32> = (0..scores.tokens() as u32).collect();
            tokens.sort_unstable_by(|&a, &b| {
                let (row, other) = (a as usize, b as usize);
                mass[row].total_cmp(&mass[other]).then_with(|| scores.compare_rows(row, other)).then(b.cmp(&a))
            });
            let mut rank = vec![0; tokens.len()];
            tokens.iter().zip(0..).for_each(|(&token, place)| rank[token as usize] = place);
            rank
        })
    }

    /// [`Ordering::Less`] when `a` is granted before `b`.
    pub(crate) fn compare(&self, a: &Wish, b: &Wish) -> Ordering {
        // A sum with +0 makes the two zeros one.
        (b.score + 0.0)
            .total_cmp(&(a.score + 0.0))
            .then_with(|| self.rank()[b.token as usize].cmp(&self.rank()[a.token as usize]))
            .then(a.expert.cmp(&b.expert))
    }

    /// Grants `wishes` in order of precedence while their pools have room: takes it, and calls `granted` for each.
    pub(crate) fn admit(&self, wishes: &mut [Wish], room: &mut [u32], mut granted: impl FnMut(&Wish)) {
        wishes.sort_unstable_by(|a, b| self.compare(a, b));
        for wish in wishes {
            let room = &mut room[self.request.capacity().pool_of(wish.expert)];
            if *room > 0 {
                *room -= 1;
                granted(wish);
            }
        }
    }
}

/// Which slots of `chosen` (`[tokens, top_k]`, [`EMPTY`] allowed) stay within `room`, the highest gate scores first.
pub(crate) fn keep_best(precedence: &Precedence<'_>, chosen: &[u16], room: &mut [u32]) -> Vec<bool> {
    let (scores, top_k) = (precedence.request.scores(), precedence.request.top_k());
    let filled = chosen.iter().enumerate().filter(|(_, expert)| **expert != EMPTY);
    let mut wishes: Vec<Wish> = filled
        .map(|(slot, &expert)| {
            let token = slot / top_k;
            Wish { score: scores.gate(token)[usize::from(expert)], token: token as u32, expert, slot }
        })
        .collect();
    let mut kept = vec![false; chosen.len()];
    precedence.admit(&mut wishes, room, |wish| kept[wish.slot] = true);
    kept
}

/// Puts each token's slots in order of falling selection score, as top-k has them; empty ones last.
pub(crate) fn lay_out(request: &RouteRequest<'_>, chosen: &mut [u16], kept: &mut [bool]) {
    let top_k = request.top_k();
    for (token, (chosen, kept)) in chosen.chunks_exact_mut(top_k).zip(kept.chunks_exact_mut(top_k)).enumerate() {
        sort_slots(chosen, kept, request.scores().selection(token));
    }
}

/// Source mass of a token: how much it asks for, the share of its gate scores that its own top-k hold, in `[0, 1]`. Where capacity falls short it decides who loses.
///
/// Among equal selection scores the larger gate score counts, and values are summed from the best
/// down, so that the sum does not depend on the order of the experts.
pub(crate) fn row_mass(gate: &[f32], selection: &[f32], top_k: usize) -> f32 {
    let mut best: Vec<(f32, f32)> = selection.iter().copied().zip(gate.iter().copied()).collect();
    let falling = |a: &(f32, f32), b: &(f32, f32)| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1));
    if (1..best.len()).contains(&top_k) {
        best.select_nth_unstable_by(top_k - 1, falling);
        best.truncate(top_k);
        best.sort_unstable_by(falling);
    }
    let all: f32 = gate.iter().sum();
    let top: f32 = best.iter().map(|&(_, gate)| gate).sum();
    if all > 0.0 { (top / all).min(1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::{logits::Logits, scores::Scoring};

    #[test]
    fn mass_is_the_share_of_the_top_k() {
        let values = [0.0, 0.0, 0.0, 0.0, 50.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0];
        let mut values = values;
        values[8..].fill(f32::NEG_INFINITY);
        let scores = Scoring::softmax().scores(&Logits::new(&values, 3, 4).unwrap(), None).unwrap();
        let mass = |token| row_mass(scores.gate(token), scores.selection(token), 2);
        assert_eq!(mass(0), 0.5);
        assert!((mass(1) - 1.0).abs() < 1e-6);
        assert_eq!(mass(2), 0.0);
    }
}
