//! Expanded drop: slots that overflow look for room with further experts nearby before they are dropped (Capacity-Aware
//! Inference, He et al. 2025, arXiv 2503.05066).
//!
//! 1. Every token chooses its top-k; a full pool keeps the highest gate scores and lets the others overflow.
//! 2. In rounds, every overflowed slot asks for the best expert *of its own device* that has room and that its
//!    token does not hold; where a pool is asked by more slots than it has room for, the highest gate scores get in.
//!    What is in stays in.
//! 3. A slot that finds no expert to ask is dropped.
//!
//! **Own device** means the device of the expert that the slot overflowed from, so that no token is sent anywhere it
//! was not sent already. Where experts live is [`ExpandedDrop::placement`]; without one all experts count as local,
//! as on one machine. That is apart from whose limit it is: with limits per device a full device has no expert with
//! room, so the device itself has nothing to offer. Then, as the authors' code does where its limits are per device,
//! slots look at all experts, unless a placement says otherwise; with the placement of the limits themselves only the
//! drop by score remains.
//!
//! The paper adds a stated number of local experts to every token's candidates and cuts back to top-k after the drop;
//! here a slot may ask all local experts, and only slots that overflowed ask, so that no token's own choice makes way
//! for another's substitute.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, top_k]`. Without limits it is top-k, bit for bit.
//!
//! Knows nothing of prices or chains of moves.

use crate::error::Result;
use crate::routing::admission::{Precedence, Wish, keep_best, lay_out};
use crate::routing::assignment::Assignment;
use crate::routing::capacity::Placement;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::EMPTY;
use crate::routing::topk::gate_choice;

/// Top-k whose overflow goes to local experts with room.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ExpandedDrop {
    /// Which experts are local to each other; `None` where all are.
    pub placement: Option<Placement>,
}

impl Router for ExpandedDrop {
    fn name(&self) -> &'static str {
        "expanded-drop"
    }

    /// # Errors
    /// [`Error::Shape`](crate::error::Error::Shape) when the placement is of another number of experts.
    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        self.placement.as_ref().map_or(Ok(()), |placement| placement.check(scores.experts()))?;
        let mut chosen = gate_choice(request);
        let Some(limits) = request.capacity().limits() else {
            *assignment = Assignment::from_chosen(scores, top_k, chosen, None);
            return Ok(());
        };
        let (precedence, mut room) = (Precedence::new(request), limits.to_vec());
        let mut kept = keep_best(&precedence, &chosen, &mut room);
        let overflow: Vec<usize> = (0..chosen.len()).filter(|&slot| !kept[slot] && chosen[slot] != EMPTY).collect();
        self.expand(request, &precedence, overflow, &mut room, &mut chosen, &mut kept);
        lay_out(request, &mut chosen, &mut kept);
        *assignment = Assignment::from_chosen(scores, top_k, chosen, Some(&kept));
        Ok(())
    }
}

impl ExpandedDrop {
    fn expand(
        &self,
        request: &RouteRequest<'_>,
        precedence: &Precedence<'_>,
        mut waiting: Vec<usize>,
        room: &mut [u32],
        chosen: &mut [u16],
        kept: &mut [bool],
    ) {
        let (scores, capacity, top_k) = (request.scores(), request.capacity(), request.top_k());
        let mut open: Vec<u16> = (0..scores.experts() as u16).collect();
        let (mut wishes, mut asked) = (Vec::new(), Vec::new());
        while !waiting.is_empty() {
            open.retain(|&expert| room[capacity.pool_of(expert)] > 0);
            wishes.clear();
            for slots in waiting.chunk_by(|a, b| a / top_k == b / top_k) {
                let token = slots[0] / top_k;
                let (selection, gate) = (scores.selection(token), scores.gate(token));
                let row = &chosen[token * top_k..(token + 1) * top_k];
                asked.clear();
                for &slot in slots {
                    let free = |expert: &&u16| {
                        selection[usize::from(**expert)] > f32::NEG_INFINITY
                            && !row.contains(expert)
                            && !asked.contains(*expert)
                            && self.is_local(chosen[slot], **expert)
                    };
                    let better = |best: u16, &expert: &u16| {
                        if selection[usize::from(expert)] > selection[usize::from(best)] { expert } else { best }
                    };
                    let mut candidates = open.iter().filter(free);
                    let Some(first) = candidates.next() else { continue };
                    let expert = candidates.fold(*first, better);
                    asked.push(expert);
                    wishes.push(Wish { score: gate[usize::from(expert)], token: token as u32, expert, slot });
                }
            }
            // Each round fills at least one place, or none asks any more.
            precedence.admit(&mut wishes, room, |wish| {
                chosen[wish.slot] = wish.expert;
                kept[wish.slot] = true;
            });
            waiting = wishes.iter().map(|wish| wish.slot).filter(|&slot| !kept[slot]).collect();
            waiting.sort_unstable();
        }
    }

