//! The memory-aware router: prefers experts that are in fast memory already, under a hard bound on what that may cost a token.
//!
//! `adjusted score = selection score + bonus · score range · [resident] − price`. A token starts from what the inner choice gives
//! it, plain top-k or the phase router (then `price` is that of the expert's pool). An expert that is not resident is swapped for
//! a resident one with a higher adjusted score, cheapest first, as long as
//! `gate mass after ≥ (1 − max_mass_loss) · gate mass of the inner choice`; the first `keep_top` experts always stay.
//! Combine weights come from the unadjusted gate scores of the experts it ends with.
//!
//! Shapes: scores `[tokens, experts]`, resident set `[experts]`, assignment `[tokens, top_k]`. Source: cache-conditional experts
//! (arXiv 2412.00099), with the bound and in place of the logits' range that of the selection scores.
//!
//! - The **score range** is the best minus the worst allowed selection score of a token, the mean over the batch, a moving
//!   average over batches, this one included. So the bonus means the same at any scale of the scores.
//! - **Batch union.** In a batch of two tokens or more an expert within some token's first `keep_top` is loaded in any case, so
//!   it counts as resident for all. So does, in a second pass, whatever is still not resident after the first one: no token gives
//!   up an expert that is loaded anyway. Without a resident set only this union counts; one token alone is left as it is.
//! - With a limit, swaps stay within it: an expert of the same pool, or one of a pool with room; never a drop more. The
//!   cheapest go first, wherever in the batch.
//! - With a bonus of 0 or a bound of 0 swaps are off: bit-equal to the inner choice.
//!
//! ```
//! use phase_moe::{CacheRouter, Capacity, ExpertId, ExpertSet, Logits, RouteContext, RouteRequest, RouteState, Router, Scoring};
//!
//! let scores = Scoring::softmax().scores(&Logits::new(&[2.0, 1.0, 0.9, -3.0], 1, 4)?, None)?;
//! let (capacity, mut resident) = (Capacity::unlimited(4)?, ExpertSet::new(4)?);
//! resident.insert(ExpertId::new(2, 4)?);
//! let context = RouteContext { resident: Some(&resident), ..RouteContext::default() };
//! let request = RouteRequest::new(&scores, 2, &capacity, context)?;
//! let assignment = CacheRouter::default().route(&request, &mut RouteState::default())?;
//! assert_eq!(assignment.ids().collect::<Vec<_>>(), [0, 2]); // top-k says 0 and 1, which is hardly better
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of disks, bytes or eviction: it reads the resident set of the context.

mod limited;
mod range;
mod swap;
mod token;

use self::limited::Limited;
use self::swap::{Swaps, Terms, is_in, set_bit};
use crate::error::{Error, Result};
use crate::expert::ExpertId;
use crate::routing::affinity::{Affinity, Decay};
use crate::routing::assignment::Assignment;
use crate::routing::phase::PhaseRouter;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch, TokenRequest};
use crate::routing::select::Selector;
use crate::routing::slots::EMPTY;
use crate::routing::topk::choose;
use crate::simd::Isa;

/// Above this bonus, in score ranges, every resident expert comes before every other one.
const MOST_BONUS: f64 = 2.0;

/// How far the controller moves the bonus at a step that misses the target by everything.
const GAIN: f64 = 0.02;

/// Weight of a batch in the running score range.
const RANGE_RATE: f64 = 1.0 / 16.0;

/// Memory-aware routing: a bonus for resident experts under a bound on lost gate mass.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheRouter {
    bonus: f64,
    max_mass_loss: f64,
    keep_top: usize,
    target_hit_rate: Option<f64>,
    decay: Decay,
    phase: Option<PhaseRouter>,
}

impl Default for CacheRouter {
    /// A bonus of 0.1 score ranges, at most a tenth of a token's gate mass, the best expert always stays.
    fn default() -> Self {
        Self {
            bonus: 0.1,
            max_mass_loss: 0.1,
            keep_top: 1,
            target_hit_rate: None,
            decay: Decay::default(),
            phase: None,
        }
    }
}

impl CacheRouter {
    /// A bonus in units of the running score range, and the largest share of a token's gate mass that swaps may cost.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a bonus that is NaN, infinite or negative and for a share outside `[0, 1]`.
    pub fn new(bonus: f64, max_mass_loss: f64) -> Result<Self> {
        if !(bonus >= 0.0 && bonus.is_finite()) {
            return Err(Error::parameter("cache bonus", bonus, "a finite number, at least 0"));
        }
        if !(0.0..=1.0).contains(&max_mass_loss) {
            return Err(Error::parameter("max mass loss", max_mass_loss, "0 to 1"));
        }
        Ok(Self { bonus, max_mass_loss, ..Self::default() })
    }

