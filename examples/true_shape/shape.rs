//! Checkpoints of published models' shapes: their configuration and their tensors in shards with an index, random or only as headers.
//!
//! Sizes are those of the published `config.json`; how many of the layers and how much of the vocabulary is for the caller to say. Which
//! tensors there are is what a decoder asks for when it is built of such a configuration. They are written piece by piece, so that writing
//! takes no memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use phase_moe::{Decoder, zoo};
use serde_json::{Map, Value, json};

/// A published model.
pub struct Shape {
    config: Value,
}

/// What a tensor holds.
#[derive(Clone, Copy, PartialEq)]
enum Fill {
    All(f32),
    /// Uniform with this standard deviation.
    Random(f32),
}

type Stored = (String, Vec<usize>, Fill);

/// Names of the shapes.
pub const NAMES: [&str; 7] =
    ["qwen3-30b", "qwen3.5-35b", "qwen3-next-80b", "lfm2-8b", "glm-4.7-flash", "minimax-m2", "gpt-oss-20b"];

impl Shape {
    /// The whole model of that name.
    pub fn named(name: &str) -> Result<Self, String> {
        let lfm2_layers: Vec<&str> = (0..24)
            .map(|layer| if [2, 6, 10, 14, 18, 21].contains(&layer) { "full_attention" } else { "conv" })
            .collect();
        let delta_nets = json!({
            "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "rms_norm_eps": 1e-6,
            "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "max_position_embeddings": 262_144,
            "full_attention_interval": 4, "partial_rotary_factor": 0.25, "rope_theta": 1e7, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        });
        let with = |own: Value| -> Value {
            let mut all = delta_nets.clone();
            if let (Value::Object(all), Value::Object(own)) = (&mut all, own) {
                all.extend(own);
            }
            all
        };
        let config = match name {
            "qwen3-30b" => json!({
                "model_type": "qwen3_moe", "num_hidden_layers": 48, "vocab_size": 151_936, "hidden_size": 2048,
                "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40_960,
                "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": true,
            }),
            "qwen3.5-35b" => with(json!({
                "model_type": "qwen3_5_moe_text", "num_hidden_layers": 40, "vocab_size": 248_320, "num_experts": 256, "num_experts_per_tok": 8,
            })),
            "qwen3-next-80b" => with(json!({
                "model_type": "qwen3_next", "num_hidden_layers": 48, "vocab_size": 151_936, "num_experts": 512, "num_experts_per_tok": 10,
                "norm_topk_prob": true,
            })),
            "lfm2-8b" => json!({
                "model_type": "lfm2_moe", "num_hidden_layers": 24, "vocab_size": 65_536, "hidden_size": 2048, "intermediate_size": 7168,
                "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4, "num_dense_layers": 2,
                "num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3, "layer_types": lfm2_layers,
                "max_position_embeddings": 128_000, "rope_theta": 1e6, "norm_topk_prob": true, "use_expert_bias": true,
            }),
            "glm-4.7-flash" => json!({
                "model_type": "glm4_moe_lite", "num_hidden_layers": 47, "vocab_size": 154_880, "hidden_size": 2048,
                "intermediate_size": 10_240, "moe_intermediate_size": 1536, "n_routed_experts": 64, "num_experts_per_tok": 4,
                "n_shared_experts": 1, "first_k_dense_replace": 1, "num_attention_heads": 20, "num_key_value_heads": 20,
                "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
                "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": true, "rope_theta": 1e6,
                "max_position_embeddings": 202_752,
            }),
            "minimax-m2" => json!({
                "model_type": "minimax_m2", "num_hidden_layers": 62, "vocab_size": 200_064, "hidden_size": 3072,
                "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8, "num_attention_heads": 48,
                "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 5e6, "max_position_embeddings": 196_608,
                "scoring_func": "sigmoid", "use_routing_bias": true, "use_qk_norm": true,
            }),
            "gpt-oss-20b" => json!({
                "model_type": "gpt_oss", "num_hidden_layers": 24, "vocab_size": 201_088, "hidden_size": 2880,
                "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64,
                "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rope_theta": 150_000.0,
            }),
            other => return Err(format!("unknown shape `{other}`: expected {}", NAMES.join(", "))),
        };
        Ok(Self { config })
    }

    /// How many layers there are, and how many words.
    pub fn size(&self) -> [u64; 2] {
        ["num_hidden_layers", "vocab_size"].map(|key| self.config[key].as_u64().unwrap_or_default())
    }

