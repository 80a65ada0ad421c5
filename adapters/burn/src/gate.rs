//! The gate: one linear layer from hidden state to logits, and the bias that counts for selection only.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, TensorData};
use phase_moe::{Error, Result};

/// Gate weights and biases.
#[derive(Module, Debug)]
pub struct Gate {
    /// `[experts, hidden]`.
    pub weight: Param<Tensor<2>>,
    /// `[experts]`, part of the logits (gpt-oss).
    pub bias: Option<Param<Tensor<1>>>,
    /// `[experts]`, added to scores for selection alone (DeepSeek-V3); never trained by gradients.
    pub e_score_correction_bias: Option<Param<Tensor<1>>>,
}

impl Gate {
    /// `[tokens, hidden]` to `[tokens, experts]` in `f32`.
    pub(crate) fn logits(&self, tokens: Tensor<2>) -> Tensor<2> {
        let logits = tokens.matmul(self.weight.val().transpose()).cast(DType::F32);
        match &self.bias {
            Some(bias) => logits + bias.val().cast(DType::F32).unsqueeze::<2>(),
            None => logits,
        }
    }

    /// The bias of the logits as numbers.
    pub(crate) fn bias(&self) -> Option<Vec<f32>> {
        self.bias.as_ref().map(|bias| numbers(bias.val()))
    }

    /// The bias for selection as numbers.
    pub(crate) fn selection_bias(&self) -> Option<Vec<f32>> {
        self.e_score_correction_bias.as_ref().map(|bias| numbers(bias.val()))
    }

    /// Sets the bias for selection, which the gate has.
    pub(crate) fn set_selection_bias(&mut self, values: &[f32]) -> Result<()> {
        let Some(bias) = &self.e_score_correction_bias else {
            let expected = "`selection_bias` in the layer's spec, so that it is saved with its weights";
            return Err(Error::shape("selection bias", expected, "none"));
        };
        let experts = bias.shape()[0];
        if values.len() != experts {
            let got = format!("{} values", values.len());
            return Err(Error::shape("selection bias", format!("{experts} values"), got));
        }
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            let (got, expected) = (bad.to_string(), "finite numbers".into());
            return Err(Error::Parameter { name: "selection bias", got, expected });
        }
        let data = TensorData::new(values.to_vec(), [experts]);
        let set = |old: Tensor<1>| Tensor::from_data(data, (&old.device(), old.dtype()));
        self.e_score_correction_bias = self.e_score_correction_bias.take().map(|bias| bias.map(set));
        Ok(())
    }
}

/// A tensor's numbers in `f32`, brought to the host.
pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.cast(DType::F32).into_data().iter::<f32>().collect()
}
