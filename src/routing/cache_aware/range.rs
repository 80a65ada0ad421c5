//! The score range of a batch: the unit of the residency bonus.
//!
//! `range of a token = best − worst allowed selection score`, `range of a batch = mean over its tokens`. The mean is taken in
//! integers of the largest range, so neither the order of tokens nor the scale of the scores matters.
//!
//! Knows nothing of bonuses.

use crate::routing::router::RouteRequest;

/// Ranges are counted in this fraction of the largest one.
const PARTS: f64 = (1u64 << 31) as f64;

/// Values looked at side by side.
const LANES: usize = 16;

/// Mean range of the tokens that are not padding; `None` where none has an allowed expert.
pub(super) fn of_batch(request: &RouteRequest<'_>, ranges: &mut Vec<f64>) -> Option<f64> {
    let scores = request.scores();
    ranges.clear();
    let live = (0..scores.tokens()).filter(|&token| !request.is_padding(token));
    ranges.extend(live.filter_map(|token| of_row(scores.selection(token))));
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

/// Best minus worst score above −∞; `None` where all are masked.
fn of_row(row: &[f32]) -> Option<f64> {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut look = |lane: usize, value: f32| {
        let allowed = if value > f32::NEG_INFINITY { value } else { f32::INFINITY };
        low[lane] = if allowed < low[lane] { allowed } else { low[lane] };
        high[lane] = if value > high[lane] { value } else { high[lane] };
    };
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &value) in chunk.iter().enumerate() {
            look(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        look(lane, value);
    }
    let low = low.into_iter().fold(f32::INFINITY, f32::min);
    let high = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (high > f32::NEG_INFINITY).then(|| f64::from(high) - f64::from(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_do_not_count_and_no_size_overflows() {
        let masked = f32::NEG_INFINITY;
        assert_eq!(of_row(&[masked; 40]), None);
        assert_eq!(of_row(&[masked, 0.25, 1.0, masked]), Some(0.75));
        assert_eq!(of_row(&[3.0]), Some(0.0));
        let wide: Vec<f32> = (0..37).map(|value| value as f32).collect();
        assert_eq!(of_row(&wide), Some(36.0));
        assert_eq!(of_row(&[f32::MAX, f32::MIN]), Some(2.0 * f64::from(f32::MAX)));
        assert_eq!(of_row(&[1e-45, 0.0]), Some(f64::from(1e-45f32)));
    }

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
