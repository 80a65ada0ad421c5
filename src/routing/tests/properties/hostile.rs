//! Batches that mislead prices: rows that are all alike, a few experts that all want, scores in steps.

use crate::routing::gate_mass_bound;
use crate::{
    Capacity, CapacityRule, Logits, PhaseRouter, RouteContext, RouteMetrics, RouteRequest, RouteState, Router, Scores,
    Scoring,
};

use super::case::{noise, unit};

fn scores(tokens: usize, experts: usize, logit: impl Fn(u64, u64) -> f32) -> Scores {
    let at = |at: usize| logit((at / experts) as u64, (at % experts) as u64);
    let values: Vec<f32> = (0..tokens * experts).map(at).collect();
    Scoring::softmax().scores(&Logits::new(&values, tokens, experts).unwrap(), None).unwrap()
}

/// Kept mass and bound; the prices left must certify as much as the assignment does.
fn certified(scores: &Scores, top_k: usize, capacity: &Capacity) -> (f64, f64) {
    let request = RouteRequest::new(scores, top_k, capacity, RouteContext::default()).unwrap();
    let mut state = RouteState::default();
    let assignment = PhaseRouter::default().route(&request, &mut state).unwrap();
    let metrics = RouteMetrics::new(&request, &assignment);
    assert_eq!(metrics.kept, capacity.feasible_slots(scores.tokens(), top_k));
    let bound = assignment.gate_mass_bound().unwrap();
    assert!(
        gate_mass_bound(&request, state.prices()).unwrap() <= bound * (1.0 + 1e-3) + 1e-9,
        "prices for the next batch"
    );
    (metrics.gate_mass, bound)
}

#[test]
fn identical_rows_keep_the_closed_form() {
    for (tokens, experts, top_k) in [(1024, 64, 8), (100, 16, 3), (37, 5, 5), (64, 24, 1)] {
        let row = |_: u64, expert: u64| 4.0 * unit(1, [0, 0, expert]);
        let scores = scores(tokens, experts, row);
        for factor in [0.3, 0.8, 1.0, 1.25, 3.0] {
            for devices in [0, 4] {
                let rule = match devices {
                    0 => CapacityRule::per_expert(factor).with_minimum_mean(0.0),
                    _ => CapacityRule::per_device(factor, devices).with_minimum_mean(0.0),
                };
                let capacity = rule.capacity(tokens, experts, top_k).unwrap();
                // Fill the experts from the best on: each up to its room and the tokens, all up to the slots.
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| scores.gate(0)[b].total_cmp(&scores.gate(0)[a]));
                let mut room = capacity.limits().unwrap().to_vec();
                let (mut slots, mut best) = ((tokens * top_k) as u32, 0.0);
                for expert in order {
                    let room = &mut room[capacity.pool_of(expert as u16)];
                    let taken = slots.min(*room).min(tokens as u32);
                    (*room, slots) = (*room - taken, slots - taken);
                    best += f64::from(taken) * f64::from(scores.gate(0)[expert]);
                }
                let (mass, bound) = certified(&scores, top_k, &capacity);
                let name =
                    format!("{tokens} tokens, {experts} experts, top {top_k}, factor {factor}, {devices} devices");
                assert!((mass - best).abs() <= 5e-4 * best, "{name}: kept {mass} of {best}");
                assert!(mass >= 0.9995 * bound - 1e-9, "{name}: kept {mass}, bound {bound}");
            }
        }
    }
}

#[test]
fn a_few_experts_that_all_want_are_certified() {
    let same = |token: u64, expert: u64| if expert < 8 { 8.0 } else { 0.0 } + unit(2, [0, token, expert]);
    let steps = |token: u64, expert: u64| (noise(3, [0, token, expert]) % 4) as f32;
    let (same, steps) = (scores(1024, 64, same), scores(1024, 64, steps));
    for (name, scores, factors) in [("same", &same, [0.8, 1.0, 1.25]), ("steps", &steps, [0.9, 1.0, 1.25])] {
        for factor in factors {
            for rule in [CapacityRule::per_expert(factor), CapacityRule::per_device(factor, 8)] {
                let capacity = rule.capacity(1024, 64, 8).unwrap();
                let (mass, bound) = certified(scores, 8, &capacity);
                // Where capacity falls short the order serves tokens first, which costs score that the bound has.
                let least = if factor < 1.0 { 0.997 } else { 0.9995 };
                assert!(mass >= least * bound, "{name}, factor {factor}: kept {mass}, bound {bound}");
            }
        }
    }
}
