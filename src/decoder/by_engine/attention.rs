//! Grouped-query attention (arXiv 2305.13245) on the engine: `softmax(q·kᵀ / √head_dim)·v` of rows `[rows, hidden]`, keys and values kept
//! where they are written. The definition is [`by_candle`](crate::decoder::by_candle)'s.

use std::sync::Arc;

use candle_nn::VarBuilder;

use super::kept::{Blocks, Work};
use super::parts::{Linear, Norm, Rotation, in_rows, numbers};
use super::stored::Stored;
use crate::decoder::batch::Batch;
use crate::error::Result;
use crate::experts::attention::{Attention as Attended, Sequence};
use crate::experts::engine::Engine;
use crate::experts::matrix::Matrix;
use crate::simd::attention::{HeadLayout, POSITIONS};
use crate::simd::recurrent::{Gate, Weigh};
use crate::spec::{AttentionBias, ModelSpec, QkNorm};

/// What all layers of a forward pass share.
pub(super) struct Rows<'a> {
    pub(super) batch: &'a Batch,
    /// The position of each sequence's first token.
    pub(super) starts: &'a [usize],
    pub(super) rotation: &'a Rotation,
    pub(super) engine: &'a Engine,
}

impl Rows<'_> {
    /// Rows of the batch, padding among them.
    pub(super) fn count(&self) -> usize {
        self.batch.ids().len()
    }

    /// The tokens: their row, their sequence and their position in it.
    fn tokens(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let positions = self.batch.positions();
        let of = move |(sequence, (&length, &start)): (usize, (&usize, &usize))| {
            (0..length).map(move |at| (sequence * positions + at, sequence, start + at))
        };
        self.batch.lengths().iter().zip(self.starts).enumerate().flat_map(of)
    }

    /// Keeps keys and values `[rows, kv_heads · width]` of all tokens; a value that is the front of its key is not looked for.
    pub(super) fn keep(&self, layout: HeadLayout, kv_heads: usize, blocks: &mut [Blocks], key: &[f32], value: &[f32]) {
        for (row, sequence, position) in self.tokens() {
            let block = &mut blocks[sequence][position / POSITIONS];
            for (head, lines) in block.chunks_exact_mut(layout.lines()).enumerate() {
                let key = &key[(row * kv_heads + head) * layout.key..][..layout.key];
                let value = match layout.shared {
                    true => &[],
                    false => &value[(row * kv_heads + head) * layout.value..][..layout.value],
                };
                layout.keep(lines, position % POSITIONS, key, value);
            }
        }
    }

    /// Makes what was added to rows no number where their query or key is none: scores of such may still look like shares.
    pub(super) fn poison(&self, layout: HeadLayout, queries: &[f32], keys: &[f32], added: &mut [f32]) {
        let count = self.count().max(1);
        let widths = [queries.len() / count, keys.len() / count, added.len() / count];
        let rows = queries.chunks_exact(widths[0]).zip(keys.chunks_exact(widths[1]));
        for ((query, key), added) in rows.zip(added.chunks_exact_mut(widths[2])) {
            // All of them without a branch, which is many at a time.
            let sound = |ok: bool, number: &f32| ok & layout.holds(*number);
            if !(query.iter().fold(true, |ok, number| ok & number.is_finite()) && key.iter().fold(true, sound)) {
                added.fill(f32::NAN);
            }
        }
    }

    /// What every row's heads attend to, `[rows, heads · value]`; zeros for padding.
    #[expect(clippy::too_many_arguments, reason = "what attention is of")]
    pub(super) fn attend(
        &self,
        layout: HeadLayout,
        [kv_heads, group]: [usize; 2],
        blocks: &[Blocks],
        queries: &[f32],
        window: Option<usize>,
        sinks: Option<&[f32]>,
        mixed: &mut Vec<f32>,
    ) {
        mixed.resize(self.count() * kv_heads * group * layout.value, 0.0);
        if self.batch.padding().is_some() {
            mixed.fill(0.0);
        }
        let positions = self.batch.positions();
        let lengths = self.batch.lengths().iter().zip(self.starts).zip(blocks).enumerate();
        let sequences: Vec<Sequence<'_>> = lengths
            .filter(|(_, ((length, _), _))| **length > 0)
            .map(|(at, ((&length, &start), blocks))| Sequence { blocks, row: at * positions, start, length })
            .collect();
        self.engine.attend(&Attended { layout, kv_heads, group, window, sinks, queries, sequences: &sequences }, mixed);
    }
}

/// Clones share weights.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Of what each head mixed.
    gate: Option<Linear>,
    /// Of queries and keys.
    norms: Option<(Norm, Norm)>,
    clip: Option<f32>,
    /// One for each head.
    sinks: Option<Arc<[f32]>>,
    layout: HeadLayout,
    heads: usize,
    kv_heads: usize,
    /// What products of queries and keys are multiplied by.
    scale: f32,
}

