//! What comes in: scores from logits, limits from rules, and parts that do not fit together.

use crate::routing::{GroupScore, Profile, Rounding, ScoreFunction, Shares};
use crate::{Capacity, CapacityRule, Logits, Placement, RouteContext, RouteRequest, Scoring};
use proptest::prelude::*;
use proptest::sample::select;

use super::case::{Case, cases, noise};
use super::runner::property;

/// Selection scores of a row before groups: gate plus bias, −∞ where masked.
fn biased(case: &Case, logits: &[f32], gate: &[f32]) -> Vec<f32> {
    let bias = case.bias().unwrap_or_else(|| vec![0.0; logits.len()]);
    let score = |at: usize| if logits[at] == f32::NEG_INFINITY { f32::NEG_INFINITY } else { gate[at] + bias[at] };
    (0..logits.len()).map(score).collect()
}

/// Two picks, and a softmax among those near each.
fn check_mixed(logits: &[f32], jitter: f32, gate: &[f32]) {
    let mut left: Vec<usize> = (0..logits.len()).filter(|&expert| logits[expert] > f32::NEG_INFINITY).collect();
    // The first of equals first, −0 and 0 among them.
    left.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap());
    let share = |of: usize, left: &[usize]| {
        let most = logits[left[0]];
        let is_near = |expert: usize| {
            let distance = (most - logits[expert]) / logits[expert].abs().max(most);
            distance.is_nan() || distance <= 2.0 * jitter
        };
        let weight = |expert: usize| f64::from(logits[expert] - most).exp();
        let sum: f64 = left.iter().filter(|&&expert| is_near(expert)).map(|&expert| weight(expert)).sum();
        if is_near(of) { weight(of) / sum } else { 0.0 }
    };
    for (expert, &score) in gate.iter().enumerate() {
        let exact = match left.iter().position(|&at| at == expert) {
            None => 0.0,
            Some(0) => share(expert, &left),
            Some(_) => share(expert, &left[1..]),
        };
        let rounding = f64::from(f32::EPSILON) * (2 + logits.len()) as f64;
        assert!((f64::from(score) - exact).abs() <= rounding, "expert {expert}: {score}, not {exact}: {logits:?}");
    }
}

#[test]
fn scores_match_their_formulas() {
    property("scores_match_their_formulas", cases(), |case| {
        let batch = case.batch();
        for (token, logits) in batch.values.chunks_exact(case.experts).enumerate() {
            let (mut gate, selection) = (batch.scores.gate(token), batch.scores.selection(token));
            let plain = Scoring { groups: None, ..Scoring::softmax() };
            let plain = plain.scores(&Logits::new(logits, 1, case.experts).unwrap(), None).unwrap();
            if let ScoreFunction::SparseMixer { jitter } = case.scoring().function {
                check_mixed(logits, jitter, gate);
                // What it selects by.
                gate = plain.gate(0);
            }
            let wide: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
            let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = wide.iter().map(|logit| (logit - max).exp()).sum();
            let rounding = f64::from(f32::EPSILON) * (2 + case.experts) as f64;
            for (expert, &score) in gate.iter().enumerate() {
                let exact = match case.sigmoid {
                    true => 1.0 / (1.0 + (-wide[expert]).exp()),
                    false if max == f64::NEG_INFINITY => 0.0,
                    false => (wide[expert] - max).exp() / sum,
                };
                assert!(
                    (f64::from(score) - exact).abs() <= rounding,
                    "token {token}, expert {expert}: {score} {exact}"
                );
                assert!((0.0..=1.0).contains(&score));
                assert!(score == 0.0 || logits[expert] > f32::NEG_INFINITY, "a mask scores {score}");
            }
            let before = biased(&case, logits, gate);
            let Some(limit) = case.scoring().groups else {
                assert_eq!(selection, before);
                continue;
            };
            // No group that is left out is worth more than one that is in.
            let width = case.experts / limit.groups;
            let worth = |group: usize| {
                let mut scores = before[group * width..(group + 1) * width].to_vec();
                scores.sort_by(|a, b| b.total_cmp(a));
                let second = scores.get(1).copied().filter(|&score| score > f32::NEG_INFINITY).unwrap_or(0.0);
                if limit.score == GroupScore::TopTwo { scores[0] + second } else { scores[0] }
            };
            let all_out = |group: usize| selection[group * width..][..width].iter().all(|&s| s == f32::NEG_INFINITY);
            let (out, within): (Vec<usize>, Vec<usize>) = (0..limit.groups).partition(|&group| all_out(group));
            assert!(within.len() <= limit.top_groups);
            for &group in &within {
                assert_eq!(selection[group * width..][..width], before[group * width..][..width]);
                assert!(out.iter().all(|&other| worth(other) <= worth(group)), "group {group} before others");
            }
            let worthy = (0..limit.groups).filter(|&group| worth(group) > f32::NEG_INFINITY).count();
            assert_eq!(within.len(), limit.top_groups.min(worthy));
        }
    });
}