    /// The same with fewer of them: the last layers, the dense ones among the first being fewer than those.
    pub fn cut(mut self, layers: u64, vocab: u64) -> Self {
        let [whole, _] = self.size();
        if let Some(Value::Array(kinds)) = self.config.get_mut("layer_types") {
            kinds.drain(..kinds.len().saturating_sub(layers as usize));
        } else if let Some(interval) = self.config["full_attention_interval"].as_u64() {
            let kind = |layer: u64| if layer.is_multiple_of(interval) { "full_attention" } else { "linear_attention" };
            self.config["layer_types"] = (whole - layers + 1..=whole).map(kind).collect();
        }
        for key in ["num_dense_layers", "first_k_dense_replace"] {
            if let Some(dense) = self.config[key].as_u64() {
                self.config[key] = dense.min(layers.saturating_sub(1)).into();
            }
        }
        self.config["num_hidden_layers"] = layers.into();
        self.config["vocab_size"] = vocab.into();
        self
    }

    /// The text of its `config.json`.
    pub fn config(&self) -> String {
        self.config.to_string()
    }

    /// The tensors that a decoder asks for.
    fn tensors(&self) -> Result<Vec<Stored>> {
        let spec = zoo::parse_config(&self.config(), "config.json")?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let recorder = Box::new(Recorder(asked.clone()));
        Decoder::new(&spec, VarBuilder::from_backend(recorder, DType::F32, Device::Cpu))?;
        let asked = std::mem::take(&mut *asked.lock().map_err(|_| anyhow::anyhow!("a recorder that failed"))?);
        ensure!(!asked.is_empty(), "a decoder asked for nothing");
        Ok(asked)
    }

    /// Writes the checkpoint into `directory`, a file for each layer. Without `data` there are only headers and room: files as long as
    /// they would be, which take no place on disk.
    pub fn write(&self, directory: &Path, data: bool) -> Result<()> {
        std::fs::create_dir_all(directory)?;
        let (layers, tensors) = (self.size()[0], self.tensors()?);
        let shard_of = |name: &str| {
            let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
            layer.unwrap_or(layers)
        };
        let mut index = Map::new();
        for shard in 0..=layers {
            let name = format!("model-{:05}-of-{:05}.safetensors", shard + 1, layers + 1);
            let own: Vec<&Stored> = tensors.iter().filter(|(name, ..)| shard_of(name) == shard).collect();
            index.extend(own.iter().map(|(tensor, ..)| (tensor.clone(), name.clone().into())));
            write_file(&directory.join(name), &own, data, shard)?;
        }
        let index = json!({ "metadata": {}, "weight_map": index });
        std::fs::write(directory.join("model.safetensors.index.json"), index.to_string())?;
        std::fs::write(directory.join("config.json"), self.config()).context("config.json")
    }
}

/// Takes note of what is asked for, and gives one number in as many places.
struct Recorder(Arc<Mutex<Vec<Stored>>>);

impl SimpleBackend for Recorder {
    fn get(
        &self,
        shape: candle_core::Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let fill = match (shape.dims(), init) {
            ([_], Init::Const(number)) => Fill::All(number as f32),
            ([_], _) => Fill::Random(0.5),
            (dims, _) => Fill::Random((dims[dims.len() - 1] as f32).powf(-0.5)),
        };
        if let Ok(mut asked) = self.0.lock() {
            asked.push((name.to_owned(), shape.dims().to_vec(), fill));
        }
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("tensor `{name}`: expected a shape, got none")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}

/// A safetensors file.
fn write_file(path: &Path, tensors: &[&Stored], data: bool, seed: u64) -> Result<()> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape, _) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::from(header).to_string();
    // Data begin at a whole page, as most writers have it in eights.
    header.extend(std::iter::repeat_n(' ', (8 + header.len()).next_multiple_of(4096) - 8 - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    if data {
        let mut random = seed;
        tensors
            .iter()
            .try_for_each(|(_, shape, fill)| write_numbers(&mut file, shape.iter().product(), *fill, &mut random))?;
    }
    file.flush()?;
    Ok(file.get_ref().set_len((8 + header.len() + end) as u64)?)
}

/// So many bf16 numbers: stretches from anywhere in a table, so that it is fast and no two experts are alike.
fn write_numbers(file: &mut impl Write, count: usize, fill: Fill, random: &mut u64) -> Result<()> {
    const TABLE: usize = 1 << 16;
    let mut draw = || {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *random >> 33
    };
    let mut number = || match fill {
        Fill::All(number) => number,
        Fill::Random(deviation) => deviation * 3.464 * (draw() as f32 / (1u64 << 31) as f32 - 0.5),
    };
    let table: Vec<u8> = (0..TABLE.min(2 * count)).flat_map(|_| half::bf16::from_f32(number()).to_le_bytes()).collect();
    let mut left = 2 * count;
    while left > 0 {
        let from = 2 * (draw() as usize % (table.len() / 4).max(1));
        let bytes = left.min(table.len() - from).min(TABLE);
        file.write_all(&table[from..][..bytes])?;
        left -= bytes;
    }
    Ok(())
}
