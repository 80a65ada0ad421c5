//! Token ids of one forward pass: sequences of any lengths, the shorter ones filled up at the end with padding.
//!
//! `[sequences, positions]`, row-major. Padding is neither attended to nor routed: it takes no room in experts, counts in no figure, has
//! no expert read and leaves the other tokens' logits what they are. With keys and values kept the next batch goes on with the same
//! sequences, each at its own position; one that has come to its end has no token in it.
//!
//! ```
//! use phase_moe::Batch;
//!
//! let prompts = Batch::new(&[&[5, 6, 7], &[8]])?;
//! assert_eq!((prompts.positions(), prompts.live_tokens()), (3, 4));
//! assert_eq!(prompts.padding(), Some(&[false, false, false, false, true, true][..]));
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of models.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::routing::router::RouteContext;

/// Token ids of one forward pass, `[sequences, positions]`, shorter sequences filled up at the end with padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    ids: Vec<u32>,
    padding: Option<Vec<bool>>,
    lengths: Vec<usize>,
    positions: usize,
}

impl Batch {
    /// From sequences of any lengths; padding takes no room in experts.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is no sequence or an empty one.
    pub fn new(sequences: &[&[u32]]) -> Result<Self> {
        if sequences.is_empty() || sequences.iter().any(|ids| ids.is_empty()) {
            return Err(Error::shape("batch", "sequences of at least one token", "an empty one"));
        }
        Ok(Self::padded(sequences))
    }

    /// One more token of every sequence; `None` for those that have ended.
    ///
    /// # Errors
    /// [`Error::Shape`] when all have.
    pub(crate) fn step(tokens: &[Option<u32>]) -> Result<Self> {
        if tokens.iter().all(Option::is_none) {
            return Err(Error::shape("batch", "a token of at least one sequence", "none"));
        }
        Ok(Self::padded(&tokens.iter().map(Option::as_slice).collect::<Vec<_>>()))
    }

    /// The same tokens in parts of at most `tokens` tokens (padding counted, at least a position of every sequence), first ones first; a
    /// sequence that ends in one part is padding in those after it.
    pub fn chunks(&self, tokens: usize) -> impl Iterator<Item = Self> {
        let positions = self.chunk_positions(tokens);
        (0..self.positions).step_by(positions).map(move |start| {
            let part = |(row, &length): (usize, &usize)| {
                let row = &self.ids[row * self.positions..][..length];
                &row[start.min(length)..(start + positions).min(length)]
            };
            Self::padded(&self.lengths.iter().enumerate().map(part).collect::<Vec<_>>())
        })
    }

    /// The same without sequences but some, of as many positions.
    pub(crate) fn part(&self, sequences: Range<usize>) -> Self {
        let rows = sequences.start * self.positions..sequences.end * self.positions;
        let padding = self.padding.as_ref().map(|padding| padding[rows.clone()].to_vec());
        let (ids, lengths) = (self.ids[rows].to_vec(), self.lengths[sequences].to_vec());
        Self { ids, padding, lengths, positions: self.positions }
    }

    /// Positions of a chunk of at most `tokens` tokens.
    pub(super) fn chunk_positions(&self, tokens: usize) -> usize {
        (tokens / self.sequences()).max(1)
    }

    /// Of which at least one has a token.
    fn padded(sequences: &[&[u32]]) -> Self {
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        let positions = lengths.iter().copied().max().unwrap_or(0);
        let (mut ids, mut padding) = (Vec::new(), Vec::new());
        for sequence in sequences {
            ids.extend_from_slice(sequence);
            ids.resize(ids.len() + positions - sequence.len(), 0);
            padding.extend((0..positions).map(|position| position >= sequence.len()));
        }
        let padding = padding.contains(&true).then_some(padding);
        Self { ids, padding, lengths, positions }
    }

    /// Token ids, row-major; 0 where padded.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// True where padded; `None` when nothing is.
    pub fn padding(&self) -> Option<&[bool]> {
        self.padding.as_deref()
    }

    /// Tokens of each sequence.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Tokens that are not padding.
    pub fn live_tokens(&self) -> u64 {
        self.lengths.iter().map(|&length| length as u64).sum()
    }

    /// Rows.
    pub(crate) fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// Columns.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// What routers may know of this batch.
    pub(crate) fn context(&self) -> RouteContext<'_> {
        RouteContext { token_ids: Some(&self.ids), padding: self.padding(), ..RouteContext::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_every_token_once_and_in_order() {
        let sequences: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6, 7], &[8], &[9, 10, 11, 12]];
        let batch = Batch::new(&sequences).unwrap();
        for positions in [1, 2, 3, 7, 100] {
            let chunks: Vec<Batch> = batch.chunks(3 * positions + 2).collect();
            assert_eq!(chunks.len(), 7usize.div_ceil(positions));
            for (row, ids) in sequences.iter().enumerate() {
                let part = |chunk: &Batch| chunk.ids()[row * chunk.positions()..][..chunk.lengths()[row]].to_vec();
                assert_eq!(chunks.iter().flat_map(part).collect::<Vec<_>>(), *ids);
            }
        }
        assert_eq!(batch.chunks(21).next().unwrap(), batch);
    }

    #[test]
    fn batches_without_a_token_are_refused() {
        for sequences in [&[][..], &[&[][..]], &[&[1][..], &[]]] {
            let error = Batch::new(sequences).unwrap_err().to_string();
            assert_eq!(error, "batch: expected sequences of at least one token, got an empty one");
        }
        let error = Batch::step(&[None, None]).unwrap_err().to_string();
        assert_eq!(error, "batch: expected a token of at least one sequence, got none");
        assert!(Batch::step(&[]).is_err());
    }
}
