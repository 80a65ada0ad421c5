//! Configurations of the families: what is wrong in one is an error that names the file and the key.

use std::path::Path;

use crate::routing::{GroupLimit, GroupScore};
use crate::spec::{AttentionBias, RopeScaling, SlidingWindow};
use crate::zoo::{FAMILIES, Family, parse_config, parse_moe_config};
use crate::{Error, ModelSpec, Result, Scoring};
use serde_json::{Value, json};

/// The configuration of the goldens of `family`, with other values under some keys.
fn changed(family: &str, keys: &[(&str, Value)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/zoo").join(family).join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for (key, value) in keys {
        config[*key] = value.clone();
    }
    config.to_string()
}

fn parse(family: &str, keys: &[(&str, Value)]) -> Result<ModelSpec> {
    parse_config(&changed(family, keys), "config.json")
}

fn message(family: &str, key: &str, value: Value) -> String {
    match parse(family, &[(key, value)]) {
        Err(error @ Error::Config { .. }) if error.is_user_error() => error.to_string(),
        other => panic!("{family}, {key}: expected a configuration error, got {other:?}"),
    }
}

#[test]
fn a_missing_null_or_mistyped_key_is_named() {
    let keys = [
        ("mixtral", "num_local_experts"),
        ("mixtral", "intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("qwen2_moe", "moe_intermediate_size"),
        ("qwen3_moe", "num_hidden_layers"),
        ("deepseek_v2", "n_group"),
        ("deepseek_v3", "kv_lora_rank"),
        ("deepseek_v3", "qk_rope_head_dim"),
        ("deepseek_v3", "topk_group"),
        ("glm4_moe", "n_routed_experts"),
        ("granitemoe", "num_experts_per_tok"),
    ];
    for (family, key) in keys {
        let expected = format!("config.json: key `{key}`: expected a positive integer, got ");
        assert_eq!(message(family, key, Value::Null), format!("{expected}null"), "{family}");
        assert_eq!(message(family, key, json!("8")), format!("{expected}\"8\""), "{family}");
        assert_eq!(message(family, key, json!(0)), format!("{expected}0"), "{family}");
        let mut config: Value = serde_json::from_str(&changed(family, &[])).unwrap();
        config.as_object_mut().unwrap().remove(key);
        let error = parse_config(&config.to_string(), "config.json").unwrap_err().to_string();
        assert_eq!(error, format!("{expected}nothing: the key is missing"), "{family}");
    }
}

#[test]
fn contradictory_keys_and_what_no_decoder_does_are_refused() {
    let cases = [
        ("mixtral", "num_experts_per_tok", json!(7), "at most num_local_experts 6, got 7"),
        ("granitemoe", "sliding_window", json!(63), "null or at least max_position_embeddings 64, got 63"),
        ("mixtral", "hidden_act", json!("gelu"), "silu, got gelu"),
        (
            "qwen2_moe",
            "layer_types",
            json!(["full_attention", "sliding_attention", "full_attention"]),
            "full_attention in all blocks, got sliding_attention",
        ),
        ("minimax_m2", "use_routing_bias", json!(false), "true, got false"),
        ("minimax_m2", "scoring_func", json!("softmax"), "sigmoid, got softmax"),
        ("minimax_m2", "attn_type_list", json!([1, 0]), "1 in all blocks, got 0"),
        ("minimax_m2", "qk_norm_type", json!("per_head"), "per_layer, got per_head"),
        ("glm4_moe_lite", "mlp_layer_types", json!(["dense", "sparse"]), "one for each of num_hidden_layers 3, got 2"),
        ("glm4_moe_lite", "mlp_layer_types", json!(["dense", "sparse", "moe"]), "dense or sparse, got moe"),
        ("glm4_moe_lite", "mlp_layer_types", json!(vec!["dense"; 3]), "at least one block with experts, got none"),
        ("qwen3_moe", "mlp_only_layers", json!([4]), "blocks of num_hidden_layers 4, got 4"),
        ("qwen3_moe", "mlp_only_layers", json!([-1]), "a list of integers, at least 0, got [-1]"),
        ("deepseek_v2", "topk_method", json!("noaux_tc"), "greedy or group_limited_greedy, got noaux_tc"),
        ("deepseek_v2", "norm_topk_prob", json!(true), "false, got true"),
        ("deepseek_v2", "attention_bias", json!(true), "false, got true"),
        ("deepseek_v3", "n_group", json!(3), "a divisor of n_routed_experts 8, got 3"),
        ("deepseek_v3", "topk_group", json!(5), "at most n_group 4, got 5"),
        ("deepseek_v3", "num_experts_per_tok", json!(5), "at most the 4 experts of topk_group 2, got 5"),
        ("deepseek_v3", "scoring_func", json!("softmax"), "sigmoid, got softmax"),
        ("deepseek_v3", "moe_layer_freq", json!(2), "1, got 2"),
        ("deepseek_v3", "first_k_dense_replace", json!(2), "at least one block with experts, got none"),
        (
            "deepseek_v3",
            "rope_scaling",
            json!({"type": "ntk"}),
            "rope_type default, linear, dynamic, yarn, llama3 or longrope, got ntk",
        ),
        ("granitemoe", "logits_scaling", json!(0), "a positive number, got 0"),
        ("gpt_oss", "layer_types", json!(["full_attention"]), "one for each of num_hidden_layers 3, got 1"),
        ("gpt_oss", "layer_types", json!([1, 2, 3]), "a list of strings, got [1,2,3]"),
        ("gpt_oss", "sliding_window", json!(0), "a positive integer, got 0"),
        ("phimoe", "num_experts_per_tok", json!(3), "2, got 3"),
        ("phimoe", "router_jitter_noise", json!(-1), "a positive number, got -1"),
        (
            "phimoe",
            "rope_scaling",
            json!({"type": "yarn"}),
            "rope_type default or longrope, as this family has, got yarn",
        ),
    ];
    for (family, key, value, expected) in cases {
        assert_eq!(message(family, key, value), format!("config.json: key `{key}`: expected {expected}"), "{family}");
    }
    let step = message("qwen3_moe", "decoder_sparse_step", json!(5));
    assert!(step.ends_with("expected at least one block with experts, got none"), "{step}");
}

/// Of GLM-4.7-Flash 20 heads share 2048 numbers, for they have widths of their own.
#[test]
fn heads_of_latent_attention_need_not_divide_the_hidden_state() {
    let spec = parse(
        "glm4_moe_lite",
        &[("num_attention_heads", json!(5)), ("num_key_value_heads", json!(5)), ("head_dim", Value::Null)],
    );
    assert_eq!(spec.unwrap().heads, 5);
    let error = parse(
        "mixtral",
        &[("num_attention_heads", json!(5)), ("num_key_value_heads", json!(5)), ("head_dim", Value::Null)],
    );
    assert!(error.unwrap_err().to_string().ends_with("expected a divisor of hidden_size 32, got 5"));
}

/// Names of all families.
fn names() -> String {
    FAMILIES.map(|family| family.name).join(", ")
}

#[test]
fn an_unknown_family_is_told_those_there_are() {
    for (config, expected) in [
        (r#"{"model_type": "llama", "hidden_size": 16}"#, "model family without experts `llama`"),
        (r#"{"model_type": "new_moe", "num_experts": 4}"#, "model family `new_moe`"),
        (r#"{"model_type": "seeing", "text_config": {}}"#, "model family around a text model `seeing`"),
    ] {
        let error = parse_config(config, "config.json").unwrap_err().to_string();
        assert_eq!(error, format!("unknown {expected}: expected one of {}", names()));
    }
    let error = parse_moe_config(r#"{"model_type": "llama"}"#, "config.json").unwrap_err().to_string();
    assert_eq!(error, format!("unknown model family without experts `llama`: expected one of {}", names()));
    for family in FAMILIES.iter().filter(|family| family.name != "olmoe") {
        parse_moe_config(&changed(family.name, &[]), "config.json").unwrap();
    }
}

#[test]
fn a_family_with_a_part_that_is_not_here_is_told_which_and_what_runs() {
    let known = format!("config.json: key `model_type`: expected one of {}, got", names());
    for (config, expected) in [
        (json!({"model_type": "nemotron_h"}).to_string(), "nemotron_h: there are no Mamba-2 mixers here"),
        (
            json!({"model_type": "seeing", "text_config": {"model_type": "qwen3_moe_text"}}).to_string(),
            "seeing: there are no other parts than text models here; its text model, qwen3_moe, runs from a checkpoint of its own",
        ),
    ] {
        let error = parse_config(&config, "config.json").unwrap_err();
        assert!(error.is_user_error());
        assert_eq!(error.to_string(), format!("{known} {expected}"));
    }
}

/// What README.md says of the table, between its two markers; with `PHASE_MOE_README_WRITE=1` it is written there.
#[test]
fn the_readme_lists_the_families_of_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once("<!-- families -->\n").unwrap();
    let (found, after) = rest.split_once("  <!-- /families -->").unwrap();
    let mut list = String::from("\n  | models | `model_type` | GGUF | checked against |\n  |---|---|---|---|\n");
    for Family { name, models, gguf, checked, .. } in FAMILIES {
        let gguf = if gguf.is_empty() { "–".to_owned() } else { format!("`{}`", gguf.join("`, `")) };
        list += &format!("  | {models} | `{name}` | {gguf} | {} |\n", checked.join(", "));
    }
    list.push('\n');
    if std::env::var_os("PHASE_MOE_README_WRITE").is_some() {
        std::fs::write(&path, format!("{before}<!-- families -->\n{list}  <!-- /families -->{after}")).unwrap();
    } else {
        assert!(found == list, "README.md: expected the families of zoo::FAMILIES:\n{list}got:\n{found}");
    }
}

/// The guide's example is a file that compiles.
#[test]
fn the_guide_shows_a_file_as_it_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guide = std::fs::read_to_string(root.join("docs/add-a-family.md")).unwrap();
    let (_, rest) = guide.split_once("```rust,ignore\n").unwrap();
    let (shown, _) = rest.split_once("```").unwrap();
    assert!(shown == std::fs::read_to_string(root.join("src/zoo/mixtral.rs")).unwrap(), "expected src/zoo/mixtral.rs");
}

/// What the table says is checked is: each family has goldens, each architecture a file of them, and llama.cpp's logits where it says so.
#[test]
fn what_the_table_says_is_checked_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let situations = std::fs::read_to_string(root.join("cli/tests/situations/llama_cpp.json")).unwrap();
    let mut names = std::collections::BTreeSet::new();
    for Family { name, gguf, checked, .. } in FAMILIES {
        assert!(names.insert(name), "{name} twice");
        // OLMoE has a directory of its own.
        let goldens = if name == "olmoe" { "olmoe_random".to_owned() } else { format!("zoo/{name}") };
        assert!(root.join("tests/goldens").join(goldens).join("goldens.safetensors").exists(), "{name}");
        assert!(checked.contains(&"transformers"), "{name}");
        for architecture in gguf {
            assert!(root.join(format!("tests/goldens/gguf/{architecture}.gguf")).exists(), "{architecture}");
            let by_llama_cpp = situations.contains(&format!("/{architecture}.gguf\""));
            assert_eq!(by_llama_cpp, checked.contains(&"llama.cpp"), "{name}: {architecture} and llama.cpp");
        }
    }
}

#[test]
fn absent_keys_mean_what_the_family_means_by_them() {
    let null = |key| (key, Value::Null);
    let qwen = parse("qwen2_moe", &[null("qkv_bias"), null("mlp_only_layers"), null("norm_topk_prob")]).unwrap();
    assert_eq!((qwen.attention_bias, qwen.moe_layers()), (AttentionBias::Inputs, 3));
    assert!(!qwen.moe.scoring.normalize && qwen.moe.shared.unwrap().gated);
    let v3 = parse("deepseek_v3", &[null("norm_topk_prob"), null("n_shared_experts"), null("scoring_func")]).unwrap();
    // To Python null is false.
    assert!(!v3.moe.scoring.normalize && v3.moe.selection_bias && v3.moe.shared.is_none());
    assert_eq!(v3.moe.scoring.groups, Some(GroupLimit { groups: 4, top_groups: 2, score: GroupScore::TopTwo }));
    assert_eq!((v3.dense.blocks.as_slice(), v3.extra_blocks), ([0].as_slice(), 1));
    let v2 = parse("deepseek_v2", &[null("topk_method"), null("q_lora_rank")]).unwrap();
    assert_eq!((v2.moe.scoring.groups, v2.latent.unwrap().query_rank), (None, None));
    let lite = parse("deepseek_v2", &[("n_group", json!(1)), ("topk_group", json!(1))]).unwrap();
    assert_eq!(lite.moe.scoring.groups, None, "one group limits nobody");
    // Of texts that are longer than the window.
    let every_other = [
        null("layer_types"),
        null("rope_parameters"),
        null("sliding_window"),
        null("attention_bias"),
        ("max_position_embeddings", json!(4096)),
    ];
    let gpt_oss = parse("gpt_oss", &every_other).unwrap();
    assert_eq!((gpt_oss.window.blocks, gpt_oss.window.positions), (vec![0, 2], 128));
    assert_eq!((gpt_oss.attention_bias, gpt_oss.rope_theta), (AttentionBias::All, 150_000.0));
    let RopeScaling::Yarn(yarn) = gpt_oss.rope_scaling else { panic!("{:?}", gpt_oss.rope_scaling) };
    assert!(yarn.factor == 32.0 && !yarn.whole_rotations);
    let kinds = ["full_attention", "full_attention", "chunked_attention"];
    let chunked = message("gpt_oss", "layer_types", json!(kinds));
    assert!(chunked.ends_with("expected sliding_attention or full_attention, got chunked_attention"), "{chunked}");
    let whole = parse("gpt_oss", &[("layer_types", json!(vec!["full_attention"; 3]))]).unwrap();
    assert!(whole.window.blocks.is_empty());
    let phi = parse("phimoe", &[null("router_jitter_noise"), null("attention_bias"), null("lm_head_bias")]).unwrap();
    assert_eq!((phi.moe.scoring, phi.output_bias), (Scoring::sparse_mixer(0.01), false));
    let lite = parse("glm4_moe_lite", &[null("mlp_layer_types")]).unwrap();
    assert_eq!((lite.dense.blocks.as_slice(), lite.moe.scoring.scale), ([0].as_slice(), 1.8));
    let between = json!(["sparse", "dense", "sparse"]);
    assert_eq!(parse("glm4_moe_lite", &[("mlp_layer_types", between)]).unwrap().dense.blocks, [1]);
    // The published files say how much of a head is rotated by its width.
    let minimax = parse("minimax_m2", &[null("rope_parameters"), ("rotary_dim", json!(4))]).unwrap();
    assert_eq!((minimax.rotary_dim, minimax.rope_theta), (4, 5e6));
}

#[test]
fn windows_are_in_the_blocks_that_the_family_says() {
    let window = |family: &str, keys: &[(&str, Value)]| {
        let SlidingWindow { blocks, positions } = parse(family, keys).unwrap().window;
        (blocks, positions)
    };
    let none = (vec![], 0);
    assert_eq!(window("mixtral", &[("sliding_window", json!(63))]), (vec![0, 1], 63));
    // No position is out of sight.
    assert_eq!(window("mixtral", &[("sliding_window", json!(64))]), none);
    assert_eq!(window("phimoe", &[("sliding_window", json!(5))]), (vec![0, 1], 5));
    let sliding = ("use_sliding_window", json!(true));
    assert_eq!(window("qwen3_moe", &[("sliding_window", json!(5))]), none);
    assert_eq!(window("qwen3_moe", &[sliding.clone(), ("sliding_window", json!(5))]), (vec![0, 1, 2, 3], 5));
    assert_eq!(window("qwen3_moe", &[sliding.clone(), ("sliding_window", Value::Null)]), none);
    let five = ("sliding_window", json!(5));
    assert_eq!(window("qwen2_moe", std::slice::from_ref(&five)), none);
    let unsaid = ("layer_types", Value::Null);
    assert_eq!(window("qwen2_moe", &[sliding.clone(), five.clone(), unsaid.clone()]), (vec![0, 2], 5));
    let first = ("max_window_layers", json!(1));
    assert_eq!(window("qwen2_moe", &[sliding.clone(), five.clone(), unsaid, first]), (vec![0], 5));
    let said = ("layer_types", json!(["full_attention", "sliding_attention", "full_attention"]));
    assert_eq!(window("qwen2_moe", &[sliding, five, said]), (vec![1], 5));
}

#[test]
fn positions_are_stretched_as_transformers_says_now_and_as_it_said() {
    let now = parse("deepseek_v2", &[]).unwrap().rope_scaling;
    assert!(matches!(now, RopeScaling::Yarn(_)), "{now:?}");
    let keys = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.8,
        "mscale_all_dim": 0.5, "beta_fast": 4, "beta_slow": 0.5});
    let before = [("rope_parameters", Value::Null), ("rope_theta", json!(20.0)), ("rope_scaling", keys)];
    let before = parse("deepseek_v2", &before).unwrap();
    assert_eq!((before.rope_scaling, before.rope_theta), (now, 20.0));
    let nothing = json!({"type": "yarn"});
    assert_eq!(
        message("qwen3_moe", "rope_scaling", nothing),
        "config.json: key `rope_scaling.factor`: expected a positive number, got nothing: the key is missing"
    );
}
