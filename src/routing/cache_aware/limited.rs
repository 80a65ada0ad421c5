//! Swaps on top of the phase router: within limits per expert or per device, the cheapest of the whole batch first.
//!
//! Every swap that could be is listed with its loss (gate score of the expert it drops minus that of the one it takes); the list is gone
//! through by rising loss, then by the token's gate mass and content, its index last. A swap is made if the newcomer's pool is
//! the same or has room, and the token stays within its bound. Rooms that swaps free are offered again.
//!
//! Knows nothing of how prices were found.

use std::cmp::Ordering;

use super::swap::{Terms, is_in, set_bit};
use crate::routing::admission::lay_out;
use crate::routing::assignment::Assignment;
use crate::routing::router::RouteRequest;
use crate::routing::slots::EMPTY;

/// How often the list is gone through, at most: each time only for what room was freed.
const PASSES: usize = 4;

/// A routed batch under limits, before any swap.
pub(super) struct Limited<'a> {
    request: &'a RouteRequest<'a>,
    terms: &'a Terms,
    /// Price per pool; empty where all are 0.
    prices: &'a [f32],
    /// Experts `[tokens, top_k]`, dropped ones too.
    base: Vec<u16>,
    kept: Vec<bool>,
    /// Kept slots per pool; empty without limits.
    load: Vec<u32>,
    /// On the gate mass of any assignment under these limits, swapped or not.
    bound: Option<f64>,
}

/// One swap that a token could make.
struct Swap {
    loss: f64,
    /// Gate mass of the token before any swap.
    mass: f64,
    slot: usize,
    from: u16,
    to: u16,
}

impl<'a> Limited<'a> {
    pub(super) fn new(
        request: &'a RouteRequest<'a>,
        terms: &'a Terms,
        prices: &'a [f32],
        assignment: &Assignment,
    ) -> Self {
        let base = assignment.raw_selection().to_vec();
        let kept: Vec<bool> = assignment.raw().iter().map(|&expert| expert != EMPTY).collect();
        let mut load = Vec::new();
        if let Some(limits) = request.capacity().limits() {
            load.resize(limits.len(), 0);
            for &expert in assignment.raw().iter().filter(|&&expert| expert != EMPTY) {
                load[request.capacity().pool_of(expert)] += 1;
            }
        }
        Self { request, terms, prices, base, kept, load, bound: assignment.gate_mass_bound() }
    }

    /// Both passes, the second with all experts that are still used after the first; `None` where nothing is swapped.
    pub(super) fn swap_twice(self, near: &mut [u64]) -> Option<Assignment> {
        let mut swapped = self.swap(near)?;
        if self.request.live_tokens() > 1 {
            let still_used = |chosen: &[u16]| -> Vec<u16> {
                chosen.iter().zip(&self.kept).filter(|(_, kept)| **kept).map(|(&expert, _)| expert).collect()
            };
            still_used(&swapped).into_iter().for_each(|expert| set_bit(near, expert));
            // Room goes to others this time; a pass that would bring a read back is not taken.
            let second = self.swap(near).unwrap_or_else(|| self.base.clone());
            if still_used(&second).into_iter().all(|expert| is_in(near, expert)) {
                swapped = second;
            }
        }
        Some(self.assignment(swapped))
    }

    /// The experts after the swaps for those in `near`; `None` where there are none.
    fn swap(&self, near: &[u64]) -> Option<Vec<u16>> {
        let swaps = self.candidates(near);
        let (capacity, top_k) = (self.request.capacity(), self.request.top_k());
        let (mut chosen, mut load, mut made) = (self.base.clone(), self.load.clone(), false);
        for _ in 0..PASSES {
            let mut moved = false;
            for swap in &swaps {
                let token = swap.slot / top_k;
                let row = token * top_k..(token + 1) * top_k;
                if chosen[swap.slot] != swap.from || chosen[row.clone()].contains(&swap.to) {
                    continue;
                }
                let (from, to) = (capacity.pool_of(swap.from), capacity.pool_of(swap.to));
                if from != to && capacity.limits().is_some_and(|limits| load[to] >= limits[to]) {
                    continue;
                }
                chosen[swap.slot] = swap.to;
                if !self.terms.allow(self.mass(row, &chosen), swap.mass, top_k) {
                    chosen[swap.slot] = swap.from;
                    continue;
                }
                if !load.is_empty() {
                    load[from] -= 1;
                    load[to] += 1;
                }
                moved = true;
            }
            made |= moved;
            if !moved || load.is_empty() {
                break;
            }
        }
        made.then_some(chosen)
    }

