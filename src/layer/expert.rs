//! One expert: an FFN, `down(act(gate_proj(x)) ⊙ up_proj(x))` or, without a gate, `down(act(up_proj(x)))`; `[.., hidden]` to the
//! same shape.
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use phase_moe::Expert;
//!
//! let random = |rows, columns| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu);
//! let expert = Expert::new(random(32, 16)?, random(32, 16)?, random(16, 32)?);
//! assert_eq!(expert.forward(&random(5, 16)?)?.dims(), [5, 16]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Operations are Candle's, each with a backward pass. Where a weight is quantised the expert computes in `f32`.

use candle_core::{DType, Module, Tensor};
use candle_nn::{VarBuilder, ops::sigmoid};

use super::borrowed;
use super::check::LikeGate;
use super::projection::{Linears, Projection};
use crate::error::{Error, Result};
use crate::experts::activation::{Activation, Function};
use crate::spec::{MoeSpec, SharedExperts};

/// Projections of one expert and what stands between them; clones share weights.
#[derive(Clone, Debug)]
pub struct Expert {
    gate_proj: Option<Projection>,
    up_proj: Projection,
    down_proj: Projection,
    activation: Activation,
}

/// What an expert has to be.
#[derive(Clone, Copy)]
pub(super) struct ExpertShape<'a> {
    spec: &'a MoeSpec,
    width: usize,
    bias: bool,
}

impl<'a> ExpertShape<'a> {
    pub(super) fn routed(spec: &'a MoeSpec) -> Self {
        Self { spec, width: spec.expert_width, bias: spec.expert_bias }
    }

    pub(super) fn shared(spec: &'a MoeSpec, shared: SharedExperts) -> Self {
        Self { spec, width: shared.width, bias: false }
    }
}

impl Expert {
    /// A SwiGLU expert from `gate_proj` and `up_proj` `[width, hidden]` and `down_proj` `[hidden, width]`: tensors, quantised or not.
    pub fn new(
        gate_proj: impl Into<Projection>,
        up_proj: impl Into<Projection>,
        down_proj: impl Into<Projection>,
    ) -> Self {
        let (gate_proj, up_proj, down_proj) = (Some(gate_proj.into()), up_proj.into(), down_proj.into());
        Self { gate_proj, up_proj, down_proj, activation: Activation::swiglu() }
    }

    /// An expert of any kind.
    ///
    /// # Errors
    /// [`Error::Shape`] for a gate projection that the activation does not have or a missing one that it has,
    /// [`Error::Parameter`] for an activation that cannot be.
    pub fn from_projections(
        activation: Activation,
        gate_proj: Option<Projection>,
        up_proj: Projection,
        down_proj: Projection,
    ) -> Result<Self> {
        activation.check()?;
        check_gated("gate_proj", activation, gate_proj.is_some())?;
        Ok(Self { gate_proj, up_proj, down_proj, activation })
    }

    /// The same expert with biases `[width]`, `[width]` and `[hidden]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a bias of a gate projection that the expert does not have, or none of one that it has.
    pub(crate) fn with_biases(self, gate: Option<Tensor>, up: Tensor, down: Tensor) -> Result<Self> {
        check_gated("gate_proj bias", self.activation, gate.is_some())?;
        Ok(Self {
            gate_proj: self.gate_proj.zip(gate).map(|(projection, bias)| projection.with_bias(bias)),
            up_proj: self.up_proj.with_bias(up),
            down_proj: self.down_proj.with_bias(down),
            activation: self.activation,
        })
    }

    /// Loads an FFN of `width` for all tokens, with the activation and the names of the experts of `spec` and without biases.
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes.
    pub(crate) fn load_dense(spec: &MoeSpec, width: usize, vb: VarBuilder<'_>, linears: &dyn Linears) -> Result<Self> {
        let names = &spec.names;
        let load = |name: &str, rows: usize, columns: usize| -> Result<Projection> {
            Ok(Projection::new(linears.weight(&vb.pp(name), [rows, columns])?, None))
        };
        let gate = spec.activation.gated.then(|| load(&names.gate_proj, width, spec.hidden)).transpose()?;
        let up = load(&names.up_proj, width, spec.hidden)?;
        Self::from_projections(spec.activation, gate, up, load(&names.down_proj, spec.hidden, width)?)
    }