    /// The same with another bonus.
    ///
    /// # Errors
    /// Those of [`CacheRouter::new`].
    pub fn with_bonus(self, bonus: f64) -> Result<Self> {
        Self::new(bonus, self.max_mass_loss)?;
        Ok(Self { bonus, ..self })
    }

    /// The same, leaving each token its `keep_top` best experts.
    pub fn with_keep_top(self, keep_top: usize) -> Self {
        Self { keep_top, ..self }
    }

    /// The same with a controller: from [`CacheRouter::bonus`] on, every step with a resident set moves the state's bonus
    /// towards this share of hits, within 0 and 2 score ranges. The bound on gate mass stays hard, so a target may be out of reach.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a rate outside `[0, 1]`.
    pub fn with_target_hit_rate(self, target: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&target) {
            return Err(Error::parameter("target hit rate", target, "0 to 1"));
        }
        Ok(Self { target_hit_rate: Some(target), ..self })
    }

    /// The same with another decay of the affinity that it keeps in the state: what is left of it after a step without use.
    ///
    /// # Errors
    /// [`Error::Parameter`] for what is not above 0 and below 1 in 32 bits.
    #[cfg(test)]
    pub(crate) fn with_decay(self, decay: f64) -> Result<Self> {
        Ok(Self { decay: Decay::new(decay)?, ..self })
    }

    /// The same on top of the phase router: bound and `keep_top` are then measured against what that gives a token.
    pub fn with_phase(self, phase: PhaseRouter) -> Self {
        Self { phase: Some(phase), ..self }
    }

    /// Bonus of a resident expert, in score ranges; where a controller is, its start.
    pub fn bonus(&self) -> f64 {
        self.bonus
    }

    /// Experts of a token that always stay.
    pub fn keep_top(&self) -> usize {
        self.keep_top
    }

    /// The largest share of a token's gate mass that swaps may cost.
    pub fn max_mass_loss(&self) -> f64 {
        self.max_mass_loss
    }

    /// The bonus of this batch; 0 switches swaps off.
    fn bonus_now(&self, state: &mut RouteState) -> f64 {
        let bonus = self.bonus_in(state);
        if self.target_hit_rate.is_some() && self.max_mass_loss > 0.0 {
            state.bonus = Some(bonus);
        }
        bonus
    }

    fn bonus_in(&self, state: &RouteState) -> f64 {
        match self.target_hit_rate {
            _ if self.max_mass_loss == 0.0 => 0.0,
            Some(_) => state.bonus.unwrap_or(self.bonus.min(MOST_BONUS)),
            None => self.bonus,
        }
    }

    /// Learns the score range; returns the terms of the batch's swaps, none where they are off.
    fn terms(
        &self,
        request: &RouteRequest<'_>,
        isa: Isa,
        state: &mut RouteState,
        buffers: &mut Buffers,
    ) -> Option<Terms> {
        if let Some(now) = range::of_batch(request, isa, &mut buffers.ranges) {
            state.score_range = Some(running(state.score_range, now));
        }
        self.terms_at(state.score_range.unwrap_or(0.0), state)
    }

    /// Whether the state is of such a layer, and of this router's memory.
    fn is_known(&self, experts: usize, state: &RouteState) -> bool {
        let known = |affinity: &Affinity| affinity.experts() == experts && affinity.decay() == self.decay;
        state.affinity.as_ref().is_some_and(known)
    }

    /// A state that saw another layer, or another router's memory, becomes cold.
    fn prepare(&self, experts: usize, state: &mut RouteState) -> Result<()> {
        if !self.is_known(experts, state) {
            (state.score_range, state.bonus) = (None, None);
            state.affinity = Some(Affinity::new(experts, self.decay)?);
        }
        if self.target_hit_rate.is_none() {
            state.bonus = None;
        }
        Ok(())
    }

    /// The terms of swaps with this score range; `None` where they are off.
    fn terms_at(&self, range: f64, state: &mut RouteState) -> Option<Terms> {
        let lift = self.bonus_now(state) * range;
        (lift > 0.0).then_some(Terms { lift, max_mass_loss: self.max_mass_loss, keep_top: self.keep_top })
    }

    /// The controller's next bonus after a step with so many `hits` and `requests`.
    fn steer(&self, hits: u32, requests: u32, state: &mut RouteState) {
        if let (Some(target), Some(bonus)) = (self.target_hit_rate, &mut state.bonus)
            && requests > 0
        {
            let rate = f64::from(hits) / f64::from(requests);
            *bonus = (*bonus + GAIN * (target - rate)).clamp(0.0, MOST_BONUS);
        }
    }

    /// After routing: use of the experts, and the controller's next bonus.
    fn learn(&self, request: &RouteRequest<'_>, state: &mut RouteState, used: &mut Vec<u64>, assignment: &Assignment) {
        let context = request.context();
        let Some(affinity) = &mut state.affinity else { return };
        let chosen = || assignment.raw().iter().copied().filter(|&expert| expert != EMPTY);
        chosen().for_each(|expert| affinity.use_expert(ExpertId::from_raw(expert), context.step));
        let (Some(_), Some(resident)) = (self.target_hit_rate, context.resident) else { return };
        used.clear();
        used.resize(resident.words().len(), 0);
        chosen().for_each(|expert| set_bit(used, expert));
        let requests: u32 = used.iter().map(|word| word.count_ones()).sum();
        let hits: u32 = used.iter().zip(resident.words()).map(|(used, resident)| (used & resident).count_ones()).sum();
        self.steer(hits, requests, state);
    }
}

