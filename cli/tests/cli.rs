//! The command line: exit codes, messages, JSON and files, on the bundled model.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output};

use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use phase_moe::eval::{Batching, EvalText};
use phase_moe::{Checkpoint, LoadOptions, Model, RouterKind};
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

/// Values of an `i32` tensor, or of a `u32` tensor with none above `i32`.
fn integers(checkpoint: &Checkpoint, name: &str) -> Vec<i32> {
    words(checkpoint, name).into_iter().map(i32::from_le_bytes).collect()
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
    let binary = binary.to_str().unwrap();
    let nowhere = directory.path().join("no/such/file");
    let nowhere = nowhere.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["compare", "--router", "best"], "unknown router `best`: expected one of top-k, "),
        (&["compare", "--capacity-factor", "-1"], "capacity factor is -1: expected a positive finite number"),
        (&["compare", "--capacity-factor", "0"], "capacity factor is 0: expected a positive finite number"),
        (&["compare", "--router", "top-k", "--capacity-factor", "nan"], "capacity factor is NaN: expected a positive"),
        (&["compare", "--device-speeds", "1,-2"], "device speed is -2: expected a positive finite number"),
        (&["compare", "--devices", "99"], "devices is 99: expected 1 to experts 32"),
        (
            &["compare", "--devices", "3", "--device-speeds", "1,2"],
            "--device-speeds: expected --devices 3 values, got 2",
        ),
        (&["compare", "--devices", "4", "--profile", "mild"], "--profile is for limits per expert"),
        (&["compare", "--top-k", "33", "--tokens", "600"], "top_k 33 exceeds experts 32"),
        (&["compare", "--model", empty], "config.json: No such file"),
        (&["compare", "--text", binary], "expected UTF-8 text"),
        (&["compare", "--tokens", "1"], "expected at least 2 in one text"),
        (&["--threads", "0", "inspect"], "--threads is 0: expected at least 1"),
        (&["--threads", "1025", "inspect"], "--threads is 1025: expected at least 1 and at most 1024"),
        (&["inspect", "--dtype", "bf16"], "unexpected argument '--dtype'"),
        (&["logits", "--ids", "99999", "--out", "never"], "token id is 99999: expected below the vocabulary's 2048"),
        (&["logits", "--ids-file", binary, "--out", "never"], "expected UTF-8 text"),
        (&["logits", "--ids", "1", "--out", nowhere], "no/such/file: No such file"),
        (&["trace", "--tokens", "64", "--out", nowhere], "no/such/file: No such file"),
        (&["generate", "--prompt", ""], "--prompt: expected at least one token"),
        (&["generate", "--prompt", "a", "--prompt", ""], "--prompt: expected at least one token"),
        (&["generate", "--prompt", "a", "--chunk-tokens", "0"], "--chunk-tokens is 0: expected at least 1"),
        (&["generate", "--prompt", "a", "--system", "b"], "required arguments were not provided"),
        (&["generate", "--prompt", "a", "--chat"], "--chat: expected a chat template in chat_template.jinja or"),
        (&["generate", "--prompt", "a", "--temperature", "-1"], "temperature is -1: expected 0 or a positive finite"),
        (&["generate", "--prompt", "a", "--devices", "4"], "--devices limits nothing by itself: add --capacity-factor"),
        (&["route", "--logits", nowhere, "--capacity-factor", "1"], "no/such/file: No such file"),
        (&["route", "--logits", "t", "--capacities", "1", "--device-speeds", "1"], "cannot be used with"),
        (&["route", "--logits", "t", "--capacities", "1", "--profile", "mild"], "cannot be used with"),
        (&["route", "--logits", "t", "--capacities", "1", "--capacity", "ceil"], "cannot be used with"),
        (&["route", "--logits", "t", "--capacities", "1", "--capacity-factor", "1"], "cannot be used with"),
        (
            &["route", "--logits", "t", "--keep-top", "2"],
            "--keep-top is for the routers cache and cache+phase, not for phase",
        ),
        (&["replay", "--logits", nowhere], "no/such/file: No such file"),
        (&["replay", "--logits", "t", "--tokens", "9"], "cannot be used with"),
        (&["replay", "--cache-bonus", "nan"], "cache bonus is NaN: expected a finite number, at least 0"),
        (&["replay", "--max-mass-loss", "-1"], "max mass loss is -1: expected 0 to 1"),
        (&["replay", "--target-hit-rate", "2"], "target hit rate is 2: expected 0 to 1"),
        (&["replay", "--policy", "fifo"], "unknown policy `fifo`: expected one of lru, lfu, lfru, affinity"),
        (&["replay", "--admission", "some"], "unknown admission `some`: expected one of affinity, all"),
        (&["generate", "--prompt", "a", "--cached-experts", "33"], "cached experts is 33: expected 0 to experts 32"),
        (
            &["generate", "--prompt", "a", "--cache-bonus", "0.1"],
            "--cache-bonus is for the routers cache and cache+phase",
        ),
        (&["compare", "--cached-experts", "8"], "--cached-experts is for the routers cache and cache+phase"),
        (&["tune", "--cache-bonus", "0.1,-1"], "cache bonus is -1: expected a finite number, at least 0"),
        (&["tune", "--tokens", "64", "--cached-experts", "33"], "cached experts is 33: expected 0 to experts 32"),
        (&["tune", "--tokens", "64", "--top-k", "33"], "top_k 33 exceeds experts 32"),
        (&["replay", "--batch-tokens", "0"], "--batch-tokens is 0: expected at least 1"),
        (&["replay", "--capacity-factor", "1"], "--capacity-factor: cache knows no limit: use cache+phase"),
        (&["replay", "--tokens", "64", "--cached-experts", "33"], "cached experts is 33: expected 0 to experts 32"),
        (&["replay", "--tokens", "64", "--top-k", "33"], "top_k 33 exceeds experts 32"),
    ];
    for (arguments, expected) in cases {
        let output = run(arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        // Clap's own messages have a usage line and a hint below.
        assert!(message.lines().count() == 1 || message.starts_with("error: "), "{arguments:?}: {message}");
    }
}

