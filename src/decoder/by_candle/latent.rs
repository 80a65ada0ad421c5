//! Latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one narrow vector per position.
//!
//! `[latent ‖ rotated key] = kv_a·x`, `[keys ‖ values] = kv_b·norm(latent)` per head; each head's key is its own part and the
//! rotated part that all heads share. `[batch, positions, hidden] → [batch, positions, hidden]`. What is kept from one forward pass to the next is
//! latent and rotated key alone, so few numbers per position. Of many new positions keys and values are made of them anew; a single one
//! takes `kv_b` into its query and out of its mix of latents instead, which is the same sum in another order (section 2.1.2 there), so
//! that a step costs nothing per head and position but two products of the latent's width.

use std::sync::Arc;

use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;
use candle_nn::kv_cache::KvCache;

use super::attention::attend;
use super::linear::Linear;
use super::norm::RmsNorm;
use super::rotary::Rotary;
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::spec::{LatentSpec, ModelSpec};

#[derive(Clone, Debug)]
pub(super) struct LatentAttention {
    query: Query,
    kv_down: Linear,
    kv_norm: RmsNorm,
    kv_up: Linear,
    output: Linear,
    sizes: LatentSpec,
    heads: usize,
    /// What products of queries and keys are multiplied by.
    scale: f64,
}

#[derive(Clone, Debug)]
enum Query {
    Direct(Linear),
    /// Through a narrow vector of their own.
    Narrow(Linear, RmsNorm, Linear),
}

impl LatentAttention {
    pub(super) fn load(spec: &ModelSpec, sizes: LatentSpec, vb: VarBuilder<'_>, engine: &Arc<Engine>) -> Result<Self> {
        let (hidden, heads) = (spec.moe.hidden, spec.heads);
        let (rotated, queries) = (spec.rotary_dim, heads * (sizes.key_width + spec.rotary_dim));
        let linear =
            |name: &str, rows: usize, columns: usize| Linear::load(&vb.pp(name), [rows, columns], false, engine);
        let query = match sizes.query_rank {
            None => Query::Direct(linear("q_proj", queries, hidden)?),
            Some(rank) => Query::Narrow(
                linear("q_a_proj", rank, hidden)?,
                RmsNorm::plain(rank, LatentSpec::NORM_EPS, vb.pp("q_a_layernorm"))?,
                linear("q_b_proj", queries, rank)?,
            ),
        };
        Ok(Self {
            query,
            kv_down: linear("kv_a_proj_with_mqa", sizes.kv_rank + rotated, hidden)?,
            kv_norm: RmsNorm::plain(sizes.kv_rank, LatentSpec::NORM_EPS, vb.pp("kv_a_layernorm"))?,
            kv_up: linear("kv_b_proj", heads * (sizes.key_width + sizes.value_width), sizes.kv_rank)?,
            output: linear("o_proj", hidden, heads * sizes.value_width)?,
            sizes,
            heads,
            scale: spec.score_scale(sizes.key_width + rotated),
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
        let LatentSpec { kv_rank, key_width, value_width, pairs, .. } = self.sizes;
        let queries = match &self.query {
            Query::Direct(query) => query.forward(hidden)?,
            Query::Narrow(down, norm, up) => up.forward(&norm.forward(&down.forward(hidden)?)?)?,
        };
        let queries = queries.reshape((batch, positions, self.heads, ()))?.transpose(1, 2)?;
        let rotated = queries.dim(3)? - key_width;
        let rotate = |part: &Tensor| if pairs { rotary.apply_pairs(part) } else { rotary.apply(part) };
        let turned = rotate(&queries.narrow(3, key_width, rotated)?)?;
        // Joined along the last dimension they would be views, which products of several sequences do not take.
        let query = Tensor::cat(&[&queries.narrow(3, 0, key_width)?, &turned], 3)?.contiguous()?;

        let narrow = self.kv_down.forward(hidden)?.unsqueeze(1)?;
        let mut latent = self.kv_norm.forward(&narrow.narrow(3, 0, kv_rank)?)?;
        let mut turned = rotate(&narrow.narrow(3, kv_rank, rotated)?)?;
        if let Some(cache) = cache {
            (latent, turned) = cache.append(&latent.contiguous()?, &turned)?;
        }
        if positions == 1 {
            let mixed = self.mix_latents(&query, &latent, &turned, mask)?;
            return Ok(self.output.forward(&mixed)?);
        }
        let seen = latent.dim(2)?;
        let wide = self.kv_up.forward(&latent.squeeze(1)?)?;
        let wide = wide.reshape((batch, seen, self.heads, key_width + value_width))?.transpose(1, 2)?;
        let turned = turned.broadcast_as((batch, self.heads, seen, rotated))?;
        let key = Tensor::cat(&[&wide.narrow(3, 0, key_width)?, &turned], 3)?.contiguous()?;
        let value = wide.narrow(3, key_width, value_width)?.contiguous()?;

        let mixed = attend(&query, &key, &value, mask, self.scale, None)?;
        Ok(self.output.forward(&mixed)?)
    }

    /// What one new position of each sequence attends to, `[batch, 1, heads · value_width]`, of latents `[batch, 1, seen, kv_rank]` and rotated keys:
    /// heads stand where positions do, for all have the same keys.
    fn mix_latents(&self, query: &Tensor, latent: &Tensor, turned: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let LatentSpec { kv_rank, key_width, value_width, .. } = self.sizes;
        let (batch, heads, _, width) = query.dims4()?;
        let up = self.kv_up.weight().reshape((heads, key_width + value_width, kv_rank))?;
        // `[heads, batch, ..]`: a product for each head.
        let query = query.squeeze(2)?.transpose(0, 1)?;
        let plain = query.narrow(2, 0, key_width)?.contiguous()?.matmul(&up.narrow(1, 0, key_width)?)?;
        let query = Tensor::cat(&[&plain, &query.narrow(2, key_width, width - key_width)?], 2)?;
        let query = query.transpose(0, 1)?.unsqueeze(1)?.contiguous()?;
        let key = Tensor::cat(&[latent, turned], 3)?.contiguous()?;
        let mixed = attend(&query, &key, &latent.contiguous()?, mask, self.scale, None)?;
        let values = up.narrow(1, key_width, value_width)?.transpose(1, 2)?;
        let mixed = mixed.transpose(0, 1)?.contiguous()?.matmul(&values)?;
        Ok(mixed.transpose(0, 1)?.reshape((batch, 1, heads * value_width))?)
    }
}
