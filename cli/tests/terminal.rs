//! What commands show: tables as wide as the terminal, colour, characters, what the figures mean; completions and the manual.

use std::process::{Command, Output};

use serde_json::Value;

const COMMANDS: [&str; 9] = ["compare", "generate", "tune", "trace", "route", "replay", "place", "logits", "inspect"];

/// Runs a command that must succeed in an environment of these variables beside its own.
fn output(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    for name in ["LC_ALL", "LC_CTYPE", "LANG", "COLUMNS", "NO_COLOR"] {
        command.env_remove(name);
    }
    let output = command.args(arguments).envs(variables.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn shown(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    String::from_utf8(output(arguments, variables).stdout).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&shown(&[arguments, &["--json"]].concat(), &[])).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {value}"))
}

fn router<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["rows"].as_array().unwrap().iter().find(|row| row["router"] == name).unwrap()
}

/// A table without its rates and times, which differ from run to run.
fn steady(table: &str) -> String {
    table.lines().filter(|line| !line.contains("tokens/s") && !line.starts_with("  phase ")).collect()
}

const COMPARE: [&str; 7] = ["compare", "--tokens", "600", "--router", "phase", "--capacity-factor", "1.0"];

#[test]
fn tables_are_no_wider_than_the_terminal_and_explain_themselves() {
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("t.safetensors").to_str().unwrap().to_owned();
    output(&["trace", "--tokens", "300", "--out", &trace], &[]);
    // A single word, as the file's name is, is never broken.
    let is_path = |line: &str| line.contains("t.safetensors");
    let commands: [(&[&str], &str); 4] = [
        (&COMPARE, "  increase   of perplexity, over dropless\n"),
        (&["replay", "--tokens", "300"], "  saved      misses, of those of top-k that admits all\n"),
        (&["route", "--logits", &trace, "--capacity-factor", "1"], "  feasible   the most that there is room for\n"),
        (&["inspect"], "  experts in memory  the others are read when they are needed: --expert-cache\n"),
    ];
    for (command, legend) in commands {
        let mut columns = Vec::new();
        for width in ["50", "80", "140"] {
            let text = shown(command, &[("COLUMNS", width), ("LANG", "C.UTF-8")]);
            let width: usize = width.parse().unwrap();
            assert!(text.lines().all(|line| line.chars().count() <= width || is_path(line)), "{width}: {text}");
            assert!(width < 80 || text.contains(legend), "{width}: {text}");
            assert!(!text.contains('\u{1b}'), "colour in a pipe: {text:?}");
            columns.push((text.contains("no room in"), text));
        }
        assert!(!columns[2].0, "{}", columns[2].1);
        assert_eq!(columns[0].0, command[0] != "inspect", "{}", columns[0].1);
    }
}

#[test]
fn colour_is_for_terminals_or_where_it_is_asked_for_and_never_in_json() {
    let always = [&COMPARE[..], &["--color", "always"]].concat();
    let coloured = shown(&always, &[("NO_COLOR", "1")]);
    assert!(coloured.contains("\u{1b}[2m") && coloured.contains("\u{1b}[0m"), "{coloured:?}");
    let plain = shown(&[&COMPARE[..], &["--color", "never"]].concat(), &[]);
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    let mut bare = coloured;
    for mark in ["\u{1b}[0m", "\u{1b}[1m", "\u{1b}[2m", "\u{1b}[31m"] {
        bare = bare.replace(mark, "");
    }
    assert_eq!(steady(&bare), steady(&plain));
    assert!(!shown(&[&always[..], &["--json"]].concat(), &[]).contains('\u{1b}'));
}

#[test]
fn where_the_locale_is_ascii_so_is_what_is_shown() {
    let ascii = shown(&COMPARE, &[("LC_ALL", "C")]);
    assert!(ascii.is_ascii(), "{ascii}");
    assert!(ascii.contains("loads of experts, @ is "), "{ascii}");
    let bars = shown(&COMPARE, &[("LC_ALL", "C.UTF-8")]);
    assert!(bars.contains("loads of experts, █ is ") && bars.contains("|████████"), "{bars}");
}

#[test]
fn loads_are_shown_for_one_router_or_where_they_are_asked_for() {
    let several = ["compare", "--tokens", "600", "--router", "top-k,phase", "--capacity-factor", "1.0"];
    assert!(!shown(&several, &[]).contains("loads of experts"));
    let asked = shown(&[&several[..], &["--loads"]].concat(), &[]);
    assert_eq!(asked.matches("loads of experts").count(), 2, "{asked}");
    let report = json(&[&several[..], &["--loads"]].concat());
    for row in report["rows"].as_array().unwrap() {
        let layers = row["loads"].as_array().unwrap();
        let all: u64 =
            layers.iter().flat_map(|layer| layer.as_array().unwrap()).map(|load| load.as_u64().unwrap()).sum();
        // The first token of each of three sequences is one more than is scored.
        assert_eq!((layers.len(), all % 16, layers[0].as_array().unwrap().len()), (4, 0, 32), "{row}");
        assert!(all >= 4 * 4 * 600, "{all}");
    }
}

