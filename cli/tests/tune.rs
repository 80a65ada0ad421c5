//! `tune`: what it measures, which setting it says to take and why, and that the command it prints is that setting.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output};

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

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {value}"))
}

#[test]
fn tune_measures_expert_caches_of_several_budgets() {
    let arguments = ["tune", "--tokens", "600", "--expert-cache", "1MiB,4MiB", "--cache-bonus", "0,0.2"];
    let report = json(&[&arguments[..], &["--json"]].concat());
    let rows = report["rows"].as_array().unwrap();
    let budgets: Vec<f64> = rows.iter().map(|row| number(row, "expert_cache_bytes")).collect();
    assert_eq!(budgets, [1.0, 1.0, 4.0, 4.0].map(|budget: f64| budget * f64::from(1 << 20)));
    for row in rows {
        assert!(number(row, "tokens_per_second") > 0.0 && number(row, "bytes_read_per_token") > 0.0, "{row}");
    }
    assert!(number(&rows[2], "bytes_read_per_token") < number(&rows[0], "bytes_read_per_token"));
    assert!(number(&rows[3], "hit_rate") > number(&rows[2], "hit_rate"));

    // What fits is what `generate` says of the same budget, which has not room for as many in every layer.
    let of_layers = |row: &Value| -> Vec<u64> {
        row["cached_experts_by_layer"].as_array().unwrap().iter().map(|experts| experts.as_u64().unwrap()).collect()
    };
    let (small, large) = (of_layers(&rows[0]), of_layers(&rows[2]));
    assert!(of_layers(&rows[1]) == small && small.iter().zip(&large).all(|(small, large)| small < large));
    assert_eq!(small.iter().min().copied(), rows[0]["cached_experts"].as_u64());
    assert!(small[0] > small[3], "{small:?}");
    let generate =
        ["generate", "--prompt", "In the beginning God created", "--new-tokens", "1", "--expert-cache", "1MiB"];
    let said = String::from_utf8(run(&generate).stderr).unwrap();
    assert!(said.contains("layer 0 uses ") && said.contains(&format!("has room for {}:", small[0])), "{said}");

    let of_memories = report["per_memory"].as_array().unwrap();
    for (of, (budget, range)) in of_memories.iter().zip([("1MiB", 0..2), ("4MiB", 2..4)]) {
        assert_eq!(of["memory"], budget);
        assert!(rows[range].contains(&of["recommended"]), "{of}");
        assert!(of["reason"].as_str().unwrap().contains(&format!("in {budget}, ")), "{of}");
        assert!(of["command"].as_str().unwrap().contains(&format!(" --expert-cache {budget} ")), "{of}");
    }
    assert!(of_memories.iter().any(|of| of["recommended"] == report["recommended"]));
    let table = String::from_utf8(run(&arguments).stdout).unwrap();
    for heading in
        ["1MiB: 3 to 4 of 32 experts a layer", "\n4MiB: ", " KiB\n", "\ntake ", "\n  run: phase-moe generate "]
    {
        assert!(table.contains(heading), "{heading:?} in {table}");
    }
}

#[test]
fn tune_prints_its_front_and_one_to_take() {
    let arguments = ["tune", "--tokens", "700", "--cached-experts", "8,16", "--cache-bonus", "0,0.2", "--top-k", "3,4"];
    let report = json(&[&arguments[..], &["--json"]].concat());
    let rows = report["rows"].as_array().unwrap();
    let keys = [
        "baseline",
        "top_k",
        "cache_bonus",
        "cached_experts",
        "cached_experts_by_layer",
        "hit_rate",
        "belady_hit_rate",
        "perplexity",
        "perplexity_increase",
        "perplexity_error",
        "gate_mass_kept",
        "tokens_per_second",
        "spread",
        "bytes_read_per_token",
        "pareto",
    ];
    let top = ["rows", "recommended", "reason", "command", "per_memory", "warning"];
    let of = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<HashSet<String>>();
    assert_eq!(of(&report), top.map(String::from).into());
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert_eq!(of(row), keys.map(String::from).into());
        assert!(number(row, "hit_rate") <= number(row, "belady_hit_rate"), "{row}");
        assert!(number(row, "gate_mass_kept") >= 0.9 && number(row, "tokens_per_second") > 0.0, "{row}");
        assert!(number(row, "spread") >= 0.0 && number(row, "perplexity_error") >= 0.0, "{row}");
    }
    let find = |top_k: f64, bonus: f64, cached: f64| {
        let is = |row: &&Value| {
            number(row, "top_k") == top_k
                && number(row, "cache_bonus") == bonus
                && number(row, "cached_experts") == cached
        };
        rows.iter().find(is).unwrap()
    };
    assert!(number(find(4.0, 0.2, 8.0), "hit_rate") > number(find(4.0, 0.0, 8.0), "hit_rate"));
    assert!(number(find(4.0, 0.2, 16.0), "bytes_read_per_token") < number(find(4.0, 0.2, 8.0), "bytes_read_per_token"));
    let plain = find(4.0, 0.0, 8.0);
    assert_eq!(rows.iter().filter(|row| row["baseline"] == true).count(), 2);
    assert!(plain["baseline"] == true && number(plain, "perplexity_increase") == 0.0);
    let increase = number(find(3.0, 0.2, 16.0), "perplexity") / number(plain, "perplexity") - 1.0;
    assert!((number(find(3.0, 0.2, 16.0), "perplexity_increase") - increase).abs() < 1e-12);
    assert!(rows.iter().any(|row| row["pareto"] == true));
    assert!(rows.contains(&report["recommended"]));
    let table = stdout(&run(&arguments));
    // Sentences and commands are as long as they are.
    let mut lines = table.lines().take_while(|line| !line.starts_with("8 experts: "));
    assert!(table.contains("\ntake ") && lines.all(|line| line.chars().count() <= 80), "{table}");
}

