//! A gated delta net (arXiv 2412.06464) on the engine: its convolution and lengths row by row, the rule head by head, gate and norm row by row.
//! The definition is [`by_candle`](crate::decoder::by_candle)'s.

use std::sync::Arc;

use candle_nn::VarBuilder;

use super::attention::Rows;
use super::kept::{Memory, Work};
use super::parts::{Linear, Norm, in_rows, numbers};
use super::recurrent::Convolution;
use super::stored::Stored;
use crate::decoder::by_candle::delta_net::LENGTH_EPS;
use crate::error::Result;
use crate::experts::matrix::Matrix;
use crate::experts::recurrent::{DeltaRules, Sequence};
use crate::layer::Packed;
use crate::simd::norm::RmsNorm;
use crate::simd::recurrent::{Gate, Silu, Weigh};
use crate::spec::{self, ModelSpec};

/// Clones share weights.
#[derive(Clone, Debug)]
pub(super) struct DeltaNet {
    /// To queries, keys and values; to gates of the output; to what a head writes by; to what it forgets by.
    inputs: [Linear; 4],
    convolution: Convolution,
    /// How fast each value head forgets: `exp(A)`.
    speeds: Arc<[f32]>,
    /// Added to what it forgets by.
    steps: Arc<[f32]>,
    /// What queries and keys of length 1 are multiplied by, over the root of how many numbers they have: an RMS norm makes them that long.
    lengths: [Arc<[f32]>; 2],
    norm: Norm,
    output: Linear,
    /// Where a value head's query, key and value begin.
    heads: Arc<[[usize; 3]]>,
    sizes: spec::DeltaNet,
}

impl DeltaNet {
    pub(super) fn load(
        spec: &ModelSpec,
        sizes: spec::DeltaNet,
        vb: &VarBuilder<'_>,
        stored: &Stored<'_>,
    ) -> Result<Self> {
        let (hidden, heads) = (spec.moe.hidden, sizes.value_heads);
        let weight = |name: &str, rows: usize| stored.linear(&vb.pp(name), [rows, hidden]);
        let inputs = match sizes.fused {
            true => apart(
                sizes,
                &weight("in_proj_qkvz", sizes.channels() + sizes.values())?,
                &weight("in_proj_ba", 2 * heads)?,
            )?,
            false => [
                weight("in_proj_qkv", sizes.channels())?,
                weight("in_proj_z", sizes.values())?,
                weight("in_proj_b", heads)?,
                weight("in_proj_a", heads)?,
            ],
        };
        let starts = (0..heads).map(|head| {
            let key = sizes.key_head(head) * sizes.key_width;
            [key, sizes.keys() + key, 2 * sizes.keys() + head * sizes.value_width]
        });
        let root = (sizes.key_width as f32).sqrt();
        let length = |length: f32| vec![length / root; sizes.key_width].into();
        Ok(Self {
            lengths: [length(1.0 / root), length(1.0)],
            inputs: inputs.map(|weight| Linear { weight, bias: None }),
            convolution: Convolution::load(sizes.channels(), sizes.conv_width, false, &vb.pp("conv1d"))?,
            speeds: numbers(vb, "A_log", heads)?.iter().map(|speed| speed.exp()).collect(),
            steps: numbers(vb, "dt_bias", heads)?,
            norm: Norm::rms(sizes.value_width, spec.norm_eps, &vb.pp("norm"))?,
            output: Linear::load(stored, &vb.pp("out_proj"), [hidden, sizes.values()], false)?,
            heads: starts.collect(),
            sizes,
        })
    }

