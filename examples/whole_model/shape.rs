//! Models by their shapes: which tensors one has, of which type each is stored, and how much of them a token reads.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;

/// Sizes of a model of the architecture `olmoe`, `qwen3moe` or `qwen35moe`.
#[derive(Clone)]
pub struct Shape {
    pub name: &'static str,
    /// As GGUF calls it.
    pub architecture: &'static str,
    pub layers: usize,
    pub vocab: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub experts: usize,
    pub width: usize,
    pub top_k: usize,
    pub rope_base: f32,
    pub epsilon: f32,
    /// Width of an expert that every token meets; 0 for none.
    pub shared: usize,
    /// Gated delta nets in three of four layers.
    pub net: Option<Net>,
}

/// Sizes of a gated delta net whose keys are as wide as its values.
#[derive(Clone, Copy)]
pub struct Net {
    pub key_heads: usize,
    pub value_heads: usize,
    pub width: usize,
    pub conv: usize,
}

/// Which layers have attention beside delta nets: each so many-th.
pub const INTERVAL: usize = 4;

/// OLMoE-1B-7B, half of its 16 layers.
const OLMOE: Shape = Shape {
    name: "olmoe",
    architecture: "olmoe",
    layers: 8,
    vocab: 50_304,
    hidden: 2048,
    heads: 16,
    kv_heads: 16,
    head_dim: 128,
    experts: 64,
    width: 1024,
    top_k: 8,
    rope_base: 1e4,
    epsilon: 1e-5,
    shared: 0,
    net: None,
};

/// Qwen3-30B-A3B, six of its 48 layers.
const QWEN3: Shape = Shape {
    name: "qwen3-30b",
    architecture: "qwen3moe",
    layers: 6,
    vocab: 151_936,
    heads: 32,
    kv_heads: 4,
    experts: 128,
    width: 768,
    rope_base: 1e6,
    epsilon: 1e-6,
    ..OLMOE
};

/// Qwen3.5-35B-A3B, four of its 40 layers.
const QWEN35: Shape = Shape {
    name: "qwen3.5-35b",
    architecture: "qwen35moe",
    layers: 4,
    vocab: 248_320,
    kv_heads: 2,
    head_dim: 256,
    experts: 256,
    width: 512,
    rope_base: 1e7,
    epsilon: 1e-6,
    shared: 512,
    net: Some(Net { key_heads: 16, value_heads: 32, width: 128, conv: 4 }),
    ..OLMOE
};

/// To see that everything runs.
pub const SMOKE: Shape = Shape {
    name: "smoke",
    layers: 2,
    vocab: 512,
    hidden: 256,
    heads: 2,
    kv_heads: 2,
    experts: 16,
    width: 256,
    top_k: 2,
    ..OLMOE
};

/// How the matrices of a file are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mixture {
    Bf16,
    Q8_0,
    Q4KM,
}

impl Mixture {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4KM => "q4_K_M",
        }
    }

    /// llama.cpp's number (`llama_ftype`).
    pub fn file_type(self) -> u32 {
        match self {
            Self::Bf16 => 32,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
        }
    }

    /// The type of a matrix. Q4_K_M as `llama_tensor_get_type_impl` of llama.cpp's `src/llama-quant.cpp` has it for models of another
    /// number of experts than eight, whose keys and values are wider.
    fn dtype(self, matrix: Matrix, layers: usize) -> GgmlDType {
        let more_bits = |layer: usize| {
            let eighth = layers / 8;
            layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
        };
        match (self, matrix) {
            (Self::Bf16, _) => GgmlDType::BF16,
            (Self::Q8_0, _) => GgmlDType::Q8_0,
            (Self::Q4KM, Matrix::Output) => GgmlDType::Q6K,
            (Self::Q4KM, Matrix::ValuesOrDown(layer)) if more_bits(layer) => GgmlDType::Q6K,
            (Self::Q4KM, _) => GgmlDType::Q4K,
        }
    }
}

impl std::str::FromStr for Mixture {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::Bf16, Self::Q8_0, Self::Q4KM];
        all.into_iter()
            .find(|mixture| mixture.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| format!("unknown type `{name}`: expected bf16, q8_0, q4_K_M"))
    }
}

/// What decides a matrix's type.
#[derive(Clone, Copy)]
enum Matrix {
    Output,
    /// `attn_v` or `ffn_down` of a layer.
    ValuesOrDown(usize),
    Other,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Fill {
    Ones,
    /// Minus one: how fast a delta net's heads forget.
    MinusOnes,
    /// This standard deviation.
    Random(f32),
}

pub struct Tensor {
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    pub dtype: GgmlDType,
    pub fill: Fill,
    /// How much of it one token reads.
    share: f64,
}

impl Tensor {
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn bytes(&self) -> usize {
        self.count() / self.dtype.block_size() * self.dtype.type_size()
    }
}

impl Shape {
    pub fn named(name: &str) -> Result<Self, String> {
        let known = [OLMOE, QWEN3, QWEN35].into_iter().find(|shape| shape.name == name);
        known.ok_or_else(|| format!("unknown shape `{name}`: expected olmoe, qwen3-30b, qwen3.5-35b"))
    }

