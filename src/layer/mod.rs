//! The MoE layer for Candle: gate, router, experts, weighted sum.
//!
//! `y = Σ_slots weight · expert(x) + shared(x)`, the last where the layer has it; `x` is `[.., hidden]`, and `y` has the same shape
//! and dtype. A layer is a [`Module`], whose every forward pass starts cold, or keeps a [`LayerState`] from pass to pass:
//!
//! ```
//! use std::sync::Arc;
//!
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use phase_moe::{CapacityRule, LayerState, MoeLayer, MoeSpec, PhaseRouter};
//!
//! let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
//! let layer = MoeLayer::load(&MoeSpec::new(16, 8, 2, 32)?, vb)?;
//! let hidden = Tensor::randn(0f32, 1.0, (2, 40, 16), &Device::Cpu)?;
//! assert_eq!(layer.forward(&hidden)?.dims(), [2, 40, 16]);
//!
//! // Four devices share the experts, and each takes a quarter of the slots.
//! let layer = layer.with_router(Arc::new(PhaseRouter::default())).with_capacity(CapacityRule::per_device(1.0, 4));
//! let mut state = LayerState::default();
//! for _ in 0..2 {
//!     let (output, routed) = layer.route(&hidden, &mut state)?; // the second time prices are warm
//!     assert_eq!((output.dims(), routed.assignment.kept()), (hidden.dims(), 2 * 40 * 2));
//! }
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! A layer runs in one of two ways. On the CPU its experts run on the [`Engine`], which reads the tensors' memory as it is. Under
//! `Var`s, on other devices and for weights that the engine does not read, they run as Candle's operations, and the layer is
//! differentiable: gradients reach the gate through the combine weights and the experts through the dispatch. Either way scores,
//! routing and the weighted sum are in `f32`, and the gate's product of a tensor is in the weights' dtype, as in transformers.
//!
//! Knows nothing of attention, checkpoints or model families.

pub(crate) mod borrowed;
mod by_candle;
pub(crate) mod by_engine;
mod by_ranks;
mod check;
pub(crate) mod expert;
mod experts;
pub(crate) mod gate;
pub(crate) mod load;
pub(crate) mod loss;
pub(crate) mod packed;
pub(crate) mod projection;
pub(crate) mod routed;
pub(crate) mod shared;
#[cfg(test)]
mod tests;
pub(crate) mod worth;

pub use self::expert::Expert;
pub use self::gate::Gate;
pub use self::loss::{load_balancing_loss, router_z_loss};
pub use self::packed::Packed;
pub use self::projection::Projection;
pub use self::shared::Shared;
pub use self::worth::{OutputNorms, Probe, ProbeFit};
pub use crate::routing::layer::LossFreeBias;

pub use self::experts::Experts;
pub use self::routed::Routed;

use std::sync::{Arc, LazyLock};

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;

use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::experts::engine::Engine;
use crate::experts::matrix::Matrix;
use crate::layer::borrowed::Borrowed;
use crate::layer::by_engine::Source;
use crate::layer::routed::{Pass, Seen};
use crate::offload::cached::CachedExperts;
use crate::parallel::share::Share;
use crate::parallel::spread::Spread;
use crate::routing::capacity::{Capacity, CapacityRule};
use crate::routing::layer::{Buffers, Gated, LayerRouter, LayerState};
use crate::routing::plan::DispatchPlan;
use crate::routing::router::{RouteContext, RouteState, Router};
use crate::spec::MoeSpec;

/// What layers run on that are told of no other: they work in the same memory, one after the other.
static ENGINE: LazyLock<Arc<Engine>> = LazyLock::new(Arc::default);

/// A Mixture-of-Experts FFN; clones share weights.
#[derive(Clone)]
pub struct MoeLayer {
    spec: MoeSpec,
    gate: Gate,
    experts: Experts,
    /// Where the experts of other ranks are, if they are over several; those of this rank are `experts`.
    spread: Option<Arc<Spread>>,
    shared: Option<Shared>,
    routing: LayerRouter,
    norms: Option<Arc<OutputNorms>>,
    index: usize,
    engine: Arc<Engine>,
    /// Nothing has to be differentiated and all weights lie in this machine's memory as the engine reads them.
    fits_engine: bool,
}

