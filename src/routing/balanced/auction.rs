//! Auction routing: balanced assignment by Bertsekas's auction (BASE layers, Lewis et al. 2021, arXiv 2103.16716).
//!
//! `maximise Σ score of kept slots  subject to  load of pool ≤ limit,  ≤ top_k distinct allowed experts a token`.
//! A pool sells as many units as its limit; its price is that of its cheapest unit. A token bids for the experts that
//! are worth most to it after their price, each time as much as it would rather pay than take the best it does not
//! bid for: `bid = score − (best score − price elsewhere) + ε`. Where all units are sold the cheapest one changes
//! hands, and the token that lost it bids again. When none bids any more, every token holds, within ε, what is best for it at
//! the prices.
//!
//! - Several slots a token and units a pool as in Bertsekas and Castañon's auction for transportation (1989). A
//!   unit belongs to a pool, so the experts of a device compete for one price.
//! - ε-scaling: a coarse ε first, then from its prices with finer ones; the last is a stated share of the spread of
//!   scores. That is sound only where every unit is sold in the end (a unit left over must cost nothing), so with
//!   more room than slots, less, or masks, prices start at 0 with the fine ε, and a coarser one is taken only when
//!   bids run out.
//! - It ends on every input: bids are counted, and past a limit (or where masks or distinctness leave slots behind)
//!   the rest is handed out greedily wherever there is room.
//! - Where all slots have room every slot is sold, as in BASE. Where they have not, or experts are masked, a slot
//!   drops out when the price of everything exceeds its score.
//! - Without limits every token gets what it wants: the gate's own choice.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, top_k]`. It is slow, it is exact up to ε, and it runs on
//! one thread. Tokens bid in the order of their source mass and content, so their place in the batch does not matter.
//!
//! Knows nothing of bounds: how close it came is for others to say.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::error::Result;
use crate::routing::admission::Precedence;
use crate::routing::assignment::Assignment;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::EMPTY;
use crate::routing::topk::gate_choice;

/// How much finer each ε is than the one before.
const FINER: f64 = 5.0;

/// Bids per slot in steps of one size, after which steps get coarser or the rest is handed out greedily.
const BIDS_PER_SLOT: u64 = 60;

/// Balanced assignment by auction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Auction {
    /// It ends with bids in steps of this share of the spread of the scores: each slot may be worth that much less than in the best
    /// assignment.
    accuracy: f64,
}

impl Default for Auction {
    /// An accuracy of 1e-4.
    fn default() -> Self {
        Self { accuracy: 1e-4 }
    }
}

impl Router for Auction {
    fn name(&self) -> &'static str {
        "auction"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let Some(limits) = request.capacity().limits() else {
            *assignment = Assignment::from_chosen(scores, top_k, gate_choice(request), None);
            return Ok(());
        };
        let mut market = Market::new(request, limits);
        market.sell(self.accuracy);
        market.hand_out();
        let mut chosen = vec![EMPTY; scores.tokens() * top_k];
        for (&token, held) in market.rows.iter().zip(market.held.chunks_exact(top_k)) {
            chosen[token * top_k..(token + 1) * top_k].copy_from_slice(held);
        }
        let kept = chosen.iter().map(|&expert| expert != EMPTY).collect();
        *assignment = super::assignment(request, chosen, kept);
        Ok(())
    }
}

/// The units of one pool.
#[derive(Clone, Debug, Default)]
struct Pool {
    units: u32,
    free: u32,
    /// Price of the units that no token holds.
    asked: f64,
    /// Units sold: price (its bits order as the price does, it is never negative) and which row holds it. The cheapest is
    /// on top, among equals that of the row that loses first.
    sold: BinaryHeap<(Reverse<u64>, u32)>,
}

impl Pool {
    fn price(&self) -> f64 {
        match self.sold.peek() {
            _ if self.free > 0 => self.asked,
            Some(&(Reverse(price), _)) => f64::from_bits(price),
            None => f64::INFINITY,
        }
    }
}

/// Which row holds what at which price. Rows are tokens in the order in which they bid, those that lose last first.
struct Market<'a> {
    request: &'a RouteRequest<'a>,
    rows: Vec<usize>,
    pool_of: Vec<usize>,
    pools: Vec<Pool>,
    /// Experts of each row, `[rows, top_k]`; [`EMPTY`] where it holds none.
    held: Vec<u16>,
    waiting: VecDeque<u32>,
    is_waiting: Vec<bool>,
    /// Spread of the scores; 0 where all are equal.
    spread: f64,
    /// Whether there are as many slots as units, all of which can be sold.
    all_sold: bool,
    /// A slot worth less than this after the price stays out.
    least: f64,
    step: f64,
    bids_left: u64,
    is_held: Vec<bool>,
    offers: Vec<(f64, u16)>,
}

