//! Stored weights in memory of their own, in any [`Dtype`]: those of one projection.
//!
//! For dtypes that Candle does not have; the engine reads them as they are, and Candle's operations get the `f32` numbers that they
//! stand for. Knows nothing of files.

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::experts::matrix::{Dtype, Matrix};
use crate::offload::slab::Slab;

/// Bytes that matrices share.
#[derive(Clone)]
enum Bytes {
    Own(Arc<Vec<u8>>),
    /// Some of a slab.
    Part(Arc<Slab>, Range<usize>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Part(slab, part) => &slab.bytes()[part.clone()],
        }
    }
}

/// A matrix `[rows, columns]`, bytes that clones share.
#[derive(Clone)]
pub struct Packed {
    dtype: Dtype,
    rows: usize,
    columns: usize,
    bytes: Bytes,
}

impl Packed {
    /// All rows of `bytes`.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub fn new(dtype: Dtype, rows: usize, columns: usize, bytes: Vec<u8>) -> Result<Self> {
        Matrix::new(dtype, rows, columns, &bytes)?;
        Ok(Self { dtype, rows, columns, bytes: Bytes::Own(Arc::new(bytes)) })
    }

    /// Some bytes of a slab that others share.
    ///
    /// # Errors
    /// As [`Matrix::new`], and for bytes that are not there.
    pub(crate) fn part(
        dtype: Dtype,
        [rows, columns]: [usize; 2],
        slab: &Arc<Slab>,
        part: Range<usize>,
    ) -> Result<Self> {
        Matrix::new(dtype, rows, columns, slab.bytes().get(part.clone()).unwrap_or_default())?;
        Ok(Self { dtype, rows, columns, bytes: Bytes::Part(slab.clone(), part) })
    }

    /// Numbers `[rows, columns]` in a dtype of floats.
    ///
    /// # Errors
    /// [`Error::Shape`] for as many numbers as are not there.
    pub(crate) fn from_floats(dtype: Dtype, rows: usize, columns: usize, numbers: &[f32]) -> Result<Self> {
        let bytes = match dtype {
            Dtype::F16 => numbers.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes()).collect(),
            Dtype::Bf16 => numbers.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
        };
        Self::new(if dtype.is_quantized() { Dtype::F32 } else { dtype }, rows, columns, bytes)
    }

    /// Some of these rows, in any order.
    ///
    /// # Errors
    /// None, where all of them are there.
    pub(crate) fn pick(&self, rows: impl ExactSizeIterator<Item = usize>) -> Result<Self> {
        let (matrix, count) = (self.matrix()?, rows.len());
        Self::new(self.dtype, count, self.columns, rows.flat_map(|row| matrix.row(row)).copied().collect())
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
