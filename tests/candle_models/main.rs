//! candle-transformers' own MoE models beside ours: the same weights, the same logits (`logits`); unmodified on checkpoints
//! whose experts are stacked (`stacked`); and where theirs cannot read or run a model, what they do instead and that ours
//! equals Hugging Face transformers (`faults`).
//!
//! Weights are those of the families' goldens (`tests/goldens/zoo`), where need be cut to what both can read.
#![cfg(feature = "model")]

mod faults;
mod logits;
mod stacked;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{deepseek2, mixtral, qwen2_moe, qwen3_moe};
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use phase_moe::{Batch, Checkpoint, Decoder, LoadOptions, Weights};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/zoo").join(family)
}

fn config(family: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(family).join("config.json")).unwrap()).unwrap()
}

/// `config` with other values under the keys of `changes`.
fn changed(mut config: Value, changes: Value) -> Value {
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// A configuration as candle-transformers reads it: the base of the rotary embedding beside the other keys, and keys that
/// transformers leaves out or calls otherwise.
fn for_candle(config: &Value) -> Value {
    let beside = json!({
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "use_flash_attn": false,
        "max_window_layers": 28,
        "num_experts": config.get("num_experts").or(config.get("num_local_experts")),
    });
    changed(config.clone(), beside)
}

/// A model of candle-transformers: the logits of the last of some tokens (`[1, tokens]`), which stand at a position.
type Theirs = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

/// candle-transformers' model of the configuration's family.
fn theirs(config: &Value, vb: VarBuilder<'_>) -> Result<Theirs> {
    fn parsed<T: serde::de::DeserializeOwned>(config: &Value) -> Result<T> {
        serde_json::from_value(config.clone()).map_err(candle_core::Error::wrap)
    }
    Ok(match config["model_type"].as_str().unwrap() {
        "mixtral" => {
            let mut model = mixtral::Model::new(&parsed(config)?, vb)?;
            Box::new(move |ids, position| model.forward(ids, position))
        }
        "qwen2_moe" => {
            let mut model = qwen2_moe::Model::new(&parsed(config)?, vb)?;
            Box::new(move |ids, position| model.forward(ids, position))
        }
        "qwen3_moe" => {
            let mut model = qwen3_moe::ModelForCausalLM::new(&parsed(config)?, vb)?;
            Box::new(move |ids, position| model.forward(ids, position))
        }
        "deepseek_v2" | "deepseek_v3" => {
            let mut model = deepseek2::DeepSeekV2::new(&parsed(config)?, vb)?;
            Box::new(move |ids, position| model.forward(ids, position))
        }
        other => panic!("no model for {other}"),
    })
}

/// Why candle-transformers has no such model.
fn refusal(config: &Value, vb: VarBuilder<'_>) -> String {
    theirs(config, vb).err().expect("a model").to_string()
}

/// Candle's own builder over the tensors in `directory`.
fn tensors(directory: &Path, dtype: DType) -> VarBuilder<'static> {
    let bytes = std::fs::read(directory.join("model.safetensors")).unwrap();
    VarBuilder::from_buffered_safetensors(bytes, dtype, &Device::Cpu).unwrap()
}

/// A checkpoint made of a family's: its tensors under the names that `rename` gives them, none, one or several each.
fn derived(family: &str, config: &Value, rename: impl Fn(&str) -> Vec<String>) -> TempDir {
    let checkpoint = Checkpoint::open(fixture(family)).unwrap();
    // All of them hold f32.
    let copies = checkpoint.tensors().iter().flat_map(|(stored, entry)| {
        let bytes = checkpoint.read(stored).unwrap();
        let named =
            move |name| NamedTensor { name, dtype: Dtype::F32, shape: entry.shape.clone(), bytes: bytes.clone() };
        rename(stored).into_iter().map(named)
    });
    written(config, &copies.collect::<Vec<_>>())
}

