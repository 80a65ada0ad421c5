//! The MoE layer for Burn: gate, router, experts, weighted sum. [`Moe`] is the module; which of two ways its experts run is decided here.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use phase_moe::routing::{LayerRouter, LayerState};
use phase_moe::{
    CachedExperts, CapacityRule, DispatchPlan, Engine, Error, ExpertWeights, Logits, Matrix, MoeSpec, Result,
    RouteContext, Router,
};

use crate::by_burn;
use crate::by_engine::{self, Memory};
use crate::expert::{Expert, Projection};
use crate::gate::{Gate, numbers};
use crate::routed::Routed;

/// A Mixture-of-Experts FFN, made by [`MoeConfig::init`](crate::MoeConfig::init) or [`Moe::load`]; clones share weights.
///
/// `y = Σ_slots weight · expert(x) + shared(x)`, the last where the layer has it; `x` is `[.., hidden]`, and `y` has the same shape and dtype.
/// Names of its parameters are those of transformers: `gate.weight`, `experts.0.up_proj.weight`, …
#[derive(Module, Debug)]
pub struct Moe {
    /// The gate.
    pub gate: Gate,
    /// The experts by id; none where they are in a cache.
    pub experts: Vec<Expert>,
    /// What every token meets beside its experts.
    pub shared_expert: Option<Expert>,
    /// What weighs it, `[1, hidden]`.
    pub shared_expert_gate: Option<Projection>,
    #[module(skip)]
    pub(crate) settings: Settings,
}

/// What a layer has beside its weights; no record holds it.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) spec: MoeSpec,
    pub(crate) router: LayerRouter,
    pub(crate) index: usize,
    pub(crate) engine: Arc<Engine>,
    pub(crate) cached: Option<CachedExperts>,
}

impl Settings {
    /// The same with `top_k` experts a token, if that is a layer.
    pub(crate) fn checked(self, top_k: usize) -> Result<Self> {
        let MoeSpec { hidden, experts, expert_width, activation, .. } = self.spec;
        MoeSpec::new(hidden, experts, top_k, expert_width)?;
        // An activation is checked with the first expert that has it.
        let one = Matrix::from_f32(1, 1, &[0.0])?.into();
        ExpertWeights::new(activation, activation.gated.then_some(one), one, one)?;
        Ok(Self { spec: MoeSpec { top_k, ..self.spec }, ..self })
    }
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("spec", &self.spec).field("router", &self.router).finish_non_exhaustive()
    }
}

/// What a layer needs whose experts are in a cache.
const CACHED_NEEDS: &str = "on Flex without autodiff, as experts in a cache need";

/// What it is set to.
impl Moe {
    /// The same layer with this router.
    pub fn with_router(mut self, router: Arc<dyn Router>) -> Self {
        self.settings.router.router = router;
        self
    }

    /// The same layer within these limits, or none. A router that keeps within none gives an error when the layer runs.
    pub fn with_capacity(mut self, rule: Option<CapacityRule>) -> Self {
        self.settings.router.capacity = rule;
        self
    }

    /// Says which layer of its model this is: routers that draw do so differently in each.
    pub fn with_index(mut self, index: usize) -> Self {
        self.settings.index = index;
        self
    }

