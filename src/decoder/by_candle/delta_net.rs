//! A gated delta net (arXiv 2412.06464, as Qwen3-Next has it): of each position a query, a key and a value for each head, after a
//! convolution over the last few positions; a matrix `S` for each head that they write to and read from,
//!
//! `S ← α·S + k·(β·(v − α·Sᵀk))ᵀ`, `o = Sᵀq`,
//!
//! with `α = exp(−exp(A)·softplus(a + dt))` and `β = σ(b)` from the hidden state, queries and keys of length 1. What comes out is normed by
//! head and weighed by `silu(z)`. `[batch, positions, hidden] → [batch, positions, hidden]`, the recurrence in `f32`, position by position:
//! the definition of what the engine does some positions at a time.

use std::sync::Arc;

use candle_core::{D, DType, Module, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::{Init, VarBuilder};

use super::kept::Memory;
use super::linear::Linear;
use super::norm::RmsNorm;
use super::recurrent::{convolve, each_sequence};
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::spec::{self, ModelSpec};

#[derive(Clone, Debug)]
pub(super) struct DeltaNet {
    input: Input,
    /// `[channels, 1, width]`.
    conv: Tensor,
    /// `[value heads]`: the logarithm of how fast each head forgets.
    decay: Tensor,
    /// `[value heads]`, added to what it forgets by.
    step: Tensor,
    norm: RmsNorm,
    output: Linear,
    sizes: spec::DeltaNet,
}

/// How queries, keys and values come from the hidden state.
#[derive(Clone, Debug)]
enum Input {
    /// Queries, keys and values; gates of the output; `b`; `a`.
    Apart([Linear; 4]),
    /// The first two and the last two together, by key head.
    Fused([Linear; 2]),
}

/// What keeps the length of a query or key from being 0.
pub(in crate::decoder) const LENGTH_EPS: f64 = 1e-6;

impl DeltaNet {
    pub(super) fn load(
        spec: &ModelSpec,
        sizes: spec::DeltaNet,
        vb: VarBuilder<'_>,
        engine: &Arc<Engine>,
    ) -> Result<Self> {
        let (hidden, values, heads) = (spec.moe.hidden, sizes.values(), sizes.value_heads);
        let linear = |name: &str, rows: usize| Linear::load(&vb.pp(name), [rows, hidden], false, engine);
        let init = Init::Randn { mean: 0.0, stdev: (sizes.conv_width as f64).powf(-0.5) };
        Ok(Self {
            input: match sizes.fused {
                true => {
                    Input::Fused([linear("in_proj_qkvz", sizes.channels() + values)?, linear("in_proj_ba", 2 * heads)?])
                }
                false => Input::Apart([
                    linear("in_proj_qkv", sizes.channels())?,
                    linear("in_proj_z", values)?,
                    linear("in_proj_b", heads)?,
                    linear("in_proj_a", heads)?,
                ]),
            },
            conv: vb.pp("conv1d").get_with_hints((sizes.channels(), 1, sizes.conv_width), "weight", init)?,
            // Heads that forget at many speeds, as they are begun with.
            decay: vb.get_with_hints(heads, "A_log", Init::Uniform { lo: -4.0, up: 2.7 })?,
            step: vb.get_with_hints(heads, "dt_bias", Init::Const(1.0))?,
            norm: RmsNorm::plain(sizes.value_width, spec.norm_eps, vb.pp("norm"))?,
            output: Linear::load(&vb.pp("out_proj"), [hidden, values], false, engine)?,
            sizes,
        })
    }

    /// `kept` is the state of the sequences before and after; those of a pass that keeps none begin there.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        lengths: &[usize],
        kept: Option<&mut Option<Memory>>,
    ) -> Result<Tensor> {
        let (batch, sizes, device) = (hidden.dim(0)?, self.sizes, hidden.device());
        let mut none = None;
        let kept = kept.unwrap_or(&mut none);
        let memory = match kept {
            Some(memory) => memory,
            None => {
                let matrices = (batch, sizes.value_heads, sizes.key_width, sizes.value_width);
                kept.insert(Memory {
                    tail: Tensor::zeros((batch, sizes.conv_width - 1, sizes.channels()), hidden.dtype(), device)?,
                    matrices: Some(Tensor::zeros(matrices, DType::F32, device)?),
                })
            }
        };
        let mixed = each_sequence(hidden, sizes.values(), lengths, memory, |hidden, memory| self.mix(hidden, memory))?;
        memory.detach();
        Ok(self.output.forward(&mixed)?)
    }

    /// Queries, keys and values `[batch, positions, channels]`, gates of the output `[.., values]`, `b` and `a` `[.., value heads]`.
    fn inputs(&self, hidden: &Tensor) -> Result<[Tensor; 4]> {
        let spec::DeltaNet { key_heads, value_heads, key_width, value_width, .. } = self.sizes;
        match &self.input {
            Input::Apart([mixed, gate, b, a]) => {
                Ok([mixed.forward(hidden)?, gate.forward(hidden)?, b.forward(hidden)?, a.forward(hidden)?])
            }
            Input::Fused([mixed, small]) => {
                let (batch, positions, _) = hidden.dims3()?;
                let (mixed, small) = (mixed.forward(hidden)?, small.forward(hidden)?);
                let by_head = |all: &Tensor| all.reshape((batch, positions, key_heads, ()));
                let (mixed, small) = (by_head(&mixed)?, by_head(&small)?);
                let (each, values) = (value_heads / key_heads, value_heads / key_heads * value_width);
                let part = |all: &Tensor, first: usize, width: usize| all.narrow(3, first, width)?.flatten_from(2);
                let queries = part(&mixed, 0, key_width)?;
                let keys = part(&mixed, key_width, key_width)?;
                let of_values = part(&mixed, 2 * key_width, values)?;
                let gate = part(&mixed, 2 * key_width + values, values)?;
                let mixed = Tensor::cat(&[&queries, &keys, &of_values], 2)?.contiguous()?;
                Ok([mixed, gate, part(&small, 0, each)?, part(&small, each, each)?])
            }
        }
    }

    /// What is mixed of `[batch, positions, hidden]`, `[batch, positions, values]`.
    fn mix(&self, hidden: &Tensor, memory: &mut Memory) -> Result<Tensor> {
        let (batch, positions, _) = hidden.dims3()?;
        let sizes = self.sizes;
        let [mixed, gate, b, a] = self.inputs(hidden)?;
        let mixed = convolve(&mixed, &mut memory.tail, &self.conv, None)?.silu()?.to_dtype(DType::F32)?;
        let heads = |first: usize, heads: usize, width: usize| -> Result<Tensor> {
            let part = mixed.narrow(2, first, heads * width)?.reshape((batch, positions, heads, width))?;
            Ok(part.transpose(1, 2)?.contiguous()?)
        };
        let query = self.of_value_heads(&unit(&heads(0, sizes.key_heads, sizes.key_width)?)?)?;
        let key = self.of_value_heads(&unit(&heads(sizes.keys(), sizes.key_heads, sizes.key_width)?)?)?;
        let value = heads(2 * sizes.keys(), sizes.value_heads, sizes.value_width)?;
        let query = (query * (sizes.key_width as f64).powf(-0.5))?;

        // `[batch, heads, positions, 1]`.
        let by_head = |all: &Tensor| -> Result<Tensor> { Ok(all.transpose(1, 2)?.contiguous()?.unsqueeze(3)?) };
        let slowness = softplus(&a.to_dtype(DType::F32)?.broadcast_add(&self.step.to_dtype(DType::F32)?)?)?;
        let decay = slowness.broadcast_mul(&self.decay.to_dtype(DType::F32)?.exp()?)?.neg()?.exp()?;
        let (decay, strength) = (by_head(&decay)?, by_head(&sigmoid(&b)?.to_dtype(DType::F32)?)?);
        let mut matrices = match memory.matrices.take() {
            Some(matrices) => matrices,
            None => return Err(crate::error::Error::shape("state of a delta net", "matrices", "none")),
        };
        let mut outputs = Vec::with_capacity(positions);
        for at in 0..positions {
            let now = |all: &Tensor| all.narrow(2, at, 1)?.contiguous();
            let (query, key, value) = (now(&query)?, now(&key)?, now(&value)?);
            matrices = matrices.broadcast_mul(&now(&decay)?)?;
            let off = (value - key.matmul(&matrices)?)?.broadcast_mul(&now(&strength)?)?;
            matrices = (matrices + key.transpose(2, 3)?.contiguous()?.matmul(&off)?)?;
            outputs.push(query.matmul(&matrices)?);
        }
        memory.matrices = Some(matrices);
        let output = Tensor::cat(&outputs, 2)?.transpose(1, 2)?.contiguous()?.to_dtype(hidden.dtype())?;
        let normed = self.norm.forward(&output)?;
        let gate =
            gate.contiguous()?.reshape(normed.shape())?.to_dtype(DType::F32)?.silu()?.to_dtype(hidden.dtype())?;
        Ok((normed * gate)?.flatten_from(2)?)
    }

    /// Each key head, `[batch, key heads, positions, width]`, for every value head that it is the one of.
    fn of_value_heads(&self, heads: &Tensor) -> Result<Tensor> {
        let sizes = self.sizes;
        if sizes.key_heads == sizes.value_heads {
            return Ok(heads.clone());
        }
        let of: Vec<u32> = (0..sizes.value_heads).map(|head| sizes.key_head(head) as u32).collect();
        Ok(heads.index_select(&Tensor::new(of, heads.device())?, 1)?)
    }
}

/// Vectors of length 1, along the last dimension.
fn unit(vectors: &Tensor) -> Result<Tensor> {
    let length = (vectors.sqr()?.sum_keepdim(D::Minus1)? + LENGTH_EPS)?.sqrt()?;
    Ok(vectors.broadcast_div(&length)?)
}

/// `ln(1 + exp(x))`, without an overflow.
fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?)
}