    /// What the net adds to each of `input` `[rows, hidden]`, into `output`.
    pub(super) fn forward(
        &self,
        input: &[f32],
        rows: &Rows<'_>,
        memories: &mut [Memory],
        work: &mut Work,
        output: &mut [f32],
    ) -> Result<()> {
        let (count, isa, sizes) = (rows.count(), rows.engine.isa(), self.sizes);
        let (values, channels) = (sizes.values(), sizes.channels());
        let Work { query: parts, key: gates, value: read, mixed, heads: [strengths, decays] } = work;
        let [of_parts, of_gates, of_strengths, of_decays] = &self.inputs;
        for (rows, linear) in [
            (&mut *parts, of_parts),
            (&mut *gates, of_gates),
            (&mut *strengths, of_strengths),
            (&mut *decays, of_decays),
        ] {
            rows.resize(count * linear.rows(), 0.0);
        }
        let matrix = Matrix::from_f32(count, input.len() / count.max(1), input)?;
        rows.engine.products(&mut [
            of_parts.of(matrix, parts)?,
            of_gates.of(matrix, gates)?,
            of_strengths.of(matrix, strengths)?,
            of_decays.of(matrix, decays)?,
        ])?;
        strengths.iter_mut().for_each(|number| *number = 1.0 / (1.0 + (-*number).exp()));
        for decays in decays.chunks_exact_mut(sizes.value_heads) {
            for ((decay, speed), step) in decays.iter_mut().zip(&*self.speeds).zip(&*self.steps) {
                *decay = (-speed * softplus(*decay + step)).exp();
            }
        }
        let (eps, [of_query, of_key]) = (LENGTH_EPS as f32 / sizes.key_width as f32, &self.lengths);
        self.convolution.apply(rows, (parts, channels, 0), memories, mixed, |_, row| {
            isa.run(Silu(row));
            let (queries, rest) = row.split_at_mut(sizes.keys());
            isa.run(RmsNorm { rows: queries, weight: of_query, eps });
            isa.run(RmsNorm { rows: &mut rest[..sizes.keys()], weight: of_key, eps });
        });
        let lengths = rows.batch.lengths();
        read.resize(lengths.iter().sum::<usize>() * values, 0.0);
        let rules = DeltaRules {
            rows: mixed,
            stride: channels,
            heads: &self.heads,
            key: sizes.key_width,
            value: sizes.value_width,
            decays,
            strengths,
        };
        let positions = rows.batch.positions();
        let sequences = memories.iter_mut().zip(lengths).enumerate().map(|(at, (memory, &length))| Sequence {
            matrices: &mut memory.matrices,
            row: at * positions,
            length,
        });
        rows.engine.delta_rules(&rules, sequences, read);

        // From `[heads, length, value]` of each sequence to rows.
        let firsts: Vec<usize> =
            lengths.iter().scan(0, |next, &length| Some(std::mem::replace(next, *next + length * values))).collect();
        mixed.resize(count * values, 0.0);
        let (read, gates) = (&*read, &*gates);
        in_rows(mixed, values, |from, mixed| {
            for (row, mixed) in (from..).zip(mixed.chunks_exact_mut(values)) {
                let (sequence, position) = (row / positions, row % positions);
                let length = lengths[sequence];
                if position >= length {
                    mixed.fill(0.0);
                    continue;
                }
                for (head, mixed) in mixed.chunks_exact_mut(sizes.value_width).enumerate() {
                    let start = firsts[sequence] + (head * length + position) * sizes.value_width;
                    mixed.copy_from_slice(&read[start..][..sizes.value_width]);
                }
                self.norm.apply(isa, mixed);
                isa.run(Weigh { rows: mixed, gates: &gates[row * values..][..values], gate: Gate::Silu });
            }
        });
        rows.engine.products(&mut [self.output.of(Matrix::from_f32(count, values, mixed)?, output)?])
    }
}

/// Projections that are joined by key heads, apart: queries, keys and values; gates; what heads write by; what they forget by.
fn apart(sizes: spec::DeltaNet, mixed: &Packed, small: &Packed) -> Result<[Packed; 4]> {
    let spec::DeltaNet { key_heads, value_heads, key_width, value_width, .. } = sizes;
    let (each, values) = (value_heads / key_heads, value_heads / key_heads * value_width);
    let (group, pair) = (2 * (key_width + values), 2 * each);
    // The rows `first .. first + width` of each key head, head after head.
    let of = |group: usize, first: usize, width: usize| {
        (0..key_heads).flat_map(move |head| (0..width).map(move |at| head * group + first + at))
    };
    let pick = |from: &Packed, rows: Vec<usize>| from.pick(rows.into_iter());
    let parts = of(group, 0, key_width).chain(of(group, key_width, key_width)).chain(of(group, 2 * key_width, values));
    Ok([
        pick(mixed, parts.collect())?,
        pick(mixed, of(group, 2 * key_width + values, values).collect())?,
        pick(small, of(pair, 0, each).collect())?,
        pick(small, of(pair, each, each).collect())?,
    ])
}

/// `ln(1 + exp(x))`, without an overflow.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
