//! One expert: a SwiGLU FFN (arXiv 2002.05202), `down(silu(gate_proj(x)) ⊙ up_proj(x))`, `[.., hidden] → [.., hidden]`.

use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};

use super::check_weight;
use crate::error::Result;
use crate::layer::gate::Gate;
use crate::spec::MoeSpec;

/// Weights of one expert, row-major `[out, in]` as stored.
#[derive(Clone, Debug)]
pub struct SwiGlu {
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
}

impl SwiGlu {
    /// From `gate_proj` and `up_proj` `[width, hidden]` and `down_proj` `[hidden, width]`.
    pub fn new(gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Self {
        Self { gate_proj, up_proj, down_proj }
    }

    /// Loads the three projections that `spec.names` names under `vb`.
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes.
    pub fn load(spec: &MoeSpec, vb: VarBuilder<'_>) -> Result<Self> {
        let load = |name: &str, rows: usize, columns: usize| {
            let init = Init::Randn { mean: 0.0, stdev: (columns as f64).powf(-0.5) };
            vb.pp(name).get_with_hints((rows, columns), "weight", init)
        };
        Ok(Self::new(
            load(&spec.names.gate_proj, spec.expert_width, spec.hidden)?,
            load(&spec.names.up_proj, spec.expert_width, spec.hidden)?,
            load(&spec.names.down_proj, spec.hidden, spec.expert_width)?,
        ))
    }

    pub(super) fn check(&self, spec: &MoeSpec, index: usize, gate: &Gate) -> Result<()> {
        let (wide, narrow) = ([spec.expert_width, spec.hidden], [spec.hidden, spec.expert_width]);
        let weights = [
            ("gate_proj", &self.gate_proj, wide),
            ("up_proj", &self.up_proj, wide),
            ("down_proj", &self.down_proj, narrow),
        ];
        weights.into_iter().try_for_each(|(name, weight, shape)| {
            let operand = format!("expert {index} {name}");
            check_weight(&operand, weight, shape)?;
            gate.check_alike(&operand, weight)
        })
    }
}

impl Module for SwiGlu {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        // One matrix product over all rows, whatever the rank.
        let rows = match hidden.rank() {
            0..=2 => hidden.clone(),
            rank => hidden.flatten_to(rank - 2)?,
        };
        let gate = rows.matmul(&self.gate_proj.t()?)?.silu()?;
        let up = rows.matmul(&self.up_proj.t()?)?;
        (gate * up)?.matmul(&self.down_proj.t()?)?.reshape(hidden.shape())
    }
}
