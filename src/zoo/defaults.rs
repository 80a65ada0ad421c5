//! What a family means where its `config.json` is silent.

use crate::spec::RopeScaling;

/// How much of a head a family rotates.
#[derive(Clone, Copy)]
pub(super) enum Rotated {
    /// All of it.
    Whole,
    /// The share that `partial_rotary_factor` says, or this one.
    Share(f64),
    /// What latent attention says, under a key of its own.
    Key(&'static str),
}

/// What a family means where its configuration is silent, and how it rotates.
pub(super) struct Defaults {
    pub(super) norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) max_positions: usize,
    /// How much of a head is rotated.
    pub(super) rotated: Rotated,
    /// Positions where nothing is said of them.
    pub(super) scaling: RopeScaling,
    /// Where it stretches positions, which is by LongRoPE alone, what cosines and sines are multiplied by is said.
    pub(super) magnitudes: bool,
}

impl Defaults {
    /// Those of a family that rotates whole heads.
    pub(super) fn new(norm_eps: f64, rope_theta: f64, max_positions: usize) -> Self {
        let (rotated, scaling) = (Rotated::Whole, RopeScaling::None);
        Self { norm_eps, rope_theta, max_positions, rotated, scaling, magnitudes: false }
    }
}
