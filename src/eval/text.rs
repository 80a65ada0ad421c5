//! Evaluation text: token ids cut into sequences, sequences grouped into batches.
//!
//! Knows nothing of models or routers.

use crate::decoder::Batch;
use crate::error::{Error, Result};
use crate::routing::stream::Stream;

/// Tokens per sequence; there is no context across sequences.
pub const SEQUENCE_TOKENS: usize = 256;

/// One text, already in token ids.
#[derive(Clone, Debug)]
pub struct EvalText {
    /// What it is: the file's name.
    pub name: String,
    /// Its tokens.
    pub ids: Vec<u32>,
}

/// Which sequences share a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mixing {
    /// Sequences of one text only: what a server sees when one topic comes at a time.
    OneKind,
    /// One sequence of each text in turn.
    Mixed,
}

/// How texts become batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Tokens of all texts together, shared evenly; `None` takes all there are.
    pub tokens: Option<usize>,
    /// Tokens per forward pass.
    pub batch_tokens: usize,
    /// Which sequences share a batch.
    pub mixing: Mixing,
    /// Seed that shuffles the sequences of each text first, so that others meet in a batch; `None` keeps their order.
    pub shuffle: Option<u64>,
}

impl Default for Batching {
    fn default() -> Self {
        Self { tokens: None, batch_tokens: 512, mixing: Mixing::OneKind, shuffle: None }
    }
}

impl Batching {
    /// Cuts `texts` into sequences of [`SEQUENCE_TOKENS`] (or `batch_tokens`, if that is less) and groups them.
    ///
    /// The last sequence of a text may be shorter; one of a single token is left out, because it predicts nothing.
    ///
    /// # Errors
    /// [`Error::Parameter`] for `batch_tokens` below 2 or above [`SEQUENCE_TOKENS`] and no multiple of it, and for texts of
    /// fewer than two tokens in all.
    pub fn batches(&self, texts: &[EvalText]) -> Result<Vec<Batch>> {
        if self.batch_tokens < 2 {
            return Err(Error::parameter("batch tokens", self.batch_tokens, "at least 2"));
        }
        let length = SEQUENCE_TOKENS.min(self.batch_tokens);
        if !self.batch_tokens.is_multiple_of(length) {
            let expected = format!("at most {SEQUENCE_TOKENS} or a multiple of it");
            return Err(Error::parameter("batch tokens", self.batch_tokens, expected));
        }
        let per_batch = self.batch_tokens / length;
        let shares = self.shares(texts);
        let mut sequences: Vec<Vec<&[u32]>> = texts
            .iter()
            .zip(shares)
            .map(|(text, share)| text.ids[..share].chunks(length).filter(|ids| ids.len() > 1).collect())
            .collect();
        if let Some(seed) = self.shuffle {
            sequences.iter_mut().zip(0..).for_each(|(text, key)| Stream::new(seed, key).shuffle(text));
        }
        let batches = match self.mixing {
            Mixing::OneKind => {
                sequences.iter().flat_map(|text| text.chunks(per_batch)).map(Batch::new).collect::<Result<Vec<_>>>()?
            }
            Mixing::Mixed => {
                let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
                let turns = |turn: usize| sequences.iter().filter_map(move |text| text.get(turn).copied());
                let interleaved: Vec<&[u32]> = (0..longest).flat_map(turns).collect();
                interleaved.chunks(per_batch).map(Batch::new).collect::<Result<Vec<_>>>()?
            }
        };
        if batches.is_empty() {
            return Err(Error::parameter("tokens of evaluation text", "below 2", "at least 2 in one text"));
        }
        Ok(batches)
    }

    /// Tokens taken of each text: an even share of the limit, what short texts leave going to the longer ones.
    fn shares(&self, texts: &[EvalText]) -> Vec<usize> {
        let mut shares: Vec<usize> = texts.iter().map(|text| text.ids.len()).collect();
        let Some(mut left) = self.tokens else { return shares };
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&text| shares[text]);
        for (taken, &text) in order.iter().enumerate() {
            shares[text] = shares[text].min(left.div_ceil(texts.len() - taken));
            left -= shares[text];
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lengths: &[usize]) -> Vec<EvalText> {
        let text =
            |(kind, &length): (usize, &usize)| EvalText { name: kind.to_string(), ids: vec![kind as u32; length] };
        lengths.iter().enumerate().map(text).collect()
    }

    fn live(batch: &Batch) -> usize {
        batch.ids().len() - batch.padding().map_or(0, |padding| padding.iter().filter(|&&pad| pad).count())
    }

    #[test]
    fn every_token_is_in_one_batch_and_kinds_stay_apart() {
        let batches = Batching::default().batches(&texts(&[1000, 300])).unwrap();
        assert_eq!(batches.iter().map(live).collect::<Vec<_>>(), [512, 488, 300]);
        assert!(batches[0].ids().iter().all(|&id| id == 0));
        assert_eq!(batches[2].padding().unwrap().iter().filter(|&&pad| pad).count(), 212);
    }

    #[test]
    fn mixed_batches_take_turns() {
        let batching = Batching { mixing: Mixing::Mixed, ..Batching::default() };
        let batches = batching.batches(&texts(&[512, 512])).unwrap();
        assert_eq!((batches[0].ids()[0], batches[0].ids()[256]), (0, 1));
    }

    #[test]
    fn the_limit_is_shared_evenly_and_met() {
        for (limit, expected) in [(300, [100, 100, 100]), (1000, [100, 450, 450]), (5000, [100, 600, 900])] {
            let batching = Batching { tokens: Some(limit), ..Batching::default() };
            assert_eq!(batching.shares(&texts(&[100, 600, 900])), expected);
        }
    }

    #[test]
    fn a_shuffle_moves_whole_sequences_within_their_text() {
        let text = |first: u32| EvalText { name: first.to_string(), ids: (first..first + 2100).collect() };
        let starts = |shuffle| {
            let batches = Batching { shuffle, ..Batching::default() }.batches(&[text(0), text(1 << 16)]).unwrap();
            let rows = |batch: &Batch| {
                let rows = batch.ids().chunks(batch.positions()).map(|row| row[0]).collect::<Vec<_>>();
                assert!(rows.iter().all(|id| id >> 16 == rows[0] >> 16), "one kind a batch");
                rows
            };
            (batches.iter().flat_map(rows).collect::<Vec<_>>(), batches.iter().map(live).sum::<usize>())
        };
        let (plain, shuffled) = (starts(None), starts(Some(1)));
        assert!(plain.0.is_sorted() && !shuffled.0.is_sorted());
        assert_eq!(starts(Some(1)), shuffled);
        assert_ne!(starts(Some(2)), shuffled);
        let sorted = |(mut rows, tokens): (Vec<u32>, usize)| {
            rows.sort_unstable();
            (rows, tokens)
        };
        assert_eq!(sorted(shuffled), plain);
    }

    #[test]
    fn too_little_text_is_an_error() {
        assert!(Batching::default().batches(&texts(&[1, 0])).is_err());
        assert!(Batching::default().batches(&[]).is_err());
        for batch_tokens in [0, 1, 300, 700] {
            assert!(
                Batching { batch_tokens, ..Batching::default() }.batches(&texts(&[100])).is_err(),
                "{batch_tokens}"
            );
        }
        assert_eq!(Batching { batch_tokens: 2, ..Batching::default() }.batches(&texts(&[4])).unwrap().len(), 2);
    }
}
