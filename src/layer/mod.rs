//! The MoE layer for Candle: gate, router, experts, weighted sum.
//!
//! `y = Σ_slots weight · expert(x) + shared(x)`, the last where the layer has it, input `[.., hidden]`, output the same shape and
//! dtype.
//! Scores, routing and the weighted sum are in `f32` whatever the dtype of the weights; the gate's product is in theirs, as
//! in transformers. On the CPU experts run on the [`Engine`], which reads the tensors' memory as it is. Under `Var`s, on other
//! devices and for weights that the engine does not read, they run as Candle's operations: then the layer is differentiable,
//! gradients reach the gate through the combine weights and the experts through the dispatch.
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use phase_moe::layer::MoeLayer;
//! use phase_moe::spec::MoeSpec;
//!
//! let (device, vars) = (Device::Cpu, VarMap::new());
//! let vb = VarBuilder::from_varmap(&vars, candle_core::DType::F32, &device);
//! let layer = MoeLayer::load(&MoeSpec::new(16, 8, 2, 32)?, vb.pp("mlp"))?;
//! let hidden = Tensor::randn(0f32, 1.0, (2, 5, 16), &device)?;
//! assert_eq!(layer.forward(&hidden)?.dims(), [2, 5, 16]);
//! let (_, assignment) = layer.forward_routed(&hidden)?;
//! assert_eq!(assignment.kept(), 2 * 5 * 2);
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of attention, checkpoints or model families.

mod borrowed;
pub mod cached;
mod dispatch;
pub mod expert;
pub mod gate;
mod guess;
pub(crate) mod load;
pub mod loss;
pub mod packed;
pub mod projection;
pub mod shared;
pub mod worth;

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;

use crate::error::{Error, Result};
use crate::experts::engine::Engine;
use crate::layer::borrowed::{Borrowed, Source};
use crate::layer::cached::{CachedExperts, ExpertBiases};
use crate::layer::expert::{Expert, Form};
use crate::layer::gate::Gate;
use crate::layer::shared::Shared;
use crate::layer::worth::OutputNorms;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::{Capacity, CapacityRule};
use crate::routing::check::check;
use crate::routing::logits::Logits;
use crate::routing::metrics::RouteMetrics;
use crate::routing::plan::DispatchPlan;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router};
use crate::routing::scores::Scores;
use crate::routing::topk::TopK;
use crate::spec::MoeSpec;

/// A Mixture-of-Experts FFN; clones share weights.
#[derive(Clone)]
pub struct MoeLayer {
    spec: MoeSpec,
    gate: Gate,
    experts: Experts,
    shared: Option<Shared>,
    router: Arc<dyn Router>,
    capacity: Option<CapacityRule>,
    norms: Option<Arc<OutputNorms>>,
    index: usize,
    engine: Arc<Engine>,
    /// Nothing has to be differentiated and all weights lie in this machine's memory as the engine reads them.
    fits_engine: bool,
}

/// Where the experts are.
#[derive(Clone)]
enum Experts {
    Held(Vec<Expert>),
    Cached(CachedExperts),
}

/// What the router saw and did in one forward pass of one layer.
#[derive(Clone, Debug)]
pub struct Routing {
    /// What the layer got, `[tokens, hidden]`; part of the graph under `Var`s.
    pub input: Tensor,
    /// Gate logits, `[tokens, experts]` f32; part of the graph under `Var`s.
    pub logits: Tensor,
    /// Gate scores made of them.
    pub scores: Scores,
    /// Room there was in this batch.
    pub capacity: Capacity,
    /// Who went where.
    pub assignment: Assignment,
    /// True for padding tokens, which count in no loss; `None` when there are none.
    pub padding: Option<Vec<bool>>,
    /// Time in the router alone: from scores to assignment.
    pub route_time: Duration,
}

