//! What candle-transformers 0.11.1 cannot do, each as it fails, and that ours equals transformers there. A test that fails
//! because theirs works now is good news: move the case to `logits`.

use candle_core::DType;
use serde_json::json;

use super::*;

fn assert_ours_is_transformers(family: &str) {
    let off = off_transformers(family, DType::F32);
    assert!(off <= 1e-4, "{family}: off by {off}");
}

fn weights(family: &str) -> VarBuilder<'static> {
    tensors(&fixture(family), DType::F32)
}

#[test]
fn configurations_of_transformers_5_do_not_parse() {
    for family in ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"] {
        let mut config = for_candle(&config(family));
        if family == "mixtral" {
            config["sliding_window"] = json!(64);
        }
        config.as_object_mut().unwrap().remove("rope_theta");
        let refusal = refusal(&config, weights(family));
        assert!(refusal.contains("missing field `rope_theta`"), "{family}: {refusal}");
        assert_ours_is_transformers(family);
    }
}

#[test]
fn mixtral_without_a_window_does_not_parse() {
    let refusal = refusal(&for_candle(&config("mixtral")), weights("mixtral"));
    assert!(refusal.contains("invalid type: null, expected usize"), "{refusal}");
    assert_ours_is_transformers("mixtral");
}

#[test]
fn mixtral_fails_in_half_precision() {
    let config = changed(for_candle(&config("mixtral")), json!({ "sliding_window": 64 }));
    let (ids, _) = golden("mixtral", 0);
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    // What is left is rounding: eight bits of every number, or eleven.
    for (dtype, tolerance) in [(DType::BF16, 6e-2), (DType::F16, 6e-3)] {
        let mut model = theirs(&config, tensors(&fixture("mixtral"), dtype)).unwrap();
        let error = model(&ids, 0).unwrap_err().to_string();
        assert!(error.contains("dtype mismatch in mul"), "{error}");
        let off = off_transformers("mixtral", dtype);
        assert!(off <= tolerance, "{dtype:?}: off by {off}");
    }
}

#[test]
fn qwen_with_dense_blocks_by_name_asks_for_experts_that_are_not_there() {
    for (family, block) in [("qwen2_moe", 1), ("qwen3_moe", 3)] {
        let refusal = refusal(&for_candle(&config(family)), weights(family));
        assert!(refusal.contains(&format!("model.layers.{block}.mlp.gate.weight")), "{family}: {refusal}");
        assert_ours_is_transformers(family);
    }
}

#[test]
fn qwen2_moe_with_the_embedding_as_output_weights_asks_for_others() {
    let config = changed(for_candle(&config("qwen2_moe")), json!({ "num_hidden_layers": 1 }));
    let refusal = refusal(&config, weights("qwen2_moe"));
    assert!(refusal.contains("lm_head.weight"), "{refusal}");
    assert_ours_is_transformers("qwen2_moe");
}

#[test]
fn qwen2_moe_has_a_window_where_it_says_that_it_has_none() {
    // As transformers writes it: `use_sliding_window` is false, and `sliding_window` is then 0.
    let directory = qwen2_moe_for_both(json!({}));
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(directory.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["use_sliding_window"], &config["sliding_window"]), (&json!(false), &json!(0)));
    let mut model = theirs(&for_candle(&config), tensors(directory.path(), DType::F32)).unwrap();
    let (ids, _) = golden("qwen2_moe", 0);
    let logits = values(&model(&Tensor::new(&ids[..2], &Device::Cpu).unwrap().unsqueeze(0).unwrap(), 0).unwrap());
    // The second token sees itself alone.
    let off = difference(&all_logits(&ours(directory.path(), DType::F32), &ids[..2])[1], &logits);
    assert!(off > 0.1, "off by {off}");
    assert_ours_is_transformers("qwen2_moe");
}

#[test]
fn deepseek_v2_with_groups_ranks_experts_in_their_place_and_fails() {
    let mut model = theirs(&for_candle(&config("deepseek_v2")), weights("deepseek_v2")).unwrap();
    let (ids, _) = golden("deepseek_v2", 0);
    let error = model(&Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap(), 0).unwrap_err().to_string();
    assert!(error.contains("invalid index"), "{error}");
    assert_ours_is_transformers("deepseek_v2");
}

#[test]
fn deepseek_v3_does_not_parse() {
    let config = for_candle(&config("deepseek_v3"));
    for (key, value) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        let refusal = refusal(&changed(config.clone(), json!({ key: value })), weights("deepseek_v3"));
        assert!(refusal.contains(&format!("unknown variant `{value}`")), "{refusal}");
    }
    assert_ours_is_transformers("deepseek_v3");
}
