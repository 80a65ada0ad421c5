//! The command line: exit codes, messages, JSON and files, on the bundled model.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::{Command, Output};

use phase_moe::checkpoint::Checkpoint;
use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Runs a command that must succeed and print one JSON document and nothing else.
fn json(arguments: &[&str]) -> Value {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
}

fn row<'a>(report: &'a Value, router: &str) -> &'a Value {
    report["rows"].as_array().unwrap().iter().find(|row| row["router"] == router).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {value}"))
}

fn words(checkpoint: &Checkpoint, name: &str) -> Vec<[u8; 4]> {
    checkpoint.read(name).unwrap().as_chunks::<4>().0.to_vec()
}

#[test]
fn mistakes_end_with_code_2_and_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().to_str().unwrap();
    let binary = directory.path().join("binary.txt");
    std::fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
    let cases: [(&[&str], &str); 11] = [
        (&["compare", "--router", "best"], "unknown router `best`: expected one of top-k, "),
        (&["compare", "--capacity-factor", "-1", "--tokens", "600"], "unexpected argument '-1'"),
        (
            &["compare", "--capacity-factor", "0", "--tokens", "600"],
            "capacity factor is 0: expected a positive finite number",
        ),
        (&["compare", "--devices", "99", "--tokens", "600"], "devices is 99: expected 1 to experts 32"),
        (&["compare", "--top-k", "33", "--tokens", "600"], "top_k 33 exceeds experts 32"),
        (&["compare", "--model", empty], "config.json: No such file"),
        (&["compare", "--text", binary.to_str().unwrap()], "expected UTF-8 text"),
        (&["compare", "--tokens", "1"], "expected at least 2 in one text"),
        (&["--threads", "0", "inspect"], "--threads is 0: expected at least 1"),
        (&["logits", "--ids", "99999", "--out", "never"], "token id is 99999: expected below the vocabulary's 2048"),
        (&["generate", "--prompt", ""], "--prompt: expected at least one token"),
    ];
    for (arguments, expected) in cases {
        let output = run(arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in ["compare", "generate", "trace", "route", "logits", "inspect"] {
        let help = stdout(&run(&[command, "--help"]));
        assert!(help.contains(&format!("Example: phase-moe {command}")), "{command}");
    }
}

#[test]
fn compare_prints_every_router_within_100_columns() {
    let table = stdout(&run(&["compare", "--tokens", "1024", "--capacity-factor", "1.0"]));
    for router in phase_moe::routing::registry::RouterKind::ALL {
        assert!(table.contains(router.name()), "{table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
}

#[test]
fn compare_json_has_the_documented_keys_and_consistent_figures() {
    let report = json(&["compare", "--tokens", "1536", "--capacity-factor", "1.0", "--json"]);
    for (part, keys) in [
        ("model", &["name", "family", "layers", "experts", "top_k", "parameters"][..]),
        ("text", &["files", "tokens", "batch_tokens"]),
        ("dropless", &["perplexity", "tokens_per_second"]),
    ] {
        keys.iter().for_each(|key| assert!(!report[part][key].is_null(), "{part}.{key}"));
    }
    let keys = [
        "router",
        "capacity_factor",
        "profile",
        "capacity_rule",
        "devices",
        "device_max_violation",
        "survival",
        "dropped_slots",
        "tokens_without_expert",
        "demand_max_violation",
        "gate_mass",
        "gate_mass_vs_bound",
        "perplexity",
        "perplexity_increase",
        "max_violation",
        "load_cv",
        "gini",
        "jain",
        "route_nanos_per_token",
        "tokens_per_second",
    ];
    let dropless = number(&report["dropless"], "perplexity");
    for row in report["rows"].as_array().unwrap() {
        let object = row.as_object().unwrap();
        assert_eq!(object.len(), keys.len());
        keys.iter().for_each(|key| assert!(object.contains_key(*key), "{key}"));
        assert!((number(row, "perplexity") / dropless - 1.0 - number(row, "perplexity_increase")).abs() < 1e-9);
        assert_eq!(number(row, "survival") == 1.0, number(row, "dropped_slots") == 0.0, "{row}");
        if row["router"] == "top-k" {
            assert!(row["capacity_factor"].is_null() && row["gate_mass_vs_bound"].is_null());
            assert_eq!((number(row, "gate_mass"), number(row, "perplexity_increase")), (1.0, 0.0));
        } else {
            assert!(number(row, "max_violation") < 1e-9, "a load exceeds its limit: {row}");
            let certified = number(row, "gate_mass_vs_bound");
            assert!(certified <= 1.0 + 1e-9 && certified > 0.0, "{row}");
        }
    }
    assert_eq!(number(row(&report, "quota"), "survival"), 1.0);
}

#[test]
fn a_trace_routes_offline_as_it_did_in_the_model() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, routes) = (path("trace.safetensors"), path("routes.safetensors"));
    assert!(run(&["trace", "--tokens", "1024", "--out", &trace]).status.success());
    let traced = Checkpoint::open_files(&[&trace]).unwrap();
    assert_eq!(traced.entry("layer.3").unwrap().shape, [1024, 32]);
    assert_eq!(traced.entry("tokens").unwrap().shape, [1024]);
    let metadata = |key: &str| traced.metadata().get(key).map(String::as_str);
    assert_eq!((metadata("model"), metadata("experts"), metadata("top_k")), (Some("tiny-moe"), Some("32"), Some("4")));
    assert_eq!(
        (metadata("score"), metadata("normalize"), metadata("batch_tokens")),
        (Some("softmax"), Some("false"), Some("512"))
    );

    let report = json(&[
        "route",
        "--logits",
        &trace,
        "--router",
        "phase",
        "--top-k",
        "4",
        "--capacity-factor",
        "1.0",
        "--out",
        &routes,
        "--json",
    ]);
    assert_eq!((report["router"].as_str(), report["top_k"].as_u64()), (Some("phase"), Some(4)));
    for layer in report["layers"].as_array().unwrap() {
        assert_eq!((number(layer, "survival"), number(layer, "feasible_survival")), (1.0, 1.0));
        assert_eq!(
            (layer["demand"].as_u64(), layer["capacity_total"].as_u64(), layer["kept"].as_u64()),
            (Some(4096), Some(4096), Some(4096))
        );
        assert!(number(layer, "gate_mass_vs_bound") > 0.999, "{layer}");
    }
    let routed = Checkpoint::open_files(&[&routes]).unwrap();
    for layer in 0..4 {
        let experts: Vec<i32> =
            words(&routed, &format!("layer.{layer}.experts")).into_iter().map(i32::from_le_bytes).collect();
        let limits: Vec<u32> =
            words(&routed, &format!("layer.{layer}.capacities")).into_iter().map(u32::from_le_bytes).collect();
        let mut load = [0u32; 32];
        experts.iter().for_each(|&expert| load[expert as usize] += 1);
        assert_eq!(load.as_slice(), limits);
        assert_eq!(routed.entry(&format!("layer.{layer}.weights")).unwrap().shape, [1024, 4]);
    }
}

#[test]
fn routes_under_given_capacities_drop_what_has_no_room() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, routes) = (path("trace.safetensors"), path("routes.safetensors"));
    assert!(run(&["trace", "--tokens", "600", "--out", &trace]).status.success());
    let capacities = "300,200,100,0";
    let arguments =
        ["route", "--logits", &trace, "--devices", "4", "--capacities", capacities, "--out", &routes, "--json"];
    let report = json(&arguments);
    for layer in report["layers"].as_array().unwrap() {
        assert_eq!(layer["kept"].as_u64(), Some(600));
        assert_eq!((number(layer, "survival"), number(layer, "feasible_survival")), (0.25, 0.25));
    }
    let routed = Checkpoint::open_files(&[&routes]).unwrap();
    let limits: Vec<u32> = words(&routed, "layer.0.device_capacities").into_iter().map(u32::from_le_bytes).collect();
    assert_eq!(limits, [300, 200, 100, 0]);
    for (expert, weight) in words(&routed, "layer.0.experts").into_iter().zip(words(&routed, "layer.0.weights")) {
        assert_eq!(i32::from_le_bytes(expert) == -1, f32::from_le_bytes(weight) == 0.0);
    }
    let wrong = run(&["route", "--logits", &trace, "--capacities", "1,2"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("expected 32 values, one per expert, got 2"));
}