    /// The gate projection, `[width, hidden]`; `None` where the activation has none.
    pub(crate) fn gate_proj(&self) -> Option<&Projection> {
        self.gate_proj.as_ref()
    }

    /// The up projection, `[width, hidden]`.
    pub(crate) fn up_proj(&self) -> &Projection {
        &self.up_proj
    }

    /// The down projection, `[hidden, width]`.
    pub(crate) fn down_proj(&self) -> &Projection {
        &self.down_proj
    }

    /// What stands between the projections.
    pub(crate) fn activation(&self) -> Activation {
        self.activation
    }

    /// Whether the engine can read all projections, which need no gradients.
    pub(super) fn fits_engine(&self) -> bool {
        let Self { gate_proj, up_proj, down_proj, .. } = self;
        [Some(up_proj), Some(down_proj), gate_proj.as_ref()].into_iter().flatten().all(borrowed::projection_fits)
    }

    pub(super) fn check(&self, operand: &str, form: ExpertShape<'_>, like: &LikeGate<'_>) -> Result<()> {
        let (expected, got) = (form.spec.activation, self.activation);
        if expected != got {
            return Err(Error::shape(format!("{operand} activation"), format!("{expected:?}"), format!("{got:?}")));
        }
        let (wide, narrow) = ([form.width, form.spec.hidden], [form.spec.hidden, form.width]);
        let projections = [
            ("gate_proj", self.gate_proj.as_ref(), wide),
            ("up_proj", Some(&self.up_proj), wide),
            ("down_proj", Some(&self.down_proj), narrow),
        ];
        projections.into_iter().try_for_each(|(name, projection, shape)| match projection {
            Some(projection) => projection.check(&format!("{operand} {name}"), shape, form.bias, like),
            None => Ok(()),
        })
    }

    /// The output for `[rows, hidden]`, in the dtype of the rows or, where a weight is quantised, in `f32`.
    pub(super) fn run(&self, rows: &Tensor) -> candle_core::Result<Tensor> {
        let gate_is_quantized = self.gate_proj.as_ref().is_some_and(Projection::is_quantized);
        let in_f32 = gate_is_quantized || self.up_proj.is_quantized() || self.down_proj.is_quantized();
        let rows = if in_f32 { rows.to_dtype(DType::F32)? } else { rows.clone() };
        let up = self.up_proj.forward(&rows, in_f32)?;
        let function = self.activation.function;
        let inner = match &self.gate_proj {
            Some(gate) => (activate(function, &gate.forward(&rows, in_f32)?)? * factor(function, up)?)?,
            None => activate(function, &up)?,
        };
        self.down_proj.forward(&inner, in_f32)
    }
}

impl Module for Expert {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        // One matrix product over all rows, whatever the rank.
        let rows = match hidden.rank() {
            0..=2 => hidden.clone(),
            rank => hidden.flatten_to(rank - 2)?,
        };
        self.run(&rows)?.to_dtype(hidden.dtype())?.reshape(hidden.shape())
    }
}

/// What [`Activation::apply`] does to the gate, or to the up projection where there is no gate.
fn activate(function: Function, x: &Tensor) -> candle_core::Result<Tensor> {
    match function {
        Function::Silu => x.silu(),
        Function::Gelu => x.gelu_erf(),
        Function::GeluTanh => x.gelu(),
        Function::ReluSquared => x.relu()?.sqr(),
        Function::ClampedSilu { alpha, limit } => {
            let gate = x.minimum(f64::from(limit))?;
            &gate * sigmoid(&(&gate * f64::from(alpha))?)?
        }
    }
}

/// What the activated gate is multiplied by.
fn factor(function: Function, up: Tensor) -> candle_core::Result<Tensor> {
    match function {
        Function::ClampedSilu { limit, .. } => up.clamp(-f64::from(limit), f64::from(limit))? + 1.0,
        _ => Ok(up),
    }
}

fn check_gated(operand: &str, activation: Activation, has_gate: bool) -> Result<()> {
    match (activation.gated, has_gate) {
        (true, false) => Err(Error::shape(operand, "one, as the activation is gated", "none")),
        (false, true) => Err(Error::shape(operand, "none, as the activation is not gated", "one")),
        _ => Ok(()),
    }
}
