//! Mixers that keep a state of fixed size instead of keys and values: what they are, in sizes.

use crate::error::{Error, Result};

/// Blocks that mix positions by a recurrence in place of attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentBlocks {
    /// Which blocks, ascending.
    pub(crate) blocks: Vec<usize>,
    /// What they do.
    pub(crate) mixer: RecurrentMixer,
}

/// A recurrence over positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecurrentMixer {
    /// Short convolutions.
    ShortConv(ShortConv),
    /// Gated delta nets.
    DeltaNet(DeltaNet),
}

/// A depthwise convolution over a few positions between two gates (LFM2, arXiv 2511.23404): `C ⊙ conv(B ⊙ x)`, all three from one
/// projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShortConv {
    /// Positions that the convolution sees, the own one among them.
    pub(crate) width: usize,
    /// Convolution and both projections have biases.
    pub(crate) bias: bool,
}

/// A gated delta net (arXiv 2412.06464): a convolution over queries, keys and values, then a matrix for each value head that forgets, is
/// corrected by a key's value, and is read by a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeltaNet {
    /// Heads of queries and keys.
    pub(crate) key_heads: usize,
    /// Heads of values; a multiple of those.
    pub(crate) value_heads: usize,
    /// Width of a query and a key.
    pub(crate) key_width: usize,
    /// Width of a value.
    pub(crate) value_width: usize,
    /// Positions that the convolution sees, the own one among them.
    pub(crate) conv_width: usize,
    /// Projections are in two tensors, cut by key heads (Qwen3-Next), else in four.
    pub(crate) fused: bool,
    /// The value heads of a key head are as far apart as there are key heads, else beside each other.
    pub(crate) tiled: bool,
}

impl RecurrentMixer {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a size of 0 or one that no model has, or value heads that are no multiple of the key heads.
    pub(crate) fn check(&self) -> Result<()> {
        let (conv, sizes) = match self {
            Self::ShortConv(conv) => (conv.width, Vec::new()),
            Self::DeltaNet(net) => (
                net.conv_width,
                vec![
                    ("key heads of a delta net", net.key_heads),
                    ("value heads of a delta net", net.value_heads),
                    ("key width of a delta net", net.key_width),
                    ("value width of a delta net", net.value_width),
                ],
            ),
        };
        for (name, size) in sizes {
            if !(1..=MOST).contains(&size) {
                return Err(Error::parameter(name, size, format!("1 to {MOST}")));
            }
        }
        if !(1..=WIDEST_CONV).contains(&conv) {
            return Err(Error::parameter("convolution", conv, format!("1 to {WIDEST_CONV} positions")));
        }
        match self {
            Self::DeltaNet(net) if !net.value_heads.is_multiple_of(net.key_heads) => Err(Error::parameter(
                "value heads of a delta net",
                net.value_heads,
                format!("a multiple of the {} key heads", net.key_heads),
            )),
            _ => Ok(()),
        }
    }

    /// Positions before a sequence's next one that its convolution sees.
    pub(crate) fn tail(&self) -> usize {
        match self {
            Self::ShortConv(conv) => conv.width - 1,
            Self::DeltaNet(net) => net.conv_width - 1,
        }
    }

    /// Channels of the convolution, of a model whose hidden state has `hidden` numbers.
    pub(crate) fn channels(&self, hidden: usize) -> usize {
        match self {
            Self::ShortConv(_) => hidden,
            Self::DeltaNet(net) => net.channels(),
        }
    }

    /// Numbers that a block keeps of one sequence, however long it is.
    pub(crate) fn state_numbers(&self, hidden: usize) -> usize {
        let matrices = match self {
            Self::ShortConv(_) => 0,
            // More than 32 bits count, where sizes are no model's.
            Self::DeltaNet(net) => net.value_heads.saturating_mul(net.key_width).saturating_mul(net.value_width),
        };
        self.tail().saturating_mul(self.channels(hidden)).saturating_add(matrices)
    }

    /// Weights.
    pub(super) fn parameters(&self, hidden: usize) -> usize {
        match self {
            Self::ShortConv(conv) => {
                let biases = if conv.bias { 5 * hidden } else { 0 };
                hidden * (conv.width + 4 * hidden) + biases
            }
            Self::DeltaNet(net) => {
                let inwards = net.channels() + net.values() + 2 * net.value_heads;
                let small = net.channels() * net.conv_width + 2 * net.value_heads + net.value_width;
                hidden * (inwards + net.values()) + small
            }
        }
    }
}

impl DeltaNet {
    /// Numbers of all keys of a position, and of all queries.
    pub(crate) fn keys(&self) -> usize {
        self.key_heads * self.key_width
    }

    /// Numbers of all values of a position.
    pub(crate) fn values(&self) -> usize {
        self.value_heads * self.value_width
    }

    /// Channels of the convolution: queries, keys and values.
    pub(crate) fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }

    /// The key head of a value head.
    pub(crate) fn key_head(&self, value_head: usize) -> usize {
        match self.tiled {
            true => value_head % self.key_heads,
            false => value_head / (self.value_heads / self.key_heads),
        }
    }
}

/// Heads and widths beyond which nothing is a model: states of as many blocks as there may be, `2^16`, are counted below `2^53`.
const MOST: usize = 1 << 12;

/// Positions beyond which a convolution is not short.
pub(crate) const WIDEST_CONV: usize = 64;
