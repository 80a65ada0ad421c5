//! The certificate: an upper bound on the gate mass of any assignment, from any prices.
//!
//! `bound = Σ_tokens (sum of the top_k largest max(0, gate − price)) + Σ_pools price · limit`. For any prices ≥ 0 no
//! assignment within the limits, with at most `top_k` experts a token, has more gate mass (weak duality of the transport
//! problem; a dropped slot counts 0). The bound is in gate scores even where a model selects by something else.
//!
//! Knows nothing of how the prices were found.

use super::problem::UNIT;
use crate::error::{Error, Result};
use crate::routing::router::RouteRequest;
use crate::routing::select::{Hint, Selector};
use crate::routing::slots::EMPTY;

/// A value after a price is rounded to `f32` once, by at most one part in 2^24 of itself.
const ROUNDING: f64 = 1.0 + 1.0 / (1u64 << 23) as f64;

/// Upper bound on the gate mass of any assignment for `request`, from `prices` (one per expert or device, ≥ 0).
///
/// No prices at all (an empty slice) stand for zeros: the bound is then the gate mass of unconstrained top-k by gate score.
///
/// # Errors
/// [`Error::Shape`] when there is neither one price per pool nor none, [`Error::Parameter`] for a price that is negative
/// or not finite.
pub fn gate_mass_bound(request: &RouteRequest<'_>, prices: &[f32]) -> Result<f64> {
    let limits = request.capacity().limits().unwrap_or_default();
    if !prices.is_empty() && prices.len() != limits.len() {
        return Err(Error::shape(
            "prices",
            format!("{} pools or none", limits.len()),
            format!("{} values", prices.len()),
        ));
    }
    if let Some(bad) = prices.iter().find(|price| !(price.is_finite() && **price >= 0.0)) {
        return Err(Error::parameter("price", bad, "a finite number, at least 0"));
    }
    let (scores, capacity) = (request.scores(), request.capacity());
    let experts = 0..scores.experts() as u16;
    let price: Vec<f32> = match prices {
        [] => vec![0.0; scores.experts()],
        prices => experts.map(|expert| prices[capacity.pool_of(expert)]).collect(),
    };
    let mut selector = Selector::new(price.len(), request.top_k());
    let mut row = vec![0.0; price.len()];
    let (mut hint, mut positive) = (Hint::NONE, 0i128);
    for token in (0..scores.tokens()).filter(|&token| !request.is_padding(token)) {
        for (row, (&gate, &selection)) in row.iter_mut().zip(scores.gate(token).iter().zip(scores.selection(token))) {
            *row = if selection == f32::NEG_INFINITY { f32::NEG_INFINITY } else { gate };
        }
        selector.select(&row, Some(&price), hint);
        hint = selector.hint();
        let best: f64 = selector.values().iter().map(|&value| f64::from(value.max(0.0))).sum();
        positive += i128::from((best * UNIT).ceil() as i64);
    }
    Ok(bound(positive, prices, limits))
}

/// The bound from the sum of what tokens would claim (in [`UNIT`]s, rounded up), the prices and the limits.
pub(super) fn bound(positive: i128, prices: &[f32], limits: &[u32]) -> f64 {
    let paid: f64 = prices.iter().zip(limits).map(|(&price, &limit)| f64::from(price) * f64::from(limit)).sum();
    let claimed = positive as f64 / UNIT;
    if paid > 0.0 || prices.iter().any(|&price| price > 0.0) {
        claimed * ROUNDING + paid * (1.0 + 1e-12)
    } else {
        claimed
    }
}

/// Gate mass of a selection, in [`UNIT`]s rounded down: the order of the rows does not matter.
pub(super) fn kept_mass<'s>(rows: impl Iterator<Item = (&'s [f32], &'s [u16], &'s [bool])>) -> i128 {
    rows.map(|(gate, chosen, kept)| {
        let held = chosen.iter().zip(kept).filter(|(expert, kept)| **kept && **expert != EMPTY);
        let mut mass: i128 = 0;
        for (&expert, _) in held {
            // Selection scores come here too: one too large for the unit counts as the largest there is.
            mass += i128::from((f64::from(gate[usize::from(expert)]) * UNIT) as i64);
        }
        mass
    })
    .sum()
}
