//! Layers of checkpoints, beside the same ones in Candle: every family there are goldens of, in memory and from an expert cache.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use candle_core::{DType as Candle, Device as Cpu, Module, Tensor as Other};
use common::{Numbers, difference, numbers};
use phase_moe::decoder::var_builder;
use phase_moe::{CacheOptions, Checkpoint, ExpertCache, MoeLayer, PhaseRouter};
use phase_moe_burn::{CapacityRule, LayerState, Moe, Weights};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

fn directories(of: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(goldens().join(of)).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

/// Candle's layer of the same files.
fn candle(weights: &Weights, layer: usize, dtype: Candle) -> MoeLayer {
    let spec = weights.spec().unwrap();
    let block = spec.moe_blocks().nth(layer).unwrap();
    let vb = var_builder(weights, dtype, &Cpu::Cpu).pp(format!("{}.{}", spec.block_prefix(block), spec.ffn));
    MoeLayer::load(&spec.moe, vb).unwrap().with_index(layer)
}

#[test]
fn every_family_agrees_with_the_candle_layer() {
    let mut layers = 0;
    let olmoe = ["olmoe_random", "olmoe_random_norm"].map(|name| goldens().join(name));
    for directory in directories("zoo").into_iter().chain(olmoe) {
        let weights = Weights::open(&directory).unwrap();
        let spec = weights.spec().unwrap();
        let hidden = spec.moe.hidden;
        for layer in 0..spec.moe_blocks().count() {
            for (dtype, other, bound) in [(DType::F32, Candle::F32, 1e-5), (DType::BF16, Candle::BF16, 1e-2)] {
                let device = Device::flex();
                let input: Tensor<2> = Numbers(layer as u64).tensor([37, hidden], &device);
                let rounded = input.clone().cast(dtype);
                let ours = Moe::load(&weights, layer, dtype, &device).unwrap();
                let theirs = candle(&weights, layer, other);
                let tokens = Other::from_vec(numbers(rounded.clone()), (37, hidden), &Cpu::Cpu).unwrap();
                let tokens = tokens.to_dtype(other).unwrap();
                let expected = theirs.forward(&tokens).unwrap().to_dtype(Candle::F32).unwrap();
                let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let got = numbers(ours.forward(rounded));
                let off = difference(&got, &expected);
                // In four bits Candle's layer multiplies bytes, and this one the floats that were made of them.
                let bound = if directory.ends_with("gpt_oss_mxfp4") { 2e-2 } else { bound };
                assert!(off <= bound, "{}, layer {layer}, {dtype:?}: {off}", directory.display());
            }
            layers += 1;
        }
    }
    assert!(layers >= 19, "{layers} layers");
}

#[test]
fn limits_do_the_same_in_both() {
    let weights = Weights::open(&goldens().join("zoo/qwen3_moe")).unwrap();
    let (spec, device) = (weights.spec().unwrap(), Device::flex());
    let rule = CapacityRule::per_expert(1.0).with_minimum_mean(0.0);
    let input: Tensor<2> = Numbers(3).tensor([64, spec.moe.hidden], &device);
    let ours = Moe::load(&weights, 0, DType::F32, &device).unwrap();
    let ours = ours.with_router(Arc::new(PhaseRouter::default())).with_capacity(Some(rule.clone()));
    let theirs = candle(&weights, 0, Candle::F32).with_router(Arc::new(PhaseRouter::default())).with_capacity(rule);
    let tokens = Other::from_vec(numbers(input.clone()), (64, spec.moe.hidden), &Cpu::Cpu).unwrap();
    let (mut state, mut other) = (LayerState::default(), LayerState::default());
    for _ in 0..2 {
        let (_, routed) = ours.route(input.clone(), &mut state).unwrap();
        let (_, expected) = theirs.route(&tokens, &mut other).unwrap();
        assert_eq!(routed.assignment, expected.assignment);
        assert_eq!(routed.metrics().unwrap(), expected.metrics().unwrap());
    }
}

#[test]
fn an_expert_cache_gives_the_same_output_and_counts() {
    let mut cached = 0;
    for directory in directories("zoo") {
        let (weights, device) = (Weights::open(&directory).unwrap(), Device::flex());
        let spec = weights.spec().unwrap();
        let store = weights.expert_store().unwrap();
        // Room for a few experts of a layer.
        let budget = 3 * store.slab_bytes(0) * spec.moe_blocks().count();
        let cache = Arc::new(ExpertCache::new(Arc::new(store), CacheOptions::new(budget)).unwrap());
        let input: Tensor<2> = Numbers(8).tensor([9, spec.moe.hidden], &device);
        let held = Moe::load(&weights, 0, DType::F32, &device).unwrap();
        let layer = Moe::load_cached(&weights, 0, &cache, DType::F32, &device).unwrap();
        let off = difference(&numbers(layer.forward(input.clone())), &numbers(held.forward(input.clone())));
        // In four bits the engine multiplies in another form than in the floats that were made of them.
        let bound = if directory.ends_with("gpt_oss_mxfp4") { 2e-2 } else { 1e-6 };
        assert!(off <= bound, "{}: {off}", directory.display());
        let before = cache.statistics();
        assert!(before.requests > 0 && before.misses > 0);
        let (_, routed) = layer.route(input.slice([0..1, 0..spec.moe.hidden]), &mut LayerState::default()).unwrap();
        assert_eq!(cache.statistics().requests - before.requests, routed.assignment.kept() as u64);
        let error = burn::module::Module::train(layer)
            .route(Numbers(8).tensor::<2>([2, spec.moe.hidden], &device).autodiff(), &mut LayerState::default());
        assert!(error.unwrap_err().to_string().contains("as experts in a cache need"));
        cached += 1;
    }
    assert!(cached >= 10, "{cached} families");
}

#[test]
fn gguf_files_are_read_too() {
    for name in [
        "olmoe",
        "qwen2moe",
        "qwen3moe",
        "granitemoe",
        "deepseek2",
        "glm4moe",
        "llama",
        "minimax-m2",
        "lfm2moe",
        "qwen3next",
        "qwen35moe",
    ] {
        let file = goldens().join(format!("gguf/{name}.gguf"));
        let weights = Weights::open(&file).unwrap();
        let (hidden, device) = (weights.spec().unwrap().moe.hidden, Device::flex());
        let ours = Moe::load(&weights, 0, DType::F32, &device).unwrap();
        let input: Tensor<2> = Numbers(5).tensor([21, hidden], &device);
        let tokens = Other::from_vec(numbers(input.clone()), (21, hidden), &Cpu::Cpu).unwrap();
        let decoder = phase_moe::Decoder::load(&weights, &Default::default()).unwrap();
        let expected = decoder.moe_layers().next().unwrap().forward(&tokens).unwrap();
        let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // Blocks meet activations in bytes there, floats here.
        let off = difference(&numbers(ours.forward(input)), &expected);
        assert!(off <= 2e-2, "{}: {off}", file.display());
    }
}

#[test]
fn what_is_not_there_is_an_error() {
    let weights = Weights::open(&goldens().join("zoo/qwen3_moe")).unwrap();
    let layers = weights.spec().unwrap().moe_blocks().count();
    let error = Moe::load(&weights, layers, DType::F32, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains(&format!("one of {layers}")), "{error}");
    let error = Moe::load(&weights, 0, DType::I32, &Device::flex()).unwrap_err().to_string();
    assert_eq!(error, "dtype of a layer is I32: expected a float type");
}

/// The MoE block of transformers itself, of all families.
#[test]
fn every_block_agrees_with_transformers() {
    let mut blocks = 0;
    for directory in directories("zoo") {
        let weights = Weights::open(&directory).unwrap();
        let spec = weights.spec().unwrap();
        let golden = Checkpoint::open(directory.join("goldens.safetensors")).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            golden.read(name).unwrap().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        };
        let block = u32::from_le_bytes(golden.read("block.layer").unwrap()[..4].try_into().unwrap());
        let prefix = format!("{}.{}", spec.block_prefix(block as usize), spec.ffn);
        let device = Device::flex();
        let layer = Moe::load_block(&weights, &spec.moe, &prefix, DType::F32, &device).unwrap();
        let input = floats("block.input");
        let tokens = input.len() / spec.moe.hidden;
        let output = numbers(layer.forward(common::tensor(input, [tokens, spec.moe.hidden], &device)));
        let off = difference(&output, &floats("block.output"));
        assert!(off <= 1e-4, "{}: {off}", directory.display());
        blocks += 1;
    }
    assert!(blocks >= 11, "{blocks} blocks");
}