/// What it is made of and set to.
impl MoeLayer {
    /// From a gate, experts (a `Vec` of them, or those of a cache) and, where `spec` has one, the expert that all tokens share.
    /// Routes by dropless top-k until told otherwise.
    ///
    /// # Errors
    /// [`Error::Shape`] when gate, experts or shared expert do not have the sizes, biases or activation of `spec`, a dense weight not
    /// the gate's dtype, or any weight not its device, when experts are too few or too many, or a shared expert is there and not in
    /// `spec` or the other way round. Beside experts in a cache also for a gate or a shared expert on another device or under `Var`s.
    pub fn new(spec: MoeSpec, gate: Gate, experts: impl Into<Experts>, shared: Option<Shared>) -> Result<Self> {
        Self::build(spec, gate, experts.into(), shared, None)
    }

    /// The same with the experts of this rank alone, in ascending order, where they are over several; of a cache's, all can be there.
    fn build(
        spec: MoeSpec,
        gate: Gate,
        experts: Experts,
        shared: Option<Shared>,
        spread: Option<Arc<Spread>>,
    ) -> Result<Self> {
        spec.check()?;
        gate.check(&spec)?;
        let count = spread.as_ref().map_or(spec.experts, |spread| spread.own().len());
        experts.check(&spec, count, &gate.like())?;
        match (spec.shared, &shared) {
            (Some(expected), Some(shared)) => shared.check(&spec, expected, &gate.like())?,
            (Some(expected), None) => {
                return Err(Error::shape("shared expert", format!("one of width {}", expected.width), "none"));
            }
            (None, Some(_)) => return Err(Error::shape("shared expert", "none", "one")),
            (None, None) => {}
        }
        // Neither trackedness nor place of a tensor ever changes.
        let fits_engine = gate.fits_engine()
            && experts.held().iter().chain(shared.as_ref().map(Shared::expert)).all(Expert::fits_engine)
            && shared.as_ref().and_then(Shared::gate).is_none_or(|gate| !gate.track_op());
        if experts.cached().is_some() && !fits_engine {
            return Err(Error::shape("gate and shared expert", CACHED_NEEDS, "others"));
        }
        if spread.is_some() && !fits_engine {
            return Err(Error::shape("layer over ranks", CACHED_NEEDS, "another"));
        }
        let routing = LayerRouter::default();
        let engine = ENGINE.clone();
        Ok(Self { spec, gate, experts, spread, shared, routing, norms: None, index: 0, engine, fits_engine })
    }

    /// Loads the tensors that `spec` says there are and `spec.names` names under `vb`, for example `vb.pp("mlp")`; experts one by
    /// one or stacked, as they are there.
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes; [`Error::Shape`] for stacks of other experts.
    pub fn load(spec: &MoeSpec, vb: VarBuilder<'_>) -> Result<Self> {
        spec.check()?;
        let experts = load::from_builder(spec, &vb)?;
        Self::load_with(spec, vb, experts, None, &projection::Built)
    }

    /// Loads the same but for the experts, which are these; of this rank alone where they are over several.
    ///
    /// # Errors
    /// As [`MoeLayer::load`] and [`MoeLayer::new`].
    pub(crate) fn load_with(
        spec: &MoeSpec,
        vb: VarBuilder<'_>,
        experts: impl Into<Experts>,
        spread: Option<Arc<Spread>>,
        linears: &dyn projection::Linears,
    ) -> Result<Self> {
        spec.check()?;
        let gate = Gate::load_in(spec, &vb)?;
        Self::build(spec.clone(), gate, experts.into(), Shared::load(spec, vb, linears)?, spread)
    }

    /// The same layer with this router.
    pub fn with_router(mut self, router: Arc<dyn Router>) -> Self {
        self.set_router(router);
        self
    }

    /// The same layer within these limits. A router that keeps within none gives an error when the layer runs.
    pub fn with_capacity(mut self, rule: CapacityRule) -> Self {
        self.set_capacity(Some(rule));
        self
    }

    /// Says which layer of its model this is: routers that draw do so differently in each. Experts in a cache say it themselves.
    pub fn with_index(self, index: usize) -> Self {
        Self { index, ..self }
    }

    /// Runs experts on another engine than the one that all layers share.
    pub(crate) fn with_engine(self, engine: Arc<Engine>) -> Self {
        Self { engine, ..self }
    }

    /// Sets the router.
    pub fn set_router(&mut self, router: Arc<dyn Router>) {
        self.routing.router = router;
    }

    /// Sets the rule that limits the router, see [`MoeLayer::with_capacity`]; `None` for no limit.
    pub fn set_capacity(&mut self, rule: Option<CapacityRule>) {
        self.routing.capacity = rule;
    }

    /// Makes routers move slots by `gate score · size of the expert's output` where a limit applies; `None` for the gate score
    /// alone. Where no slot has to move the gate's choice stands. Combine weights, figures of gate mass and its bound stay what they are.
    pub fn set_output_norms(&mut self, norms: Option<Arc<OutputNorms>>) {
        self.norms = norms;
    }

