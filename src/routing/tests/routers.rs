//! What must hold for every router under a limit, for those that do not look at the gate (hash, weighted hash, phase kernel,
//! phase quota) and for the published baselines that see the whole batch.

use std::collections::HashSet;

use crate::routing::{PhaseSide, Profile, Rounding, Shares, permutations, phase_ring};
use crate::{
    Assignment, Capacity, CapacityRule, DispatchPlan, Logits, Placement, RouteContext, RouteMetrics, RouteRequest,
    RouteState, RouterKind, Scores, Scoring,
};
use proptest::prelude::*;

/// All but plain top-k and the memory-aware router on top of it, which know no limit.
fn limited() -> impl Iterator<Item = RouterKind> {
    RouterKind::ALL.into_iter().filter(|kind| kind.build(0).respects_capacity())
}

fn scores_of(values: &[f32], experts: usize) -> Scores {
    let logits = Logits::new(values, values.len() / experts, experts).unwrap();
    Scoring::softmax().scores(&logits, None).unwrap()
}

fn flat_scores(tokens: usize, experts: usize) -> Scores {
    scores_of(&vec![0.0; tokens * experts], experts)
}

fn route(kind: RouterKind, seed: u64, request: &RouteRequest<'_>) -> Assignment {
    kind.build(seed).route(request, &mut RouteState::default()).unwrap()
}

/// Loads within limits, distinct allowed experts, nothing for padding, empty slots with weight 0.
fn check(request: &RouteRequest<'_>, assignment: &Assignment) {
    let (scores, capacity) = (request.scores(), request.capacity());
    assert_eq!((assignment.tokens(), assignment.top_k()), (scores.tokens(), request.top_k()));
    assert_eq!(assignment.ids().count(), scores.tokens() * assignment.width());
    let mut pools = vec![0u32; capacity.pool_sizes().len()];
    for (expert, load) in assignment.load().into_iter().enumerate() {
        pools[capacity.pool_of(expert as u16)] += load;
    }
    if let Some(limits) = capacity.limits() {
        assert!(pools.iter().zip(limits).all(|(load, limit)| load <= limit), "{pools:?} {limits:?}");
    }
    for token in 0..scores.tokens() {
        let experts: Vec<usize> = assignment.slots(token).map(|(expert, _)| expert.index()).collect();
        assert_eq!(experts.iter().collect::<HashSet<_>>().len(), experts.len(), "token {token}: {experts:?}");
        assert!(experts.iter().all(|&expert| scores.is_allowed(token, expert)), "token {token}: {experts:?}");
        assert!(experts.is_empty() || !request.is_padding(token));
    }
    assert_eq!(assignment.ids().filter(|&id| id >= 0).count(), assignment.kept());
    check_plan(assignment);
    assert!(
        assignment
            .ids()
            .zip(assignment.weights())
            .all(|(id, &weight)| weight.is_finite() && (id >= 0 || weight == 0.0))
    );
}

/// The plan is a permutation of the kept slots, sorted by expert and then by token, each with its own weight.
fn check_plan(assignment: &Assignment) {
    let (plan, width) = (DispatchPlan::from(assignment), assignment.width());
    let ids: Vec<i32> = assignment.ids().collect();
    let mut expected: Vec<usize> = (0..ids.len()).filter(|&slot| ids[slot] >= 0).collect();
    expected.sort_by_key(|&slot| (ids[slot], slot));
    assert_eq!(plan.slots().iter().map(|&slot| slot as usize).collect::<Vec<_>>(), expected);
    assert!(plan.tokens().iter().zip(&expected).all(|(&token, &slot)| token as usize == slot / width));
    assert!(plan.weights().iter().zip(&expected).all(|(&weight, &slot)| weight == assignment.weights()[slot]));
    let load: Vec<u32> = plan.offsets().windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(load, assignment.load());
}