impl<'a> Market<'a> {
    fn new(request: &'a RouteRequest<'a>, limits: &[u32]) -> Self {
        let (scores, capacity, top_k) = (request.scores(), request.capacity(), request.top_k());
        let mut rows: Vec<usize> = (0..scores.tokens()).filter(|&token| !request.is_padding(token)).collect();
        let precedence = Precedence::new(request);
        rows.sort_unstable_by_key(|&token| Reverse(precedence.rank()[token]));
        let most = |size: usize| rows.len() as u64 * size as u64;
        let room = limits.iter().zip(capacity.pool_sizes());
        let units = room.map(|(&limit, size)| u64::from(limit).min(most(size)) as u32);
        let pools: Vec<Pool> = units.map(|units| Pool { units, ..Pool::default() }).collect();

        let (mut lowest, mut highest) = (f64::INFINITY, f64::NEG_INFINITY);
        for &token in &rows {
            for &score in scores.selection(token).iter().filter(|score| **score > f32::NEG_INFINITY) {
                (lowest, highest) = (lowest.min(score.into()), highest.max(score.into()));
            }
        }
        let spread = if lowest < highest { highest - lowest } else { 0.0 };
        if lowest > highest {
            lowest = 0.0;
        }
        let demand = rows.len() as u64 * top_k as u64;
        let all_fit = !scores.has_masks() && capacity.feasible_slots(rows.len(), top_k) == demand;
        // No price has to rise above a chain of moves through all pools when every slot can be sold.
        let least = match all_fit {
            true => lowest - 2.0 * spread.max(1.0) * (pools.len() as f64 + 2.0),
            false => lowest.min(0.0),
        };
        Self {
            request,
            pool_of: (0..scores.experts()).map(|expert| capacity.pool_of(expert as u16)).collect(),
            held: vec![EMPTY; rows.len() * top_k],
            waiting: VecDeque::new(),
            is_waiting: vec![false; rows.len()],
            spread,
            all_sold: all_fit && demand == pools.iter().map(|pool| u64::from(pool.units)).sum::<u64>(),
            least,
            step: 1.0,
            bids_left: 0,
            is_held: vec![false; scores.experts()],
            offers: Vec::new(),
            pools,
            rows,
        }
    }

    fn value(&self, row: usize, expert: u16) -> f64 {
        f64::from(self.request.scores().selection(self.rows[row])[usize::from(expert)])
    }

