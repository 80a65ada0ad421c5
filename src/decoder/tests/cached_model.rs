//! A model whose experts are in an expert cache against the same model held in memory: the same bits, whatever the budget and whatever
//! is read ahead; what is wrong is named, and a broken file ends nothing but the pass that needs it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use crate::decoder::ExpertMemory;
use crate::error::Fault;
use crate::offload::cached::ExpertBiases;
use crate::offload::store::Layout;
use crate::offload::store::Piece;
use crate::offload::{Part, Prefetch, Scope};
use crate::{
    Admission, Batch, CacheOptions, CacheRouter, CachedExperts, Decoder, Dtype, Error, Expert, ExpertCache,
    ExpertStore, Gate, GenerateOptions, LayerState, LoadOptions, Model, MoeLayer, MoeSpec, Policy, RouteContext,
    RouteState, Sampler, Shared, SharedExperts, generate,
};
use candle_core::{DType, Device, Tensor, Var};

fn directory() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-moe"))
}

/// bf16, as the experts are stored.
fn load(directory: &Path, expert_cache: Option<CacheOptions>) -> Model {
    Model::load(directory, &LoadOptions::default().with_dtype(DType::BF16).with_expert_cache(expert_cache)).unwrap()
}

static HELD: LazyLock<Model> = LazyLock::new(|| load(directory(), None));

fn cache(decoder: &Decoder) -> &ExpertCache {
    decoder.expert_cache().unwrap()
}

/// Bytes of an expert in memory.
static SLAB: LazyLock<usize> =
    LazyLock::new(|| cache(load(directory(), Some(CacheOptions::new(8 << 20))).decoder()).store().slab_bytes(0));

/// Room for all experts and what is set aside, for half of them, for a tenth, for one.
fn budgets() -> [usize; 4] {
    [130, 64, 13, 1].map(|experts| experts * *SLAB)
}

fn text(file: &str, tokens: usize) -> Vec<u32> {
    let text = std::fs::read_to_string(directory().join("eval").join(file)).unwrap();
    HELD.encode(&text).unwrap()[..tokens].to_vec()
}

