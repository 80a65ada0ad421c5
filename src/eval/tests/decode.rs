//! Decode with a logical memory of experts on the bundled model: what routers see, what it costs, and that both ways to decode a
//! known text are the same.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use candle_core::Tensor;

use crate::decoder::ExpertMemory;
use crate::eval::{Batching, DecodeFigures, Decoding, EvalText, Perplexity};
use crate::{Admission, Batch, CacheRouter, Decoder, LoadOptions, Model, Policy, Router, TopK};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    Model::load(&directory, &LoadOptions::default()).unwrap()
});

fn decoder() -> &'static Decoder {
    MODEL.decoder()
}

fn batches(tokens: usize) -> Vec<Batch> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe/eval/code.txt");
    let text = EvalText { name: "code".into(), ids: MODEL.encode(&std::fs::read_to_string(path).unwrap()).unwrap() };
    Batching { tokens: Some(tokens), ..Batching::default() }.batches(&[], &[text]).unwrap()
}

fn decoding(router: impl Router + 'static, cached_experts: usize) -> Decoding {
    let (policy, admission) = (Policy::Lru, Admission::default());
    Decoding { router: Arc::new(router), cached_experts, policy, admission }
}

fn run(decoding: &Decoding, tokens: usize) -> DecodeFigures {
    decoding.run(decoder(), &batches(tokens), |_, _| Ok(())).unwrap()
}

#[test]
fn rows_of_a_batch_one_after_another_are_decode() {
    for (router, cached) in [(CacheRouter::new(0.0, 0.0).unwrap(), 4), (CacheRouter::default(), 12)] {
        let decoding = decoding(router, cached);
        let at_once = run(&decoding, 700);
        let (perplexity, memory) = by_token(&decoding, 700);
        assert_eq!((at_once.tokens, at_once.requests), (700, memory.requests()));
        // Sums of one row are rounded differently from those of many, which may turn a choice that hardly matters.
        assert!(at_once.hits.abs_diff(memory.hits()) * 200 <= at_once.requests, "{at_once:?} {memory:?}");
        let off = (at_once.perplexity / perplexity).ln();
        assert!(off.abs() < 2e-3, "{at_once:?} {perplexity}");
    }
}

/// Decode as it is: a forward pass a token, keys and values and the memory kept.
fn by_token(decoding: &Decoding, tokens: usize) -> (f64, ExpertMemory) {
    let mut decoder = decoder().clone();
    decoder.set_router(decoding.router.clone());
    let memory = decoder.expert_memory(decoding.cached_experts, decoding.policy, decoding.admission).unwrap();
    let mut state = decoder.generation_state().with_memory(memory);
    let mut perplexity = Perplexity::default();
    for batch in batches(tokens) {
        for row in 0..batch.sequences() {
            let places = row * batch.positions()..(row + 1) * batch.positions();
            let live = places.filter(|&at| batch.padding().is_none_or(|padding| !padding[at]));
            let ids: Vec<u32> = live.map(|at| batch.ids()[at]).collect();
            state.truncate(0).unwrap();
            let step = |id: &u32| decoder.forward(&Batch::new(&[&[*id]]).unwrap(), &mut state).unwrap();
            let logits: Vec<Tensor> = ids.iter().map(step).collect();
            perplexity.add(&Tensor::cat(&logits, 1).unwrap(), &Batch::new(&[&ids]).unwrap()).unwrap();
        }
    }
    (perplexity.value().unwrap(), state.memory().unwrap().clone())
}

#[test]
fn a_memory_nobody_reads_changes_nothing() {
    let batches = batches(600);
    let logits = |memory: Option<ExpertMemory>| -> Vec<f32> {
        let state = decoder().batch_state();
        let mut state = match memory {
            Some(memory) => state.with_memory(memory),
            None => state,
        };
        let logits = decoder().forward(&batches[0], &mut state).unwrap();
        assert!(state.memory().is_none_or(|memory| memory.requests() > 0 && memory.hits() == 0));
        logits.flatten_all().unwrap().to_vec1().unwrap()
    };
    let memory = ExpertMemory::new(4, 32, 8, Policy::Lru, Admission::All).unwrap();
    assert_eq!(logits(Some(memory)), logits(None));
}

#[test]
fn swaps_save_misses_within_the_bound_and_none_are_made_without_one() {
    let (plain, off) =
        (run(&decoding(TopK::default(), 8), 1500), run(&decoding(CacheRouter::new(0.2, 0.0).unwrap(), 8), 1500));
    assert_eq!(DecodeFigures { time: plain.time, ..off }, plain);
    assert_eq!(plain.gate_mass_kept, Some(1.0));
    let cache = run(&decoding(CacheRouter::default(), 8), 1500);
    assert!(cache.misses < plain.misses && cache.hits + cache.misses == cache.requests, "{cache:?} {plain:?}");
    assert!(cache.gate_mass_kept > Some(0.9) && cache.gate_mass_kept < Some(1.0), "{cache:?}");
    assert!((cache.perplexity / plain.perplexity - 1.0).abs() < 0.05, "{cache:?} {plain:?}");
    assert!(Some(cache.hits) < cache.belady_hits);
    let all = run(&decoding(TopK::default(), 32), 1500);
    assert!(all.misses <= 4 * 32);
    assert_eq!((all.perplexity, Some(all.hits)), (plain.perplexity, all.belady_hits));
}

#[test]
fn mistakes_are_named() {
    let error = |memory: ExpertMemory| {
        let mut state = decoder().batch_state().with_memory(memory);
        decoder().forward(&Batch::new(&[&[1, 2]]).unwrap(), &mut state).unwrap_err().to_string()
    };
    let memory = |layers, experts| ExpertMemory::new(layers, experts, 2, Policy::Lru, Admission::All).unwrap();
    let expected = "expert memory: expected 4 layers of 32 experts, got";
    assert_eq!(error(memory(3, 32)), format!("{expected} 3 layers of 32 experts"));
    assert_eq!(error(memory(4, 31)), format!("{expected} 4 layers of 31 experts"));
    let message = decoding(TopK::default(), 33).run(decoder(), &batches(10), |_, _| Ok(())).unwrap_err().to_string();
    assert_eq!(message, "cached experts is 33: expected 0 to experts 32");
    assert_eq!(
        "some".parse::<Admission>().unwrap_err().to_string(),
        "unknown admission `some`: expected one of affinity, all"
    );
}
