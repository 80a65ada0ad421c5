//! The hot paths allocate nothing once their buffers exist: one token straight from its logits, scoring and top-k, the memory-aware router without
//! the phase router and plans.
//!
//! Counted by an allocator of this test, on the calling thread alone: batches are small, so that no other thread has a part.
//! Left out are the phase router and its quota, whose buffers depend on what a batch needs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use phase_moe::{
    Assignment, CacheRouter, Capacity, DispatchPlan, ExpertId, ExpertSet, Logits, RouteContext, RouteRequest,
    RouteState, Router, Scores, Scoring, Scratch, TokenRequest, TopK, check_assignment,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The system's allocator, counting.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is going away has no counter any more, and none of its allocations is meant.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: everything is the system's allocator; counting neither allocates nor touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps to the contract of `GlobalAlloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread within `run`.
fn allocations(run: impl FnOnce()) -> usize {
    let before = COUNT.get();
    run();
    COUNT.get() - before
}

/// Batches of logits: ordinary ones, ones of few values, ones with masks.
fn batches(tokens: usize, experts: usize) -> Vec<Vec<f32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut value = |kind: usize| match kind % 3 {
        0 => rng.random_range(-4.0..4.0),
        1 => f32::from(rng.random_range(0u8..4)),
        _ if rng.random_range(0..5) == 0 => f32::NEG_INFINITY,
        _ => rng.random_range(-4.0..4.0),
    };
    (0..12).map(|batch| (0..tokens * experts).map(|_| value(batch)).collect()).collect()
}

fn every_other(experts: usize) -> ExpertSet {
    let mut resident = ExpertSet::new(experts).unwrap();
    for expert in (0..experts).step_by(2) {
        resident.insert(ExpertId::new(expert, experts).unwrap());
    }
    resident
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

#[test]
fn one_token_straight_from_its_logits_allocates_nothing_the_second_time() {
    let routers: [Box<dyn Router>; 3] = [
        Box::new(TopK::default()),
        Box::new(CacheRouter::default()),
        Box::new(CacheRouter::default().with_target_hit_rate(0.9).unwrap()),
    ];
    for router in &routers {
        for (experts, top_k) in [(1, 1), (8, 2), (60, 4), (128, 8), (256, 8), (64, 32)] {
            let (tokens, resident) = (batches(1, experts), every_other(experts));
            let capacity = Capacity::unlimited(experts).unwrap();
            let scoring = Scoring::softmax().normalized(true);
            let (mut scores, mut state, mut scratch) = (Scores::default(), RouteState::default(), Scratch::default());
            let (mut assignment, mut plan, mut short) = (Assignment::default(), DispatchPlan::default(), 0);
            // As a layer does it: the short way, and the general one where there is none.
            let mut step = |at: usize, logits: &[f32]| {
                let context = RouteContext { step: at as u64, resident: Some(&resident), ..RouteContext::default() };
                let request = TokenRequest::new(logits, scoring, top_k, context).unwrap();
                if router.route_token(&request, &mut state, &mut scratch, &mut assignment).unwrap() {
                    short += 1;
                } else {
                    scoring.scores_into(&Logits::new(logits, 1, experts).unwrap(), None, &mut scores).unwrap();
                    let request = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
                    router.route_into(&request, &mut state, &mut scratch, &mut assignment).unwrap();
                    // It looks for experts that are there twice in a table above sixteen slots.
                    if top_k <= 16 {
                        check_assignment(router.as_ref(), &request, &assignment).unwrap();
                    }
                }
                plan.refill(&assignment);
            };
            tokens.iter().enumerate().for_each(|(at, logits)| step(at, logits));
            for (at, logits) in tokens.iter().enumerate() {
                let count = allocations(|| step(tokens.len() + at, logits));
                assert_eq!(count, 0, "{} {experts} {top_k} {at}", router.name());
            }
            assert_eq!(short > 0, top_k < 16, "{} {experts} {top_k}", router.name());
        }
    }
}

#[test]
fn the_stages_allocate_nothing_the_second_time() {
    let routers: [Box<dyn Router>; 3] = [
        Box::new(TopK::default()),
        Box::new(CacheRouter::default()),
        Box::new(CacheRouter::default().with_target_hit_rate(0.9).unwrap()),
    ];
    for (tokens, experts, top_k) in [(1, 8, 2), (1, 128, 8), (32, 64, 8), (64, 128, 8)] {
        let (inputs, resident) = (batches(tokens, experts), every_other(experts));
        let capacity = Capacity::unlimited(experts).unwrap();
        for router in &routers {
            let (mut scores, mut state, mut scratch) = (Scores::default(), RouteState::default(), Scratch::default());
            let mut assignment = Assignment::default();
            let mut plan = DispatchPlan::default();
            let mut step = |at: usize, logits: &[f32]| {
                let logits = Logits::new(logits, tokens, experts).unwrap();
                Scoring::softmax().scores_into(&logits, None, &mut scores).unwrap();
                let context = RouteContext { step: at as u64, resident: Some(&resident), ..RouteContext::default() };
                let request = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
                router.route_into(&request, &mut state, &mut scratch, &mut assignment).unwrap();
                plan.refill(&assignment);
            };
            inputs.iter().enumerate().for_each(|(at, logits)| step(at, logits));
            for (at, logits) in inputs.iter().enumerate() {
                let count = allocations(|| step(inputs.len() + at, logits));
                assert_eq!(count, 0, "{} {tokens} {experts} {top_k} {at}", router.name());
            }
        }
    }
}

/// The routing of a layer in decode: one token at a time, without limits.
#[test]
fn a_layer_in_decode_routes_without_allocating() {
    use phase_moe::LayerState;
    use phase_moe::routing::LayerRouter;
    use std::sync::Arc;

    let routers: [Arc<dyn Router>; 3] = [
        Arc::new(TopK::default()),
        Arc::new(CacheRouter::default()),
        Arc::new(CacheRouter::default().with_target_hit_rate(0.9).unwrap()),
    ];
    for (experts, top_k) in [(1, 1), (8, 2), (60, 4), (128, 8)] {
        for scoring in [Scoring::softmax(), Scoring::softmax().normalized(true), Scoring::sigmoid()] {
            for router in &routers {
                let layer = LayerRouter { router: router.clone(), capacity: None };
                let (resident, mut state) = (every_other(experts), LayerState::default());
                let mut step = |at: usize, logits: &[f32]| {
                    let context =
                        RouteContext { step: at as u64, resident: Some(&resident), ..RouteContext::default() };
                    let logits = Logits::new(logits, 1, experts).unwrap();
                    layer.route(&logits, scoring, top_k, None, context, &mut state).unwrap();
                };
                let tokens = batches(1, experts);
                // Warm: the short way, and with a mask or a tie the long one.
                (0..).zip(&tokens).for_each(|(at, logits)| step(at, logits));
                for (at, logits) in (tokens.len()..).zip(&tokens) {
                    let count = allocations(|| step(at, logits));
                    assert_eq!(count, 0, "{experts} {top_k} {} {at}", router.name());
                }
            }
        }
    }
}
