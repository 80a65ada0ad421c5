//! Grouped-query attention (arXiv 2305.13245) with rotary positions and a key–value cache.
//!
//! `softmax(q·kᵀ / √head_dim + mask)·v`, `[batch, positions, hidden] → [batch, positions, hidden]`, softmax in `f32`. Where
//! heads have sinks the softmax goes over one more score, the sink, whose share goes nowhere.

use std::sync::Arc;

use candle_core::{D, DType, Module, Tensor};
use candle_nn::kv_cache::KvCache;
use candle_nn::ops::{sigmoid, softmax, softmax_last_dim};
use candle_nn::{Init, VarBuilder};

use super::linear::Linear;
use super::norm::RmsNorm;
use super::rotary::Rotary;
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::spec::{AttentionBias, ModelSpec, QkNorm};

#[derive(Clone, Debug)]
pub(super) struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Of queries and keys.
    norms: Option<(RmsNorm, RmsNorm)>,
    /// Queries have as many numbers behind them, head by head, which weigh what the head mixes.
    output_gate: bool,
    /// Each head by itself rather than all of a token together.
    norm_heads: bool,
    clip: Option<f64>,
    /// One for each head.
    sinks: Option<Tensor>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// What products of queries and keys are multiplied by.
    scale: f64,
}

impl Attention {
    pub(super) fn load(spec: &ModelSpec, vb: VarBuilder<'_>, engine: &Arc<Engine>) -> Result<Self> {
        let (hidden, queries, keys) = (spec.moe.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let linear = |name: &str, rows, columns, bias| Linear::load(&vb.pp(name), [rows, columns], bias, engine);
        let norm = |name: &str, width: usize| RmsNorm::load(width, spec, vb.pp(name));
        let [query_norm, key_norm] = spec.names.qk_norms;
        let query_rows = if spec.output_gate { 2 * queries } else { queries };
        let inputs = spec.attention_bias != AttentionBias::None;
        Ok(Self {
            query: linear("q_proj", query_rows, hidden, inputs)?,
            key: linear("k_proj", keys, hidden, inputs)?,
            value: linear("v_proj", keys, hidden, inputs)?,
            output: linear(spec.names.output, hidden, queries, spec.attention_bias == AttentionBias::All)?,
            norms: match spec.qk_norm {
                Some(QkNorm::Whole) => Some((norm(query_norm, queries)?, norm(key_norm, keys)?)),
                Some(QkNorm::PerHead) => Some((norm(query_norm, spec.head_dim)?, norm(key_norm, spec.head_dim)?)),
                None => None,
            },
            output_gate: spec.output_gate,
            norm_heads: spec.qk_norm == Some(QkNorm::PerHead),
            clip: spec.clip_qkv,
            sinks: spec.sinks.then(|| vb.get_with_hints(spec.heads, "sinks", Init::Const(0.0))).transpose()?,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            scale: spec.score_scale(spec.head_dim),
        })
    }

    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        rotary: &Rotary,
        mask: Option<&Tensor>,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let (batch, positions, _) = hidden.dims3()?;
        let (mut query, mut key) = (self.query.forward(hidden)?, self.key.forward(hidden)?);
        let mut value = self.value.forward(hidden)?;
        let gate = match self.output_gate {
            true => {
                let both = query.reshape((batch, positions, self.heads, 2 * self.head_dim))?;
                query = both.narrow(3, 0, self.head_dim)?.flatten_from(2)?;
                Some(sigmoid(&both.narrow(3, self.head_dim, self.head_dim)?.flatten_from(2)?)?)
            }
            false => None,
        };
        if let Some((query_norm, key_norm)) = &self.norms {
            let norm = |norm: &RmsNorm, projected: Tensor, heads: usize| match self.norm_heads {
                true => norm.forward(&projected.reshape((batch, positions, heads, self.head_dim))?),
                false => norm.forward(&projected),
            };
            query = norm(query_norm, query, self.heads)?;
            key = norm(key_norm, key, self.kv_heads)?;
        }
        if let Some(clip) = self.clip {
            (query, key, value) = (query.clamp(-clip, clip)?, key.clamp(-clip, clip)?, value.clamp(-clip, clip)?);
        }
        let split = |projected: Tensor, heads: usize| -> Result<Tensor> {
            Ok(projected.reshape((batch, positions, heads, self.head_dim))?.transpose(1, 2)?)
        };
        let query = rotary.apply(&split(query, self.heads)?)?;
        let mut key = rotary.apply(&split(key, self.kv_heads)?)?;
        let mut value = split(value, self.kv_heads)?.contiguous()?;
        if let Some(cache) = cache {
            (key, value) = cache.append(&key, &value)?;
        }
        let (key, value) = (self.repeat(key)?, self.repeat(value)?);

        let mut mixed = attend(&query, &key, &value, mask, self.scale, self.sinks.as_ref())?;
        if let Some(gate) = gate {
            mixed = (mixed * gate)?;
        }
        Ok(self.output.forward(&mixed)?)
    }