impl Routing {
    /// The figures of this routing; `context` is what the forward pass was given.
    ///
    /// # Errors
    /// [`Error::Shape`] when `context` is of another batch.
    pub fn metrics(&self, context: RouteContext<'_>) -> Result<RouteMetrics> {
        let request = RouteRequest::new(&self.scores, self.assignment.top_k(), &self.capacity, context)?;
        Ok(RouteMetrics::new(&request, &self.assignment))
    }
}

impl MoeLayer {
    /// From a gate and experts, where `spec` has no shared expert; routes by dropless top-k until told otherwise.
    ///
    /// # Errors
    /// [`Error::Shape`] when the gate or an expert does not have the sizes, biases or activation of `spec`, a dense weight not
    /// the gate's dtype, or any weight not its device, when experts are too few or too many, or `spec` has a shared expert.
    pub fn new(spec: MoeSpec, gate: Gate, experts: Vec<Expert>) -> Result<Self> {
        Self::build(spec, gate, Experts::Held(experts), None)
    }

    /// From a gate, experts and the expert that all tokens share.
    ///
    /// # Errors
    /// As [`MoeLayer::new`], for the shared expert too, or when `spec` has none.
    pub fn with_shared(spec: MoeSpec, gate: Gate, experts: Vec<Expert>, shared: Shared) -> Result<Self> {
        Self::build(spec, gate, Experts::Held(experts), Some(shared))
    }

    /// From a gate, experts that an expert cache brings into memory, and where `spec` has it the expert that all tokens share.
    /// Such a layer runs on the CPU without gradients; routers see what is in the cache.
    ///
    /// # Errors
    /// As [`MoeLayer::new`] and [`MoeLayer::with_shared`]; [`Error::Shape`] for biases that are missing or too many, and for a gate or a
    /// shared expert on another device or under `Var`s.
    pub fn with_cached(spec: MoeSpec, gate: Gate, experts: CachedExperts, shared: Option<Shared>) -> Result<Self> {
        let layer = Self::build(spec, gate, Experts::Cached(experts), shared)?;
        if !layer.fits_engine {
            return Err(Error::shape("gate and shared expert", CACHED_NEEDS, "others"));
        }
        Ok(layer)
    }

    /// Has its experts come from a cache from now on; whatever held them before goes, but for their biases where the new ones have none.
    ///
    /// # Errors
    /// As [`MoeLayer::with_cached`]; nothing has changed then.
    pub fn set_cached(&mut self, experts: CachedExperts) -> Result<()> {
        let experts = match (self.spec.expert_bias, &self.experts) {
            (false, _) => experts,
            (true, Experts::Cached(before)) => experts.or_biases(before),
            (true, Experts::Held(held)) if !experts.has_biases() => {
                experts.with_biases(held.iter().map(ExpertBiases::of).collect::<Result<_>>()?)
            }
            (true, Experts::Held(_)) => experts,
        };
        experts.check(&self.spec)?;
        if !self.fits_engine {
            return Err(Error::shape("gate and shared expert", CACHED_NEEDS, "others"));
        }
        self.experts = Experts::Cached(experts);
        Ok(())
    }

    fn build(spec: MoeSpec, gate: Gate, experts: Experts, shared: Option<Shared>) -> Result<Self> {
        spec.check()?;
        gate.check(&spec)?;
        let held: &[Expert] = match &experts {
            Experts::Held(held) if held.len() != spec.experts => {
                return Err(Error::shape("experts", spec.experts, held.len()));
            }
            Experts::Held(held) => held,
            Experts::Cached(cached) => {
                cached.check(&spec)?;
                &[]
            }
        };
        for (index, expert) in held.iter().enumerate() {
            expert.check(&format!("expert {index}"), Form::routed(&spec), &gate)?;
        }
        match (spec.shared, &shared) {
            (Some(expected), Some(shared)) => shared.check(&spec, expected, &gate)?,
            (Some(expected), None) => {
                return Err(Error::shape("shared expert", format!("one of width {}", expected.width), "none"));
            }
            (None, Some(_)) => return Err(Error::shape("shared expert", "none", "one")),
            (None, None) => {}
        }
        let router = Arc::new(TopK::default());
        // Neither trackedness nor place of a tensor ever changes.
        let fits_engine = gate.fits_engine()
            && held.iter().chain(shared.as_ref().map(Shared::expert)).all(Expert::fits_engine)
            && shared.as_ref().and_then(Shared::gate).is_none_or(|gate| !gate.track_op());
        let engine = Arc::default();
        Ok(Self { spec, gate, experts, shared, router, capacity: None, norms: None, index: 0, engine, fits_engine })
    }

