//! What a block keeps of its sequences from one forward pass to the next, as tensors: keys and values of all positions, or what a
//! recurrence needs of them.

use candle_core::Tensor;
use candle_nn::kv_cache::KvCache;

use crate::error::Result;

/// What one block keeps.
#[derive(Debug)]
pub(in crate::decoder) enum KeptTensors {
    /// Keys and values.
    Attention(KvCache),
    /// The state of a recurrence, and as it was when it was marked; `None` before the first token.
    Recurrent { now: Option<Memory>, marked: Option<Memory> },
}

/// The state of a recurrence over the sequences of a batch.
#[derive(Clone, Debug)]
pub(in crate::decoder) struct Memory {
    /// The last positions that a convolution saw, `[sequences, width − 1, channels]`.
    pub(super) tail: Tensor,
    /// A matrix for each head, `[sequences, heads, key width, value width]`, where the recurrence has any.
    pub(super) matrices: Option<Tensor>,
}

impl Memory {
    /// Leaves behind how it came about, as caches of keys and values do: gradients go through one pass, and a text's graph does not grow.
    pub(super) fn detach(&mut self) {
        self.tail = self.tail.detach();
        self.matrices = self.matrices.take().map(|matrices| matrices.detach());
    }
}

/// The dimension of keys and values, `[batch, kv_heads, positions, head_dim]`, that grows.
const POSITION_DIM: usize = 2;

/// Positions that a cache of keys and values grows by.
const KV_POSITIONS: usize = 256;

impl KeptTensors {
    /// Nothing yet.
    pub(super) fn new(is_recurrent: bool) -> Self {
        match is_recurrent {
            true => Self::Recurrent { now: None, marked: None },
            false => Self::Attention(KvCache::new(POSITION_DIM, KV_POSITIONS)),
        }
    }

    /// Whether it goes back to its mark alone, and not to any position.
    pub(in crate::decoder) fn is_recurrent(&self) -> bool {
        matches!(self, Self::Recurrent { .. })
    }

    /// Remembers the state of a recurrence as it is.
    pub(in crate::decoder) fn mark(&mut self) {
        if let Self::Recurrent { now, marked } = self {
            marked.clone_from(now);
        }
    }

    /// Gives a recurrence back the state that was marked.
    pub(in crate::decoder) fn go_back(&mut self) {
        if let Self::Recurrent { now, marked } = self {
            now.clone_from(marked);
        }
    }

    /// Leaves the first `columns` of keys and values; of a recurrence all or nothing.
    pub(in crate::decoder) fn cut(&mut self, columns: usize) -> Result<()> {
        let cache = match self {
            Self::Recurrent { now, .. } => {
                now.take_if(|_| columns == 0);
                return Ok(());
            }
            Self::Attention(cache) => cache,
        };
        if cache.current_seq_len() <= columns {
            return Ok(());
        }
        let (keys, values, dim) = (cache.k()?, cache.v()?, cache.k_cache().dim());
        cache.reset();
        if let (Some(keys), Some(values), 1..) = (keys, values, columns) {
            let kept = |all: Tensor| all.narrow(dim, 0, columns)?.contiguous();
            cache.append(&kept(keys)?, &kept(values)?)?;
        }
        Ok(())
    }
}
