//! Evaluation text: token ids cut into sequences, sequences grouped into batches.
//!
//! Knows nothing of models or routers.

use crate::decoder::Batch;
use crate::error::{Error, Result};
use crate::routing::stream::Stream;

/// Tokens per sequence; there is no context across sequences.
const SEQUENCE_TOKENS: usize = 256;

/// One text, already in token ids.
#[derive(Clone, Debug)]
pub struct EvalText {
    /// What it is: the file's name.
    pub name: String,
    /// Its tokens.
    pub ids: Vec<u32>,
}

/// What runs without any context but its own.
#[derive(Clone, Debug)]
struct Sequence {
    /// The number of its text.
    kind: u32,
    ids: Vec<u32>,
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
    /// Cuts `texts` into sequences of 256 tokens (or `batch_tokens`, if that is less) and groups them.
    ///
    /// Every sequence begins with the tokens `start` ([`Model::sequence_start`](crate::decoder::model::Model::sequence_start)), which
    /// count in its length and in [`Batching::tokens`]. The last one of a text may be shorter; one of a single token is left out,
    /// because it predicts nothing.
    ///
    /// # Errors
    /// [`Error::Parameter`] for `batch_tokens` below 2, above 256 and no multiple of it, or so few that `start` leaves no room for a token
    /// of text, and for texts of fewer than two tokens in all.
    pub fn batches(&self, start: &[u32], texts: &[EvalText]) -> Result<Vec<Batch>> {
        let batch = |group: Vec<Sequence>| {
            Batch::new(&group.iter().map(|sequence| sequence.ids.as_slice()).collect::<Vec<_>>())
        };
        self.grouped(start, texts)?.into_iter().map(batch).collect()
    }

    /// Of every token of [`Batching::batches`], padding not among them, the number of its text.
    ///
    /// # Errors
    /// As [`Batching::batches`].
    pub fn kinds(&self, start: &[u32], texts: &[EvalText]) -> Result<Vec<u32>> {
        let sequences = self.grouped(start, texts)?.into_iter().flatten();
        Ok(sequences.flat_map(|Sequence { kind, ids }| std::iter::repeat_n(kind, ids.len())).collect())
    }

    /// The sequences of each batch.
    fn grouped(&self, start: &[u32], texts: &[EvalText]) -> Result<Vec<Vec<Sequence>>> {
        if self.batch_tokens < 2 {
            return Err(Error::parameter("batch tokens", self.batch_tokens, "at least 2"));
        }
        let length = SEQUENCE_TOKENS.min(self.batch_tokens);
        if !self.batch_tokens.is_multiple_of(length) {
            let expected = format!("at most {SEQUENCE_TOKENS} or a multiple of it");
            return Err(Error::parameter("batch tokens", self.batch_tokens, expected));
        }
        if length <= start.len() {
            let expected = format!("more than the {} that a text of this model begins with", start.len());
            return Err(Error::parameter("batch tokens", length, expected));
        }
        let per_batch = self.batch_tokens / length;
        let sequence = |ids: &[u32]| [start, ids].concat();
        let cut = |text: &EvalText| text.ids.chunks(length - start.len()).map(sequence).collect();
        let mut sequences: Vec<Vec<Vec<u32>>> = texts.iter().map(cut).collect();
        let lengths: Vec<usize> = sequences.iter().map(|text| text.iter().map(Vec::len).sum()).collect();
        for (text, share) in sequences.iter_mut().zip(self.shares(&lengths)) {
            text.truncate(share.div_ceil(length));
            if let Some(last) = text.last_mut() {
                last.truncate(share - (share - 1) / length * length);
            }
            text.retain(|ids| ids.len() > start.len().max(1));
        }
        if let Some(seed) = self.shuffle {
            sequences.iter_mut().zip(0..).for_each(|(text, key)| Stream::new(seed, key).shuffle(text));
        }
        let of_text = |(text, kind): (Vec<Vec<u32>>, u32)| -> Vec<Sequence> {
            text.into_iter().map(|ids| Sequence { kind, ids }).collect()
        };
        let mut texts: Vec<Vec<Sequence>> = sequences.into_iter().zip(0..).map(of_text).collect();
        if self.mixing == Mixing::Mixed {
            let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
            let mut each: Vec<_> = texts.into_iter().map(Vec::into_iter).collect();
            let turn = |_| each.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>();
            texts = vec![(0..longest).flat_map(turn).collect()];
        }
        let groups = texts.iter().flat_map(|text| text.chunks(per_batch)).map(<[Sequence]>::to_vec);
        let groups: Vec<Vec<Sequence>> = groups.collect();
        if groups.is_empty() {
            return Err(Error::parameter("tokens of evaluation text", "below 2", "at least 2 in one text"));
        }
        Ok(groups)
    }

