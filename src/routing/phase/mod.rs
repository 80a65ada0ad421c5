//! The phase router: the most gate score that fits into the room, and a proof of how close it is.
//!
//! `maximise Σ gate score of kept slots  subject to  load of pool ≤ limit,  ≤ top_k distinct allowed experts a token`
//! for pools that are experts or devices. Four steps, one file each: *price* finds one price per pool at which
//! the tokens' own top-k of `selection score − price` nearly fills the room; *claim* lets over-full pools overflow
//! at the least loss; *place* makes the kept slots the maximum flow; *certify* bounds what any router
//! could have kept: `Σ_i Σ top-k max(0, gate − price) + Σ price · limit`. Where that is not within the gap (small batches,
//! many equal scores) *exchange* moves slots along cycles of pools until nothing gains, and its labels are exact prices.
//!
//! Shapes: scores `[tokens, experts]` to assignment `[tokens, top_k]`, prices `[pools]`.
//!
//! - With unlimited capacity, or where the gate's own choice fits, the result is bit-equal to
//!   [`TopK`](crate::routing::topk::TopK).
//! - No limit is ever exceeded. Where all slots have room, none is dropped. Where capacity falls short: as many slots as
//!   can be, then as many tokens with at least one expert, then the most gate mass.
//! - The place in the batch never matters: equal losses are borne by the token with less source mass, then by row
//!   content; only identical rows are told apart by index.
//! - Claims go by selection scores (with a model's selection bias, within its groups); the bound is in gate scores. With a
//!   bias the two aim at different things, so the bound is looser and the descent stops by its own forecast.
//!
//! ```
//! use phase_moe::{Capacity, Logits, PhaseRouter, RouteContext, RouteRequest, RouteState, Router, Scoring};
//!
//! // Three tokens like expert 0 best; it has room for one: the one that likes it most in comparison stays.
//! let logits = [3.0, 2.9, 0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 2.8];
//! let scores = Scoring::softmax().scores(&Logits::new(&logits, 3, 3)?, None)?;
//! let capacity = Capacity::per_expert(vec![1, 1, 1])?;
//! let request = RouteRequest::new(&scores, 1, &capacity, RouteContext::default())?;
//! let assignment = PhaseRouter::default().route(&request, &mut RouteState::default())?;
//! assert_eq!(assignment.ids().collect::<Vec<_>>(), [1, 0, 2]);
//! assert!(assignment.gate_mass_bound().is_some());
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of weights, devices' speeds or other layers; prices of the last batch come in and go out with the state.

mod certify;
mod claim;
mod cycle;
mod descent;
mod exchange;
mod margin;
mod place;
mod polish;
mod price;
mod problem;

pub use certify::gate_mass_bound;
pub(in crate::routing) use place::place_claims;

use self::certify::{bound, kept_mass};
use self::claim::Holding;
use self::descent::{Descent, Point};
use self::place::place;
use self::polish::polish;
use self::price::{Claims, Lens};
use self::problem::{Problem, UNIT};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::routing::assignment::{Assignment, weigh};
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::{EMPTY, sort_slots};
use crate::simd::select::{Best, NUMBERS, order, reached_in};
use crate::simd::{Kernel, LANES, Lanes};

/// One row in so many is in the sample that cold prices start from. Run by `benches/phase`.
const SAMPLE: usize = 8;

/// Fewer slots per pool in the sample than this say too little about the batch.
const SAMPLE_MEAN: usize = 16;

/// How far the sample's descent goes; the sample itself is no closer to the batch.
const SAMPLE_TOLERANCE: f64 = 2e-3;

/// Rows a thread takes at a time where nothing is added up. Run by `benches/phase`.
const CHUNK: usize = 512;

/// Old prices nearly fill the room when fewer than one slot in so many is too many.
const NEARLY: u64 = 10;

/// After so many sweeps it shows whether prices get there.
const PATIENCE: usize = 6;

/// Kept / bound that prices which get there have by then.
const NEAR: f64 = 0.95;

/// Scores of a batch up to which the rest is then left to exchanges: they surely have the work to finish.
const SMALL: usize = 1 << 17;

/// Gate-aware routing under exact limits: price, claim, place, certify.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PhaseRouter {
    /// The certificate to stop at, as a share of the bound.
    pub(crate) gap: f64,
    /// The most sweeps over the batch, and over the sample of it that cold prices start from.
    max_sweeps: usize,
}

impl PhaseRouter {
    /// Stops when the kept gate mass is certified to be within `gap` (a share of the bound) of the best possible, or after
    /// `max_sweeps` sweeps over the batch.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a gap that is NaN, negative or not below 1, and for no sweeps.
    pub fn new(gap: f64, max_sweeps: usize) -> Result<Self> {
        if !(0.0..1.0).contains(&gap) {
            return Err(Error::parameter("gap", gap, "at least 0 and below 1"));
        }
        if max_sweeps == 0 {
            return Err(Error::parameter("max_sweeps", max_sweeps, "at least 1"));
        }
        Ok(Self { gap, max_sweeps })
    }
}

