//! What the router of a layer saw and did in one forward pass: what losses and metrics are made of.

use std::time::Duration;

use burn::tensor::Tensor;
use phase_moe::{Assignment, Capacity, Logits, Result, RouteContext, RouteMetrics, RouteRequest, Scoring};

use crate::gate::numbers;

/// What the router saw and did in one forward pass of one layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Routed {
    /// Gate logits, `[tokens, experts]` f32; part of the graph under autodiff.
    pub logits: Tensor<2>,
    /// Which experts each token got.
    pub assignment: Assignment,
    /// Room there was in this batch.
    pub capacity: Capacity,
    /// True for padding tokens, which count in no loss; `None` when there are none.
    pub padding: Option<Vec<bool>>,
    /// Time in the router alone.
    pub route_time: Duration,
    pub(crate) scoring: Scoring,
    pub(crate) selection_bias: Option<Vec<f32>>,
}

impl Routed {
    /// The figures of this routing: survival, gate mass, balance.
    ///
    /// # Errors
    /// None for what a layer gives.
    pub fn metrics(&self) -> Result<RouteMetrics> {
        let [tokens, experts] = self.logits.dims();
        let values = numbers(self.logits.clone().without_autodiff());
        let scores = self.scoring.scores(&Logits::new(&values, tokens, experts)?, self.selection_bias.as_deref())?;
        let context = RouteContext { padding: self.padding.as_deref(), ..RouteContext::default() };
        let request = RouteRequest::new(&scores, self.assignment.top_k(), &self.capacity, context)?;
        Ok(RouteMetrics::new(&request, &self.assignment))
    }
}