impl Attention {
    pub(super) fn load(spec: &ModelSpec, layout: HeadLayout, vb: &VarBuilder<'_>, stored: &Stored<'_>) -> Result<Self> {
        let (hidden, queries, keys) = (spec.moe.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let linear = |name: &str, rows, columns, bias| Linear::load(stored, &vb.pp(name), [rows, columns], bias);
        let norm = |name: &str, width: usize| Norm::of_kind(width, spec, &vb.pp(name));
        let [query_norm, key_norm] = spec.names.qk_norms;
        let inputs = spec.attention_bias != AttentionBias::None;
        let (query, gate) = match spec.output_gate {
            true => {
                let both = linear("q_proj", 2 * queries, hidden, inputs)?;
                // Of each head its query, then its gate.
                let half =
                    |half: usize| both.pick((0..queries).map(|row| row + (row / spec.head_dim + half) * spec.head_dim));
                (half(0)?, Some(half(1)?))
            }
            false => (linear("q_proj", queries, hidden, inputs)?, None),
        };
        Ok(Self {
            query,
            gate,
            key: linear("k_proj", keys, hidden, inputs)?,
            value: linear("v_proj", keys, hidden, inputs)?,
            output: linear(spec.names.output, hidden, queries, spec.attention_bias == AttentionBias::All)?,
            norms: match spec.qk_norm {
                Some(QkNorm::Whole) => Some((norm(query_norm, queries)?, norm(key_norm, keys)?)),
                Some(QkNorm::PerHead) => Some((norm(query_norm, spec.head_dim)?, norm(key_norm, spec.head_dim)?)),
                None => None,
            },
            clip: spec.clip_qkv.map(|clip| clip as f32),
            sinks: spec.sinks.then(|| numbers(vb, "sinks", spec.heads)).transpose()?,
            layout,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            scale: spec.score_scale(spec.head_dim) as f32,
        })
    }

    /// What attention adds to each of `input` `[rows, hidden]`, into `output`.
    pub(super) fn forward(
        &self,
        input: &[f32],
        rows: &Rows<'_>,
        window: Option<usize>,
        blocks: &mut [Blocks],
        work: &mut Work,
        output: &mut [f32],
    ) -> Result<()> {
        let (count, isa, width) = (rows.count(), rows.engine.isa(), self.layout.key);
        let Work { query, key, value, mixed, heads: [gates, _] } = work;
        for (rows, linear) in [(&mut *query, &self.query), (&mut *key, &self.key), (&mut *value, &self.value)] {
            rows.resize(count * linear.rows(), 0.0);
        }
        let matrix = Matrix::from_f32(count, input.len() / count.max(1), input)?;
        let [of_query, of_key, of_value] =
            [self.query.of(matrix, query)?, self.key.of(matrix, key)?, self.value.of(matrix, value)?];
        match &self.gate {
            Some(gate) => {
                gates.resize(count * gate.rows(), 0.0);
                rows.engine.products(&mut [of_query, of_key, of_value, gate.of(matrix, gates)?])?;
            }
            None => rows.engine.products(&mut [of_query, of_key, of_value])?,
        }
        if let Some((of_query, of_key)) = &self.norms {
            of_query.apply(isa, query);
            of_key.apply(isa, key);
        }
        if let Some(clip) = self.clip {
            for rows in [&mut *query, &mut *key, &mut *value] {
                rows.iter_mut().for_each(|number| *number = number.clamp(-clip, clip));
            }
        }
        in_rows(query, self.heads * width, |first, query| {
            rows.rotation.apply(query, first, [self.heads, width], 0, false);
            query.iter_mut().for_each(|number| *number *= self.scale);
        });
        in_rows(key, self.kv_heads * width, |first, key| {
            rows.rotation.apply(key, first, [self.kv_heads, width], 0, false);
        });
        rows.keep(self.layout, self.kv_heads, blocks, key, value);
        let heads = [self.kv_heads, self.heads / self.kv_heads];
        rows.attend(self.layout, heads, blocks, query, window, self.sinks.as_deref(), mixed);
        if self.gate.is_some() {
            let (gates, width) = (&*gates, gates.len() / count.max(1));
            in_rows(mixed, width, |first, mixed| {
                let gates = &gates[first * width..][..mixed.len()];
                isa.run(Weigh { rows: mixed, gates, gate: Gate::Sigmoid });
            });
        }
        let mixed = Matrix::from_f32(count, self.heads * self.layout.value, mixed)?;
        rows.engine.products(&mut [self.output.of(mixed, output)?])?;
        rows.poison(self.layout, query, key, output);
        Ok(())
    }
}
