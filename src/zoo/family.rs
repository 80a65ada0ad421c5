//! A model family: what it is called, how its configuration is read, and what of it there is. The table of them: [`FAMILIES`](super::FAMILIES).

use serde_json::Value;

use super::config::Config;
use crate::error::{Error, Result};
use crate::spec::{ModelSpec, MoeSpec};

/// A model family.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// What `model_type` of a `config.json` says.
    pub name: &'static str,
    /// Its models, as they are called.
    pub models: &'static str,
    /// What `general.architecture` of a GGUF file says; empty where such files are not read.
    pub gguf: &'static [&'static str],
    /// What its numbers are compared with: `transformers`, and `llama.cpp` for its GGUF files.
    pub checked: &'static [&'static str],
    /// Keys of [`known`](super::known) that it reads, or holds against what it does.
    pub(super) reads: &'static [&'static str],
    pub(super) moe: fn(&Config) -> Result<MoeSpec>,
    pub(super) decoder: fn(&Config) -> Result<ModelSpec>,
}

/// Names of families of which nothing runs, in a `config.json` and in a GGUF file, and what they have that is not here.
const LACKING: [(&[&str], &str); 7] = [
    (&["deepseek_v32", "deepseek32", "glm_moe_dsa", "glm-dsa"], "attention that an indexer makes sparse"),
    (&["gemma4", "gemma4_text"], "dense FFN beside experts, nor heads of two widths"),
    (&["granitemoehybrid", "granitehybrid"], "Mamba-2 mixers"),
    (&["jamba"], "Mamba mixers"),
    (&["kimi_linear", "kimi-linear"], "delta nets with a decay for each channel, nor latent attention beside them"),
    (&["llama4", "llama4_text"], "attention in chunks"),
    (&["nemotron_h", "nemotron_h_moe"], "Mamba-2 mixers"),
];

/// What the family called `name` has that is not here.
pub(crate) fn lacking(name: &str) -> Option<&'static str> {
    LACKING.iter().find(|(names, _)| names.contains(&name)).map(|(_, part)| *part)
}

/// The error for a `model_type` that is none of `families`: with the part that is not here where that is known, and what runs.
pub(super) fn unknown(config: &Config, got: &str, families: &[Family]) -> Error {
    let runs = || families.iter().map(|family| family.name);
    let expected = runs().collect::<Vec<_>>().join(", ");
    let wrong = |part: &str, else_runs: &str| {
        let got = format!("{got}: there are no {part} here{else_runs}");
        config.error("model_type", &format!("one of {expected}"), &got)
    };
    if let Some(part) = lacking(got) {
        return wrong(part, "");
    }
    let inner = config.value("text_config.model_type").and_then(Value::as_str).unwrap_or_default();
    let inner = inner.strip_suffix("_text").unwrap_or(inner);
    if runs().any(|name| name == inner) {
        return wrong(
            "other parts than text models",
            &format!("; its text model, {inner}, runs from a checkpoint of its own"),
        );
    }
    let kind = match config.value("text_config") {
        Some(Value::Object(_)) => "model family around a text model",
        _ if config.keys().any(|key| key.contains("expert") || key.contains("moe")) => "model family",
        _ => "model family without experts",
    };
    Error::UnknownName { kind, got: got.into(), expected }
}
