//! The one trait behind which all routers stand, and what goes into it. To write one of your own: [`Router`].
//!
//! `route` is a pure function of its request, the state and the router's own configuration: same input, same output, on
//! any number of threads. Knows nothing of any particular router.

use crate::error::Result;
use crate::routing::assignment::Assignment;
pub use crate::routing::request::{RouteContext, RouteRequest, TokenRequest};
pub use crate::routing::state::{RouteState, Scratch};

/// Chooses experts for the tokens of a batch. A router of another crate can do all that those of this one do.
///
/// What an answer must be, which [`check_assignment`](crate::routing::check::check_assignment) holds before any user of a router in this crate makes
/// something of it:
///
/// 1. *Size.* A row per token, of `top_k` slots; of more where [`Router::keeps_top_k`] is false.
/// 2. *Padding.* A padding token gets no expert and takes no room.
/// 3. *Masks.* An expert whose selection score is −∞ is never chosen: it is masked, or in a group that the token may not use.
/// 4. *Distinct.* No token has an expert twice.
/// 5. *Weights.* The router has them made: of the gate scores of what was selected, before slots were dropped, so that no slot's
///    weight goes to its neighbours. [`Assignment::from_selection`] does just that, and keeps the selection, which the balance
///    losses of training look at.
/// 6. *Limits.* No load exceeds the request's capacity, where [`Router::respects_capacity`] is true.
/// 7. *Bound.* Optional ([`Assignment::set_gate_mass_bound`]): no assignment of at most `top_k` experts a token under the same
///    capacity has more gate mass.
///
/// What a router must be:
///
/// 8. *Pure.* The answer depends on the request, the state and the router's settings alone: no clock, no global, no thread.
/// 9. *Stateful through its state only.* A [`RouteState`] belongs to one layer; [`RouteState::of`] keeps whatever the router
///    remembers. It may have seen another layer or router before: what does not fit is started anew.
/// 10. *Whole.* It answers every valid request: no tokens, all experts masked, no room at all. What it cannot do is an error.
/// 11. *Named.* One lower-case name, for tables and errors.
///
/// Defaults: it respects capacity and keeps `top_k`; [`Router::route`] makes buffers for one call; [`Router::route_token`] has no
/// short way.
///
/// ```
/// use phase_moe::{Assignment, Result, RouteRequest, RouteState, Router, Scratch};
///
/// /// Top-k that likes an expert less the more it was used of late; slots past the capacity are dropped by arrival.
/// struct Fresh {
///     /// What full use costs, as a score.
///     penalty: f32,
/// }
///
/// /// Moving average of each expert's share of the tokens.
/// #[derive(Clone, Debug, Default, PartialEq)]
/// struct Use(Vec<f32>);
///
/// impl Router for Fresh {
///     fn name(&self) -> &'static str {
///         "fresh"
///     }
///
///     fn route_into(
///         &self,
///         request: &RouteRequest<'_>,
///         state: &mut RouteState,
///         _scratch: &mut Scratch,
///         assignment: &mut Assignment,
///     ) -> Result<()> {
///         let (scores, capacity, top_k) = (request.scores(), request.capacity(), request.top_k());
///         let Use(used) = state.of();
///         used.resize(scores.experts(), 0.0);
///         let mut room = capacity.limits().map(<[u32]>::to_vec);
///         let slots = scores.tokens() * top_k;
///         let (mut selection, mut kept, mut bound) = (vec![-1; slots], vec![true; slots], 0.0);
///         for token in (0..scores.tokens()).filter(|&token| !request.is_padding(token)) {
///             let worth = |expert: usize| scores.selection(token)[expert] - self.penalty * used[expert];
///             let mut experts: Vec<usize> =
///                 (0..scores.experts()).filter(|&expert| scores.is_allowed(token, expert)).collect();
///             experts.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)));
///             for (slot, &expert) in (token * top_k..(token + 1) * top_k).zip(&experts) {
///                 selection[slot] = expert as i32;
///                 if let Some(room) = &mut room {
///                     let room = &mut room[capacity.pool_of(expert as u16)];
///                     kept[slot] = *room > 0;
///                     *room = room.saturating_sub(1);
///                 }
///             }
///             // None keeps more of a token than its best gate scores.
///             let mut gate = scores.gate(token).to_vec();
///             gate.sort_by(|a, b| b.total_cmp(a));
///             bound += gate[..top_k].iter().map(|&score| f64::from(score)).sum::<f64>();
///         }
///         *assignment = Assignment::from_selection(request, &selection, Some(&kept))?;
///         assignment.set_gate_mass_bound(bound);
///         let share = 0.1 / request.live_tokens().max(1) as f32;
///         used.iter_mut().for_each(|used| *used *= 0.9);
///         assignment.load().iter().zip(used).for_each(|(&load, used)| *used += share * load as f32);
///         Ok(())
///     }
/// }
///
/// use phase_moe::{Capacity, Logits, RouteContext, Scoring, check_assignment};
///
/// let scores = Scoring::softmax().scores(&Logits::new(&[2.0, 1.9, 0.0, 2.0, 1.9, 0.0], 2, 3)?, None)?;
/// let capacity = Capacity::per_expert(vec![1, 2, 2])?;
/// let request = RouteRequest::new(&scores, 1, &capacity, RouteContext::default())?;
/// let (router, mut state) = (Fresh { penalty: 1.0 }, RouteState::default());
/// for wanted in [[0, -1], [1, 1]] {
///     let assignment = router.route(&request, &mut state)?;
///     check_assignment(&router, &request, &assignment)?;
///     assert_eq!(assignment.ids().collect::<Vec<_>>(), wanted);
/// }
/// # Ok::<(), phase_moe::Error>(())
/// ```
pub trait Router: Send + Sync {
    /// Its name, as on the command line.
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
