//! Families that candle-transformers runs right: our logits are theirs.

use candle_core::DType;
use serde_json::json;

use super::*;

/// Both read the same directory, each in its own way.
fn compare(directory: &Path, family: &str) {
    let config: Value = serde_json::from_str(&std::fs::read_to_string(directory.join("config.json")).unwrap()).unwrap();
    let decoder = ours(directory, DType::F32);
    assert_same(&decoder, family, || theirs(&for_candle(&config), tensors(directory, DType::F32)).unwrap());
}

fn itself(name: &str) -> Vec<String> {
    vec![name.into()]
}

#[test]
fn mixtral() {
    // As wide as all positions: no window.
    let config = changed(config("mixtral"), json!({ "sliding_window": 64 }));
    compare(derived("mixtral", &config, itself).path(), "mixtral");
}

#[test]
fn qwen2_moe() {
    for normalised in [false, true] {
        let changes = json!({ "norm_topk_prob": normalised, "sliding_window": 64 });
        compare(qwen2_moe_for_both(changes).path(), "qwen2_moe");
    }
}

#[test]
fn qwen3_moe() {
    // Blocks 0 and 2 are dense by step; block 3, which is so by name, is left out.
    let changes = json!({ "num_hidden_layers": 3, "mlp_only_layers": [] });
    let keep = |name: &str| if name.starts_with("model.layers.3.") { vec![] } else { itself(name) };
    for normalised in [false, true] {
        let config = changed(config("qwen3_moe"), changed(changes.clone(), json!({ "norm_topk_prob": normalised })));
        compare(derived("qwen3_moe", &config, keep).path(), "qwen3_moe");
    }
}

#[test]
fn deepseek_v2_without_groups() {
    let greedy = changed(config("deepseek_v2"), json!({ "topk_method": "greedy" }));
    let mut unstretched = greedy.clone();
    unstretched["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 20.0 });
    compare(derived("deepseek_v2", &unstretched, itself).path(), "deepseek_v2");
    // Positions stretched by YaRN are written where candle-transformers looks for them.
    let mut scaling = greedy["rope_parameters"].clone();
    scaling["type"] = json!("yarn");
    let stretched = changed(greedy, json!({ "rope_scaling": scaling }));
    compare(derived("deepseek_v2", &stretched, itself).path(), "deepseek_v2");
}