/// Writing to `/dev/full` fails as a full disk does: no mistake of the user.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_with_code_1() {
    let output = run(&["logits", "--ids", "1", "--out", "/dev/full"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("phase-moe: /dev/full: No space left"));
}

#[test]
fn every_command_has_help_with_an_example() {
    let commands = "compare generate tune trace route replay logits inspect completions man";
    for command in commands.split(' ') {
        let help = stdout(&run(&[command, "--help"]));
        assert!(help.contains(&format!("Example: phase-moe {command}")), "{command}");
    }
}

#[test]
fn compare_prints_every_router_within_80_columns() {
    let table = stdout(&run(&["compare", "--tokens", "1024", "--capacity-factor", "1.0"]));
    for router in RouterKind::ALL {
        if matches!(router, RouterKind::Cache | RouterKind::CachePhase) {
            continue; // Without an expert cache they are run where they are named.
        }
        assert!(table.contains(router.name()), "{table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
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
            // A token may have more than top_k experts there, so the bound says nothing.
            if row["router"] == "expert-choice" {
                assert!(row["gate_mass_vs_bound"].is_null());
                continue;
            }
            let certified = number(row, "gate_mass_vs_bound");
            assert!(certified <= 1.0 + 1e-9 && certified > 0.0, "{row}");
        }
    }
    assert_eq!(number(row(&report, "quota"), "survival"), 1.0);
}

#[test]
fn compare_without_factors_runs_the_documented_rules() {
    let report = json(&["compare", "--tokens", "600", "--router", "phase,phase", "--json"]);
    let rule = |row: &Value| (row["devices"].as_u64(), number(row, "capacity_factor"), row["profile"].is_null());
    let rules: Vec<_> = report["rows"].as_array().unwrap().iter().map(rule).collect();
    assert_eq!(rules, [(Some(4), 1.0, true), (None, 1.0, false), (None, 1.25, false), (None, 2.0, false)]);
    assert!(report["device_speeds"].is_null());
}

