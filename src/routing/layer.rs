//! From a layer's logits to an assignment: limits, scores, the router, and the check of its answer; and what a layer carries from one
//! batch to the next, in training the bias that balances it too. Every door to this crate does this between its gate and its experts.
//!
//! A token alone that nothing limits takes the short way, [`Router::route_token`], where its router has one: it makes no scores. All
//! others are scored and routed as a batch. Nothing is allocated once buffers have seen a batch as large, but by routers that say so.
//!
//! ```
//! use std::sync::Arc;
//!
//! use phase_moe::routing::LayerRouter;
//! use phase_moe::{CapacityRule, LayerState, Logits, PhaseRouter, RouteContext, Scoring};
//!
//! // Eight tokens that all want the first of four experts, and two slots in each.
//! let values: Vec<f32> = (0..8).flat_map(|token| [3.0, 0.1 * token as f32, 0.0, -1.0]).collect();
//! let logits = Logits::new(&values, 8, 4)?;
//! let rule = CapacityRule::per_expert(1.0).with_minimum_mean(0.0);
//! let router = LayerRouter { router: Arc::new(PhaseRouter::default()), capacity: Some(rule) };
//! let mut state = LayerState::default();
//! let (assignment, capacity, _time) =
//!     router.route(&logits, Scoring::softmax(), 1, None, RouteContext::default(), &mut state)?;
//! assert_eq!(assignment.load(), [2, 2, 2, 2]);
//! assert_eq!(capacity.limits(), Some([2, 2, 2, 2].as_slice()));
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of tensors or experts.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::{Capacity, CapacityRule};
use crate::routing::check::{check_assignment, check_token};
use crate::routing::logits::Logits;
use crate::routing::plan::DispatchPlan;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router, Scratch, TokenRequest};
use crate::routing::scores::{Scores, Scoring};
use crate::routing::topk::TopK;

/// Which router a layer has, and within which limits.
#[derive(Clone)]
pub struct LayerRouter {
    /// The router.
    pub router: Arc<dyn Router>,
    /// How much room there is in a batch; `None` for no limit.
    pub capacity: Option<CapacityRule>,
}

impl Default for LayerRouter {
    /// Dropless top-k.
    fn default() -> Self {
        Self { router: Arc::new(TopK::default()), capacity: None }
    }
}

impl fmt::Debug for LayerRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerRouter").field("router", &self.router.name()).field("capacity", &self.capacity).finish()
    }
}

/// What a layer's gate gave, and how it becomes scores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gated<'a> {
    /// `[tokens, experts]`, row-major.
    pub(crate) logits: &'a [f32],
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) scoring: Scoring,
    /// Added to scores for selection only, `[experts]`.
    pub(crate) selection_bias: Option<&'a [f32]>,
}

impl Gated<'_> {
    /// How many tokens there are.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits of a part of a token.
    fn tokens(&self) -> Result<usize> {
        let (values, experts) = (self.logits.len(), self.experts);
        match experts > 0 && values.is_multiple_of(experts) {
            true => Ok(values / experts),
            false => {
                Err(Error::shape("logits", format!("a multiple of {experts} experts"), format!("{values} values")))
            }
        }
    }
}

impl LayerRouter {
    /// Routes a batch by its gate's `logits`, `top_k` experts a token; `selection_bias`, `[experts]`, counts for selection only. Gives the
    /// assignment, which stays in `state`, the room that there was, and the time in the router alone. A token alone without limits or such a bias is
    /// routed without any allocation once the state is warm, as in decode.
    ///
    /// # Errors
    /// [`Error::Shape`] for a bias of other experts and for a context of another batch, [`Error::TopKZero`], [`Error::TopKExceedsExperts`],
    /// [`Error::CapacityIgnored`] for limits and a router that keeps within none, [`Error::Answer`] when the router's answer is none to its
    /// request.
    pub fn route<'s>(
        &self,
        logits: &Logits<'_>,
        scoring: Scoring,
        top_k: usize,
        selection_bias: Option<&[f32]>,
        context: RouteContext<'_>,
        state: &'s mut LayerState,
    ) -> Result<(&'s Assignment, Capacity, Duration)> {
        let gated = Gated { logits: logits.values(), experts: logits.experts(), top_k, scoring, selection_bias };
        let capacity = self.capacity(&gated, context.padding)?;
        let time = self.route_within(&gated, &capacity, context, &mut state.router, &mut state.buffers, None)?;
        state.step = context.step.saturating_add(1);
        Ok((&state.buffers.assignment, capacity, time))
    }

    /// The room for the tokens, of which `padding` are none.
    pub(crate) fn capacity(&self, gated: &Gated<'_>, padding: Option<&[bool]>) -> Result<Capacity> {
        let Some(rule) = &self.capacity else { return Capacity::unlimited(gated.experts) };
        if !self.router.respects_capacity() {
            return Err(Error::CapacityIgnored { router: self.router.name() });
        }
        let pads = padding.map_or(0, |padding| padding.iter().filter(|&&pad| pad).count());
        rule.capacity(gated.tokens()?.saturating_sub(pads), gated.experts, gated.top_k)
    }

    /// Routes into `buffers`; returns the time in the router alone. Within limits slots move by scores times `worth`, `[tokens, experts]`.
    pub(crate) fn route_within(
        &self,
        gated: &Gated<'_>,
        capacity: &Capacity,
        context: RouteContext<'_>,
        state: &mut RouteState,
        buffers: &mut Buffers,
        worth: Option<&dyn Fn() -> Result<Vec<f32>>>,
    ) -> Result<Duration> {
        let Buffers { scores, scratch, assignment, .. } = buffers;
        // A router that leaves it alone has not answered, whatever the last one said.
        assignment.clear();
        let tokens = gated.tokens()?;
        let alone = tokens == 1 && context.padding.is_none();
        if alone && capacity.limits().is_none() && gated.selection_bias.is_none() {
            let request = TokenRequest::new(gated.logits, gated.scoring, gated.top_k, context)?;
            let started = Instant::now();
            if self.router.route_token(&request, state, scratch, assignment)? {
                let time = started.elapsed();
                check_token(self.router.as_ref(), &request, assignment)?;
                if cfg!(debug_assertions) {
                    gated.scoring.scores_into(&Logits::new(gated.logits, 1, gated.experts)?, None, scores)?;
                    let request = RouteRequest::new(scores, gated.top_k, capacity, context)?;
                    check_assignment(self.router.as_ref(), &request, assignment)?;
                }
                return Ok(time);
            }
        }
        let logits = Logits::new(gated.logits, tokens, gated.experts)?;
        gated.scoring.scores_into(&logits, gated.selection_bias, scores)?;
        if let Some(worth) = worth.filter(|_| capacity.limits().is_some()) {
            scores.weigh_selection(&worth()?, gated.top_k)?;
        }
        let request = RouteRequest::new(scores, gated.top_k, capacity, context)?;
        let started = Instant::now();
        self.router.route_into(&request, state, scratch, assignment)?;
        let time = started.elapsed();
        check_assignment(self.router.as_ref(), &request, assignment)?;
        Ok(time)
    }
}

