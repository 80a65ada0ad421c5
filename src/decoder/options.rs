//! In which dtype and where a decoder holds its weights.

use candle_core::{DType, Device};

use crate::offload::cache::CacheOptions;
use crate::parallel::ExpertParallel;

/// In which dtype and where to hold the weights.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Dtype of activations. On the CPU weights stay as they are stored and activations are floats, which products with bf16 weights may round
    /// to bf16 where this is `BF16`; on other devices weights become tensors of it, but for experts of a GGUF file.
    pub dtype: DType,
    /// Dtype in which keys and values are kept on the CPU, `F32`, `F16` or `BF16`; `None` for `F32` beside
    /// activations in `F32` and `F16` beside others.
    pub kv_dtype: Option<DType>,
    /// Device of the weights.
    pub device: Device,
    /// Experts stay in their files, in their dtype there, and come into memory within a budget; `None` loads all of them.
    pub expert_cache: Option<CacheOptions>,
    /// Experts over the ranks of a job: this process loads its own; with a cache, the budget is each rank's. `None` has all of them here.
    pub parallel: Option<ExpertParallel>,
}

impl Default for LoadOptions {
    /// `f32` on the CPU, all experts in memory.
    fn default() -> Self {
        Self { dtype: DType::F32, kv_dtype: None, device: Device::Cpu, expert_cache: None, parallel: None }
    }
}

impl LoadOptions {
    /// The dtype of keys and values.
    pub(super) fn kept_dtype(&self) -> DType {
        let usual = if self.dtype == DType::F32 { DType::F32 } else { DType::F16 };
        self.kv_dtype.unwrap_or(usual)
    }

    /// The same in another dtype.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The same with experts over ranks, or all of them here.
    pub fn with_parallel(self, parallel: impl Into<Option<ExpertParallel>>) -> Self {
        Self { parallel: parallel.into(), ..self }
    }

    /// The same with experts in a cache, or without one.
    pub fn with_expert_cache(self, expert_cache: impl Into<Option<CacheOptions>>) -> Self {
        Self { expert_cache: expert_cache.into(), ..self }
    }
}
