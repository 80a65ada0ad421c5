//! Forced routes: what a router decided once, given again batch by batch, whatever the gate says now.
//!
//! For training with the routes of the rollouts (R3: Rollout Routing Replay, arXiv 2510.11370), for runs that must differ in one thing only,
//! and for looking at what another router's choice does to a model. Experts and drops are the recorded ones; combine weights are made of the
//! gate scores of *this* batch over the recorded selection, so that gradients reach the gate.
//!
//! ```
//! use std::sync::Arc;
//!
//! use phase_moe::routing::{Forced, LayerRouter};
//! use phase_moe::{Assignment, LayerState, Logits, Result, RouteContext, Scoring};
//!
//! let first = [2.0, 1.0, 0.0, 0.0, 1.0, 2.0];
//! let route = |router: &LayerRouter, values: &[f32]| -> Result<Assignment> {
//!     let (logits, mut state) = (Logits::new(values, 2, 3)?, LayerState::default());
//!     let (assignment, ..) = router.route(&logits, Scoring::softmax(), 1, None, RouteContext::default(), &mut state)?;
//!     Ok(assignment.clone())
//! };
//! let recorded = route(&LayerRouter::default(), &first)?;
//! let forced = LayerRouter { router: Arc::new(Forced { layers: vec![vec![recorded]] }), capacity: None };
//! // Other logits, the same experts.
//! let again = route(&forced, &[0.0, 1.0, 2.0, 2.0, 1.0, 0.0])?;
//! assert_eq!(again.ids().collect::<Vec<_>>(), [0, 2]);
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of where the routes came from.

use crate::error::{Error, Result};
use crate::routing::assignment::Assignment;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};

/// A router that gives recorded assignments, one a batch, in their order. Which comes next is in the layer's [`RouteState`], so a fresh one
/// begins again.
///
/// Limits are not looked at: they were, where they mattered, when the routes were recorded. An expert outside the groups that a token may use
/// now (DeepSeek) is taken none the less; one whose logit is −∞ is an [`Error::Answer`], as it would be of any router.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forced {
    /// For every layer, by [`RouteContext::layer`](crate::RouteContext::layer), its batches in order: as many tokens each, padding too, and as
    /// many slots a token as are asked for. [`Assignment::from_parts`] makes one of ids from elsewhere; its weights are not used.
    pub layers: Vec<Vec<Assignment>>,
}

/// How many batches of its layer a state has been given.
#[derive(Clone, Debug, Default, PartialEq)]
struct Given(usize);

