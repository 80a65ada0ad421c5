//! Latent attention (DeepSeek-V2, arXiv 2405.04434) on the engine: what is kept of a position is its latent and its rotated key, and all heads
//! look at those.
//!
//! `kv_b` is taken into the queries and out of what is mixed (section 2.1.2 there), so that keys and values of heads are never made. The
//! definition is [`by_candle`](crate::decoder::by_candle)'s.

use candle_nn::VarBuilder;

use super::attention::Rows;
use super::kept::{Blocks, Work};
use super::parts::{Linear, Norm, in_rows};
use super::stored::Stored;
use crate::error::Result;
use crate::experts::matrix::Matrix;
use crate::experts::work;
use crate::layer::Packed;
use crate::simd::attention::HeadLayout;
use crate::spec::{LatentSpec, ModelSpec};

/// Clones share weights.
#[derive(Clone, Debug)]
pub(super) struct LatentAttention {
    query: Query,
    kv_down: Linear,
    kv_norm: Norm,
    /// `[heads · rank, key width]`.
    keys: Packed,
    /// `[heads · value width, rank]`.
    values: Packed,
    output: Linear,
    sizes: LatentSpec,
    layout: HeadLayout,
    heads: usize,
    /// Numbers of a head that are rotated.
    rotated: usize,
    /// What products of queries and keys are multiplied by.
    scale: f32,
}

#[derive(Clone, Debug)]
enum Query {
    Direct(Linear),
    /// Through a narrow vector of their own.
    Narrow(Linear, Norm, Linear),
}

impl LatentAttention {
    pub(super) fn load(
        spec: &ModelSpec,
        sizes: LatentSpec,
        layout: HeadLayout,
        vb: &VarBuilder<'_>,
        stored: &Stored<'_>,
    ) -> Result<Self> {
        let (hidden, heads, rotated) = (spec.moe.hidden, spec.heads, spec.rotary_dim);
        let queries = heads * (sizes.key_width + rotated);
        let linear = |name: &str, rows, columns| Linear::load(stored, &vb.pp(name), [rows, columns], false);
        let norm = |name: &str, width: usize| Norm::rms(width, LatentSpec::NORM_EPS, &vb.pp(name));
        let query = match sizes.query_rank {
            None => Query::Direct(linear("q_proj", queries, hidden)?),
            Some(rank) => Query::Narrow(
                linear("q_a_proj", rank, hidden)?,
                norm("q_a_layernorm", rank)?,
                linear("q_b_proj", queries, rank)?,
            ),
        };
        let [keys, values] = stored.keys_and_values(&vb.pp("kv_b_proj"), heads, sizes)?;
        Ok(Self {
            query,
            kv_down: linear("kv_a_proj_with_mqa", sizes.kv_rank + rotated, hidden)?,
            kv_norm: norm("kv_a_layernorm", sizes.kv_rank)?,
            keys,
            values,
            output: linear("o_proj", hidden, heads * sizes.value_width)?,
            sizes,
            layout,
            heads,
            rotated,
            scale: spec.score_scale(sizes.key_width + rotated) as f32,
        })
    }

