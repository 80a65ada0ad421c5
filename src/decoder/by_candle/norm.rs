//! RMS norm (arXiv 1910.07467): `x / sqrt(mean(x²) + ε) ⊙ weight`, statistics in `f32`; and layer norm (arXiv 1607.06450), which
//! takes the mean away first and adds a bias.

use candle_core::{Module, Tensor};
use candle_nn::ops::{layer_norm, layer_norm_slow, rms_norm, rms_norm_slow};
use candle_nn::{Init, VarBuilder};

use crate::error::Result;
use crate::spec::{self, ModelSpec};

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

/// A norm of the hidden state, whichever the model has.
#[derive(Clone, Debug)]
pub(super) enum Norm {
    Rms(RmsNorm),
    Layer { weight: Tensor, bias: Tensor, eps: f32 },
}

impl Norm {
    pub(super) fn load(spec: &ModelSpec, vb: VarBuilder<'_>) -> Result<Self> {
        let (hidden, eps) = (spec.moe.hidden, spec.norm_eps);
        Ok(match spec.norm {
            spec::Norm::Rms => Self::Rms(RmsNorm::load(hidden, eps, vb)?),
            spec::Norm::Layer => Self::Layer {
                weight: vb.get_with_hints(hidden, "weight", Init::Const(1.0))?,
                bias: vb.get_with_hints(hidden, "bias", Init::Const(0.0))?,
                eps: eps as f32,
            },
        })
    }
}

impl Module for Norm {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Rms(norm) => norm.forward(hidden),
            // As above.
            Self::Layer { weight, bias, eps } if [hidden, weight, bias].iter().any(|tensor| tensor.track_op()) => {
                layer_norm_slow(hidden, weight, bias, *eps)
            }
            Self::Layer { weight, bias, eps } => layer_norm(&hidden.contiguous()?, weight, bias, *eps),
        }
    }
}