#[test]
fn compare_runs_each_factor_once_and_names_the_speeds() {
    let arguments = ["compare", "--tokens", "600", "--router", "phase", "--capacity-factor", "1,1.5,1.0"];
    let speeds = ["--device-speeds", "1,2,1"];
    let table = stdout(&run(&[&arguments[..], &speeds].concat()));
    assert_eq!(table.matches("per 3 devices of speeds 1, 2, 1, capacity factor 1.0").count(), 1, "{table}");
    assert_eq!(table.lines().filter(|line| line.starts_with("  phase ")).count(), 2, "{table}");
    let report = json(&[&arguments[..], &speeds, &["--json"]].concat());
    assert_eq!(report["device_speeds"], serde_json::json!([1.0, 2.0, 1.0]));
}

#[test]
fn dtype_and_mixing_change_what_is_measured() {
    let arguments = ["compare", "--tokens", "1536", "--router", "phase", "--capacity-factor", "1.0", "--json"];
    let survives = |more: &[&str]| {
        let report = json(&[&arguments[..], more].concat());
        assert_eq!(number(row(&report, "phase"), "survival"), 1.0, "{more:?}");
        (number(&report["dropless"], "perplexity"), number(row(&report, "phase"), "demand_max_violation"))
    };
    let (plain, one_kind) = survives(&[]);
    let (rounded, _) = survives(&["--dtype", "bf16"]);
    assert!(rounded != plain && (rounded / plain - 1.0).abs() < 0.02, "{rounded} {plain}");
    let (mixed_perplexity, mixed) = survives(&["--batches", "mixed"]);
    assert!((mixed_perplexity / plain - 1.0).abs() < 1e-3, "dropless does not see batches: {mixed_perplexity} {plain}");
    assert!(mixed < one_kind, "mixed text asks for less of the same experts: {mixed} {one_kind}");
}

#[test]
fn a_shuffle_changes_who_meets_in_a_batch_and_nothing_else() {
    let arguments = ["compare", "--tokens", "3072", "--router", "phase", "--capacity-factor", "1.0", "--json"];
    let shuffled = |seed| json(&[&arguments[..], &["--shuffle", seed]].concat());
    let (plain, one, again, two) = (json(&arguments), shuffled("1"), shuffled("1"), shuffled("2"));
    let perplexity = |report: &Value| number(row(report, "phase"), "perplexity");
    assert_eq!(perplexity(&one), perplexity(&again));
    assert!(perplexity(&one) != perplexity(&plain) && perplexity(&one) != perplexity(&two));
    let dropless = |report: &Value| number(&report["dropless"], "perplexity");
    assert!((dropless(&one) / dropless(&plain) - 1.0).abs() < 1e-6);
    assert_eq!(one["text"]["shuffle"], 1);
    assert!(plain["text"].get("shuffle").is_none());
    assert_eq!(one["text"]["tokens"], plain["text"]["tokens"]);
}

#[test]
fn threads_change_no_result() {
    let directory = tempfile::tempdir().unwrap();
    let logits = |threads: &str| {
        let path = directory.path().join(threads).to_str().unwrap().to_owned();
        let output = run(&["--threads", threads, "logits", "--ids", "5,6,7", "--out", &path]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Checkpoint::open(path).unwrap().read("logits").unwrap()
    };
    assert_eq!(logits("1"), logits("3"));
}

#[test]
fn what_needs_no_tokenizer_asks_for_none_and_a_false_config_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(bundled.join(name), path(name)).unwrap();
    }
    let model = directory.path().to_str().unwrap();
    assert!(run(&["inspect", "--model", model]).status.success());
    assert!(run(&["logits", "--model", model, "--ids", "5,6", "--out", &path("out")]).status.success());
    let wrong = |arguments: &[&str], expected: &str| {
        let output = run(arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message}");
    };
    wrong(&["generate", "--model", model, "--prompt", "a"], "tokenizer.json: expected beside config.json, got none");
    let config = std::fs::read_to_string(path("config.json")).unwrap();
    for (key, value, expected) in [
        ("\"num_experts\": 32", "\"num_experts\": 16", "expected experts 0 to 15 as the configuration says"),
        ("\"num_experts\": 32", "\"num_experts\": 33", "experts.32.gate_proj.weight`: expected in the checkpoint"),
        ("\"intermediate_size\": 64", "\"intermediate_size\": 32", "expected shape [32, 128], got [64, 128]"),
    ] {
        assert!(config.contains(key));
        std::fs::write(path("config.json"), config.replace(key, value)).unwrap();
        wrong(&["inspect", "--model", model], expected);
    }
}

