//! Qwen2-MoE (`model_type: qwen2_moe`, Qwen1.5-MoE): softmax, top-k, weights as they are; an expert that all tokens share,
//! weighed by a sigmoid; biases on queries, keys and values; some blocks may be dense.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::transformer;
use super::window;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{AttentionBias, ModelSpec, MoeSpec, SharedExperts};

pub(super) const FAMILY: Family = Family {
    name: "qwen2_moe",
    models: "Qwen1.5-MoE, Qwen2-MoE",
    gguf: &["qwen2moe"],
    checked: &["transformers", "llama.cpp"],
    reads: &[
        "qkv_bias",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "layer_types",
        "use_sliding_window",
        window::KEY,
    ],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let shared = SharedExperts { width: config.size("shared_expert_intermediate_size")?, gated: true };
    let scoring = Scoring::softmax().normalized(config.optional_flag("norm_topk_prob")?.unwrap_or(false));
    let spec = transformer::moe_spec(config, "num_experts", "moe_intermediate_size")?;
    Ok(MoeSpec { shared: Some(shared), scoring, ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults::new(1e-6, 10_000.0, 32_768);
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    let attention_bias = match config.optional_flag("qkv_bias")?.unwrap_or(true) {
        true => AttentionBias::Inputs,
        false => AttentionBias::None,
    };
    let window = match config.optional_flag("use_sliding_window")?.unwrap_or(false) {
        true => {
            let first = config.optional_size("max_window_layers")?.unwrap_or(28);
            let unsaid = |block: usize| block.is_multiple_of(2) && block < first;
            window::by_block(config, spec.layers, spec.max_positions, unsaid, 4096)?
        }
        false => window::nowhere(config)?,
    };
    Ok(ModelSpec { attention_bias, dense: transformer::qwen_dense_blocks(config, spec.layers)?, window, ..spec })
}
