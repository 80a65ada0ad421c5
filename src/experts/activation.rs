//! What stands between an expert's projections: `a = act(gate)·up` in a gated FFN, `a = act(up)` in one without a gate.
//!
//! The scalar definition; tensor operations and vector kernels are checked against it. Knows nothing of weights.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// An activation, and whether the expert has a gate projection.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Activation {
    /// The function.
    pub function: Function,
    /// `act(gate)·up` where true, `act(up)` where false.
    pub gated: bool,
}

/// The function of an [`Activation`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Function {
    /// `x·σ(x)`.
    Silu,
    /// `x·½(1 + erf(x/√2))`.
    Gelu,
    /// `x·½(1 + tanh(√(2/π)·(x + 0.044715·x³)))`, the approximation of [`Function::Gelu`] that some models were trained with.
    GeluTanh,
    /// `max(x, 0)²` (arXiv 2109.08668).
    ReluSquared,
    /// gpt-oss: `(u + 1)·g·σ(alpha·g)` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`.
    ClampedSilu {
        /// Steepness of the sigmoid; gpt-oss has 1.702.
        alpha: f32,
        /// Where gate and up projection are cut off; gpt-oss has 7.
        limit: f32,
    },
}

impl Default for Activation {
    fn default() -> Self {
        Self::swiglu()
    }
}

impl Activation {
    /// `silu(gate)·up` (arXiv 2002.05202).
    pub const fn swiglu() -> Self {
        Self { function: Function::Silu, gated: true }
    }

    /// The activation of gpt-oss; its models have `alpha` 1.702 and `limit` 7.
    pub(crate) const fn clamped_swiglu(alpha: f32, limit: f32) -> Self {
        Self { function: Function::ClampedSilu { alpha, limit }, gated: true }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a clamped activation without a gate, an alpha that is not finite or a limit that is not
    /// positive and finite.
    pub(crate) fn check(self) -> Result<()> {
        let Function::ClampedSilu { alpha, limit } = self.function else { return Ok(()) };
        if !self.gated {
            return Err(Error::parameter(
                "clamped activation",
                "without a gate projection",
                "one with a gate projection",
            ));
        }
        if !alpha.is_finite() {
            return Err(Error::parameter("activation alpha", alpha, "a finite number"));
        }
        if !(limit.is_finite() && limit > 0.0) {
            return Err(Error::parameter("activation limit", limit, "a positive finite number"));
        }
        Ok(())
    }

    /// The activation of one element; `gate` counts only where there is one. NaN stays NaN.
    pub(crate) fn apply(self, gate: f32, up: f32) -> f32 {
        match (self.gated, self.function) {
            (false, function) => function.of(up),
            (true, Function::ClampedSilu { limit, .. }) => self.function.of(gate) * (clamp(up, -limit, limit) + 1.0),
            (true, function) => function.of(gate) * up,
        }
    }
}

impl Function {
    fn of(self, x: f32) -> f32 {
        match self {
            Self::Silu => x * sigmoid(x),
            Self::Gelu => 0.5 * x * (1.0 + libm::erff(x * FRAC_1_SQRT_2)),
            Self::GeluTanh => 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * x * (1.0 + 0.044715 * x * x)).tanh()),
            Self::ReluSquared => match x < 0.0 {
                true => 0.0,
                false => x * x,
            },
            Self::ClampedSilu { alpha, limit } => {
                let gate = clamp(x, f32::NEG_INFINITY, limit);
                gate * sigmoid(alpha * gate)
            }
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// As `f32::clamp`, but total: the bounds may not have been checked.
fn clamp(x: f32, least: f32, most: f32) -> f32 {
    match x {
        x if x > most => most,
        x if x < least => least,
        x => x,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Activation; 5] = [
        Activation::swiglu(),
        Activation { function: Function::Gelu, gated: true },
        Activation { function: Function::GeluTanh, gated: true },
        Activation { function: Function::ReluSquared, gated: false },
        Activation::clamped_swiglu(1.702, 7.0),
    ];

    #[test]
    fn values_are_those_of_the_published_formulas() {
        // The formulas in double precision, from Python's math module: gate 1.5, up -2.
        let expected = [-2.452_723_4, -2.799_578_4, -2.799_143_2, 0.0, -1.391_662_2];
        for (kind, expected) in KINDS.into_iter().zip(expected) {
            let got = kind.apply(1.5, -2.0);
            assert!((got - expected).abs() < 1e-5, "{kind:?}: {got}, expected {expected}");
        }
        assert_eq!(Activation::clamped_swiglu(0.0, 2.0).apply(9.0, 5.0), 3.0);
        assert_eq!(Activation::clamped_swiglu(0.0, 2.0).apply(-6.0, -5.0), 3.0);
    }

    #[test]
    fn far_from_zero_nothing_overflows_and_nan_stays() {
        for kind in KINDS {
            assert!(kind.apply(-200.0, 1.0).is_finite() && kind.apply(200.0, 200.0).is_finite(), "{kind:?}");
            assert!(kind.apply(f32::NAN, f32::NAN).is_nan(), "{kind:?}");
        }
    }

    #[test]
    fn parameters_that_cannot_be_are_named() {
        let error = |activation: Activation| activation.check().unwrap_err().to_string();
        let bare = Activation { gated: false, ..Activation::clamped_swiglu(1.702, 7.0) };
        assert_eq!(error(bare), "clamped activation is without a gate projection: expected one with a gate projection");
        let infinite = error(Activation::clamped_swiglu(f32::INFINITY, 7.0));
        assert_eq!(infinite, "activation alpha is inf: expected a finite number");
        for limit in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = error(Activation::clamped_swiglu(1.702, limit));
            assert_eq!(error, format!("activation limit is {limit}: expected a positive finite number"));
        }
        assert!(KINDS.iter().all(|kind| kind.check().is_ok()) && Activation::default() == Activation::swiglu());
    }
}