/// Expert ids of the library's own forward passes, `[tokens, top_k]` per layer.
fn forward_ids(tokens: usize) -> Vec<Vec<i32>> {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    let model = Model::load(&directory, &LoadOptions::default()).unwrap();
    let text = |name: &str| {
        let text = std::fs::read_to_string(directory.join("eval").join(name)).unwrap();
        EvalText { name: name.into(), ids: model.encode(&text).unwrap() }
    };
    let texts = ["scripture.txt", "code.txt", "reference.txt"].map(text);
    let batching = Batching { tokens: Some(tokens), ..Batching::default() };
    let mut ids = vec![Vec::new(); model.decoder().spec().layers];
    for batch in batching.batches(&[], &texts).unwrap() {
        let live = |token: usize| !batch.padding().is_some_and(|padding| padding[token]);
        let mut state = model.decoder().batch_state().keeping_routed();
        model.decoder().forward(&batch, &mut state).unwrap();
        for (ids, routed) in ids.iter_mut().zip(state.routed()) {
            let chosen: Vec<i32> = routed.assignment.ids().collect();
            let rows = chosen.chunks(routed.assignment.width()).enumerate().filter(|(token, _)| live(*token));
            ids.extend(rows.flat_map(|(_, row)| row));
        }
    }
    ids
}

#[test]
fn a_trace_routes_offline_as_it_did_in_the_model() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, routes) = (path("trace.safetensors"), path("routes.safetensors"));
    assert!(run(&["trace", "--tokens", "1024", "--out", &trace]).status.success());
    let traced = Checkpoint::open(&trace).unwrap();
    assert_eq!(traced.entry("layer.3").unwrap().shape, [1024, 32]);
    assert_eq!(traced.entry("tokens").unwrap().shape, [1024]);
    let bytes = std::fs::read(&trace).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = |key: &str| header.metadata().as_ref().and_then(|all| all.get(key)).map(String::as_str);
    assert_eq!((metadata("model"), metadata("experts"), metadata("top_k")), (Some("tiny-moe"), Some("32"), Some("4")));
    assert_eq!(
        (metadata("score"), metadata("normalize"), metadata("batch_tokens")),
        (Some("softmax"), Some("false"), Some("512"))
    );

    let arguments = ["route", "--logits", &trace, "--router", "top-k", "--out", &routes, "--json"];
    assert!(json(&arguments)["layers"][0]["capacity_total"].is_null());
    let routed = Checkpoint::open(&routes).unwrap();
    for (layer, expected) in forward_ids(1024).into_iter().enumerate() {
        assert_eq!(expected.len(), 1024 * 4);
        assert_eq!(integers(&routed, &format!("layer.{layer}.experts")), expected, "layer {layer}");
    }

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
    let routed = Checkpoint::open(&routes).unwrap();
    for layer in 0..4 {
        let experts = integers(&routed, &format!("layer.{layer}.experts"));
        let limits = integers(&routed, &format!("layer.{layer}.capacities"));
        let mut load = [0i32; 32];
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
    let routed = Checkpoint::open(&routes).unwrap();
    assert_eq!(integers(&routed, "layer.0.device_capacities"), [300, 200, 100, 0]);
    for (expert, weight) in words(&routed, "layer.0.experts").into_iter().zip(words(&routed, "layer.0.weights")) {
        assert_eq!(i32::from_le_bytes(expert) == -1, f32::from_le_bytes(weight) == 0.0);
    }
    let itself = run(&["route", "--logits", &trace, "--out", &trace]);
    assert_eq!(itself.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&itself.stderr).contains("expected another file than --logits"));
    let wrong = run(&["route", "--logits", &trace, "--capacities", "1,2"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("expected 32 values, one per expert, got 2"));
}

