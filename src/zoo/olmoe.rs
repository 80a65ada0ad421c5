//! OLMoE (`model_type: olmoe`, arXiv 2409.02060): softmax, top-k, weights as they are; RMS norm on queries and keys.

use super::config::Config;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ModelSpec, MoeSpec};

pub(super) fn model_spec(config: &Config) -> Result<ModelSpec> {
    let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        return Err(config.error(
            "num_key_value_heads",
            &format!("a divisor of num_attention_heads {heads}"),
            &kv_heads.to_string(),
        ));
    }
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            let expected = format!("a divisor of hidden_size {hidden}");
            return Err(config.error("num_attention_heads", &expected, &heads.to_string()));
        }
    };
    if head_dim % 2 != 0 {
        return Err(config.error("head_dim", "an even number (rotary embedding)", &head_dim.to_string()));
    }
    let activation = config.optional_string("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(config.error("hidden_act", "silu", activation));
    }
    if config.optional_flag("attention_bias")?.unwrap_or(false) {
        return Err(config.error("attention_bias", "false", "true"));
    }
    // Stretched positions are another rotation: refused rather than run as if they were not there.
    for (object, kinds) in [("rope_scaling", ["rope_type", "type"]), ("rope_parameters", ["rope_type", "type"])] {
        let mut kind = None;
        for key in kinds {
            kind = kind.or(config.optional_string(&format!("{object}.{key}"))?);
        }
        match kind {
            Some("default") => {}
            Some(other) => return Err(config.error(object, "rope_type default", other)),
            None if object == "rope_scaling" && config.has(object) => {
                return Err(config.error(object, "null or rope_type default", "something else"));
            }
            None => {}
        }
    }
    let (experts, top_k) = (config.size("num_experts")?, config.size("num_experts_per_tok")?);
    if top_k > experts {
        let expected = format!("at most num_experts {experts}");
        return Err(config.error("num_experts_per_tok", &expected, &top_k.to_string()));
    }
    let moe = MoeSpec {
        scoring: Scoring::softmax().normalized(config.optional_flag("norm_topk_prob")?.unwrap_or(false)),
        ..MoeSpec::new(hidden, experts, top_k, config.size("intermediate_size")?)?
    };
    let spec = ModelSpec {
        family: "olmoe",
        vocab: config.size("vocab_size")?,
        layers: config.size("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(4096),
        norm_eps: config.optional_number("rms_norm_eps")?.unwrap_or(1e-5),
        // transformers 5 nests it, earlier versions do not.
        rope_theta: match config.optional_number("rope_parameters.rope_theta")? {
            Some(theta) => theta,
            None => config.optional_number("rope_theta")?.unwrap_or(10_000.0),
        },
        qk_norm: true,
        clip_qkv: config.optional_number("clip_qkv")?,
        tied_embeddings: config.optional_flag("tie_word_embeddings")?.unwrap_or(false),
        end_of_text: config.token_ids("eos_token_id")?,
        moe,
    };
    spec.check()?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::parse_config;

    fn config(change: impl Fn(&mut Value)) -> Result<crate::spec::ModelSpec, String> {
        let mut config = json!({
            "model_type": "olmoe", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
            "intermediate_size": 48, "clip_qkv": null, "eos_token_id": [1, 2], "rope_theta": 500.0
        });
        change(&mut config);
        parse_config(&config.to_string(), "config.json").map_err(|error| error.to_string())
    }

    #[test]
    fn absent_and_null_keys_take_the_family_defaults() {
        let spec = config(|_| ()).unwrap();
        assert_eq!((spec.head_dim, spec.norm_eps, spec.rope_theta, spec.clip_qkv), (16, 1e-5, 500.0, None));
        assert!(!spec.moe.scoring.normalize && !spec.tied_embeddings);
        assert_eq!(spec.end_of_text, [1, 2]);
        let nested = config(|config| config["rope_parameters"] = json!({"rope_theta": 7.0, "rope_type": "default"}));
        assert_eq!(nested.unwrap().rope_theta, 7.0);
    }

    #[test]
    fn missing_null_mistyped_and_contradictory_keys_are_named() {
        let error = |key: &str, value: Value| config(|config| config[key] = value.clone()).unwrap_err();
        let missing = config(|config| {
            config.as_object_mut().unwrap().remove("num_experts");
        });
        assert_eq!(
            missing.unwrap_err(),
            "config.json: key `num_experts`: expected a positive integer, got nothing: the key is missing"
        );
        assert_eq!(
            error("hidden_size", Value::Null),
            "config.json: key `hidden_size`: expected a positive integer, got null"
        );
        assert_eq!(
            error("hidden_size", json!("64")),
            "config.json: key `hidden_size`: expected a positive integer, got \"64\""
        );
        assert_eq!(
            error("num_experts_per_tok", json!(9)),
            "config.json: key `num_experts_per_tok`: expected at most num_experts 8, got 9"
        );
        assert_eq!(
            error("num_key_value_heads", json!(3)),
            "config.json: key `num_key_value_heads`: expected a divisor of num_attention_heads 4, got 3"
        );
        let scaled = "config.json: key `rope_scaling`: expected ";
        assert_eq!(
            error("rope_scaling", json!({"factor": 8.0})),
            format!("{scaled}null or rope_type default, got something else")
        );
        assert_eq!(error("rope_scaling", json!({"type": "yarn"})), format!("{scaled}rope_type default, got yarn"));
        assert!(config(|config| config["rope_scaling"] = Value::Null).is_ok());
        assert_eq!(error("model_type", json!("llama")), "unknown model family `llama`: expected one of olmoe");
        assert!(parse_config("[]", "c").is_err() && parse_config("{", "c").is_err());
    }
}
