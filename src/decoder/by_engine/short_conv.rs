//! A gated short convolution (LFM2, arXiv 2511.23404) on the engine. The definition is [`by_candle`](crate::decoder::by_candle)'s.

use candle_nn::VarBuilder;

use super::attention::Rows;
use super::kept::{Memory, Work};
use super::parts::{Linear, in_rows};
use super::recurrent::Convolution;
use super::stored::Stored;
use crate::error::Result;
use crate::experts::matrix::Matrix;
use crate::spec::{self, ModelSpec};

/// Clones share weights.
#[derive(Clone, Debug)]
pub(super) struct ShortConv {
    input: Linear,
    convolution: Convolution,
    output: Linear,
}

impl ShortConv {
    pub(super) fn load(
        spec: &ModelSpec,
        conv: spec::ShortConv,
        vb: &VarBuilder<'_>,
        stored: &Stored<'_>,
    ) -> Result<Self> {
        let hidden = spec.moe.hidden;
        Ok(Self {
            input: Linear::load(stored, &vb.pp("in_proj"), [3 * hidden, hidden], conv.bias)?,
            convolution: Convolution::load(hidden, conv.width, conv.bias, &vb.pp("conv"))?,
            output: Linear::load(stored, &vb.pp("out_proj"), [hidden, hidden], conv.bias)?,
        })
    }

    /// What the convolution adds to each of `input` `[rows, hidden]`, into `output`.
    pub(super) fn forward(
        &self,
        input: &[f32],
        rows: &Rows<'_>,
        memories: &mut [Memory],
        work: &mut Work,
        output: &mut [f32],
    ) -> Result<()> {
        let (count, hidden) = (rows.count(), self.output.rows());
        // `B`, `C`, `x` of each row.
        let Work { query: parts, mixed, .. } = work;
        parts.resize(count * 3 * hidden, 0.0);
        rows.engine.products(&mut [self.input.of(Matrix::from_f32(count, hidden, input)?, parts)?])?;
        in_rows(parts, 3 * hidden, |_, parts| {
            for row in parts.chunks_exact_mut(3 * hidden) {
                let (gate, rest) = row.split_at_mut(hidden);
                rest[hidden..].iter_mut().zip(&*gate).for_each(|(number, gate)| *number *= gate);
            }
        });
        let parts = &*parts;
        self.convolution.apply(rows, (parts, 3 * hidden, 2 * hidden), memories, mixed, |row, mixed| {
            let gate = &parts[(3 * row + 1) * hidden..][..hidden];
            mixed.iter_mut().zip(gate).for_each(|(number, gate)| *number *= gate);
        });
        rows.engine.products(&mut [self.output.of(Matrix::from_f32(count, hidden, mixed)?, output)?])
    }
}
