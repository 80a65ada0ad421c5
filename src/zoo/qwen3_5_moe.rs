//! Qwen3.5-MoE (`model_type: qwen3_5_moe`, and `qwen3_5_moe_text` for its text model alone; Qwen3.6 too): the blocks of Qwen3-Next with
//! projections of delta nets in tensors of their own, and experts in all of them. Its configuration is that of a model which also sees
//! pictures: the text model's is an object in it, and of the tensors vision's (`model.visual`) and those that guess further tokens (`mtp`)
//! are not read.
//!
//! Rotations have three kinds of positions (`mrope_section`), which are the same number in a text.

use super::config::Config;
use super::family::Family;
use super::qwen3_next;
use crate::error::Result;
use crate::spec::{BlockNames, ModelSpec, MoeSpec};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_5_moe",
    models: "Qwen3.5-MoE, Qwen3.6-MoE (their text model)",
    gguf: &["qwen35moe"],
    checked: &["transformers", "llama.cpp"],
    reads: &qwen3_next::READS,
    moe: moe_spec,
    decoder: model_spec,
};

/// The text model's configuration where it is within another.
fn text(config: &Config) -> Option<Config> {
    config.nested("text_config", &["tie_word_embeddings", "eos_token_id"])
}

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let text = text(config);
    let config = text.as_ref().unwrap_or(config);
    // The key is older than the family, which normalises whatever it says.
    config.expect_true("norm_topk_prob")?;
    qwen3_next::experts(config, true)
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let text = text(config);
    let moe = moe_spec(config)?;
    let spec = qwen3_next::around(text.as_ref().unwrap_or(config), &FAMILY, moe, false)?;
    let root = if text.is_some() { "model.language_model" } else { "model" };
    Ok(ModelSpec { names: BlockNames { root, ..BlockNames::default() }, ..spec })
}
