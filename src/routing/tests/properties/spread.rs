//! Chance: nobody is favoured by place, and layers draw for themselves.

use crate::{Capacity, CapacityRule, PhaseRouter, RouteContext, RouteRequest, RouterKind};
use proptest::prelude::*;
use proptest::sample::select;

use super::case::{Bias, Case, Gate, Masks, Padding, Pools, Room, cold};
use super::runner::property;

#[test]
fn quarters_of_a_batch_survive_alike() {
    let strategy = (any::<u64>(), select(vec![4usize, 8]), any::<bool>(), 0.4f64..0.9, any::<bool>());
    property("quarters_of_a_batch_survive_alike", strategy, |(seed, top_k, sigmoid, factor, devices)| {
        let (tokens, experts) = (2048, 32);
        let case = Case {
            tokens,
            experts,
            top_k,
            seed,
            gate: Gate::Skewed,
            masks: Masks::None,
            sigmoid,
            normalize: true,
            scale: 1.0,
            groups: None,
            bias: Bias::None,
            room: Room::Unlimited,
            pools: Pools::Experts,
            padding: Padding::None,
        };
        let batch = case.batch();
        let rule = if devices { CapacityRule::per_device(factor, 4) } else { CapacityRule::per_expert(factor) };
        let capacity = rule.capacity(tokens, experts, top_k).unwrap();
        let request = RouteRequest::new(&batch.scores, top_k, &capacity, RouteContext::default()).unwrap();
        let assignment = cold(&PhaseRouter::default(), &request);
        let held: Vec<f64> = (0..tokens).map(|token| assignment.slots(token).count() as f64).collect();
        let mean = held.iter().sum::<f64>() / tokens as f64;
        let variance = held.iter().map(|held| (held - mean).powi(2)).sum::<f64>() / tokens as f64;
        // The mean of a quarter drawn without replacement, six deviations wide.
        let quarter = (tokens / 4) as f64;
        let noise = 6.0 * (variance * 0.75 / quarter).sqrt() + 1.0 / quarter;
        for (at, part) in held.chunks(tokens / 4).enumerate() {
            let own = part.iter().sum::<f64>() / quarter;
            assert!((own - mean).abs() <= noise, "quarter {at} keeps {own} a token, all {mean}, noise {noise}");
        }
    });
}

#[test]
fn layers_draw_differently() {
    let kinds = vec![RouterKind::Hash, RouterKind::WeightedHash, RouterKind::PhaseKernel, RouterKind::PhaseQuota];
    property("layers_draw_differently", (select(kinds), any::<u64>(), 0usize..1000), |(kind, seed, layer)| {
        let values = vec![0.0; 256 * 32];
        let logits = crate::Logits::new(&values, 256, 32).unwrap();
        let scores = crate::Scoring::softmax().scores(&logits, None).unwrap();
        let capacity = Capacity::unlimited(32).unwrap();
        let at = |layer: usize| {
            let context = RouteContext { layer, ..RouteContext::default() };
            cold(&*kind.build(seed), &RouteRequest::new(&scores, 4, &capacity, context).unwrap())
        };
        let (here, next) = (at(layer), at(layer + 1));
        let same = here.ids().zip(next.ids()).filter(|(a, b)| a == b && *a >= 0).count();
        // Two independent draws agree in one slot of 32.
        assert!(same < 256 * 4 / 8, "{}: {same} of 1024 slots agree", kind.name());
    });
}
