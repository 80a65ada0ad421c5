//! Numbers that lie otherwise in their file than in memory: they are read beside the slab, some at a time, and put where they go.
//!
//! Number `i` of those in the file, `bytes` of it long, goes to `start + i / run · steps[0] + i % run · steps[1]`.

use std::ops::Range;

use safetensors::Dtype as StoredDtype;

use super::{Part, Piece};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::experts::mxfp4;

/// How a piece's numbers lie in its file; in memory they lie row by row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Row by row, so that they are read to where they stay.
    #[default]
    Rows,
    /// Column by column.
    Columns,
    /// `mxfp4` as Hugging Face writes it, row by row: blocks of sixteen bytes, and their scales by themselves.
    Apart {
        /// Which of the store's sources the scales are in.
        source: usize,
        /// Where in the source they begin.
        scales: u64,
    },
}

impl Piece {
    /// Expert `expert` of a stack `[experts, rows, columns]` in MXFP4 as Hugging Face writes it: bytes `{name}_blocks` `[experts, rows,
    /// columns / 32, 16]` and `{name}_scales` `[experts, rows, columns / 32]`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is not there, of another shape or not of bytes, [`Error::ExpertOutOfRange`].
    pub fn mxfp4(checkpoint: &Checkpoint, part: Part, name: &str, shape: [usize; 3], expert: usize) -> Result<Self> {
        let [experts, rows, columns] = shape;
        if expert >= experts {
            let id = i64::try_from(expert).unwrap_or(i64::MAX);
            return Err(Error::ExpertOutOfRange { operand: name.into(), id, expected: format!("one of {experts}") });
        }
        let find = |suffix: &str, shape: &[usize]| {
            let name = format!("{name}_{suffix}");
            let entry = checkpoint.entry(&name)?;
            if entry.dtype != StoredDtype::U8 || entry.shape != shape {
                let (got, file) = (format!("{:?} {:?}", entry.dtype, entry.shape), checkpoint.file_of(entry).into());
                let detail = format!("tensor `{name}`: expected U8 {shape:?}, got {got}");
                return Err(Error::Checkpoint { file, detail });
            }
            let bytes = entry.bytes / experts;
            Ok((entry.source(), entry.offset() + (expert * bytes) as u64))
        };
        let blocks = columns / mxfp4::WEIGHTS;
        let (source, offset) = find("blocks", &[experts, rows, blocks, mxfp4::BLOCK_BYTES])?;
        let (scales_source, scales) = find("scales", &[experts, rows, blocks])?;
        let layout = Layout::Apart { source: scales_source, scales };
        Ok(Self { part, source, offset, dtype: Dtype::Mxfp4, rows, columns, layout })
    }

    /// The same bytes as the matrix whose columns they hold one after the other.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights that share blocks.
    pub fn transposed(self) -> Result<Self> {
        if self.dtype.is_quantized() || self.layout != Layout::Rows {
            return Err(Error::shape("piece of columns", "floats row by row", self.dtype));
        }
        Ok(Self { rows: self.columns, columns: self.rows, layout: Layout::Columns, ..self })
    }
}

/// Where the numbers of a run of bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scatter {
    /// Of the slab.
    into: Range<usize>,
    /// Bytes of a number: 1, 2, 4 or 16.
    bytes: usize,
    /// How many there are.
    count: usize,
    start: usize,
    run: usize,
    steps: [usize; 2],
}

impl Scatter {
    /// Where a piece of so many bytes in memory lies in its files, if not row by row: sources, offsets and where numbers go.
    ///
    /// # Errors
    /// [`Error::Shape`] for a dtype that does not lie so.
    pub(super) fn of(piece: &Piece, size: usize, name: &str) -> Result<Vec<(usize, u64, Self)>> {
        let (into, count) = (0..size, piece.rows.saturating_mul(piece.columns));
        match piece.layout {
            Layout::Rows => Ok(Vec::new()),
            Layout::Columns if !piece.dtype.is_quantized() => {
                let bytes = piece.dtype.block_bytes();
                let (steps, run) = ([bytes, bytes * piece.columns], piece.rows.max(1));
                Ok(vec![(piece.source, piece.offset, Self { into, bytes, count, start: 0, run, steps })])
            }
            Layout::Apart { source, scales } if piece.dtype == Dtype::Mxfp4 => {
                let (count, steps) = (count / mxfp4::WEIGHTS, [1 + mxfp4::BLOCK_BYTES, 0]);
                let blocks = Self { into, bytes: mxfp4::BLOCK_BYTES, count, start: 1, run: 1, steps };
                let ones = Self { bytes: 1, start: 0, ..blocks.clone() };
                Ok(vec![(piece.source, piece.offset, blocks), (source, scales, ones)])
            }
            layout => {
                let operand = format!("{:?} of {name}", piece.part);
                Err(Error::shape(operand, format!("{} row by row", piece.dtype), format!("{layout:?}")))
            }
        }
    }

    /// Bytes that it takes in its file.
    pub(super) fn file_bytes(&self) -> usize {
        self.bytes.saturating_mul(self.count)
    }

    /// Bytes of the piece in its slab.
    pub(super) fn slab_bytes(&self) -> usize {
        self.into.len()
    }

    /// The same into these bytes of the slab.
    pub(super) fn into(&self, into: Range<usize>) -> Self {
        Self { into, ..self.clone() }
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