    /// Loads the tensors that `spec` says there are and `spec.names` names under `vb`, for example `vb.pp("mlp")`; experts one by
    /// one or stacked, as they are there.
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes; as [`MoeSpec::stack_order`] for stacked experts.
    pub fn load(spec: &MoeSpec, vb: VarBuilder<'_>) -> Result<Self> {
        spec.check()?;
        let experts = load::from_builder(spec, &vb)?;
        Self::load_with(spec, vb, experts)
    }

    /// Loads the same but for the experts, which are these.
    ///
    /// # Errors
    /// As [`MoeLayer::load`] and [`MoeLayer::new`].
    pub fn load_with(spec: &MoeSpec, vb: VarBuilder<'_>, experts: Vec<Expert>) -> Result<Self> {
        spec.check()?;
        let gate = Gate::load_in(spec, &vb)?;
        Self::build(spec.clone(), gate, Experts::Held(experts), Shared::load(spec, vb)?)
    }

    /// Loads the same but for the experts, which come from a cache; their biases are loaded.
    ///
    /// # Errors
    /// As [`MoeLayer::load`] and [`MoeLayer::with_cached`].
    pub fn load_cached(spec: &MoeSpec, vb: VarBuilder<'_>, experts: CachedExperts) -> Result<Self> {
        spec.check()?;
        let gate = Gate::load_in(spec, &vb)?;
        let experts = match spec.expert_bias {
            true => experts.with_biases(load::cached_biases(spec, &vb)?),
            false => experts,
        };
        Self::with_cached(spec.clone(), gate, experts, Shared::load(spec, vb)?)
    }

    /// Sets the router and the rule that limits its room; without a rule nothing is limited.
    pub fn set_router(&mut self, router: Arc<dyn Router>, capacity: Option<CapacityRule>) {
        (self.router, self.capacity) = (router, capacity);
    }

    /// Makes routers move slots by `gate score · size of the expert's output` where a limit applies; `None` for the gate score
    /// alone. Where nobody has to move the gate's choice stands. Combine weights, figures of gate mass and its bound stay what they are.
    pub fn set_output_norms(&mut self, norms: Option<Arc<OutputNorms>>) {
        self.norms = norms;
    }

    /// The same as [`MoeLayer::set_router`], for building.
    pub fn with_router(mut self, router: Arc<dyn Router>, capacity: Option<CapacityRule>) -> Self {
        self.set_router(router, capacity);
        self
    }

    /// Says which layer of its model this is: routers that draw do so differently in each. A forward pass without a context
    /// of its own uses it.
    pub fn with_index(self, index: usize) -> Self {
        Self { index, ..self }
    }

