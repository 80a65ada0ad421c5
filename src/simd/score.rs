//! Softmax and sigmoid of one row, with an exponential of our own: the same bits on every instruction set.
//!
//! `exp(x) = 2^n · exp(x − n ln 2)`, `n = round(x / ln 2)`, with the polynomial of degree 6 and the split of ln 2 of Cephes'
//! `expf` (Moshier 1989); within 2 units in the last place. Below −87.3, where the result would be denormal, it is 0. Sums
//! run in sixteen lanes that are folded in halves: one order, whatever the vectors' width.

use super::{LANES, Lanes};

/// The least `x` with a normal `exp(x)`.
const LEAST: f32 = -87.33;

/// Adding it rounds to a whole number that then stands in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// Coefficients of `(exp(r) − 1 − r) / r²`, highest power first.
const COEFFICIENTS: [f32; 6] = [1.987_569_2e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `exp(x)` of every lane, for `x ≤ 0` or −∞.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(lanes: L, x: L::Vector) -> L::Vector {
    let normal = lanes.ge(x, lanes.splat(LEAST));
    let x = lanes.max(x, lanes.splat(LEAST));
    let shifted = lanes.add(lanes.mul(x, lanes.splat(std::f32::consts::LOG2_E)), lanes.splat(SHIFT));
    let n = lanes.sub(shifted, lanes.splat(SHIFT));
    // ln 2 in two parts: the first has so few bits that its product with n is exact.
    let r = lanes.sub(x, lanes.mul(n, lanes.splat(0.693_359_4)));
    let r = lanes.sub(r, lanes.mul(n, lanes.splat(-2.121_944_4e-4)));
    let mut sum = lanes.splat(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        sum = lanes.add(lanes.mul(sum, r), lanes.splat(*coefficient));
    }
    let sum = lanes.add(lanes.add(lanes.mul(sum, lanes.mul(r, r)), r), lanes.splat(1.0));
    lanes.blend(normal, lanes.mul(sum, lanes.power_of_two(shifted)), lanes.splat(0.0))
}

/// The largest value of a row; −∞ for none.
#[inline(always)]
pub(crate) fn largest<L: Lanes>(lanes: L, row: &[f32]) -> f32 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut most = lanes.load_part(rest, f32::NEG_INFINITY);
    for values in whole {
        most = lanes.max(most, lanes.load(values));
    }
    lanes.fold_max(most)
}

/// The smallest and the largest value above −∞; `None` where there is none.
#[inline(always)]
pub(crate) fn extremes<L: Lanes>(lanes: L, row: &[f32]) -> Option<(f32, f32)> {
    let masked = lanes.splat(f32::NEG_INFINITY);
    let (whole, rest) = row.as_chunks::<LANES>();
    let last = lanes.load_part(rest, f32::NEG_INFINITY);
    let (mut high, mut low) = (last, lanes.blend(lanes.ge(masked, last), masked, lanes.sub(lanes.splat(0.0), last)));
    for values in whole {
        let values = lanes.load(values);
        high = lanes.max(high, values);
        // The smallest is minus the largest of the negatives.
        let negative = lanes.sub(lanes.splat(0.0), values);
        low = lanes.max(low, lanes.blend(lanes.ge(masked, values), masked, negative));
    }
    let high = lanes.fold_max(high);
    (high > f32::NEG_INFINITY).then(|| (-lanes.fold_max(low), high))
}

/// `scores = exp(logits − max) / Σ exp(logits − max)`; −∞ gives 0, and so does a row of nothing else.
#[inline(always)]
pub(crate) fn softmax<L: Lanes>(lanes: L, logits: &[f32], scores: &mut [f32]) {
    let most = largest(lanes, logits);
    if most == f32::NEG_INFINITY {
        return scores.fill(0.0);
    }
    let most = lanes.splat(most);
    let (whole, rest) = logits.as_chunks::<LANES>();
    let (into, into_rest) = scores.as_chunks_mut::<LANES>();
    let mut sum = lanes.splat(0.0);
    for (logits, scores) in whole.iter().zip(into.iter_mut()) {
        let power = exp(lanes, lanes.sub(lanes.load(logits), most));
        sum = lanes.add(sum, power);
        lanes.store(power, scores);
    }
    let last = match rest {
        [] => lanes.splat(0.0),
        rest => exp(lanes, lanes.sub(lanes.load_part(rest, f32::NEG_INFINITY), most)),
    };
    let share = lanes.splat(1.0 / lanes.fold_sum(lanes.add(sum, last)));
    for scores in into {
        lanes.store(lanes.mul(lanes.load(scores), share), scores);
    }
    if !into_rest.is_empty() {
        lanes.store_part(lanes.mul(last, share), into_rest);
    }
}

/// `scores = 1 / (1 + exp(−logits))`; −∞ gives 0.
#[inline(always)]
pub(crate) fn sigmoid<L: Lanes>(lanes: L, logits: &[f32], scores: &mut [f32]) {
    let (whole, rest) = logits.as_chunks::<LANES>();
    let (into, into_rest) = scores.as_chunks_mut::<LANES>();
    for (logits, scores) in whole.iter().zip(into) {
        lanes.store(logistic(lanes, lanes.load(logits)), scores);
    }
    if !rest.is_empty() {
        lanes.store_part(logistic(lanes, lanes.load_part(rest, f32::NEG_INFINITY)), into_rest);
    }
}

/// `1 / (1 + exp(−x))` of every lane, by the exponential of `−|x|`.
#[inline(always)]
pub(crate) fn logistic<L: Lanes>(lanes: L, x: L::Vector) -> L::Vector {
    let (zero, one) = (lanes.splat(0.0), lanes.splat(1.0));
    let power = exp(lanes, lanes.sub(zero, lanes.max(x, lanes.sub(zero, x))));
    lanes.div(lanes.blend(lanes.ge(x, zero), one, power), lanes.add(one, power))
}

/// True when no value is NaN or +∞.
#[inline(always)]
pub(crate) fn all_allowed<L: Lanes>(lanes: L, values: &[f32]) -> bool {
    let (whole, rest) = values.as_chunks::<LANES>();
    let most = lanes.splat(f32::MAX);
    let mut within = lanes.ge(most, lanes.load_part(rest, 0.0));
    for values in whole {
        within &= lanes.ge(most, lanes.load(values));
    }
    within == u16::MAX
}

/// True when some value is −∞.
#[inline(always)]
pub(crate) fn any_masked<L: Lanes>(lanes: L, values: &[f32]) -> bool {
    let (whole, rest) = values.as_chunks::<LANES>();
    let least = lanes.splat(f32::NEG_INFINITY);
    let mut masked = lanes.ge(least, lanes.load_part(rest, 0.0));
    for values in whole {
        masked |= lanes.ge(least, lanes.load(values));
    }
    masked != 0
}
