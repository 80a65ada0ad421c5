//! From a layer's logits to an assignment: limits, scores, the router, and the check of its answer.
//!
//! A token alone that nothing limits takes the short way, [`Router::route_token`], where its router has one: it makes no scores. All
//! others are scored and routed as a batch. Nothing is allocated once buffers have seen a batch as large, but by routers that say so.
//!
//! Knows nothing of tensors or experts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::state::Buffers;
use super::worth::OutputNorms;
use crate::error::{Error, Result};
use crate::routing::capacity::{Capacity, CapacityRule};
use crate::routing::check::{check_assignment, check_token};
use crate::routing::logits::Logits;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router, TokenRequest};
use crate::routing::scores::Scoring;
use crate::spec::MoeSpec;

/// Which router a layer has, and within which limits.
#[derive(Clone)]
pub(super) struct Routing {
    pub(super) router: Arc<dyn Router>,
    pub(super) capacity: Option<CapacityRule>,
    pub(super) norms: Option<Arc<OutputNorms>>,
}

/// Logits `[tokens, experts]`, and how they become scores.
pub(super) struct Gated<'a> {
    pub(super) logits: &'a [f32],
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) scoring: Scoring,
    pub(super) selection_bias: Option<&'a [f32]>,
}

impl<'a> Gated<'a> {
    pub(super) fn new(spec: &MoeSpec, logits: &'a [f32], selection_bias: Option<&'a [f32]>) -> Result<Self> {
        let experts = spec.experts;
        if !logits.len().is_multiple_of(experts) {
            let expected = format!("a multiple of {experts} experts");
            return Err(Error::shape("logits", expected, format!("{} values", logits.len())));
        }
        Ok(Self { logits, experts, top_k: spec.top_k, scoring: spec.scoring, selection_bias })
    }

    pub(super) fn tokens(&self) -> usize {
        self.logits.len() / self.experts
    }
}

impl Routing {
    /// The room for `tokens` tokens, of which `padding` are none.
    pub(super) fn capacity(&self, gated: &Gated<'_>, padding: Option<&[bool]>) -> Result<Capacity> {
        let Some(rule) = &self.capacity else { return Capacity::unlimited(gated.experts) };
        if !self.router.respects_capacity() {
            return Err(Error::CapacityIgnored { router: self.router.name() });
        }
        let pads = padding.map_or(0, |padding| padding.iter().filter(|&&pad| pad).count());
        rule.capacity(gated.tokens().saturating_sub(pads), gated.experts, gated.top_k)
    }

    /// Routes into `buffers`; returns the time in the router alone. `norms` gives what [`OutputNorms`] say of these tokens.
    pub(super) fn route(
        &self,
        gated: &Gated<'_>,
        capacity: &Capacity,
        context: RouteContext<'_>,
        state: &mut RouteState,
        buffers: &mut Buffers,
        norms: impl FnOnce(&OutputNorms) -> Result<Vec<f32>>,
    ) -> Result<Duration> {
        let Buffers { scores, scratch, assignment, .. } = buffers;
        // A router that leaves it alone has not answered, whatever the last one said.
        assignment.clear();
        let alone = gated.tokens() == 1 && context.padding.is_none();
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
        let logits = Logits::new(gated.logits, gated.tokens(), gated.experts)?;
        gated.scoring.scores_into(&logits, gated.selection_bias, scores)?;
        if let Some(by) = self.norms.as_ref().filter(|_| capacity.limits().is_some()) {
            scores.weigh_selection(&norms(by)?, gated.top_k)?;
        }
        let request = RouteRequest::new(scores, gated.top_k, capacity, context)?;
        let started = Instant::now();
        self.router.route_into(&request, state, scratch, assignment)?;
        let time = started.elapsed();
        check_assignment(self.router.as_ref(), &request, assignment)?;
        Ok(time)
    }
}
