//! Experts whose projections are of several dtypes: what runs from memory runs from an expert cache, to the same bits.
//!
//! Values against transformers: `cli/tests/situations/formats.json`. K-quants: `cli/tests/gguf_model.rs`.
#![cfg(feature = "model")]

use std::path::Path;

use candle_core::DType;
use half::{bf16, f16};
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use phase_moe::{Batch, CacheOptions, Checkpoint, Decoder, LoadOptions, Weights};
use safetensors::Dtype;

/// Which dtype a tensor gets, by its layer, its expert and `gate`, `up` or `down`.
type Mix = fn(usize, usize, &str) -> Dtype;

/// Layer, expert and part of an expert's tensor.
fn part(name: &str) -> Option<(usize, usize, &'static str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (expert, rest) = rest.split_once(".experts.")?.1.split_once('.')?;
    let part = match rest.split_once('.')?.0 {
        "gate_proj" | "w1" => "gate",
        "up_proj" | "w3" => "up",
        _ => "down",
    };
    Some((layer.parse().ok()?, expert.parse().ok()?, part))
}

/// A golden checkpoint of a family with its experts in other dtypes.
fn write(family: &str, mix: Mix, directory: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/zoo").join(family);
    let checkpoint = Checkpoint::open(&golden).unwrap();
    let tensors: Vec<NamedTensor> = checkpoint
        .tensors()
        .iter()
        .map(|(name, entry)| {
            let bytes = checkpoint.read(name).unwrap();
            let values = || bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            let dtype = part(name).map_or(Dtype::F32, |(layer, expert, part)| mix(layer, expert, part));
            let bytes: Vec<u8> = match dtype {
                Dtype::BF16 => values().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
                Dtype::F16 => values().flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
                _ => bytes.clone(),
            };
            NamedTensor { name: name.clone(), dtype, shape: entry.shape.clone(), bytes }
        })
        .collect();
    std::fs::copy(golden.join("config.json"), directory.join("config.json")).unwrap();
    std::fs::write(directory.join("model.safetensors"), tensor_bytes(&tensors, None).unwrap()).unwrap();
}

fn logits(decoder: &Decoder) -> Vec<f32> {
    let (mut all, mut state) = (Vec::new(), decoder.batch_state());
    let ids: Vec<u32> = (0..40).map(|at| (at * 7 + 3) % 60).collect();
    for ids in [&ids[..1], &ids[..5], &ids] {
        let batch = Batch::new(&[ids]).unwrap();
        let logits = decoder.forward(&batch, &mut state).unwrap();
        all.extend(logits.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
    all
}

fn options(budget: Option<usize>) -> LoadOptions {
    LoadOptions::default().with_expert_cache(budget.map(CacheOptions::new))
}

#[test]
fn floats_of_several_dtypes_in_an_expert_give_the_same_bits_from_a_cache() {
    let mixes: [(&str, Mix); 6] = [
        ("gate bf16", |_, _, part| if part == "gate" { Dtype::BF16 } else { Dtype::F32 }),
        ("up bf16", |_, _, part| if part == "up" { Dtype::BF16 } else { Dtype::F32 }),
        ("down bf16", |_, _, part| if part == "down" { Dtype::BF16 } else { Dtype::F32 }),
        ("three dtypes", |_, _, part| match part {
            "gate" => Dtype::F16,
            "up" => Dtype::BF16,
            _ => Dtype::F32,
        }),
        ("by expert", |_, expert, part| match (expert % 3, part) {
            (0, "gate") => Dtype::BF16,
            (1, _) => Dtype::F16,
            (2, "up") => Dtype::F16,
            _ => Dtype::F32,
        }),
        ("by layer", |layer, _, part| match (layer % 2, part) {
            (0, "up") => Dtype::BF16,
            (1, "down") => Dtype::F16,
            _ => Dtype::F32,
        }),
    ];
    for family in ["qwen3_moe", "mixtral"] {
        for (name, mix) in mixes {
            let directory = tempfile::tempdir().unwrap();
            write(family, mix, directory.path());
            let files = Weights::open(directory.path()).unwrap();
            let held = logits(&Decoder::load(&files, &options(None)).unwrap());
            assert!(held.iter().all(|value| value.is_finite()));
            for budget in [64 << 10, 96 << 10, 8 << 20] {
                let cached = logits(&Decoder::load(&files, &options(Some(budget))).unwrap());
                assert!(cached == held, "{family}, {name}: a cache of {budget} bytes");
            }
        }
    }
}

#[test]
fn what_a_cache_does_not_take_is_named_by_file_and_tensor() {
    let directory = tempfile::tempdir().unwrap();
    write("qwen3_moe", |_, _, _| Dtype::F32, directory.path());
    let path = directory.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let wide = "model.layers.1.mlp.experts.2.up_proj.weight";
    let tensors: Vec<NamedTensor> = checkpoint
        .tensors()
        .iter()
        .map(|(name, entry)| {
            let bytes = checkpoint.read(name).unwrap();
            let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            let is_wide = name == wide;
            let bytes = if is_wide { values.flat_map(|value| f64::from(value).to_le_bytes()).collect() } else { bytes };
            let dtype = if is_wide { Dtype::F64 } else { Dtype::F32 };
            NamedTensor { name: name.clone(), dtype, shape: entry.shape.clone(), bytes }
        })
        .collect();
    std::fs::write(&path, tensor_bytes(&tensors, None).unwrap()).unwrap();
    let files = Weights::open(directory.path()).unwrap();
    for budget in [None, Some(64 << 10)] {
        let error = Decoder::load(&files, &options(budget)).err().unwrap().to_string();
        let expected = format!("{}: tensor `{wide}`: expected dtype F32, BF16 or F16, got ", path.display());
        assert!(error.starts_with(&expected), "{error}");
    }
}
