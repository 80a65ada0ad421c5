//! What a layer's tensors have to be: a shape, and the dtype and the device of the gate's weight.
//!
//! Knows nothing of what they are for.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// The dtype of scores, combine weights and the sum over slots.
pub(super) const ROUTING_DTYPE: DType = DType::F32;

/// Checks the shape of a weight.
pub(super) fn check_shape<const RANK: usize>(operand: &str, weight: &Tensor, expected: [usize; RANK]) -> Result<()> {
    if weight.dims() != expected {
        return Err(Error::shape(operand, format!("{expected:?}"), format!("{:?}", weight.dims())));
    }
    Ok(())
}

/// Dtype and device of the gate's weight, which those of the whole layer are.
pub(super) struct LikeGate<'a> {
    pub(super) dtype: DType,
    pub(super) device: &'a Device,
}

impl LikeGate<'_> {
    /// Checks both.
    pub(super) fn check(&self, operand: &str, tensor: &Tensor) -> Result<()> {
        let (expected, got) = (self.dtype, tensor.dtype());
        if expected != got {
            return Err(Error::shape(operand, format!("{expected:?} like the gate weight"), format!("{got:?}")));
        }
        self.check_device(operand, tensor.device())
    }

    /// Checks the device alone, of what has no dtype of Candle's.
    pub(super) fn check_device(&self, operand: &str, got: &Device) -> Result<()> {
        if !self.device.same_device(got) {
            let [expected, got] = [self.device, got].map(|device| format!("{:?}", device.location()));
            return Err(Error::shape(operand, format!("device {expected} like the gate weight"), got));
        }
        Ok(())
    }
}
