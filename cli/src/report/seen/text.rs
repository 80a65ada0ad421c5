//! The text that is shown: which tokens of which batch, as text, and which kind of text each sequence is of.
//!
//! Knows nothing of routers.

use std::collections::HashMap;

use phase_moe::eval::EvalText;
use phase_moe::{Batch, Model, Result};
use serde::Serialize;

/// Tokens by which a sequence is known again.
const KNOWN_BY: usize = 16;

/// The text as the page has it.
#[derive(Serialize)]
pub struct ShownText {
    /// Pieces of text, one a token.
    pub tokens: Vec<String>,
    /// Where each sequence begins, and which text it is of.
    sequences: Vec<usize>,
    kinds: Vec<String>,
    /// Tokens in all, shown or not.
    total: u64,
    /// Where a generated text begins.
    pub new_from: Option<usize>,
    /// Rows of each batch that are shown.
    #[serde(skip)]
    rows: Vec<Vec<usize>>,
    /// The kind of each row of each batch; `None` for padding.
    #[serde(skip)]
    kind_of: Vec<Vec<Option<usize>>>,
}

impl ShownText {
    /// At most `most` tokens, shared evenly between the kinds of text: of each kind the end of its first batches, since what drops by arrival
    /// drops there.
    pub fn of_batches(model: &Model, texts: &[EvalText], batches: &[Batch], most: usize) -> Result<Self> {
        let start = model.sequence_start().len();
        let kinds = known(texts, batches, start);
        let mut left = vec![most / texts.len().max(1); texts.len()];
        let mut shown = Self::empty(batches.iter().map(Batch::live_tokens).sum());
        for batch in batches {
            let (ids, positions) = (batch.ids(), batch.positions());
            let (mut rows, mut kind_of) = (Vec::new(), vec![None; ids.len()]);
            let mut sequences = Vec::new();
            for sequence in 0..ids.len().checked_div(positions).unwrap_or(0) {
                let all = sequence * positions..(sequence + 1) * positions;
                let live: Vec<usize> =
                    all.filter(|&row| !batch.padding().is_some_and(|padding| padding[row])).collect();
                let first: Vec<u32> = live.iter().skip(start).take(KNOWN_BY).map(|&row| ids[row]).collect();
                let Some(&kind) = kinds.get(&first) else { continue };
                live.iter().for_each(|&row| kind_of[row] = Some(kind));
                sequences.push((kind, live));
            }
            // From the last sequence of the batch on, as long as there is room; then in their order again.
            let mut taken: Vec<(usize, &[usize], usize)> = Vec::new();
            for (kind, live) in sequences.iter().rev() {
                let count = live.len().min(left[*kind]);
                left[*kind] -= count;
                taken.extend((count > 0).then_some((*kind, live.as_slice(), live.len() - count)));
            }
            for (kind, live, from) in taken.into_iter().rev() {
                let sequence: Vec<u32> = live.iter().map(|&row| ids[row]).collect();
                shown.push(model, &sequence[..from], &sequence[from..], &texts[kind].name)?;
                rows.extend(&live[from..]);
            }
            shown.rows.push(rows);
            shown.kind_of.push(kind_of);
        }
        Ok(shown)
    }

    /// The first `most` of these tokens, which are one text; `new_from` of them were there before it was continued.
    pub fn of_ids(model: &Model, ids: &[u32], name: &str, new_from: Option<usize>, most: usize) -> Result<Self> {
        let mut shown = Self::empty(ids.len() as u64);
        shown.push(model, &[], &ids[..ids.len().min(most)], name)?;
        shown.new_from = new_from;
        Ok(shown)
    }

    fn empty(total: u64) -> Self {
        let (tokens, sequences, kinds) = (Vec::new(), Vec::new(), Vec::new());
        Self { tokens, sequences, kinds, total, new_from: None, rows: Vec::new(), kind_of: Vec::new() }
    }

    /// A piece of a sequence, and what of it came before.
    fn push(&mut self, model: &Model, before: &[u32], ids: &[u32], kind: &str) -> Result<()> {
        self.sequences.push(self.tokens.len());
        self.kinds.push(kind.into());
        let mut continuation = model.continuation(before)?;
        for &id in ids {
            self.tokens.push(continuation.push(id)?);
        }
        Ok(())
    }

    /// Rows of a batch that are shown.
    pub fn rows(&self, batch: usize) -> &[usize] {
        self.rows.get(batch).map_or(&[], Vec::as_slice)
    }

    /// The kind of each row of a batch.
    pub fn kinds(&self, batch: usize) -> &[Option<usize>] {
        self.kind_of.get(batch).map_or(&[], Vec::as_slice)
    }
}

/// Which text a sequence with these first tokens is of.
fn known(texts: &[EvalText], batches: &[Batch], start: usize) -> HashMap<Vec<u32>, usize> {
    // All sequences are as long as the longest, but for the last of a text.
    let longest = batches.iter().map(Batch::positions).max().unwrap_or(0);
    let length = longest.saturating_sub(start).max(1);
    let mut kinds = HashMap::new();
    for (kind, text) in texts.iter().enumerate() {
        for sequence in text.ids.chunks(length) {
            // One that was cut short by a limit on tokens is known by what is left of it.
            for end in 1..=sequence.len().min(KNOWN_BY) {
                kinds.entry(sequence[..end].to_vec()).or_insert(kind);
            }
        }
    }
    kinds
}
