//! What is kept from one forward pass to the next: keys and values of a text, in blocks of positions that stay where they are, one more where
//! they are full; and memory to work in, which decides nothing.
//!
//! A sequence of each layer has blocks of its own, so that no padding is kept and nothing is ever copied. A text that ends leaves its
//! blocks to the next one. Knows nothing of what keys and values mean.

use super::parts::Rotation;
use crate::simd::attention::{HeadLayout, POSITIONS};
use crate::simd::multiply::Line;

/// The blocks of one sequence in one layer.
pub(in crate::decoder) type Blocks = Vec<Box<[Line]>>;

/// Blocks of all layers and sequences.
#[derive(Debug)]
pub(in crate::decoder) struct KeptBlocks {
    layout: HeadLayout,
    kv_heads: usize,
    layers: Vec<Vec<Blocks>>,
}

impl KeptBlocks {
    /// None yet, of `layers` layers.
    pub(super) fn new(layout: HeadLayout, kv_heads: usize, layers: usize) -> Self {
        Self { layout, kv_heads, layers: vec![Vec::new(); layers] }
    }

    /// Whether keys and values are such as these.
    pub(super) fn is_of(&self, layout: HeadLayout, kv_heads: usize) -> bool {
        (self.layout, self.kv_heads) == (layout, kv_heads)
    }

    /// How many layers it is for.
    pub(in crate::decoder) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The blocks of a layer's sequences, with room for so many positions of each.
    pub(super) fn layer(&mut self, layer: usize, ends: impl ExactSizeIterator<Item = usize>) -> &mut [Blocks] {
        let (lines, sequences) = (self.kv_heads * self.layout.lines(), &mut self.layers[layer]);
        if sequences.len() < ends.len() {
            sequences.resize(ends.len(), Blocks::new());
        }
        for (blocks, end) in sequences.iter_mut().zip(ends) {
            while blocks.len() * POSITIONS < end {
                blocks.push(bytemuck::zeroed_slice_box(lines));
            }
        }
        sequences
    }
}

/// Rows that attention works in.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) query: Vec<f32>,
    pub(super) key: Vec<f32>,
    pub(super) value: Vec<f32>,
    pub(super) mixed: Vec<f32>,
    /// Of latent attention: rows of heads by themselves.
    pub(super) heads: [Vec<f32>; 2],
}

/// What forward passes work in, `[rows, hidden]` each.
#[derive(Debug, Default)]
pub(in crate::decoder) struct Scratch {
    /// The hidden states; after a pass, normed.
    pub(super) hidden: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) added: Vec<f32>,
    pub(super) rotation: Rotation,
    pub(super) work: Work,
    pub(super) everyone: Vec<u32>,
    pub(super) ones: Vec<f32>,
    /// Keys and values of passes that keep none.
    pub(super) kv: Option<KeptBlocks>,
}

impl Scratch {
    /// The hidden states that the output weights see, of the last pass.
    pub(in crate::decoder) fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}
