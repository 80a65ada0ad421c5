//! What a router is asked: [`RouteRequest`] for a batch with its scores, [`TokenRequest`] for one token in decode straight from its
//! logits, both with a [`RouteContext`]. Checked once, here.
//!
//! Knows nothing of routers.

use crate::error::{Error, Result};
use crate::expert::{ExpertSet, check_expert_count};
use crate::routing::capacity::Capacity;
use crate::routing::scores::{Scores, Scoring};
use crate::routing::slots::{check_slots, check_top_k};

/// What a router may know of a batch beside its scores.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteContext<'a> {
    /// Index of the layer: seeds differ per layer.
    pub layer: usize,
    /// Vocabulary id of each token; routers that hash use positions where there are none.
    pub token_ids: Option<&'a [u32]>,
    /// True for padding tokens: they get no expert and take no room.
    pub padding: Option<&'a [bool]>,
    /// Number of this forward pass, or of the token in decode: what recent use is measured in.
    pub step: u64,
    /// Experts of this layer that are in fast memory, by the logical cache; `None` where there is none.
    pub resident: Option<&'a ExpertSet>,
}

impl RouteContext<'_> {
    /// Checks that it is one of `tokens` tokens in a layer of `experts`.
    fn check(&self, tokens: usize, experts: usize) -> Result<()> {
        let lengths = [("token ids", self.token_ids.map(<[u32]>::len)), ("padding", self.padding.map(<[bool]>::len))];
        for (operand, length) in lengths {
            if let Some(length) = length.filter(|&length| length != tokens) {
                return Err(Error::shape(operand, format!("{tokens} tokens"), format!("{length} values")));
            }
        }
        match self.resident.map(ExpertSet::experts).filter(|&resident| resident != experts) {
            Some(resident) => Err(Error::shape(
                "resident experts",
                format!("a set of {experts} experts"),
                format!("one of {resident}"),
            )),
            None => Ok(()),
        }
    }
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
    /// experts, the resident set of another layer, or token ids or padding for another number of tokens.
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
        context.check(scores.tokens(), scores.experts())?;
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

/// One token in decode, straight from its logits, where nothing limits it: no capacity, no selection bias, no padding.
#[derive(Clone, Copy, Debug)]
pub struct TokenRequest<'a> {
    logits: &'a [f32],
    scoring: Scoring,
    top_k: usize,
    context: RouteContext<'a>,
}

impl<'a> TokenRequest<'a> {
    /// Checks that the parts belong together. The values of `logits` (`[experts]`) are not looked at: NaN and +∞ are no token
    /// for [`Router::route_token`](crate::routing::Router::route_token), which answers `false`, and [`Logits::new`](crate::routing::logits::Logits::new) names them.
    ///
    /// # Errors
    /// [`Error::ExpertCount`], [`Error::TopKZero`], [`Error::TopKExceedsExperts`]; [`Error::Parameter`] for a scale that is not
    /// finite; [`Error::Shape`] for a resident set of another layer, and for token ids or padding of another number of tokens.
    #[inline]
    pub fn new(logits: &'a [f32], scoring: Scoring, top_k: usize, context: RouteContext<'a>) -> Result<Self> {
        check_expert_count(logits.len())?;
        check_top_k(top_k, logits.len())?;
        scoring.check_scale()?;
        context.check(1, logits.len())?;
        Ok(Self { logits, scoring, top_k, context })
    }

    /// The token's logits, `[experts]`: −∞ is a mask; NaN and +∞ may be among them.
    pub fn logits(&self) -> &'a [f32] {
        self.logits
    }

    /// How logits become scores and combine weights.
    pub fn scoring(&self) -> &Scoring {
        &self.scoring
    }

    /// Slots of the token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Layer, step, resident experts.
    pub fn context(&self) -> RouteContext<'a> {
        self.context
    }
}