    /// Experts that `row` holds.
    fn holds(&self, row: usize) -> impl Iterator<Item = u16> + '_ {
        let top_k = self.request.top_k();
        self.held[row * top_k..(row + 1) * top_k].iter().copied().filter(|&expert| expert != EMPTY)
    }

    /// The auction. Where every unit will be sold, prices may start anywhere: from coarse steps to fine ones. Where
    /// units may be left over they must be so at 0: from 0 in fine steps, and in coarser ones only if that takes too
    /// many bids.
    fn sell(&mut self, accuracy: f64) {
        // Where all scores are equal any step will do.
        let (fine, coarse) = match self.spread {
            0.0 => (1.0, 1.0),
            spread => (accuracy * spread, spread / FINER),
        };
        if self.all_sold {
            let mut step = coarse;
            while self.bid_in_steps_of(step.max(fine)) && step > fine {
                step /= FINER;
            }
            return;
        }
        let mut step = fine;
        while !self.bid_in_steps_of(step) && step < coarse {
            self.pools.iter_mut().for_each(|pool| *pool = Pool { units: pool.units, ..Pool::default() });
            step *= FINER;
        }
    }

    /// Takes everything back, offers it at the prices reached and lets all bid; false when bids ran out.
    fn bid_in_steps_of(&mut self, step: f64) -> bool {
        for pool in &mut self.pools {
            let price = pool.price();
            pool.asked = if price.is_finite() { price } else { 0.0 };
            pool.free = pool.units;
            pool.sold.clear();
        }
        self.held.fill(EMPTY);
        self.step = step;
        self.bids_left = BIDS_PER_SLOT * self.held.len() as u64;
        (0..self.rows.len()).for_each(|row| self.wait(row));
        while self.bids_left > 0 {
            let Some(row) = self.waiting.pop_front() else { return true };
            self.is_waiting[row as usize] = false;
            self.bid(row as usize);
        }
        false
    }

    fn wait(&mut self, row: usize) {
        if !std::mem::replace(&mut self.is_waiting[row], true) {
            self.waiting.push_back(row as u32);
        }
    }

    /// Lets a row bid for everything it lacks.
    fn bid(&mut self, row: usize) {
        let top_k = self.request.top_k();
        let lacks = top_k - self.holds(row).count();
        if lacks == 0 {
            return;
        }
        let mut offers = std::mem::take(&mut self.offers);
        self.offers_for(row, &mut offers);
        let falling = |a: &(f64, u16), b: &(f64, u16)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let wanted = lacks.min(offers.len());
        if wanted < offers.len() {
            offers.select_nth_unstable_by(wanted, falling);
        }
        let (wanted, others) = offers.split_at_mut(wanted);
        wanted.sort_unstable_by(falling);
        // What else there is: the best of all, and the best in another pool than that.
        let (mut best, mut elsewhere) = ((self.least, usize::MAX), self.least);
        for &(net, expert) in others.iter() {
            let pool = self.pool_of[usize::from(expert)];
            if net > best.0 {
                if pool != best.1 {
                    elsewhere = best.0;
                }
                best = (net, pool);
            } else if pool != best.1 && net > elsewhere {
                elsewhere = net;
            }
        }
        let mut outdone = false;
        for &mut (net, expert) in wanted.iter_mut() {
            if net < self.least {
                break;
            }
            self.bids_left = self.bids_left.saturating_sub(1);
            let pool = self.pool_of[usize::from(expert)];
            let otherwise = if pool == best.1 { elsewhere } else { best.0 };
            let bid = self.value(row, expert) - otherwise + self.step;
            // The row's own bids of a moment ago may have raised the price of the pool.
            match bid > self.pools[pool].price() {
                true => self.buy(row, expert, pool, bid),
                false => outdone = true,
            }
        }
        self.offers = offers;
        if outdone {
            self.wait(row);
        }
    }

    /// What each expert that `row` may have and does not hold is worth to it after its price.
    fn offers_for(&mut self, row: usize, offers: &mut Vec<(f64, u16)>) {
        let top_k = self.request.top_k();
        let held = &self.held[row * top_k..(row + 1) * top_k];
        let mark = |is_held: &mut [bool], as_held: bool| {
            held.iter().filter(|&&expert| expert != EMPTY).for_each(|&expert| is_held[usize::from(expert)] = as_held);
        };
        mark(&mut self.is_held, true);
        offers.clear();
        for (expert, &score) in self.request.scores().selection(self.rows[row]).iter().enumerate() {
            if score > f32::NEG_INFINITY && !self.is_held[expert] {
                let price = self.pools[self.pool_of[expert]].price();
                if price < f64::INFINITY {
                    offers.push((f64::from(score) - price, expert as u16));
                }
            }
        }
        mark(&mut self.is_held, false);
    }

    /// Gives `expert` to `row`, from the row that holds the cheapest unit if all are sold.
    fn buy(&mut self, row: usize, expert: u16, pool: usize, price: f64) {
        let top_k = self.request.top_k();
        if let Some(slot) = self.held[row * top_k..(row + 1) * top_k].iter_mut().find(|slot| **slot == EMPTY) {
            *slot = expert;
        }
        let market = &mut self.pools[pool];
        let loser = match market.free {
            0 => market.sold.pop(),
            _ => {
                market.free -= 1;
                None
            }
        };
        market.sold.push((Reverse(price.max(0.0).to_bits()), row as u32));
        if let Some((_, loser)) = loser {
            self.lose(loser as usize, pool);
        }
    }

    /// Takes a unit of `pool` from `row`: units are alike, so it parts with what is worth least to it there.
    fn lose(&mut self, row: usize, pool: usize) {
        let top_k = self.request.top_k();
        let in_pool = |&slot: &usize| self.held[slot] != EMPTY && self.pool_of[usize::from(self.held[slot])] == pool;
        let value = |slot: usize| self.value(row, self.held[slot]);
        let worst = (row * top_k..(row + 1) * top_k)
            .filter(in_pool)
            .min_by(|&a, &b| value(a).total_cmp(&value(b)).then(self.held[b].cmp(&self.held[a])));
        if let Some(slot) = worst {
            self.held[slot] = EMPTY;
        }
        self.wait(row);
    }

    /// Fills what is still empty with the best experts that have room, rows that lose last first.
    fn hand_out(&mut self) {
        let top_k = self.request.top_k();
        let mut offers = std::mem::take(&mut self.offers);
        for row in 0..self.rows.len() {
            while self.holds(row).count() < top_k {
                self.offers_for(row, &mut offers);
                let open = offers.iter().map(|offer| offer.1);
                let open = open.filter(|&expert| self.pools[self.pool_of[usize::from(expert)]].free > 0);
                let better = |&a: &u16, &b: &u16| self.value(row, a).total_cmp(&self.value(row, b)).then(b.cmp(&a));
                let Some(expert) = open.max_by(better) else { break };
                self.buy(row, expert, self.pool_of[usize::from(expert)], 0.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::{Capacity, Placement};
    use crate::routing::logits::Logits;
    use crate::routing::metrics::RouteMetrics;
    use crate::routing::router::RouteContext;
    use crate::routing::scores::{Scores, Scoring};
    use crate::routing::topk::TopK;
    use proptest::prelude::*;

    /// The oracle: tries every set of at most `top_k` experts for every token in turn. Most slots first, then most
    /// mass.
    fn best(scores: &Scores, token: usize, top_k: usize, capacity: &Capacity, room: &mut [u32]) -> (usize, f64) {
        if token == scores.tokens() {
            return (0, 0.0);
        }
        let mut most = (0, f64::NEG_INFINITY);
        for set in 0u32..1 << scores.experts() {
            let experts = || (0..scores.experts()).filter(move |expert| set >> expert & 1 == 1);
            let mut left = room.to_vec();
            let fits = experts().all(|expert| {
                let left = &mut left[capacity.pool_of(expert as u16)];
                *left = left.wrapping_sub(1);
                *left != u32::MAX && scores.is_allowed(token, expert)
            });
            if set.count_ones() as usize > top_k || !fits {
                continue;
            }
            let (slots, mass) = best(scores, token + 1, top_k, capacity, &mut left);
            let mass = mass + experts().map(|expert| f64::from(scores.gate(token)[expert])).sum::<f64>();
            let slots = slots + set.count_ones() as usize;
            if (slots, mass) > most {
                most = (slots, mass);
            }
        }
        most
    }

    proptest! {
        #[test]
        fn the_assignment_is_the_best_there_is_within_the_steps(
            values in prop::collection::vec(-2.0f32..2.0, 4 * 5), limits in prop::collection::vec(0u32..6, 4),
            top_k in 1usize..4, devices: bool,
        ) {
            let scores = Scoring::softmax().scores(&Logits::new(&values, 5, 4).unwrap(), None).unwrap();
            let capacity = match devices {
                true => Capacity::per_device(Placement::contiguous(4, 2).unwrap(), limits[..2].to_vec()).unwrap(),
                false => Capacity::per_expert(limits).unwrap(),
            };
            let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
            let assignment = Auction::default().route(&request, &mut RouteState::default()).unwrap();
            let mass = RouteMetrics::new(&request, &assignment).gate_mass;
            let (slots, most) = best(&scores, 0, top_k, &capacity, &mut capacity.limits().unwrap().to_vec());
            // Where all fit all are sold; where not, a slot may stay out whose place costs others more than it brings.
            let all_fit = slots == 5 * top_k;
            prop_assert!(!all_fit || assignment.kept() == slots);
            prop_assert!(mass >= most - 1e-4 * (5 * top_k) as f64, "{mass} of {most}");
            prop_assert!(!all_fit || mass <= most + 1e-6);
        }
    }

    #[test]
    fn equal_scores_fill_the_room() {
        let scores = Scoring::softmax().scores(&Logits::new(&[0.0; 24 * 6], 24, 6).unwrap(), None).unwrap();
        for limits in [vec![8; 6], vec![24, 16, 0, 8, 0, 0], vec![1, 2, 3, 4, 5, 6]] {
            let capacity = Capacity::per_expert(limits).unwrap();
            let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
            let assignment = Auction::default().route(&request, &mut RouteState::default()).unwrap();
            assert_eq!(assignment.kept() as u64, capacity.feasible_slots(24, 2));
        }
    }

    #[test]
    fn no_limit_leaves_the_gate_its_choice() {
        let logits: Vec<f32> = (0..40).map(|at| (at * 7 % 11) as f32).collect();
        let scores = Scoring::softmax().scores(&Logits::new(&logits, 8, 5).unwrap(), None).unwrap();
        let capacity = Capacity::unlimited(5).unwrap();
        let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
        let ours = Auction::default().route(&request, &mut RouteState::default()).unwrap();
        assert_eq!(ours, TopK::default().route(&request, &mut RouteState::default()).unwrap());
    }
}
