//! The one trait behind which all routers stand, what goes into it and what comes back.
//!
//! `route` is a pure function of its request, the state and the router's own configuration: same input, same output, on
//! any number of threads. Knows nothing of any particular router.

use std::any::Any;
use std::fmt;

use crate::error::{Error, Result};
use crate::expert::{ExpertSet, check_expert_count};
use crate::routing::affinity::Affinity;
use crate::routing::assignment::{Assignment, check_slots, check_top_k};
use crate::routing::capacity::Capacity;
use crate::routing::scores::{Scores, Scoring};
use crate::simd::Isa;

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
    /// Experts of this layer that are in fast memory, by the logical cache; `None` where nobody keeps one.
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
    /// for [`Router::route_token`], which answers `false`, and [`Logits::new`](crate::routing::logits::Logits::new) names them.
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

/// What a layer's router carries from one batch to the next; start with `RouteState::default()`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteState {
    /// Price per pool (expert or device) of the last batch; empty before the first.
    pub(crate) prices: Vec<f32>,
    /// How far apart the last held and the first refused expert of its rows were, in the mean.
    pub(crate) gap: f64,
    pub(crate) sweeps: usize,
    /// Running range of the selection scores; `None` before the first batch.
    pub(crate) score_range: Option<f64>,
    /// Recent use of the experts; `None` before the first batch.
    pub(crate) affinity: Option<Affinity>,
    /// What the bonus controller has come to; `None` where there is none.
    pub(crate) bonus: Option<f64>,
}

impl RouteState {
    /// Sweeps over the whole batch that the phase router made for the last one: the fewer, the better its old prices were.
    pub fn sweeps(&self) -> usize {
        self.sweeps
    }

    /// Price per expert or device that the last batch ended with; empty before the first.
    pub fn prices(&self) -> &[f32] {
        &self.prices
    }

    /// Running mean of the tokens' ranges of selection scores (best minus worst allowed one): the unit of the residency
    /// bonus. `None` before a memory-aware router saw a batch.
    pub fn score_range(&self) -> Option<f64> {
        self.score_range
    }

    /// How much each expert was used of late; `None` before a memory-aware router saw a batch.
    pub fn affinity(&self) -> Option<&Affinity> {
        self.affinity.as_ref()
    }

    /// The residency bonus that the controller has come to, in units of [`RouteState::score_range`]; `None` without one.
    pub fn bonus(&self) -> Option<f64> {
        self.bonus
    }
}

/// Buffers that routers reuse from call to call; one serves any number of layers and routers, one call at a time.
/// What it holds never decides anything.
#[derive(Default)]
pub struct Scratch {
    isa: Isa,
    buffers: Vec<Box<dyn Any + Send>>,
}

impl Scratch {
    /// Scratch of routers that are to run on `isa` rather than on the widest instructions there are.
    pub fn on(isa: Isa) -> Self {
        Self { isa, buffers: Vec::new() }
    }

    /// The instructions that routers run on.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The buffers of type `T`, made at the first call.
    pub fn of<T: Any + Default + Send>(&mut self) -> &mut T {
        let known = self.buffers.iter().position(|buffers| buffers.is::<T>());
        let at = known.unwrap_or_else(|| {
            self.buffers.push(Box::<T>::default());
            self.buffers.len() - 1
        });
        match self.buffers[at].downcast_mut() {
            Some(buffers) => buffers,
            None => unreachable!("buffers were found by their type"),
        }
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scratch({}, {} kinds of buffers)", self.isa, self.buffers.len())
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

    /// True when no token ever gets more experts than it asks for: only then does a bound on the gate mass of top_k experts
    /// a token say anything.
    fn keeps_top_k(&self) -> bool {
        true
    }

    /// Routes one batch of one layer into `assignment`, whatever that held before; `state` is that layer's.
    ///
    /// With an assignment and a scratch that have seen a batch as large, the routers of a hot path allocate nothing.
    ///
    /// # Errors
    /// What a particular router cannot do with a valid request; most can do everything.
    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()>;

    /// Routes one batch of one layer; `state` is that layer's.
    ///
    /// # Errors
    /// Those of [`Router::route_into`].
    fn route(&self, request: &RouteRequest<'_>, state: &mut RouteState) -> Result<Assignment> {
        let mut assignment = Assignment::default();
        self.route_into(request, state, &mut Scratch::default(), &mut assignment)?;
        Ok(assignment)
    }

    /// Routes one token in decode straight from its logits, where nothing limits it: bit-equal to scoring,
    /// [`Router::route_into`] and its weights, state included; only faster. `false`: there is no such way for this router,
    /// scoring or token, and nothing has changed.
    ///
    /// # Errors
    /// Those of [`Router::route_into`].
    fn route_token(
        &self,
        request: &TokenRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<bool> {
        let _ = (request, state, scratch, assignment);
        Ok(false)
    }
}