impl Router for Forced {
    fn name(&self) -> &'static str {
        "forced"
    }

    fn respects_capacity(&self) -> bool {
        false
    }

    fn keeps_top_k(&self) -> bool {
        self.layers.iter().flatten().all(|recorded| recorded.width() <= recorded.top_k())
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, layer) = (request.scores(), request.context().layer);
        let Some(batches) = self.layers.get(layer) else {
            let expected = format!("those of {} layers", self.layers.len());
            return Err(Error::shape("forced routes", expected, format!("layer {layer}")));
        };
        let Given(given) = state.of();
        let Some(recorded) = batches.get(*given) else {
            let expected = format!("at most the {} batches that were recorded of layer {layer}", batches.len());
            return Err(Error::shape("forced routes", expected, "one more"));
        };
        let asked = [scores.tokens(), scores.experts(), request.top_k()];
        let got = [recorded.tokens(), recorded.experts(), recorded.top_k()];
        if asked != got {
            let say =
                |[tokens, experts, top_k]: [usize; 3]| format!("{tokens} tokens, {top_k} of {experts} experts each");
            let operand = format!("forced routes of batch {given} of layer {layer}");
            return Err(Error::shape(operand, say(asked), say(got)));
        }
        *given += 1;
        *assignment = recorded.again(scores);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::Capacity;
    use crate::routing::check::check_assignment;
    use crate::routing::drop::DropRule;
    use crate::routing::logits::Logits;
    use crate::routing::router::RouteContext;
    use crate::routing::scores::{GroupLimit, GroupScore, Scores, Scoring};
    use crate::routing::stream::Stream;
    use crate::routing::topk::TopK;

    fn scores(scoring: Scoring, seed: u64, tokens: usize) -> Scores {
        let mut stream = Stream::new(seed, 0);
        let logits: Vec<f32> = (0..tokens * 8).map(|_| stream.below(1000) as f32 / 250.0).collect();
        scoring.scores(&Logits::new(&logits, tokens, 8).unwrap(), None).unwrap()
    }

    fn answer(
        router: &dyn Router,
        scores: &Scores,
        capacity: &Capacity,
        context: RouteContext<'_>,
        state: &mut RouteState,
    ) -> Result<Assignment> {
        let request = RouteRequest::new(scores, 2, capacity, context)?;
        let assignment = router.route(&request, state)?;
        check_assignment(router, &request, &assignment)?;
        Ok(assignment)
    }

    #[test]
    fn the_same_batches_give_the_same_assignments_drops_and_padding_among_them() {
        for scoring in [Scoring::softmax(), Scoring::softmax().normalized(true), Scoring::sigmoid().normalized(true)] {
            let (limits, free) = (Capacity::per_expert(vec![2; 8]).unwrap(), Capacity::unlimited(8).unwrap());
            let padding = [false, true, false, false, false, false, false, false, false, false];
            let context = |layer| RouteContext { layer, padding: Some(&padding), ..RouteContext::default() };
            let router = TopK { drop: Some(DropRule::Score) };
            let record = |layer: usize, seed| {
                answer(&router, &scores(scoring, seed, 10), &limits, context(layer), &mut RouteState::default())
                    .unwrap()
            };
            let recorded = vec![vec![record(0, 1), record(0, 2)], vec![record(1, 3), record(1, 4)]];
            assert!(recorded[0][0].kept() < 18, "nothing was dropped");
            let forced = Forced { layers: recorded.clone() };
            for (layer, recorded) in recorded.iter().enumerate() {
                let mut state = RouteState::default();
                for (batch, seed) in [1 + 2 * layer as u64, 2 + 2 * layer as u64].into_iter().enumerate() {
                    let again = answer(&forced, &scores(scoring, seed, 10), &free, context(layer), &mut state).unwrap();
                    assert_eq!(again, recorded[batch]);
                }
                let error = answer(&forced, &scores(scoring, 1, 10), &free, context(layer), &mut state).unwrap_err();
                let expected = format!(
                    "forced routes: expected at most the 2 batches that were recorded of layer {layer}, got one more"
                );
                assert_eq!(error.to_string(), expected);
            }
        }
    }

    #[test]
    fn weights_are_of_this_batch_and_groups_are_not_looked_at() {
        let groups = Some(GroupLimit { groups: 4, top_groups: 1, score: GroupScore::Max });
        let scoring = Scoring { groups, ..Scoring::softmax().normalized(true) };
        let recorded = Assignment::from_parts(8, 2, &[0, 7, 3, -1], &[0.0; 4]).unwrap();
        let forced = Forced { layers: vec![vec![recorded]] };
        let (scores, free) = (scores(scoring, 5, 2), Capacity::unlimited(8).unwrap());
        let again = answer(&forced, &scores, &free, RouteContext::default(), &mut RouteState::default()).unwrap();
        let gate = scores.gate(0);
        let share = gate[0] / (gate[0] + gate[7]);
        assert!((again.weights()[0] - share).abs() < 1e-6 && again.weights()[2..] == [1.0, 0.0], "{again:?}");
        // A logit of −∞ is another matter.
        let logits = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let masked = scoring.scores(&Logits::new(&logits, 2, 8).unwrap(), None).unwrap();
        let error = answer(&forced, &masked, &free, RouteContext::default(), &mut RouteState::default()).unwrap_err();
        assert_eq!(error.to_string(), "router forced: token 0: expected experts that are not masked, got expert 7");
    }

    #[test]
    fn routes_of_another_batch_are_named() {
        let recorded = Assignment::from_parts(8, 2, &[0, 7], &[0.0; 2]).unwrap();
        let (forced, free) = (Forced { layers: vec![vec![recorded]] }, Capacity::unlimited(8).unwrap());
        let error = |tokens, layer| {
            let context = RouteContext { layer, ..RouteContext::default() };
            let scores = scores(Scoring::softmax(), 1, tokens);
            answer(&forced, &scores, &free, context, &mut RouteState::default()).unwrap_err().to_string()
        };
        assert_eq!(
            error(3, 0),
            "forced routes of batch 0 of layer 0: expected 3 tokens, 2 of 8 experts each, got 1 tokens, 2 of 8 experts each"
        );
        assert_eq!(error(1, 1), "forced routes: expected those of 1 layers, got layer 1");
    }
}
