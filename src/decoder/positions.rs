//! What positions do to queries and keys: how fast each pair of a head's numbers turns (arXiv 2104.09864), and what scores are scaled by.

use crate::spec::ModelSpec;

/// Radians for a position of each of `rotary_dim / 2` pairs.
pub(super) fn rates(spec: &ModelSpec) -> Vec<f32> {
    let slowing = spec.rope_scaling.slowing(spec.rope_theta, spec.rotary_dim);
    let rate = |(pair, slowed): (usize, f64)| {
        slowed as f32 / (spec.rope_theta as f32).powf((2 * pair) as f32 / spec.rotary_dim as f32)
    };
    slowing.into_iter().enumerate().map(rate).collect()
}

/// What products of queries and keys of `width` are multiplied by.
pub(super) fn score_scale(spec: &ModelSpec, width: usize) -> f64 {
    let usual = spec.multipliers.attention.unwrap_or((width as f64).powf(-0.5));
    usual * spec.rope_scaling.score_scale()
}
