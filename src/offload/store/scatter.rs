//! Numbers that lie otherwise in their file than in memory: they are read beside the slab, some at a time, and put where they go.
//!
//! Number `i` of those in the file, `bytes` of it long, goes to `start + i / run · steps[0] + i % run · steps[1]`.

use std::ops::Range;

use super::piece::{Layout, Piece};
use crate::experts::mxfp4;

/// Where the numbers of a run of bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scatter {
    /// Of the slab.
    pub(super) into: Range<usize>,
    /// Bytes of a number: 1, 2, 4 or 16.
    pub(super) bytes: usize,
    /// How many there are.
    pub(super) count: usize,
    start: usize,
    run: usize,
    steps: [usize; 2],
}

impl Scatter {
    /// Where a piece of so many bytes in memory lies in its files, if not row by row: sources, offsets and where numbers go.
    pub(super) fn of(piece: &Piece, size: usize) -> Vec<(usize, u64, Self)> {
        let (into, count) = (0..size, piece.rows.saturating_mul(piece.columns));
        match piece.layout {
            Layout::Rows => Vec::new(),
            Layout::Columns => {
                let bytes = piece.dtype.block_bytes();
                let steps = [bytes, bytes * piece.columns];
                vec![(piece.source, piece.offset, Self { into, bytes, count, start: 0, run: piece.rows.max(1), steps })]
            }
            Layout::Apart { source, scales } => {
                let (count, steps) = (count / mxfp4::WEIGHTS, [1 + mxfp4::BLOCK_BYTES, 0]);
                let blocks = Self { into, bytes: mxfp4::BLOCK_BYTES, count, start: 1, run: 1, steps };
                let ones = Self { bytes: 1, start: 0, ..blocks.clone() };
                vec![(piece.source, piece.offset, blocks), (source, scales, ones)]
            }
        }
    }

    /// The same into other bytes of a slab.
    pub(super) fn into_bytes_of(self, into: Range<usize>) -> Self {
        Self { into, ..self }
    }

    /// Puts bytes of a file, the first one `at` from the beginning of the numbers, into the slab.
    pub(super) fn put(&self, bytes: &[u8], at: usize, slab: &mut [u8]) {
        let into = &mut slab[self.into.clone()];
        match self.bytes {
            1 => self.put_as::<1>(bytes, at, into),
            2 => self.put_as::<2>(bytes, at, into),
            4 => self.put_as::<4>(bytes, at, into),
            _ => self.put_as::<16>(bytes, at, into),
        }
    }

    fn put_as<const BYTES: usize>(&self, mut bytes: &[u8], at: usize, into: &mut [u8]) {
        let (number, mut done) = (at / BYTES, at % BYTES);
        let (mut outer, mut inner) = (number / self.run, number % self.run);
        while !bytes.is_empty() {
            let to = self.start + outer * self.steps[0] + inner * self.steps[1];
            match bytes.split_first_chunk::<BYTES>() {
                Some((number, rest)) if done == 0 => {
                    into[to..to + BYTES].copy_from_slice(number);
                    bytes = rest;
                }
                // What was read ends within a number, or begins there.
                _ => {
                    let (part, rest) = bytes.split_at(bytes.len().min(BYTES - done));
                    into[to + done..to + done + part.len()].copy_from_slice(part);
                    (bytes, done) = (rest, 0);
                }
            }
            inner += 1;
            if inner == self.run {
                (outer, inner) = (outer + 1, 0);
            }
        }
    }
}
