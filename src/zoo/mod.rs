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
//! To add one: a file beside these, its line in [`FAMILIES`], and a golden from `tests/goldens/make_zoo_goldens.py` (docs/add-a-family.md).

mod config;
mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod defaults;
mod family;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granitemoe;
mod known;
mod lfm2_moe;
mod minimax_m2;
mod mixtral;
mod olmoe;
mod phimoe;
pub(crate) mod quantization;
mod qwen2_moe;
mod qwen3_5_moe;
mod qwen3_moe;
pub(crate) mod qwen3_next;
mod recurrent;
pub(crate) mod rope;
#[cfg(test)]
mod tests;
mod transformer;
mod window;

use crate::error::Result;
use crate::spec::{ModelSpec, MoeSpec};
use config::Config;
pub use family::Family;
pub(crate) use family::lacking;

/// All families, the one place where each is entered.
pub const FAMILIES: [Family; 15] = [
    olmoe::FAMILY,
    mixtral::FAMILY,
    qwen2_moe::FAMILY,
    qwen3_moe::FAMILY,
    qwen3_next::FAMILY,
    qwen3_5_moe::FAMILY,
    deepseek_v2::FAMILY,
    deepseek_v3::FAMILY,
    glm4_moe::FAMILY,
    glm4_moe_lite::FAMILY,
    minimax_m2::FAMILY,
    granitemoe::FAMILY,
    gpt_oss::FAMILY,
    phimoe::FAMILY,
    lfm2_moe::FAMILY,
];

/// Reads a `config.json`; `file` is its name in error messages.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for text that is no JSON object, a missing, null, mistyped or contradictory key, or a family with a part that
/// is not here; [`Error::UnknownName`](crate::Error::UnknownName) for one that is not in [`FAMILIES`].
pub fn parse_config(json: &str, file: &str) -> Result<ModelSpec> {
    let config = Config::parse(json, file)?;
    let name = config.string("model_type")?;
    let Some(family) = find(name) else { return Err(family::unknown(&config, name, &FAMILIES)) };
    let spec = (family.decoder)(&config)?;
    spec.check()?;
    Ok(spec)
}

/// The MoE layer alone, for a model of one's own around it; only keys that concern the layer are looked at.
///
/// # Errors
/// As [`parse_config`], for a family that is not in [`FAMILIES`].
pub fn parse_moe_config(json: &str, file: &str) -> Result<MoeSpec> {
    let config = Config::parse(json, file)?;
    let name = config.string("model_type")?;
    let Some(family) = find(name) else { return Err(family::unknown(&config, name, &FAMILIES)) };
    let spec = (family.moe)(&config)?;
    spec.check()?;
    Ok(spec)
}

/// The family that `model_type` names; what is a part of a larger model says so behind its name.
fn find(model_type: &str) -> Option<&'static Family> {
    let is_it = |family: &&Family| model_type == family.name || model_type.strip_suffix("_text") == Some(family.name);
    FAMILIES.iter().find(is_it)
}
