//! The descent: from any prices towards those at which overloads vanish.
//!
//! Newton's system is `(L / bandwidth + ε) Δ = load − room`, with `L` the Laplacian of the counted pairs; it is solved by
//! conjugate gradients with the diagonal as preconditioner. `(load − room) · Δ` foretells how much `D` can still fall.
//!
//! A step that does not lower `D` is followed by one half-way to the pools' own [margins](super::margin).
//!
//! Knows nothing of single rows beyond handing them on.

use super::margin::margins;
use super::price::{Claims, Lens, Tally, sweep};
use super::problem::{Problem, UNIT};
use crate::simd::{Kernel, Lanes};

/// Steps of conjugate gradients at most; pools are few and the system is well conditioned by its diagonal.
const SOLVER_STEPS: usize = 40;

/// What a descent works on: some rows, and the room that is theirs.
pub(super) struct Descent<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) rows: &'a [u32],
    /// Room per pool, scaled to `rows`.
    pub(super) room: Vec<f64>,
    /// Whether a slot may be dropped for a value of 0: room falls short.
    pub(super) drops: bool,
    /// Whether the room is exactly what is asked for: then only differences of prices matter.
    pub(super) level_free: bool,
}

/// Prices and what a sweep at them found.
#[derive(Clone)]
pub(super) struct Point {
    pub(super) prices: Vec<f32>,
    pub(super) tally: Tally,
    /// `D` at the prices.
    pub(super) value: f64,
    bandwidth: f32,
}

impl<'a> Descent<'a> {
    /// Over `rows`, which claim `claimed` slots where prices do not matter; room is scaled to their part of the batch.
    pub(super) fn new(problem: &'a Problem<'a>, rows: &'a [u32], claimed: u64) -> Self {
        let part = rows.len() as f64 / problem.rows().max(1) as f64;
        let room: Vec<f64> = problem.room.iter().map(|&room| f64::from(room) * part).collect();
        let total: f64 = room.iter().sum();
        let claimed = claimed as f64;
        Self { problem, rows, room, drops: claimed > total + 1.0, level_free: (claimed - total).abs() <= 1.0 }
    }

    /// Sweeps once at `prices`.
    pub(super) fn look(&self, prices: Vec<f32>, lens: Lens, claims: &mut Claims) -> Point {
        let tally = sweep(self.problem, self.rows, &prices, lens, claims, self.drops);
        let paid: f64 = prices.iter().zip(&self.room).map(|(&price, &room)| f64::from(price) * room).sum();
        let value = tally.claimed() + paid;
        Point { prices, tally, value, bandwidth: lens.bandwidth }
    }

    /// Overload per pool, as far as a price can do something about it.
    fn overload(&self, point: &Point) -> Vec<f64> {
        let parts = point.tally.load.iter().zip(&self.room).zip(&point.prices);
        parts
            .map(|((&load, &room), &price)| {
                let over = f64::from(load) - room;
                // No price move helps a pool with room at price 0, or one that no row leaves at any price.
                let stuck = (price <= 0.0 && over < 0.0) || (price >= self.problem.ceiling && over > 0.0);
                if stuck { 0.0 } else { over }
            })
            .collect()
    }

    /// Descends from `start` by at most `sweeps` sweeps, until `D` can fall by no more than `tolerance · D`.
    /// Returns the best point and the sweeps made; `claims` are those of the best.
    pub(super) fn descend(&self, start: Point, tolerance: f64, sweeps: usize, claims: &mut Claims) -> (Point, usize) {
        let mut best = start;
        let mut radius = (16.0 * best.tally.mean_gap()).max(1e-6);
        let (mut made, mut latest, mut failed) = (0, true, false);
        // In a device of several experts the margins are not exact: there a shorter Newton step comes first.
        let eager = self.room.len() == self.problem.pool_of.len();
        while made < sweeps {
            let overload = self.overload(&best);
            let free: Vec<bool> =
                best.prices.iter().zip(&overload).map(|(&price, &over)| price > 0.0 || over > 0.0).collect();
            let bandwidth = f64::from(best.bandwidth);
            let step = self.problem.isa.run(Solve { tally: &best.tally, bandwidth, overload: &overload, free: &free });
            let promise: f64 = overload.iter().zip(&step).map(|(over, step)| over * step).sum();
            let beyond = !self.drops && best.prices.iter().any(|&price| price >= self.problem.ceiling);
            if beyond || promise <= tolerance * best.value.abs() {
                break;
            }
            let longest = step.iter().fold(0.0f64, |longest, step| longest.max(step.abs()));
            let clipped: Vec<f64> = step.iter().map(|step| step.clamp(-radius, radius)).collect();
            let promised: f64 = overload.iter().zip(&clipped).map(|(over, step)| over * step).sum();
            let moved = best.prices.iter().zip(&clipped).map(|(&price, step)| (f64::from(price) + step) as f32);
            let prices = self.within_range(moved.collect());
            let next = self.look(prices, Lens::after(best.tally.mean_gap(), longest.min(radius)), claims);
            made += 1;
            // A step that keeps what it promised may be longer next time; one that fails is tried shorter.
            let kept = (best.value - next.value)
                / (promised - 0.5 * promised * (promised / promise).min(1.0)).max(f64::MIN_POSITIVE);
            if kept > 0.5 {
                radius *= 2.0;
            } else if kept < 0.2 {
                radius = 0.3 * longest.min(radius);
            }
            latest = next.value < best.value;
            if latest {
                best = next;
            } else if (failed || eager) && made + 1 < sweeps {
                // The counts mislead where values come in steps: go half-way to where each pool's own margin lies.
                let margins = margins(self.problem, self.rows, &best.prices, &self.room, self.drops);
                let halved = best.prices.iter().zip(&margins).map(|(&price, &margin)| 0.5 * (price + margin));
                let prices = self.within_range(halved.collect());
                let moved = prices.iter().zip(&best.prices).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
                let next = self.look(prices, Lens::after(best.tally.mean_gap(), f64::from(moved)), claims);
                made += 2;
                latest = next.value < best.value;
                if latest {
                    radius = radius.max(f64::from(moved));
                    best = next;
                }
            }
            failed = !latest;
            if radius < 1e-7 {
                break;
            }
        }
        if !latest {
            best = self.look(best.prices, Lens { bandwidth: best.bandwidth, deep: false }, claims);
        }
        (best, made)
    }

