//! GGUF: the metadata of a file as the `config.json` that its family reads, and the names of its tensors.
//!
//! | `general.architecture` | family |
//! |---|---|
//! | `llama`, with experts | `mixtral` |
//! | `olmoe` | `olmoe` |
//! | `qwen2moe`, `qwen3moe`, `glm4moe` | `qwen2_moe`, `qwen3_moe`, `glm4_moe` |
//! | `granitemoe` | `granitemoe` |
//! | `minimax-m2` | `minimax_m2` |
//! | `gpt-oss` | `gpt_oss` |
//! | `phimoe` | `phimoe` |
//! | `lfm2moe` | `lfm2_moe` |
//! | `qwen3next`, `qwen35moe` | `qwen3_next`, `qwen3_5_moe` |
//! | `deepseek2` | `deepseek_v2`; `deepseek_v3` where scores are sigmoids, GLM-4.7-Flash among them, which computes the same |
//!
//! What a file does not say is as llama.cpp has it: positions, whether weights are normalised, that experts have no groups; what
//! llama.cpp requires must be there. Keys, names and what is done to the tensors on the way into a file: llama.cpp's `conversion/` and
//! `src/models/`.

mod deepseek;
mod ends;
pub(super) mod keys;
pub(super) mod names;
mod positions;
mod recurrent;
pub(super) mod tokenizer;
mod unread;

use serde_json::{Map, Value, json};

use crate::checkpoint::{self, Checkpoint, Metadata};
use crate::error::{Error, Result};
use crate::zoo;

/// Keys of all architectures, after the architecture's name, that are integers: GGUF's and `config.json`'s.
const COUNTS: [(&str, &str); 5] = [
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("expert_used_count", "num_experts_per_tok"),
];

/// Architectures that may rotate a part of a head.
const TURNED_IN_PART: [&str; 4] = ["glm4moe", "minimax-m2", "qwen3next", "qwen35moe"];

/// The numbers of `expert_gating_func`.
const SIGMOID: usize = 2;

/// A GGUF file's metadata, read as one architecture's.
struct Architecture<'a> {
    checkpoint: &'a Checkpoint,
    metadata: &'a Metadata,
    architecture: &'a str,
}

