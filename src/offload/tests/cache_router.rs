//! What must hold for the memory-aware routers `cache` and `cache+phase`: the bound on each token's gate mass, who is never
//! swapped, limits, and what the state learns.

use std::collections::HashSet;

use crate::offload::residency::Residency;
use crate::routing::{GroupLimit, GroupScore};
use crate::{
    Assignment, CacheRouter, Capacity, ExpertId, ExpertSet, Logits, PhaseRouter, Placement, Policy, RouteContext,
    RouteRequest, RouteState, Router, Scores, Scoring, Scratch, TopK,
};
use proptest::prelude::*;

const EXPERTS: usize = 24;

fn used(assignment: &Assignment) -> ExpertSet {
    let mut set = ExpertSet::default();
    assignment.used_experts(&mut set).unwrap();
    set
}

fn set(experts: usize, ids: impl IntoIterator<Item = usize>) -> ExpertSet {
    let mut set = ExpertSet::new(experts).unwrap();
    for id in ids {
        set.insert(ExpertId::new(id, experts).unwrap());
    }
    set
}

fn scores_of(values: &[f32], experts: usize) -> Scores {
    Scoring::softmax().scores(&Logits::new(values, values.len() / experts, experts).unwrap(), None).unwrap()
}

fn cold(router: &dyn Router, request: &RouteRequest<'_>) -> Assignment {
    router.route(request, &mut RouteState::default()).unwrap()
}

fn ids(assignment: &Assignment, token: usize) -> Vec<usize> {
    assignment.slots(token).map(|(expert, _)| expert.index()).collect()
}

/// Gate mass as a caller would add it up.
fn mass(scores: &Scores, assignment: &Assignment, token: usize) -> f32 {
    ids(assignment, token).into_iter().map(|expert| scores.gate(token)[expert]).sum()
}

fn pool_loads(capacity: &Capacity, assignment: &Assignment) -> Vec<u32> {
    let mut pools = vec![0; capacity.pool_sizes().len()];
    for (expert, load) in assignment.load().into_iter().enumerate() {
        pools[capacity.pool_of(expert as u16)] += load;
    }
    pools
}

#[derive(Clone, Debug)]
struct Case {
    values: Vec<f32>,
    bias: Option<Vec<f32>>,
    scoring: Scoring,
    resident: Option<Vec<bool>>,
    padding: Vec<bool>,
    capacity: Capacity,
    top_k: usize,
    keep_top: usize,
    bonus: f64,
    max_mass_loss: f64,
}

fn cases() -> impl Strategy<Value = Case> {
    let logit = prop_oneof![6 => -3.0f32..3.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(0.5f32), 1 => -90.0f32..90.0];
    let limits = |most: u32| prop_oneof![3 => 0..most, 1 => Just(u32::MAX)];
    let per_expert =
        prop::collection::vec(limits(20), EXPERTS).prop_map(|limits| Capacity::per_expert(limits).unwrap());
    let per_device = prop::collection::vec(limits(80), 4)
        .prop_map(|limits| Capacity::per_device(Placement::contiguous(EXPERTS, 4).unwrap(), limits).unwrap());
    let capacity = prop_oneof![Just(Capacity::unlimited(EXPERTS).unwrap()), per_expert, per_device];
    let groups = Some(GroupLimit { groups: 4, top_groups: 2, score: GroupScore::TopTwo });
    let scoring = prop_oneof![
        Just(Scoring::softmax()),
        Just(Scoring::sigmoid().normalized(true)),
        Just(Scoring { groups, ..Scoring::sigmoid() })
    ];
    (prop_oneof![Just(1usize), 2usize..40]).prop_flat_map(move |tokens| {
        (
            prop::collection::vec(logit.clone(), tokens * EXPERTS),
            prop::option::weighted(0.3, prop::collection::vec(-0.3f32..0.3, EXPERTS)),
            scoring.clone(),
            prop::option::weighted(0.8, prop::collection::vec(any::<bool>(), EXPERTS)),
            prop::collection::vec(prop::bool::weighted(0.1), tokens),
            capacity.clone(),
            1usize..9,
            0usize..4,
            prop_oneof![0.0f64..3.0, Just(1e300)],
            prop_oneof![0.0f64..0.6, Just(1.0)],
        )
            .prop_map(
                |(values, bias, scoring, resident, padding, capacity, top_k, keep_top, bonus, max_mass_loss)| Case {
                    values,
                    bias,
                    scoring,
                    resident,
                    padding,
                    capacity,
                    top_k,
                    keep_top,
                    bonus,
                    max_mass_loss,
                },
            )
    })
}

