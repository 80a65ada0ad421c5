//! The one trait behind which all routers stand, what goes into it and what comes back.
//!
//! `route` is a pure function of its request, the state and the router's own configuration: same input, same output, on
//! any number of threads. Knows nothing of any particular router.

use crate::error::{Error, Result};
use crate::routing::assignment::{Assignment, check_slots, check_top_k};
use crate::routing::capacity::Capacity;
use crate::routing::scores::Scores;

/// What a router may know of a batch beside its scores.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteContext<'a> {
    /// Index of the layer: seeds differ per layer.
    pub layer: usize,
    /// Vocabulary id of each token; routers that hash use positions where there are none.
    pub token_ids: Option<&'a [u32]>,
    /// True for padding tokens: they get no expert and take no room.
    pub padding: Option<&'a [bool]>,
}

/// A checked request: scores, slots per token, room, context.
#[derive(Clone, Copy, Debug)]
pub struct RouteRequest<'a> {
    scores: &'a Scores,
    top_k: usize,
    capacity: &'a Capacity,
    context: RouteContext<'a>,
}

impl<'a> RouteRequest<'a> {
    /// Checks that the parts belong together.
    ///
    /// # Errors
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`]; [`Error::Shape`] for 2^32 slots or more, when the capacity is for another number of
    /// experts, or token ids or padding for another number of tokens.
    pub fn new(scores: &'a Scores, top_k: usize, capacity: &'a Capacity, context: RouteContext<'a>) -> Result<Self> {
        check_top_k(top_k, scores.experts())?;
        check_slots(scores.tokens(), top_k)?;
        if capacity.experts() != scores.experts() {
            return Err(Error::shape(
                "capacity",
                format!("{} experts", scores.experts()),
                format!("{} experts", capacity.experts()),
            ));
        }
        let lengths =
            [("token ids", context.token_ids.map(<[u32]>::len)), ("padding", context.padding.map(<[bool]>::len))];
        for (operand, length) in lengths {
            if let Some(length) = length.filter(|&length| length != scores.tokens()) {
                return Err(Error::shape(operand, format!("{} tokens", scores.tokens()), format!("{length} values")));
            }
        }
        Ok(Self { scores, top_k, capacity, context })
    }

    /// Gate scores, `[tokens, experts]`.
    pub fn scores(&self) -> &'a Scores {
        self.scores
    }

    /// Slots per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Room per expert or device.
    pub fn capacity(&self) -> &'a Capacity {
        self.capacity
    }

    /// Layer, token ids, padding.
    pub fn context(&self) -> RouteContext<'a> {
        self.context
    }

    /// True for a padding token.
    pub fn is_padding(&self, token: usize) -> bool {
        self.context.padding.is_some_and(|padding| padding[token])
    }

    /// Tokens that are not padding.
    pub fn live_tokens(&self) -> usize {
        self.scores.tokens() - self.context.padding.map_or(0, |padding| padding.iter().filter(|&&pad| pad).count())
    }
}

/// What a layer's router carries from one batch to the next; start with `RouteState::default()`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteState {
    /// Price per pool (expert or device) of the last batch; empty before the first.
    pub(crate) prices: Vec<f32>,
}

impl RouteState {
    /// Price per expert or device that the last batch ended with; empty before the first.
    pub fn prices(&self) -> &[f32] {
        &self.prices
    }
}

/// Chooses experts for the tokens of a batch.
pub trait Router: Send + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// True when no load ever exceeds the request's capacity.
    fn respects_capacity(&self) -> bool {
        true
    }

    /// Routes one batch of one layer; `state` is that layer's.
    ///
    /// # Errors
    /// What a particular router cannot do with a valid request; most can do everything.
    fn route(&self, request: &RouteRequest<'_>, state: &mut RouteState) -> Result<Assignment>;
}
