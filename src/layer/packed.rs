//! Stored weights in memory of their own, in any [`Dtype`]: those of an expert, or of many whose rows they share.
//!
//! For dtypes that Candle does not have; the engine reads them as they are, and Candle's operations get the `f32` numbers that they
//! stand for. Knows nothing of files.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::experts::matrix::{Dtype, Matrix};

/// A matrix `[rows, columns]`, a view of bytes that clones and parts of it share.
#[derive(Clone)]
pub struct Packed {
    dtype: Dtype,
    /// Of the whole.
    all_rows: usize,
    columns: usize,
    bytes: Arc<Vec<u8>>,
    rows: Range<usize>,
    /// Every second of them, from this one on.
    turn: Option<usize>,
}

impl Packed {
    /// All rows of `bytes`.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub fn new(dtype: Dtype, rows: usize, columns: usize, bytes: Vec<u8>) -> Result<Self> {
        Matrix::new(dtype, rows, columns, &bytes)?;
        Ok(Self { dtype, all_rows: rows, columns, bytes: Arc::new(bytes), rows: 0..rows, turn: None })
    }

    /// Some of the rows, of the whole.
    ///
    /// # Errors
    /// As [`Matrix::rows`].
    pub(crate) fn of_rows(&self, rows: Range<usize>) -> Result<Self> {
        let part = Self { rows, turn: None, ..self.clone() };
        part.matrix()?;
        Ok(part)
    }

    /// Every second row, from row `first` (0 or 1) on.
    ///
    /// # Errors
    /// As [`Matrix::interleaved`].
    pub(crate) fn interleaved(&self, first: usize) -> Result<Self> {
        let part = Self { turn: Some(first), ..self.clone() };
        part.matrix()?;
        Ok(part)
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [if self.turn.is_some() { self.rows.len() / 2 } else { self.rows.len() }, self.columns]
    }

    /// The matrix as the engine takes it.
    ///
    /// # Errors
    /// None, of what [`Packed::new`] and its parts have checked.
    pub(crate) fn matrix(&self) -> Result<Matrix<'_>> {
        let rows = Matrix::new(self.dtype, self.all_rows, self.columns, &self.bytes)?.rows(self.rows.clone())?;
        self.turn.map_or(Ok(rows), |first| rows.interleaved(first))
    }

    /// The numbers, in `f32` on `device`.
    pub(super) fn dequantize(&self, device: &Device) -> candle_core::Result<Tensor> {
        let (matrix, [rows, columns]) = (self.matrix()?, self.shape());
        Tensor::from_vec(matrix.to_f32(), (rows, columns), device)
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [rows, columns] = self.shape();
        write!(f, "Packed([{rows}, {columns}] {})", self.dtype)
    }
}
