//! The score range of a batch: the unit of the residency bonus.
//!
//! `range of a token = best − worst allowed selection score`, `range of a batch = mean over its tokens`. The mean is taken in
//! integers of the largest range, so neither the order of tokens nor the scale of the scores matters.
//!
//! Knows nothing of bonuses.

use crate::routing::router::RouteRequest;
use crate::simd::score::extremes;
use crate::simd::{Isa, Kernel, Lanes};

/// Ranges are counted in this fraction of the largest one.
const PARTS: f64 = (1u64 << 31) as f64;

/// Mean range of the tokens that are not padding; `None` where none has an allowed expert.
pub(super) fn of_batch(request: &RouteRequest<'_>, isa: Isa, ranges: &mut Vec<f64>) -> Option<f64> {
    ranges.clear();
    isa.run(Ranges { request, ranges });
    mean(ranges)
}

fn mean(ranges: &[f64]) -> Option<f64> {
    let largest = ranges.iter().copied().fold(0.0, f64::max);
    if ranges.len() < 2 || largest == 0.0 {
        return ranges.first().copied();
    }
    let parts: u64 = ranges.iter().map(|range| (range / largest * PARTS).round() as u64).sum();
    Some(parts as f64 / (PARTS * ranges.len() as f64) * largest)
}

/// The ranges of all tokens that are not padding.
struct Ranges<'a, 'r> {
    request: &'a RouteRequest<'r>,
    ranges: &'a mut Vec<f64>,
}

impl Kernel for Ranges<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let scores = self.request.scores();
        for token in 0..scores.tokens() {
            if !self.request.is_padding(token)
                && let Some((low, high)) = extremes(lanes, scores.selection(token))
            {
                self.ranges.push(f64::from(high) - f64::from(low));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_has_no_order_and_no_scale() {
        assert_eq!(mean(&[]), None);
        assert_eq!(mean(&[0.0, 0.0]), Some(0.0));
        let ranges = [0.1, 1e-3, 0.7, 0.3, 0.333];
        let expected = ranges.iter().sum::<f64>() / 5.0;
        let value = mean(&ranges).unwrap();
        assert!((value / expected - 1.0).abs() < 1e-8);
        let mut turned = ranges;
        turned.reverse();
        assert_eq!(mean(&turned), Some(value));
        for scale in [2f64.powi(-140), 2f64.powi(120)] {
            assert_eq!(mean(&ranges.map(|range| range * scale)), Some(value * scale));
        }
    }
}
