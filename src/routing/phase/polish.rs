//! The last step for what the prices left: cycles of exchanges, then the prices that prove what they reached.
//!
//! First in the order of the router (slots, served rows, score), which gives the assignment; then for score alone, on a
//! copy, which gives the bound: the best of *any* assignment may drop slots that the order keeps.
//!
//! Knows nothing of when it is needed: where the certificate already passes it is not called.

use super::claim::Holding;
use super::exchange::Exchange;
use super::problem::Problem;
use crate::routing::slots::EMPTY;

/// Steps for a batch of any size; enough for the optimum of a batch of some hundred tokens.
const WORK: u64 = 1 << 24;

/// Steps more for every score of the batch.
const WORK_PER_SCORE: u64 = 64;

/// What polishing found.
pub(super) struct Polished {
    pub(super) chosen: Vec<u16>,
    pub(super) kept: Vec<bool>,
    /// Prices for the bound, one per pool: exact where the work sufficed, good ones where not.
    pub(super) prices: Vec<f32>,
}

/// Exchanges slots until nothing gains or the work is used up; none where the batch is too large to try.
pub(super) fn polish(problem: &Problem<'_>, chosen: &[u16], kept: &[bool], prices: &[f32]) -> Option<Polished> {
    let mut holding = Holding::new(problem, chosen.to_vec(), prices);
    for (slot, _) in kept.iter().enumerate().filter(|(slot, kept)| !**kept && chosen[*slot] != EMPTY) {
        holding.kept[slot] = false;
        holding.left[problem.pool(chosen[slot])] += 1;
    }
    let work = WORK + WORK_PER_SCORE * (problem.rows() * problem.pool_of.len()) as u64;
    let mut exchange = Exchange::new(problem, holding, prices, work)?;
    let best = exchange.run();
    let (chosen, kept) = (exchange.holding.chosen.clone(), exchange.holding.kept.clone());
    if best {
        exchange.relax();
        exchange.run();
    }
    Some(Polished { chosen, kept, prices: exchange.prices() })
}
