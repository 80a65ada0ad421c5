//! The memory-aware router: one token in decode with half of the experts resident, and batches, against plain top-k on the same
//! scores. Buffers are reused, so nothing is allocated.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use phase_moe::{
    Assignment, CacheRouter, Capacity, ExpertId, ExpertSet, Logits, RouteContext, RouteRequest, RouteState, Router,
    Scores, Scoring, Scratch, TopK,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens, experts, top_k.
const SIZES: [(usize, usize, usize); 4] = [(1, 64, 8), (1, 128, 8), (1, 256, 8), (512, 128, 8)];

/// Batches that take turns, so that branches cannot be learnt by heart.
const BATCHES: usize = 64;

fn batches(tokens: usize, experts: usize) -> Vec<Scores> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut batch = || {
        let values: Vec<f32> = (0..tokens * experts).map(|_| rng.random_range(-4.0..4.0)).collect();
        let logits = Logits::new(&values, tokens, experts).expect("finite logits");
        Scoring::softmax().scores(&logits, None).expect("a plain softmax")
    };
    (0..BATCHES).map(|_| batch()).collect()
}

fn cache(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cache/cpu");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for (tokens, experts, top_k) in SIZES {
        let (batches, name) = (batches(tokens, experts), format!("tokens={tokens},experts={experts},top_k={top_k}"));
        let capacity = Capacity::unlimited(experts).expect("experts that can be named");
        let mut resident = ExpertSet::new(experts).expect("experts that can be named");
        for expert in (0..experts).step_by(2) {
            resident.insert(ExpertId::new(expert, experts).expect("an expert of the layer"));
        }
        group.throughput(Throughput::Elements(tokens as u64));
        let routers: [(&str, Box<dyn Router>); 3] = [
            ("cache", Box::new(CacheRouter::default())),
            ("bonus-0", Box::new(CacheRouter::new(0.0, 0.1).expect("a bonus of 0"))),
            ("top-k", Box::new(TopK::default())),
        ];
        for (label, router) in routers {
            let (mut state, mut scratch, mut assignment) =
                (RouteState::default(), Scratch::default(), Assignment::default());
            let mut step = 0;
            group.bench_function(BenchmarkId::new(label, &name), |bencher| {
                bencher.iter(|| {
                    step += 1;
                    let context = RouteContext { step, resident: Some(&resident), ..RouteContext::default() };
                    let scores = &batches[step as usize % BATCHES];
                    let request = RouteRequest::new(scores, top_k, &capacity, context).expect("parts that fit");
                    router.route_into(&request, &mut state, &mut scratch, &mut assignment).expect("a valid request");
                    black_box(&assignment);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, cache);
criterion_main!(benches);
