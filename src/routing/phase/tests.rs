use super::*;
use crate::routing::capacity::{Capacity, CapacityRule};
use crate::routing::logits::Logits;
use crate::routing::metrics::RouteMetrics;
use crate::routing::router::RouteContext;
use crate::routing::scores::{Scores, Scoring};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn skewed(tokens: usize, experts: usize, bias: f32, seed: u64) -> Scores {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = move || -> f32 { (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0 };
    let popularity: Vec<f32> = (0..experts).map(|_| bias * normal()).collect();
    let values: Vec<f32> = (0..tokens * experts).map(|at| normal() + popularity[at % experts]).collect();
    Scoring::softmax().normalized(true).scores(&Logits::new(&values, tokens, experts).unwrap(), None).unwrap()
}

#[test]
fn go() {
    let n = 4096;
    let scores = skewed(n, 64, 1.0, 1);
    let scores2 = skewed(n, 64, 1.0, 1);
    for rule in [CapacityRule::per_expert(0.5), CapacityRule::per_expert(1.0), CapacityRule::per_expert(1.25), CapacityRule::per_device(1.0, 4), CapacityRule::per_device(1.0, 8)] {
        let capacity = rule.capacity(n, 64, 8).unwrap();
        eprintln!("{rule:?}");
        let mut state = RouteState::default();
        for warm in 0..2 {
            let request = RouteRequest::new(if warm == 0 {&scores} else {&scores2}, 8, &capacity, RouteContext::default()).unwrap();
            let t0 = std::time::Instant::now();
            let a = PhaseRouter::default().route(&request, &mut state).unwrap();
            let t = t0.elapsed() / n as u32;
            let m = RouteMetrics::new(&request, &a);
            eprintln!("{t:?}/token survival {} kept/bound {:.6} share {:.4} without {}", m.survival(), m.gate_mass / a.gate_mass_bound().unwrap(), m.gate_mass_share(), m.tokens_without_expert);
        }
    }
}
