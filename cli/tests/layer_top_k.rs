//! `--layer-top-k`: equal numbers are `--top-k`, others reach the layers that they are for, and everything that counts experts knows.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use phase_moe::{Batch, LoadOptions, Model};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).output().unwrap()
}

fn json_of(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The file that `command` writes.
fn written(directory: &Path, arguments: &[&str]) -> PathBuf {
    let path = directory.join("out.safetensors");
    let output = run(&[arguments, &["--out", path.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    path
}

fn tensors(path: &Path) -> HashMap<String, Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.tensors().into_iter().map(|(name, tensor)| (name, tensor.data().to_vec())).collect()
}

const IDS: &str = "5,900,31,77,5,1200,8";

#[test]
fn equal_numbers_are_plain_top_k() {
    let directory = tempfile::tempdir().unwrap();
    for command in [&["logits", "--ids", IDS][..], &["trace", "--tokens", "300"]] {
        let of = |option: &[&str]| tensors(&written(directory.path(), &[command, option].concat()));
        let (each, all) = (of(&["--layer-top-k", "2,2,2,2"]), of(&["--top-k", "2"]));
        assert!(each == all, "{command:?}: other bits");
        assert!(all != of(&[]), "{command:?}: it changes something");
    }
    let steady = |mut value: Value| {
        for row in value["rows"].as_array_mut().unwrap() {
            for key in ["route_nanos_per_token", "tokens_per_second"] {
                row[key].take();
            }
        }
        (value["rows"].take(), value["dropless"]["perplexity"].take(), value["model"].take())
    };
    let compare = ["compare", "--tokens", "600", "--router", "top-k,phase", "--capacity-factor", "1.0"];
    let of = |option: &[&str]| steady(json_of(&[&compare, option].concat()));
    assert_eq!(of(&["--layer-top-k", "3,3,3,3"]), of(&["--top-k", "3"]));
    let generate = ["generate", "--prompt", "And God said", "--new-tokens", "20"];
    let of = |option: &[&str]| json_of(&[&generate, option].concat())["text"].take();
    assert_eq!(of(&["--layer-top-k", "1,1,1,1"]), of(&["--top-k", "1"]));
    assert_ne!(of(&["--layer-top-k", "1,1,1,1"]), of(&[]));
}

#[test]
fn each_number_reaches_its_layer() {
    let directory = tempfile::tempdir().unwrap();
    let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    let ids: Vec<u32> = IDS.split(',').map(|id| id.parse().unwrap()).collect();
    let mut last = Vec::new();
    for each in [[1, 4, 4, 4], [4, 4, 4, 1], [8, 2, 1, 3]] {
        let mut model = Model::load(&bundled, &LoadOptions::default()).unwrap();
        for (layer, top_k) in model.decoder_mut().moe_layers_mut().zip(each) {
            layer.set_top_k(top_k).unwrap();
        }
        let decoder = model.decoder();
        let logits = decoder.forward(&Batch::new(&[&ids]).unwrap(), &mut decoder.batch_state()).unwrap();
        let expected: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        let option = each.map(|top_k: usize| top_k.to_string()).join(",");
        let ours = tensors(&written(directory.path(), &["logits", "--ids", IDS, "--layer-top-k", &option]));
        let expected: Vec<u8> = expected.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        assert!(ours["logits"] == expected, "{option}: other bits");
        assert!(expected != last, "{option}: as the one before");
        last = expected;
    }
}

#[test]
fn what_counts_experts_counts_each_layers_own() {
    let compare = ["compare", "--tokens", "600", "--router", "top-k,top-k-score", "--capacity-factor", "1.0"];
    let report = json_of(&[&compare[..], &["--layer-top-k", "8,2,1,1"]].concat());
    assert_eq!((&report["model"]["top_k"], &report["model"]["layer_top_k"]), (&json!(8), &json!([8, 2, 1, 1])));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!((&rows[0]["survival"], &rows[0]["dropped_slots"]), (&json!(1.0), &json!(0)));
    // 12 slots a token in all layers together.
    let slots = 12.0 * report["text"]["tokens"].as_f64().unwrap();
    let (survival, dropped) = (rows[1]["survival"].as_f64().unwrap(), rows[1]["dropped_slots"].as_f64().unwrap());
    assert!(survival < 1.0 && (survival - (1.0 - dropped / slots)).abs() < 1e-9, "{survival}, {dropped} of {slots}");
    let plain = json_of(&compare);
    assert!(plain["model"].get("layer_top_k").is_none());
    let table = String::from_utf8(run(&[&compare[..], &["--layer-top-k", "8,2,1,1"]].concat()).stdout).unwrap();
    assert!(table.lines().next().unwrap().contains(" top 8,2,1,1, "), "{table}");

    let directory = tempfile::tempdir().unwrap();
    let trace = written(directory.path(), &["trace", "--tokens", "100", "--layer-top-k", "8,2,1,1"]);
    let trace = trace.to_str().unwrap();
    for command in [&["route", "--router", "top-k"][..], &["replay", "--cached-experts", "8"]] {
        let without = run(&[command, &["--logits", trace]].concat());
        let message = String::from_utf8(without.stderr).unwrap();
        assert_eq!(without.status.code(), Some(2), "{message}");
        assert!(
            message.contains("--logits: taken with --layer-top-k 8,2,1,1: give one number with --top-k"),
            "{message}"
        );
        json_of(&[command, &["--logits", trace, "--top-k", "3"]].concat());
    }
}

#[test]
fn mistakes_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("o.safetensors");
    let out = out.to_str().unwrap();
    for command in [
        &["generate", "--prompt", "And"][..],
        &["compare", "--tokens", "300"],
        &["trace", "--tokens", "300", "--out", out],
        &["logits", "--ids", "1", "--out", out],
    ] {
        for (option, expected) in [
            ("4,4,4", "--layer-top-k: expected 4 values, one for each MoE layer, got 3"),
            ("4", "--layer-top-k: expected 4 values, one for each MoE layer, got 1"),
            ("4,4,0,4", "--layer-top-k: top_k is 0: expected at least 1"),
            ("4,4,4,33", "--layer-top-k: top_k 33 exceeds experts 32"),
        ] {
            let output = run(&[command, &["--layer-top-k", option]].concat());
            let message = String::from_utf8(output.stderr).unwrap();
            assert_eq!((output.status.code(), message.trim_end()), (Some(2), &*format!("phase-moe: {expected}")));
        }
        for options in [&["--layer-top-k", "4,x"][..], &["--layer-top-k", "4,4,4,4", "--top-k", "4"]] {
            assert_eq!(run(&[command, options].concat()).status.code(), Some(2), "{command:?} {options:?}");
        }
        assert!(!Path::new(out).exists());
    }
}
