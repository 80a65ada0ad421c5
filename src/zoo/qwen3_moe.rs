//! Qwen3-MoE (`model_type: qwen3_moe`, arXiv 2505.09388): softmax, top-k, weights normalised where the configuration says so;
//! RMS norm on each head's queries and keys; some blocks may be dense.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::transformer;
use super::window;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ModelSpec, MoeSpec, QkNorm, SlidingWindow};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    models: "Qwen3-MoE, Qwen3-Coder-30B-A3B",
    gguf: &["qwen3moe"],
    checked: &["transformers", "llama.cpp"],
    reads: &["attention_bias", "use_qk_norm", "norm_topk_prob", "use_sliding_window", window::KEY],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let scoring = Scoring::softmax().normalized(config.optional_flag("norm_topk_prob")?.unwrap_or(false));
    // transformers reads both; what it writes may say either.
    let experts = if config.has("num_experts") { "num_experts" } else { "num_local_experts" };
    Ok(MoeSpec { scoring, ..transformer::moe_spec(config, experts, "moe_intermediate_size")? })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults::new(1e-6, 10_000.0, 32_768);
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    let attention_bias = transformer::attention_bias(config)?;
    let dense = transformer::qwen_dense_blocks(config, spec.layers)?;
    let window = match config.optional_flag("use_sliding_window")?.unwrap_or(false) {
        true => window::everywhere(config, spec.layers, spec.max_positions, Some(4096))?,
        false => SlidingWindow::default(),
    };
    Ok(ModelSpec { qk_norm: Some(QkNorm::PerHead), attention_bias, dense, window, ..spec })
}