    fn is_local(&self, home: u16, expert: u16) -> bool {
        self.placement.as_ref().is_none_or(|placement| {
            placement.device_of()[usize::from(home)] == placement.device_of()[usize::from(expert)]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::Capacity;
    use crate::routing::logits::Logits;
    use crate::routing::router::RouteContext;
    use crate::routing::scores::{Scores, Scoring};
    use crate::routing::topk::TopK;
    use proptest::prelude::*;

    /// The oracle: one slot at a time. The highest score among the next wishes of all waiting slots is served first;
    /// scores are distinct, so within a round nothing else can come of it.
    fn naive(scores: &Scores, top_k: usize, limits: &[u32], device_of: &[u16]) -> Vec<Vec<usize>> {
        let mut room = limits.to_vec();
        let mut held: Vec<Vec<usize>> = vec![Vec::new(); scores.tokens()];
        let mut claims = Vec::new();
        for token in 0..scores.tokens() {
            let mut order: Vec<usize> = (0..scores.experts()).collect();
            order.sort_by(|&a, &b| scores.gate(token)[b].total_cmp(&scores.gate(token)[a]));
            claims.extend(order.into_iter().take(top_k).map(|expert| (token, expert)));
        }
        let by_score = |a: &(usize, usize), b: &(usize, usize)| scores.gate(b.0)[b.1].total_cmp(&scores.gate(a.0)[a.1]);
        let mut waiting = Vec::new();
        let mut sorted = claims.clone();
        sorted.sort_by(by_score);
        for (token, expert) in sorted {
            if room[expert] > 0 {
                room[expert] -= 1;
                held[token].push(expert);
            } else {
                waiting.push((token, expert));
            }
        }
        waiting.sort_by_key(|claim| claims.iter().position(|other| other == claim));
        while !waiting.is_empty() {
            let (mut asks, mut asked) = (Vec::new(), Vec::new());
            for &(token, home) in &waiting {
                let wish = (0..scores.experts())
                    .filter(|&expert| room[expert] > 0 && device_of[expert] == device_of[home])
                    .filter(|&expert| !held[token].contains(&expert) && !asked.contains(&(token, expert)))
                    .max_by(|&a, &b| scores.gate(token)[a].total_cmp(&scores.gate(token)[b]));
                if let Some(expert) = wish {
                    asked.push((token, expert));
                    asks.push(((token, expert), home));
                }
            }
            let order = asks.clone();
            asks.sort_by(|a, b| by_score(&a.0, &b.0));
            let mut refused = Vec::new();
            for ((token, expert), home) in asks {
                if room[expert] > 0 {
                    room[expert] -= 1;
                    held[token].push(expert);
                } else {
                    refused.push(((token, expert), home));
                }
            }
            waiting =
                order.into_iter().filter(|ask| refused.contains(ask)).map(|((token, _), home)| (token, home)).collect();
        }
        held.iter_mut().for_each(|held| held.sort_unstable());
        held
    }

    proptest! {
        #[test]
        fn slots_go_where_a_plain_simulation_sends_them(
            values in prop::collection::vec(-4.0f32..4.0, 6 * 20),
            limits in prop::collection::vec(0u32..14, 6), top_k in 1usize..5, devices in 1usize..4,
        ) {
            let scores = Scoring::softmax().scores(&Logits::new(&values, 20, 6).unwrap(), None).unwrap();
            let capacity = Capacity::per_expert(limits.clone()).unwrap();
            let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
            let placement = Placement::contiguous(6, devices).unwrap();
            let expected = naive(&scores, top_k, &limits, placement.device_of());
            let router = ExpandedDrop { placement: (devices > 1).then_some(placement) };
            let assignment = router.route(&request, &mut RouteState::default()).unwrap();
            for (token, expected) in expected.iter().enumerate() {
                let mut held: Vec<usize> = assignment.slots(token).map(|(expert, _)| expert.index()).collect();
                held.sort_unstable();
                prop_assert_eq!(&held, expected, "token {}", token);
            }
        }
    }

    #[test]
    fn room_enough_leaves_top_k_as_it_is() {
        let logits: Vec<f32> = (0..40).map(|at| (at * 7 % 11) as f32).collect();
        let scores = Scoring::softmax().scores(&Logits::new(&logits, 8, 5).unwrap(), None).unwrap();
        for capacity in [Capacity::unlimited(5).unwrap(), Capacity::per_expert(vec![8; 5]).unwrap()] {
            let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
            let ours = ExpandedDrop::default().route(&request, &mut RouteState::default()).unwrap();
            assert_eq!(ours, TopK::default().route(&request, &mut RouteState::default()).unwrap());
        }
    }

    #[test]
    fn a_placement_of_other_experts_is_an_error() {
        let scores = Scoring::softmax().scores(&Logits::new(&[0.0; 4], 1, 4).unwrap(), None).unwrap();
        let capacity = Capacity::unlimited(4).unwrap();
        let request = RouteRequest::new(&scores, 1, &capacity, RouteContext::default()).unwrap();
        let router = ExpandedDrop { placement: Some(Placement::contiguous(6, 2).unwrap()) };
        let error = router.route(&request, &mut RouteState::default()).unwrap_err();
        assert_eq!(error.to_string(), "placement: expected 4 experts, got 6 experts");
    }
}
