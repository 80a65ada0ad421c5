//! Every command on every family's fixture, blocks without experts included, with and without an expert cache.

use std::path::Path;

use serde_json::Value;

use crate::answer;
use crate::fixtures::{self, Fixture, Ready, root};
use crate::runner::{self, Ran, run};

/// Room for a few experts of a fixture, and for less than a layer of them.
const CACHE: &str = "64KiB";

/// A model on which commands run, and how much of it.
struct Bench<'a> {
    /// `--model ..`, nothing for the bundled model's default.
    model: Vec<&'a str>,
    /// What experts are stored in: from a cache they are used so.
    dtype: &'a str,
    text: Vec<&'a str>,
    prompt: &'a str,
    cache: &'a str,
    out: &'a Path,
}

impl Bench<'_> {
    fn run(&self, command: &[&str]) -> Result<Ran, String> {
        let text: &[&str] = match command[0] {
            "compare" | "tune" | "trace" => &self.text,
            "replay" if !command.contains(&"--logits") => {
                // It takes no --batch-tokens of the text, which it reads as `trace` does by default.
                let end = self.text.iter().position(|word| *word == "--batch-tokens").unwrap_or(self.text.len());
                &self.text[..end]
            }
            _ => &[],
        };
        let model: &[&str] = if command.contains(&"--logits") || command[0] == "place" { &[] } else { &self.model };
        let dtype: &[&str] = match command[0] {
            "compare" | "generate" | "trace" | "logits" => &["--dtype", self.dtype],
            _ => &[],
        };
        let arguments = [command, model, dtype, text].concat();
        let ran = run(&arguments);
        answer::good(&ran).map_err(|message| format!("{}: {message}", arguments.join(" ")))?;
        Ok(ran)
    }

    fn json(&self, command: &[&str]) -> Result<Value, String> {
        let ran = self.run(&[command, &["--json"]].concat())?;
        answer::json(&ran).map_err(|message| format!("{}: {message}", command.join(" ")))
    }

    /// The tensors of a file that a command writes.
    fn file(&self, command: &[&str], name: &str) -> Result<Vec<(String, Vec<u8>)>, String> {
        let path = self.out.join(name);
        self.run(&[command, &["--out", path.to_str().unwrap()]].concat())?;
        let file = answer::tensors(&path).map_err(|message| format!("{}: {message}", command.join(" ")))?;
        let read = |name: &String| Ok((name.clone(), file.read(name).map_err(|error| error.to_string())?));
        file.tensors().keys().map(read).collect()
    }

    fn path(&self, name: &str) -> String {
        self.out.join(name).to_str().unwrap().to_owned()
    }

    fn all_commands(&self) -> Result<(), String> {
        let inspect = self.json(&["inspect"])?;
        let (layers, experts, top_k) =
            (count(&inspect, "moe_layers"), count(&inspect, "experts"), count(&inspect, "top_k"));
        is(layers > 0 && layers <= count(&inspect, "layers") && top_k > 0 && top_k <= experts, "inspect", &inspect)?;
        is(self.run(&["inspect"])?.stdout.lines().count() > 5, "inspect", "expected a list")?;
        self.logits()?;
        self.trace_to_replay(layers)?;
        self.compare(experts)?;
        self.generate()?;
        self.tune()
    }

    fn logits(&self) -> Result<(), String> {
        let held = self.file(&["logits", "--ids", "1,2,3,4,5,1,2"], "held")?;
        let cached = self.file(&["logits", "--ids", "1,2,3,4,5,1,2", "--expert-cache", self.cache], "cached")?;
        is(held == cached, "logits", "expected the same bits with --expert-cache")?;
        let file = answer::tensors(&self.out.join("held"))?;
        is(file.entry("logits").is_ok_and(|entry| entry.shape[0] == 7), "logits", "expected seven tokens")
    }

    /// A trace, with its experts in memory and in the cache; routed and replayed from the file and straight from the model.
    fn trace_to_replay(&self, layers: u64) -> Result<(), String> {
        let held = self.file(&["trace"], "trace")?;
        is(held == self.file(&["trace", "--expert-cache", self.cache], "again")?, "trace", "expected the same bits")?;
        let trace = self.path("trace");
        for router in ["phase", "top-k", "top-k-arrival", "cache+phase"] {
            let room: &[&str] = if router == "top-k" { &[] } else { &["--capacity-factor", "1.25"] };
            let command = [&["route", "--logits", &trace, "--router", router], room].concat();
            let routed = self.json(&command)?;
            let rows = routed["layers"].as_array().map_or(0, Vec::len) as u64;
            is(rows == layers, "route", &routed)?;
            self.file(&command, "routes")?;
        }
        let placement = self.path("placement");
        let placed = self.json(&["place", "--trace", &trace, "--devices", "2", "--out", &placement])?;
        is(count(&placed, "layers") == layers && placed["rows"].as_array().map_or(0, Vec::len) == 4, "place", &placed)?;
        answer::placement(Path::new(&placement))?;
        let placed = ["route", "--logits", &trace, "--capacity-factor", "1", "--placement", &placement];
        is(count(&self.json(&placed)?, "devices") == 2, "route --placement", "expected two devices")?;
        let replayed = self.json(&["replay", "--logits", &trace, "--cached-experts", "2"])?;
        for report in [&replayed, &self.json(&["replay", "--cached-experts", "2"])?] {
            let requests = count(report, "requests");
            is(requests > 0 && requests == count(report, "hits") + count(report, "misses"), "replay", report)?;
            is(report["hit_rate"].is_number() && report["belady_hit_rate"].is_number(), "replay", report)?;
        }
        is(!self.run(&["replay", "--logits", &trace])?.stdout.is_empty(), "replay", "expected a table")
    }

    fn compare(&self, experts: u64) -> Result<(), String> {
        let rows = |report: &Value| report["rows"].as_array().cloned().unwrap_or_default();
        let perplexities = |report: &Value| -> Vec<Option<f64>> {
            std::iter::once(&report["dropless"]).chain(&rows(report)).map(|row| row["perplexity"].as_f64()).collect()
        };
        let factor = ["compare", "--capacity-factor", "1.0"];
        let held = self.json(&factor)?;
        is(rows(&held).len() >= 13 && perplexities(&held).iter().all(Option::is_some), "compare", &held)?;
        let cached = self.json(&[&factor[..], &["--expert-cache", self.cache]].concat())?;
        is(perplexities(&held) == perplexities(&cached), "compare --expert-cache", &cached)?;
        let aware = ["compare", "--router", "top-k,cache,cache+phase", "--capacity-factor", "1.25"];
        let all = experts.to_string();
        for memory in [["--cached-experts", "2"], ["--cached-experts", &all], ["--expert-cache", self.cache]] {
            let report = self.json(&[&aware[..], &memory].concat())?;
            is(rows(&report).len() == 3 && perplexities(&report).iter().all(Option::is_some), "compare", &report)?;
        }
        answer::table(&self.run(&["compare", "--router", "phase"])?)
    }

    fn generate(&self) -> Result<(), String> {
        let generate = ["generate", "--prompt", self.prompt, "--new-tokens", "5"];
        let held = self.json(&generate)?;
        let cached = self.json(&[&generate[..], &["--expert-cache", self.cache]].concat())?;
        let counted = self.json(&[&generate[..], &["--cached-experts", "2"]].concat())?;
        is(held["text"].is_string() && count(&held, "prompt_tokens") > 0, "generate", &held)?;
        is(held["text"] == cached["text"] && held["text"] == counted["text"], "generate", &cached)?;
        is(cached["hit_rate"].is_number() && count(&cached, "expert_bytes_read") > 0, "generate", &cached)?;
        is(counted["hit_rate"].is_number(), "generate", &counted)?;
        let aware = ["--router", "cache+phase", "--cached-experts", "2", "--capacity-factor", "1"];
        self.json(&[&generate[..], &aware].concat())?;
        let several = ["--prompt", self.prompt, "--router", "cache", "--expert-cache", self.cache];
        let several = self.json(&[&generate[..], &several].concat())?;
        is(several["texts"].as_array().is_some_and(|texts| texts.len() == 2), "generate", &several)
    }

    fn tune(&self) -> Result<(), String> {
        let tune = ["tune", "--cache-bonus", "0,0.1"];
        for memory in [["--cached-experts", "2"], ["--expert-cache", self.cache]] {
            let report = self.json(&[&tune[..], &memory].concat())?;
            let rows = report["rows"].as_array().cloned().unwrap_or_default();
            let whole = |row: &Value| row["perplexity"].is_number() && row["hit_rate"].is_number();
            is(rows.len() == 2 && rows.iter().all(whole), "tune", &report)?;
            is(report["recommended"].is_object() || report["recommended"].is_null(), "tune", &report)?;
        }
        answer::table(&self.run(&["tune", "--cache-bonus", "0"])?)
    }
}

