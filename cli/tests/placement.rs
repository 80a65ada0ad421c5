//! Experts on devices: placed by speed, equally, or as a file says.

use std::process::{Command, Output};

use serde_json::{Value, json};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).output().unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn mistake(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Devices of speeds 3 and 1 by the priced router, over some of the bundled text.
const UNEQUAL: [&str; 8] = ["compare", "--device-speeds", "3,1", "--router", "phase", "--tokens", "6144", "--json"];

#[test]
fn experts_placed_by_speed_cost_little_and_placed_equally_much() {
    let cost = |more: &[&str]| {
        let report = report(&[&UNEQUAL[..], more].concat());
        let row = &report["rows"][0];
        assert_eq!((row["survival"].as_f64(), row["devices"].as_u64()), (Some(1.0), Some(2)));
        row["perplexity_increase"].as_f64().unwrap()
    };
    let (by_speed, equal) = (cost(&[]), cost(&["--placement", "equal"]));
    assert!(by_speed < 0.005, "{by_speed}");
    assert!(equal > by_speed + 0.01, "{equal} {by_speed}");
    assert_eq!(cost(&["--placement", "speed"]), by_speed);
}

#[test]
fn a_file_that_says_the_same_does_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, value: Value| {
        let path = directory.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let row = |report: Value| {
        let mut row = report["rows"][0].clone();
        for clock in ["route_nanos_per_token", "tokens_per_second"] {
            row.as_object_mut().unwrap().remove(clock);
        }
        row
    };
    let short = ["compare", "--router", "phase", "--tokens", "1536", "--json", "--device-speeds", "3,1"];
    let by_speed: Vec<usize> = (0..32).map(|expert| usize::from(expert >= 24)).collect();
    let one = file("one.json", json!({"devices": 2, "layers": [by_speed]}));
    let layers = report(&["inspect", "--json"])["moe_layers"].as_u64().unwrap() as usize;
    let each = file("each.json", json!({"devices": 2, "layers": vec![by_speed.clone(); layers]}));
    let plain = row(report(&short));
    for path in [&one, &each] {
        let placed = report(&[&short[..], &["--placement", path]].concat());
        assert_eq!(placed["placement"], json!(path));
        assert_eq!(row(placed), plain);
    }
    // Another placement in the last layer alone.
    let mut other = vec![by_speed.clone(); layers];
    other[layers - 1].reverse();
    let other = file("other.json", json!({"devices": 2, "layers": other}));
    assert_ne!(row(report(&[&short[..], &["--placement", &other]].concat())), plain);
    // A file alone says how many devices there are; their speeds are equal then.
    let alone = report(&["compare", "--router", "phase", "--tokens", "1536", "--json", "--placement", &one]);
    assert_eq!((alone["rows"][0]["devices"].as_u64(), alone["device_speeds"].is_null()), (Some(2), true));

    // What does not fit is named.
    let says = |more: &[&str], expected: &str| {
        for command in [["compare", "--tokens", "600"], ["replay", "--capacity-factor", "1"]] {
            let message = mistake(&[&command[..], &["--router", "phase"], more].concat());
            assert!(message.contains(expected), "{message}");
        }
    };
    let few = file("few.json", json!({"devices": 2, "layers": [[0, 1, 0]]}));
    says(&["--placement", &few], "placement: expected 32 experts, got 3 experts");
    let layer = file("layers.json", json!({"devices": 2, "layers": vec![by_speed.clone(); layers + 1]}));
    let expected = format!("placements: expected one, or one for each of {layers} MoE layers, got {}", layers + 1);
    says(&["--placement", &layer], &expected);
    let range = file("range.json", json!({"devices": 1, "layers": [by_speed]}));
    says(&["--placement", &range], "range.json: layer 0: device of an expert is 1: expected below devices 1");
    says(&["--placement", &one, "--devices", "3"], "one.json: expected --devices 3, got 2 devices");
    says(&["--placement", &one, "--device-speeds", "1"], "--device-speeds: expected one for each of 2 devices of --pl");
    says(&["--placement", "no/such/file"], "--placement no/such/file: ");
    says(&["--placement", "equal"], "--placement speed and equal are of devices: add --devices or --device-speeds");
    let message = mistake(&["generate", "--prompt", "a", "--placement", &one]);
    assert!(message.contains("--placement limits nothing by itself: add --capacity-factor"), "{message}");
}

#[test]
fn route_places_by_the_layers_of_its_trace() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, placement) = (path("t.safetensors"), path("p.json"));
    assert!(run(&["trace", "--tokens", "1024", "--out", &trace]).status.success());
    let route = ["route", "--logits", &trace, "--capacity-factor", "1", "--batch-tokens", "512", "--json"];
    let violation = |more: &[&str], layer: usize| {
        report(&[&route[..], more].concat())["layers"][layer]["max_violation"].as_f64().unwrap()
    };
    // Dropless top-k knows no limit and is as full as its experts are popular; priced it is exact.
    let equal: Vec<usize> = (0..32).map(|expert| expert / 16).collect();
    let layers = report(&["inspect", "--json"])["moe_layers"].as_u64().unwrap() as usize;
    std::fs::write(&placement, json!({"devices": 2, "layers": vec![equal; layers]}).to_string()).unwrap();
    let priced = ["--router", "phase", "--placement", &placement];
    assert!((0..layers).all(|layer| violation(&priced, layer) < 1e-9));
    let routed = report(&[&route[..], &priced].concat());
    assert_eq!((&routed["placement"], &routed["devices"]), (&json!(placement), &json!(2)));
    let message = mistake(&["route", "--logits", &trace, "--placement", &placement]);
    assert!(message.contains("--placement limits nothing by itself: add --capacity-factor or --cap"), "{message}");
}
