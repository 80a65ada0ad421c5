//! The phase kernel as published: blind to the gate, kept as the reference point.
//!
//! | file | what it is |
//! |---|---|
//! | `ring` | [`phase_ring`]: n tokens against n columns on a ring, bit for bit |
//! | `draws` | its random draws |
//! | `banded` | its form for many tokens and few experts, and the router made of it: [`PhaseKernel`] |
//!
//! Knows nothing of prices or limits: the phase router and the quota are [`super::phase`] and [`super::quota`].

mod banded;
mod draws;
mod ring;

pub use banded::PhaseKernel;
pub use draws::permutations;
pub use ring::{PhaseSide, phase_ring};