#[test]
fn a_batch_below_the_minimum_has_no_limit_and_its_room_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, routes) = (path("trace.safetensors"), path("routes.safetensors"));
    assert!(run(&["trace", "--tokens", "603", "--out", &trace]).status.success());
    // 3 tokens are left over: 12 slots on 4 devices of 8 experts, fewer than 4 a device.
    let arguments = ["route", "--logits", &trace, "--devices", "4", "--capacity-factor", "1", "--batch-tokens", "300"];
    let output = run(&[&arguments[..], &["--out", &routes, "--json"]].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        message,
        "capacity factor 1.0 per device: no limit in 1 of 3 batches, which have fewer than 4 slots per device on average\n"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let routed = Checkpoint::open(&routes).unwrap();
    for layer in 0..4 {
        let limits = integers(&routed, &format!("layer.{layer}.device_capacities"));
        assert_eq!(limits, [300 + 300 + 12; 4]);
        assert_eq!(report["layers"][layer]["capacity_total"].as_u64(), Some(4 * 612));
        let mut load = [0; 4];
        let experts = integers(&routed, &format!("layer.{layer}.experts"));
        experts.iter().for_each(|expert| load[(expert / 8) as usize] += 1);
        assert!(load.iter().zip(&limits).all(|(load, limit)| load <= limit), "{load:?}");
    }
    let silent = run(&["route", "--logits", &trace, "--devices", "4"]);
    assert_eq!(silent.status.code(), Some(2));
    let message = String::from_utf8(silent.stderr).unwrap();
    assert!(message.contains("--devices limits nothing by itself: add --capacity-factor or --capacities"), "{message}");
}

