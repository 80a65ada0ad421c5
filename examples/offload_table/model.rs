//! A checkpoint of OLMoE's shape with random weights: four layers of 64 experts, 3.2 GB in bf16.

use std::path::{Path, PathBuf};

use anyhow::Result;
use half::bf16;
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;

const HIDDEN: usize = 2048;
const WIDTH: usize = 1024;
const EXPERTS: usize = 64;
const LAYERS: usize = 4;
const VOCAB: usize = 1024;

/// Bf16 numbers of a uniform distribution with this standard deviation.
fn tensor(rng: &mut ChaCha8Rng, name: String, shape: &[usize], deviation: f32) -> NamedTensor {
    let count: usize = shape.iter().product();
    // A period of numbers from anywhere in a table: fast, and no two experts are alike.
    let table: Vec<u8> = (0..65_536)
        .flat_map(|_| bf16::from_f32(deviation * 1.732 * rng.random_range(-1.0f32..1.0)).to_le_bytes())
        .collect();
    let mut bytes = Vec::with_capacity(2 * count);
    while bytes.len() < 2 * count {
        let from = 2 * rng.random_range(0..32_768);
        bytes.extend_from_slice(&table[from..][..(2 * count - bytes.len()).min(65_536)]);
    }
    NamedTensor { name, dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
}

/// Writes the checkpoint into `directory`, a file for each layer, where it is not there yet.
pub fn write(directory: &Path) -> Result<PathBuf> {
    let config = directory.join("config.json");
    if config.exists() {
        return Ok(directory.to_path_buf());
    }
    std::fs::create_dir_all(directory)?;
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let deviation = (HIDDEN as f32).powf(-0.5);
    let mut index = serde_json::Map::new();
    let mut save = |name: &str, tensors: Vec<NamedTensor>| -> Result<()> {
        for tensor in &tensors {
            index.insert(tensor.name.clone(), name.into());
        }
        Ok(std::fs::write(directory.join(name), tensor_bytes(&tensors, None)?)?)
    };
    for layer in 0..LAYERS {
        eprintln!("writing layer {layer} of {LAYERS} to {}", directory.display());
        let prefix = format!("model.layers.{layer}");
        let mut tensors = Vec::new();
        for norm in ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"] {
            let ones = vec![bf16::ONE; HIDDEN].iter().flat_map(|one| one.to_le_bytes()).collect();
            let name = format!("{prefix}.{norm}.weight");
            tensors.push(NamedTensor { name, dtype: Dtype::BF16, shape: vec![HIDDEN], bytes: ones });
        }
        for part in ["q", "k", "v", "o"] {
            let name = format!("{prefix}.self_attn.{part}_proj.weight");
            tensors.push(tensor(&mut rng, name, &[HIDDEN, HIDDEN], deviation));
        }
        tensors.push(tensor(&mut rng, format!("{prefix}.mlp.gate.weight"), &[EXPERTS, HIDDEN], deviation));
        for expert in 0..EXPERTS {
            for (part, shape) in [("gate", [WIDTH, HIDDEN]), ("up", [WIDTH, HIDDEN]), ("down", [HIDDEN, WIDTH])] {
                let name = format!("{prefix}.mlp.experts.{expert}.{part}_proj.weight");
                tensors.push(tensor(&mut rng, name, &shape, deviation));
            }
        }
        save(&format!("layer-{layer}.safetensors"), tensors)?;
    }
    let ones = vec![bf16::ONE; HIDDEN].iter().flat_map(|one| one.to_le_bytes()).collect();
    let norm = NamedTensor { name: "model.norm.weight".into(), dtype: Dtype::BF16, shape: vec![HIDDEN], bytes: ones };
    let table = tensor(&mut rng, "model.embed_tokens.weight".into(), &[VOCAB, HIDDEN], 1.0);
    save("rest.safetensors", vec![norm, table])?;
    let index = serde_json::json!({ "weight_map": index });
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string())?;
    let text = serde_json::json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "num_experts": EXPERTS, "num_experts_per_tok": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCAB, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "norm_topk_prob": false, "tie_word_embeddings": true, "hidden_act": "silu",
        "attention_bias": false, "torch_dtype": "bfloat16",
    });
    // Last: a directory that has it is whole.
    std::fs::write(config, text.to_string())?;
    Ok(directory.to_path_buf())
}