fn count(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no count `{key}` in {value}"))
}

fn is(right: bool, what: &str, got: impl std::fmt::Display) -> Result<(), String> {
    if right { Ok(()) } else { Err(format!("{what}: {got}")) }
}

/// What only says why it cannot run.
fn is_refused(model: &str, ready: &Ready, expected: &str) -> Result<(), String> {
    let (out, text) = (ready.file("out"), ready.texts[0].to_str().unwrap());
    let out = out.to_str().unwrap();
    let commands: [&[&str]; 7] = [
        &["inspect"],
        &["compare", "--text", text],
        &["generate", "--prompt", "w1"],
        &["tune", "--text", text],
        &["trace", "--text", text, "--out", out],
        &["replay", "--text", text],
        &["logits", "--ids", "1", "--out", out],
    ];
    for command in commands {
        let ran = run(&[command, &["--model", model]].concat());
        // The headers of an MoE layer alone can be looked at.
        if command == ["inspect"] && ran.code == Some(0) {
            answer::table(&ran)?;
            continue;
        }
        let refused = answer::result_or_line(&ran, |_| false).is_ok_and(|result| !result);
        is(refused && ran.stderr.contains(expected), command[0], &ran.stderr)?;
        is(!ready.file("out").exists(), command[0], "a file was left behind")?;
    }
    Ok(())
}

