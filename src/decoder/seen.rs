//! Which tokens a decoder has seen: where in the kept keys and values each sequence has its own, and which of them a new one may look at.
//!
//! All sequences of a batch write into the same columns of keys and values, so those that had padding there have holes. A token's
//! position is the number of its sequence's tokens before it, holes not counted; it sees the columns before its own that are none.
//! Shapes: columns `[sequences, seen]`, masks `[positions, columns]` where no sequence has a hole, else
//! `[sequences, 1, positions, columns]`: 0 where a token may look, −∞ where it may not.
//!
//! Knows nothing of what keys and values are.

use candle_core::{DType, Device, Tensor};

use super::batch::Batch;
use crate::error::{Error, Result};

/// The tokens of every sequence so far; none at first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    /// Columns, those of padding too.
    columns: usize,
    /// True for columns of padding, `[columns]` for each sequence; empty while there are none.
    holes: Vec<Vec<bool>>,
}

impl Seen {
    /// Tokens of each sequence.
    pub(super) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The most tokens that a sequence has.
    pub(super) fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// The position of each sequence's first token in `batch`.
    ///
    /// # Errors
    /// [`Error::Shape`] for other sequences than so far, [`Error::Parameter`] for one that becomes longer than `max_positions`.
    pub(super) fn starts(&self, batch: &Batch, max_positions: usize) -> Result<Vec<usize>> {
        let starts = if self.columns == 0 { vec![0; batch.sequences()] } else { self.lengths.clone() };
        if starts.len() != batch.sequences() {
            let expected = format!("the {} sequences whose keys and values are kept", starts.len());
            return Err(Error::shape("batch", expected, batch.sequences()));
        }
        let longest = starts.iter().zip(batch.lengths()).map(|(start, length)| start + length).max().unwrap_or(0);
        if longest > max_positions {
            return Err(Error::parameter("text length", longest, format!("at most the model's {max_positions}")));
        }
        Ok(starts)
    }

