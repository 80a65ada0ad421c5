//! A matrix of an expert, and where it lies in the files: what a store is made of.

use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;

/// Bytes of one read: long enough for the disk's full rate, short enough to let an urgent read go first.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// Which projections of an expert a matrix holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The gate projection.
    Gate,
    /// The up projection.
    Up,
    /// Gate and up projection in one matrix, one after the other or row by row as the model has it.
    GateUp,
    /// The down projection.
    Down,
}

/// One matrix of an expert, and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// What it holds.
    pub part: Part,
    /// Which of the store's sources it is in.
    pub source: usize,
    /// Where in the source it begins.
    pub offset: u64,
    /// Type of the weights.
    pub dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// How they lie there.
    pub layout: Layout,
}

impl Piece {
    pub(super) fn row_bytes(&self) -> Result<usize> {
        self.dtype.row_bytes(self.columns).ok_or_else(|| {
            let expected = format!("a multiple of {} columns for {}", self.dtype.block(), self.dtype);
            Error::shape("piece of an expert", expected, self.columns)
        })
    }
}

/// How a piece's numbers lie in its file; in memory they lie row by row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Layout {
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