    /// Runs experts on an engine that other layers use too: what it worked in is kept for the next forward pass.
    pub fn with_engine(self, engine: Arc<Engine>) -> Self {
        Self { engine, ..self }
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

    /// Sets the selection bias of the gate, `[experts]`, which moves who is chosen and not the combine weights. A layer loaded with one has
    /// it in a variable, as its other parameters: that is what a `VarMap` saves, and clones share it. A layer that has none gets one of
    /// its own.
    ///
    /// # Errors
    /// [`Error::Shape`] for another length, and for a layer loaded from variables whose spec has no such bias: it would not be
    /// saved with them.
    /// [`Error::Parameter`] for values that are not finite.
    pub fn set_selection_bias(&mut self, bias: &[f32]) -> Result<()> {
        self.gate.set_selection_bias(bias)
    }

    /// Sizes, scoring and names.
    pub fn spec(&self) -> &MoeSpec {
        &self.spec
    }

    /// The gate.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The experts, by id; none where they are in a cache.
    pub fn experts(&self) -> &[Expert] {
        match &self.experts {
            Experts::Held(experts) => experts,
            Experts::Cached(_) => &[],
        }
    }

    /// The layer of an expert cache that its experts are in, if they are.
    pub fn cached(&self) -> Option<&CachedExperts> {
        match &self.experts {
            Experts::Held(_) => None,
            Experts::Cached(experts) => Some(experts),
        }
    }

    /// The expert that all tokens share, if there is one.
    pub fn shared(&self) -> Option<&Shared> {
        self.shared.as_ref()
    }

    /// The layer's output and who went where, from a cold start.
    ///
    /// # Errors
    /// As [`MoeLayer::forward_in`].
    pub fn forward_routed(&self, hidden: &Tensor) -> Result<(Tensor, Assignment)> {
        let context = RouteContext { layer: self.index, ..RouteContext::default() };
        let (output, routing) = self.forward_in(hidden, context, &mut RouteState::default())?;
        Ok((output, routing.assignment))
    }

    /// The layer's output for `hidden` (`[.., hidden]`, tokens in row-major order) and what the router did, with what the
    /// caller knows of the batch and the layer's state.
    ///
    /// # Errors
    /// [`Error::Shape`] for a hidden state of the wrong rank, width, dtype or device or a context of another batch,
    /// [`Error::NonFiniteLogit`] when the gate gives NaN or +∞, [`Error::Answer`] when the router's answer is none to its
    /// request, [`Error::Candle`] when Candle refuses an operation.
    pub fn forward_in(
        &self,
        hidden: &Tensor,
        context: RouteContext<'_>,
        state: &mut RouteState,
    ) -> Result<(Tensor, Routing)> {
        let tokens = self.tokens(hidden)?;
        let rows = tokens.dim(0)?;
        let by_engine = self.by_engine(&tokens);
        if !by_engine && self.cached().is_some() {
            return Err(Error::shape("hidden state", CACHED_NEEDS, "another"));
        }
        let logits = self.logits_of(&tokens)?;
        let values = logits.flatten_all()?.to_vec1::<f32>()?;
        let logit_rows = Logits::new(&values, rows, self.spec.experts)?;
        let scores = self.spec.scoring.scores(&logit_rows, self.gate.selection_bias()?.as_deref())?;
        let pads = context.padding.map_or(0, |padding| padding.iter().filter(|&&pad| pad).count());
        let capacity = match &self.capacity {
            Some(rule) => rule.capacity(rows.saturating_sub(pads), self.spec.experts, self.spec.top_k)?,
            None => Capacity::unlimited(self.spec.experts)?,
        };
        let weighed = match &self.norms {
            Some(norms) if capacity.limits().is_some() => {
                let mut weighed = scores.clone();
                weighed.weigh_selection(&norms.norms(&tokens, self.experts())?, self.spec.top_k)?;
                Some(weighed)
            }
            _ => None,
        };
        let in_cache = match (&self.experts, context.resident) {
            (Experts::Cached(cached), None) => Some(cached.counted()?),
            _ => None,
        };
        let context = RouteContext { resident: context.resident.or(in_cache.as_ref()), ..context };
        let request = RouteRequest::new(weighed.as_ref().unwrap_or(&scores), self.spec.top_k, &capacity, context)?;
        let started = Instant::now();
        let assignment = self.router.route(&request, state)?;
        let route_time = started.elapsed();
        check(self.router.as_ref(), &request, &assignment)?;

        let plan = DispatchPlan::new(&assignment);
        let output = match by_engine {
            true => {
                let experts = match &self.experts {
                    Experts::Held(experts) => Source::Held(experts),
                    Experts::Cached(experts) => Source::Cached(experts, &self.spec),
                };
                borrowed::forward(&self.engine, &tokens, experts, self.shared.as_ref(), &plan)?
            }
            false => self.composed(&tokens, &logits, &assignment, &plan)?,
        };
        let output = output.to_dtype(hidden.dtype())?.reshape(hidden.shape())?;
        let padding = context.padding.map(<[bool]>::to_vec);
        Ok((output, Routing { input: tokens, logits, scores, capacity, assignment, padding, route_time }))
    }
}

impl MoeLayer {
    /// A hidden state of this layer's width, dtype and device as `[tokens, hidden]`.
    fn tokens(&self, hidden: &Tensor) -> Result<Tensor> {
        let width = self.spec.hidden;
        if hidden.dims().last() != Some(&width) {
            return Err(Error::shape("hidden state", format!("[.., {width}]"), format!("{:?}", hidden.dims())));
        }
        self.gate.check_alike("hidden state", hidden)?;
        Ok(hidden.reshape((hidden.elem_count() / width, width))?)
    }