    /// Prices as they must be: in `[0, ceiling]`, and the lowest 0 where the level is free.
    fn within_range(&self, mut prices: Vec<f32>) -> Vec<f32> {
        if self.level_free {
            let lowest = prices.iter().copied().fold(f32::INFINITY, f32::min);
            prices.iter_mut().for_each(|price| *price -= lowest);
        }
        prices.iter_mut().for_each(|price| *price = price.clamp(0.0, self.problem.ceiling));
        prices
    }
}

/// Solves `(L / bandwidth + ε) step = overload` over the pools that are `free`; the others do not move.
struct Solve<'a> {
    tally: &'a Tally,
    bandwidth: f64,
    overload: &'a [f64],
    free: &'a [bool],
}

impl Kernel for Solve<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) -> Vec<f64> {
        let Self { tally, bandwidth, overload, free } = self;
        let pools = overload.len();
        let mean = tally.degree.iter().map(|&degree| f64::from(degree)).sum::<f64>() / pools as f64;
        // Pools that no row is undecided about would move without bound: lend every pool a little of the mean.
        let diagonal: Vec<f64> =
            tally.degree.iter().map(|&degree| (f64::from(degree) + 0.02 * mean + 0.5) / bandwidth).collect();
        // Whole rows are added up, so that neither order nor vectors change a sum: the matrix is symmetric.
        let apply = |x: &[f64], out: &mut [f64]| {
            out.iter_mut().zip(diagonal.iter().zip(x)).for_each(|(out, (d, x))| *out = d * x);
            for (row, &x) in tally.pairs.chunks_exact(pools).zip(x) {
                let x = x / bandwidth;
                out.iter_mut().zip(row).for_each(|(out, &count)| *out -= f64::from(count) * x);
            }
            out.iter_mut().zip(free).for_each(|(out, &free)| *out = if free { *out } else { 0.0 });
        };
        let mut x = vec![0.0; pools];
        let mut residual: Vec<f64> =
            overload.iter().zip(free).map(|(&over, &free)| if free { over } else { 0.0 }).collect();
        let mut scaled: Vec<f64> = residual.iter().zip(&diagonal).map(|(r, d)| r / d).collect();
        let mut direction = scaled.clone();
        let mut image = vec![0.0; pools];
        let mut energy = dot(&residual, &scaled);
        let enough = 1e-6 * energy;
        for _ in 0..SOLVER_STEPS {
            if energy <= enough {
                break;
            }
            apply(&direction, &mut image);
            let curvature = dot(&direction, &image);
            if curvature <= 0.0 {
                break;
            }
            let along = energy / curvature;
            x.iter_mut().zip(&direction).for_each(|(x, d)| *x += along * d);
            residual.iter_mut().zip(&image).for_each(|(r, i)| *r -= along * i);
            scaled.iter_mut().zip(residual.iter().zip(&diagonal)).for_each(|(s, (r, d))| *s = r / d);
            let next = dot(&residual, &scaled);
            direction.iter_mut().zip(&scaled).for_each(|(d, s)| *d = s + next / energy * *d);
            energy = next;
        }
        x
    }
}

/// `Σ a · b`, in eight sums that are added up last.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum()
}

impl Tally {
    /// What the rows claim, after prices.
    fn claimed(&self) -> f64 {
        self.claimed as f64 / UNIT
    }
}
