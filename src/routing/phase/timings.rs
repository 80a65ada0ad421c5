//! Time and certificate of ordinary and of hostile batches, printed: `cargo test --release -- --ignored --nocapture phase`.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::tests::{scores_of, skewed};
use super::*;
use crate::routing::capacity::{CapacityRule, Profile, Shares};
use crate::routing::metrics::RouteMetrics;
use crate::routing::router::RouteContext;
use crate::routing::scores::Scoring;

type Logit = Box<dyn FnMut(usize, usize, &mut ChaCha8Rng) -> f32>;

#[test]
#[ignore = "a timing, printed"]
fn hard() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut run = |name: &str, tokens: usize, experts: usize, k: usize, factor: f64, mut logit: Logit| {
        let values: Vec<f32> = (0..tokens * experts).map(|at| logit(at / experts, at % experts, &mut rng)).collect();
        let scores = scores_of(&values, experts, Scoring::softmax(), None);
        let capacity = CapacityRule {
            shares: Shares::PerExpert { profile: Profile::Strong, seed: 1 },
            ..CapacityRule::per_expert(factor)
        }
        .capacity(tokens, experts, k)
        .unwrap();
        let request = RouteRequest::new(&scores, k, &capacity, RouteContext::default()).unwrap();
        let began = std::time::Instant::now();
        let a = PhaseRouter::default().route(&request, &mut RouteState::default()).unwrap();
        let t = began.elapsed();
        let m = RouteMetrics::new(&request, &a);
        eprintln!(
            "hard {name} {tokens} {experts} {k} {factor}: {t:?} {:?}/token survival {:.4} kept/bound {:.6}",
            t / tokens as u32,
            m.survival(),
            m.gate_mass / a.gate_mass_bound().unwrap()
        );
    };
    for factor in [0.5, 1.0, 1.5] {
        run("identical", 4096, 64, 8, factor, Box::new(|_, e, _| (e as f32).sin()));
        run("equal", 4096, 64, 8, factor, Box::new(|_, _, _| 0.0));
        run("huge", 4096, 64, 8, factor, Box::new(|_, _, r| r.random_range(-1.0..1.0f32) * f32::MAX));
        run(
            "masked half",
            4096,
            64,
            8,
            factor,
            Box::new(|_, _, r| if r.random::<bool>() { f32::NEG_INFINITY } else { r.random_range(-2.0..2.0) }),
        );
        run(
            "mostly masked",
            4096,
            64,
            8,
            factor,
            Box::new(
                |_, e, r| if r.random_range(0..64) > 4 + e / 8 { f32::NEG_INFINITY } else { r.random_range(-2.0..2.0) },
            ),
        );
        run("same k", 4096, 64, 8, factor, Box::new(|_, e, r| if e < 8 { 8.0 } else { 0.0 } + r.random::<f32>()));
        run("integers", 4096, 64, 8, factor, Box::new(|_, _, r| r.random_range(0..4) as f32));
        run(
            "sharp",
            4096,
            64,
            8,
            factor,
            Box::new(|_, e, r| r.random_range(-8.0..8.0) + if e < 8 { 4.0 } else { 0.0 }),
        );
        run("many experts", 4096, 1500, 8, factor, Box::new(|_, e, r| r.random_range(-2.0..2.0) + (e as f32).sin()));
        run("k = E", 1024, 64, 64, factor, Box::new(|_, _, r| r.random_range(-2.0..2.0)));
        run("wide k", 1024, 64, 32, factor, Box::new(|_, e, r| r.random_range(-2.0..2.0) + (e as f32).sin()));
    }
}

#[test]
#[ignore = "a timing, printed"]
fn timing() {
    let n = 4096;
    let (scores, drifted) = (skewed(n, 64, 1, 0), skewed(n, 64, 1, 1));
    for factor in [0.5, 1.0, 1.25] {
        for rule in
            [CapacityRule::per_expert(factor), CapacityRule::per_device(factor, 4), CapacityRule::per_device(factor, 8)]
        {
            let capacity = rule.capacity(n, 64, 8).unwrap();
            let mut state = RouteState::default();
            for start in ["cold", "warm"] {
                let request = RouteRequest::new(
                    if start == "cold" { &scores } else { &drifted },
                    8,
                    &capacity,
                    RouteContext::default(),
                )
                .unwrap();
                let mut least = u128::MAX;
                let mut last = None;
                let from = state.clone();
                for _ in 0..15 {
                    state = from.clone();
                    let began = std::time::Instant::now();
                    last = Some(PhaseRouter::default().route(&request, &mut state).unwrap());
                    least = least.min(began.elapsed().as_nanos());
                }
                let assignment = last.unwrap();
                let metrics = RouteMetrics::new(&request, &assignment);
                eprintln!(
                    "{start} {factor} {:?}: {} ns/token, survival {}, kept/bound {:.6}, gate mass share {:.4}",
                    capacity.limits().unwrap().len(),
                    least / n as u128,
                    metrics.survival(),
                    metrics.gate_mass / assignment.gate_mass_bound().unwrap(),
                    metrics.gate_mass_share()
                );
            }
        }
    }
}
