//! GGUF files against Hugging Face transformers, goldens by `tests/goldens/make_gguf_goldens.py`
//! and, of files by llama.cpp's own converter, `make_converter_goldens.py`; with experts in an expert cache and
//! without the same bits.
#![cfg(feature = "model")]

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use phase_moe::{Batch, CacheOptions, Checkpoint, Decoder, LoadOptions, Weights};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// A file and the goldens of its model.
const FILES: [(&str, &str); 16] = [
    ("llama", "zoo/mixtral/goldens.safetensors"),
    ("olmoe", "gguf/olmoe.goldens.safetensors"),
    ("qwen2moe", "zoo/qwen2_moe/goldens.safetensors"),
    ("qwen3moe", "zoo/qwen3_moe/goldens.safetensors"),
    ("glm4moe", "zoo/glm4_moe/goldens.safetensors"),
    ("granitemoe", "zoo/granitemoe/goldens.safetensors"),
    ("deepseek2", "zoo/deepseek_v3/goldens.safetensors"),
    ("deepseek2_glm4_moe_lite", "zoo/glm4_moe_lite/goldens.safetensors"),
    ("minimax-m2", "zoo/minimax_m2/goldens.safetensors"),
    ("gpt-oss", "zoo/gpt_oss/goldens.safetensors"),
    ("phimoe", "gguf/phimoe.goldens.safetensors"),
    ("lfm2moe", "zoo/lfm2_moe/goldens.safetensors"),
    ("qwen3next", "zoo/qwen3_next/goldens.safetensors"),
    ("qwen3next_old", "zoo/qwen3_next/goldens.safetensors"),
    ("qwen35moe", "zoo/qwen3_5_moe/goldens.safetensors"),
    ("deepseek2_old", "gguf/deepseek2_old.goldens.safetensors"),
];

fn open(name: &str) -> Weights {
    Weights::open(&fixture(&format!("gguf/{name}.gguf"))).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The prompts of the goldens and their logits.
fn prompts(goldens: &str) -> [(Vec<u32>, Vec<f32>); 2] {
    let goldens = Checkpoint::open(fixture(goldens)).unwrap();
    [0, 1].map(|prompt| {
        let [ids, logits] = ["ids", "logits"].map(|part| goldens.read(&format!("prompt.{prompt}.{part}")).unwrap());
        let ids = ids.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        (ids, logits.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    })
}

/// Logits of a text at once, and of one token after another.
fn logits(decoder: &Decoder, ids: &[u32]) -> [Vec<f32>; 2] {
    let forward = |ids: &[u32], state: &mut _| values(&decoder.forward(&Batch::new(&[ids]).unwrap(), state).unwrap());
    let mut state = decoder.generation_state();
    let steps = ids.iter().flat_map(|&id| forward(&[id], &mut state)).collect();
    [forward(ids, &mut decoder.batch_state()), steps]
}

fn cached(files: &Weights, experts: usize) -> Decoder {
    let store = files.expert_store().unwrap();
    let largest = (0..files.spec().unwrap().moe_blocks().count()).map(|layer| store.slab_bytes(layer)).max().unwrap();
    let options = CacheOptions::new(experts * largest).sparing(&store);
    Decoder::load(files, &LoadOptions::default().with_expert_cache(options)).unwrap()
}

#[test]
fn every_architecture_equals_transformers_with_its_experts_in_memory_or_in_the_file() {
    for (name, goldens) in FILES {
        let files = open(name);
        let decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
        let caches = [cached(&files, 1), cached(&files, 3)];
        assert!(caches.iter().all(|decoder| decoder.expert_cache().is_some()));
        // Neither of the block that guesses further tokens nor of positions.
        let further = format!("blk.{}.", decoder.spec().layers);
        let is_read = |name: &str| !name.starts_with(&further) && !name.starts_with("rope_factors");
        let tensors = files.checkpoint().tensors().iter().filter(|(name, _)| is_read(name));
        let stored: usize = tensors.map(|(_, entry)| entry.bytes / 4).sum();
        assert_eq!(decoder.spec().parameters(), stored, "{name}: parameters");
        for (prompt, (ids, golden)) in prompts(goldens).into_iter().enumerate() {
            let ours = logits(&decoder, &ids);
            for (how, ours) in ["at once", "step by step"].into_iter().zip(&ours) {
                assert_eq!(ours.len(), golden.len());
                let worst = ours.iter().zip(&golden).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
                assert!(worst <= 1e-4, "{name}, prompt {prompt} {how}: off by {worst}");
            }
            for cached in &caches {
                assert!(logits(cached, &ids) == ours, "{name}, prompt {prompt}: other bits from a cache");
            }
        }
    }
}

#[test]
fn experts_in_mxfp4_are_the_numbers_they_stand_for() {
    let files = open("mxfp4");
    let decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
    let caches = [cached(&files, 1), cached(&files, 3)];
    for (prompt, (ids, golden)) in prompts("gguf/mxfp4.goldens.safetensors").into_iter().enumerate() {
        let ours = logits(&decoder, &ids);
        let size = golden.iter().map(|value| value.abs()).fold(0.0, f32::max);
        for ours in &ours {
            let worst = ours.iter().zip(&golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / size;
            // Activations meet them as bytes.
            assert!(worst <= 2e-2, "prompt {prompt}: off by {worst}");
        }
        assert!(caches.iter().all(|cached| logits(cached, &ids) == ours), "prompt {prompt}: other bits from a cache");
    }
}

/// gpt-oss as it is published: the blocks are those of the safetensors, in another order of nibbles, gate and up rows apart.
#[test]
fn gpt_oss_in_mxfp4_is_the_safetensors_that_it_was_converted_from() {
    let (files, plain) = (open("gpt-oss_mxfp4"), Weights::open(&fixture("zoo/gpt_oss_mxfp4")).unwrap());
    let decoders = [&files, &plain].map(|files| Decoder::load(files, &LoadOptions::default()).unwrap());
    assert_eq!(files.expert_sizes().unwrap().dtypes, ["mxfp4"]);
    let caches = [cached(&files, 1), cached(&files, 3)];
    for (ids, _) in prompts("zoo/gpt_oss_mxfp4/goldens.safetensors") {
        let [ours, expected] = [0, 1].map(|which| logits(&decoders[which], &ids));
        let pairs = ours.iter().flatten().zip(expected.iter().flatten());
        let worst = pairs.map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
        assert!(worst <= 1e-5, "off by {worst}");
        assert!(caches.iter().all(|cached| logits(cached, &ids) == ours), "other bits from a cache");
    }
}
