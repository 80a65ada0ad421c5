//! The gate: one linear layer from hidden state to logits, `[tokens, hidden] → [tokens, experts]`, result in `f32`.

use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};

use super::{ROUTING_DTYPE, check_weight};
use crate::error::{Error, Result};
use crate::spec::MoeSpec;

/// Gate weights `[experts, hidden]` and, where the model has one, the bias that counts for selection only.
#[derive(Clone, Debug)]
pub struct Gate {
    weight: Tensor,
    selection_bias: Option<Vec<f32>>,
}

impl Gate {
    /// From a weight `[experts, hidden]`.
    pub fn new(weight: Tensor) -> Self {
        Self { weight, selection_bias: None }
    }

    /// Loads `weight` under `vb`.
    ///
    /// # Errors
    /// What the builder reports for a missing tensor or a wrong shape.
    pub fn load(spec: &MoeSpec, vb: VarBuilder<'_>) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: (spec.hidden as f64).powf(-0.5) };
        Ok(Self::new(vb.get_with_hints((spec.experts, spec.hidden), "weight", init)?))
    }

    pub(super) fn check(&self, spec: &MoeSpec) -> Result<()> {
        check_weight("gate weight", &self.weight, [spec.experts, spec.hidden])
    }

    /// Checks that `tensor` has the dtype and the device of the gate's weight.
    pub(super) fn check_alike(&self, operand: &str, tensor: &Tensor) -> Result<()> {
        let (expected, got) = (self.weight.dtype(), tensor.dtype());
        if expected != got {
            return Err(Error::shape(operand, format!("{expected:?} like the gate weight"), format!("{got:?}")));
        }
        let (expected, got) = (self.weight.device(), tensor.device());
        if !expected.same_device(got) {
            let [expected, got] = [expected, got].map(|device| format!("{:?}", device.location()));
            return Err(Error::shape(operand, format!("device {expected} like the gate weight"), got));
        }
        Ok(())
    }

    pub(super) fn set_selection_bias(&mut self, bias: &[f32]) -> Result<()> {
        let experts = self.weight.dim(0)?;
        if bias.len() != experts {
            return Err(Error::shape("selection bias", format!("{experts} values"), format!("{} values", bias.len())));
        }
        if let Some(bad) = bias.iter().find(|value| !value.is_finite()) {
            return Err(Error::parameter("selection bias", bad, "finite numbers"));
        }
        self.selection_bias = Some(bias.to_vec());
        Ok(())
    }

    /// Bias that is added to scores for selection only.
    pub fn selection_bias(&self) -> Option<&[f32]> {
        self.selection_bias.as_deref()
    }

    /// Logits of `tokens` (`[tokens, hidden]`), `[tokens, experts]` in `f32`.
    ///
    /// # Errors
    /// [`Error::Candle`] for another width, dtype or device.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(tokens.matmul(&self.weight.t()?)?.to_dtype(ROUTING_DTYPE)?)
    }
}