    /// Each key–value head once for every query head of its group.
    fn repeat(&self, heads: Tensor) -> Result<Tensor> {
        let group = self.heads / self.kv_heads;
        if group == 1 {
            return Ok(heads);
        }
        let (batch, kv_heads, positions, head_dim) = heads.dims4()?;
        let wide = heads.unsqueeze(2)?.expand((batch, kv_heads, group, positions, head_dim))?;
        Ok(wide.reshape((batch, self.heads, positions, head_dim))?)
    }
}

/// Scores of all heads that are there at a time, at most: a long prompt in chunks needs memory in proportion to its length alone.
const MOST_SCORES: usize = 1 << 24;

/// `softmax(scale·q·kᵀ + mask)·v` of `[batch, heads, positions, width]`, heads side by side: `[batch, positions, heads · width]`;
/// `sinks` `[heads]` are one more score each.
pub(super) fn attend(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
    sinks: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, heads, positions, _) = query.dims4()?;
    let rows = (MOST_SCORES / (batch * heads * key.dim(2)?).max(1)).max(1);
    if positions <= rows {
        return attend_all(query, key, value, mask, scale, sinks);
    }
    let piece = |start: usize| {
        let rows = rows.min(positions - start);
        let mask = mask.map(|mask| mask.narrow(mask.rank() - 2, start, rows)).transpose()?;
        attend_all(&query.narrow(2, start, rows)?.contiguous()?, key, value, mask.as_ref(), scale, sinks)
    };
    let pieces: Vec<Tensor> = (0..positions).step_by(rows).map(piece).collect::<Result<_>>()?;
    Ok(Tensor::cat(&pieces, 1)?)
}

/// The same for all positions at once.
fn attend_all(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
    sinks: Option<&Tensor>,
) -> Result<Tensor> {
    let scores = (query.matmul(&key.transpose(2, 3)?)? * scale)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    let mut scores = scores.to_dtype(DType::F32)?;
    let seen = scores.dim(D::Minus1)?;
    if let Some(sinks) = sinks {
        let (batch, heads, positions, _) = scores.dims4()?;
        let sinks = sinks.to_dtype(DType::F32)?.reshape((1, heads, 1, 1))?.expand((batch, heads, positions, 1))?;
        scores = Tensor::cat(&[&scores, &sinks], D::Minus1)?.contiguous()?;
    }
    // The fused softmax has no backward pass.
    let mut shares = if scores.track_op() { softmax(&scores, D::Minus1)? } else { softmax_last_dim(&scores)? };
    if sinks.is_some() {
        shares = shares.narrow(D::Minus1, 0, seen)?.contiguous()?;
    }
    Ok(shares.to_dtype(value.dtype())?.matmul(value)?.transpose(1, 2)?.flatten_from(2)?)
}