    /// Every swap that could be made, cheapest first.
    fn candidates(&self, near: &[u64]) -> Vec<Swap> {
        let (scores, capacity, top_k) = (self.request.scores(), self.request.capacity(), self.request.top_k());
        let price = |expert: u16| self.prices.get(capacity.pool_of(expert)).map_or(0.0, |&price| f64::from(price));
        let mut swaps = Vec::new();
        for token in 0..scores.tokens() {
            let (gate, selection) = (scores.gate(token), scores.selection(token));
            let row = token * top_k..(token + 1) * top_k;
            let mass = self.mass(row.clone(), &self.base);
            let may_go = row.clone().filter(|&slot| self.kept[slot]).skip(self.terms.keep_top);
            for slot in may_go.filter(|&slot| !is_in(near, self.base[slot])) {
                let from = self.base[slot];
                let adjusted = f64::from(selection[usize::from(from)]) - price(from);
                for (word, &bits) in near.iter().enumerate() {
                    let mut bits = bits;
                    while bits != 0 {
                        let to = (word * 64) as u16 + bits.trailing_zeros() as u16;
                        bits &= bits - 1;
                        let score = selection[usize::from(to)];
                        let beats = f64::from(score) + self.terms.lift - price(to) > adjusted;
                        if score == f32::NEG_INFINITY || !beats || self.base[row.clone()].contains(&to) {
                            continue;
                        }
                        let loss = f64::from(gate[usize::from(from)]) - f64::from(gate[usize::from(to)]);
                        if !self.terms.allow(mass - loss, mass, 0) {
                            continue;
                        }
                        swaps.push(Swap { loss, mass, slot, from, to });
                    }
                }
            }
        }
        swaps.sort_unstable_by(|a, b| self.order(a, b));
        swaps
    }

    fn order(&self, a: &Swap, b: &Swap) -> Ordering {
        let (scores, top_k) = (self.request.scores(), self.request.top_k());
        let token = |swap: &Swap| swap.slot / top_k;
        let by_loss = a.loss.total_cmp(&b.loss).then(a.mass.total_cmp(&b.mass));
        let by_content = by_loss.then_with(|| match token(a) == token(b) {
            true => Ordering::Equal,
            false => scores.compare_rows(token(a), token(b)),
        });
        by_content.then(a.from.cmp(&b.from)).then(a.to.cmp(&b.to)).then(a.slot.cmp(&b.slot))
    }

    /// Gate mass of the kept slots of a token.
    fn mass(&self, row: std::ops::Range<usize>, chosen: &[u16]) -> f64 {
        let gate = self.request.scores().gate(row.start / self.request.top_k());
        row.filter(|&slot| self.kept[slot]).map(|slot| f64::from(gate[usize::from(chosen[slot])])).sum()
    }

    /// The assignment of swapped experts, each token's slots by selection score.
    fn assignment(mut self, mut chosen: Vec<u16>) -> Assignment {
        let (scores, top_k) = (self.request.scores(), self.request.top_k());
        lay_out(self.request, &mut chosen, &mut self.kept);
        let mut swapped = Assignment::from_chosen(scores, top_k, chosen, Some(&self.kept));
        if let Some(bound) = self.bound {
            swapped.set_gate_mass_bound(bound);
        }
        swapped
    }
}
