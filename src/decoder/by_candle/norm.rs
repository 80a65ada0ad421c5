//! RMS norm (arXiv 1910.07467): `x / sqrt(mean(x²) + ε) ⊙ weight`, statistics in `f32`; and layer norm (arXiv 1607.06450), which
//! takes the mean away first and adds a bias. Some models store an RMS norm's weight as what it differs from 1 by.

use candle_core::{DType, Module, Tensor};
use candle_nn::ops::{layer_norm, layer_norm_slow, rms_norm, rms_norm_slow};
use candle_nn::{Init, VarBuilder};

use crate::error::Result;
use crate::spec::{self, ModelSpec};

#[derive(Clone, Debug)]
pub(super) struct RmsNorm {
    /// To which one is added where it is `from_one`.
    weight: Tensor,
    from_one: bool,
    eps: f32,
}

impl RmsNorm {
    /// Of the kind that the model's norms are, where they are RMS norms.
    pub(super) fn load(width: usize, spec: &ModelSpec, vb: VarBuilder<'_>) -> Result<Self> {
        Self::of(width, spec.norm_eps, spec.norm == spec::Norm::RmsFromOne, vb)
    }

    /// Its weight as it is stored.
    pub(super) fn plain(width: usize, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        Self::of(width, eps, false, vb)
    }

    fn of(width: usize, eps: f64, from_one: bool, vb: VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", Init::Const(if from_one { 0.0 } else { 1.0 }))?;
        // Half as many bits would round what it differs from 1 by: the sum is taken in `f32`, and so is the norm. Variables change while they are
        // trained: one is added each time.
        match from_one && !weight.track_op() {
            true => Ok(Self { weight: (weight.to_dtype(DType::F32)? + 1.0)?, from_one: false, eps: eps as f32 }),
            false => Ok(Self { weight, from_one, eps: eps as f32 }),
        }
    }
}

impl Module for RmsNorm {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        let from_one = self.from_one.then(|| self.weight.to_dtype(DType::F32)? + 1.0).transpose()?;
        let weight = from_one.as_ref().unwrap_or(&self.weight);
        let wide = hidden.to_dtype(weight.dtype())?;
        // Candle's fused norm has no backward pass and would drop the gradient without a word.
        let normed = match wide.track_op() || weight.track_op() {
            true => rms_norm_slow(&wide, weight, self.eps)?,
            false => rms_norm(&wide.contiguous()?, weight, self.eps)?,
        };
        normed.to_dtype(hidden.dtype())
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
            spec::Norm::Rms | spec::Norm::RmsFromOne => Self::Rms(RmsNorm::load(hidden, spec, vb)?),
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
