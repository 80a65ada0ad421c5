//! Weights of experts as they lie in memory, borrowed: `[rows, columns]`, row-major, in any [`Dtype`].
//!
//! A matrix is a view of bytes, so that a tensor, a slab that a file was read into and a part of a stacked tensor are all the
//! same to the engine. Nothing is copied, widened or rearranged, and no alignment is asked for.
//!
//! ```
//! use phase_moe::Matrix;
//!
//! // Two experts of [3, 2] stacked in one slab; the second one's rows.
//! let slab: Vec<f32> = (0..12).map(|value| value as f32).collect();
//! let second = Matrix::from_f32(3, 2, &slab[6..])?;
//! assert!(Matrix::from_f32(6, 2, &slab[1..]).is_err());
//! # let _ = second;
//! # Ok::<(), phase_moe::Error>(())
//! ```

use std::ops::Range;

use half::{bf16, f16};

use crate::error::{Error, Result};
pub use crate::simd::dtype::Dtype;
use crate::simd::multiply::Multiply;
use crate::simd::{Isa, Kernel, quantized};

/// A borrowed matrix of weights or activations.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    dtype: Dtype,
    rows: usize,
    columns: usize,
    /// Bytes of a row, and from one row to the next.
    row_bytes: usize,
    stride: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// A matrix `[rows, columns]` in little-endian bytes as checkpoints have them.
    ///
    /// # Errors
    /// [`Error::Shape`] when a row is no whole number of blocks or `bytes` are not as many as the shape says.
    pub fn new(dtype: Dtype, rows: usize, columns: usize, bytes: &'a [u8]) -> Result<Self> {
        let Some(row_bytes) = dtype.row_bytes(columns) else {
            let expected = format!("a multiple of {} columns for {dtype}", dtype.block());
            return Err(Error::shape("matrix", expected, columns));
        };
        if row_bytes.checked_mul(rows) != Some(bytes.len()) {
            let expected = format!("{rows} rows of {row_bytes} bytes ({dtype})");
            return Err(Error::shape("matrix", expected, format!("{} bytes", bytes.len())));
        }
        Ok(Self { dtype, rows, columns, row_bytes, stride: row_bytes, bytes })
    }

    /// A matrix of floats.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub fn from_f32(rows: usize, columns: usize, values: &'a [f32]) -> Result<Self> {
        Self::new(Dtype::F32, rows, columns, bytemuck::cast_slice(values))
    }

    /// A matrix of halves.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub(crate) fn from_f16(rows: usize, columns: usize, values: &'a [f16]) -> Result<Self> {
        Self::new(Dtype::F16, rows, columns, bytemuck::cast_slice(values))
    }

    /// A matrix of bf16.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub(crate) fn from_bf16(rows: usize, columns: usize, values: &'a [bf16]) -> Result<Self> {
        Self::new(Dtype::Bf16, rows, columns, bytemuck::cast_slice(values))
    }

    /// Some of the rows: an expert of a stacked tensor, or one projection of two that are fused.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows that are not there.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(Error::shape("rows of a matrix", format!("within 0..{}", self.rows), format!("{rows:?}")));
        }
        let bytes = self.bytes.get(rows.start * self.stride..).unwrap_or_default();
        Ok(Self { rows: rows.len(), bytes, ..*self })
    }

    /// Every second row, from row `first` (0 or 1) on: one of two interleaved projections.
    ///
    /// # Errors
    /// [`Error::Shape`] for an odd number of rows, or a first row that is neither 0 nor 1.
    pub(crate) fn interleaved(&self, first: usize) -> Result<Self> {
        if first > 1 {
            return Err(Error::shape("first row of an interleaved matrix", "0 or 1", first));
        }
        if !self.rows.is_multiple_of(2) {
            return Err(Error::shape("interleaved matrix", "an even number of rows", self.rows));
        }
        let bytes = self.bytes.get(first * self.stride..).unwrap_or_default();
        Ok(Self { rows: self.rows / 2, stride: 2 * self.stride, bytes, ..*self })
    }

    /// The numbers that it stands for, row by row.
    pub(crate) fn to_f32(self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        let isa = Isa::default();
        for (row, values) in values.chunks_exact_mut(self.columns.max(1)).enumerate() {
            isa.run(Widen { from: self, row, values });
        }
        values
    }

    /// Type of the weights.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Whether it is the same memory, read in the same way.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let of = |matrix: &Self| (matrix.dtype, matrix.rows, matrix.columns, matrix.stride, matrix.bytes.as_ptr());
        of(self) == of(other)
    }

    /// A row as floats.
    ///
    /// # Panics
    /// When there is no such row or `values` are not as many as columns.
    pub(crate) fn widen(self, isa: Isa, row: usize, values: &mut [f32]) {
        assert!(values.len() == self.columns, "{} values for {} columns", values.len(), self.columns);
        isa.run(Widen { from: self, row, values });
    }

    /// Bytes that the weights take.
    pub(crate) fn size_in_bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    /// The bytes of a row.
    ///
    /// # Panics
    /// When there is no such row.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &self.bytes[row * self.stride..][..self.row_bytes]
    }
}

/// A row as floats.
pub(super) struct Widen<'a> {
    pub(super) from: Matrix<'a>,
    pub(super) row: usize,
    pub(super) values: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        quantized::decode(lanes, self.from.dtype(), self.from.row(self.row), 0, self.values);
    }
}