fn check(fixture: &Fixture) -> Result<(), String> {
    let ready = Ready::new(fixture);
    let model = ready.model.to_str().unwrap();
    if let Some(expected) = fixture.refusal() {
        return is_refused(model, &ready, expected);
    }
    let [first, second] = [0, 1].map(|kind| ready.texts[kind].to_str().unwrap());
    let bench = Bench {
        model: vec!["--model", model],
        dtype: "f32",
        text: vec!["--text", first, "--text", second, "--tokens", "60", "--batch-tokens", "16"],
        prompt: &ready.prompt,
        cache: CACHE,
        out: ready.directory.path(),
    };
    bench.all_commands()
}

#[test]
fn every_command_runs_on_every_family() {
    runner::all("models", &fixtures::all(), |_, fixture| check(fixture));
}

#[test]
fn every_command_runs_on_the_bundled_model() {
    let directory = tempfile::tempdir().unwrap();
    let path = root().join("models/tiny-moe");
    let models: [Vec<&str>; 2] = [vec![], vec!["--model", path.to_str().unwrap()]];
    runner::all("bundled model", &models, |worker, model| {
        let out = directory.path().join(format!("{worker}{}", model.len()));
        std::fs::create_dir(&out).unwrap();
        let bench = Bench {
            model: model.clone(),
            dtype: "bf16",
            text: vec!["--tokens", "128", "--batch-tokens", "64"],
            prompt: "And it came to pass",
            cache: "2MiB",
            out: &out,
        };
        bench.all_commands()
    });
}