#[test]
fn rules_share_what_they_say() {
    let shape = (0usize..5000, 1usize..131, 1usize..17, any::<u64>());
    let factor = prop_oneof![0.01f64..4.0, select(vec![1.0, 1.25, 0.5, 1e-9, 1e6])];
    let kind = (select(&Profile::ALL[..]), select(vec![Rounding::Exact, Rounding::Ceil]), 0usize..20, 0.0f64..8.0);
    property("rules_share_what_they_say", (shape, factor, kind), |(shape, factor, kind)| {
        let ((tokens, experts, top_k, seed), (profile, rounding, devices, minimum_mean)) = (shape, kind);
        let (top_k, devices) = (top_k.min(experts), devices.min(experts));
        let speed = |device: u64| 0.01 + (noise(seed, [40, device, 0]) % 1000) as f64;
        let (weights, shares) = if devices == 0 {
            (profile.weights(experts, seed), Shares::PerExpert { profile, seed })
        } else {
            let speeds: Vec<f64> = (0..devices as u64).map(speed).collect();
            (speeds.clone(), Shares::PerDevice { speeds })
        };
        let rule = CapacityRule::new(factor, shares).with_rounding(rounding).with_minimum_mean(minimum_mean);
        let capacity = rule.capacity(tokens, experts, top_k).unwrap();
        let demand = (tokens * top_k) as f64;
        assert_eq!(capacity.experts(), experts);
        assert_eq!(capacity.limits().is_none(), demand / (weights.len() as f64) < minimum_mean);
        let Some(limits) = capacity.limits() else { return };
        assert_eq!((limits.len(), capacity.pool_sizes().iter().sum::<usize>()), (weights.len(), experts));
        let sum: f64 = weights.iter().sum();
        // A limit above `u32` is no limit.
        let most = f64::from(u32::MAX);
        let share = |at: usize| (weights[at] / sum * demand * factor).min(most);
        if rounding == Rounding::Exact {
            let total = capacity.total().unwrap() as f64;
            let asked = demand * factor;
            assert!(total <= asked + 1e-5, "{total} of {asked}");
            assert!(total > asked - 1.0 || asked > most, "{total} of {asked}");
            for (at, &limit) in limits.iter().enumerate() {
                assert!((f64::from(limit) - share(at)).abs() < 2.0, "pool {at}: {limit} of {}", share(at));
            }
        } else {
            for (at, &limit) in limits.iter().enumerate() {
                assert!(limit >= 1 && f64::from(limit) >= share(at) - 1e-5, "pool {at}: {limit} of {}", share(at));
                assert!(f64::from(limit) <= (share(at) + 1.0).max(1.0), "pool {at}: {limit} of {}", share(at));
            }
        }
    });
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    property("shapes_that_do_not_fit_are_errors", (cases(), 0usize..12), |(case, harm)| {
        let batch = case.batch();
        let (experts, tokens) = (case.experts, case.tokens);
        let refused = |top_k: usize, capacity: &Capacity, context: RouteContext<'_>| {
            assert!(RouteRequest::new(&batch.scores, top_k, capacity, context).is_err());
        };
        let (context, ids, padding) = (RouteContext::default(), vec![0; tokens + 1], vec![false; tokens + 1]);
        let mut values = batch.values.clone();
        match harm {
            0 => refused(0, &batch.capacity, context),
            1 => refused(experts + 1, &batch.capacity, context),
            2 => refused(1, &Capacity::unlimited(experts + 1).unwrap(), context),
            3 => refused(1, &batch.capacity, RouteContext { token_ids: Some(&ids), ..context }),
            4 => refused(1, &batch.capacity, RouteContext { padding: Some(&padding), ..context }),
            5 => assert!(Logits::new(&values, tokens + 1, experts).is_err()),
            6 | 7 if !values.is_empty() => {
                let at = case.seed as usize % values.len();
                values[at] = if harm == 6 { f32::NAN } else { f32::INFINITY };
                assert!(Logits::new(&values, tokens, experts).is_err());
            }
            8 => assert!(Placement::new(vec![3; experts], 3).is_err()),
            9 => assert!(Placement::contiguous(experts, experts + 1).is_err()),
            10 => {
                let placement = Placement::contiguous(experts, 1).unwrap();
                assert!(Capacity::per_device(placement, vec![1, 1]).is_err());
            }
            _ => {
                let logits = Logits::new(&values, tokens, experts).unwrap();
                assert!(Scoring::softmax().scores(&logits, Some(&vec![0.0; experts + 1])).is_err());
                assert!(Scoring::sigmoid().scores(&logits, Some(&vec![f32::NAN; experts])).is_err());
            }
        }
    });
}
