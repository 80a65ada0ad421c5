//! What a layer carries from one forward pass to the next.
//!
//! Knows nothing of what is routed.

use crate::expert::ExpertSet;
use crate::routing::assignment::Assignment;
use crate::routing::plan::DispatchPlan;
use crate::routing::router::{RouteState, Scratch};
use crate::routing::scores::Scores;

/// What one layer carries from one forward pass to the next: what its router has learnt (prices, affinity), the number of the
/// pass, and memory that is used again. Start with `LayerState::default()`; a state belongs to one layer.
#[derive(Debug, Default)]
pub struct LayerState {
    /// What the router has learnt.
    pub router: RouteState,
    pub(super) step: u64,
    pub(super) buffers: Buffers,
}

/// Memory of a routing that the next one uses again; one serves any number of layers, one after the other. The assignment is
/// that of the last routing; what else it holds never decides anything.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    pub(super) scores: Scores,
    pub(super) scratch: Scratch,
    pub(super) assignment: Assignment,
    pub(super) resident: ExpertSet,
    /// Gate logits of the last pass over rows, `[tokens, experts]`.
    pub(super) logits: Vec<f32>,
    pub(super) plan: DispatchPlan,
}

impl Buffers {
    /// The gate logits of the last [`pass_rows`](super::MoeLayer::pass_rows).
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The last routing's answer.
    pub(crate) fn assignment(&self) -> &Assignment {
        &self.assignment
    }
}