fn bits(logits: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = logits.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Logits of batches, with padding and without.
fn in_batches(decoder: &Decoder) -> Vec<Vec<u32>> {
    let (code, scripture) = (text("code.txt", 90), text("scripture.txt", 150));
    let batches =
        [vec![&scripture[..]], vec![&code, &scripture, &code[..1]], vec![&code[..1]], vec![&scripture, &scripture]];
    let mut state = decoder.batch_state();
    let logits = |batch: Vec<&[u32]>| bits(&decoder.forward(&Batch::new(&batch).unwrap(), &mut state).unwrap());
    batches.into_iter().map(logits).collect()
}

/// Logits of a text in decode after a short prompt.
fn in_decode(decoder: &Decoder, tokens: usize) -> Vec<Vec<u32>> {
    let (ids, mut state) = (text("reference.txt", tokens), decoder.generation_state());
    let steps = std::iter::once(&ids[..9]).chain(ids[9..].chunks(1));
    let logits = |ids: &[u32]| bits(&decoder.forward_last(&Batch::new(&[ids]).unwrap(), &mut state).unwrap());
    steps.map(logits).collect()
}

#[test]
fn a_model_on_a_cache_is_bit_equal_to_one_in_memory() {
    let (batches, decode) = (in_batches(HELD.decoder()), in_decode(HELD.decoder(), 120));
    for budget in budgets() {
        for (policy, admission) in [(Policy::Lru, Admission::All), (Policy::Affinity, Admission::default())] {
            let model = load(directory(), Some(CacheOptions { policy, admission, ..CacheOptions::new(budget) }));
            assert_eq!(in_batches(model.decoder()), batches, "budget {budget}");
            assert_eq!(in_decode(model.decoder(), 120), decode, "budget {budget}");
            let statistics = cache(model.decoder()).statistics();
            assert!(statistics.peak_bytes <= budget && statistics.misses > 0, "{statistics:?}");
        }
    }
}

#[test]
fn where_all_experts_fit_the_memory_aware_router_changes_nothing() {
    let router = || Arc::new(CacheRouter::new(0.5, 0.5).unwrap());
    let layers = 0..cache(load(directory(), Some(CacheOptions::new(*SLAB))).decoder()).store().layers();
    for scope in [Scope::PerLayer, Scope::Global] {
        let options = CacheOptions { scope, ..CacheOptions::new(layers.len() * 32 * *SLAB) };
        let mut model = load(directory(), Some(options));
        model.decoder_mut().set_router(router());
        assert_eq!(in_decode(model.decoder(), 120), in_decode(HELD.decoder(), 120), "{scope:?}");
        assert_eq!(in_batches(model.decoder()), in_batches(HELD.decoder()), "{scope:?}");
        let statistics = cache(model.decoder()).statistics();
        assert!(statistics.misses > 0 && statistics.evictions == 0, "{statistics:?}");
    }
}

#[test]
fn reading_ahead_changes_neither_results_nor_decisions() {
    let plain = in_decode(HELD.decoder(), 150);
    for budget in budgets() {
        let mut decisions = Vec::new();
        for router in [None, Some(CacheRouter::default())] {
            for prefetch in [Prefetch::Off, Prefetch::Always, Prefetch::Auto] {
                let mut model = load(directory(), Some(CacheOptions { prefetch, ..CacheOptions::new(budget) }));
                if let Some(router) = &router {
                    model.decoder_mut().set_router(Arc::new(router.clone()));
                }
                let logits = in_decode(model.decoder(), 150);
                assert!(router.is_some() || logits == plain, "{prefetch:?}, budget {budget}");
                let statistics = cache(model.decoder()).statistics();
                let residents: Vec<_> = (0..4).map(|layer| cache(model.decoder()).resident(layer).unwrap()).collect();
                decisions.push((statistics.hits, statistics.misses, statistics.evictions, residents, logits));
                assert!(statistics.peak_bytes <= budget);
                let issued = statistics.prefetch.issued;
                assert!(prefetch != Prefetch::Off || issued == 0);
                assert!(prefetch != Prefetch::Always || budget == *SLAB || issued > 0);
            }
        }
        for decisions in decisions.chunks(3) {
            assert!(decisions.iter().all(|other| *other == decisions[0]), "budget {budget}");
        }
    }
}

#[test]
fn two_threads_generate_on_one_cache() {
    let budget = 10 * *SLAB;
    let options = CacheOptions { prefetch: Prefetch::Always, ..CacheOptions::new(budget) };
    let model = load(directory(), Some(options));
    let prompts = [text("code.txt", 12), text("scripture.txt", 20)];
    let ids = |model: &Model, prompt: &[u32]| {
        let (mut state, mut sampler) = (model.decoder().generation_state(), Sampler::new(0.0, 1.0, 1).unwrap());
        let go_on = |_| ControlFlow::Continue(());
        generate(model, prompt, GenerateOptions::new(80), &mut state, &mut sampler, go_on).unwrap().texts.remove(0)
    };
    std::thread::scope(|scope| {
        for prompt in prompts.iter().cycle().take(4) {
            let (model, ids) = (&model, &ids);
            scope.spawn(move || assert_eq!(ids(model, prompt), ids(&HELD, prompt)));
        }
    });
    assert!(cache(model.decoder()).statistics().peak_bytes <= budget);
}

#[test]
fn a_file_that_shrinks_ends_one_pass_and_not_the_process() {
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(directory().join(file), copy.path().join(file)).unwrap();
    }
    let weights = copy.path().join("model.safetensors");
    let model = load(copy.path(), Some(CacheOptions { prefetch: Prefetch::Always, ..CacheOptions::new(13 * *SLAB) }));
    let (ids, decoder) = (text("code.txt", 60), model.decoder());
    let pass = |ids: &[u32], state: &mut _| decoder.forward_last(&Batch::new(&[ids]).unwrap(), state);
    let mut state = decoder.generation_state();
    pass(&ids[..10], &mut state).unwrap();

    std::fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(300_000).unwrap();
    let error = ids[10..].iter().find_map(|&id| pass(&[id], &mut state).err()).unwrap();
    let Error::Expert(fault) = &error else { panic!("{error}") };
    assert!(matches!(fault.fault, Fault::Read { .. }) && fault.file.ends_with("model.safetensors"), "{error}");
    assert!(!error.is_user_error());
    assert!(error.to_string().contains(&format!("expert {} of layer {}", fault.expert, fault.layer)), "{error}");

    // The file is whole again, in its place.
    std::fs::copy(directory().join("model.safetensors"), &weights).unwrap();
    let mut state = decoder.generation_state();
    let logits = pass(&ids, &mut state).unwrap();
    let mut state = HELD.decoder().generation_state();
    let held = HELD.decoder().forward_last(&Batch::new(&[&ids]).unwrap(), &mut state).unwrap();
    assert_eq!(bits(&logits), bits(&held));
}

