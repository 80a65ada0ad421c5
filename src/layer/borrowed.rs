//! Candle's tensors as the matrices that the expert engine reads: nothing is copied.
//!
//! Knows nothing of experts, nor of gradients: a product comes here only where nothing has to be differentiated.

use std::borrow::Cow;

use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, DType, Layout, Storage, StorageRef, Tensor};

use super::packed::Packed;
use super::projection::{Projection, Weight};
use crate::error::{Error, Result};
use crate::experts::engine::Engine;
use crate::experts::matrix::{Dtype, Matrix};

/// A matrix of Candle's, held while its memory is read.
pub(super) enum Borrowed<'a> {
    Dense(StorageRef<'a>, &'a Layout),
    Quantized { dtype: Dtype, shape: [usize; 2], bytes: Cow<'a, [u8]> },
    Packed(&'a Packed),
}

impl<'a> Borrowed<'a> {
    /// A matrix of floats.
    pub(super) fn tensor(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        Ok(Self::Dense(storage, layout))
    }

    /// A matrix of either kind.
    pub(super) fn weight(weight: &'a Weight) -> Result<Self> {
        match weight {
            Weight::Dense(tensor) => Self::tensor(tensor),
            Weight::Quantized(tensor) => {
                let dtype = dtype(tensor.dtype()).ok_or_else(|| refused(format!("{:?}", tensor.dtype())))?;
                Ok(Self::Quantized { dtype, shape: tensor.shape().dims2()?.into(), bytes: tensor.data()? })
            }
            Weight::Packed(packed) => Ok(Self::Packed(packed)),
        }
    }

    /// The matrix as the engine takes it.
    pub(super) fn matrix(&self) -> Result<Matrix<'_>> {
        match self {
            Self::Dense(storage, layout) => {
                let (rows, columns) = layout.shape().dims2()?;
                let Some((start, end)) = layout.contiguous_offsets() else {
                    return Err(refused("a tensor whose rows do not follow each other"));
                };
                match &**storage {
                    Storage::Cpu(CpuStorage::F32(values)) => Matrix::from_f32(rows, columns, &values[start..end]),
                    Storage::Cpu(CpuStorage::F16(values)) => Matrix::from_f16(rows, columns, &values[start..end]),
                    Storage::Cpu(CpuStorage::BF16(values)) => Matrix::from_bf16(rows, columns, &values[start..end]),
                    _ => Err(refused("another dtype or device")),
                }
            }
            Self::Quantized { dtype, shape: [rows, columns], bytes } => Matrix::new(*dtype, *rows, *columns, bytes),
            Self::Packed(packed) => packed.matrix(),
        }
    }
}

fn refused(got: impl ToString) -> Error {
    Error::shape("weight", "one that the expert engine reads", got)
}

/// The engine's dtype of a quantised tensor.
fn dtype(dtype: GgmlDType) -> Option<Dtype> {
    match dtype {
        GgmlDType::F32 => Some(Dtype::F32),
        GgmlDType::F16 => Some(Dtype::F16),
        GgmlDType::BF16 => Some(Dtype::Bf16),
        GgmlDType::Q8_0 => Some(Dtype::Q8_0),
        GgmlDType::Q4K => Some(Dtype::Q4K),
        GgmlDType::Q5K => Some(Dtype::Q5K),
        GgmlDType::Q6K => Some(Dtype::Q6K),
        _ => None,
    }
}

/// The bytes of a tensor of floats on the CPU, as they are there.
///
/// # Errors
/// [`Error::Shape`] for a tensor of another rank, dtype or device.
pub(crate) fn packed(tensor: &Tensor) -> Result<Packed> {
    let tensor = tensor.contiguous()?;
    let borrowed = Borrowed::tensor(&tensor)?;
    let matrix = borrowed.matrix()?;
    let [rows, columns] = matrix.shape();
    Packed::new(matrix.dtype(), rows, columns, (0..rows).flat_map(|row| matrix.row(row)).copied().collect())
}

/// Whether the engine can read a tensor, which needs no gradient.
pub(crate) fn fits(tensor: &Tensor) -> bool {
    let is_float = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
    is_float && tensor.is_contiguous() && tensor.device().is_cpu() && !tensor.track_op()
}

/// The same of a projection.
pub(super) fn projection_fits(projection: &Projection) -> bool {
    let weight = match projection.weight() {
        Weight::Dense(tensor) => fits(tensor),
        Weight::Quantized(tensor) => tensor.device().is_cpu() && dtype(tensor.dtype()).is_some(),
        Weight::Packed(_) => true,
    };
    weight && projection.bias().is_none_or(|bias| !bias.track_op())
}

/// `x·Wᵀ` of `input` `[.., columns]` and `weight` `[rows, columns]` by the engine, for what [`fits`] and an input of its dtype on the
/// CPU: `[.., rows]` in that dtype.
pub(crate) fn product(engine: &Engine, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    let Some((&last, outer)) = input.dims().split_last() else {
        return Err(Error::shape("input of a product", format!("[.., {columns}]"), "a number"));
    };
    let tokens = input.contiguous()?.reshape((outer.iter().product::<usize>(), last))?;
    let mut sums = vec![0.0; tokens.dim(0)? * rows];
    {
        let (weight, tokens) = (Borrowed::tensor(weight)?, Borrowed::tensor(&tokens)?);
        engine.product(tokens.matrix()?, weight.matrix()?, &mut sums)?;
    }
    let shape: Vec<usize> = outer.iter().copied().chain([rows]).collect();
    // A product has the dtype of its operands, as in Candle and transformers.
    Ok(Tensor::from_vec(sums, shape, weight.device())?.to_dtype(weight.dtype())?)
}