impl Case {
    fn scores(&self) -> Scores {
        let logits = Logits::new(&self.values, self.padding.len(), EXPERTS).unwrap();
        self.scoring.scores(&logits, self.bias.as_deref()).unwrap()
    }

    fn resident(&self) -> Option<ExpertSet> {
        let ids = |mask: &Vec<bool>| set(EXPERTS, (0..EXPERTS).filter(|&expert| mask[expert]));
        self.resident.as_ref().map(ids)
    }

    fn router(&self) -> CacheRouter {
        CacheRouter::new(self.bonus, self.max_mass_loss).unwrap().with_keep_top(self.keep_top)
    }
}

/// The first `keep_top` kept slots stay, experts are distinct and allowed, the bound holds as `f32` sums check it in any order.
fn check(case: &Case, request: &RouteRequest<'_>, base: &Assignment, swapped: &Assignment) {
    let scores = request.scores();
    assert_eq!(base.kept(), swapped.kept());
    for token in 0..scores.tokens() {
        let (before, after) = (ids(base, token), ids(swapped, token));
        assert_eq!(before.len(), after.len());
        assert_eq!(after.iter().collect::<HashSet<_>>().len(), after.len(), "{after:?}");
        assert!(after.iter().all(|&expert| scores.is_allowed(token, expert)), "{after:?}");
        assert!(before.iter().take(case.keep_top).all(|expert| after.contains(expert)), "{before:?} {after:?}");
        let by_score = |pair: &[usize]| scores.selection(token)[pair[0]] >= scores.selection(token)[pair[1]];
        assert!(after.windows(2).all(by_score), "{after:?}");
        let gate = scores.gate(token);
        let sums = |ids: &[usize]| -> [f32; 2] {
            [ids.iter().map(|&expert| gate[expert]).sum(), ids.iter().rev().map(|&expert| gate[expert]).sum()]
        };
        for kept in sums(&after) {
            for base in sums(&before) {
                assert!(before == after || kept >= (1.0 - case.max_mass_loss) as f32 * base, "{kept} of {base}");
                assert!(before == after || kept >= (1.0 - case.max_mass_loss as f32) * base, "{kept} of {base}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn swaps_stay_within_the_bound_alone_and_with_phase(case in cases()) {
        let (scores, resident) = (case.scores(), case.resident());
        let context = RouteContext { padding: Some(&case.padding), resident: resident.as_ref(), ..RouteContext::default() };
        let request = RouteRequest::new(&scores, case.top_k, &case.capacity, context).unwrap();
        let (plain, phase) = (cold(&TopK { drop: None }, &request), cold(&PhaseRouter::default(), &request));
        let router = case.router();
        let swapped = cold(&router, &request);
        check(&case, &request, &plain, &swapped);
        let with_phase = router.clone().with_phase(PhaseRouter::default());
        let limited = cold(&with_phase, &request);
        check(&case, &request, &phase, &limited);
        prop_assert_eq!(limited.gate_mass_bound(), phase.gate_mass_bound());
        if let Some(limits) = case.capacity.limits() {
            let loads = pool_loads(&case.capacity, &limited);
            prop_assert!(loads.iter().zip(limits).all(|(load, limit)| load <= limit), "{:?} {:?}", loads, limits);
        }
        // The same again, with buffers that have seen something else.
        let (mut scratch, mut again) = (Scratch::default(), plain.clone());
        for (router, expected) in [(router, &swapped), (with_phase, &limited)] {
            router.route_into(&request, &mut RouteState::default(), &mut scratch, &mut again).unwrap();
            prop_assert_eq!(&again, expected);
        }
        // Swaps never ask for an expert that was not read before, and without a cache nothing helps a token that is alone.
        let is_resident = |expert| resident.as_ref().is_some_and(|resident| resident.contains(expert));
        for (before, after) in [(&plain, &swapped), (&phase, &limited)] {
            let before = used(before);
            prop_assert!(used(after).iter().all(|expert| is_resident(expert) || before.contains(expert)));
        }
        if scores.tokens() == 1 && resident.is_none() {
            prop_assert_eq!(&swapped, &plain);
        }
    }

    #[test]
    fn without_bonus_or_bound_nothing_changes(case in cases()) {
        let (scores, resident) = (case.scores(), case.resident());
        let context = RouteContext { padding: Some(&case.padding), resident: resident.as_ref(), ..RouteContext::default() };
        let request = RouteRequest::new(&scores, case.top_k, &case.capacity, context).unwrap();
        for router in [CacheRouter::new(0.0, 0.5).unwrap(), CacheRouter::new(1.0, 0.0).unwrap()] {
            let router = router.with_keep_top(0);
            prop_assert_eq!(cold(&router, &request), cold(&TopK { drop: None }, &request));
            let steered = CacheRouter::new(1.0, 0.0).unwrap().with_target_hit_rate(1.0).unwrap();
            prop_assert_eq!(cold(&steered, &request), cold(&TopK { drop: None }, &request));
            prop_assert_eq!(cold(&router.with_phase(PhaseRouter::default()), &request), cold(&PhaseRouter::default(), &request));
        }
    }

    /// Rows in another order get the same experts, where no two rows are alike.
    #[test]
    fn the_order_of_tokens_does_not_matter(case in cases(), turn in 1usize..40) {
        let values: Vec<f32> = case.values.iter().enumerate().map(|(at, value)| value + at as f32 * 1e-4).collect();
        let (tokens, top_k) = (case.padding.len(), case.top_k);
        let resident = case.resident();
        let mut turned = values.clone();
        turned.rotate_left(turn % tokens * EXPERTS);
        let routed = |router: &dyn Router, values: &[f32]| -> (Vec<Vec<usize>>, RouteState) {
            let scores = scores_of(values, EXPERTS);
            let context = RouteContext { resident: resident.as_ref(), ..RouteContext::default() };
            let request = RouteRequest::new(&scores, top_k, &case.capacity, context).unwrap();
            let mut state = RouteState::default();
            let assignment = router.route(&request, &mut state).unwrap();
            ((0..tokens).map(|token| ids(&assignment, token)).collect(), state)
        };
        for router in [case.router(), case.router().with_phase(PhaseRouter::default())] {
            let ((mut straight, state), (other, other_state)) = (routed(&router, &values), routed(&router, &turned));
            straight.rotate_left(turn % tokens);
            prop_assert_eq!(straight, other);
            prop_assert_eq!(state.score_range, other_state.score_range);
            prop_assert_eq!(state.affinity(), other_state.affinity());
        }
    }

    /// One token against every choice there is: nobody could have had fewer misses under the same rules.
    #[test]
    fn no_other_swaps_of_one_token_would_save_more(
        values in prop::collection::vec(-2.0f32..2.0, 8), mask in any::<u8>(), bonus in 0.0f64..1.0, loss in 0.0f64..0.5,
    ) {
        let (scores, capacity) = (scores_of(&values, 8), Capacity::unlimited(8).unwrap());
        let resident = set(8, (0..8).filter(|id| mask >> id & 1 == 1));
        let context = RouteContext { resident: Some(&resident), ..RouteContext::default() };
        let request = RouteRequest::new(&scores, 4, &capacity, context).unwrap();
        let (base, swapped) = (cold(&TopK { drop: None }, &request), cold(&CacheRouter::new(bonus, loss).unwrap(), &request));
        let gate = scores.gate(0);
        let range = gate.iter().copied().fold(0.0, f32::max) - gate.iter().copied().fold(1.0, f32::min);
        let held = ids(&base, 0);
        let is_near = |id: &usize| mask >> id & 1 == 1;
        let misses = |ids: &[usize]| ids.iter().filter(|id| !is_near(id)).count();
        let mut best = misses(&held);
        for others in 0u8..=255 {
            let after: Vec<usize> = (0..8).filter(|id| others >> id & 1 == 1).collect();
            let going: Vec<usize> = held.iter().copied().filter(|id| !after.contains(id)).collect();
            let mut coming: Vec<usize> = after.iter().copied().filter(|id| !held.contains(id)).collect();
            coming.sort_by(|&a, &b| gate[b].total_cmp(&gate[a]));
            let kept: f64 = after.iter().map(|&id| f64::from(gate[id])).sum();
            let all: f64 = held.iter().map(|&id| f64::from(gate[id])).sum();
            let wins = going.iter().zip(&coming).all(|(&out, &into)| {
                f64::from(gate[into]) + bonus * f64::from(range) > f64::from(gate[out]) + 1e-6
            });
            let allowed = going.iter().all(|id| !is_near(id) && *id != held[0]) && coming.iter().all(is_near);
            if after.len() == 4 && allowed && wins && kept >= (1.0 - loss) * all + 1e-5 {
                best = best.min(misses(&after));
            }
        }
        prop_assert!(misses(&ids(&swapped, 0)) <= best, "{held:?} {:?}", ids(&swapped, 0));
    }
}

#[test]
fn the_unit_of_the_bonus_follows_the_scores() {
    // The same gate at a sixteenth of the size: sigmoid scores far down are close to exp(logit), so ratios stay.
    let experts = 16;
    let values: Vec<f32> = (0..experts * 64).map(|at| -20.0 + ((at * 7919) % 997) as f32 / 400.0).collect();
    let capacity = Capacity::unlimited(experts).unwrap();
    let resident = set(experts, (0..experts).step_by(2));
    let routed = |shift: f32| {
        let values: Vec<f32> = values.iter().map(|value| value + shift).collect();
        let mut state = RouteState::default();
        let all: Vec<Vec<usize>> = values
            .chunks(experts)
            .enumerate()
            .map(|(step, row)| {
                let scores = Scoring::sigmoid().scores(&Logits::new(row, 1, experts).unwrap(), None).unwrap();
                let context = RouteContext { resident: Some(&resident), step: step as u64, ..RouteContext::default() };
                let request = RouteRequest::new(&scores, 4, &capacity, context).unwrap();
                let router = CacheRouter::new(0.15, 0.2).unwrap();
                ids(&router.route(&request, &mut state).unwrap(), 0)
            })
            .collect();
        (all, state.score_range.unwrap())
    };
    let ((large, large_range), (small, small_range)) = (routed(0.0), routed(-16.0 * std::f32::consts::LN_2));
    let differing = large.iter().zip(&small).filter(|(a, b)| a != b).count();
    assert!(differing <= 1, "{differing} of {} tokens", large.len());
    assert!((large_range / small_range / 65536.0 - 1.0).abs() < 1e-3, "{large_range} {small_range}");
}

#[test]
fn an_expert_that_others_certainly_need_is_free_for_all() {
    // Both tokens want experts 0 and 1 or 2; 2 is the second token's best, so the first one takes it instead of 1.
    let values = [3.0, 2.0, 1.9, -5.0, 1.0, -5.0, 3.0, -5.0];
    let (scores, capacity) = (scores_of(&values, 4), Capacity::unlimited(4).unwrap());
    let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
    let router = CacheRouter::new(0.2, 0.2).unwrap();
    let swapped = cold(&router, &request);
    assert_eq!((ids(&swapped, 0), ids(&swapped, 1)), (vec![0, 2], vec![2, 0]));
    assert_eq!(used(&swapped).len(), 2);
    assert!(mass(&scores, &swapped, 0) >= 0.8 * mass(&scores, &cold(&TopK { drop: None }, &request), 0));
    // Padding needs nothing.
    let padding = [false, true];
    let context = RouteContext { padding: Some(&padding), ..RouteContext::default() };
    let request = RouteRequest::new(&scores, 2, &capacity, context).unwrap();
    assert_eq!(ids(&cold(&router, &request), 0), [0, 1]);
}

#[test]
fn nobody_gives_up_an_expert_that_is_loaded_anyway() {
    // Expert 1 is missing. The first token could do without it, the second cannot: so both keep it.
    let values = [3.0, 2.0, 1.9, -5.0, 3.0, 2.9, -5.0, -5.0];
    let (scores, capacity) = (scores_of(&values, 4), Capacity::unlimited(4).unwrap());
    let resident = set(4, [0, 2]);
    let context = RouteContext { resident: Some(&resident), ..RouteContext::default() };
    let request = RouteRequest::new(&scores, 2, &capacity, context).unwrap();
    for router in [CacheRouter::default(), CacheRouter::default().with_phase(PhaseRouter::default())] {
        let swapped = cold(&router, &request);
        assert_eq!((ids(&swapped, 0), ids(&swapped, 1)), (vec![0, 1], vec![0, 1]), "{}", router.name());
        let alone = scores_of(&values[..4], 4);
        let request = RouteRequest::new(&alone, 2, &capacity, context).unwrap();
        assert_eq!(ids(&cold(&router, &request), 0), [0, 2], "{}", router.name());
    }
}

/// Decode over logits that follow each other, `tokens` steps with a cache of a quarter of the experts: share of hits.
fn decode(router: &CacheRouter, tokens: u64) -> (f64, RouteState) {
    let (experts, top_k) = (32, 4);
    let capacity = Capacity::unlimited(experts).unwrap();
    let mut cache = Residency::new(experts, 8, Policy::Lru).unwrap();
    let (mut state, mut seed, mut row) = (RouteState::default(), 3u64, vec![0f32; experts]);
    let (mut hits, mut requests) = (0, 0);
    for step in 0..tokens {
        for value in &mut row {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *value = 0.7 * *value + (seed >> 40) as f32 / (1 << 22) as f32 - 2.0;
        }
        let scores = scores_of(&row, experts);
        let context = RouteContext { resident: Some(cache.resident()), step, ..RouteContext::default() };
        let request = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
        let assignment = router.route(&request, &mut state).unwrap();
        let (gate, chosen) = (scores.gate(0), ids(&assignment, 0));
        let best: f32 = ids(&cold(&TopK { drop: None }, &request), 0).iter().map(|&expert| gate[expert]).sum();
        let kept: f32 = chosen.iter().map(|&expert| gate[expert]).sum();
        assert!(kept >= (1.0 - router.max_mass_loss()) as f32 * best);
        let asked = used(&assignment);
        let done = cache.advance(&asked).unwrap();
        if step >= tokens / 2 {
            hits += done.hits;
            requests += asked.len();
        }
    }
    (hits as f64 / requests as f64, state)
}

#[test]
fn the_controller_finds_its_target_where_the_bound_lets_it() {
    let (plain, _) = decode(&CacheRouter::new(0.0, 0.4).unwrap(), 4000);
    let (most, _) = decode(&CacheRouter::new(2.0, 0.4).unwrap(), 4000);
    assert!(most > plain + 0.1, "{most} {plain}");
    for part in [0.3, 0.7] {
        let target = plain + part * (most - plain);
        let router = CacheRouter::new(0.0, 0.4).unwrap().with_target_hit_rate(target).unwrap();
        let (rate, state) = decode(&router, 4000);
        assert!((rate - target).abs() < 0.02, "{rate} for {target}");
        assert!(state.bonus().is_some_and(|bonus| bonus > 0.0 && bonus < 2.0), "{:?}", state.bonus());
    }
    // Out of reach: the bonus ends at its limit, the bound holds (checked in every step).
    let (rate, state) = decode(&CacheRouter::new(0.1, 0.02).unwrap().with_target_hit_rate(1.0).unwrap(), 4000);
    assert!(rate < 0.9 && state.bonus() == Some(2.0), "{rate} {:?}", state.bonus());
}

#[test]
fn the_state_of_another_layer_is_cold() {
    let router = CacheRouter::default().with_target_hit_rate(0.9).unwrap();
    let route = |experts: usize, router: &CacheRouter, state: &mut RouteState| {
        let values: Vec<f32> = (0..experts * 3).map(|at| (at * 13 % 11) as f32 / 4.0).collect();
        let (scores, capacity) = (scores_of(&values, experts), Capacity::unlimited(experts).unwrap());
        let resident = set(experts, [0, 1]);
        let context = RouteContext { resident: Some(&resident), step: 5, ..RouteContext::default() };
        router.route(&RouteRequest::new(&scores, 2, &capacity, context).unwrap(), state).unwrap()
    };
    let (mut fresh, mut used) = (RouteState::default(), RouteState::default());
    assert_eq!((fresh.score_range, fresh.affinity(), fresh.bonus()), (None, None, None));
    for _ in 0..3 {
        route(8, &router, &mut used);
    }
    let expected = route(12, &router, &mut fresh);
    assert_eq!(route(12, &router, &mut used), expected);
    assert_eq!(used, fresh);
    assert_eq!(used.affinity().map(|affinity| affinity.experts()), Some(12));
    let other = router.clone().with_decay(0.5).unwrap();
    route(12, &other, &mut used);
    assert_eq!(used.affinity().map(|affinity| affinity.decay().value()), Some(0.5));
}

#[test]
fn use_raises_affinity_and_time_lowers_it() {
    let (scores, capacity) = (scores_of(&[3.0, 2.0, 1.0, 0.0], 4), Capacity::unlimited(4).unwrap());
    let mut state = RouteState::default();
    for step in [3, 4, u64::MAX] {
        let context = RouteContext { step, ..RouteContext::default() };
        let request = RouteRequest::new(&scores, 2, &capacity, context).unwrap();
        CacheRouter::default().route(&request, &mut state).unwrap();
        let affinity = state.affinity().unwrap();
        let at = |expert: usize| affinity.at(ExpertId::new(expert, 4).unwrap(), step);
        assert!(at(0) > 0.0 && at(1) == at(0) && at(2) == 0.0);
        assert!(affinity.at(ExpertId::new(0, 4).unwrap(), step.saturating_add(1)) <= at(0));
    }
    assert_eq!(state.affinity().unwrap().activations(ExpertId::new(1, 4).unwrap()), 3);
}

#[test]
fn settings_outside_their_ranges_are_named() {
    let bonus = |bonus| CacheRouter::new(bonus, 0.1).unwrap_err().to_string();
    assert_eq!(bonus(f64::NAN), "cache bonus is NaN: expected a finite number, at least 0");
    assert_eq!(bonus(f64::INFINITY), "cache bonus is inf: expected a finite number, at least 0");
    assert_eq!(bonus(-0.1), "cache bonus is -0.1: expected a finite number, at least 0");
    for loss in [f64::NAN, -0.1, 1.1] {
        let message = CacheRouter::new(0.1, loss).unwrap_err().to_string();
        assert_eq!(message, format!("max mass loss is {loss}: expected 0 to 1"));
        let message = CacheRouter::default().with_target_hit_rate(loss).unwrap_err().to_string();
        assert_eq!(message, format!("target hit rate is {loss}: expected 0 to 1"));
    }
}

#[test]
fn scores_of_any_size_route() {
    let capacity = Capacity::unlimited(4).unwrap();
    let resident = set(4, [2, 3]);
    let context = RouteContext { resident: Some(&resident), ..RouteContext::default() };
    let bias = [f32::MAX, -f32::MAX, 1e-45, 0.0];
    for values in [[f32::MAX, -f32::MAX, 1e-45, -0.0], [f32::NEG_INFINITY; 4], [-200.0; 4], [0.0; 4]] {
        for bias in [None, Some(&bias[..])] {
            for scoring in [Scoring::softmax(), Scoring::sigmoid().normalized(true)] {
                let scores = scoring.scores(&Logits::new(&values, 1, 4).unwrap(), bias).unwrap();
                let request = RouteRequest::new(&scores, 2, &capacity, context).unwrap();
                let mut state = RouteState::default();
                for _ in 0..3 {
                    let assignment = CacheRouter::default().route(&request, &mut state).unwrap();
                    assert_eq!(assignment.kept(), if values[0] == f32::NEG_INFINITY { 0 } else { 2 });
                    assert!(state.score_range.is_none_or(f64::is_finite));
                }
            }
        }
    }
    let none = scores_of(&[], 4);
    let request = RouteRequest::new(&none, 2, &capacity, context).unwrap();
    assert_eq!(cold(&CacheRouter::default(), &request).tokens(), 0);
}

/// Correlated tokens of 24 experts, top 4, 10 of them in memory: hits with logits that a gate made `scale` times as large. Its
/// temperature undoes that before the softmax; `raw`, a fixed bonus on the logits as they came, does not see it.
fn hits_at(scale: f32, raw: Option<f32>) -> (usize, Vec<Vec<usize>>) {
    let (capacity, router) = (Capacity::unlimited(EXPERTS).unwrap(), CacheRouter::new(0.15, 0.3).unwrap());
    let mut cache = Residency::new(EXPERTS, 10, Policy::Lru).unwrap();
    let (mut state, mut row, mut seed) = (RouteState::default(), [0f32; EXPERTS], 3u64);
    let (mut hits, mut chosen) = (0, Vec::new());
    for step in 0..1500 {
        for value in &mut row {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *value = 0.7 * *value + (seed >> 40) as f32 / (1 << 22) as f32 - 2.0;
        }
        let logits = row.map(|value| value * scale);
        let picked = match raw {
            None => {
                let scores = scores_of(&logits.map(|logit| logit / scale), EXPERTS);
                let context = RouteContext { resident: Some(cache.resident()), step, ..RouteContext::default() };
                let request = RouteRequest::new(&scores, 4, &capacity, context).unwrap();
                ids(&router.route(&request, &mut state).unwrap(), 0)
            }
            Some(bonus) => {
                let lift = |id: usize| match cache.resident().contains(ExpertId::new(id, EXPERTS).unwrap()) {
                    true => logits[id] + bonus,
                    false => logits[id],
                };
                let mut all: Vec<usize> = (0..EXPERTS).collect();
                all.sort_by(|&a, &b| lift(b).total_cmp(&lift(a)));
                all[..4].to_vec()
            }
        };
        hits += cache.advance(&set(EXPERTS, picked.iter().copied())).unwrap().hits;
        chosen.push(picked);
    }
    (hits, chosen)
}

#[test]
fn the_bonus_means_the_same_at_any_scale_of_the_logits() {
    let (hits, chosen) = hits_at(1.0, None);
    for scale in [0.1, 0.3, 0.5, 2.0, 3.0, 10.0] {
        assert_eq!(hits_at(scale, None), (hits, chosen.clone()), "{scale}");
    }
    // What the published router's bonus means does depend on it.
    let fixed = |scale| hits_at(scale, Some(0.15)).0;
    assert!(fixed(0.1) > fixed(1.0) + 300 && fixed(1.0) > fixed(10.0), "{} {} {}", fixed(0.1), fixed(1.0), fixed(10.0));
}