    /// What the tokens of `batch` may look at, in the columns so far and their own: at their sequence's tokens before them and themselves,
    /// of them the last `window`; `None` for everything.
    pub(super) fn mask(
        &self,
        batch: &Batch,
        window: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Option<Tensor>> {
        let (positions, columns) = (batch.positions(), self.columns + batch.positions());
        if positions == 1 && self.holes.is_empty() && window.is_none_or(|window| columns <= window) {
            return Ok(None);
        }
        let mask = match self.holes.as_slice() {
            [] => Tensor::from_vec(self.cells(&[], positions, window), (positions, columns), device)?,
            holes => {
                let cells: Vec<f32> = holes.iter().flat_map(|holes| self.cells(holes, positions, window)).collect();
                Tensor::from_vec(cells, (holes.len(), 1, positions, columns), device)?
            }
        };
        Ok(Some(mask.to_dtype(dtype)?))
    }

    /// The mask of one sequence with `holes` among the columns so far.
    fn cells(&self, holes: &[bool], positions: usize, window: Option<usize>) -> Vec<f32> {
        let columns = self.columns + positions;
        // Padding comes after a sequence's tokens, so that of this batch is out of their sight; it sees itself, for a row of nothing but
        // −∞ has no softmax.
        let hole = |column: usize| holes.get(column).copied().unwrap_or(false);
        let mut next = 0..;
        let places: Vec<usize> =
            (0..columns).map(|column| if hole(column) { next.start } else { next.next().unwrap_or(0) }).collect();
        let sees = |own: usize, column: usize| {
            column <= own
                && !hole(column)
                && window.is_none_or(|window| places[own] < places[column].saturating_add(window))
        };
        let cell = |own: usize, column: usize| if sees(own, column) { 0.0 } else { f32::NEG_INFINITY };
        (self.columns..columns).flat_map(|own| (0..columns).map(move |column| cell(own, column))).collect()
    }

    /// Columns so far, those of padding too.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Forgets all but the first `tokens` tokens of each sequence: what others have in the same columns leaves a hole.
    pub(super) fn truncate(&mut self, tokens: usize) {
        if tokens == 0 {
            return *self = Self::default();
        }
        self.lengths.iter_mut().for_each(|length| *length = tokens.min(*length));
        if self.holes.is_empty() {
            self.columns = self.columns.min(tokens);
            return;
        }
        for holes in &mut self.holes {
            let mut next = 0..;
            holes.iter_mut().filter(|hole| !**hole).for_each(|hole| *hole = next.next() >= Some(tokens));
        }
        let is_used = |&column: &usize| self.holes.iter().any(|holes| !holes[column]);
        self.columns = (0..self.columns).rev().find(is_used).map_or(0, |column| column + 1);
        self.holes.iter_mut().for_each(|holes| holes.truncate(self.columns));
    }

    /// Takes note of `batch`, whose keys and values are kept now.
    pub(super) fn add(&mut self, batch: &Batch) {
        let sequences = batch.sequences();
        self.lengths.resize(sequences, 0);
        if self.holes.is_empty() && batch.padding().is_some() {
            self.holes = vec![vec![false; self.columns]; sequences];
        }
        for (holes, &length) in self.holes.iter_mut().zip(batch.lengths()) {
            holes.extend((0..batch.positions()).map(|position| position >= length));
        }
        self.lengths.iter_mut().zip(batch.lengths()).for_each(|(seen, length)| *seen += length);
        self.columns += batch.positions();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windowed(seen: &Seen, batch: &Batch, window: Option<usize>) -> Option<Vec<Vec<bool>>> {
        let mask = seen.mask(batch, window, DType::F32, &Device::Cpu).unwrap()?;
        let columns = *mask.dims().last().unwrap();
        let cells: Vec<f32> = mask.flatten_all().unwrap().to_vec1().unwrap();
        Some(cells.chunks(columns).map(|row| row.iter().map(|&cell| cell == 0.0).collect()).collect())
    }

    fn mask(seen: &Seen, batch: &Batch) -> Option<Vec<Vec<bool>>> {
        windowed(seen, batch, None)
    }

    #[test]
    fn a_window_counts_tokens_and_not_holes() {
        let (mut seen, prompts) = (Seen::default(), Batch::new(&[&[1, 2, 3], &[4]]).unwrap());
        let two = [[true, false, false], [true, true, false], [false, true, true]];
        assert_eq!(windowed(&seen, &prompts, Some(2)).unwrap(), two);
        seen.add(&prompts);
        let step = Batch::step(&[Some(5), Some(6)]).unwrap();
        let masks = [[false, false, true, true], [true, false, false, true]];
        assert_eq!(windowed(&seen, &step, Some(2)).unwrap(), masks);
        let mut alone = Seen::default();
        alone.add(&Batch::new(&[&[1, 2, 3]]).unwrap());
        let step = Batch::new(&[&[7]]).unwrap();
        assert_eq!(windowed(&alone, &step, Some(4)), None);
        assert_eq!(windowed(&alone, &step, Some(3)).unwrap(), [[false, true, true, true]]);
    }

    #[test]
    fn tokens_see_their_own_sequence_up_to_themselves() {
        let (mut seen, prompts) = (Seen::default(), Batch::new(&[&[1, 2, 3], &[4]]).unwrap());
        assert_eq!(seen.starts(&prompts, 9).unwrap(), [0, 0]);
        let causal = [[true, false, false], [true, true, false], [true, true, true]];
        assert_eq!(mask(&seen, &prompts).unwrap(), causal);
        seen.add(&prompts);
        assert_eq!(seen.longest(), 3);
        let step = Batch::step(&[None, Some(5)]).unwrap();
        assert_eq!(seen.starts(&step, 9).unwrap(), [3, 1]);
        assert_eq!(mask(&seen, &step).unwrap(), [[true; 4], [true, false, false, true]]);
        seen.add(&step);
        let more = Batch::new(&[&[6], &[7, 8]]).unwrap();
        assert_eq!(seen.starts(&more, 9).unwrap(), [3, 2]);
        let second = [[true, false, false, true, true, false], [true, false, false, true, true, true]];
        assert_eq!(mask(&seen, &more).unwrap()[2..], second);
    }

    #[test]
    fn what_is_cut_off_leaves_holes_only_beside_what_is_kept() {
        let (mut seen, prompts) = (Seen::default(), Batch::new(&[&[1, 2, 3], &[4]]).unwrap());
        seen.add(&prompts);
        seen.add(&Batch::new(&[&[5], &[6]]).unwrap());
        // Columns: 1 2 3 5 of the first, 4 _ _ 6 of the second.
        let cut = |tokens: usize| {
            let mut cut = seen.clone();
            cut.truncate(tokens);
            (cut.lengths.clone(), cut.columns, cut.holes.clone())
        };
        assert_eq!(cut(9), (seen.lengths.clone(), seen.columns, seen.holes.clone()));
        assert_eq!(cut(3).0, [3, 2]);
        assert_eq!(cut(3).1, 4, "the second has its last token there");
        assert_eq!(cut(3).2, [[false, false, false, true], [false, true, true, false]]);
        assert_eq!(cut(1), (vec![1, 1], 1, vec![vec![false], vec![false]]));
        assert_eq!(cut(0), (vec![], 0, vec![]));
        let mut alone = Seen::default();
        alone.add(&Batch::new(&[&[1, 2, 3]]).unwrap());
        alone.truncate(2);
        assert_eq!((alone.lengths.as_slice(), alone.columns, alone.holes.len()), ([2].as_slice(), 2, 0));
    }

    #[test]
    fn one_sequence_has_no_holes_and_a_step_no_mask() {
        let (mut seen, prompt) = (Seen::default(), Batch::new(&[&[1, 2]]).unwrap());
        seen.add(&prompt);
        assert_eq!(mask(&seen, &Batch::new(&[&[3]]).unwrap()), None);
        let more = mask(&seen, &prompt).unwrap();
        assert_eq!(more, [[true, true, true, false], [true; 4]]);
    }

    #[test]
    fn other_sequences_and_texts_too_long_are_refused() {
        let mut seen = Seen::default();
        seen.add(&Batch::new(&[&[1, 2], &[3]]).unwrap());
        let error = |batch: &Batch| seen.starts(batch, 3).unwrap_err().to_string();
        assert_eq!(
            error(&Batch::new(&[&[1]]).unwrap()),
            "batch: expected the 2 sequences whose keys and values are kept, got 1"
        );
        assert_eq!(
            error(&Batch::new(&[&[1, 2], &[1, 2]]).unwrap()),
            "text length is 4: expected at most the model's 3"
        );
        assert!(seen.starts(&Batch::new(&[&[1], &[1, 2]]).unwrap(), 3).is_ok());
    }
}