impl Default for PhaseRouter {
    /// A gap of 5e-4, at most 24 sweeps.
    fn default() -> Self {
        Self { gap: 5e-4, max_sweeps: 24 }
    }
}

impl Router for PhaseRouter {
    fn name(&self) -> &'static str {
        "phase"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let unlimited = vec![u32::MAX; request.scores().experts()];
        let problem = Problem::new(request, request.capacity().limits().unwrap_or(&unlimited), scratch.isa());
        Run::new(self, request, &problem).run(state, assignment);
        Ok(())
    }
}

/// One batch on its way through the steps.
struct Run<'a> {
    router: &'a PhaseRouter,
    request: &'a RouteRequest<'a>,
    problem: &'a Problem<'a>,
    rows: Vec<u32>,
    claims: Claims,
    /// The lowest bound so far.
    bound: f64,
}

impl<'a> Run<'a> {
    fn new(router: &'a PhaseRouter, request: &'a RouteRequest<'a>, problem: &'a Problem<'a>) -> Self {
        let rows: Vec<u32> = (0..problem.rows() as u32).collect();
        let claims = Claims::new(problem.rows(), problem.top_k);
        Self { router, request, problem, rows, claims, bound: f64::INFINITY }
    }

    fn run(mut self, state: &mut RouteState, assignment: &mut Assignment) {
        let problem = self.problem;
        let pools = problem.room.len();
        let limited = self.request.capacity().limits().is_some();
        let all = problem.rows() as u64 * problem.top_k as u64;
        if let Some(point) = self.warm(state, all) {
            return self.finish(point, None, all, state, assignment);
        }
        let nothing = Descent::new(problem, &self.rows, 0);
        let zero = nothing.look(vec![0.0; pools], Lens { bandwidth: 0.0, deep: false }, &mut self.claims);
        self.certify(&zero);
        let claimed: u64 = zero.tally.load.iter().map(|&load| u64::from(load)).sum();
        let fits = zero.tally.load.iter().zip(&problem.room).all(|(load, room)| load <= room);
        if !limited || fits {
            if limited {
                (state.prices, state.gap) = (zero.prices, zero.tally.mean_gap());
            }
            state.sweeps = self.claims.sweeps;
            let mut kept = vec![true; self.claims.chosen.len()];
            return self.assign(&self.claims.chosen, &mut kept, assignment);
        }
        let rows = std::mem::take(&mut self.rows);
        let point = self.start(&Descent::new(problem, &rows, claimed), &zero, state, claimed);
        self.rows = rows;
        self.finish(point, Some(&zero), claimed, state, assignment);
    }

    /// The point at the last batch's prices, without a look at price 0, where that is sure to show nothing: some expert alone
    /// is wanted by more rows than it has room for, and the old prices nearly fill the room.
    fn warm(&mut self, state: &RouteState, all: u64) -> Option<Point> {
        let problem = self.problem;
        let prices = state.prices.as_slice();
        let alone = problem.pool_of.len() == problem.room.len();
        if !alone || problem.scores.has_masks() || !self.fit(prices) || state.gap <= 0.0 {
            return None;
        }
        let dearest = (0..prices.len()).max_by(|&a, &b| prices[a].total_cmp(&prices[b]))?;
        if problem.isa.run(Wanted { problem, expert: dearest }) <= problem.room[dearest] as usize {
            return None;
        }
        let descent = Descent::new(problem, &self.rows, all);
        let point = descent.look(prices.to_vec(), Lens::after(state.gap, 0.0), &mut self.claims);
        let over = |(&load, &room): (&u32, &u32)| u64::from(load.saturating_sub(room));
        let over: u64 = point.tally.load.iter().zip(&problem.room).map(over).sum();
        (over * NEARLY <= all).then_some(point)
    }

    /// Whether prices are ones for this problem.
    fn fit(&self, prices: &[f32]) -> bool {
        prices.len() == self.problem.room.len() && prices.iter().all(|price| price.is_finite() && *price >= 0.0)
    }

