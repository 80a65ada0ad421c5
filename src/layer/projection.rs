//! One projection of an expert: `y = x·Wᵀ + b`, `[rows, in] → [rows, out]`, the weight `[out, in]` dense or quantised.
//!
//! A quantised weight counts as the `f32` numbers that it stands for, and products with it are in `f32`: slow, and the oracle
//! for kernels that multiply its blocks as they are. Knows nothing of activations.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, DType, Storage, Tensor};
use candle_nn::{Init, VarBuilder};

use super::check::{LikeGate, ROUTING_DTYPE, check_shape};
use super::packed::Packed;
use crate::error::{Error, Result};

/// Numbers of a projection; clones share them.
#[derive(Clone, Debug)]
pub(crate) enum Weight {
    /// A matrix `[out, in]`, which may be a view of a larger tensor.
    Dense(Tensor),
    /// A quantised matrix `[out, in]`.
    Quantized(Arc<QTensor>),
    /// Bytes of a dtype that Candle does not have.
    Packed(Packed),
}

impl From<Packed> for Weight {
    fn from(packed: Packed) -> Self {
        Self::Packed(packed)
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl From<Arc<QTensor>> for Weight {
    fn from(tensor: Arc<QTensor>) -> Self {
        Self::Quantized(tensor)
    }
}

/// Where the weights of linear layers come from.
pub(crate) trait Linears {
    /// `weight` under a builder, `[rows, columns]`.
    fn weight(&self, vb: &VarBuilder<'_>, shape: [usize; 2]) -> Result<Weight>;
}

/// The builder itself.
pub(crate) struct Built;

impl Linears for Built {
    fn weight(&self, vb: &VarBuilder<'_>, [rows, columns]: [usize; 2]) -> Result<Weight> {
        let init = Init::Randn { mean: 0.0, stdev: (columns as f64).powf(-0.5) };
        Ok(vb.get_with_hints((rows, columns), "weight", init)?.into())
    }
}

/// Weight `[out, in]` and bias `[out]` of one linear layer; from a tensor, a quantised one or [`Packed`] bytes without a bias.
#[derive(Clone, Debug)]
pub struct Projection {
    weight: Weight,
    bias: Option<Tensor>,
}

impl<W: Into<Weight>> From<W> for Projection {
    fn from(weight: W) -> Self {
        Self::new(weight, None)
    }
}

impl Projection {
    /// From a weight `[out, in]` and, if there is one, a bias `[out]`.
    pub(crate) fn new(weight: impl Into<Weight>, bias: Option<Tensor>) -> Self {
        Self { weight: weight.into(), bias }
    }

    /// The weight.
    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias, `[out]`.
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The same with a bias `[out]`, in `f32` beside a quantised weight.
    pub fn with_bias(self, bias: Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    pub(super) fn is_quantized(&self) -> bool {
        matches!(self.weight, Weight::Quantized(_) | Weight::Packed(_))
    }

    /// The projection of `rows` `[rows, in]`, which are of the weight's dtype, or all in `f32` where `in_f32` says so.
    pub(super) fn forward(&self, rows: &Tensor, in_f32: bool) -> candle_core::Result<Tensor> {
        let cast = |tensor: &Tensor| if in_f32 { tensor.to_dtype(DType::F32) } else { Ok(tensor.clone()) };
        let weight = match &self.weight {
            Weight::Dense(weight) => cast(&own_rows(weight)?)?,
            Weight::Quantized(tensor) => tensor.dequantize(&tensor.device())?,
            Weight::Packed(packed) => packed.dequantize(rows.device())?,
        };
        let product = rows.matmul(&weight.t()?)?;
        match &self.bias {
            Some(bias) => product.broadcast_add(&cast(bias)?),
            None => Ok(product),
        }
    }

    /// Checks shapes `[out, in]` and `[out]`, dtypes and devices. A bias has the dtype of a dense weight; beside a quantised
    /// one, which has none that adds up, it is in `f32`.
    pub(super) fn check(&self, operand: &str, shape: [usize; 2], has_bias: bool, like: &LikeGate<'_>) -> Result<()> {
        match &self.weight {
            Weight::Dense(weight) => {
                check_shape(operand, weight, shape)?;
                like.check(operand, weight)?;
            }
            Weight::Quantized(tensor) => {
                check_quantized(operand, tensor, shape)?;
                like.check_device(operand, &tensor.device())?;
            }
            Weight::Packed(packed) if packed.shape() != shape => {
                return Err(Error::shape(operand, format!("{shape:?}"), format!("{:?}", packed.shape())));
            }
            Weight::Packed(_) => {}
        }
        let operand = format!("{operand} bias");
        match &self.bias {
            None if has_bias => Err(Error::shape(operand, format!("[{}]", shape[0]), "none")),
            None => Ok(()),
            Some(bias) if !has_bias => Err(Error::shape(operand, "none", format!("{:?}", bias.dims()))),
            Some(bias) => {
                check_shape(&operand, bias, [shape[0]])?;
                match self.is_quantized() {
                    false => like.check(&operand, bias),
                    true if bias.dtype() != ROUTING_DTYPE => {
                        Err(Error::shape(operand, "F32 beside a quantised weight", format!("{:?}", bias.dtype())))
                    }
                    true => like.check_device(&operand, bias.device()),
                }
            }
        }
    }
}

fn check_quantized(operand: &str, tensor: &QTensor, shape: [usize; 2]) -> Result<()> {
    let (dims, dtype) = (tensor.shape().dims(), tensor.dtype());
    if dims != shape {
        return Err(Error::shape(operand, format!("{shape:?}"), format!("{dims:?}")));
    }
    // Candle takes any storage for any shape, and reads past its end when it converts.
    let expected = shape[0] * shape[1] / dtype.block_size() * dtype.type_size();
    let got = tensor.storage_size_in_bytes();
    if tensor.device().is_cpu() && expected != got {
        let expected = format!("{expected} bytes for {dims:?} in {dtype:?}");
        return Err(Error::shape(operand, expected, format!("{got} bytes")));
    }
    Ok(())
}

/// A half-precision view of a larger tensor on the CPU as a tensor of its own: Candle's product widens all of the storage
/// behind a view, every expert's rows for one.
fn own_rows(weight: &Tensor) -> candle_core::Result<Tensor> {
    let stored = match &*weight.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F16(values)) => values.len(),
        Storage::Cpu(CpuStorage::BF16(values)) => values.len(),
        _ => 0,
    };
    if stored > weight.elem_count() { weight.force_contiguous() } else { Ok(weight.clone()) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn only_half_precision_views_are_copied_and_only_their_rows() {
        let stored = |tensor: &Tensor| match &*tensor.storage_and_layout().0 {
            Storage::Cpu(CpuStorage::F32(values)) => values.len(),
            Storage::Cpu(CpuStorage::F16(values)) => values.len(),
            Storage::Cpu(CpuStorage::BF16(values)) => values.len(),
            _ => 0,
        };
        for (dtype, expected) in [(DType::F32, 60), (DType::F16, 20), (DType::BF16, 20)] {
            let stack = Tensor::arange(0f32, 60.0, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let view = stack.reshape((3, 4, 5)).unwrap().get(1).unwrap();
            let own = own_rows(&view).unwrap();
            assert_eq!(stored(&own), expected, "{dtype:?}");
            let values = own.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().copied().eq((20..40).map(|value| value as f32)), "{dtype:?}");
            let whole = stack.reshape((12, 5)).unwrap();
            assert!(own_rows(&whole).unwrap().id() == whole.id(), "{dtype:?}: a whole tensor is not copied");
        }
    }
}
