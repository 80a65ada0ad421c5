//! Prices: one number ≥ 0 per pool, at which the tokens' own choices nearly fill the room.
//!
//! `D(price) = Σ_rows (sum of the top_k largest score − price) + Σ price · room` is convex and piecewise linear; its slope
//! along a price is room − load. A sweep ranks every row at the current prices and counts two things: the load of each
//! pool, and which two pools the row's last held and first refused expert belong to, where their values are close. Those
//! counts are the curvature of `D` (a graph Laplacian over pools), so that one small linear system turns all overloads
//! into price moves at once: a semi-smooth Newton step, kept in bounds by a trust radius.
//!
//! Where room falls short, a score ≤ price claims nothing (the value of a dropped slot is 0).
//!
//! Knows nothing of which rows get the room.

use rayon::prelude::*;

use super::problem::{Problem, UNIT};
use crate::routing::select::{Hint, Selector, copy_few};
use crate::routing::slots::EMPTY;
use crate::simd::{Kernel, LANES, Lanes};

/// Refused experts that a sweep looks at beyond the last held one.
pub(super) const BEYOND: usize = 3;

/// Pools past which only the diagonal of the curvature is kept: the square of counts must stay small.
const DENSE_POOLS: usize = 2048;

/// Rows below which a part of a batch stays on the calling thread. Run by `benches/phase`.
const SMALL_PART: usize = 512;

/// Runs of rows per thread: each has counts of its own to be added up. Run by `benches/phase`.
const CHUNKS: usize = 2;

/// What one sweep counts. All integers: sums in any order are the same sums.
#[derive(Clone)]
pub(super) struct Tally {
    /// Claimed slots per pool.
    pub(super) load: Vec<u32>,
    /// Pairs of pools that a row is undecided between, `[pools, pools]`, symmetric; empty past [`DENSE_POOLS`].
    pub(super) pairs: Vec<u32>,
    /// Row sums of `pairs`, with the pairs of pool and nothing.
    pub(super) degree: Vec<u32>,
    /// `Σ` of what the rows claim, in [`UNIT`]s.
    pub(super) claimed: i128,
    /// `Σ` of the positive ones of the top_k, in [`UNIT`]s, rounded up.
    pub(super) positive: i128,
    /// `Σ` of the distance between the last held and the first refused, in [`UNIT`]s, and how many.
    gap: i128,
    gaps: u64,
}

impl Tally {
    fn new(pools: usize) -> Self {
        let pairs = if pools <= DENSE_POOLS { vec![0; pools * pools] } else { Vec::new() };
        let zeros = vec![0; pools];
        Self { load: zeros.clone(), pairs, degree: zeros, claimed: 0, positive: 0, gap: 0, gaps: 0 }
    }

    fn add(mut self, other: Self) -> Self {
        let sum = |a: &mut [u32], b: &[u32]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        sum(&mut self.load, &other.load);
        sum(&mut self.pairs, &other.pairs);
        sum(&mut self.degree, &other.degree);
        self.claimed += other.claimed;
        self.positive += other.positive;
        self.gap += other.gap;
        self.gaps += other.gaps;
        self
    }

    fn pair(&mut self, a: usize, b: usize) {
        let pools = self.load.len();
        if !self.pairs.is_empty() {
            self.pairs[a * pools + b] += 1;
            self.pairs[b * pools + a] += 1;
        }
        self.degree[a] += 1;
        self.degree[b] += 1;
    }

    /// Mean distance between the last held and the first refused expert of a row.
    pub(super) fn mean_gap(&self) -> f64 {
        if self.gaps == 0 { 0.0 } else { self.gap as f64 / UNIT / self.gaps as f64 }
    }
}

/// How a sweep looks for rows that are undecided.
#[derive(Clone, Copy)]
pub(super) struct Lens {
    /// How close two values must be to be counted.
    pub(super) bandwidth: f32,
    /// Whether all held and refused experts count, not only the last held and the first refused.
    pub(super) deep: bool,
}