    /// From a first point to the assignment.
    fn finish(
        mut self,
        mut point: Point,
        zero: Option<&Point>,
        claimed: u64,
        state: &mut RouteState,
        assignment: &mut Assignment,
    ) {
        let problem = self.problem;
        let rows = std::mem::take(&mut self.rows);
        let mut descent = Descent::new(problem, &rows, claimed);
        let gap = zero.unwrap_or(&point).tally.mean_gap();
        let mut left = self.router.max_sweeps;
        self.certify(&point);
        let small = problem.rows() * problem.pool_of.len() <= SMALL;
        let mut tolerance = self.router.gap * 0.4;
        let mut best: Option<(f64, Vec<u16>, Vec<bool>)> = None;
        loop {
            let allowed = match best {
                None if small => left.min(PATIENCE),
                None if !descent.drops => left.div_ceil(2),
                _ => left,
            };
            let (next, made) = descent.descend(point, tolerance, allowed, &mut self.claims);
            point = next;
            left = left.saturating_sub(made);
            self.certify(&point);
            let mut holding = Holding::new(problem, self.claims.chosen.clone(), &point.prices);
            holding.overflow(problem.isa, &self.claims.refused);
            place(&mut holding);
            holding.refill();
            let mass = self.mass(&holding);
            // Values in steps and rows that are all alike have no prices that single steps find.
            let mut stalled = (made == 0 && best.is_some()) || (small && mass < NEAR * self.bound);
            if !descent.drops && holding.kept.iter().filter(|&&kept| kept).count() as u64 != claimed {
                // Masks leave less than the sum of the room: prices must be free to refuse a slot altogether.
                descent.drops = true;
                point = descent.look(point.prices, Lens::after(gap, f64::INFINITY), &mut self.claims);
                stalled = false;
            }
            if best.as_ref().is_none_or(|(most, ..)| mass > *most) {
                best = Some((mass, holding.chosen, holding.kept));
            }
            let most = best.as_ref().map_or(0.0, |(most, ..)| *most);
            if most >= (1.0 - self.router.gap) * self.bound || left == 0 || stalled || tolerance < 1e-7 {
                break;
            }
            tolerance *= if made < allowed { 0.1 } else { 1.0 };
        }
        let (most, mut chosen, mut kept) = best.unwrap_or_default();
        let certified = most >= (1.0 - self.router.gap) * self.bound || self.is_within_gap(&chosen, &kept, point.value);
        (state.prices, state.gap) = (point.prices, point.tally.mean_gap());
        if !certified && let Some(polished) = polish(problem, &chosen, &kept, &state.prices) {
            (chosen, kept) = (polished.chosen, polished.kept);
            let bound = gate_mass_bound(self.request, &polished.prices).unwrap_or(f64::INFINITY);
            if bound < self.bound {
                (self.bound, state.prices) = (bound, polished.prices);
            }
        }
        state.sweeps = self.claims.sweeps;
        self.assign(&chosen, &mut kept, assignment);
    }

    /// Prices to start from: those of the last batch where they help, else those of a sample, else zero.
    fn start(&mut self, descent: &Descent<'_>, zero: &Point, state: &RouteState, claimed: u64) -> Point {
        let (problem, gap) = (self.problem, zero.tally.mean_gap());
        if self.fit(&state.prices) {
            let warm = descent.look(state.prices.clone(), Lens::after(gap, 0.0), &mut self.claims);
            if warm.value < zero.value {
                return warm;
            }
        }
        let mut prices = zero.prices.clone();
        let sample = problem.sample(SAMPLE);
        if sample.len() * problem.top_k >= SAMPLE_MEAN * problem.room.len() {
            let share = claimed as f64 * sample.len() as f64 / problem.rows() as f64;
            let part = Descent::new(problem, &sample, share as u64);
            let mut claims = Claims::new(sample.len(), problem.top_k);
            let start = part.look(prices, Lens::after(gap, f64::INFINITY), &mut claims);
            prices = part.descend(start, SAMPLE_TOLERANCE, self.router.max_sweeps, &mut claims).0.prices;
            return descent.look(prices, Lens::after(gap, 0.0), &mut self.claims);
        }
        descent.look(prices, Lens::after(gap, f64::INFINITY), &mut self.claims)
    }

    /// Lowers the bound to that of the point's prices, if that is lower.
    fn certify(&mut self, point: &Point) {
        let limits = self.request.capacity().limits().unwrap_or_default();
        let bound = match self.problem.by_gate {
            true => bound(point.tally.positive, &point.prices, limits),
            // Prices are checked, so this cannot fail; if it did the bound would only stay as it is.
            false => gate_mass_bound(self.request, if limits.is_empty() { &[] } else { &point.prices })
                .unwrap_or(f64::INFINITY),
        };
        self.bound = self.bound.min(bound);
    }

    /// With a selection bias: whether the selection scores are within the gap of `value`, which none can exceed.
    fn is_within_gap(&self, chosen: &[u16], kept: &[bool], value: f64) -> bool {
        let top_k = self.problem.top_k;
        let rows = chosen.chunks_exact(top_k).zip(kept.chunks_exact(top_k)).enumerate();
        let score = || kept_mass(rows.map(|(row, (chosen, kept))| (self.problem.selection(row), chosen, kept)));
        !self.problem.by_gate && value - score() as f64 / UNIT <= self.router.gap * self.bound
    }

