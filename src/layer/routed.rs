//! What the router of a layer saw and did in one forward pass: what losses, figures and reports are made of.
//!
//! Knows nothing of layers.

use std::time::Duration;

use candle_core::Tensor;

use crate::error::Result;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::Capacity;
use crate::routing::logits::Logits;
use crate::routing::metrics::RouteMetrics;
use crate::routing::router::{RouteContext, RouteRequest};
use crate::routing::scores::{Scores, Scoring};

/// What the router saw and did in one forward pass of one layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Routed {
    /// What the layer got, `[tokens, hidden]`; part of the graph under `Var`s.
    pub input: Tensor,
    /// Gate logits, `[tokens, experts]` f32; part of the graph under `Var`s.
    pub logits: Tensor,
    /// Room there was in this batch.
    pub capacity: Capacity,
    /// Which experts each token got.
    pub assignment: Assignment,
    /// True for padding tokens, which count in no loss; `None` when there are none.
    pub padding: Option<Vec<bool>>,
    /// Time in the router alone, from scores to assignment; of a token routed straight from its logits, from those.
    pub route_time: Duration,
    pub(super) scoring: Scoring,
    pub(super) selection_bias: Option<Vec<f32>>,
}

/// What was seen in a pass over rows beside logits and assignment.
pub(crate) struct Seen {
    pub(super) capacity: Capacity,
    pub(super) route_time: Duration,
    pub(super) scoring: Scoring,
    pub(super) selection_bias: Option<Vec<f32>>,
}

impl Seen {
    /// With what the layer got, `[tokens, hidden]`, and its gate logits, `[tokens, experts]`.
    pub(crate) fn pass(self, input: Tensor, logits: Tensor) -> Pass {
        let Self { capacity, route_time, scoring, selection_bias } = self;
        Pass { input, logits, capacity, route_time, scoring, selection_bias }
    }
}

/// What was seen in a forward pass beside the assignment.
pub(crate) struct Pass {
    pub(super) input: Tensor,
    pub(crate) logits: Tensor,
    pub(super) capacity: Capacity,
    pub(super) route_time: Duration,
    pub(super) scoring: Scoring,
    pub(super) selection_bias: Option<Vec<f32>>,
}

impl Pass {
    /// With the assignment and what the pass was told of padding.
    pub(crate) fn routed(self, assignment: &Assignment, padding: Option<&[bool]>) -> Routed {
        let Self { input, logits, capacity, route_time, scoring, selection_bias } = self;
        let (assignment, padding) = (assignment.clone(), padding.map(<[bool]>::to_vec));
        Routed { input, logits, capacity, assignment, padding, route_time, scoring, selection_bias }
    }
}

impl Routed {
    /// The gate scores, made of the logits: a token in decode is routed without them.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::error::Error::Candle) when the logits cannot be read from their device.
    pub(crate) fn scores(&self) -> Result<Scores> {
        let (tokens, experts) = self.logits.dims2()?;
        let values = self.logits.flatten_all()?.to_vec1::<f32>()?;
        self.scoring.scores(&Logits::new(&values, tokens, experts)?, self.selection_bias.as_deref())
    }

    /// The figures of this routing.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::error::Error::Candle) when the logits cannot be read from their device.
    pub fn metrics(&self) -> Result<RouteMetrics> {
        let context = RouteContext { padding: self.padding.as_deref(), ..RouteContext::default() };
        let scores = self.scores()?;
        let request = RouteRequest::new(&scores, self.assignment.top_k(), &self.capacity, context)?;
        Ok(RouteMetrics::new(&request, &self.assignment))
    }
}
