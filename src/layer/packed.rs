//! Stored weights in memory of their own, in any [`Dtype`]: those of one projection.
//!
//! For dtypes that Candle does not have; the engine reads them as they are, and Candle's operations get the `f32` numbers that they
//! stand for. Knows nothing of files.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::experts::matrix::{Dtype, Matrix};

/// A matrix `[rows, columns]`, bytes that clones share.
#[derive(Clone)]
pub struct Packed {
    dtype: Dtype,
    rows: usize,
    columns: usize,
    bytes: Arc<Vec<u8>>,
}

impl Packed {
    /// All rows of `bytes`.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub fn new(dtype: Dtype, rows: usize, columns: usize, bytes: Vec<u8>) -> Result<Self> {
        Matrix::new(dtype, rows, columns, &bytes)?;
        Ok(Self { dtype, rows, columns, bytes: Arc::new(bytes) })
    }

    /// The first and the second half of the rows or, where they take turns, every second row from the first and from the second on.
    pub(super) fn halves(&self, in_turns: bool) -> Result<[Self; 2]> {
        let (rows, columns) = (self.rows / 2, self.columns);
        if !self.rows.is_multiple_of(2) {
            return Err(Error::shape("two matrices in one", "an even number of rows", self.rows));
        }
        let row = self.bytes.len() / self.rows.max(1);
        let half = |half: usize| {
            let bytes = match in_turns {
                true => self.bytes.chunks_exact(row.max(1)).skip(half).step_by(2).flatten().copied().collect(),
                false => self.bytes[half * rows * row..(half + 1) * rows * row].to_vec(),
            };
            Self::new(self.dtype, rows, columns, bytes)
        };
        Ok([half(0)?, half(1)?])
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The matrix as the engine takes it.
    ///
    /// # Errors
    /// None, of what [`Packed::new`] has checked.
    pub(crate) fn matrix(&self) -> Result<Matrix<'_>> {
        Matrix::new(self.dtype, self.rows, self.columns, &self.bytes)
    }

    /// The numbers, in `f32` on `device`.
    pub(super) fn dequantize(&self, device: &Device) -> candle_core::Result<Tensor> {
        Tensor::from_vec(self.matrix()?.to_f32(), (self.rows, self.columns), device)
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed([{}, {}] {})", self.rows, self.columns, self.dtype)
    }
}
