//! A checkpoint of Qwen3-30B-A3B's shape: its configuration and its tensors in shards with an index, random or only as headers.
//!
//! 128 experts of width 768, top 8, hidden 2048, 32 heads on 4, all bf16; how many of the 48 layers and how much of the vocabulary is
//! for the caller to say. Tensors are written piece by piece, so that writing takes no memory.

use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

const HIDDEN: usize = 2048;
const WIDTH: usize = 768;
const EXPERTS: usize = 128;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 128;

/// How much of the model there is.
pub struct Shape {
    pub layers: usize,
    pub vocab: usize,
}

/// What a tensor holds.
#[derive(Clone, Copy, PartialEq)]
enum Fill {
    Ones,
    /// Uniform with this standard deviation.
    Random(f32),
}

type Tensor = (String, Vec<usize>, Fill);

impl Shape {
    /// The whole model.
    #[allow(dead_code)]
    pub const WHOLE: Self = Self { layers: 48, vocab: 151_936 };

    fn config(&self) -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
            "intermediate_size": 6144, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM, "vocab_size": self.vocab, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false, "use_sliding_window": false,
            "torch_dtype": "bfloat16", "eos_token_id": null, "bos_token_id": null,
        })
    }

    /// The tensors of one layer.
    fn layer(layer: usize) -> Vec<Tensor> {
        let of = |columns: usize| Fill::Random((columns as f32).powf(-0.5));
        let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let mut tensors = vec![
            (name("input_layernorm"), vec![HIDDEN], Fill::Ones),
            (name("post_attention_layernorm"), vec![HIDDEN], Fill::Ones),
            (name("self_attn.q_norm"), vec![HEAD_DIM], Fill::Ones),
            (name("self_attn.k_norm"), vec![HEAD_DIM], Fill::Ones),
            (name("self_attn.q_proj"), vec![queries, HIDDEN], of(HIDDEN)),
            (name("self_attn.k_proj"), vec![keys, HIDDEN], of(HIDDEN)),
            (name("self_attn.v_proj"), vec![keys, HIDDEN], of(HIDDEN)),
            (name("self_attn.o_proj"), vec![HIDDEN, queries], of(queries)),
            (name("mlp.gate"), vec![EXPERTS, HIDDEN], of(HIDDEN)),
        ];
        for expert in 0..EXPERTS {
            let parts = [("gate", [WIDTH, HIDDEN]), ("up", [WIDTH, HIDDEN]), ("down", [HIDDEN, WIDTH])];
            let tensor = |(part, shape): (&str, [usize; 2])| {
                (name(&format!("mlp.experts.{expert}.{part}_proj")), shape.to_vec(), of(shape[1]))
            };
            tensors.extend(parts.into_iter().map(tensor));
        }
        tensors
    }

    /// Writes the checkpoint into `directory`, a file for each layer. Without `data` there are only headers and room: files as long as
    /// they would be, which take no place on disk.
    pub fn write(&self, directory: &Path, data: bool) -> Result<()> {
        std::fs::create_dir_all(directory)?;
        let table = |name: &str| (name.to_owned(), vec![self.vocab, HIDDEN], Fill::Random(0.02));
        let norm = ("model.norm.weight".to_owned(), vec![HIDDEN], Fill::Ones);
        let rest = vec![table("model.embed_tokens.weight"), table("lm_head.weight"), norm];
        let mut index = Map::new();
        for shard in 0..=self.layers {
            let name = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.layers + 1);
            let tensors = if shard < self.layers { Self::layer(shard) } else { rest.clone() };
            index.extend(tensors.iter().map(|(tensor, ..)| (tensor.clone(), name.clone().into())));
            write_file(&directory.join(name), &tensors, data, shard as u64)?;
        }
        let index = json!({ "metadata": {}, "weight_map": index });
        std::fs::write(directory.join("model.safetensors.index.json"), index.to_string())?;
        std::fs::write(directory.join("config.json"), self.config().to_string())
    }
}

/// A safetensors file.
fn write_file(path: &Path, tensors: &[Tensor], data: bool, seed: u64) -> Result<()> {
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
    file.get_ref().set_len((8 + header.len() + end) as u64)
}

/// So many bf16 numbers: stretches from anywhere in a table, so that it is fast and no two experts are alike.
fn write_numbers(file: &mut impl Write, count: usize, fill: Fill, random: &mut u64) -> Result<()> {
    const TABLE: usize = 1 << 16;
    let mut draw = || {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *random >> 33
    };
    let mut number = || match fill {
        Fill::Ones => 1.0,
        Fill::Random(deviation) => deviation * 3.464 * (draw() as f32 / (1u64 << 31) as f32 - 0.5),
    };
    let table: Vec<u8> = (0..TABLE.min(2 * count)).flat_map(|_| half::bf16::from_f32(number()).to_le_bytes()).collect();
    let mut left = 2 * count;
    while left > 0 {
        let from = 2 * (draw() as usize % (table.len() / 4));
        let bytes = left.min(table.len() - from).min(TABLE);
        file.write_all(&table[from..][..bytes])?;
        left -= bytes;
    }
    Ok(())
}