    fn mass(&self, holding: &Holding<'_>) -> f64 {
        let top_k = self.problem.top_k;
        let part = |(first, (chosen, kept)): (usize, (&[u16], &[bool]))| {
            let rows = (first * CHUNK..).zip(chosen.chunks_exact(top_k).zip(kept.chunks_exact(top_k)));
            kept_mass(rows.map(|(row, (chosen, kept))| (self.problem.gate(row), chosen, kept)))
        };
        let chunks = holding.chosen.par_chunks(CHUNK * top_k).zip(holding.kept.par_chunks(CHUNK * top_k));
        let sum: i128 = match self.problem.is_small() {
            true => part((0, (&holding.chosen, &holding.kept))),
            false => chunks.enumerate().map(part).sum(),
        };
        sum as f64 / UNIT
    }

    /// Rows back to tokens, each token's slots by selection score.
    fn assign(&self, chosen: &[u16], kept: &mut [bool], assignment: &mut Assignment) {
        let (problem, top_k) = (self.problem, self.problem.top_k);
        let (into, weights) = assignment.refill(problem.scores, top_k);
        if problem.rows() < problem.scores.tokens() {
            into.fill(EMPTY);
            weights.fill(0.0);
        }
        match problem.is_small() || problem.rows() < problem.scores.tokens() {
            true => problem.isa.run(Arrange { problem, first: 0, chosen, kept, into, weights }),
            // Without padding the rows are the tokens, so that each part writes to a part.
            false => {
                let size = CHUNK * top_k;
                let from = chosen.par_chunks(size).zip(kept.par_chunks_mut(size));
                let parts = from.zip(into.par_chunks_mut(size).zip(weights.par_chunks_mut(size))).enumerate();
                parts.for_each(|(part, ((chosen, kept), (into, weights)))| {
                    problem.isa.run(Arrange { problem, first: part * CHUNK, chosen, kept, into, weights });
                });
            }
        }
        if kept.contains(&false) {
            let mut all = vec![false; problem.scores.tokens() * top_k];
            for (&token, kept) in problem.tokens.iter().zip(kept.chunks_exact(top_k)) {
                all[token as usize * top_k..][..top_k].copy_from_slice(kept);
            }
            assignment.drop_slots(all.into_iter());
        }
        assignment.set_gate_mass_bound(self.bound);
    }
}

/// Counts rows that want an expert above all but `top_k − 1` others, at price 0.
struct Wanted<'a> {
    problem: &'a Problem<'a>,
    expert: usize,
}

impl Kernel for Wanted<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> usize {
        let mut wanted = 0;
        for row in 0..self.problem.rows() {
            let selection = self.problem.selection(row);
            wanted += usize::from(reached_in(lanes, selection, selection[self.expert]) <= self.problem.top_k);
        }
        wanted
    }
}

/// Writes the slots of every row to its token, best selection score first, with their weights; `kept` follows.
struct Arrange<'a> {
    problem: &'a Problem<'a>,
    /// The row that everything here begins with.
    first: usize,
    chosen: &'a [u16],
    kept: &'a mut [bool],
    into: &'a mut [u16],
    weights: &'a mut [f32],
}

impl Kernel for Arrange<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { problem, first, chosen, kept, into, weights } = self;
        let top_k = problem.top_k;
        let mut best = Best::default();
        let rows = chosen.chunks_exact(top_k).zip(kept.chunks_exact_mut(top_k));
        for (row, (chosen, kept)) in (first..).zip(rows) {
            let at = (problem.tokens[row] as usize - first) * top_k;
            let (into, weights) = (&mut into[at..at + top_k], &mut weights[at..at + top_k]);
            let selection = problem.selection(row);
            if top_k <= LANES {
                let mut values = [f32::NEG_INFINITY; LANES];
                for (slot, &expert) in chosen.iter().enumerate() {
                    values[slot] = selection.get(usize::from(expert)).copied().unwrap_or(f32::NEG_INFINITY);
                }
                order(lanes, lanes.load(&values), lanes.load(&NUMBERS), top_k, &mut best);
                let mut before = [false; LANES];
                before[..top_k].copy_from_slice(kept);
                for (slot, &from) in best.ids[..top_k].iter().enumerate() {
                    (into[slot], kept[slot]) = (chosen[from as usize], before[from as usize % LANES]);
                }
                if best.values[..top_k].windows(2).any(|pair| pair[0] == pair[1]) {
                    sort_slots(into, kept, selection);
                }
            } else {
                into.copy_from_slice(chosen);
                sort_slots(into, kept, selection);
            }
            weigh(problem.scores, problem.gate(row), into, weights);
        }
    }
}

#[cfg(test)]
mod tests;
