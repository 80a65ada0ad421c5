//! Keys that some model reads and that change what it computes, in configurations of families that do not: refused, unless their value
//! says what the family does anyway.

use serde_json::Value;

use super::config::Config;
use crate::error::Result;

/// What a key says where it says nothing.
#[derive(Clone, Copy)]
enum Neutral {
    /// Null, false, 0, an empty list or text.
    Nothing,
    /// True.
    True,
    /// Null or 1.
    One,
    /// This text.
    Text(&'static str),
}

use Neutral::{Nothing, One, Text, True};

/// Keys, and what they say where they say nothing.
const KEYS: [(&str, Neutral); 35] = [
    ("attention_bias", Nothing),
    ("qkv_bias", Nothing),
    ("mlp_bias", Nothing),
    ("lm_head_bias", Nothing),
    ("use_qk_norm", Nothing),
    ("attn_output_gate", Nothing),
    ("clip_qkv", Nothing),
    ("rope_interleave", Nothing),
    ("rotary_pct", One),
    ("rotary_emb_base", Nothing),
    ("rotary_dim", Nothing),
    ("position_embedding_type", Text("rope")),
    ("alibi", Nothing),
    ("no_rope_layers", Nothing),
    ("use_sliding_window", Nothing),
    ("attn_logit_softcapping", Nothing),
    ("final_logit_softcapping", Nothing),
    ("router_logit_softcapping", Nothing),
    ("query_pre_attn_scalar", Nothing),
    ("logit_scale", One),
    ("embedding_multiplier", One),
    ("residual_multiplier", One),
    ("attention_multiplier", Nothing),
    ("logits_scaling", One),
    ("shared_intermediate_size", Nothing),
    ("shared_expert_intermediate_size", Nothing),
    ("n_shared_experts", Nothing),
    ("routed_scaling_factor", One),
    ("n_group", One),
    ("scoring_func", Text("softmax")),
    ("norm_topk_prob", True),
    ("use_expert_bias", Nothing),
    ("swiglu_limit", Nothing),
    ("swiglu_alpha", Nothing),
    ("per_layer_config", Nothing),
];

/// Refuses all of these keys but those that a family `reads`.
pub(super) fn check(config: &Config, reads: &[&str]) -> Result<()> {
    for (key, neutral) in KEYS {
        if reads.contains(&key) {
            continue;
        }
        let Some(value) = config.value(key) else { continue };
        let (says_nothing, expected) = match neutral {
            Nothing if value == &Value::Bool(true) => (false, "false".to_owned()),
            Nothing => (is_nothing(value), "nothing, as this family has".to_owned()),
            True => (value == &Value::Bool(true), "true, as this family has".to_owned()),
            One => (value.as_f64() == Some(1.0), "1, as this family has".to_owned()),
            Text(text) => (value == text, format!("{text}, as this family has")),
        };
        if !says_nothing {
            return Err(config.wrong(key, &expected));
        }
    }
    if !reads.contains(&"layer_types") {
        let kinds = config.optional_strings("layer_types")?.unwrap_or_default();
        if let Some(other) = kinds.into_iter().find(|&kind| kind != "full_attention") {
            return Err(config.error("layer_types", "full_attention in all blocks", other));
        }
    }
    Ok(())
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
    }
}
