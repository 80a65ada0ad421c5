//! The gated delta rule of all heads of a layer on the engine: a head of a sequence is one piece of work, whose positions follow each other, so that
//! the result does not depend on the number of threads.
//!
//! Knows nothing of where queries come from, nor of how long a state is kept.

use super::engine::Engine;
use super::threads::share_out;
use crate::simd::multiply::{LINE_BYTES, Line};
use crate::simd::recurrent::{self, matrix_lines};

/// The positions of one text, and the matrices of its heads.
pub(crate) struct Sequence<'a> {
    /// Of all value heads, one after the other.
    pub(crate) matrices: &'a mut [Line],
    /// Its first row.
    pub(crate) row: usize,
    /// Rows that follow each other.
    pub(crate) length: usize,
}

/// All heads of a layer.
pub(crate) struct DeltaRules<'a> {
    /// Queries, keys and values `[rows, stride]`, queries and keys of length 1, queries scaled.
    pub(crate) rows: &'a [f32],
    pub(crate) stride: usize,
    /// Where a value head's query, key and value begin in a row.
    pub(crate) heads: &'a [[usize; 3]],
    /// Numbers of a key and of a value.
    pub(crate) key: usize,
    pub(crate) value: usize,
    /// What each head keeps and how strongly it writes, `[rows, heads]`.
    pub(crate) decays: &'a [f32],
    pub(crate) strengths: &'a [f32],
}

impl Engine {
    /// What heads read, `[heads, length, value]` of one sequence after the other into `output`; the sequences' matrices are those after them then.
    pub(crate) fn delta_rules<'a>(
        &self,
        rules: &DeltaRules<'_>,
        sequences: impl Iterator<Item = Sequence<'a>>,
        output: &mut [f32],
    ) {
        let DeltaRules { rows, stride, heads, key, value, .. } = *rules;
        let lines = matrix_lines(key, value);
        let mut left = output;
        let mut items = Vec::new();
        for Sequence { matrices, row, length } in sequences.filter(|sequence| sequence.length > 0) {
            for (head, matrix) in matrices.chunks_exact_mut(lines.max(1)).enumerate() {
                let (mine, rest) = std::mem::take(&mut left).split_at_mut(length * value);
                left = rest;
                items.push((head, row, matrix, mine));
            }
        }
        let positions: usize = items.iter().map(|item| item.3.len() / value.max(1)).sum();
        let mut buffers = self.take_buffers();
        let threads = buffers.threads_for(4 * positions * key * value, 2 * items.len() * lines * LINE_BYTES);
        let (isa, count) = (self.isa(), heads.len());
        share_out(items.into_iter(), &mut buffers.threads[..threads], |_, (head, row, matrix, output)| {
            let [query, key_at, value_at] = heads[head].map(|first| &rows[row * stride + first..]);
            isa.run(recurrent::DeltaRule {
                matrix,
                queries: query,
                keys: key_at,
                values: value_at,
                stride,
                key,
                value,
                decays: &rules.decays[row * count + head..],
                strengths: &rules.strengths[row * count + head..],
                gate_stride: count,
                output,
            });
        });
        self.give_back(buffers);
    }
}