/// Qwen2-MoE's blocks 0 and 2, those with experts, and output weights of their own, which are the embedding's.
fn qwen2_moe_for_both(changes: Value) -> TempDir {
    let both = json!({ "num_hidden_layers": 2, "mlp_only_layers": [], "tie_word_embeddings": false });
    let rename = |name: &str| match name {
        "model.embed_tokens.weight" => vec![name.into(), "lm_head.weight".into()],
        name if name.starts_with("model.layers.1.") => vec![],
        name => vec![name.replace("layers.2.", "layers.1.")],
    };
    derived("qwen2_moe", &changed(config("qwen2_moe"), changed(both, changes)), rename)
}

fn written(config: &Value, tensors: &[NamedTensor]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("model.safetensors"), tensor_bytes(tensors, None).unwrap()).unwrap();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    directory
}

fn ours(directory: &Path, dtype: DType) -> Decoder {
    let files = Weights::open(directory).unwrap();
    Decoder::load(&files, &LoadOptions::default().with_dtype(dtype)).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, absolute and relative together.
fn difference(ours: &[f32], other: &[f32]) -> f32 {
    assert_eq!(ours.len(), other.len());
    ours.iter().zip(other).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max)
}

/// What a prompt of the goldens is, and transformers' logits for it.
fn golden(family: &str, prompt: usize) -> (Vec<u32>, Vec<f32>) {
    let goldens = Checkpoint::open(fixture(family).join("goldens.safetensors")).unwrap();
    let words = |name: &str| goldens.read(&format!("prompt.{prompt}.{name}")).unwrap().as_chunks::<4>().0.to_vec();
    let ids = words("ids").into_iter().map(u32::from_le_bytes).collect();
    (ids, words("logits").into_iter().map(f32::from_le_bytes).collect())
}

/// Our logits of `ids` at once, a row for each.
fn all_logits(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f32>> {
    let logits = decoder.forward(&Batch::new(&[ids]).unwrap(), &mut decoder.batch_state()).unwrap();
    values(&logits).chunks(decoder.spec().vocab).map(<[f32]>::to_vec).collect()
}

/// How far our model of a family is from transformers at most, over both prompts.
fn off_transformers(family: &str, dtype: DType) -> f32 {
    let decoder = ours(&fixture(family), dtype);
    let off = |prompt| {
        let (ids, logits) = golden(family, prompt);
        difference(&all_logits(&decoder, &ids).concat(), &logits)
    };
    off(0).max(off(1))
}

/// Fails where the logits of both differ by more than 1e-4, for every prefix of both prompts at once, and for the prompts in
/// pieces of one, two and five tokens. `build` gives a fresh model of theirs.
fn assert_same(decoder: &Decoder, family: &str, build: impl Fn() -> Theirs) {
    for prompt in 0..2 {
        let (ids, _) = golden(family, prompt);
        let input = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let close = |what: &str, ours: &[f32], theirs: &[f32]| {
            let off = difference(ours, theirs);
            assert!(off <= 1e-4, "{family}, prompt {prompt}, {what}: off by {off}");
        };
        let rows = all_logits(decoder, &ids);
        for (last, ours) in rows.iter().enumerate() {
            let theirs = values(&build()(&input(&ids[..=last]), 0).unwrap());
            close(&format!("{} tokens at once", last + 1), ours, &theirs);
        }
        for step in [1, 2, 5] {
            let (mut theirs, mut state, mut position) = (build(), decoder.generation_state(), 0);
            for piece in ids.chunks(step) {
                let ours = values(&decoder.forward(&Batch::new(&[piece]).unwrap(), &mut state).unwrap());
                let theirs = values(&theirs(&input(piece), position).unwrap());
                position += piece.len();
                let last = &ours[ours.len() - theirs.len()..];
                close(&format!("{position} tokens in steps of {step}"), last, &theirs);
                close(&format!("{position} tokens in steps of {step}, ours"), last, &rows[position - 1]);
            }
        }
    }
}
