//! Linear layers on the engine, any number of them at once: work is cut across layers and rows of weights.
//!
//! Nothing is written by two threads, and no sum depends on which of them does what. Knows nothing of what the layers are for.

use std::ops::Range;

use super::engine::{Engine, GROUP_ROWS};
use super::matrix::Matrix;
use super::threads::{Buffers, ThreadBuffers, grow, share_out};
use super::work::Linear;
use crate::error::Result;
use crate::simd::product::{BLOCK, Form, Rows};

impl Engine {
    /// `output[t, r] = Σ_k weight[r, k] · input[t, k] + bias[r]` of each layer: threads wake up for all of them together, and an input that some
    /// share is brought into each form once.
    ///
    /// # Errors
    /// As [`Engine::product`], for any of them.
    pub(crate) fn products(&self, layers: &mut [Linear<'_>]) -> Result<()> {
        layers.iter().try_for_each(Linear::check)?;
        let mut buffers = self.take_buffers();
        let products = layers.iter().map(|layer| layer.tokens() * layer.rows() * layer.input.shape()[1]).sum();
        let bytes = layers.iter().map(|layer| layer.projection.weight.size_in_bytes()).sum();
        let threads = buffers.threads_for(products, bytes);
        let mut forms: Vec<(Matrix<'_>, Form, Range<usize>)> = Vec::with_capacity(layers.len());
        for layer in layers.iter() {
            let (input, form) = (layer.input, self.form(layer.projection.weight.dtype()));
            if !forms.iter().any(|(other, made, _)| input.is_same(other) && form == *made) {
                let end = forms.last().map_or(0, |(.., lines)| lines.end);
                forms.push((input, form, end..end + layer.tokens() * form.stride(input.shape()[1])));
            }
        }
        grow(&mut buffers.input, forms.last().map_or(0, |(.., lines)| lines.end));
        for (input, form, lines) in &forms {
            self.convert(*input, *form, &mut buffers.input[lines.clone()], &mut buffers.threads[..threads]);
        }
        let Buffers { input: lines, sums, threads: rooms, .. } = &mut buffers;
        let total = layers.iter().filter(|layer| layer.tokens() > 1).map(|layer| layer.output.len()).sum();
        grow(sums, total);
        let mut left = &mut sums[..total];
        let mut items = Vec::new();
        let most = layers.iter().map(Linear::tokens).max().unwrap_or(0);
        let everyone: Vec<u32> = (0..most as u32).collect();
        for layer in layers.iter_mut() {
            let (weight, tokens, piece) = (layer.projection.weight, layer.tokens(), layer.piece(threads));
            let (input, form) = (layer.input, self.form(weight.dtype()));
            let made = forms.iter().find(|(other, made, _)| input.is_same(other) && form == *made);
            let Some((.., made)) = made else { continue };
            let input = Rows::whole(&lines[made.clone()], form, input.shape()[1], tokens);
            // Of one token a piece of sums is a piece of the output.
            let mut sums = match tokens {
                1 => &mut *layer.output,
                _ => left.split_off_mut(..layer.output.len()).unwrap_or_default(),
            };
            for first in (0..weight.shape()[0]).step_by(piece) {
                let columns = first..weight.shape()[0].min(first + piece);
                if let Some(mine) = sums.split_off_mut(..tokens * columns.len()) {
                    items.push((weight, input, &everyone[..tokens], columns, mine));
                }
            }
        }
        share_out(items.into_iter(), &mut rooms[..threads], |room, (weight, input, everyone, columns, sums)| {
            self.linear(weight, input, everyone, columns, room, sums);
        });
        let mut done = &sums[..total];
        for layer in layers.iter_mut() {
            let (tokens, rows, piece, bias) =
                (layer.tokens(), layer.rows(), layer.piece(threads), layer.projection.bias);
            let of_layer = if tokens == 1 { &[] } else { done.split_off(..layer.output.len()).unwrap_or_default() };
            for (row, output) in layer.output.chunks_exact_mut(rows.max(1)).enumerate() {
                if tokens > 1 {
                    for (first, output) in (0..rows).step_by(piece).zip(output.chunks_mut(piece)) {
                        output.copy_from_slice(&of_layer[first * tokens + row * output.len()..][..output.len()]);
                    }
                }
                if let Some(bias) = bias {
                    output.iter_mut().zip(bias).for_each(|(output, bias)| *output += bias);
                }
            }
        }
        self.give_back(buffers);
        Ok(())
    }

    /// Some of a linear layer's columns, `[tokens, columns]`, of all tokens.
    fn linear(
        &self,
        weight: Matrix<'_>,
        input: Rows<'_>,
        everyone: &[u32],
        columns: Range<usize>,
        room: &mut ThreadBuffers,
        sums: &mut [f32],
    ) {
        let ThreadBuffers { workspace, sums: products, .. } = room;
        for (group, tokens) in everyone.chunks(GROUP_ROWS).enumerate() {
            products.resize(tokens.len() * BLOCK, 0.0);
            for first in columns.clone().step_by(BLOCK) {
                self.block(weight, None, &columns, first, input, tokens, products, workspace);
                let at = first - columns.start..(first - columns.start + BLOCK).min(columns.len());
                for (row, products) in products.as_chunks::<BLOCK>().0.iter().enumerate() {
                    let sums = &mut sums[(group * GROUP_ROWS + row) * columns.len()..][at.clone()];
                    sums.copy_from_slice(&products[..at.len()]);
                }
            }
        }
    }
}
