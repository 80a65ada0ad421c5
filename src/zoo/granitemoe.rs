//! Granite MoE (`model_type: granitemoe`): top-k, then softmax, which is softmax and weights normalised; experts stacked under
//! names of their own; constants on embeddings, residuals, attention and logits.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ExpertNames, ModelSpec, MoeSpec, Multipliers};

pub(super) const FAMILY: Family = Family {
    name: "granitemoe",
    models: "Granite 3 MoE",
    gguf: &["granitemoe"],
    checked: &["transformers", "llama.cpp"],
    reads: &["attention_bias", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let [gate, stacked_gate_up, stacked_down] =
        ["router.layer", "input_linear.weight", "output_linear.weight"].map(String::from);
    let names = ExpertNames { gate, stacked_gate_up, stacked_down, ..ExpertNames::default() };
    let spec = transformer::moe_spec(config, "num_local_experts", "intermediate_size")?;
    Ok(MoeSpec { scoring: Scoring::softmax().normalized(true), names, ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults::new(1e-6, 10_000.0, 2048);
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    let number = |key: &str| -> Result<f64> { Ok(config.optional_number(key)?.unwrap_or(1.0)) };
    let multipliers = Multipliers {
        embedding: number("embedding_multiplier")?,
        residual: number("residual_multiplier")?,
        attention: Some(number("attention_multiplier")?),
        logits: 1.0 / number("logits_scaling")?,
    };
    let attention_bias = transformer::attention_bias(config)?;
    Ok(ModelSpec { ffn: "block_sparse_moe".into(), multipliers, attention_bias, ..spec })
}