/// The `config.json` of a GGUF file, for [`parse_config`](crate::zoo::parse_config).
///
/// # Errors
/// [`Error::UnknownName`] for an architecture that no family in [`zoo::FAMILIES`] has, [`Error::Config`] for metadata that are missing, of
/// another type, or of a model without experts; [`Error::Checkpoint`] where there are no embeddings, or where it is no GGUF file.
pub(super) fn config(checkpoint: &Checkpoint) -> Result<String> {
    let Some(metadata) = checkpoint.gguf() else {
        return Err(Error::Checkpoint { file: "checkpoint".into(), detail: "expected a GGUF file, got none".into() });
    };
    let architecture = architecture(metadata)?;
    let source = Architecture { checkpoint, metadata, architecture };
    let mut config = source.common()?;
    let experts = source.experts()?;
    let (key, norm) = ("norm_topk_prob", source.flag("expert_weights_norm")?);
    source.check_unread()?;
    let width = source.expert_width()?;
    let mut set = |key: &str, value: Value| config.insert(key.into(), value);
    match architecture {
        "llama" => {
            set("model_type", json!("mixtral"));
            set("num_local_experts", json!(experts));
            set("intermediate_size", json!(width));
        }
        "olmoe" => {
            set("model_type", json!("olmoe"));
            set("num_experts", json!(experts));
            set("intermediate_size", json!(width));
            set("clip_qkv", json!(source.number("attention.clamp_kqv")?.filter(|&clip| clip > 0.0)));
            set(key, json!(norm.unwrap_or(false)));
        }
        "qwen2moe" | "qwen3moe" => {
            let (family, normalised) = match architecture {
                "qwen2moe" => ("qwen2_moe", false),
                _ => ("qwen3_moe", true),
            };
            let biased = checkpoint.tensors().contains_key("blk.0.attn_q.bias");
            set("model_type", json!(family));
            set("num_experts", json!(experts));
            set("moe_intermediate_size", json!(width));
            if architecture == "qwen2moe" {
                let shared = source.count("expert_shared_feed_forward_length")?.filter(|&width| width > 0);
                let shared = shared.or(source.count("feed_forward_length")?);
                set("shared_expert_intermediate_size", json!(shared));
            }
            set("mlp_only_layers", json!(source.dense_blocks()?));
            set(if family == "qwen2_moe" { "qkv_bias" } else { "attention_bias" }, json!(biased));
            set(key, json!(norm.unwrap_or(normalised)));
        }
        "glm4moe" => {
            set("model_type", json!("glm4_moe"));
            set("n_routed_experts", json!(experts));
            set("moe_intermediate_size", json!(width));
            set("n_shared_experts", json!(source.required("expert_shared_count")?));
            set("routed_scaling_factor", json!(source.number("expert_weights_scale")?.filter(|&scale| scale != 0.0)));
            set("first_k_dense_replace", json!(source.count("leading_dense_block_count")?));
            set("attention_bias", json!(source.has("blk.0.attn_q.bias")));
            set("use_qk_norm", json!(source.has("blk.0.attn_q_norm.weight")));
            set("partial_rotary_factor", json!(source.rotated_share()?));
            let groups = source.groups()?;
            set("n_group", json!(groups.0));
            set("topk_group", json!(groups.1));
            set(key, json!(norm.unwrap_or(false)));
        }
        "minimax-m2" => {
            source.expect_sigmoid()?;
            set("model_type", json!("minimax_m2"));
            set("num_local_experts", json!(experts));
            set("intermediate_size", json!(width));
            set("partial_rotary_factor", json!(source.rotated_share()?));
        }
        "gpt-oss" => {
            set("model_type", json!("gpt_oss"));
            set("num_local_experts", json!(experts));
            set("intermediate_size", json!(width));
            set("sliding_window", json!(source.required("attention.sliding_window")?));
            let pattern = source.key("attention.sliding_window_pattern");
            if metadata.get(&pattern).is_some_and(|pattern| *pattern != checkpoint::metadata::Value::Integer(2)) {
                return Err(metadata.error(&pattern, "nothing or 2", "another pattern"));
            }
        }
        // What is between its experts and weights the file does not say; llama.cpp takes softmax for it, and for its layer norms RMS norms.
        "phimoe" => {
            set("model_type", json!("phimoe"));
            set("num_local_experts", json!(experts));
            set("intermediate_size", json!(width));
            set("attention_bias", json!(true));
            set("lm_head_bias", json!(true));
        }
        "lfm2moe" => source.short_convolutions(&mut config, experts, width)?,
        "qwen3next" | "qwen35moe" => source.delta_nets(&mut config, experts, width)?,
        "granitemoe" => {
            if let Some(shared) = source.count("expert_shared_feed_forward_length")?.filter(|&width| width > 0) {
                let key = source.key("expert_shared_feed_forward_length");
                return Err(metadata.error(&key, "no shared expert", &shared.to_string()));
            }
            let scale = |name: &str| -> Result<Option<f64>> { Ok(source.number(name)?.filter(|&scale| scale != 0.0)) };
            let usual = (source.head()? as f64).powf(-0.5);
            set("model_type", json!("granitemoe"));
            set("num_local_experts", json!(experts));
            set("intermediate_size", json!(width));
            set("embedding_multiplier", json!(scale("embedding_scale")?));
            set("residual_multiplier", json!(scale("residual_scale")?));
            set("attention_multiplier", json!(scale("attention.scale")?.unwrap_or(usual)));
            let logits = source.key("logit_scale");
            let scale = scale("logit_scale")?.ok_or_else(|| metadata.error(&logits, "a positive number", "nothing"))?;
            set("logits_scaling", json!(scale));
        }
        _ => source.deepseek(&mut config, experts, width, norm.unwrap_or(false))?,
    }
    Ok(Value::Object(config).to_string())
}

/// What `general.architecture` says, if a family in [`zoo::FAMILIES`] has it.
pub(super) fn architecture(metadata: &Metadata) -> Result<&str> {
    let key = "general.architecture";
    let got = metadata.text(key)?.ok_or_else(|| metadata.error(key, "text", "nothing: the key is missing"))?;
    let mut known: Vec<&str> = Vec::new();
    // Two families may be written as one architecture.
    for &name in zoo::FAMILIES.iter().flat_map(|family| family.gguf) {
        if !known.contains(&name) {
            known.push(name);
        }
    }
    if known.contains(&got) {
        return Ok(got);
    }
    let expected = known.join(", ");
    Err(match zoo::lacking(got) {
        Some(part) => metadata.error(key, &format!("one of {expected}"), &format!("{got}: there are no {part} here")),
        None => Error::UnknownName { kind: "GGUF architecture", got: got.into(), expected },
    })
}

impl Architecture<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn count(&self, name: &str) -> Result<Option<usize>> {
        self.metadata.count(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.metadata.number(&self.key(name))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.metadata.flag(&self.key(name))
    }

    fn required(&self, name: &str) -> Result<usize> {
        self.metadata.required_count(&self.key(name))
    }

    fn has(&self, tensor: &str) -> bool {
        self.checkpoint.tensors().contains_key(tensor)
    }

    /// Requires scores to be sigmoids where llama.cpp has no default.
    fn expect_sigmoid(&self) -> Result<()> {
        const NAME: &str = "expert_gating_func";
        match self.required(NAME)? {
            SIGMOID => Ok(()),
            other => Err(self.metadata.error(&self.key(NAME), "2 (sigmoid)", &other.to_string())),
        }
    }

    /// Width of a head, where all of its parts have one.
    fn head(&self) -> Result<usize> {
        let (heads, hidden) = (self.required("attention.head_count")?, self.required("embedding_length")?);
        Ok(self.count("attention.key_length")?.or(hidden.checked_div(heads)).unwrap_or(0))
    }

