//! A total in proportion to weights, in whole numbers: slots to pools, experts to devices.

use crate::error::{Error, Result};

/// Speeds divided by the fastest, so that no sum of them overflows.
pub(super) fn relative(speeds: &[f64]) -> Result<Vec<f64>> {
    if let Some(bad) = speeds.iter().find(|speed| !(speed.is_finite() && **speed > 0.0)) {
        return Err(Error::parameter("device speed", bad, "a positive finite number"));
    }
    let fastest = speeds.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    Ok(speeds.iter().map(|speed| speed / fastest).collect())
}

/// Splits `total` in proportion to `weights` into integers that sum to it (Hamilton's method; ties to the lower index).
pub(super) fn largest_remainder(weights: &[f64], total: u64) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    if weights.is_empty() || sum <= 0.0 {
        return vec![0; weights.len()];
    }
    let quotas: Vec<f64> = weights.iter().map(|weight| weight / sum * total as f64).collect();
    let mut shares: Vec<u64> = quotas.iter().map(|quota| quota.floor() as u64).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let remainder = |index: usize| quotas[index] - quotas[index].floor();
    // Equal weights may differ in the last bit of their remainders: compare with slack so that ties go by index.
    order.sort_by(|&a, &b| ((remainder(b) * 1e9).round().total_cmp(&(remainder(a) * 1e9).round())).then(a.cmp(&b)));
    let left = total.saturating_sub(shares.iter().sum());
    for &index in order.iter().cycle().take(left as usize) {
        shares[index] += 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_sum_to_the_total(weights in prop::collection::vec(0.01f64..10.0, 1..50), total in 0u64..100_000) {
            let shares = largest_remainder(&weights, total);
            prop_assert_eq!(shares.iter().sum::<u64>(), total);
            let sum: f64 = weights.iter().sum();
            for (share, weight) in shares.iter().zip(&weights) {
                prop_assert!((*share as f64 - weight / sum * total as f64).abs() < 1.0 + 1e-6);
            }
        }
    }
}