fn capacities(experts: usize) -> impl Strategy<Value = Capacity> {
    let limit = || prop_oneof![2 => 0u32..40, 1 => Just(0u32), 1 => 0u32..500, 1 => Just(u32::MAX)];
    let per_expert = prop::collection::vec(limit(), experts).prop_map(|limits| Capacity::per_expert(limits).unwrap());
    let per_device = (prop::collection::vec(0u16..4, experts), prop::collection::vec(limit(), 4))
        .prop_map(|(device_of, limits)| Capacity::per_device(Placement::new(device_of, 4).unwrap(), limits).unwrap());
    prop_oneof![Just(Capacity::unlimited(experts).unwrap()), per_expert, per_device]
}

fn cases() -> impl Strategy<Value = (usize, usize, usize, Capacity, Vec<bool>, Vec<bool>, u64)> {
    (0usize..300, 1usize..24).prop_flat_map(|(tokens, experts)| {
        (
            Just(tokens),
            Just(experts),
            1..=experts.min(8),
            capacities(experts),
            prop::collection::vec(prop::bool::weighted(0.2), tokens),
            prop::collection::vec(prop::bool::weighted(0.3), tokens * experts),
            any::<u64>(),
        )
    })
}

proptest! {
    #[test]
    fn every_router_under_a_limit_keeps_the_invariants((tokens, experts, top_k, capacity, padding, masks, seed) in cases()) {
        let masked: Vec<f32> = masks.iter().map(|&mask| if mask { f32::NEG_INFINITY } else { 0.0 }).collect();
        for scores in [flat_scores(tokens, experts), scores_of(&masked, experts)] {
            for padding in [None, Some(padding.as_slice())] {
                let context = RouteContext { layer: 3, padding, ..RouteContext::default() };
                let request = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
                for kind in limited() {
                    let assignment = route(kind, seed, &request);
                    check(&request, &assignment);
                    prop_assert_eq!(&assignment, &route(kind, seed, &request));
                    let metrics = RouteMetrics::new(&request, &assignment);
                    if kind.build(seed).keeps_top_k() {
                        prop_assert_eq!(assignment.width(), top_k);
                        prop_assert!(metrics.kept <= metrics.demand);
                    } else {
                        prop_assert_eq!(kind, RouterKind::ExpertChoice);
                        let most = (0..tokens).map(|token| assignment.slots(token).count()).max().unwrap_or(0);
                        prop_assert_eq!(assignment.width(), most.max(top_k));
                        prop_assert_eq!(assignment.gate_mass_bound(), None);
                    }
                    if let Some(bound) = assignment.gate_mass_bound() {
                        prop_assert!(metrics.gate_mass <= bound * (1.0 + 1e-9));
                    }
                    if kind == RouterKind::PhaseQuota && capacity.limits().is_none() {
                        let may_have = |token| (0..experts).filter(|&expert| scores.is_allowed(token, expert)).count();
                        let live = (0..tokens).filter(|&token| !request.is_padding(token));
                        prop_assert_eq!(assignment.kept(), live.map(|token| may_have(token).min(top_k)).sum::<usize>());
                    }
                    if kind == RouterKind::PhaseQuota && !scores.has_masks() {
                        prop_assert_eq!(metrics.kept, capacity.feasible_slots(request.live_tokens(), top_k));
                        let without = (request.live_tokens() as u64).saturating_sub(metrics.kept);
                        prop_assert_eq!(metrics.tokens_without_expert, without);
                    }
                }
            }
        }
    }
}

#[test]
fn the_survival_of_the_quarters_does_not_differ() {
    let (tokens, experts, top_k) = (4096, 64, 8);
    let scores = flat_scores(tokens, experts);
    // Room for 80 % of the slots, in unequal parts.
    let shares = Shares::PerExpert { profile: Profile::Strong, seed: 1 };
    let capacity = CapacityRule::new(0.8, shares).capacity(tokens, experts, top_k).unwrap();
    let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
    for seed in 0..4 {
        let assignment = route(RouterKind::PhaseQuota, seed, &request);
        let ids: Vec<i32> = assignment.ids().collect();
        let kept: Vec<usize> =
            ids.chunks(ids.len() / 4).map(|quarter| quarter.iter().filter(|&&id| id >= 0).count()).collect();
        let mean = assignment.kept() as f64 / 4.0;
        assert!(kept.iter().all(|&kept| (kept as f64 / mean - 1.0).abs() < 0.01), "{kept:?}");
        // Nobody has two slots more than anybody else.
        let per_token = (0..tokens).map(|token| assignment.slots(token).count());
        assert!(per_token.clone().max().unwrap() - per_token.min().unwrap() <= 1);
    }
}

