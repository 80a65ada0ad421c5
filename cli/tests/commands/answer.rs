//! What a run may answer: a result whose figures are numbers, or one clear line.

use std::path::Path;

use phase_moe::Checkpoint;
use phase_moe::checkpoint::ElementType;
use serde_json::Value;

use crate::runner::Ran;

/// Keys whose figure may not apply, and that are null then.
const MAY_BE_NULL: [&str; 20] = [
    "agreement",
    "belady_hit_rate",
    "bonus",
    "bytes_per_expert",
    "bytes_read",
    "bytes_read_per_token",
    "cache_bonus",
    "capacity_factor",
    "capacity_rule",
    "capacity_total",
    "decode_tokens_per_second",
    // Of experts or devices that have no room at all.
    "demand_max_violation",
    "device_max_violation",
    "devices",
    "expert_bytes_read",
    "expert_cache_bytes",
    "gate_mass_kept",
    "gate_mass_vs_bound",
    "hit_rate",
    "max_mass_loss",
];
const MAY_BE_NULL_TOO: [&str; 7] =
    ["command", "kinds", "peak_resident_expert_bytes", "perplexity_error", "profile", "recommended", "warning"];

/// Keys whose figure is a share of 1. Gate mass is none: where experts are selected by other scores, one that takes another's place
/// may weigh more.
const SHARES: [&str; 8] =
    ["survival", "feasible_survival", "hit_rate", "belady_hit_rate", "gate_mass_vs_bound", "agreement", "jain", "gini"];

/// The JSON document on standard output, its figures checked.
pub fn json(ran: &Ran) -> Result<Value, String> {
    let value: Value =
        serde_json::from_str(&ran.stdout).map_err(|error| format!("no JSON: {error}: {}", start(&ran.stdout)))?;
    figures("", &value)?;
    Ok(value)
}

fn figures(key: &str, value: &Value) -> Result<(), String> {
    match value {
        // What is no number in Rust is written as null.
        Value::Null if !MAY_BE_NULL.contains(&key) && !MAY_BE_NULL_TOO.contains(&key) => {
            Err(format!("`{key}` is null"))
        }
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or(f64::NAN);
            let most = if SHARES.contains(&key) { 1.0 + 1e-6 } else { f64::MAX };
            let least = match key {
                "perplexity" | "plain_perplexity" => 1.0,
                "perplexity_increase" | "max_violation" | "device_max_violation" | "demand_max_violation" => -1.0,
                _ => 0.0,
            };
            match (least..=most).contains(&number) {
                true => Ok(()),
                false => Err(format!("`{key}` is {number}: expected {least} to {most:e}")),
            }
        }
        Value::Array(values) => values.iter().try_for_each(|value| figures(key, value)),
        Value::Object(values) => {
            // Its tokens get more experts than they asked for.
            let may_exceed = |key: &str| key == "survival" && value["router"] == "expert-choice";
            values.iter().filter(|(key, _)| !may_exceed(key)).try_for_each(|(key, value)| figures(key, value))
        }
        _ => Ok(()),
    }
}

/// A table that is there and has no figure that is none.
pub fn table(ran: &Ran) -> Result<(), String> {
    let is_none = |word: &str| ["nan", "inf", "-inf", "nan%", "inf%"].contains(&word.to_lowercase().as_str());
    match ran.stdout.split_whitespace().find(|word| is_none(word)) {
        _ if ran.stdout.trim().is_empty() => Err("nothing on standard output".into()),
        Some(word) => Err(format!("`{word}` on standard output: {}", start(&ran.stdout))),
        None => Ok(()),
    }
}

/// A whole page.
pub fn page(path: &Path) -> Result<(), String> {
    let page = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    match page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>") {
        true => Ok(()),
        false => Err(format!("{} bytes, expected a page", page.len())),
    }
}

/// A placement, every expert of every layer on a device that there is.
pub fn placement(path: &Path) -> Result<(), String> {
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let file: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let devices = file["devices"].as_u64().ok_or("no number of devices")?;
    let on_device = |device: &Value| device.as_u64().is_some_and(|device| device < devices);
    let is_layer =
        |layer: &Value| layer.as_array().is_some_and(|layer| !layer.is_empty() && layer.iter().all(on_device));
    match file["layers"].as_array().filter(|layers| !layers.is_empty() && layers.iter().all(is_layer)) {
        Some(_) => Ok(()),
        None => Err(format!("no placement: {}", start(&file.to_string()))),
    }
}

/// The file's tensors, whose floats must all be finite.
pub fn tensors(path: &Path) -> Result<Checkpoint, String> {
    let file = Checkpoint::open(path).map_err(|error| error.to_string())?;
    for (name, entry) in file.tensors() {
        let bytes = file.read(name).map_err(|error| error.to_string())?;
        if entry.dtype == ElementType::Plain(safetensors::Dtype::F32) {
            // A mask among gate logits is −inf; none of these models has one.
            let values = bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
            if let Some(value) = values.clone().find(|value| !value.is_finite()) {
                return Err(format!("{value} in `{name}` with code 0"));
            }
        }
    }
    Ok(file)
}

/// Code 0, and nothing alarming on standard error.
pub fn good(ran: &Ran) -> Result<(), String> {
    match ran.code {
        Some(0) if !ran.stderr.contains("panicked") => Ok(()),
        code => Err(format!("code {code:?}{}: {}", if ran.hung { ", hung" } else { "" }, start(&ran.stderr))),
    }
}

/// A result, or a mistake told in one clear line; `is_failure` says of which line code 1 is the right one. True for a result.
pub fn result_or_line(ran: &Ran, is_failure: impl Fn(&str) -> bool) -> Result<bool, String> {
    if ran.hung || ran.stderr.contains("panicked") || !matches!(ran.code, Some(0..=2)) {
        let what = if ran.hung { ", hung" } else { "" };
        return Err(format!("code {:?}{what}: {}", ran.code, start(&ran.stderr)));
    }
    if ran.code == Some(0) {
        return match ran.stderr.contains("phase-moe: ") || ran.stderr.lines().count() > 8 {
            true => Err(format!("code 0 with an error: {}", start(&ran.stderr))),
            false => Ok(true),
        };
    }
    if !ran.stdout.is_empty() {
        return Err(format!("code {:?} with something on standard output: {}", ran.code, start(&ran.stdout)));
    }
    // Clap's own messages have a usage line and a hint below.
    if ran.code == Some(2) && ran.stderr.starts_with("error: ") {
        return match ran.stderr.lines().count() <= 12 {
            true => Ok(false),
            false => Err(format!("a long message: {}", start(&ran.stderr))),
        };
    }
    let last = ran.stderr.lines().last().unwrap_or_default();
    let lines = ran.stderr.lines().filter(|line| line.starts_with("phase-moe: ")).count();
    if lines != 1 || !last.starts_with("phase-moe: ") || last.len() > 600 || ran.stderr.lines().count() > 8 {
        return Err(format!("expected one line `phase-moe: ..`: {}", start(&ran.stderr)));
    }
    match ran.code == Some(1) && !is_failure(last) {
        true => Err(format!("code 1 for a mistake of the user's: {last}")),
        false => Ok(false),
    }
}

/// The error of a figure that is no number, where the weights or what is done with them run over.
pub fn is_not_finite(line: &str) -> bool {
    ["NaN", "inf", "finite"].iter().any(|word| line.contains(word))
}

fn start(text: &str) -> String {
    text.chars().take(700).collect()
}