#[test]
fn replay_counts_what_the_bonus_saves_on_the_bundled_model() {
    let keys = [
        "policy",
        "cached_experts",
        "cache_bonus",
        "max_mass_loss",
        "requests",
        "hits",
        "misses",
        "hit_rate",
        "belady_hit_rate",
        "gate_mass_kept",
        "agreement",
        "bytes_read",
        "beside",
        "meaning",
    ];
    let replay = |more: &[&str]| {
        let report = json(&[&["replay", "--json"], more].concat());
        assert_eq!(report.as_object().unwrap().keys().map(String::as_str).collect::<HashSet<_>>(), keys.into());
        assert_eq!(number(&report, "hits") + number(&report, "misses"), number(&report, "requests"));
        assert!(number(&report, "hit_rate") <= number(&report, "belady_hit_rate"), "{report}");
        report
    };
    let text = ["--tokens", "900", "--cached-experts", "16"];
    let plain = replay(&[&text[..], &["--router", "top-k", "--admission", "all"]].concat());
    let cache = replay(&text);
    assert!(plain["cache_bonus"].is_null() && plain["max_mass_loss"].is_null());
    assert_eq!((number(&plain, "gate_mass_kept"), number(&plain, "agreement")), (1.0, 1.0));
    assert_eq!(number(&plain, "requests"), 900.0 * 4.0 * 4.0);
    assert!(number(&cache, "misses") < 0.6 * number(&plain, "misses"), "{cache} {plain}");
    assert!(number(&cache, "gate_mass_kept") > 0.98, "{cache}");
    let bytes = number(&json(&["inspect", "--json"]), "bytes_per_expert");
    assert_eq!(number(&cache, "bytes_read"), bytes * number(&cache, "misses"));
    let off = replay(&[&text[..], &["--cache-bonus", "0", "--admission", "all"]].concat());
    assert_eq!(off["misses"], plain["misses"]);
    let admitted = replay(&[&text[..], &["--cache-bonus", "0"]].concat());
    assert!(number(&admitted, "misses") < 0.95 * number(&plain, "misses"), "{admitted} {plain}");
    // Below one token's experts too: at least four fifths of what the best policy could have hit.
    for cached in ["1", "2", "3", "4", "6", "8"] {
        let small = replay(&["--tokens", "6000", "--cached-experts", cached]);
        assert!(number(&small, "hit_rate") >= 0.8 * number(&small, "belady_hit_rate"), "{small}");
    }

    // A bare trace does not know what an expert weighs.
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("trace.safetensors").to_str().unwrap().to_owned();
    assert!(run(&["trace", "--tokens", "900", "--out", &trace]).status.success());
    let bare = replay(&["--logits", &trace, "--cached-experts", "16"]);
    assert!(bare["bytes_read"].is_null());
    assert_eq!((&bare["misses"], &bare["agreement"]), (&cache["misses"], &cache["agreement"]));
    let limited = ["--logits", &trace, "--router", "cache+phase", "--batch-tokens", "64", "--devices", "4"];
    let table = stdout(&run(&[&["replay"], &limited[..], &["--capacity-factor", "1.0"]].concat()));
    for router in ["  top-k ", "  phase ", "  cache+phase "] {
        assert!(table.contains(router), "{table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 80 || line.contains("trace.safetensors")), "{table}");
    let route = ["route", "--logits", &trace, "--router", "cache+phase", "--capacity-factor", "1.0", "--json"];
    for layer in json(&route)["layers"].as_array().unwrap() {
        assert_eq!(number(layer, "survival"), 1.0);
    }
}

#[test]
fn hash_says_when_a_trace_has_no_token_ids() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trace.safetensors");
    let metadata = [("experts", "4"), ("top_k", "1")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    std::fs::write(
        &path,
        tensor_bytes(&[NamedTensor::f32("layer.0", [2, 4], &[0.0; 8])], Some(metadata.into())).unwrap(),
    )
    .unwrap();
    let message = |router: &str| {
        let output = run(&["route", "--logits", path.to_str().unwrap(), "--router", router]);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(message("weighted-hash").ends_with("no `tokens`: weighted-hash hashes positions instead\n"));
    assert_eq!(message("phase"), "");
}

#[test]
fn logits_go_to_a_file_from_ids_or_a_file_of_ids() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("ids"), "5, 6\n7").unwrap();
    assert!(run(&["logits", "--ids", "5,6,7", "--out", &path("a")]).status.success());
    assert!(run(&["logits", "--ids-file", &path("ids"), "--out", &path("b")]).status.success());
    let [a, b] = ["a", "b"].map(|name| Checkpoint::open(path(name)).unwrap());
    assert_eq!(a.entry("logits").unwrap().shape, [3, 2048]);
    assert_eq!(a.read("logits").unwrap(), b.read("logits").unwrap());
    std::fs::write(path("ids"), "5 x").unwrap();
    assert_eq!(run(&["logits", "--ids-file", &path("ids"), "--out", &path("b")]).status.code(), Some(2));
}

#[test]
fn inspect_counts_what_the_file_holds() {
    let report = json(&["inspect", "--json"]);
    let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe/model.safetensors");
    let checkpoint = Checkpoint::open(model).unwrap();
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

#[test]
fn several_prompts_are_continued_side_by_side() {
    let prompts = ["And the LORD said", "fn main() {"];
    let arguments = |prompts: &[&'static str], more: &[&'static str]| {
        let each = prompts.iter().flat_map(|prompt| ["--prompt", prompt]);
        ["generate", "--new-tokens", "12"].into_iter().chain(each).chain(more.iter().copied()).collect::<Vec<_>>()
    };
    let alone = prompts.map(|prompt| json(&arguments(&[prompt], &["--json"])));
    for chunk in ["512", "5"] {
        let both = json(&arguments(&prompts, &["--json", "--chunk-tokens", chunk]));
        assert!(!both.as_object().unwrap().contains_key("text"));
        for ((text, alone), prompt) in both["texts"].as_array().unwrap().iter().zip(&alone).zip(prompts) {
            assert_eq!(text["prompt"], prompt);
            for key in ["text", "prompt_tokens", "new_tokens"] {
                assert_eq!(text[key], alone[key], "{key}");
            }
        }
        assert_eq!(number(&both, "new_tokens"), number(&alone[0], "new_tokens") + number(&alone[1], "new_tokens"));
    }
    let printed = stdout(&run(&arguments(&prompts, &[])));
    assert_eq!(printed, format!("{}\n\n{}\n", alone[0]["text"].as_str().unwrap(), alone[1]["text"].as_str().unwrap()));
}

#[test]
fn a_limit_that_small_batches_switch_off_is_told() {
    let arguments =
        ["compare", "--tokens", "64", "--batch-tokens", "8", "--router", "phase", "--capacity-factor", "1.0"];
    let output = run(&arguments);
    assert!(output.status.success());
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.starts_with("capacity factor 1.0 per expert: no limit in 9 of 9 batches"), "{told}");
}

#[test]
fn generate_counts_the_hits_of_a_memory() {
    let arguments = ["generate", "--prompt", "In the beginning", "--new-tokens", "40", "--json"];
    assert!(json(&arguments)["hit_rate"].is_null());
    let rate = |more: &[&str]| number(&json(&[&arguments[..], &["--cached-experts", "8"], more].concat()), "hit_rate");
    let plain = rate(&[]);
    assert!(plain > 0.1 && plain < rate(&["--router", "cache", "--cache-bonus", "0.3"]));
    assert!(plain < rate(&["--router", "cache+phase", "--cache-bonus", "0.3"]));
}

/// Runs a command that must succeed; what it says on standard error.
fn stderr(arguments: &[&str]) -> String {
    let output = run(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

#[test]
fn compare_on_an_expert_cache_has_the_figures_of_the_model_in_memory() {
    let arguments = |rest: &[&'static str]| {
        let common = ["compare", "--tokens", "1500", "--dtype", "bf16", "--json", "--capacity-factor", "1.0"];
        [&common[..], &["--router"], rest].concat()
    };
    let figures = |report: &Value, router: &str| {
        let keys = ["survival", "gate_mass", "perplexity", "max_violation", "load_cv", "dropped_slots"];
        keys.map(|key| number(row(report, router), key).to_bits())
    };
    let held = json(&arguments(&["top-k,phase"]));
    let cached = json(&arguments(&["top-k,phase", "--expert-cache", "2MiB"]));
    for router in ["top-k", "phase"] {
        assert_eq!(figures(&cached, router), figures(&held, router), "{router}");
    }
    // A memory-aware row sees what it has read itself, whatever ran before it.
    let alone = json(&arguments(&["cache", "--expert-cache", "2MiB"]));
    let after = json(&arguments(&["top-k,cache", "--expert-cache", "2MiB"]));
    assert_eq!(figures(&alone, "cache"), figures(&after, "cache"));
    let said = stderr(&arguments(&["top-k", "--expert-cache", "2MiB"]));
    assert!(said.starts_with("warning: a step of layer 0 uses ") && said.lines().count() == 1, "{said}");
    assert_eq!(stderr(&arguments(&["top-k", "--expert-cache", "64MiB"])), "");
}

#[test]
fn compare_keeps_account_of_a_memory() {
    let arguments =
        |rest: &[&'static str]| [&["compare", "--tokens", "1500", "--json", "--router", "cache"], rest].concat();
    let (union, eight, all) = (
        json(&arguments(&[])),
        json(&arguments(&["--cached-experts", "8"])),
        json(&arguments(&["--cached-experts", "32"])),
    );
    for report in [&union, &eight] {
        let row = row(report, "cache");
        assert!((0.9..1.0).contains(&number(row, "gate_mass")) && number(row, "survival") == 1.0, "{row}");
        assert!(number(row, "perplexity_increase").abs() < 0.02, "{row}");
    }
    let perplexity = |report: &Value| number(row(report, "cache"), "perplexity");
    assert_ne!(perplexity(&union), perplexity(&eight));
    // Where all fit there is nothing to save, and nothing is swapped.
    let row = row(&all, "cache");
    assert_eq!((number(row, "gate_mass"), number(row, "perplexity_increase")), (1.0, 0.0), "{row}");
}

#[test]
fn logits_and_traces_of_an_expert_cache_are_those_of_the_model_in_memory() {
    let directory = tempfile::tempdir().unwrap();
    let commands: [&[&str]; 2] =
        [&["logits", "--ids", "1,2,3,400,500,6", "--dtype", "bf16"], &["trace", "--tokens", "700", "--dtype", "bf16"]];
    for (number, command) in commands.into_iter().enumerate() {
        let files = [&[][..], &["--expert-cache", "512KiB"]].map(|cache| {
            let file = directory.path().join(format!("{number}-{}.safetensors", cache.len()));
            let said = stderr(&[command, cache, &["--out", file.to_str().unwrap()]].concat());
            assert_eq!(said.lines().count(), cache.len() / 2, "{said}");
            Checkpoint::open(&file).unwrap()
        });
        assert!(!files[0].tensors().is_empty());
        for name in files[0].tensors().keys() {
            assert_eq!(words(&files[0], name), words(&files[1], name), "{name}");
        }
    }
}

#[test]
fn generate_on_an_expert_cache_says_the_same_whatever_is_read_ahead() {
    let arguments = |rest: &[&'static str]| {
        let common = ["generate", "--prompt", "And it came to pass", "--new-tokens", "40", "--dtype", "bf16", "--json"];
        [&common[..], rest].concat()
    };
    let held = json(&arguments(&[]));
    for key in ["hit_rate", "expert_bytes_read", "peak_resident_expert_bytes"] {
        assert!(held[key].is_null());
    }
    let mut hits = Vec::new();
    for prefetch in ["auto", "off", "always"] {
        let cached = json(&arguments(&["--expert-cache", "1MiB", "--prefetch", prefetch]));
        assert_eq!(cached["text"], held["text"]);
        assert!(number(&cached, "expert_bytes_read") > 0.0);
        assert!(number(&cached, "peak_resident_expert_bytes") <= f64::from(1 << 20));
        hits.push(number(&cached, "hit_rate"));
    }
    assert!(hits[0] > 0.2 && hits.iter().all(|&rate| rate == hits[0]), "{hits:?}");
}

#[test]
fn what_an_expert_cache_cannot_do_ends_with_code_2() {
    let cases: [(&[&str], &str); 7] = [
        (
            &["generate", "--prompt", "a", "--expert-cache", "10KiB"],
            "expert cache budget is 10240 bytes: expected at least ",
        ),
        (&["generate", "--prompt", "a", "--expert-cache", "1MiB", "--cached-experts", "4"], "give one of them"),
        (&["compare", "--router", "cache", "--expert-cache", "1MiB", "--cached-experts", "4"], "give one of them"),
        (&["generate", "--prompt", "a", "--prefetch", "off"], "--expert-cache <BYTES>"),
        (&["logits", "--ids", "1", "--out", "x", "--expert-cache", "many"], "invalid value 'many'"),
        (&["tune", "--expert-cache", "2MiB", "--cached-experts", "4"], "cannot be used with '--cached-experts"),
        (
            &["tune", "--tokens", "64", "--expert-cache", "1KiB"],
            "expert cache budget is 1024 bytes: expected at least ",
        ),
    ];
    for (arguments, expected) in cases {
        let output = run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(expected), "{arguments:?}: {said}");
    }
}
