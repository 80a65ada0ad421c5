//! Model families: from a checkpoint's `config.json` to a [`ModelSpec`], one small file per family. Data, no forward pass.
//!
//! ```
//! let config = r#"{"model_type": "mixtral", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
//!     "num_attention_heads": 4, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20}"#;
//! let spec = phase_moe::zoo::parse_config(config, "config.json")?;
//! assert_eq!((spec.ffn.as_str(), spec.moe.names.up_proj.as_str()), ("block_sparse_moe", "w3"));
//! assert!(spec.moe.scoring.normalize);
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! To add one: a file beside these, a line in each of the tables below, and a golden from `tests/goldens/make_zoo_goldens.py`.

mod config;
mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod defaults;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod known;
mod lfm2_moe;
mod mixtral;
mod olmoe;
mod phimoe;
pub(crate) mod quantization;
mod qwen2_moe;
mod qwen3_moe;
pub(crate) mod rope;
#[cfg(test)]
mod tests;
mod transformer;

use crate::error::{Error, Result};
use crate::spec::{ModelSpec, MoeSpec};
use config::Config;

/// Families whose decoder there is a file for, as `model_type` names them.
pub const FAMILIES: [&str; 10] = [
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "gpt_oss",
    "phimoe",
];

/// Families of which there is the MoE layer alone.
pub(crate) const MOE_FAMILIES: [&str; 1] = ["lfm2_moe"];

/// Reads a `config.json`; `file` is its name in error messages.
///
/// # Errors
/// [`Error::Config`] for text that is no JSON object, a missing, null, mistyped or contradictory key;
/// [`Error::UnknownName`] for a family that is not in [`FAMILIES`].
pub fn parse_config(json: &str, file: &str) -> Result<ModelSpec> {
    let config = Config::parse(json, file)?;
    let spec = match config.string("model_type")? {
        "olmoe" => olmoe::model_spec(&config),
        "mixtral" => mixtral::model_spec(&config),
        "qwen2_moe" => qwen2_moe::model_spec(&config),
        "qwen3_moe" => qwen3_moe::model_spec(&config),
        "deepseek_v2" => deepseek_v2::model_spec(&config),
        "deepseek_v3" => deepseek_v3::model_spec(&config),
        "glm4_moe" => glm4_moe::model_spec(&config),
        "granitemoe" => granitemoe::model_spec(&config),
        "gpt_oss" => gpt_oss::model_spec(&config),
        "phimoe" => phimoe::model_spec(&config),
        other => Err(unknown(json, other, &FAMILIES)),
    }?;
    spec.check()?;
    Ok(spec)
}

/// The MoE layer alone, for a model of one's own around it; only keys that concern the layer are looked at.
///
/// # Errors
/// As [`parse_config`], for a family that is neither in [`FAMILIES`] nor `lfm2_moe`.
pub fn parse_moe_config(json: &str, file: &str) -> Result<MoeSpec> {
    let config = Config::parse(json, file)?;
    let spec = match config.string("model_type")? {
        "olmoe" => olmoe::moe_spec(&config),
        "mixtral" => mixtral::moe_spec(&config),
        "qwen2_moe" => qwen2_moe::moe_spec(&config),
        "qwen3_moe" => qwen3_moe::moe_spec(&config),
        "deepseek_v2" => deepseek_v2::moe_spec(&config),
        "deepseek_v3" => deepseek_v3::moe_spec(&config),
        "glm4_moe" => glm4_moe::moe_spec(&config),
        "granitemoe" => granitemoe::moe_spec(&config),
        "lfm2_moe" => lfm2_moe::moe_spec(&config),
        "gpt_oss" => gpt_oss::moe_spec(&config),
        "phimoe" => phimoe::moe_spec(&config),
        other => Err(unknown(json, other, &[FAMILIES.as_slice(), &MOE_FAMILIES].concat())),
    }?;
    spec.check()?;
    Ok(spec)
}

/// A family that is not known, and whether its configuration shows that it could not be.
fn unknown(config: &str, got: &str, known: &[&str]) -> Error {
    let config = crate::checkpoint::json::parse(config).unwrap_or_default();
    let mut keys = config.as_object().into_iter().flatten().map(|(key, _)| key);
    let kind = match config["text_config"].is_object() {
        true => "model family around a text model",
        false if keys.any(|key| key.contains("expert") || key.contains("moe")) => "model family",
        false => "model family without experts",
    };
    Error::UnknownName { kind, got: got.into(), expected: known.join(", ") }
}
