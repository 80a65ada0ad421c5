//! RMS norm (arXiv 1910.07467): `x / sqrt(mean(x²) + ε) ⊙ weight`, statistics in `f32`.

use candle_core::{Module, Tensor};
use candle_nn::ops::{rms_norm, rms_norm_slow};
use candle_nn::{Init, VarBuilder};

use crate::error::Result;

#[derive(Clone, Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(super) fn load(width: usize, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints(width, "weight", Init::Const(1.0))?, eps: eps as f32 })
    }
}

impl Module for RmsNorm {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        // Candle's fused norm has no backward pass and would drop the gradient without a word.
        if hidden.track_op() || self.weight.track_op() {
            rms_norm_slow(hidden, &self.weight, self.eps)
        } else {
            rms_norm(&hidden.contiguous()?, &self.weight, self.eps)
        }
    }
}
