//! Sizes of MoE blocks and the formats that weights are stored in.

use candle_core::DType;
use candle_core::quantized::GgmlDType;

/// Bytes and weights of a block of `mxfp4` (OCP Microscaling Formats 1.0).
pub const MXFP4_BLOCK: (usize, usize) = (17, 32);

/// Sizes of one MoE block.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub width: usize,
    pub experts: usize,
    pub top_k: usize,
}

const fn shape(name: &'static str, hidden: usize, width: usize, experts: usize, top_k: usize) -> Shape {
    Shape { name, hidden, width, experts, top_k }
}

/// `quarter` is a quarter of OLMoE's block in every direction but top_k, `B` OLMoE's, `C` that of Qwen3-30B-A3B, `gpt-oss` that of
/// gpt-oss-20b without its biases.
pub const SHAPES: [Shape; 6] = [
    shape("tiny", 128, 64, 32, 4),
    shape("quarter", 1024, 512, 32, 8),
    shape("B", 2048, 1024, 64, 8),
    shape("C", 2048, 768, 128, 8),
    shape("mixtral", 4096, 14336, 8, 2),
    shape("gpt-oss", 2880, 2880, 32, 4),
];

impl Shape {
    pub fn named(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// Weights of one expert.
    pub fn expert_weights(&self) -> usize {
        3 * self.hidden * self.width
    }

    /// How many blocks must take turns so that no weight is still in a cache when it is touched again.
    pub fn blocks(&self, format: Format) -> usize {
        const OUT_OF_CACHE: f64 = 512e6;
        (OUT_OF_CACHE / (self.experts as f64 * self.expert_bytes(format))).ceil() as usize
    }

    pub fn expert_bytes(&self, format: Format) -> f64 {
        let (bytes, weights) = format.block();
        self.expert_weights() as f64 * bytes as f64 / weights as f64
    }
}

/// How the experts' weights are stored.
#[derive(Clone, Copy)]
pub struct Format {
    pub name: &'static str,
    /// `None` for `mxfp4`, which Candle does not have.
    pub dtype: Option<GgmlDType>,
}

const fn format(name: &'static str, dtype: GgmlDType) -> Format {
    Format { name, dtype: Some(dtype) }
}

pub const FORMATS: [Format; 8] = [
    format("f32", GgmlDType::F32),
    format("bf16", GgmlDType::BF16),
    format("f16", GgmlDType::F16),
    format("q8_0", GgmlDType::Q8_0),
    format("q4_K", GgmlDType::Q4K),
    format("q5_K", GgmlDType::Q5K),
    format("q6_K", GgmlDType::Q6K),
    Format { name: "mxfp4", dtype: None },
];

impl Format {
    pub fn named(name: &str) -> Option<Self> {
        FORMATS.into_iter().find(|format| format.name == name)
    }

    /// Of gate, input and output: the format's own, or f32 beside quantised experts.
    pub fn activations(&self) -> DType {
        match self.dtype {
            Some(GgmlDType::BF16) => DType::BF16,
            Some(GgmlDType::F16) => DType::F16,
            _ => DType::F32,
        }
    }

    pub fn is_quantised(&self) -> bool {
        self.block().1 > 1
    }

    /// Bytes and weights of a block.
    pub fn block(&self) -> (usize, usize) {
        match self.dtype {
            Some(dtype) => (dtype.type_size(), dtype.block_size()),
            None => MXFP4_BLOCK,
        }
    }

    /// Whether rows of these sizes are whole numbers of the format's blocks.
    pub fn fits(&self, shape: Shape) -> bool {
        [shape.hidden, shape.width].into_iter().all(|columns| columns.is_multiple_of(self.block().1))
    }

    /// How far two correct sides may differ, relative to the largest value.
    pub fn tolerance(&self) -> f32 {
        if self.dtype == Some(GgmlDType::F32) { 1e-4 } else { 5e-2 }
    }

    /// Gate logits nearer to each other than this may change places by rounding alone.
    pub fn rounding(&self) -> f32 {
        if self.activations() == DType::F32 { 1e-4 } else { 0.05 }
    }
}
