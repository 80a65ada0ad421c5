//! The phase router on skewed and on hostile batches, cold and warm, beside the published baselines, the quota ring, the published
//! kernel and plain top-k on the same scores.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use phase_moe::{
    Capacity, CapacityRule, Logits, RouteContext, RouteMetrics, RouteRequest, RouteState, RouterKind, Scores, Scoring,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Who routes the same scores, beside the phase router.
const PEERS: [RouterKind; 8] = [
    RouterKind::Auction,
    RouterKind::Sinkhorn,
    RouterKind::ExpertChoice,
    RouterKind::ExpandedDrop,
    RouterKind::TopKScore,
    RouterKind::PhaseQuota,
    RouterKind::PhaseKernel,
    RouterKind::TopK,
];

fn scores(tokens: usize, experts: usize, mut logit: impl FnMut(usize) -> f32) -> Scores {
    let values: Vec<f32> = (0..tokens * experts).map(|at| logit(at % experts)).collect();
    let logits = Logits::new(&values, tokens, experts).expect("finite logits");
    Scoring::softmax().scores(&logits, None).expect("a plain softmax")
}

/// Popular experts: each has an offset of its own, so that the busiest gets 4 to 7 times the mean.
fn skewed(tokens: usize, experts: usize, seed: u64) -> Scores {
    let mut offsets = ChaCha8Rng::seed_from_u64(7);
    let popularity: Vec<f32> = (0..experts).map(|_| offsets.random_range(-1.7..1.7)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    scores(tokens, experts, |expert| popularity[expert] + rng.random_range(-2.0..2.0))
}

fn request<'a>(scores: &'a Scores, top_k: usize, capacity: &'a Capacity) -> RouteRequest<'a> {
    RouteRequest::new(scores, top_k, capacity, RouteContext::default()).expect("parts that fit")
}

/// Times `kind`, cold (state forgotten) or warm (prices of another batch), and prints what it kept.
fn bench(
    criterion: &mut Criterion,
    kind: RouterKind,
    name: &str,
    request: &RouteRequest<'_>,
    warm: Option<&RouteRequest<'_>>,
) {
    let router = kind.build(42);
    let mut state = RouteState::default();
    if let Some(before) = warm {
        router.route(before, &mut state).expect("a valid request");
    }
    let start = if warm.is_some() { "warm" } else { "cold" };
    let assignment = router.route(request, &mut state.clone()).expect("a valid request");
    let metrics = RouteMetrics::new(request, &assignment);
    let certified = assignment.gate_mass_bound().map(|bound| metrics.gate_mass / bound);
    println!("{name}/{}/{start}: survival {:.4}, kept / bound {certified:.5?}", router.name(), metrics.survival());
    let mut group = criterion.benchmark_group(format!("phase/cpu/{name}"));
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(200));
    group.throughput(Throughput::Elements(metrics.demand / request.top_k() as u64));
    group.bench_function(BenchmarkId::new(router.name(), start), |bencher| {
        bencher.iter(|| router.route(black_box(request), &mut state.clone()));
    });
    group.finish();
}

fn ordinary(criterion: &mut Criterion) {
    let (tokens, experts, top_k) = (4096, 64, 8);
    let (now, before) = (skewed(tokens, experts, 1), skewed(tokens, experts, 2));
    for (pools, rule) in [
        ("per-expert", CapacityRule::per_expert(1.0)),
        ("per-expert-1.25", CapacityRule::per_expert(1.25)),
        ("8-devices", CapacityRule::per_device(1.0, 8)),
        ("4-devices", CapacityRule::per_device(1.0, 4)),
    ] {
        let capacity = rule.capacity(tokens, experts, top_k).expect("a sound rule");
        let (now, before) = (request(&now, top_k, &capacity), request(&before, top_k, &capacity));
        let name = format!("tokens={tokens},experts={experts},top_k={top_k},{pools}");
        bench(criterion, RouterKind::Phase, &name, &now, None);
        bench(criterion, RouterKind::Phase, &name, &now, Some(&before));
        for kind in PEERS {
            bench(criterion, kind, &name, &now, None);
        }
    }
}

fn growth(criterion: &mut Criterion) {
    let (experts, top_k) = (64, 8);
    for tokens in [64, 512, 4096, 32_768] {
        let scores = skewed(tokens, experts, 1);
        let capacity = CapacityRule::per_expert(1.0).capacity(tokens, experts, top_k).expect("a sound rule");
        let name = format!("growth,tokens={tokens},experts={experts},top_k={top_k},per-expert");
        bench(criterion, RouterKind::Phase, &name, &request(&scores, top_k, &capacity), None);
    }
}

fn hostile(criterion: &mut Criterion) {
    let (tokens, experts, top_k) = (1024, 64, 8);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let row: Vec<f32> = (0..experts).map(|_| rng.random_range(-2.0..2.0)).collect();
    let cases = [
        ("identical-rows", scores(tokens, experts, |expert| row[expert])),
        ("same-eight", scores(tokens, experts, |expert| if expert < 8 { 8.0 } else { 0.0 } + rng.random::<f32>())),
        ("integer-logits", scores(tokens, experts, |_| rng.random_range(0..4) as f32)),
    ];
    let capacity = CapacityRule::per_expert(1.0).capacity(tokens, experts, top_k).expect("a sound rule");
    for (case, scores) in &cases {
        let name = format!("{case},tokens={tokens},experts={experts},top_k={top_k},per-expert");
        bench(criterion, RouterKind::Phase, &name, &request(scores, top_k, &capacity), None);
    }
}

criterion_group!(benches, ordinary, growth, hostile);
criterion_main!(benches);
