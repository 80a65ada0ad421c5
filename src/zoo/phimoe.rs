//! Phi-3.5-MoE (`model_type: phimoe`, arXiv 2404.14219): a sparse mixer of two experts, experts in `block_sparse_moe` with the
//! names of Mixtral's; layer norms, biases in attention and on the output. The published model's positions are
//! stretched by factors of their own (`longrope`); this runs it within those of its first training.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::mixtral;
use super::transformer;
use super::window;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ModelSpec, MoeSpec, Norm};

pub(super) const FAMILY: Family = Family {
    name: "phimoe",
    models: "Phi-3.5-MoE",
    gguf: &["phimoe"],
    checked: &["transformers"],
    reads: &["attention_bias", "lm_head_bias", window::KEY],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let spec = transformer::moe_spec(config, "num_local_experts", "intermediate_size")?;
    if spec.top_k != 2 {
        // Other numbers have no published meaning: transformers picks two, whatever the configuration says.
        return Err(config.error("num_experts_per_tok", "2", &spec.top_k.to_string()));
    }
    let unsaid = if config.has("router_jitter_noise") { 0.0 } else { 0.01 };
    let jitter = config.optional_number_or_zero("router_jitter_noise")?.unwrap_or(unsaid) as f32;
    Ok(MoeSpec { scoring: Scoring::sparse_mixer(jitter), names: mixtral::names(), ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults { magnitudes: true, ..Defaults::new(1e-5, 1e6, 131_072) };
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    Ok(ModelSpec {
        norm: Norm::Layer,
        window: window::everywhere(config, spec.layers, spec.max_positions, None)?,
        attention_bias: transformer::attention_bias(config)?,
        output_bias: config.optional_flag("lm_head_bias")?.unwrap_or(false),
        ffn: "block_sparse_moe".into(),
        ..spec
    })
}
