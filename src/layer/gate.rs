//! The gate: one linear layer from hidden state to logits, `x·Wᵀ + b`, `[tokens, hidden] → [tokens, experts]`, in `f32`.

use candle_core::{Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::borrowed::{self, Borrowed};
use super::check::{LikeGate, ROUTING_DTYPE, check_shape};
use crate::error::{Error, Result};
use crate::experts::engine::Engine;
use crate::experts::matrix::Matrix;
use crate::spec::MoeSpec;

/// Gate weights `[experts, hidden]` and, where the model has them, the bias of the logits and the one that counts for
/// selection only.
#[derive(Clone, Debug)]
pub struct Gate {
    weight: Tensor,
    bias: Option<Tensor>,
    /// Read anew in every forward pass: an update rule, or another holder of the variable, may have set it.
    selection_bias: Option<Var>,
    /// Its tensors are those of a builder, and what is not among them is not saved with them.
    loaded: bool,
}

impl Gate {
    /// From a weight `[experts, hidden]`.
    pub fn new(weight: Tensor) -> Self {
        Self { weight, bias: None, selection_bias: None, loaded: false }
    }

    /// The same gate with a bias `[experts]` that is part of the logits (gpt-oss).
    pub fn with_bias(self, bias: Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// The same gate with a bias `[experts]` that counts for selection only. If it is a `Var`, the gate keeps to that one:
    /// what is set there is seen here, and the other way round.
    ///
    /// # Errors
    /// [`Error::Candle`] when Candle cannot make a variable of it.
    pub fn with_selection_bias(self, bias: &Tensor) -> Result<Self> {
        Ok(Self { selection_bias: Some(Var::from_tensor(bias)?), ..self })
    }

    /// Loads `weight` under `vb` and, where `spec` says so, `bias`.
    ///
    /// # Errors
    /// What the builder reports for a missing tensor or a wrong shape.
    pub(crate) fn load(spec: &MoeSpec, vb: VarBuilder<'_>) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: (spec.hidden as f64).powf(-0.5) };
        let weight = vb.get_with_hints((spec.experts, spec.hidden), "weight", init)?;
        let bias = || vb.get_with_hints(spec.experts, "bias", Init::Const(0.0));
        Ok(Self { weight, bias: spec.gate_bias.then(bias).transpose()?, selection_bias: None, loaded: true })
    }

    /// Loads what `spec` says and `spec.names` names under `vb`, the layer's own builder: the bias for selection too.
    pub(super) fn load_in(spec: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Self> {
        let mut gate = Self::load(spec, vb.pp(&spec.names.gate))?;
        if spec.selection_bias {
            // Always in f32, as it is added to scores.
            let (name, init) = (&spec.names.selection_bias, Init::Const(0.0));
            let bias = vb.get_with_hints_dtype(spec.experts, name, init, ROUTING_DTYPE)?;
            if let Some(bad) = bias.to_vec1::<f32>()?.iter().find(|value| !value.is_finite()) {
                let (place, value) = (format!("tensor `{}`", vb.pp(name).prefix()), f64::from(*bad));
                return Err(Error::NonFinite { place, value, cause: String::new() });
            }
            gate = gate.with_selection_bias(&bias)?;
        }
        Ok(gate)
    }

    pub(super) fn check(&self, spec: &MoeSpec) -> Result<()> {
        check_shape("gate weight", &self.weight, [spec.experts, spec.hidden])?;
        if let Some(bias) = &self.selection_bias {
            check_shape("selection bias", bias, [spec.experts])?;
        }
        check_finite(&self.selection_bias()?.unwrap_or_default())?;
        match &self.bias {
            None if spec.gate_bias => Err(Error::shape("gate bias", format!("[{}]", spec.experts), "none")),
            None => Ok(()),
            Some(bias) if !spec.gate_bias => Err(Error::shape("gate bias", "none", format!("{:?}", bias.dims()))),
            Some(bias) => {
                check_shape("gate bias", bias, [spec.experts])?;
                self.like().check("gate bias", bias)
            }
        }
    }

    /// What the other tensors of its layer have to be like.
    pub(super) fn like(&self) -> LikeGate<'_> {
        LikeGate { dtype: self.weight.dtype(), device: self.weight.device() }
    }

    pub(super) fn set_selection_bias(&mut self, bias: &[f32]) -> Result<()> {
        let experts = self.weight.dim(0)?;
        if bias.len() != experts {
            return Err(Error::shape("selection bias", format!("{experts} values"), format!("{} values", bias.len())));
        }
        check_finite(bias)?;
        let values = Tensor::from_slice(bias, experts, self.weight.device())?;
        match &self.selection_bias {
            Some(held) => held.set(&values.to_device(held.device())?.to_dtype(held.dtype())?)?,
            None if self.loaded && self.weight.is_variable() => {
                let expected = "`selection_bias` in the layer's spec, so that it is saved with the other variables";
                return Err(Error::shape("selection bias of a layer in training", expected, "none"));
            }
            None => self.selection_bias = Some(Var::from_tensor(&values)?),
        }
        Ok(())
    }

    /// Bias that is part of the logits, `[experts]`.
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Bias that is added to scores for selection only, as it is now, `[experts]`.
    ///
    /// # Errors
    /// [`Error::Candle`] when it cannot be read from its device.
    pub(crate) fn selection_bias(&self) -> Result<Option<Vec<f32>>> {
        let read = |bias: &Var| bias.to_dtype(ROUTING_DTYPE)?.to_vec1::<f32>();
        Ok(self.selection_bias.as_ref().map(read).transpose()?)
    }

    /// Logits of `tokens` (`[tokens, hidden]`), `[tokens, experts]` in `f32`.
    ///
    /// # Errors
    /// [`Error::Candle`] for another width, dtype or device.
    pub(crate) fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        self.biased(tokens.matmul(&self.weight.t()?)?.to_dtype(ROUTING_DTYPE)?)
    }

    /// The same by the expert engine, for what [`Gate::fits_engine`] and a `tokens` of its dtype on the CPU.
    pub(super) fn logits_by(&self, engine: &Engine, tokens: &Tensor) -> Result<Tensor> {
        self.biased(borrowed::product(engine, tokens, &self.weight)?.to_dtype(ROUTING_DTYPE)?)
    }

    /// The same of rows `[tokens, hidden]`, into `logits`.
    pub(super) fn logits_of_rows(&self, engine: &Engine, rows: Matrix<'_>, logits: &mut Vec<f32>) -> Result<()> {
        let experts = self.weight.dim(0)?;
        logits.resize(rows.shape()[0] * experts, 0.0);
        engine.product(rows, Borrowed::tensor(&self.weight)?.matrix()?, logits)?;
        if let Some(bias) = &self.bias {
            let bias = bias.to_dtype(ROUTING_DTYPE)?.to_vec1::<f32>()?;
            for logits in logits.chunks_exact_mut(experts) {
                logits.iter_mut().zip(&bias).for_each(|(logit, bias)| *logit += bias);
            }
        }
        Ok(())
    }

    /// Whether the engine can read the weights and nothing has to be differentiated.
    pub(super) fn fits_engine(&self) -> bool {
        borrowed::fits(&self.weight) && self.bias.as_ref().is_none_or(|bias| !bias.track_op())
    }

    fn biased(&self, logits: Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => Ok(logits.broadcast_add(&bias.to_dtype(ROUTING_DTYPE)?)?),
            None => Ok(logits),
        }
    }
}

fn check_finite(bias: &[f32]) -> Result<()> {
    match bias.iter().find(|value| !value.is_finite()) {
        Some(bad) => Err(Error::parameter("selection bias", bad, "finite numbers")),
        None => Ok(()),
    }
}