    /// Sets how many experts a token gets.
    ///
    /// # Errors
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`].
    pub fn set_top_k(&mut self, top_k: usize) -> Result<()> {
        self.settings = self.settings.clone().checked(top_k)?;
        Ok(())
    }

    /// Sets the bias of the gate that counts for selection only, `[experts]`: what
    /// [`LossFreeBias`](phase_moe::routing::LossFreeBias) says. Records hold it.
    ///
    /// # Errors
    /// [`Error::Shape`] for another length and for a layer whose spec has no such bias, [`Error::Parameter`] for values that are not finite.
    pub fn set_selection_bias(&mut self, bias: &[f32]) -> Result<()> {
        self.gate.set_selection_bias(bias)
    }

    /// Sizes, scoring and names.
    pub fn spec(&self) -> &MoeSpec {
        &self.settings.spec
    }
}

/// How it runs.
impl Moe {
    /// The layer's output for `hidden`, `[.., hidden]`, tokens in row-major order. Starts cold; [`Moe::route`] keeps what the router learns.
    ///
    /// # Panics
    /// Where [`Moe::route`] gives an error, as Burn's modules do.
    pub fn forward<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        match self.route(hidden, &mut LayerState::default()) {
            Ok((output, _)) => output,
            Err(error) => panic!("Moe: {error}"),
        }
    }

    /// The same, and what the router did with what it learnt before.
    ///
    /// # Errors
    /// As [`Moe::route_with`].
    pub fn route<const D: usize>(&self, hidden: Tensor<D>, state: &mut LayerState) -> Result<(Tensor<D>, Routed)> {
        self.route_with(hidden, RouteContext { step: state.step, ..RouteContext::default() }, state)
    }

    /// The same with what else is known of the batch: padding, token ids, resident experts, the number of the step. The layer's index is
    /// the layer's own; where its experts are in a cache, that one says which are resident unless the context does.
    ///
    /// # Errors
    /// [`Error::Shape`] for a hidden state of another width, dtype or device than the layer's, a context of another batch, experts in a cache
    /// and a hidden state that is not on Flex without autodiff; [`Error::NonFiniteLogit`] when the gate gives NaN or +∞,
    /// [`Error::CapacityIgnored`] for limits and a router that keeps within none, [`Error::Answer`] when the router's answer is none to its
    /// request, [`Error::Parameter`] for scores that have no gradient under autodiff.
    pub fn route_with<const D: usize>(
        &self,
        hidden: Tensor<D>,
        context: RouteContext<'_>,
        state: &mut LayerState,
    ) -> Result<(Tensor<D>, Routed)> {
        let Settings { spec, router, engine, cached, .. } = &self.settings;
        let (shape, dtype) = (hidden.dims(), hidden.dtype());
        let input = self.tokens(hidden)?;
        // A tensor under autodiff has no memory of Flex to borrow, whoever may want its gradient.
        let memory = Memory::of(input.clone());
        let by_engine = match &memory {
            Some(memory) => by_engine::logits(engine, memory, &self.gate, spec)?,
            None => None,
        };
        if by_engine.is_none() && cached.is_some() {
            return Err(Error::shape("hidden state and gate", CACHED_NEEDS, "others"));
        }
        let (logits, values) = match by_engine {
            Some(values) => {
                let data = TensorData::new(values.clone(), [values.len() / spec.experts, spec.experts]);
                (Tensor::from_data(data, &input.device()), values)
            }
            None => {
                let logits = self.gate.logits(input.clone());
                (logits.clone(), numbers(logits.without_autodiff()))
            }
        };
        let selection_bias = self.gate.selection_bias();
        let (scoring, bias) = (spec.scoring, selection_bias.as_deref());
        let gate = Logits::new(&values, values.len() / spec.experts, spec.experts)?;
        let mut resident = phase_moe::ExpertSet::default();
        let resident = match (context.resident, cached) {
            (Some(resident), _) => Some(resident),
            (None, Some(cached)) => {
                cached.counted_into(&mut resident)?;
                Some(&resident)
            }
            (None, None) => None,
        };
        let context = RouteContext { layer: self.settings.index, resident, ..context };
        let (assignment, capacity, route_time) = router.route(&gate, scoring, spec.top_k, bias, context, state)?;
        let assignment = assignment.clone();
        let plan = DispatchPlan::from(&assignment);
        let by_engine = match memory.filter(|_| !logits.is_autodiff()) {
            Some(memory) => by_engine::forward(engine, &memory, self, &plan)?,
            None => None,
        };
        let output = match by_engine {
            Some(output) => output,
            None if cached.is_some() => return Err(Error::shape("shared expert", CACHED_NEEDS, "another")),
            None => {
                let weights = by_burn::slot_weights(&logits, &assignment, &plan, scoring)?;
                by_burn::forward(input, self, &plan, weights)
            }
        };
        let padding = context.padding.map(<[bool]>::to_vec);
        let routed = Routed { logits, assignment, capacity, padding, route_time, scoring, selection_bias };
        Ok((output.cast(dtype).reshape(shape), routed))
    }

    /// A hidden state of this layer's width, dtype and device as `[tokens, hidden]`.
    fn tokens<const D: usize>(&self, hidden: Tensor<D>) -> Result<Tensor<2>> {
        let (width, dims, weight) = (self.settings.spec.hidden, hidden.dims(), self.gate.weight.val());
        if dims.last() != Some(&width) {
            return Err(Error::shape("hidden state", format!("[.., {width}]"), format!("{dims:?}")));
        }
        if hidden.dtype() != weight.dtype() {
            let expected = format!("{:?} like the gate weight", weight.dtype());
            return Err(Error::shape("hidden state", expected, format!("{:?}", hidden.dtype())));
        }
        if hidden.device() != weight.device() {
            let expected = format!("device {:?} like the gate weight", weight.device());
            return Err(Error::shape("hidden state", expected, format!("{:?}", hidden.device())));
        }
        let tokens = dims.iter().product::<usize>() / width;
        Ok(hidden.reshape([tokens, width]))
    }

    pub(crate) fn device(&self) -> Device {
        self.gate.weight.val().device()
    }
}