    /// Sets how many experts a token gets.
    ///
    /// # Errors
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`].
    pub fn set_top_k(&mut self, top_k: usize) -> Result<()> {
        let spec = MoeSpec { top_k, ..self.spec.clone() };
        spec.check()?;
        self.spec = spec;
        Ok(())
    }

    /// Sets the selection bias of the gate, `[experts]`, which moves which experts are chosen and not the combine weights. A layer loaded
    /// with one has it in a variable, as its other parameters: that is what a `VarMap` saves, and clones share it. A layer that has none
    /// gets one of its own.
    ///
    /// # Errors
    /// [`Error::Shape`] for another length, and for a layer loaded from variables whose spec has no such bias: it would not be
    /// saved with them.
    /// [`Error::Parameter`] for values that are not finite.
    pub fn set_selection_bias(&mut self, bias: &[f32]) -> Result<()> {
        self.gate.set_selection_bias(bias)
    }

    /// Has its experts come from a cache from now on; whatever held them before goes, but for their biases where the new ones have none.
    ///
    /// # Errors
    /// As [`MoeLayer::new`]; nothing has changed then.
    pub(crate) fn set_cached(&mut self, experts: CachedExperts) -> Result<()> {
        let experts = self.experts.replaced(experts, &self.spec)?;
        *self = Self {
            routing: self.routing.clone(),
            norms: self.norms.clone(),
            index: self.index,
            engine: self.engine.clone(),
            ..Self::build(
                self.spec.clone(),
                self.gate.clone(),
                experts.into(),
                self.shared.clone(),
                self.spread.clone(),
            )?
        };
        Ok(())
    }

    /// Sizes, scoring and names.
    pub fn spec(&self) -> &MoeSpec {
        &self.spec
    }

    /// The bias of its gate that counts for selection only, as it is now; `None` where it has none.
    ///
    /// # Errors
    /// [`Error::Candle`] when it cannot be read from its device.
    pub fn selection_bias(&self) -> Result<Option<Vec<f32>>> {
        self.gate.selection_bias()
    }

    /// The gate.
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The experts in memory, by id; none where they are in a cache. Of a layer over ranks those of this rank, in ascending order.
    pub fn experts(&self) -> &[Expert] {
        self.experts.held()
    }

    /// The layer of an expert cache that its experts are in, if they are.
    pub(crate) fn cached(&self) -> Option<&CachedExperts> {
        self.experts.cached()
    }

    /// Where its experts are, if they are over ranks.
    pub(crate) fn spread(&self) -> Option<&Spread> {
        self.spread.as_deref()
    }
}

/// How it runs.
impl MoeLayer {
    /// The layer's output for `hidden` (`[.., hidden]`, tokens in row-major order), and what the router did with what it learnt before.
    ///
    /// # Errors
    /// As [`MoeLayer::route_with`].
    pub fn route(&self, hidden: &Tensor, state: &mut LayerState) -> Result<(Tensor, Routed)> {
        self.route_with(hidden, RouteContext { step: state.step, ..RouteContext::default() }, state)
    }

    /// The same with what else is known of the batch: padding, token ids, resident experts, the number of the step. The layer's index
    /// is the layer's own; where its experts are in a cache, that one says which are resident unless the context does.
    ///
    /// # Errors
    /// [`Error::Shape`] for a hidden state of the wrong rank, width, dtype or device or a context of another batch,
    /// [`Error::NonFiniteLogit`] when the gate gives NaN or +∞, [`Error::CapacityIgnored`] for limits and a router that keeps within
    /// none, [`Error::Answer`] when the router's answer is none to its request, [`Error::Candle`] when Candle refuses an operation.
    pub fn route_with(
        &self,
        hidden: &Tensor,
        context: RouteContext<'_>,
        state: &mut LayerState,
    ) -> Result<(Tensor, Routed)> {
        let (output, pass) = self.pass(hidden, context, self.spec.top_k, &mut state.router, &mut state.buffers)?;
        state.step = context.step.saturating_add(1);
        Ok((output, pass.routed(&state.buffers.assignment, context.padding)))
    }

    /// The experts that the layer would use for `hidden`, `top_k` a token, without a limit; nothing runs and `state` stays what it is. Expert caches read
    /// them before the layer comes to them.
    ///
    /// # Errors
    /// As [`MoeLayer::route_with`].
    pub(crate) fn guess(
        &self,
        hidden: &Tensor,
        context: RouteContext<'_>,
        top_k: usize,
        state: &RouteState,
    ) -> Result<ExpertSet> {
        let values = self.logits(&self.tokens(hidden)?)?.flatten_all()?.to_vec1::<f32>()?;
        let bias = self.gate.selection_bias()?;
        let gated = self.gated(&values, top_k, bias.as_deref());
        let (capacity, mut buffers) = (Capacity::unlimited(self.spec.experts)?, Buffers::default());
        self.decide(&gated, None, &capacity, context, &mut state.clone(), &mut buffers)?;
        let mut used = ExpertSet::default();
        buffers.assignment.used_experts(&mut used)?;
        Ok(used)
    }

    /// One forward pass with `top_k` experts a token: the output, and what was seen on the way; the assignment is in `buffers`.
    pub(crate) fn pass(
        &self,
        hidden: &Tensor,
        context: RouteContext<'_>,
        top_k: usize,
        state: &mut RouteState,
        buffers: &mut Buffers,
    ) -> Result<(Tensor, Pass)> {
        let input = self.tokens(hidden)?;
        let by_engine = self.by_engine(&input);
        if let Some(spread) = &self.spread {
            if !by_engine {
                return Err(Error::shape("hidden state", CACHED_NEEDS, "another"));
            }
            let rows = input.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let mut output = vec![0.0; rows.len()];
            let seen = self.pass_over_ranks((spread, &rows, None), context, top_k, state, buffers, &mut output)?;
            let logits = Tensor::from_slice(&buffers.logits, (input.dim(0)?, self.spec.experts), &Device::Cpu)?;
            let output = Tensor::from_vec(output, input.shape(), &Device::Cpu)?;
            return Ok((output.to_dtype(hidden.dtype())?.reshape(hidden.shape())?, seen.pass(input, logits)));
        }
        if !by_engine && self.cached().is_some() {
            return Err(Error::shape("hidden state", CACHED_NEEDS, "another"));
        }
        let logits = self.logits(&input)?;
        let (values, selection_bias) = (logits.flatten_all()?.to_vec1::<f32>()?, self.gate.selection_bias()?);
        let gated = self.gated(&values, top_k, selection_bias.as_deref());
        let capacity = self.routing.capacity(&gated, context.padding)?;
        let route_time = self.decide(&gated, Some(&input), &capacity, context, state, buffers)?;

        let (assignment, scoring) = (&buffers.assignment, self.spec.scoring);
        let (shared, plan) = (self.shared.as_ref(), DispatchPlan::from(assignment));
        let output = match by_engine {
            true => {
                let (rows, input) = (input.dim(0)?, input.contiguous()?);
                let mut output = vec![0.0; rows * self.spec.hidden];
                {
                    let borrowed = Borrowed::tensor(&input)?;
                    let input = borrowed.matrix()?;
                    let shared = shared.map(|shared| (shared, rows));
                    by_engine::forward(&self.engine, input, self.source(), shared, &plan, &mut output)?;
                }
                Tensor::from_vec(output, (rows, self.spec.hidden), input.device())?
            }
            false => {
                let weights = by_candle::slot_weights(&logits, assignment, &plan, scoring)?;
                by_candle::forward(&input, self.experts(), shared, &plan, &weights)?
            }
        };
        let output = output.to_dtype(hidden.dtype())?.reshape(hidden.shape())?;
        Ok((output, Pass { input, logits, capacity, route_time, scoring, selection_bias }))
    }

    fn source(&self) -> Source<'_> {
        Source { spec: &self.spec, experts: &self.experts, spread: None }
    }

    /// The same over rows `[tokens, hidden]` in `f32` into `output` of the same shape, without a tensor where the layer runs on the engine; the
    /// logits are in `buffers` too. Of a batch that is shared out over ranks the rows are this rank's own.
    pub(crate) fn pass_rows(
        &self,
        (rows, share): (&[f32], Option<&Share>),
        context: RouteContext<'_>,
        top_k: usize,
        state: &mut RouteState,
        buffers: &mut Buffers,
        output: &mut [f32],
    ) -> Result<Seen> {
        if let Some(spread) = &self.spread {
            return self.pass_over_ranks((spread, rows, share), context, top_k, state, buffers, output);
        }
        let (hidden, scoring) = (self.spec.hidden, self.spec.scoring);
        let tokens = rows.len() / hidden;
        let tensor = || Tensor::from_slice(rows, (tokens, hidden), &Device::Cpu);
        if !self.fits_engine {
            let (values, pass) = self.pass(&tensor()?, context, top_k, state, buffers)?;
            output.copy_from_slice(&values.flatten_all()?.to_vec1::<f32>()?);
            buffers.logits = pass.logits.flatten_all()?.to_vec1()?;
            let Pass { capacity, route_time, selection_bias, .. } = pass;
            return Ok(Seen { capacity, route_time, scoring, selection_bias });
        }
        let input = Matrix::from_f32(tokens, hidden, rows)?;
        let mut logits = std::mem::take(&mut buffers.logits);
        self.gate.logits_of_rows(&self.engine, input, &mut logits)?;
        let selection_bias = self.gate.selection_bias()?;
        let gated = self.gated(&logits, top_k, selection_bias.as_deref());
        let capacity = self.routing.capacity(&gated, context.padding)?;
        let tensor = self.norms.is_some().then(tensor).transpose()?;
        let route_time = self.decide(&gated, tensor.as_ref(), &capacity, context, state, buffers);
        buffers.logits = logits;
        let route_time = route_time?;
        let mut plan = std::mem::take(&mut buffers.plan);
        plan.refill(&buffers.assignment);
        let shared = self.shared.as_ref().map(|shared| (shared, tokens));
        let done = by_engine::forward(&self.engine, input, self.source(), shared, &plan, output);
        buffers.plan = plan;
        done?;
        Ok(Seen { capacity, route_time, scoring, selection_bias })
    }

    /// Routes into `buffers`; `tokens` are needed where output norms count. Returns the time in the router.
    fn decide(
        &self,
        gated: &Gated<'_>,
        tokens: Option<&Tensor>,
        capacity: &Capacity,
        context: RouteContext<'_>,
        state: &mut RouteState,
        buffers: &mut Buffers,
    ) -> Result<std::time::Duration> {
        let norms = self.norms.as_ref().map(|norms| {
            move || match tokens {
                Some(tokens) => norms.norms(tokens, self.experts()),
                None => Err(Error::shape("hidden state", "one, as output norms need", "none")),
            }
        });
        let worth = norms.as_ref().map(|norms| norms as &dyn Fn() -> Result<Vec<f32>>);
        // Lent to the router beside the buffers that it is one of.
        let mut counted = std::mem::take(&mut buffers.resident);
        let resident = match (context.resident, self.cached()) {
            (Some(resident), _) => Some(resident),
            (None, Some(cached)) => {
                cached.counted_into(&mut counted)?;
                Some(&counted)
            }
            (None, None) => None,
        };
        let context = RouteContext { layer: self.index(), resident, ..context };
        let time = self.routing.route_within(gated, capacity, context, state, buffers, worth);
        buffers.resident = counted;
        time
    }

    fn gated<'a>(&self, logits: &'a [f32], top_k: usize, selection_bias: Option<&'a [f32]>) -> Gated<'a> {
        let MoeSpec { experts, scoring, .. } = self.spec;
        Gated { logits, experts, top_k, scoring, selection_bias }
    }

    fn index(&self) -> usize {
        self.cached().map_or(self.index, CachedExperts::layer)
    }

    /// A hidden state of this layer's width, dtype and device as `[tokens, hidden]`.
    fn tokens(&self, hidden: &Tensor) -> Result<Tensor> {
        let width = self.spec.hidden;
        if hidden.dims().last() != Some(&width) {
            return Err(Error::shape("hidden state", format!("[.., {width}]"), format!("{:?}", hidden.dims())));
        }
        self.gate.like().check("hidden state", hidden)?;
        Ok(hidden.reshape((hidden.elem_count() / width, width))?)
    }

    fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        match self.by_engine(tokens) {
            true => self.gate.logits_by(&self.engine, tokens),
            false => self.gate.logits(tokens),
        }
    }

    fn by_engine(&self, tokens: &Tensor) -> bool {
        self.fits_engine && !tokens.track_op() && tokens.device().is_cpu()
    }
}

/// A cold start: the router has learnt nothing. [`MoeLayer::route`] keeps what it learns.
impl Module for MoeLayer {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        let (context, top_k) = (RouteContext::default(), self.spec.top_k);
        let (output, _) = self.pass(hidden, context, top_k, &mut RouteState::default(), &mut Buffers::default())?;
        Ok(output)
    }
}

/// What it is and which router it has, without its weights: models of Candle derive this.
impl std::fmt::Debug for MoeLayer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut layer = formatter.debug_struct("MoeLayer");
        layer.field("index", &self.index()).field("spec", &self.spec).field("router", &self.routing.router.name());
        layer.field("capacity", &self.routing.capacity).finish_non_exhaustive()
    }
}

/// What a layer needs whose experts are in a cache.
const CACHED_NEEDS: &str = "one on the CPU without gradients, as experts in a cache need";
