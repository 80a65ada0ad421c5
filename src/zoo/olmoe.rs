//! OLMoE (`model_type: olmoe`, arXiv 2409.02060): softmax, top-k, weights as they are; RMS norm on queries and keys.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ModelSpec, MoeSpec, QkNorm};

pub(super) const FAMILY: Family = Family {
    name: "olmoe",
    models: "OLMoE",
    gguf: &["olmoe"],
    checked: &["transformers", "llama.cpp"],
    reads: &["attention_bias", "use_qk_norm", "clip_qkv", "norm_topk_prob"],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let scoring = Scoring::softmax().normalized(config.optional_flag("norm_topk_prob")?.unwrap_or(false));
    Ok(MoeSpec { scoring, ..transformer::moe_spec(config, "num_experts", "intermediate_size")? })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults::new(1e-5, 10_000.0, 4096);
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    Ok(ModelSpec {
        qk_norm: Some(QkNorm::Whole),
        clip_qkv: config.optional_number("clip_qkv")?,
        attention_bias: transformer::attention_bias(config)?,
        ..spec
    })
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
        assert_eq!(
            error("rope_scaling", json!({"factor": 8.0})),
            "config.json: key `rope_scaling.factor`: expected nothing beside rope_type default, got 8.0"
        );
        assert_eq!(
            error("rope_scaling", json!({"type": "ntk"})),
            "config.json: key `rope_scaling`: expected rope_type default, linear, dynamic, yarn, llama3 or longrope, got ntk"
        );
        assert!(config(|config| config["rope_scaling"] = Value::Null).is_ok());
        assert!(
            error("model_type", json!("llama")).starts_with("unknown model family `llama`: expected one of olmoe, ")
        );
        assert!(parse_config("[]", "c").is_err() && parse_config("{", "c").is_err());
    }
}