    pub fn tensors(&self, mixture: Mixture) -> Vec<Tensor> {
        let Self { layers, vocab, hidden, head_dim, experts, width, .. } = *self;
        let (queries, keys) = (self.heads * head_dim, self.kv_heads * head_dim);
        let norm = |name: String, length: usize| Tensor {
            name,
            shape: vec![length],
            dtype: GgmlDType::F32,
            fill: Fill::Ones,
            share: 1.0,
        };
        let matrix = |name: String, shape: Vec<usize>, kind: Matrix, share: f64| {
            let fill = Fill::Random((shape[shape.len() - 1] as f32).powf(-0.5));
            Tensor { name, shape, dtype: mixture.dtype(kind, layers), fill, share }
        };
        let mut tensors = vec![
            matrix("token_embd.weight".into(), vec![vocab, hidden], Matrix::Other, 1.0 / vocab as f64),
            norm("output_norm.weight".into(), hidden),
            matrix("output.weight".into(), vec![vocab, hidden], Matrix::Output, 1.0),
        ];
        // OLMoE normalises queries and keys of all heads at once, Qwen3 those of each.
        let normed = if self.architecture == "olmoe" { [queries, keys] } else { [head_dim; 2] };
        let active = self.top_k as f64 / experts as f64;
        let small = |name: String, shape: Vec<usize>, fill: Fill| Tensor {
            name,
            shape,
            dtype: GgmlDType::F32,
            fill,
            share: 1.0,
        };
        for layer in 0..layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let heavy = Matrix::ValuesOrDown(layer);
            let gate = matrix(name("ffn_gate_inp"), vec![experts, hidden], Matrix::Other, 1.0);
            let ffn_norm = if self.net.is_some() { "post_attention_norm" } else { "ffn_norm" };
            match self.net.filter(|_| (layer + 1) % INTERVAL != 0) {
                Some(Net { key_heads, value_heads, width, conv }) => {
                    let (values, channels) = (value_heads * width, (2 * key_heads + value_heads) * width);
                    tensors.extend([
                        matrix(name("attn_qkv"), vec![channels, hidden], Matrix::Other, 1.0),
                        matrix(name("attn_gate"), vec![values, hidden], Matrix::Other, 1.0),
                        matrix(name("ssm_alpha"), vec![value_heads, hidden], Matrix::Other, 1.0),
                        matrix(name("ssm_beta"), vec![value_heads, hidden], Matrix::Other, 1.0),
                        matrix(name("ssm_out"), vec![hidden, values], Matrix::Other, 1.0),
                        small(name("ssm_conv1d"), vec![channels, conv], Fill::Random(0.5)),
                        small(format!("blk.{layer}.ssm_dt.bias"), vec![value_heads], Fill::Ones),
                        small(format!("blk.{layer}.ssm_a"), vec![value_heads], Fill::MinusOnes),
                        norm(name("ssm_norm"), width),
                    ]);
                }
                None => {
                    // Behind each query of a delta net's model stands a gate.
                    let rows = if self.net.is_some() { 2 * queries } else { queries };
                    tensors.extend([
                        norm(name("attn_q_norm"), normed[0]),
                        norm(name("attn_k_norm"), normed[1]),
                        matrix(name("attn_q"), vec![rows, hidden], Matrix::Other, 1.0),
                        matrix(name("attn_k"), vec![keys, hidden], Matrix::Other, 1.0),
                        matrix(name("attn_v"), vec![keys, hidden], heavy, 1.0),
                        matrix(name("attn_output"), vec![hidden, queries], Matrix::Other, 1.0),
                    ]);
                }
            }
            tensors.extend([
                norm(name("attn_norm"), hidden),
                norm(name(ffn_norm), hidden),
                Tensor { dtype: GgmlDType::F32, ..gate },
                matrix(name("ffn_gate_exps"), vec![experts, width, hidden], Matrix::Other, active),
                matrix(name("ffn_up_exps"), vec![experts, width, hidden], Matrix::Other, active),
                matrix(name("ffn_down_exps"), vec![experts, hidden, width], heavy, active),
            ]);
            if self.shared > 0 {
                tensors.extend([
                    small(name("ffn_gate_inp_shexp"), vec![hidden], Fill::Random((hidden as f32).powf(-0.5))),
                    matrix(name("ffn_gate_shexp"), vec![self.shared, hidden], Matrix::Other, 1.0),
                    matrix(name("ffn_up_shexp"), vec![self.shared, hidden], Matrix::Other, 1.0),
                    matrix(name("ffn_down_shexp"), vec![hidden, self.shared], heavy, 1.0),
                ]);
            }
        }
        tensors
    }

    /// Bytes of weights that a token reads, as stored, by type.
    pub fn step_bytes(&self, mixture: Mixture) -> BTreeMap<&'static str, f64> {
        let mut bytes = BTreeMap::new();
        for tensor in self.tensors(mixture) {
            *bytes.entry(type_name(tensor.dtype)).or_default() += tensor.share * tensor.bytes() as f64;
        }
        bytes
    }

    /// Bytes of keys and values of so many positions, two for each number, and of the states of delta nets, which are read and written.
    pub fn kv_bytes(&self, positions: usize) -> f64 {
        let with_attention = if self.net.is_some() { self.layers / INTERVAL } else { self.layers };
        let state = self.net.map_or(0, |net| 2 * 4 * net.value_heads * net.width * net.width);
        let kept = 2 * 2 * with_attention * self.kv_heads * self.head_dim * positions;
        (kept + (self.layers - with_attention) * state) as f64
    }
}

pub fn type_name(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::BF16 => "bf16",
        GgmlDType::Q8_0 => "q8_0",
        GgmlDType::Q4K => "q4_K",
        GgmlDType::Q6K => "q6_K",
        _ => "f32",
    }
}