    fn by_engine(&self, tokens: &Tensor) -> bool {
        self.fits_engine && !tokens.track_op() && tokens.device().is_cpu()
    }

    fn logits_of(&self, tokens: &Tensor) -> Result<Tensor> {
        match self.by_engine(tokens) {
            true => self.gate.logits_by(&self.engine, tokens),
            false => self.gate.logits(tokens),
        }
    }

    /// The output of experts and shared expert by operations of Candle, each of which has a backward pass, `[tokens, hidden]` in
    /// `f32`.
    fn composed(
        &self,
        tokens: &Tensor,
        logits: &Tensor,
        assignment: &Assignment,
        plan: &DispatchPlan,
    ) -> Result<Tensor> {
        let weights = dispatch::slot_weights(logits, assignment, plan, self.spec.scoring)?;
        let output = dispatch::forward(tokens, self.experts(), plan, &weights)?;
        match &self.shared {
            Some(shared) => Ok((output + shared.forward(tokens)?)?),
            None => Ok(output),
        }
    }
}

impl Module for MoeLayer {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward_routed(hidden)?.0)
    }
}

/// What it is and who routes, without its weights: models of Candle derive this.
impl std::fmt::Debug for MoeLayer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut layer = formatter.debug_struct("MoeLayer");
        layer.field("index", &self.index).field("spec", &self.spec);
        layer.field("router", &self.router.name()).field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

/// Whether the engine can read a weight, and nobody wants its gradient.
pub(crate) fn engine_reads(weight: &Tensor) -> bool {
    borrowed::fits(weight)
}

/// `x·Wᵀ` of `input` `[.., columns]` and `weight` `[rows, columns]` by the engine, for what [`engine_reads`] and an input of its dtype on the
/// CPU: `[.., rows]` in that dtype.
pub(crate) fn product(engine: &Engine, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    let Some((&last, outer)) = input.dims().split_last() else {
        return Err(Error::shape("input of a product", format!("[.., {columns}]"), "a number"));
    };
    let tokens = input.contiguous()?.reshape((outer.iter().product::<usize>(), last))?;
    let mut sums = vec![0.0; tokens.dim(0)? * rows];
    {
        let (weight, tokens) = (Borrowed::tensor(weight)?, Borrowed::tensor(&tokens)?);
        engine.product(tokens.matrix()?, weight.matrix()?, &mut sums)?;
    }
    let shape: Vec<usize> = outer.iter().copied().chain([rows]).collect();
    // A product has the dtype of its operands, as in Candle and transformers.
    Ok(Tensor::from_vec(sums, shape, weight.device())?.to_dtype(weight.dtype())?)
}

/// Checks the shape of a weight.
fn check_weight<const RANK: usize>(operand: &str, weight: &Tensor, expected: [usize; RANK]) -> Result<()> {
    if weight.dims() != expected {
        return Err(Error::shape(operand, format!("{expected:?}"), format!("{:?}", weight.dims())));
    }
    Ok(())
}

/// What a layer needs whose experts are in a cache.
const CACHED_NEEDS: &str = "one on the CPU without gradients, as experts in a cache need";

/// The dtype of scores, combine weights and the sum over slots.
const ROUTING_DTYPE: DType = DType::F32;