    /// What attention adds to each of `input` `[rows, hidden]`, into `output`.
    pub(super) fn forward(
        &self,
        input: &[f32],
        rows: &Rows<'_>,
        blocks: &mut [Blocks],
        work: &mut Work,
        output: &mut [f32],
    ) -> Result<()> {
        let (count, isa, heads) = (rows.count(), rows.engine.isa(), self.heads);
        let LatentSpec { kv_rank, key_width, value_width, pairs, .. } = self.sizes;
        let Work { query, key, value, mixed, heads: [apart, made] } = work;
        let matrix = Matrix::from_f32(count, input.len() / count.max(1), input)?;
        key.resize(count * self.kv_down.rows(), 0.0);
        match &self.query {
            Query::Direct(direct) => {
                query.resize(count * direct.rows(), 0.0);
                rows.engine.products(&mut [direct.of(matrix, query)?, self.kv_down.of(matrix, key)?])?;
            }
            Query::Narrow(down, norm, up) => {
                value.resize(count * down.rows(), 0.0);
                query.resize(count * up.rows(), 0.0);
                rows.engine.products(&mut [down.of(matrix, value)?, self.kv_down.of(matrix, key)?])?;
                norm.apply(isa, value);
                let narrow = Matrix::from_f32(count, down.rows(), value)?;
                rows.engine.products(&mut [up.of(narrow, query)?])?;
            }
        }
        let (head, kept) = (key_width + self.rotated, kv_rank + self.rotated);
        in_rows(key, kept, |first, key| {
            key.chunks_exact_mut(kept).for_each(|key| self.kv_norm.apply(isa, &mut key[..kv_rank]));
            rows.rotation.apply(key, first, [1, kept], kv_rank, pairs);
        });
        rows.keep(self.layout, 1, blocks, key, &[]);
        in_rows(query, heads * head, |first, query| {
            rows.rotation.apply(query, first, [heads, head], key_width, pairs);
            query.iter_mut().for_each(|number| *number *= self.scale);
        });

        // Each head's own part of its query by its keys' weights.
        apart.resize(count * heads * key_width, 0.0);
        made.resize(count * heads * kv_rank, 0.0);
        for (at, query) in query.chunks_exact(head).enumerate() {
            let (row, head) = (at / heads, at % heads);
            apart[(head * count + row) * key_width..][..key_width].copy_from_slice(&query[..key_width]);
        }
        self.each_head(rows, &self.keys, [key_width, kv_rank], apart, made)?;
        let turned = query.chunks_exact(head).map(|query| &query[key_width..]);
        value.clear();
        for (at, turned) in turned.enumerate() {
            let (row, head) = (at / heads, at % heads);
            value.extend_from_slice(&made[(head * count + row) * kv_rank..][..kv_rank]);
            value.extend_from_slice(turned);
        }

        rows.attend(self.layout, [1, heads], blocks, value, None, None, mixed);

        // What each head mixed of latents by its values' weights.
        apart.resize(count * heads * kv_rank, 0.0);
        made.resize(count * heads * value_width, 0.0);
        for (at, mixed) in mixed.chunks_exact(kv_rank).enumerate() {
            let (row, head) = (at / heads, at % heads);
            apart[(head * count + row) * kv_rank..][..kv_rank].copy_from_slice(mixed);
        }
        self.each_head(rows, &self.values, [kv_rank, value_width], apart, made)?;
        mixed.resize(count * heads * value_width, 0.0);
        for (at, mixed) in mixed.chunks_exact_mut(value_width).enumerate() {
            let (row, head) = (at / heads, at % heads);
            mixed.copy_from_slice(&made[(head * count + row) * value_width..][..value_width]);
        }
        let mixed = Matrix::from_f32(count, heads * value_width, mixed)?;
        rows.engine.products(&mut [self.output.of(mixed, output)?])?;
        rows.poison(self.layout, value, key, output);
        Ok(())
    }

    /// A product for each head, `[heads, rows, from]` to `[heads, rows, to]`.
    fn each_head(
        &self,
        rows: &Rows<'_>,
        weight: &Packed,
        [from, to]: [usize; 2],
        input: &[f32],
        output: &mut [f32],
    ) -> Result<()> {
        let (count, weight) = (rows.count(), weight.matrix()?);
        let heads = input.chunks_exact((count * from).max(1)).zip(output.chunks_exact_mut((count * to).max(1)));
        let linear = |(head, (input, output))| {
            let projection = weight.rows(head * to..(head + 1) * to)?.into();
            Ok(work::Linear { input: Matrix::from_f32(count, from, input)?, projection, output })
        };
        rows.engine.products(&mut heads.enumerate().map(linear).collect::<Result<Vec<_>>>()?)
    }
}