const SHARED: SharedExperts = SharedExperts { width: 24, gated: true };

fn spec() -> MoeSpec {
    MoeSpec { shared: Some(SHARED), ..MoeSpec::new(16, 6, 2, 8).unwrap() }
}

/// Numbers that are the same in every run.
fn drawn(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|at| (((seed * 7919 + at * 104_729) % 1009) as f32 / 1009.0 - 0.5) * 0.8).collect()
}

fn tensor(seed: usize, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(drawn(seed, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn gate() -> Gate {
    Gate::new(tensor(1, 6, 16))
}

fn shared() -> Shared {
    Shared::new(Expert::new(tensor(2, 24, 16), tensor(3, 24, 16), tensor(4, 16, 24)), Some(tensor(5, 1, 16)))
}

/// The matrices of expert `id`: gate, up and down projection.
fn matrices(id: usize) -> [(Part, usize, [usize; 2]); 3] {
    [(Part::Gate, 10 + 3 * id, [8, 16]), (Part::Up, 11 + 3 * id, [8, 16]), (Part::Down, 12 + 3 * id, [16, 8])]
}

/// `experts` experts of which `room` fit.
fn cached(experts: usize, room: usize) -> CachedExperts {
    let (mut bytes, mut layer) = (Vec::new(), Vec::new());
    for id in 0..experts {
        let mut pieces = Vec::new();
        for (part, seed, [rows, columns]) in matrices(id) {
            let offset = bytes.len() as u64;
            pieces.push(Piece { part, source: 0, offset, dtype: Dtype::F32, rows, columns, layout: Layout::Rows });
            bytes.extend(drawn(seed, rows * columns).into_iter().flat_map(f32::to_le_bytes));
        }
        layer.push(pieces);
    }
    let bytes: &'static [u8] = bytes.leak();
    let store = ExpertStore::new(vec![("memory".into(), Arc::new(bytes))], vec![layer]).unwrap();
    let options = CacheOptions::new(room * store.slab_bytes(0));
    CachedExperts::new(Arc::new(ExpertCache::new(Arc::new(store), options).unwrap()), 0)
}

#[test]
fn a_shared_expert_stays_beside_cached_ones() {
    let expert = |id| {
        let [gate, up, down] = matrices(id).map(|(_, seed, [rows, columns])| tensor(seed, rows, columns));
        Expert::new(gate, up, down)
    };
    let held = MoeLayer::new(spec(), gate(), (0..6).map(expert).collect::<Vec<_>>(), Some(shared())).unwrap();
    for room in [1, 2, 6] {
        let layer = MoeLayer::new(spec(), gate(), cached(6, room), Some(shared())).unwrap();
        for (seed, tokens) in [(50, 1), (51, 1), (52, 33), (53, 1)] {
            let hidden = tensor(seed, tokens, 16);
            let ((output, routed), (expected, held_routed)) = (
                layer.route(&hidden, &mut LayerState::default()).unwrap(),
                held.route(&hidden, &mut LayerState::default()).unwrap(),
            );
            assert_eq!(bits(&output), bits(&expected), "room for {room}");
            assert_eq!(routed.assignment, held_routed.assignment, "room for {room}");
            let guess =
                layer.guess(&hidden, RouteContext::default(), layer.spec().top_k, &RouteState::default()).unwrap();
            assert_eq!(
                guess,
                held.guess(&hidden, RouteContext::default(), layer.spec().top_k, &RouteState::default()).unwrap()
            );
        }
    }
}

#[test]
fn mistakes_are_named() {
    let message = |spec: MoeSpec, gate: Gate, experts: CachedExperts, shared: Option<Shared>| {
        MoeLayer::new(spec, gate, experts, shared).err().unwrap().to_string()
    };
    let plain = || MoeSpec { shared: None, ..spec() };
    assert_eq!(message(plain(), gate(), cached(5, 2), None), "stored experts of layer 0: expected 6, got 5");
    let wide = MoeSpec { expert_width: 9, ..plain() };
    assert_eq!(
        message(wide, gate(), cached(6, 2), None),
        "stored expert 0 of layer 0, Gate: expected [9, 16], got f32 [8, 16]"
    );
    let biased = || MoeSpec { expert_bias: true, ..plain() };
    assert_eq!(message(biased(), gate(), cached(6, 2), None), "biases of stored experts: expected some, got none");
    let biases = |experts: usize| vec![ExpertBiases::default(); experts];
    let wrong = message(plain(), gate(), cached(6, 2).with_biases(biases(6)), None);
    assert_eq!(wrong, "biases of stored experts: expected none, got some");
    let wrong = message(biased(), gate(), cached(6, 2).with_biases(biases(5)), None);
    assert_eq!(wrong, "biases of stored experts: expected 6 experts, got 5");
    let wrong = message(biased(), gate(), cached(6, 2).with_biases(biases(6)), None);
    assert_eq!(wrong, "gate biases of stored expert 0: expected 8 values, got 0");
    let missing = message(spec(), gate(), cached(6, 2), None);
    assert_eq!(missing, "shared expert: expected one of width 24, got none");
    let needs = "expected one on the CPU without gradients, as experts in a cache need";
    let variable = Gate::new(Var::from_tensor(&tensor(1, 6, 16)).unwrap().as_tensor().clone());
    assert_eq!(message(plain(), variable, cached(6, 2), None), format!("gate and shared expert: {needs}, got others"));
    let experts = cached(6, 2);
    let layer = MoeLayer::new(plain(), gate(), experts.clone(), None).unwrap();
    let variable = Var::from_tensor(&tensor(60, 2, 16)).unwrap();
    let error = layer.route(variable.as_tensor(), &mut LayerState::default()).unwrap_err();
    assert_eq!(error.to_string(), format!("hidden state: {needs}, got another"));
    assert!(experts.cache().statistics().requests == 0, "nothing was asked for");

    let model = load(directory(), Some(CacheOptions::new(4 << 20)));
    let memory = ExpertMemory::new(4, 32, 8, Policy::Lru, Admission::All).unwrap();
    let mut state = model.decoder().batch_state().with_memory(memory);
    let error = model.decoder().forward(&Batch::new(&[&[1]]).unwrap(), &mut state).unwrap_err();
    let expected = "expert memory: expected none beside an expert cache, which keeps its own, got one";
    assert_eq!(error.to_string(), expected);
    let small = LoadOptions::default().with_expert_cache(CacheOptions::new(*SLAB - 1));
    let error = Model::load(directory(), &small).err().unwrap().to_string();
    assert!(error.starts_with("expert cache budget is ") && error.contains("the largest expert"), "{error}");
}