/// What one layer carries from one forward pass to the next: what its router has learnt (prices, affinity), the number of the
/// pass, and memory that is used again. Start with `LayerState::default()`; a state belongs to one layer.
#[derive(Debug, Default)]
pub struct LayerState {
    /// What the router has learnt.
    pub router: RouteState,
    /// Number of the next pass, as routers that draw want it.
    pub step: u64,
    pub(crate) buffers: Buffers,
}

/// Memory of a routing that the next one uses again; one serves any number of layers, one after the other. The assignment is
/// that of the last routing; what else it holds never decides anything.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    pub(crate) scores: Scores,
    pub(crate) scratch: Scratch,
    pub(crate) assignment: Assignment,
    pub(crate) resident: ExpertSet,
    /// The same of all ranks together, where a layer's experts are over several.
    pub(crate) counted: ExpertSet,
    /// Gate logits of the last pass over rows, `[tokens, experts]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) plan: DispatchPlan,
}

impl Buffers {
    /// The gate logits of the last pass over rows.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The last routing's answer.
    pub(crate) fn assignment(&self) -> &Assignment {
        &self.assignment
    }
}

/// Loss-free balancing (arXiv 2408.15664): a selection bias per expert that rises while the expert has less than its share
/// and falls while it has more, by a constant rate.
#[derive(Clone, Debug, PartialEq)]
pub struct LossFreeBias {
    bias: Vec<f32>,
    rate: f32,
}

impl LossFreeBias {
    /// Zero bias for `experts`, moved by `rate` at each update (the paper uses 0.001).
    ///
    /// # Errors
    /// [`Error::Parameter`] for a rate that is not positive and finite.
    pub fn new(experts: usize, rate: f32) -> Result<Self> {
        if !(rate.is_finite() && rate > 0.0) {
            return Err(Error::parameter("bias update rate", rate, "a positive finite number"));
        }
        Ok(Self { bias: vec![0.0; experts], rate })
    }

    /// The same from the bias that a layer was loaded with, to go on where its training ended.
    ///
    /// # Errors
    /// As [`LossFreeBias::new`], and for values that are not finite.
    pub fn resume(values: &[f32], rate: f32) -> Result<Self> {
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::parameter("selection bias", bad, "finite numbers"));
        }
        Ok(Self { bias: values.to_vec(), ..Self::new(values.len(), rate)? })
    }

    /// Moves each bias against the load that its expert had in the last batch.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not one load per expert.
    pub fn update(&mut self, load: &[u32]) -> Result<()> {
        if load.len() != self.bias.len() {
            return Err(Error::shape(
                "expert load",
                format!("{} values", self.bias.len()),
                format!("{} values", load.len()),
            ));
        }
        let mean = load.iter().map(|&load| f64::from(load)).sum::<f64>() / load.len().max(1) as f64;
        for (bias, &load) in self.bias.iter_mut().zip(load) {
            let lack = mean - f64::from(load);
            *bias += if lack > 0.0 {
                self.rate
            } else if lack < 0.0 {
                -self.rate
            } else {
                0.0
            };
        }
        Ok(())
    }

    /// The bias, for the layer that it was updated from.
    pub fn values(&self) -> &[f32] {
        &self.bias
    }
}