    /// Tokens taken of each text, whose lengths these are: an even share of the limit, what short texts leave going to the longer
    /// ones.
    fn shares(&self, lengths: &[usize]) -> Vec<usize> {
        let mut shares = lengths.to_vec();
        let Some(mut left) = self.tokens else { return shares };
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&text| shares[text]);
        for (taken, &text) in order.iter().enumerate() {
            shares[text] = shares[text].min(left.div_ceil(lengths.len() - taken));
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
        let batches = Batching::default().batches(&[], &texts(&[1000, 300])).unwrap();
        assert_eq!(batches.iter().map(live).collect::<Vec<_>>(), [512, 488, 300]);
        assert!(batches[0].ids().iter().all(|&id| id == 0));
        assert_eq!(batches[2].padding().unwrap().iter().filter(|&&pad| pad).count(), 212);
    }

    #[test]
    fn every_sequence_begins_with_the_start() {
        let text = EvalText { name: "a".into(), ids: (1..=600).collect() };
        let rows = |batching: Batching, start: &[u32], text: &EvalText| -> Vec<Vec<u32>> {
            let batches = batching.batches(start, std::slice::from_ref(text)).unwrap();
            let rows = |batch: &Batch| {
                let rows = batch.ids().chunks(batch.positions()).zip(batch.lengths());
                rows.map(|(row, &length)| row[..length].to_vec()).collect::<Vec<_>>()
            };
            batches.iter().flat_map(rows).collect()
        };
        let all = rows(Batching::default(), &[0, 0], &text);
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [256, 256, 94]);
        assert!(all.iter().all(|row| row[..2] == [0, 0] && row[2..].iter().all(|&id| id > 0)));
        assert_eq!(all.iter().flat_map(|row| &row[2..]).copied().collect::<Vec<_>>(), text.ids);
        // The limit counts them, and a sequence of nothing else is none.
        for (tokens, lengths) in
            [(600, vec![256, 256, 88]), (515, vec![256, 256, 3]), (514, vec![256, 256]), (9, vec![9])]
        {
            let limited = rows(Batching { tokens: Some(tokens), ..Batching::default() }, &[0, 0], &text);
            assert_eq!(limited.iter().map(Vec::len).collect::<Vec<_>>(), lengths, "{tokens}");
        }
        // One token of text is predicted from the start.
        let one = EvalText { name: "one".into(), ids: vec![7] };
        assert_eq!(rows(Batching::default(), &[0], &one), [[0, 7]]);
        let small = Batching { batch_tokens: 2, ..Batching::default() };
        assert_eq!(rows(small, &[0], &one), [[0, 7]]);
        let error = small.batches(&[0, 0], &[one]).unwrap_err().to_string();
        assert_eq!(error, "batch tokens is 2: expected more than the 2 that a text of this model begins with");
    }

    #[test]
    fn mixed_batches_take_turns() {
        let batching = Batching { mixing: Mixing::Mixed, ..Batching::default() };
        let batches = batching.batches(&[], &texts(&[512, 512])).unwrap();
        assert_eq!((batches[0].ids()[0], batches[0].ids()[256]), (0, 1));
    }

    #[test]
    fn every_token_is_of_its_text() {
        for mixing in [Mixing::OneKind, Mixing::Mixed] {
            let (batching, texts) =
                (Batching { mixing, shuffle: Some(1), ..Batching::default() }, texts(&[1000, 300, 2]));
            // Ids are the texts' numbers, the start is 9.
            let batches = batching.batches(&[9], &texts).unwrap();
            let rows = batches.iter().flat_map(|batch| {
                let rows = batch.ids().chunks(batch.positions()).zip(batch.lengths());
                rows.flat_map(|(row, &length)| vec![row[1]; length]).collect::<Vec<_>>()
            });
            assert_eq!(batching.kinds(&[9], &texts).unwrap(), rows.collect::<Vec<_>>(), "{mixing:?}");
        }
    }

    #[test]
    fn the_limit_is_shared_evenly_and_met() {
        for (limit, expected) in [(300, [100, 100, 100]), (1000, [100, 450, 450]), (5000, [100, 600, 900])] {
            let batching = Batching { tokens: Some(limit), ..Batching::default() };
            assert_eq!(batching.shares(&[100, 600, 900]), expected);
        }
    }

    #[test]
    fn a_shuffle_moves_whole_sequences_within_their_text() {
        let text = |first: u32| EvalText { name: first.to_string(), ids: (first..first + 2100).collect() };
        let starts = |shuffle| {
            let batches = Batching { shuffle, ..Batching::default() }.batches(&[], &[text(0), text(1 << 16)]).unwrap();
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
        assert!(Batching::default().batches(&[], &texts(&[1, 0])).is_err());
        assert!(Batching::default().batches(&[], &[]).is_err());
        for batch_tokens in [0, 1, 300, 700] {
            assert!(
                Batching { batch_tokens, ..Batching::default() }.batches(&[], &texts(&[100])).is_err(),
                "{batch_tokens}"
            );
        }
        assert_eq!(Batching { batch_tokens: 2, ..Batching::default() }.batches(&[], &texts(&[4])).unwrap().len(), 2);
    }
}