impl Lens {
    /// For a row's values after prices moved by `moved`: as wide as the move, within reason of the mean `gap` between the last
    /// held and the first refused.
    pub(super) fn after(gap: f64, moved: f64) -> Self {
        let bandwidth = moved.clamp(0.5 * gap, 8.0 * gap).max(1e-6);
        Self { bandwidth: bandwidth as f32, deep: bandwidth >= 3.0 * gap }
    }
}

/// Claims of every row at the prices of a sweep.
pub(super) struct Claims {
    /// The top_k experts of each row, best first, `[rows, top_k]`; [`EMPTY`] where masks leave fewer.
    pub(super) chosen: Vec<u16>,
    /// Value of the best expert a row did not get; −∞ where there is none.
    pub(super) refused: Vec<f32>,
    /// Where each row's ranking ended in the last sweep: of its own, so that no row waits for another.
    hints: Vec<Hint>,
    /// Sweeps made so far.
    pub(super) sweeps: usize,
}

impl Claims {
    pub(super) fn new(rows: usize, top_k: usize) -> Self {
        Self {
            chosen: vec![EMPTY; rows * top_k],
            refused: vec![f32::NEG_INFINITY; rows],
            hints: vec![Hint::NONE; rows],
            sweeps: 0,
        }
    }
}

/// Claims of a run of rows, and the rows.
struct Run<'a> {
    rows: &'a [u32],
    chosen: &'a mut [u16],
    refused: &'a mut [f32],
    hints: &'a mut [Hint],
}

/// Ranks `rows` at `prices` (per pool); what is undecided is seen through `lens`.
pub(super) fn sweep(
    problem: &Problem<'_>,
    rows: &[u32],
    prices: &[f32],
    lens: Lens,
    claims: &mut Claims,
    drops: bool,
) -> Tally {
    let price: Vec<f32> = problem.pool_of.iter().map(|&pool| prices[usize::from(pool)]).collect();
    claims.sweeps += 1;
    let top_k = problem.top_k;
    let count = rows.len();
    let chunk = count.div_ceil(CHUNKS * rayon::current_num_threads()).max(1);
    let runs = rows
        .par_chunks(chunk)
        .zip(claims.chosen[..count * top_k].par_chunks_mut(chunk * top_k))
        .zip(claims.refused[..count].par_chunks_mut(chunk))
        .zip(claims.hints[..count].par_chunks_mut(chunk))
        .map(|(((rows, chosen), refused), hints)| Run { rows, chosen, refused, hints });
    let tally = |run: Run<'_>| problem.isa.run(Sweep { problem, run, price: &price, lens, drops });
    let none = || Tally::new(problem.room.len());
    if problem.is_small() || count < SMALL_PART {
        let whole = Run {
            rows,
            chosen: &mut claims.chosen[..count * top_k],
            refused: &mut claims.refused[..count],
            hints: &mut claims.hints[..count],
        };
        return tally(whole);
    }
    runs.map(tally).reduce(none, Tally::add)
}

/// A run of rows at the prices of a sweep.
struct Sweep<'a> {
    problem: &'a Problem<'a>,
    run: Run<'a>,
    price: &'a [f32],
    lens: Lens,
    drops: bool,
}

impl Kernel for Sweep<'_> {
    type Output = Tally;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Tally {
        let Self { problem, run, price, lens, drops } = self;
        sweep_run(lanes, problem, run, price, lens, drops)
    }
}