#[cfg(unix)]
#[test]
fn what_tune_says_to_run_runs_and_is_what_it_measured() {
    let swaps = ["--max-mass-loss", "0.3", "--keep-top", "2", "--policy", "lfu", "--admission", "all"];
    let sweep = ["tune", "--tokens", "600", "--cached-experts", "6", "--cache-bonus", "0.3", "--top-k", "3"];
    let report = json(&[&sweep[..], &swaps, &["--max-perplexity-increase", "1", "--json"]].concat());
    // Plain top-k was not asked for, but all is measured against it.
    let rows = report["rows"].as_array().unwrap();
    let settings: Vec<_> = rows.iter().map(|row| (number(row, "top_k"), number(row, "cache_bonus"))).collect();
    assert_eq!(settings, [(4.0, 0.0), (3.0, 0.3)]);
    assert_eq!(report["recommended"], rows[1]);
    let reason = report["reason"].as_str().unwrap();
    assert!(reason.starts_with("top 3, bonus 0.3 with 6 of 32 experts: "), "{reason}");
    assert!(
        reason.ends_with(" the misses of top-k; the fewest misses of 2 settings within +100 % perplexity"),
        "{reason}"
    );

    let run_by_shell = |command: &str| -> Value {
        let program = Path::new(env!("CARGO_BIN_EXE_phase-moe"));
        let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
        let line = format!("{command} --new-tokens 12 --json");
        let output = Command::new("sh").args(["-c", &line]).env("PATH", path).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let said = run_by_shell(report["command"].as_str().unwrap());
    let asked = ["generate", "--prompt", "Once upon a time", "--new-tokens", "12", "--json", "--top-k", "3"];
    let router = ["--router", "cache", "--cache-bonus", "0.3", "--cached-experts", "6"];
    let asked = json(&[&asked[..], &router, &swaps].concat());
    for key in ["text", "hit_rate"] {
        assert_eq!(said[key], asked[key], "{}", report["command"]);
    }
    // Plain top-k takes no options about swaps, and is the same as the router without a bonus.
    let quality =
        json(&[&sweep[..], &swaps, &["--max-perplexity-increase", "0", "--prefer", "quality", "--json"]].concat());
    assert_eq!(quality["recommended"]["baseline"], true);
    let command = quality["command"].as_str().unwrap();
    let options = "--router top-k --cached-experts 6 --policy lfu --admission all";
    assert_eq!(command, format!("phase-moe generate {options} --prompt 'Once upon a time'"));
    let off = ["generate", "--prompt", "Once upon a time", "--new-tokens", "12", "--json", "--router", "cache"];
    let off = json(&[&off[..], &["--cache-bonus", "0", "--cached-experts", "6"], &swaps].concat());
    let said = run_by_shell(command);
    assert_eq!((&said["text"], &said["hit_rate"]), (&off["text"], &off["hit_rate"]));
}

#[test]
fn tune_says_when_the_text_is_too_short() {
    let arguments = ["tune", "--cached-experts", "8", "--cache-bonus", "0.2", "--json"];
    let told = |more: &[&str]| {
        let output = run(&[&arguments[..], more].concat());
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (report["warning"].as_str().map(String::from), String::from_utf8(output.stderr).unwrap())
    };
    let (warning, said) = told(&["--tokens", "768", "--max-perplexity-increase", "0.02"]);
    assert_eq!((warning, said.as_str()), (None, ""));
    let (warning, said) = told(&["--tokens", "768", "--max-perplexity-increase", "0.001"]);
    let warning = warning.unwrap();
    assert!(warning.starts_with("the text is too short for +0.1 %: the standard error"), "{warning}");
    assert_eq!(said, format!("warning: {warning}\n"));
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("one.txt");
    std::fs::write(&text, "In the beginning God created the heaven and the earth.").unwrap();
    let (warning, _) = told(&["--text", text.to_str().unwrap()]);
    assert!(warning.unwrap().starts_with("the text is a single sequence"));
}