#[test]
fn blocks_let_nearly_all_experts_meet() {
    let (tokens, experts, top_k) = (4096, 64, 8);
    let scores = flat_scores(tokens, experts);
    for capacity in
        [Capacity::unlimited(experts).unwrap(), CapacityRule::per_expert(1.0).capacity(tokens, experts, top_k).unwrap()]
    {
        let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
        let assignment = route(RouterKind::PhaseQuota, 42, &request);
        let mut met = HashSet::new();
        for token in 0..tokens {
            let experts: Vec<_> = assignment.slots(token).map(|(expert, _)| expert.index()).collect();
            met.extend(
                experts.iter().flat_map(|&a| experts.iter().map(move |&b| (a.min(b), a.max(b)))).filter(|p| p.0 < p.1),
            );
        }
        let pairs = experts * (experts - 1) / 2;
        assert!(met.len() * 100 >= pairs * 98, "{} of {pairs}", met.len());
        assert_eq!(assignment.kept(), tokens * top_k);
    }
}

#[test]
fn hashes_follow_the_token_id_and_the_layer() {
    let (tokens, experts, top_k) = (200, 16, 3);
    let scores = flat_scores(tokens, experts);
    let capacity = Capacity::unlimited(experts).unwrap();
    let ids: Vec<u32> = (0..tokens as u32).map(|token| token % 7).collect();
    let at = |kind, layer, token_ids| {
        let context = RouteContext { layer, token_ids, ..RouteContext::default() };
        route(kind, 42, &RouteRequest::new(&scores, top_k, &capacity, context).unwrap())
    };
    let row = |assignment: &Assignment, token: usize| {
        assignment.slots(token).map(|(expert, _)| expert.index()).collect::<Vec<_>>()
    };
    let hashed = at(RouterKind::Hash, 0, Some(&ids));
    assert!((0..tokens).all(|token| row(&hashed, token) == row(&hashed, token % 7)));
    assert_ne!(row(&hashed, 0), row(&at(RouterKind::Hash, 1, Some(&ids)), 0));
    assert_ne!(hashed, at(RouterKind::Hash, 0, None));
    // Without limits, and with equal ones, the weights are equal and so is the choice.
    assert_eq!(hashed, at(RouterKind::WeightedHash, 0, Some(&ids)));
    let equal = Capacity::per_expert(vec![37; experts]).unwrap();
    let request = RouteRequest::new(&scores, top_k, &equal, RouteContext::default()).unwrap();
    assert_eq!(route(RouterKind::Hash, 42, &request), route(RouterKind::WeightedHash, 42, &request));
}

#[test]
fn hash_loads_are_those_of_a_fair_draw() {
    let (tokens, experts, top_k) = (50_000, 8, 2);
    let scores = flat_scores(tokens, experts);
    let limits = vec![u32::MAX, u32::MAX / 2, u32::MAX / 4, u32::MAX / 4, 0, 0, 0, 0];
    let unlimited = Capacity::unlimited(experts).unwrap();
    let weighted = Capacity::per_expert(limits).unwrap();
    let load = |kind, capacity, top_k| {
        route(kind, 1, &RouteRequest::new(&scores, top_k, capacity, RouteContext::default()).unwrap()).load()
    };
    let near = |load: u32, expected: f64| (f64::from(load) / tokens as f64 - expected).abs() < 0.01;
    assert!(load(RouterKind::Hash, &unlimited, top_k).iter().all(|&load| near(load, 0.25)));
    let first = load(RouterKind::WeightedHash, &weighted, 1);
    assert!(near(first[0], 0.5) && near(first[1], 0.25) && near(first[2], 0.125) && first[4..] == [0; 4], "{first:?}");
    // Without replacement: P(expert 0 among two) = 1/2 + 1/4·(1/2 / 3/4) + 2·1/8·(1/2 / 7/8).
    let second = load(RouterKind::WeightedHash, &weighted, 2);
    assert!(near(second[0], 0.5 + 1.0 / 6.0 + 1.0 / 7.0), "{second:?}");
    // More asked for than have room: the rest stays empty.
    assert_eq!(load(RouterKind::WeightedHash, &weighted, 6).iter().sum::<u32>(), 4 * tokens as u32);
}