#[test]
fn logits_go_to_a_file_from_ids_or_a_file_of_ids() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("ids"), "5, 6\n7").unwrap();
    assert!(run(&["logits", "--ids", "5,6,7", "--out", &path("a")]).status.success());
    assert!(run(&["logits", "--ids-file", &path("ids"), "--out", &path("b")]).status.success());
    let [a, b] = ["a", "b"].map(|name| Checkpoint::open_files(&[path(name)]).unwrap());
    assert_eq!(a.entry("logits").unwrap().shape, [3, 2048]);
    assert_eq!(a.read("logits").unwrap(), b.read("logits").unwrap());
    std::fs::write(path("ids"), "5 x").unwrap();
    assert_eq!(run(&["logits", "--ids-file", &path("ids"), "--out", &path("b")]).status.code(), Some(2));
}

#[test]
fn inspect_counts_what_the_file_holds() {
    let report = json(&["inspect", "--json"]);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe/model.safetensors");
    let checkpoint = Checkpoint::open_files(&[model]).unwrap();
    let bytes: usize = checkpoint.tensors().values().map(|entry| entry.bytes).sum();
    let whole = report["expert_bytes"].as_u64().unwrap() + report["other_bytes"].as_u64().unwrap();
    assert_eq!(whole, bytes as u64);
    assert_eq!(report["parameters"].as_u64().unwrap() * 2, whole);
    assert_eq!((report["family"].as_str(), report["dtype"].as_str()), (Some("olmoe"), Some("bf16")));
    assert_eq!(report["bytes_per_expert"].as_u64().unwrap() * 32 * 4, report["expert_bytes"].as_u64().unwrap());
    for key in ["layers", "moe_layers", "hidden", "experts", "top_k", "expert_width", "active_parameters"] {
        assert!(report[key].as_u64().is_some_and(|value| value > 0), "{key}");
    }
}

#[test]
fn generate_is_repeatable_and_reports_itself() {
    let arguments =
        ["generate", "--prompt", "And the LORD said", "--new-tokens", "12", "--temperature", "0.8", "--json"];
    let (first, second) = (json(&arguments), json(&arguments));
    assert_eq!(first["text"], second["text"]);
    assert!(first["new_tokens"].as_u64().is_some_and(|new| new > 0 && new <= 12));
    assert!(number(&first, "prefill_tokens_per_second") > 0.0 && number(&first, "decode_tokens_per_second") > 0.0);
    assert_eq!(number(&first, "survival"), 1.0);
    for key in ["hit_rate", "expert_bytes_read", "peak_resident_expert_bytes"] {
        assert!(first.as_object().unwrap().contains_key(key) && first[key].is_null(), "{key}");
    }
}
