//! What every token meets beside its experts: `y = expert(x)` or, with a gate, `y = σ(x·gateᵀ)·expert(x)`, `[tokens, hidden]`.
//!
//! Knows nothing of routing: nothing here is dropped, and padding gets its output too.

use candle_core::Tensor;
use candle_nn::{Init, VarBuilder, ops::sigmoid};

use super::borrowed::Borrowed;
use super::check::{LikeGate, ROUTING_DTYPE, check_shape};
use super::expert::{Expert, ExpertShape};
use super::projection::Linears;
use crate::error::{Error, Result};
use crate::experts::engine::Engine;
use crate::experts::matrix::Matrix;
use crate::spec::{MoeSpec, SharedExperts};

/// An expert for all tokens and, if there is one, the weight of its gate `[1, hidden]`.
#[derive(Clone, Debug)]
pub struct Shared {
    expert: Expert,
    gate: Option<Tensor>,
}

impl Shared {
    /// From an expert and, if there is one, the weight of its gate `[1, hidden]`.
    pub fn new(expert: Expert, gate: Option<Tensor>) -> Self {
        Self { expert, gate }
    }

    /// Loads what `spec.names` names under `vb`, the layer's own builder; `None` when `spec` has no shared expert.
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes.
    pub(crate) fn load(spec: &MoeSpec, vb: VarBuilder<'_>, linears: &dyn Linears) -> Result<Option<Self>> {
        let Some(shared) = spec.shared else { return Ok(None) };
        let expert = Expert::load_dense(spec, shared.width, vb.pp(&spec.names.shared), linears)?;
        let init = Init::Randn { mean: 0.0, stdev: (spec.hidden as f64).powf(-0.5) };
        let gate = || vb.pp(&spec.names.shared_gate).get_with_hints((1, spec.hidden), "weight", init);
        Ok(Some(Self { expert, gate: shared.gated.then(gate).transpose()? }))
    }

    /// The expert.
    pub(crate) fn expert(&self) -> &Expert {
        &self.expert
    }

    /// The weight of its gate, `[1, hidden]`.
    pub(crate) fn gate(&self) -> Option<&Tensor> {
        self.gate.as_ref()
    }

    pub(super) fn check(&self, spec: &MoeSpec, shared: SharedExperts, like: &LikeGate<'_>) -> Result<()> {
        self.expert.check("shared expert", ExpertShape::shared(spec, shared), like)?;
        let operand = "shared expert gate";
        match &self.gate {
            None if shared.gated => Err(Error::shape(operand, format!("[1, {}]", spec.hidden), "none")),
            None => Ok(()),
            Some(weight) if !shared.gated => Err(Error::shape(operand, "none", format!("{:?}", weight.dims()))),
            Some(weight) => {
                check_shape(operand, weight, [1, spec.hidden])?;
                like.check(operand, weight)
            }
        }
    }

    /// The output for `tokens` `[tokens, hidden]`, in `f32`.
    pub(super) fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let output = self.expert.run(tokens)?.to_dtype(ROUTING_DTYPE)?;
        match &self.gate {
            Some(gate) => Ok(output.broadcast_mul(&share(gate, tokens)?)?),
            None => Ok(output),
        }
    }

    /// What the output counts for each of `rows`, `[tokens, hidden]`.
    pub(super) fn weights(&self, engine: &Engine, rows: Matrix<'_>) -> Result<Vec<f32>> {
        let mut shares = vec![1.0; rows.shape()[0]];
        if let Some(gate) = &self.gate {
            engine.product(rows, Borrowed::tensor(gate)?.matrix()?, &mut shares)?;
            shares.iter_mut().for_each(|share| *share = 1.0 / (1.0 + (-*share).exp()));
        }
        Ok(shares)
    }
}

/// `σ(x·gateᵀ)`, `[tokens, 1]`.
fn share(gate: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    Ok(sigmoid(&tokens.matmul(&gate.t()?)?.to_dtype(ROUTING_DTYPE)?)?)
}