#[test]
fn masked_slots_are_exchanged_not_lost() {
    // Each token may use two of four groups, as in group-limited models; capacity exactly the demand.
    let (tokens, experts, top_k) = (2048, 32, 4);
    let values: Vec<f32> = (0..tokens * experts)
        .map(|at| {
            let (token, group) = (at / experts, at % experts / 8);
            if group == token % 4 || group == (token / 4 + token + 1) % 4 { 0.0 } else { f32::NEG_INFINITY }
        })
        .collect();
    let scores = scores_of(&values, experts);
    let capacity = CapacityRule::per_expert(1.0).capacity(tokens, experts, top_k).unwrap();
    let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
    let assignment = route(RouterKind::PhaseQuota, 5, &request);
    check(&request, &assignment);
    assert_eq!(assignment.kept(), tokens * top_k);
}

#[test]
fn rows_that_allow_little_or_nothing_get_what_they_may_have() {
    let masked = f32::NEG_INFINITY;
    let scores = scores_of(&[masked, masked, masked, masked, 1.0, masked, 0.0, 0.0, 0.0], 3);
    let capacity = Capacity::unlimited(3).unwrap();
    let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
    for kind in [RouterKind::Hash, RouterKind::WeightedHash, RouterKind::PhaseQuota] {
        let assignment = route(kind, 9, &request);
        check(&request, &assignment);
        let kept: Vec<usize> = (0..3).map(|token| assignment.slots(token).count()).collect();
        assert_eq!(kept, [0, 1, 2], "{}", kind.name());
    }
}

#[test]
fn no_room_and_no_tokens_are_fine() {
    let none = Capacity::per_expert(vec![0; 5]).unwrap();
    for kind in limited() {
        for (tokens, capacity) in [(0, &none), (7, &none), (0, &Capacity::unlimited(5).unwrap())] {
            let scores = flat_scores(tokens, 5);
            let request = RouteRequest::new(&scores, 5, capacity, RouteContext::default()).unwrap();
            let assignment = route(kind, 0, &request);
            assert_eq!((assignment.tokens(), assignment.kept()), (tokens, 0), "{}", kind.name());
        }
    }
}

#[test]
fn the_most_experts_there_can_be_are_fine() {
    let experts = u16::MAX as usize;
    let scores = flat_scores(2, experts);
    let capacity = Capacity::per_expert(vec![u32::MAX; experts]).unwrap();
    let request = RouteRequest::new(&scores, 3, &capacity, RouteContext::default()).unwrap();
    for kind in limited() {
        check(&request, &route(kind, 7, &request));
    }
}

#[test]
fn the_place_in_the_batch_does_not_matter_to_those_that_see_the_whole_of_it() {
    let (tokens, experts, top_k) = (96, 8, 3);
    // Many equal scores, and rows that differ.
    let row = |token: usize| (0..experts).map(move |expert| ((token / 2 * 31 + expert * 17) % (7 + token % 3)) as f32);
    let straight: Vec<f32> = (0..tokens).flat_map(row).collect();
    let turned: Vec<f32> = (0..tokens).rev().flat_map(row).collect();
    for rule in [CapacityRule::per_expert(1.0), CapacityRule::per_expert(0.8), CapacityRule::per_device(1.0, 3)] {
        let capacity = rule.capacity(tokens, experts, top_k).unwrap();
        for kind in [RouterKind::ExpandedDrop, RouterKind::ExpertChoice, RouterKind::Sinkhorn, RouterKind::Auction] {
            let sets = |values: &[f32]| {
                let scores = scores_of(values, experts);
                let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
                let assignment = route(kind, 0, &request);
                let row = |token: usize| {
                    let content: Vec<u32> = scores.gate(token).iter().map(|score| score.to_bits()).collect();
                    (content, assignment.slots(token).map(|(expert, _)| expert.index()).collect::<Vec<_>>())
                };
                let mut sets: Vec<_> = (0..tokens).map(row).collect();
                sets.sort();
                sets
            };
            assert_eq!(sets(&straight), sets(&turned), "{}", kind.name());
        }
    }
}

