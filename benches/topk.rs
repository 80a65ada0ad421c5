//! Selecting the top-k of every row: the router `top-k`, against a full sort and a partial sort of every row; and one token in
//! decode, straight from its logits.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use phase_moe::{
    Assignment, Capacity, Logits, RouteContext, RouteRequest, RouteState, Router, Scores, Scoring, Scratch,
    TokenRequest, TopK,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens, experts, top_k: OLMoE decoding and in batches, Qwen3-30B-A3B, DeepSeek-V3.
const SIZES: [(usize, usize, usize); 4] = [(1, 64, 8), (512, 64, 8), (512, 128, 8), (512, 256, 8)];

fn scores(tokens: usize, experts: usize) -> Scores {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let values: Vec<f32> = (0..tokens * experts).map(|_| rng.random_range(-4.0..4.0)).collect();
    let logits = Logits::new(&values, tokens, experts).expect("finite logits");
    Scoring::softmax().scores(&logits, None).expect("a plain softmax")
}

fn top_k(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("topk/cpu");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for (tokens, experts, top_k) in SIZES {
        let (scores, name) = (scores(tokens, experts), format!("tokens={tokens},experts={experts},top_k={top_k}"));
        let capacity = Capacity::unlimited(experts).expect("experts that can be named");
        let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).expect("parts that fit");
        let start: Vec<u16> = (0..experts as u16).collect();
        let mut order = start.clone();
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::new("router", &name), |bencher| {
            bencher.iter(|| TopK::default().route(black_box(&request), &mut RouteState::default()));
        });
        // The peers give the ids alone, without combine weights. Each row starts from the same order: one left over from the
        // row before would be sorted already where there is a single row.
        group.bench_function(BenchmarkId::new("full-sort", &name), |bencher| {
            bencher.iter(|| {
                (0..tokens).for_each(|token| {
                    let row = black_box(&scores).gate(token);
                    order.copy_from_slice(&start);
                    order.sort_by(|&a, &b| row[usize::from(b)].total_cmp(&row[usize::from(a)]));
                    black_box(&order[..top_k]);
                });
            });
        });
        group.bench_function(BenchmarkId::new("partial-sort", &name), |bencher| {
            bencher.iter(|| {
                (0..tokens).for_each(|token| {
                    let row = black_box(&scores).gate(token);
                    let descending = |&a: &u16, &b: &u16| row[usize::from(b)].total_cmp(&row[usize::from(a)]);
                    order.copy_from_slice(&start);
                    let (best, last, _) = order.select_nth_unstable_by(top_k - 1, descending);
                    best.sort_unstable_by(descending);
                    black_box((best, last));
                });
            });
        });
    }
    group.finish();
}

/// Experts and top_k of a token in decode.
const TOKENS: [(usize, usize); 3] = [(8, 2), (64, 8), (128, 8)];

/// Tokens that take turns, so that branches cannot be learnt by heart.
const TURNS: usize = 64;

fn token(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("token/cpu");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for (experts, top_k) in TOKENS {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits: Vec<f32> = (0..TURNS * experts).map(|_| rng.random_range(-4.0..4.0)).collect();
        let (mut state, mut scratch, mut assignment) =
            (RouteState::default(), Scratch::default(), Assignment::default());
        let mut turn = 0;
        group.bench_function(BenchmarkId::new("at-once", format!("experts={experts},top_k={top_k}")), |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % TURNS;
                let logits = black_box(&logits[turn * experts..(turn + 1) * experts]);
                let request = TokenRequest::new(logits, Scoring::softmax(), top_k, RouteContext::default())
                    .expect("parts that fit");
                let short = TopK::default().route_token(&request, &mut state, &mut scratch, &mut assignment);
                black_box((short.expect("a valid request"), &assignment));
            });
        });
    }
    group.finish();
}

criterion_group!(benches, top_k, token);
criterion_main!(benches);
