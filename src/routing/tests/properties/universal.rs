//! What holds for every router, and for the plan of any assignment.

use crate::{
    Assignment, Capacity, DispatchPlan, Logits, RouteContext, RouteRequest, RouteState, RouterKind, Scores, Scratch,
};
use proptest::prelude::*;
use proptest::sample::select;
use rayon::ThreadPoolBuilder;

use super::case::{Batch, Case, Padding, bits, cases, cold, noise};
use super::check;
use super::invariants::{check_plan, check_prices, gate_mass, usable_slots};
use super::runner::property;

fn routers() -> impl Strategy<Value = RouterKind> {
    select(&RouterKind::ALL[..])
}

#[test]
fn every_router_keeps_the_invariants() {
    property("every_router_keeps_the_invariants", (cases(), routers(), any::<u64>()), |(case, kind, seed)| {
        let batch = case.batch();
        let (request, router) = (batch.request(), kind.build(seed));
        let mut state = RouteState::default();
        let assignment = router.route(&request, &mut state).unwrap();
        check(&request, &assignment, &*router);
        assert_eq!(router.respects_capacity(), !matches!(kind, RouterKind::TopK | RouterKind::Cache));
        assert_eq!(bits(&assignment), bits(&cold(&*kind.build(seed), &request)), "the same input, another output");
        let drops = matches!(kind, RouterKind::PhaseKernel | RouterKind::ExpertChoice);
        if kind == RouterKind::TopK || (batch.capacity.limits().is_none() && !drops) {
            assert_eq!(assignment.kept(), usable_slots(&request));
        }
        if kind == RouterKind::Phase {
            assert!(assignment.gate_mass_bound().is_some());
            check_prices(&request, &state, gate_mass(&request, &assignment));
        }
    });
}

#[test]
fn padding_changes_nothing_for_the_others() {
    property("padding_changes_nothing_for_the_others", (cases(), routers(), any::<u64>()), |(case, kind, seed)| {
        let padding = if case.padding == Padding::None { Padding::Percent(40) } else { case.padding };
        let Batch { values, scores, capacity, top_k, padding, token_ids } = Case { padding, ..case }.batch();
        let padding = padding.unwrap();
        let live: Vec<usize> = (0..case.tokens).filter(|&token| !padding[token]).collect();
        let routed = |scores: &Scores, padding: Option<&[bool]>, token_ids: &[u32]| {
            let context = RouteContext { padding, token_ids: Some(token_ids), ..RouteContext::default() };
            let mut state = RouteState::default();
            let request = RouteRequest::new(scores, top_k, &capacity, context).unwrap();
            (kind.build(seed).route(&request, &mut state).unwrap(), state)
        };
        let (with, with_state) = routed(&scores, Some(&padding), &token_ids);
        let rows: Vec<f32> =
            live.iter().flat_map(|&token| &values[token * case.experts..][..case.experts]).copied().collect();
        let logits = Logits::new(&rows, live.len(), case.experts).unwrap();
        let ids: Vec<u32> = live.iter().map(|&token| token_ids[token]).collect();
        let (without, without_state) =
            routed(&case.scoring().scores(&logits, case.bias().as_deref()).unwrap(), None, &ids);
        let slots = |assignment: &Assignment, token: usize| -> Vec<_> {
            assignment.slots(token).map(|(id, weight)| (id, weight.to_bits())).collect()
        };
        for (row, &token) in live.iter().enumerate() {
            assert_eq!(slots(&with, token), slots(&without, row), "token {token}");
        }
        assert_eq!((with.kept(), with_state), (without.kept(), without_state));
    });
}

#[test]
fn what_is_reused_decides_nothing() {
    let steps = prop::collection::vec((cases(), routers(), any::<u64>()), 2..5);
    property("what_is_reused_decides_nothing", steps, |steps| {
        let (mut dirty, mut scratch) = (Assignment::default(), Scratch::default());
        for (case, kind, seed) in steps {
            let batch = case.at_most(80, 40).batch();
            let request = batch.request();
            let (mut one, mut other) = (RouteState::default(), RouteState::default());
            let fresh = kind.build(seed).route(&request, &mut one).unwrap();
            kind.build(seed).route_into(&request, &mut other, &mut scratch, &mut dirty).unwrap();
            assert_eq!((&dirty, bits(&dirty)), (&fresh, bits(&fresh)));
            assert_eq!(one, other);
        }
    });
}

#[test]
fn one_and_many_threads_agree() {
    // Past 512 rows and 2^15 values the work is cut into pieces.
    let pools = [1, 2, 5].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    let shapes = (500usize..2500, 16usize..65, 1usize..9);
    property("one_and_many_threads_agree", (cases(), shapes, routers()), |(case, (tokens, experts, top_k), kind)| {
        let case = Case { tokens, experts, top_k, ..case };
        let results = pools.each_ref().map(|pool| {
            pool.install(|| {
                let batch = case.batch();
                let mut state = RouteState::default();
                let assignment = kind.build(case.seed).route(&batch.request(), &mut state).unwrap();
                let scores: Vec<u32> =
                    (0..tokens).flat_map(|token| batch.scores.gate(token)).map(|s| s.to_bits()).collect();
                (bits(&assignment), assignment.gate_mass_bound().map(f64::to_bits), state, scores)
            })
        });
        assert!(results.iter().all(|result| *result == results[0]));
    });
}

