//! The convolution of recurrent mixers on rows of floats, over the last few positions of each sequence.
//!
//! Rows of padding stay zeros and go into no state.

use std::sync::Arc;

use candle_nn::VarBuilder;

use super::attention::Rows;
use super::kept::Memory;
use super::parts::{in_rows, numbers};
use crate::error::Result;

/// A depthwise convolution; clones share weights.
#[derive(Clone, Debug)]
pub(super) struct Convolution {
    /// `[width, channels]`.
    weight: Arc<[f32]>,
    bias: Option<Arc<[f32]>>,
    channels: usize,
}

impl Convolution {
    /// `weight` `[channels, 1, width]` and, where it has one, `bias` under a builder.
    pub(super) fn load(channels: usize, width: usize, bias: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let stored = vb.get((channels, 1, width), "weight")?.flatten_all()?.to_vec1::<f32>()?;
        let weight = (0..width).flat_map(|at| stored[at..].iter().step_by(width)).copied().collect();
        Ok(Self { weight, bias: bias.then(|| numbers(vb, "bias", channels)).transpose()?, channels })
    }

    /// The convolution of the numbers from `first` on of each row of `input`, `[rows, stride]`, into `output`, `[rows, channels]`, after the
    /// positions that each sequence's memory has, which it leaves for those that come next. `finish` is done to each row then; it gets the row's
    /// number.
    pub(super) fn apply(
        &self,
        rows: &Rows<'_>,
        (input, stride, first): (&[f32], usize, usize),
        memories: &mut [Memory],
        output: &mut Vec<f32>,
        finish: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let (channels, positions, lengths) = (self.channels, rows.batch.positions(), rows.batch.lengths());
        output.resize(rows.count() * channels, 0.0);
        let tail = self.weight.len() / channels.max(1) - 1;
        let own = |row: usize| &input[row * stride + first..][..channels];
        let seen = &*memories;
        in_rows(output, channels, |from, output| {
            for (row, output) in (from..).zip(output.chunks_exact_mut(channels)) {
                let (sequence, position) = (row / positions, row % positions);
                if position >= lengths[sequence] {
                    output.fill(0.0);
                    continue;
                }
                match &self.bias {
                    Some(bias) => output.copy_from_slice(bias),
                    None => output.fill(0.0),
                }
                for (at, weight) in self.weight.chunks_exact(channels).enumerate() {
                    let input = match (position + at).checked_sub(tail) {
                        Some(position) => own(sequence * positions + position),
                        None => &seen[sequence].tail[(position + at) * channels..][..channels],
                    };
                    output
                        .iter_mut()
                        .zip(input)
                        .zip(weight)
                        .for_each(|((sum, number), weight)| *sum += number * weight);
                }
                finish(row, output);
            }
        });
        for (sequence, (memory, &length)) in memories.iter_mut().zip(lengths).enumerate() {
            let kept = tail.saturating_sub(length);
            memory.tail.copy_within((tail - kept) * channels.., 0);
            for at in kept..tail {
                let row = sequence * positions + length + at - tail;
                memory.tail[at * channels..][..channels].copy_from_slice(own(row));
            }
        }
    }
}