#[test]
fn rows_without_a_limit_have_the_loads_of_the_devices_that_are_named() {
    let of = |more: &[&str]| json(&[&["compare", "--tokens", "600", "--router", "top-k,phase"], more].concat());
    let named = of(&["--devices", "2", "--capacity-factor", "1.0"]);
    let (free, limited) = (router(&named, "top-k"), router(&named, "phase"));
    assert_eq!((free["devices"].as_u64(), limited["devices"].as_u64()), (Some(2), Some(2)));
    assert!(number(free, "device_max_violation") > 0.01 && number(limited, "device_max_violation") <= 0.0, "{named}");
    assert_eq!(free["device_max_violation"], named["dropless"]["device_max_violation"]);
    assert!(named["meaning"].as_str().unwrap().contains("its fullest of 2 devices at "), "{named}");
    // Those of the limit per 4 devices that is run without options; none where there are none.
    assert_eq!(router(&of(&[]), "top-k")["devices"], 4);
    let none = of(&["--capacity-factor", "1.0"]);
    assert!(
        router(&none, "top-k")["device_max_violation"].is_null() && none["dropless"].as_object().unwrap().len() == 2
    );
    let table = shown(&["compare", "--tokens", "600", "--router", "top-k", "--devices", "4"], &[("LANG", "C.UTF-8")]);
    assert!(
        table.contains("no limit (max load over 4 devices)") && table.contains("the fullest device's load"),
        "{table}"
    );
}

#[test]
fn compare_ends_with_what_its_rows_mean() {
    let report = json(&COMPARE);
    let meaning = report["meaning"].as_str().unwrap().to_owned();
    let increase = format!("{:+.2} %", 100.0 * number(router(&report, "phase"), "perplexity_increase"));
    assert!(meaning.starts_with("Limits per expert at 1.0: phase keeps every slot and costs "), "{meaning}");
    assert!(meaning.contains(&increase) && meaning.contains("Take phase"), "{meaning} {increase}");
    let table = shown(&COMPARE, &[]);
    let end: Vec<&str> = table.split("\n\n").last().unwrap().lines().collect();
    assert_eq!(end.join(" "), meaning);
}

#[test]
fn replay_tells_what_admission_saves_from_what_swaps_save() {
    let arguments = ["replay", "--tokens", "900", "--cached-experts", "16"];
    let report = json(&arguments);
    let beside = report["beside"].as_array().unwrap();
    let names: Vec<_> = beside.iter().map(|row| (row["router"].as_str(), row["admission"].as_str())).collect();
    assert_eq!(names, [(Some("top-k"), Some("all")), (Some("top-k"), Some("affinity"))]);
    let misses = [number(&beside[0], "misses"), number(&beside[1], "misses"), number(&report, "misses")];
    assert!(misses[0] > misses[1] && misses[1] > misses[2], "{misses:?}");
    let saved = |from: f64, to: f64| format!("{:.0} %", 100.0 * (1.0 - to / from));
    let expected = format!(
        "admission alone saves {} of the reads, swaps a further {} of those left, together {}.",
        saved(misses[0], misses[1]),
        saved(misses[1], misses[2]),
        saved(misses[0], misses[2])
    );
    assert!(report["meaning"].as_str().unwrap().ends_with(&expected), "{expected}: {report}");
    // The row beside is the run that it says it is.
    let alone = json(&[&arguments[..], &["--router", "top-k", "--admission", "affinity"]].concat());
    assert_eq!((&alone["misses"], &alone["belady_hit_rate"]), (&beside[1]["misses"], &beside[1]["belady_hit_rate"]));
    assert_eq!(alone["beside"].as_array().unwrap().len(), 1);
}

#[test]
fn route_tells_limits_devices_and_batches() {
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("t.safetensors").to_str().unwrap().to_owned();
    output(&["trace", "--tokens", "603", "--out", &trace], &[]);
    let route = ["route", "--logits", &trace, "--devices", "4"];
    let rule = [&route[..], &["--capacity-factor", "1.25", "--batch-tokens", "300"]].concat();
    let report = json(&rule);
    let of = |key: &str| report[key].as_f64();
    assert_eq!((of("capacity_factor"), of("devices"), of("batch_tokens")), (Some(1.25), Some(4.0), Some(300.0)));
    assert_eq!((of("batches"), of("batches_below_minimum")), (Some(3.0), Some(1.0)));
    assert_eq!((&report["capacity_rule"], &report["profile"]), (&"exact".into(), &Value::Null));
    let loads = report["layers"][0]["loads"].as_array().unwrap().iter().map(|load| load.as_f64().unwrap());
    assert_eq!(loads.sum::<f64>(), number(&report["layers"][0], "kept"));
    let text = shown(&rule, &[("COLUMNS", "400"), ("LANG", "C.UTF-8")]);
    let told =
        "limits per 4 devices, capacity factor 1.25, exact; 3 batches of 300 tokens, the last of 3, which has no limit";
    assert!(text.contains(told) && text.contains("  layer 0 |"), "{text}");
    let given = json(&[&route[..], &["--capacities", "900,900,900,900"]].concat());
    assert_eq!((&given["capacities"], &given["capacity_factor"]), (&vec![900; 4].into(), &Value::Null));
    assert_eq!((&given["devices"], &given["batches"]), (&4.into(), &1.into()));
}

#[test]
fn every_shell_completes_every_command_and_has_its_options() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = shown(&["completions", shell], &[]);
        for word in COMMANDS.iter().chain(&["capacity-factor", "completions", "man"]) {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn the_manual_has_a_page_of_each_command() {
    let main = shown(&["man"], &[]);
    assert!(main.starts_with(".ie") || main.contains(".TH phase-moe 1"), "{main}");
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man1");
    std::fs::create_dir(&pages).unwrap();
    assert_eq!(shown(&["man", "--out", pages.to_str().unwrap()], &[]), "");
    assert_eq!(std::fs::read_to_string(pages.join("phase-moe.1")).unwrap(), main);
    for command in COMMANDS {
        assert!(main.contains(&format!("phase\\-moe\\-{command}(1)")), "{command}: {main}");
        let page = std::fs::read_to_string(pages.join(format!("phase-moe-{command}.1"))).unwrap();
        assert!(page.contains(&format!("Example: phase\\-moe {command}")), "{page}");
    }
}
