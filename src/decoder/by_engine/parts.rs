//! What blocks are made of on rows of floats: linear layers of stored weights, norms, rotations. All work in place or into rows that are
//! there.
//!
//! Knows nothing of blocks.

use std::sync::Arc;

use candle_nn::VarBuilder;
use rayon::prelude::*;

use super::stored::Stored;
use crate::error::Result;
use crate::experts::matrix::Matrix;
use crate::experts::work::{self, ProjectionWeights};
use crate::layer::Packed;
use crate::simd::Isa;
use crate::simd::norm::{LayerNorm, RmsNorm};
use crate::spec::{self, ModelSpec};

/// Numbers that are worth a second thread.
const WORTH_THREADS: usize = 1 << 15;

/// `y = x·Wᵀ + b`; clones share weights.
#[derive(Clone, Debug)]
pub(in crate::decoder) struct Linear {
    pub(super) weight: Packed,
    pub(super) bias: Option<Arc<[f32]>>,
}

impl Linear {
    /// `weight` and, where it has one, `bias` under a builder.
    pub(super) fn load(stored: &Stored<'_>, vb: &VarBuilder<'_>, shape: [usize; 2], bias: bool) -> Result<Self> {
        let bias = bias.then(|| numbers(vb, "bias", shape[0])).transpose()?;
        Ok(Self { weight: stored.linear(vb, shape)?, bias })
    }

    /// The same of some of its rows.
    pub(super) fn pick(&self, rows: impl ExactSizeIterator<Item = usize> + Clone) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| rows.clone().map(|row| bias[row]).collect());
        Ok(Self { weight: self.weight.pick(rows)?, bias })
    }

    /// Output rows.
    pub(super) fn rows(&self) -> usize {
        self.weight.shape()[0]
    }

    /// The layer at work on `[tokens, columns]`, into `[tokens, rows]`.
    pub(super) fn of<'a>(&'a self, input: Matrix<'a>, output: &'a mut [f32]) -> Result<work::Linear<'a>> {
        let projection = ProjectionWeights { weight: self.weight.matrix()?, bias: self.bias.as_deref() };
        Ok(work::Linear { input, projection, output })
    }
}

/// Floats of a vector under a builder.
pub(super) fn numbers(vb: &VarBuilder<'_>, name: &str, size: usize) -> Result<Arc<[f32]>> {
    Ok(vb.get(size, name)?.to_vec1::<f32>()?.into())
}

/// A norm of rows; clones share weights.
#[derive(Clone, Debug)]
pub(in crate::decoder) struct Norm {
    weight: Arc<[f32]>,
    /// Of layer norm.
    bias: Option<Arc<[f32]>>,
    eps: f32,
}

impl Norm {
    /// The model's norm of the hidden state.
    pub(super) fn load(spec: &ModelSpec, vb: &VarBuilder<'_>) -> Result<Self> {
        let bias = (spec.norm == spec::Norm::Layer).then(|| numbers(vb, "bias", spec.moe.hidden)).transpose()?;
        Ok(Self { bias, ..Self::of_kind(spec.moe.hidden, spec, vb)? })
    }

    /// RMS norm of rows of `width`, its weight stored as the model's norms have theirs.
    pub(super) fn of_kind(width: usize, spec: &ModelSpec, vb: &VarBuilder<'_>) -> Result<Self> {
        let norm = Self::rms(width, spec.norm_eps, vb)?;
        match spec.norm {
            spec::Norm::RmsFromOne => {
                Ok(Self { weight: norm.weight.iter().map(|weight| 1.0 + weight).collect(), ..norm })
            }
            spec::Norm::Rms | spec::Norm::Layer => Ok(norm),
        }
    }

    /// RMS norm of rows of `width`.
    pub(super) fn rms(width: usize, eps: f64, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self { weight: numbers(vb, "weight", width)?, bias: None, eps: eps as f32 })
    }

    /// Norms all rows.
    pub(in crate::decoder) fn apply(&self, isa: Isa, rows: &mut [f32]) {
        let (weight, eps) = (&*self.weight, self.eps);
        in_rows(rows, weight.len(), |_, rows| match &self.bias {
            Some(bias) => isa.run(LayerNorm { rows, weight, bias, eps }),
            None => isa.run(RmsNorm { rows, weight, eps }),
        });
    }
}

/// Does some rows of `width` after others, on several threads where that is worth it; `run` gets the first one's number too.
pub(super) fn in_rows(rows: &mut [f32], width: usize, run: impl Fn(usize, &mut [f32]) + Sync) {
    let width = width.max(1);
    if rows.len() < WORTH_THREADS {
        return run(0, rows);
    }
    let some = (WORTH_THREADS / 4).div_ceil(width);
    rows.par_chunks_mut(some * width).enumerate().for_each(|(at, rows)| run(at * some, rows));
}

/// The rotations of one forward pass's rows (arXiv 2104.09864).
#[derive(Clone, Debug, Default)]
pub(super) struct Rotation {
    /// Cosine and sine of each pair, `[rows, rotary_dim / 2]`.
    turns: Vec<[f32; 2]>,
    pairs: usize,
}

/// How fast a model's positions turn; the same for all layers.
#[derive(Clone, Debug)]
pub(super) struct Rates {
    rates: Arc<[f32]>,
    scale: f32,
}

impl Rates {
    pub(super) fn new(spec: &ModelSpec) -> Self {
        Self { rates: spec.rotation_rates().into(), scale: spec.rope_scaling.rotation_scale() as f32 }
    }

    /// Those of rows at these positions, in place of others.
    pub(super) fn turn(&self, positions: impl Iterator<Item = usize>, rotation: &mut Rotation) {
        rotation.pairs = self.rates.len();
        rotation.turns.clear();
        rotation.turns.extend(positions.flat_map(|position| {
            self.rates.iter().map(move |rate| {
                let (sin, cos) = (position as f32 * rate).sin_cos();
                [cos * self.scale, sin * self.scale]
            })
        }));
    }
}

impl Rotation {
    /// Rotates a part of each head, from its number `first` on: `rows` are `[rows, heads · width]` from row `row` on. Two halves turn against each other
    /// or, with `neighbours`, each number against the next.
    pub(super) fn apply(
        &self,
        rows: &mut [f32],
        row: usize,
        [heads, width]: [usize; 2],
        first: usize,
        neighbours: bool,
    ) {
        for (rows, turns) in
            rows.chunks_exact_mut(heads * width).zip(self.turns[row * self.pairs..].chunks_exact(self.pairs))
        {
            for head in rows.chunks_exact_mut(width) {
                let part = &mut head[first..][..2 * self.pairs];
                if neighbours {
                    for ([a, b], [cos, sin]) in part.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                    continue;
                }
                let (left, right) = part.split_at_mut(self.pairs);
                for ((a, b), [cos, sin]) in left.iter_mut().zip(right).zip(turns) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }
}
