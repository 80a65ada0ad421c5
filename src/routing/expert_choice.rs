//! Expert choice: the experts pick their tokens, not the tokens their experts (Zhou et al. 2022, arXiv 2202.09368).
//!
//! `picks of expert e = the C_e tokens with the highest score(token, e)`. Every expert is exactly full where it has
//! tokens enough, and a token gets any number of experts from none to all.
//!
//! - Limits per device: the limit goes to the highest scores in the columns of the device's experts.
//! - Without limits all experts share room for `tokens · top_k`, which goes to the highest scores of the whole
//!   matrix: the paper's budget, without the equal shares that a limit would ask for. A single token so gets its own
//!   top-k.
//! - Picks go by selection scores. Combine weights are gate scores, normalised over what the token got where
//!   the model normalises.
//! - **Not causal**: whether an expert picks a token depends on all tokens of the batch, later ones included, and
//!   here that decides how *many* experts a token gets. The gate was trained for this, or it was not: with the gate
//!   of a top-k model it is a baseline of balance, not of quality.
//! - A token may hold more than `top_k` experts, so no bound on the gate mass of `top_k` experts applies, and the
//!   kept mass can exceed that of unconstrained top-k.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, width]`, width the most experts of any token, at least
//! `top_k`.
//!
//! Knows nothing of what tokens would choose for themselves.

use crate::error::Result;
use crate::routing::admission::{Precedence, Wish};
use crate::routing::assignment::Assignment;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::{EMPTY, check_slots};

/// Each expert takes the tokens that score highest with it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ExpertChoice;

impl Router for ExpertChoice {
    fn name(&self) -> &'static str {
        "expert-choice"
    }

    fn keeps_top_k(&self) -> bool {
        false
    }

    /// # Errors
    /// [`Error::Shape`](crate::error::Error::Shape) when one token gets so many experts that the table, as wide for
    /// all, would have 2^32 slots.
    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let scores = request.scores();
        let mut picks = picks(request);
        let mut held = vec![0usize; scores.tokens()];
        picks.iter().for_each(|wish| held[wish.token as usize] += 1);
        let width = held.iter().copied().fold(request.top_k(), usize::max);
        check_slots(scores.tokens(), width)?;

        // Within a token as top-k has them: the highest score first, the lower expert among equals.
        picks.sort_unstable_by(|a, b| {
            a.token.cmp(&b.token).then((b.score + 0.0).total_cmp(&(a.score + 0.0))).then(a.expert.cmp(&b.expert))
        });
        let mut chosen = vec![EMPTY; scores.tokens() * width];
        for picks in picks.chunk_by(|a, b| a.token == b.token) {
            let row = picks[0].token as usize * width;
            chosen[row..].iter_mut().zip(picks).for_each(|(slot, wish)| *slot = wish.expert);
        }
        *assignment = Assignment::from_chosen(scores, request.top_k(), chosen, None);
        Ok(())
    }
}

