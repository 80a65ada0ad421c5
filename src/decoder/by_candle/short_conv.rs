//! A gated short convolution (LFM2, arXiv 2511.23404): `out(C ⊙ conv(B ⊙ x))` of `B, C, x = in(hidden)`,
//! `[batch, positions, hidden] → [batch, positions, hidden]`.

use std::sync::Arc;

use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};

use super::kept::Memory;
use super::linear::Linear;
use super::recurrent::{convolve, each_sequence};
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::spec::{self, ModelSpec};

#[derive(Clone, Debug)]
pub(super) struct ShortConv {
    input: Linear,
    /// `[hidden, 1, width]`.
    weight: Tensor,
    bias: Option<Tensor>,
    output: Linear,
}

impl ShortConv {
    pub(super) fn load(
        spec: &ModelSpec,
        conv: spec::ShortConv,
        vb: VarBuilder<'_>,
        engine: &Arc<Engine>,
    ) -> Result<Self> {
        let (hidden, own) = (spec.moe.hidden, vb.pp("conv"));
        let init = Init::Randn { mean: 0.0, stdev: (conv.width as f64).powf(-0.5) };
        Ok(Self {
            input: Linear::load(&vb.pp("in_proj"), [3 * hidden, hidden], conv.bias, engine)?,
            weight: own.get_with_hints((hidden, 1, conv.width), "weight", init)?,
            bias: conv.bias.then(|| own.get_with_hints(hidden, "bias", Init::Const(0.0))).transpose()?,
            output: Linear::load(&vb.pp("out_proj"), [hidden, hidden], conv.bias, engine)?,
        })
    }

    /// `kept` is the state of the sequences before and after; those of a pass that keeps none begin there.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        lengths: &[usize],
        kept: Option<&mut Option<Memory>>,
    ) -> Result<Tensor> {
        let (width, (batch, _, channels)) = (self.weight.dim(2)?, hidden.dims3()?);
        let mut none = None;
        let kept = kept.unwrap_or(&mut none);
        let memory = match kept {
            Some(memory) => memory,
            None => kept.insert(Memory {
                tail: Tensor::zeros((batch, width - 1, channels), hidden.dtype(), hidden.device())?,
                matrices: None,
            }),
        };
        let mixed = each_sequence(hidden, channels, lengths, memory, |hidden, memory| {
            let parts = self.input.forward(hidden)?;
            let part = |at: usize| parts.narrow(2, at * channels, channels);
            let seen = convolve(&(part(0)? * part(2)?)?, &mut memory.tail, &self.weight, self.bias.as_ref())?;
            Ok((part(1)? * seen)?)
        })?;
        memory.detach();
        Ok(self.output.forward(&mixed)?)
    }
}