#[inline(always)]
fn sweep_run<L: Lanes>(lanes: L, problem: &Problem<'_>, run: Run<'_>, price: &[f32], lens: Lens, drops: bool) -> Tally {
    let top_k = problem.top_k;
    let mut tally = Tally::new(problem.room.len());
    let mut selector = Selector::new(price.len(), (top_k + BEYOND).min(price.len()));
    let lines = run.chosen.chunks_exact_mut(top_k).zip(run.refused).zip(run.hints);
    for (&row, ((chosen, refused), hint)) in run.rows.iter().zip(lines) {
        selector.select_on(lanes, problem.selection(row as usize), Some(price), *hint);
        *hint = selector.hint();
        let (ids, values) = (selector.ids(), selector.values());
        let held = selector.count().min(top_k);
        copy_few(chosen, &ids[..held]);
        chosen[held..].fill(EMPTY);
        *refused = values.get(top_k).copied().unwrap_or(f32::NEG_INFINITY);

        let (claimed, positive) = match selector.sixteen() {
            Some(sixteen) => sums(&sixteen, held),
            None => values[..held].chunks(LANES).fold((0.0, 0.0), |(claimed, positive), part| {
                let mut sixteen = [0.0; LANES];
                sixteen[..part.len()].copy_from_slice(part);
                let sums = sums(&sixteen, part.len());
                (claimed + sums.0, positive + sums.1)
            }),
        };
        tally.positive += i128::from((positive * UNIT).ceil() as i64);
        let mut wanted = held;
        if drops {
            while wanted > 0 && values[wanted - 1] <= 0.0 {
                wanted -= 1;
            }
            tally.claimed = tally.positive;
        } else {
            tally.claimed += i128::from((claimed * UNIT) as i64);
        }
        for &expert in &ids[..wanted] {
            tally.load[problem.pool(expert)] += 1;
        }
        undecided(problem, &mut tally, ids, values, wanted, lens, drops);
    }
    tally
}

/// `Σ value` and `Σ max(0, value)` of the first `held`, added up in halves.
#[inline(always)]
fn sums(values: &[f32; LANES], held: usize) -> (f64, f64) {
    let (mut claimed, mut positive) = ([0.0; LANES], [0.0; LANES]);
    for lane in 0..LANES {
        let value = if lane < held { f64::from(values[lane]) } else { 0.0 };
        claimed[lane] = value;
        positive[lane] = if value > 0.0 { value } else { 0.0 };
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            claimed[lane] += claimed[lane + half];
            positive[lane] += positive[lane + half];
        }
        half /= 2;
    }
    (claimed[0], positive[0])
}

/// Counts the pools between which a row is close to changing its mind.
#[inline(always)]
fn undecided(
    problem: &Problem<'_>,
    tally: &mut Tally,
    ids: &[u16],
    values: &[f32],
    wanted: usize,
    lens: Lens,
    drops: bool,
) {
    let (top_k, bandwidth) = (problem.top_k, lens.bandwidth);
    if drops && wanted < top_k {
        // Nothing, at value 0, stands between the held and the refused.
        for at in wanted.saturating_sub(1)..(wanted + 1).min(ids.len()) {
            if values[at].abs() < bandwidth {
                tally.degree[problem.pool(ids[at])] += 1;
            }
        }
        return;
    }
    if wanted == 0 || wanted >= ids.len() {
        return;
    }
    let last = wanted - 1;
    let gap = values[last] - values[wanted];
    tally.gap += i128::from((f64::from(gap) * UNIT) as i64);
    tally.gaps += 1;
    let (leaves, enters) = (problem.pool(ids[last]), problem.pool(ids[wanted]));
    if leaves != enters {
        if gap < bandwidth {
            tally.pair(leaves, enters);
        }
        if lens.deep {
            // Far from the goal the next step is long: count the rows that would leave, or enter, along all of it.
            for at in (0..last).filter(|&at| values[at] - values[wanted] < bandwidth) {
                let pool = problem.pool(ids[at]);
                if pool != enters {
                    tally.pair(pool, enters);
                }
            }
            for at in (wanted + 1..ids.len()).filter(|&at| values[last] - values[at] < bandwidth) {
                let pool = problem.pool(ids[at]);
                if pool != leaves {
                    tally.pair(leaves, pool);
                }
            }
        }
        return;
    }
    // Both in one pool: a price moves neither past the other, so look one pool further on either side.
    if let Some(at) = (wanted + 1..ids.len()).find(|&at| problem.pool(ids[at]) != leaves)
        && values[last] - values[at] < bandwidth
    {
        tally.pair(leaves, problem.pool(ids[at]));
    }
    if let Some(at) = (0..last).rev().find(|&at| problem.pool(ids[at]) != enters)
        && values[at] - values[wanted] < bandwidth
    {
        tally.pair(problem.pool(ids[at]), enters);
    }
}