#[test]
fn expert_choice_can_keep_more_than_was_asked_for() {
    let (tokens, experts, top_k) = (64, 8, 2);
    let values: Vec<f32> = (0..tokens * experts).map(|at| (at * 29 % 101) as f32 / 40.0).collect();
    let scores = scores_of(&values, experts);
    let capacity = CapacityRule::per_expert(1.5).capacity(tokens, experts, top_k).unwrap();
    let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
    let assignment = route(RouterKind::ExpertChoice, 0, &request);
    check(&request, &assignment);
    assert_eq!(assignment.load(), vec![24; experts]);
    assert_eq!(RouteMetrics::new(&request, &assignment).survival(), 1.5);
}

/// The published benchmark's square form: N tokens, N experts, density 0.3, ⌈capacity⌉; survival of one seed.
fn published_survival(tokens: usize, top_k: usize, headroom: f64, seed: u64) -> [f64; 2] {
    let weights = Profile::Strong.weights(tokens, seed);
    let mean = weights.iter().sum::<f64>() / tokens as f64;
    let density = 0.3 * tokens as f64;
    let [source_order, target_order] = permutations(tokens as u32, seed);
    let target_degrees =
        weights.iter().map(|weight| (weight / mean * density).round().clamp(1.0, tokens as f64) as u32).collect();
    let sources = PhaseSide::new(vec![density.round() as u32; tokens], source_order).unwrap();
    let targets = PhaseSide::new(target_degrees, target_order).unwrap();
    let rule = CapacityRule::new(headroom, Shares::PerExpert { profile: Profile::Strong, seed })
        .with_rounding(Rounding::Ceil)
        .with_minimum_mean(0.0);
    let capacity = rule.capacity(tokens, tokens, top_k).unwrap();
    let mut room = capacity.limits().unwrap().to_vec();
    let kept = phase_ring(sources, targets, top_k, seed).unwrap().into_iter().filter(|&column| {
        let room = usize::try_from(column).ok().map(|column| &mut room[column]).filter(|room| **room > 0);
        room.map(|room| *room -= 1).is_some()
    });
    let scores = flat_scores(tokens, tokens);
    let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
    let hashed = route(RouterKind::Hash, seed, &request);
    [kept.count(), hashed.kept()].map(|kept| kept as f64 / (tokens * top_k) as f64)
}

#[test]
fn the_published_benchmark_comes_out_as_measured() {
    let runs: Vec<[f64; 2]> = (0..4).map(|seed| published_survival(1024, 2, 1.2, seed)).collect();
    for (at, expected) in [(0, 0.909), (1, 0.788)] {
        let mean = runs.iter().map(|run| run[at]).sum::<f64>() / runs.len() as f64;
        assert!((mean - expected).abs() < 0.01, "{mean} for {expected}");
    }
}

proptest! {
    #[test]
    fn normalised_weights_sum_to_the_scale_where_nothing_is_dropped(
        values in prop::collection::vec(-5.0f32..5.0, 12 * 40), top_k in 1usize..6, scale in 0.5f32..3.0,
    ) {
        let logits = Logits::new(&values, 40, 12).unwrap();
        let scoring = Scoring { scale, ..Scoring::softmax().normalized(true) };
        let scores = scoring.scores(&logits, None).unwrap();
        let capacity = CapacityRule::per_expert(1.0).capacity(40, 12, top_k).unwrap();
        let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
        for kind in [RouterKind::TopK, RouterKind::PhaseQuota, RouterKind::Phase] {
            let assignment = route(kind, 1, &request);
            prop_assert_eq!(assignment.kept(), 40 * top_k);
            for token in 0..40 {
                let sum: f32 = assignment.slots(token).map(|(_, weight)| weight).sum();
                prop_assert!((sum / scale - 1.0).abs() < 1e-5, "{}: {sum} of {scale}", kind.name());
            }
        }
    }
}