    /// How much of a head is rotated, where that may be a part.
    fn rotated_share(&self) -> Result<f64> {
        const NAME: &str = "rope.dimension_count";
        let head = self.head()?;
        let rotated = self.count(NAME)?.unwrap_or(head);
        if rotated == 0 || rotated > head || !rotated.is_multiple_of(2) {
            let expected = format!("an even part of the head's {head}");
            return Err(self.metadata.error(&self.key(NAME), &expected, &rotated.to_string()));
        }
        Ok(rotated as f64 / head.max(1) as f64)
    }

    /// Blocks without those that predict further tokens.
    fn blocks(&self) -> Result<usize> {
        let extra = self.count("nextn_predict_layers")?.unwrap_or(0);
        let all = self.required("block_count")?;
        let blocks = all.checked_sub(extra).filter(|&blocks| blocks > 0).ok_or_else(|| {
            let expected = format!("more than {} {extra}", self.key("nextn_predict_layers"));
            self.metadata.error(&self.key("block_count"), &expected, &all.to_string())
        })?;
        // Before anything counts them.
        (0..blocks).try_for_each(|block| self.checkpoint.entry(&format!("blk.{block}.attn_norm.weight")).map(drop))?;
        Ok(blocks)
    }

    /// Width of an expert. Where it has no key of its own it is that of all of a token's experts together in Qwen's models, and that of
    /// one in others.
    fn expert_width(&self) -> Result<Option<usize>> {
        if let Some(width) = self.count("expert_feed_forward_length")?.filter(|&width| width > 0) {
            return Ok(Some(width));
        }
        let width = self.count("feed_forward_length")?;
        Ok(match self.architecture {
            "qwen2moe" | "qwen3moe" | "qwen3next" | "qwen35moe" => {
                width.and_then(|width| width.checked_div(self.count("expert_used_count").ok()??))
            }
            "deepseek2" | "glm4moe" | "minimax-m2" | "gpt-oss" | "lfm2moe" => {
                Some(self.required("expert_feed_forward_length")?)
            }
            _ => width,
        })
    }

    /// Groups of experts, and how many of them a token may use.
    fn groups(&self) -> Result<(usize, usize)> {
        match self.count("expert_group_count")?.filter(|&groups| groups > 1) {
            Some(groups) => Ok((groups, self.required("expert_group_used_count")?)),
            None => Ok((1, 1)),
        }
    }

    fn experts(&self) -> Result<usize> {
        let experts = self.count("expert_count")?.unwrap_or(0);
        if experts == 0 {
            return Err(self.metadata.error(&self.key("expert_count"), "a model with experts", "none"));
        }
        Ok(experts)
    }

    /// What means the same in all architectures.
    fn common(&self) -> Result<Map<String, Value>> {
        let mut config = Map::new();
        for (name, key) in COUNTS {
            config.insert(key.into(), json!(self.count(name)?));
        }
        // A list where some blocks have no keys.
        if self.architecture != "lfm2moe" {
            config.insert("num_key_value_heads".into(), json!(self.count("attention.head_count_kv")?));
        }
        for name in ["context_length", "embedding_length", "attention.head_count", "expert_used_count"] {
            self.required(name)?;
        }
        const EPSILON: &str = "attention.layer_norm_rms_epsilon";
        let Some(epsilon) = self.number(EPSILON)? else {
            return Err(self.metadata.error(&self.key(EPSILON), "a number", "nothing: the key is missing"));
        };
        config.insert("rms_norm_eps".into(), json!(epsilon));
        config.insert("num_hidden_layers".into(), json!(self.blocks()?));
        config.insert("num_nextn_predict_layers".into(), json!(self.count("nextn_predict_layers")?));
        config.insert("vocab_size".into(), json!(self.checkpoint.entry("token_embd.weight")?.shape[0]));
        config.insert("tie_word_embeddings".into(), json!(!self.has("output.weight")));
        config.insert("eos_token_id".into(), json!(ends::ends(self.metadata)?));
        if self.architecture != "deepseek2" {
            config.insert("head_dim".into(), json!(self.count("attention.key_length")?));
            let head = self.head()?;
            let turned_in_part = TURNED_IN_PART.contains(&self.architecture);
            for name in ["attention.value_length", "rope.dimension_count"] {
                let differs = |other: &usize| *other != head && !(turned_in_part && name.starts_with("rope"));
                if let Some(other) = self.count(name)?.filter(differs) {
                    let expected = format!("the head's {head}");
                    return Err(self.metadata.error(&self.key(name), &expected, &other.to_string()));
                }
            }
        }
        config.insert("rope_parameters".into(), self.positions()?);
        Ok(config)
    }

    /// The blocks that have no experts.
    fn dense_blocks(&self) -> Result<Vec<usize>> {
        let dense = |block: &usize| !self.has(&format!("blk.{block}.ffn_gate_inp.weight"));
        Ok((0..self.blocks()?).filter(dense).collect())
    }
}
