//! What is kept from one forward pass to the next: keys and values of a text, in blocks of positions that stay where they are, one more where
//! they are full; of blocks that have a recurrence instead its state, which is of one size; and memory to work in, which decides nothing.
//!
//! A sequence of each layer has its own, so that no padding is kept and keys and values are never copied. A text that ends leaves its
//! blocks to the next one, which begins with a state of zeros. Knows nothing of what keys, values and states mean.

use super::parts::Rotation;
use crate::simd::attention::{HeadLayout, POSITIONS};
use crate::simd::multiply::Line;
use crate::spec::RecurrentMixer;

/// The blocks of one sequence in one layer.
pub(in crate::decoder) type Blocks = Vec<Box<[Line]>>;

/// The state of a recurrence after some tokens of one sequence.
#[derive(Clone, Debug)]
pub(in crate::decoder) struct Memory {
    /// The last positions that a convolution saw, `[width − 1, channels]`.
    pub(super) tail: Vec<f32>,
    /// A matrix for each head.
    pub(super) matrices: Box<[Line]>,
}

/// What layers keep of a sequence, in sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::decoder) struct KeptSizes {
    pub(super) layout: HeadLayout,
    pub(super) kv_heads: usize,
    /// Which recurrence there is, numbers of its tail, and lines of its matrices.
    pub(super) recurrence: Option<RecurrentMixer>,
    pub(super) tail: usize,
    pub(super) lines: usize,
}

/// What one layer keeps, by sequence.
#[derive(Debug)]
enum KeptLayer {
    Attention(Vec<Blocks>),
    /// As they are, and as they were when they were marked.
    Recurrent {
        now: Vec<Memory>,
        marked: Vec<Memory>,
    },
}

/// What all layers keep.
#[derive(Debug)]
pub(in crate::decoder) struct KeptBlocks {
    sizes: KeptSizes,
    layers: Vec<KeptLayer>,
}

impl KeptBlocks {
    /// Nothing yet, of layers that have a recurrence or attention.
    pub(super) fn new(sizes: KeptSizes, recurrent: impl Iterator<Item = bool>) -> Self {
        let layer = |recurrent| match recurrent {
            true => KeptLayer::Recurrent { now: Vec::new(), marked: Vec::new() },
            false => KeptLayer::Attention(Vec::new()),
        };
        Self { sizes, layers: recurrent.map(layer).collect() }
    }

    /// Whether it is of such layers.
    pub(super) fn is_of(&self, sizes: KeptSizes, recurrent: impl Iterator<Item = bool>) -> bool {
        let kinds = self.layers.iter().map(|layer| matches!(layer, KeptLayer::Recurrent { .. }));
        self.sizes == sizes && kinds.eq(recurrent)
    }

    /// How many layers it is for.
    pub(in crate::decoder) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Whether a layer keeps a state that goes back to its mark alone.
    pub(in crate::decoder) fn is_recurrent(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer, KeptLayer::Recurrent { .. }))
    }

    /// Remembers states as they are.
    pub(in crate::decoder) fn mark(&mut self) {
        self.recurrent().for_each(|(now, marked)| marked.clone_from(now));
    }

    /// Gives states back what they were when they were marked.
    pub(in crate::decoder) fn go_back(&mut self) {
        self.recurrent().for_each(|(now, marked)| now.clone_from(marked));
    }

    /// The states of layers that have a recurrence, and the marked ones.
    fn recurrent(&mut self) -> impl Iterator<Item = (&mut Vec<Memory>, &mut Vec<Memory>)> {
        self.layers.iter_mut().filter_map(|layer| match layer {
            KeptLayer::Recurrent { now, marked } => Some((now, marked)),
            KeptLayer::Attention(_) => None,
        })
    }

    /// The blocks of a layer's sequences, with room for so many positions of each; none of a layer that has a recurrence.
    pub(super) fn blocks(&mut self, layer: usize, ends: impl ExactSizeIterator<Item = usize>) -> &mut [Blocks] {
        let lines = self.sizes.kv_heads * self.sizes.layout.lines();
        let KeptLayer::Attention(sequences) = &mut self.layers[layer] else { return &mut [] };
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

    /// The states of a layer's sequences, those of zeros that begin at their first token; none of a layer that has attention.
    pub(super) fn memories(&mut self, layer: usize, starts: &[usize]) -> &mut [Memory] {
        let KeptSizes { tail, lines, .. } = self.sizes;
        let KeptLayer::Recurrent { now: sequences, .. } = &mut self.layers[layer] else { return &mut [] };
        if sequences.len() < starts.len() {
            let none = || Memory { tail: vec![0.0; tail], matrices: bytemuck::zeroed_slice_box(lines) };
            sequences.resize_with(starts.len(), none);
        }
        for (memory, _) in sequences.iter_mut().zip(starts).filter(|(_, start)| **start == 0) {
            memory.tail.fill(0.0);
            memory.matrices.fill(Line::default());
        }
        &mut sequences[..starts.len()]
    }
}

/// Rows that a mixer works in.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) query: Vec<f32>,
    pub(super) key: Vec<f32>,
    pub(super) value: Vec<f32>,
    pub(super) mixed: Vec<f32>,
    /// Of latent attention: rows of heads by themselves; of grouped attention: gates of what heads mixed; of a delta net: what they write and forget by.
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
    /// What one layer keeps while it runs, of passes that keep nothing: one with attention, one with a recurrence.
    pub(super) kv: Option<KeptBlocks>,
}

impl Scratch {
    /// The hidden states that the output weights see, of the last pass.
    pub(in crate::decoder) fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}
