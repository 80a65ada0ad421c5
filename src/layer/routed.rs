//! What the router of a layer saw and did in one forward pass: what losses, figures and reports are made of.
//!
//! Knows nothing of layers.

use std::time::Duration;

use candle_core::Tensor;

use crate::error::Result;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::Capacity;
use crate::routing::metrics::RouteMetrics;
use crate::routing::router::{RouteContext, RouteRequest};
use crate::routing::scores::Scores;

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
