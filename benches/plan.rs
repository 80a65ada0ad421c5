//! Building the dispatch plan: the counting sort of this crate, against a stable comparison sort of the slots by expert. And the check
//! that stands before it, of top-k's answer.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use phase_moe::{
    Assignment, Capacity, DispatchPlan, Logits, RouteContext, RouteRequest, RouteState, Router, Scoring, TopK,
    check_assignment,
};
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens, experts, top_k.
const SIZES: [(usize, usize, usize); 4] = [(1, 64, 8), (64, 64, 8), (512, 128, 8), (8192, 256, 8)];

fn plan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan/cpu");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for (tokens, experts, top_k) in SIZES {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let draw = |_| index::sample(&mut rng, experts, top_k).into_iter().map(|expert| expert as i32);
        let ids: Vec<i32> = (0..tokens).flat_map(draw).collect();
        let weights = vec![1.0 / top_k as f32; ids.len()];
        let assignment = Assignment::from_parts(experts, top_k, &ids, &weights).expect("distinct experts");
        let name = format!("tokens={tokens},experts={experts},top_k={top_k}");
        group.throughput(Throughput::Elements(ids.len() as u64));
        group.bench_function(BenchmarkId::new("counting-sort", &name), |bencher| {
            bencher.iter(|| DispatchPlan::from(black_box(&assignment)));
        });
        // The peer gives the order of the slots alone, without offsets, tokens and weights.
        group.bench_function(BenchmarkId::new("stable-sort", &name), |bencher| {
            bencher.iter(|| {
                let ids = black_box(&ids);
                let mut slots: Vec<u32> = (0..ids.len() as u32).collect();
                slots.sort_by_key(|&slot| ids[slot as usize]);
                slots
            });
        });
    }
    group.finish();
}

fn check(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("check/cpu");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for (tokens, experts, top_k) in SIZES {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let values: Vec<f32> = (0..tokens * experts).map(|_| rng.random_range(-4.0f32..4.0)).collect();
        let logits = Logits::new(&values, tokens, experts).expect("finite logits");
        let scores = Scoring::softmax().normalized(true).scores(&logits, None).expect("a plain scoring");
        let capacity = Capacity::unlimited(experts).expect("experts in range");
        let request =
            RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).expect("parts that belong together");
        let router = TopK::default();
        let assignment = router.route(&request, &mut RouteState::default()).expect("a valid request");
        let name = format!("tokens={tokens},experts={experts},top_k={top_k}");
        group.throughput(Throughput::Elements((tokens * top_k) as u64));
        group.bench_function(BenchmarkId::new("answer", &name), |bencher| {
            bencher.iter(|| check_assignment(&router, black_box(&request), black_box(&assignment)));
        });
    }
    group.finish();
}

criterion_group!(benches, plan, check);
criterion_main!(benches);