/// The running score range after a batch with the range `now`.
fn running(before: Option<f64>, now: f64) -> f64 {
    let before = before.unwrap_or(now);
    before + (now - before) * RANGE_RATE
}

/// What the router reuses from call to call.
#[derive(Default)]
struct Buffers {
    selector: Selector,
    ranges: Vec<f64>,
    /// Experts that are in memory or loaded in any case, as bits.
    near: Vec<u64>,
    used: Vec<u64>,
    before: Vec<u16>,
    first: Vec<u16>,
    swaps: Swaps,
}

impl Router for CacheRouter {
    fn name(&self) -> &'static str {
        if self.phase.is_some() { "cache+phase" } else { "cache" }
    }

    fn respects_capacity(&self) -> bool {
        self.phase.is_some()
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, top_k, isa) = (request.scores(), request.top_k(), scratch.isa());
        self.prepare(scores.experts(), state)?;
        let buffers: &mut Buffers = if let Some(phase) = &self.phase {
            phase.route_into(request, state, scratch, assignment)?;
            let buffers = scratch.of::<Buffers>();
            if let Some(terms) = self.terms(request, isa, state, buffers) {
                let prices = if request.capacity().limits().is_some() { state.prices.as_slice() } else { &[] };
                gather_near(request, &terms, assignment.raw(), &mut buffers.near);
                let limited = Limited::new(request, &terms, prices, assignment);
                if let Some(swapped) = limited.swap_twice(&mut buffers.near) {
                    *assignment = swapped;
                }
            }
            buffers
        } else {
            let buffers = scratch.of::<Buffers>();
            let terms = self.terms(request, isa, state, buffers);
            assignment.refill_with(scores, top_k, |chosen| {
                choose(request, isa, &mut buffers.selector, chosen, &mut []);
                if let Some(terms) = &terms {
                    swap_all(request, terms, buffers, chosen);
                }
            });
            buffers
        };
        self.learn(request, state, &mut buffers.used, assignment);
        Ok(())
    }

    #[inline]
    fn route_token(
        &self,
        request: &TokenRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<bool> {
        Ok(self.route_one(request, state, scratch, assignment))
    }
}

/// Bits of the resident experts and, in a batch, of those within some token's first `keep_top`.
fn gather_near(request: &RouteRequest<'_>, terms: &Terms, chosen: &[u16], near: &mut Vec<u64>) {
    near.clear();
    near.resize(request.scores().experts().div_ceil(64), 0);
    if let Some(resident) = request.context().resident {
        near.copy_from_slice(resident.words());
    }
    if request.live_tokens() > 1 {
        for chosen in chosen.chunks_exact(request.top_k()) {
            let certain = chosen.iter().filter(|&&expert| expert != EMPTY).take(terms.keep_top);
            certain.for_each(|&expert| set_bit(near, expert));
        }
    }
}

/// Swaps the misses of every token of `chosen`, `[tokens, top_k]`, where nothing limits an expert.
fn swap_all(request: &RouteRequest<'_>, terms: &Terms, buffers: &mut Buffers, chosen: &mut [u16]) {
    let (scores, top_k) = (request.scores(), request.top_k());
    let Buffers { near, before, first, swaps, .. } = buffers;
    swaps.reserve(top_k);
    gather_near(request, terms, chosen, near);
    let mut pass = |near: &[u64], chosen: &mut [u16]| {
        let mut swapped = false;
        for (token, chosen) in chosen.chunks_exact_mut(top_k).enumerate() {
            swapped |= swaps.swap_misses(chosen, scores.gate(token), scores.selection(token), near, terms);
        }
        swapped
    };
    if request.live_tokens() < 2 {
        pass(near, chosen);
        return;
    }
    before.clear();
    before.extend_from_slice(chosen);
    if !pass(near, chosen) {
        return;
    }
    let mut more = false;
    for &expert in chosen.iter().filter(|&&expert| expert != EMPTY) {
        more |= !is_in(near, expert);
        set_bit(near, expert);
    }
    if more {
        first.clear();
        first.extend_from_slice(chosen);
        chosen.copy_from_slice(before);
        pass(near, chosen);
        // With a selection bias the cheapest by score need not be the cheapest in gate mass: no read may come back.
        if chosen.iter().any(|&expert| expert != EMPTY && !is_in(near, expert)) {
            chosen.copy_from_slice(first);
        }
    }
}
