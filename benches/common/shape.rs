//! Sizes of MoE blocks and the formats that weights are stored in.

use candle_core::DType;
use candle_core::quantized::GgmlDType;

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

/// `quarter` is a quarter of OLMoE's block in every direction but top_k, `B` OLMoE's, `C` that of Qwen3-30B-A3B.
pub const SHAPES: [Shape; 5] = [
    shape("tiny", 128, 64, 32, 4),
    shape("quarter", 1024, 512, 32, 8),
    shape("B", 2048, 1024, 64, 8),
    shape("C", 2048, 768, 128, 8),
    shape("mixtral", 4096, 14336, 8, 2),
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
        self.expert_weights() as f64 * format.dtype.type_size() as f64 / format.dtype.block_size() as f64
    }
}

/// How the experts' weights are stored.
#[derive(Clone, Copy)]
pub struct Format {
    pub name: &'static str,
    pub dtype: GgmlDType,
}

const fn format(name: &'static str, dtype: GgmlDType) -> Format {
    Format { name, dtype }
}

pub const FORMATS: [Format; 6] = [
    format("f32", GgmlDType::F32),
    format("bf16", GgmlDType::BF16),
    format("f16", GgmlDType::F16),
    format("q8_0", GgmlDType::Q8_0),
    format("q4_K", GgmlDType::Q4K),
    format("q6_K", GgmlDType::Q6K),
];

impl Format {
    pub fn named(name: &str) -> Option<Self> {
        FORMATS.into_iter().find(|format| format.name == name)
    }

    /// Of gate, input and output: the format's own, or f32 beside quantised experts.
    pub fn activations(&self) -> DType {
        match self.dtype {
            GgmlDType::BF16 => DType::BF16,
            GgmlDType::F16 => DType::F16,
            _ => DType::F32,
        }
    }

    pub fn is_quantised(&self) -> bool {
        self.dtype.block_size() > 1
    }

    /// Whether rows of these sizes are whole numbers of the format's blocks.
    pub fn fits(&self, shape: Shape) -> bool {
        [shape.hidden, shape.width].into_iter().all(|columns| columns.is_multiple_of(self.dtype.block_size()))
    }

    /// How far two correct sides may differ, relative to the largest value.
    pub fn tolerance(&self) -> f32 {
        if self.dtype == GgmlDType::F32 { 1e-4 } else { 5e-2 }
    }

    /// Gate logits nearer to each other than this may change places by rounding alone.
    pub fn rounding(&self) -> f32 {
        if self.activations() == DType::F32 { 1e-4 } else { 0.05 }
    }
}