/// Any assignment a caller could hand in: distinct ids, some slots empty.
fn parts() -> impl Strategy<Value = (usize, usize, Vec<i32>, Vec<f32>)> {
    (1usize..40, 1usize..9, 0usize..40, any::<u64>(), 0u64..101).prop_map(|(experts, top_k, tokens, seed, empty)| {
        let top_k = top_k.min(experts);
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for token in 0..tokens as u64 {
            let draw = |what: u64, at: usize| noise(seed, [what, token, at as u64]);
            let mut row: Vec<i32> = (0..experts as i32).collect();
            row.sort_by_key(|&expert| draw(1, expert as usize));
            for (slot, &id) in row[..top_k].iter().enumerate() {
                let kept = draw(2, slot) % 100 >= empty;
                ids.push(if kept { id } else { -1 });
                weights.push(if kept { f32::from_bits((draw(3, slot) as u32) & 0xbfff_ffff) } else { 0.0 });
            }
        }
        (experts, top_k, ids, weights)
    })
}

#[test]
fn plans_are_permutations_of_any_assignment() {
    property("plans_are_permutations_of_any_assignment", parts(), |(experts, top_k, ids, weights)| {
        let assignment = Assignment::from_parts(experts, top_k, &ids, &weights).unwrap();
        assert_eq!(assignment.ids().collect::<Vec<_>>(), ids);
        assert_eq!(assignment.weights(), weights);
        assert_eq!((assignment.tokens(), assignment.gate_mass_bound()), (ids.len() / top_k, None));
        check_plan(&assignment);
        let plan = DispatchPlan::from(&assignment);
        let mut restored = vec![-1; ids.len()];
        for (expert, range) in plan.busy_experts() {
            plan.slots()[range].iter().for_each(|&slot| restored[slot as usize] = expert as i32);
        }
        assert_eq!(restored, ids);
    });
}

#[test]
fn parts_that_are_wrong_are_errors() {
    property("parts_that_are_wrong_are_errors", (parts(), 0usize..8, any::<usize>()), |(parts, harm, at)| {
        let (experts, top_k, mut ids, mut weights) = parts;
        if ids.is_empty() {
            return;
        }
        let at = at % ids.len();
        match harm {
            0 => ids[at] = experts as i32,
            1 => ids[at] = -2,
            2 => weights[at] = f32::NAN,
            3 => weights[at] = f32::INFINITY,
            4 => (ids[at], weights[at]) = (-1, 1.0),
            5 => weights.push(0.0),
            6 if top_k > 1 => {
                let row = at / top_k * top_k;
                (ids[row], ids[row + 1]) = (0, 0);
            }
            _ if top_k > 1 => {
                ids.pop();
                weights.pop();
            }
            _ => ids[at] = i32::MIN,
        }
        assert!(Assignment::from_parts(experts, top_k, &ids, &weights).is_err());
    });
}

/// The published drop rules, written as a sort and a walk.
fn naive_drops(request: &RouteRequest<'_>, kind: RouterKind) -> Vec<i32> {
    let (scores, top_k, capacity) = (request.scores(), request.top_k(), request.capacity());
    let mut slots: Vec<(usize, usize, usize)> = Vec::new();
    for token in (0..scores.tokens()).filter(|&token| !request.is_padding(token)) {
        let row = scores.selection(token);
        let mut experts: Vec<usize> = (0..row.len()).filter(|&expert| scores.is_allowed(token, expert)).collect();
        experts.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap());
        slots.extend(experts.into_iter().take(top_k).enumerate().map(|(rank, expert)| (token, rank, expert)));
    }
    let gate = |&(token, _, expert): &(usize, usize, usize)| scores.gate(token)[expert];
    match kind {
        RouterKind::TopKRank => slots.sort_by_key(|&(_, rank, _)| rank),
        RouterKind::TopKScore => slots.sort_by(|a, b| gate(b).total_cmp(&gate(a))),
        _ => {}
    }
    let limits = if kind == RouterKind::TopK { None } else { capacity.limits() };
    let mut room = limits.map_or_else(|| vec![u32::MAX; scores.experts()], <[u32]>::to_vec);
    let mut ids = vec![-1; scores.tokens() * top_k];
    for (token, rank, expert) in slots {
        let room = if limits.is_some() { &mut room[capacity.pool_of(expert as u16)] } else { &mut room[expert] };
        if *room > 0 {
            *room -= 1;
            ids[token * top_k + rank] = expert as i32;
        }
    }
    ids
}

#[test]
fn drop_rules_drop_whom_they_say() {
    let kinds = [RouterKind::TopK, RouterKind::TopKArrival, RouterKind::TopKRank, RouterKind::TopKScore];
    property("drop_rules_drop_whom_they_say", (cases(), select(kinds.to_vec())), |(case, kind)| {
        let batch = case.batch();
        let request = batch.request();
        let ids: Vec<i32> = cold(&*kind.build(0), &request).ids().collect();
        assert_eq!(ids, naive_drops(&request, kind), "{}", kind.name());
    });
}

/// Weights of dropped slots are not given to their neighbours: the kept ones are those of the batch without limits.
#[test]
fn a_drop_leaves_the_other_weights_as_they_are() {
    let strategy = (cases(), select(vec![RouterKind::TopKArrival, RouterKind::TopKRank, RouterKind::TopKScore]));
    property("a_drop_leaves_the_other_weights_as_they_are", strategy, |(case, kind)| {
        let batch = case.batch();
        let limited = cold(&*kind.build(0), &batch.request());
        let unlimited = Batch { capacity: Capacity::unlimited(case.experts).unwrap(), ..batch };
        let whole = cold(&*kind.build(0), &unlimited.request());
        for ((id, weight), whole) in limited.ids().zip(limited.weights()).zip(whole.weights()) {
            assert!(id < 0 || weight.to_bits() == whole.to_bits(), "{weight} {whole}");
        }
    });
}
