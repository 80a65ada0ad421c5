//! What all products share: how activations lie, rows of them, a block of weight rows that meets them, and memory to work in.

use crate::simd::LANES;
use crate::simd::dtype::Dtype;
use crate::simd::multiply::Line;

/// Activations of a line.
pub(super) const GROUP: usize = 32;
/// Weight rows of one product.
pub(crate) const BLOCK: usize = 32;
/// Columns of activations that one segment holds at least, and whole numbers of which all but the last do.
pub(crate) const CHUNK: usize = 256;
/// How activations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Floats, sixteen to a line.
    Floats,
    /// Pairs of bf16, thirty-two to a line.
    Pairs,
    /// Bytes with a scale for each 32, a line of [`bytes`](super::bytes) for them; lines come in pairs.
    Bytes,
}

impl Form {
    /// Lines of a row without padding.
    pub(crate) fn lines(self, columns: usize) -> usize {
        match self {
            Self::Floats => columns.div_ceil(LANES),
            Self::Pairs => columns.div_ceil(2 * LANES),
            Self::Bytes => 2 * columns.div_ceil(2 * GROUP),
        }
    }

    /// Lines from one row to the next.
    pub(crate) fn stride(self, columns: usize) -> usize {
        self.lines(columns) | 1
    }
}

/// Rows of activations in one form, cut into segments of columns: row `r` of segment `s` starts at line
/// `s · segment_stride + r · row_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    lines: &'a [Line],
    pub(super) form: Form,
    pub(super) columns: usize,
    pub(super) segment: usize,
    pub(super) rows: usize,
    row_stride: usize,
    segment_stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows in one segment.
    pub(crate) fn whole(lines: &'a [Line], form: Form, columns: usize, rows: usize) -> Self {
        Self::segmented(lines, form, columns, columns.next_multiple_of(CHUNK).max(CHUNK), rows)
    }

    /// Rows in segments of `segment` columns, a multiple of [`CHUNK`]; each segment holds all rows, one after another.
    pub(crate) fn segmented(lines: &'a [Line], form: Form, columns: usize, segment: usize, rows: usize) -> Self {
        let row_stride = form.stride(segment.min(columns));
        let segment_stride = rows * row_stride;
        assert!(segment.is_multiple_of(CHUNK), "a segment of {segment} columns");
        assert!(lines.len() >= columns.div_ceil(segment) * segment_stride, "too few lines for {rows} rows");
        Self { lines, form, columns, segment, rows, row_stride, segment_stride }
    }

    /// Columns of a row.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The line of a row that a column is in, where a line holds so many of them.
    #[inline(always)]
    pub(super) fn column(&self, row: u32, column: usize, of_line: usize) -> *const Line {
        self.at(row, column / self.segment).wrapping_add(column % self.segment / of_line)
    }

    /// Where a row's segment starts.
    #[inline(always)]
    pub(super) fn at(&self, row: u32, segment: usize) -> *const Line {
        self.lines.as_ptr().wrapping_add(segment * self.segment_stride + row as usize * self.row_stride)
    }
}

/// Room that products work in; what it holds between them does not matter.
#[derive(Default)]
pub(crate) struct Workspace {
    lines: Vec<Line>,
}

impl Workspace {
    /// At least `count` lines, taken out until they are given back.
    #[inline(always)]
    pub(in crate::simd) fn take(&mut self, count: usize) -> Vec<Line> {
        let mut lines = std::mem::take(&mut self.lines);
        if lines.len() < count {
            lines.resize(count, Line::default());
        }
        lines
    }

    /// Keeps lines for the next product.
    #[inline(always)]
    pub(in crate::simd) fn give_back(&mut self, lines: Vec<Line>) {
        self.lines = lines;
    }
}

/// `sums[t, r]` of some rows of activations with a block of weight rows.
pub(crate) struct Product<'a> {
    /// Type of the weights.
    pub(crate) dtype: Dtype,
    /// Rows of weights as stored.
    pub(crate) weights: [&'a [u8]; BLOCK],
    /// The first row of the block that comes next, and of its second half: read ahead.
    pub(crate) ahead: [&'a [u8]; 2],
    /// Where the rows of activations are.
    pub(crate) input: Rows<'a>,
    /// Which of them to take.
    pub(crate) tokens: &'a [u32],
    /// `[tokens, BLOCK]`, overwritten.
    pub(crate) sums: &'a mut [f32],
    /// Room to work in.
    pub(crate) workspace: &'a mut Workspace,
}

impl Product<'_> {
    /// Where a row of this block starts, or of the next.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> *const u8 {
        let bytes = self.weights[0].len();
        match self.weights.get(row) {
            Some(row) => row.as_ptr(),
            None if row < BLOCK + BLOCK / 2 => self.ahead[0].as_ptr().wrapping_add((row - BLOCK) * bytes),
            None => self.ahead[1].as_ptr().wrapping_add((row - BLOCK - BLOCK / 2) * bytes),
        }
    }
}