/// What every pool picks, pool by pool.
fn picks(request: &RouteRequest<'_>) -> Vec<Wish> {
    let (scores, capacity, precedence) = (request.scores(), request.capacity(), Precedence::new(request));
    let all = 0..scores.experts() as u16;
    let pools: Vec<(u64, Vec<u16>)> = match capacity.limits() {
        None => vec![(request.live_tokens() as u64 * request.top_k() as u64, all.collect())],
        Some(limits) => {
            let mut pools: Vec<_> = limits.iter().map(|&limit| (u64::from(limit), Vec::new())).collect();
            all.for_each(|expert| pools[capacity.pool_of(expert)].1.push(expert));
            pools
        }
    };
    let live: Vec<usize> = (0..scores.tokens()).filter(|&token| !request.is_padding(token)).collect();
    let (mut picks, mut wishes) = (Vec::new(), Vec::new());
    for (limit, experts) in pools.iter().filter(|(limit, _)| *limit > 0) {
        wishes.clear();
        for &token in &live {
            let selection = scores.selection(token);
            let candidates = experts.iter().map(|&expert| (expert, selection[usize::from(expert)]));
            let allowed = candidates.filter(|(_, score)| *score > f32::NEG_INFINITY);
            wishes.extend(allowed.map(|(expert, score)| Wish { score, token: token as u32, expert, slot: 0 }));
        }
        if *limit < wishes.len() as u64 {
            let limit = *limit as usize;
            wishes.select_nth_unstable_by(limit, |a, b| precedence.compare(a, b));
            wishes.truncate(limit);
        }
        picks.extend_from_slice(&wishes);
    }
    picks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::{Capacity, Placement};
    use crate::routing::logits::Logits;
    use crate::routing::router::RouteContext;
    use crate::routing::scores::{Scores, Scoring};
    use proptest::prelude::*;

    fn scores(values: &[f32], experts: usize) -> Scores {
        Scoring::softmax().scores(&Logits::new(values, values.len() / experts, experts).unwrap(), None).unwrap()
    }

    fn route(scores: &Scores, top_k: usize, capacity: &Capacity) -> Assignment {
        let request = RouteRequest::new(scores, top_k, capacity, RouteContext::default()).unwrap();
        ExpertChoice.route(&request, &mut RouteState::default()).unwrap()
    }

    /// The oracle: sort each pool's pairs and take the first of them.
    fn naive(scores: &Scores, pools: &[(usize, Vec<usize>)]) -> Vec<(usize, usize)> {
        let mut picks = Vec::new();
        for (limit, experts) in pools {
            let mut pairs: Vec<(usize, usize)> =
                (0..scores.tokens()).flat_map(|token| experts.iter().map(move |&expert| (token, expert))).collect();
            pairs.sort_by(|a, b| scores.gate(b.0)[b.1].total_cmp(&scores.gate(a.0)[a.1]));
            picks.extend(pairs.into_iter().take(*limit));
        }
        picks.sort_unstable();
        picks
    }

    fn pairs(assignment: &Assignment) -> Vec<(usize, usize)> {
        let of = |token| assignment.slots(token).map(move |(expert, _)| (token, expert.index()));
        let mut pairs: Vec<_> = (0..assignment.tokens()).flat_map(of).collect();
        pairs.sort_unstable();
        pairs
    }

    proptest! {
        #[test]
        fn picks_are_those_of_a_full_sort(
            values in prop::collection::vec(-4.0f32..4.0, 5 * 24), limits in prop::collection::vec(0usize..30, 5),
        ) {
            let scores = scores(&values, 5);
            let as_limits = |limits: &[usize]| limits.iter().map(|&limit| limit as u32).collect::<Vec<_>>();
            let per_expert = Capacity::per_expert(as_limits(&limits)).unwrap();
            let columns: Vec<_> = limits.iter().copied().zip((0..5).map(|expert| vec![expert])).collect();
            prop_assert_eq!(pairs(&route(&scores, 2, &per_expert)), naive(&scores, &columns));

            let placement = Placement::new(vec![0, 1, 0, 1, 1], 2).unwrap();
            let per_device = Capacity::per_device(placement, as_limits(&limits[..2])).unwrap();
            let devices = [(limits[0], vec![0, 2]), (limits[1], vec![1, 3, 4])];
            prop_assert_eq!(pairs(&route(&scores, 2, &per_device)), naive(&scores, &devices));

            let unlimited = route(&scores, 2, &Capacity::unlimited(5).unwrap());
            prop_assert_eq!(pairs(&unlimited), naive(&scores, &[(48, (0..5).collect())]));
        }
    }

    #[test]
    fn weights_are_normalised_over_what_a_token_got() {
        let logits = [9.0, 9.0, 9.0, 0.0, 0.0, 1.0];
        let scoring = Scoring::softmax().normalized(true);
        let scores = scoring.scores(&Logits::new(&logits, 2, 3).unwrap(), None).unwrap();
        let assignment = route(&scores, 1, &Capacity::per_expert(vec![1, 2, 1]).unwrap());
        assert_eq!(assignment.width(), 2);
        for token in 0..2 {
            let sum: f32 = assignment.slots(token).map(|(_, weight)| weight).sum();
            assert!((sum - 1.0).abs() < 1e-6, "{assignment:?}");
        }
    }

    #[test]
    fn one_token_without_limits_gets_its_top_k() {
        let scores = scores(&[0.0, 3.0, 1.0, 2.0], 4);
        let assignment = route(&scores, 2, &Capacity::unlimited(4).unwrap());
        assert_eq!(assignment.ids().collect::<Vec<_>>(), [1, 3]);
    }
}
