//! Models of which one value of the configuration is replaced by another: a result, or one clear line.
//!
//! A mutation is any value of a `config.json`, at any depth, or any metadata value of a GGUF file, and what comes in its place.

use std::fmt;
use std::path::Path;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::answer;
use crate::fixtures::{self, Fixture, Ready};
use crate::gguf::{File, Typed};
use crate::runner::{self, run};

/// Mutations of a usual run; two replaced values at once are a fifth of them.
const CASES: usize = 500;

/// What replaces a value of a `config.json`; none takes it out.
fn json_values() -> Vec<Option<Value>> {
    let values = [
        json!(null),
        json!("text"),
        json!(""),
        json!(0.5),
        json!(-1),
        json!(0),
        json!(1),
        json!(u32::MAX),
        json!(1u64 << 32),
        json!(1u64 << 63),
        json!(1e300),
        json!([]),
        json!({}),
        json!(true),
        json!(false),
    ];
    values.into_iter().map(Some).chain([None]).collect()
}

/// What replaces a metadata value; none takes it out, as GGUF knows no null.
fn stored_values() -> Vec<Option<Typed>> {
    let values = [
        Typed::String("text".into()),
        Typed::String(String::new()),
        Typed::F32(0.5),
        Typed::F32(-1.0),
        Typed::F32(1e30),
        Typed::F32(f32::NAN),
        Typed::F32(f32::INFINITY),
        Typed::I32(-1),
        Typed::U32(0),
        Typed::U32(1),
        Typed::U32(u32::MAX),
        Typed::U64(1 << 32),
        Typed::U64(1 << 63),
        Typed::U32s(Vec::new()),
        Typed::F32s(Vec::new()),
        Typed::Strings(Vec::new()),
        Typed::Bool(true),
        Typed::Bool(false),
    ];
    values.into_iter().map(Some).chain([None]).collect()
}

/// A value and what comes in its place.
#[derive(Clone)]
enum Change {
    Json { pointer: String, value: Option<Value> },
    Gguf { key: String, value: Option<Typed> },
}

/// Changes of one model.
#[derive(Clone)]
struct Mutation<'a> {
    fixture: &'a Fixture,
    changes: Vec<Change>,
}

impl fmt::Debug for Mutation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fixture.name)?;
        for change in &self.changes {
            match change {
                Change::Json { pointer, value: Some(value) } => write!(f, ", {pointer} = {value}")?,
                Change::Gguf { key, value: Some(value) } => write!(f, ", {key} = {value:?}")?,
                Change::Json { pointer: key, .. } | Change::Gguf { key, .. } => write!(f, ", no {key}")?,
            }
        }
        Ok(())
    }
}

/// Pointers to all values within `value`.
fn pointers(at: &str, value: &Value, found: &mut Vec<String>) {
    let mut inner = |key: String, value: &Value| {
        let pointer = format!("{at}/{key}");
        found.push(pointer.clone());
        pointers(&pointer, value, found);
    };
    match value {
        Value::Object(values) => values.iter().for_each(|(key, value)| inner(key.clone(), value)),
        Value::Array(values) => values.iter().enumerate().for_each(|(index, value)| inner(index.to_string(), value)),
        _ => {}
    }
}

/// Sets or removes what `pointer` points to, where it is still there.
fn change(config: &mut Value, pointer: &str, value: &Option<Value>) {
    let (outer, key) = pointer.rsplit_once('/').unwrap();
    match (config.pointer_mut(outer), value) {
        (Some(Value::Object(outer)), Some(value)) => drop(outer.insert(key.into(), value.clone())),
        (Some(Value::Object(outer)), None) => drop(outer.remove(key)),
        (Some(Value::Array(outer)), value) => {
            let index = key.parse::<usize>().unwrap();
            match value {
                Some(value) if index < outer.len() => outer[index] = value.clone(),
                None if index < outer.len() => drop(outer.remove(index)),
                _ => {}
            }
        }
        _ => {}
    }
}

fn config(fixture: &Fixture) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture.path.join("config.json")).unwrap()).unwrap()
}

/// Every change of one value of `fixture`.
fn changes(fixture: &Fixture) -> Vec<Change> {
    if fixture.is_gguf() {
        let file = File::parse(&std::fs::read(&fixture.path).unwrap());
        let of = |(key, _): (String, Vec<u8>)| {
            stored_values().into_iter().map(move |value| Change::Gguf { key: key.clone(), value })
        };
        return file.metadata.into_iter().flat_map(of).collect();
    }
    let mut found = Vec::new();
    pointers("", &config(fixture), &mut found);
    let of =
        |pointer: String| json_values().into_iter().map(move |value| Change::Json { pointer: pointer.clone(), value });
    found.into_iter().flat_map(of).collect()
}

impl Mutation<'_> {
    /// Writes the changed file over the copy in `ready`.
    fn write(&self, ready: &Ready) {
        if self.fixture.is_gguf() {
            let mut file = File::parse(&std::fs::read(&self.fixture.path).unwrap());
            for change in &self.changes {
                let Change::Gguf { key, value } = change else { continue };
                let at = file.metadata.iter().position(|(other, _)| other == key);
                match (at, value) {
                    (Some(at), Some(value)) => file.metadata[at].1 = value.encoded(),
                    (Some(at), None) => drop(file.metadata.remove(at)),
                    _ => {}
                }
            }
            std::fs::write(&ready.model, file.bytes()).unwrap();
            return;
        }
        let mut config = config(self.fixture);
        for step in &self.changes {
            let Change::Json { pointer, value } = step else { continue };
            change(&mut config, pointer, value);
        }
        std::fs::write(ready.file("config.json"), config.to_string()).unwrap();
    }
}

/// Headers alone; all in memory; experts on a cache; with the tokenizer.
const COMMANDS: [&[&str]; 4] = [
    &["inspect", "--json"],
    &["logits", "--ids", "1,2,3", "--out"],
    &["logits", "--ids", "1,2,3", "--expert-cache", "64KiB", "--out"],
    &["generate", "--prompt", "w1 w2 w3", "--new-tokens", "2", "--json"],
];

fn check(ready: &Ready, mutation: &Mutation<'_>) -> Result<(), String> {
    mutation.write(ready);
    let mut logits: Vec<Vec<u8>> = Vec::new();
    for command in COMMANDS {
        let (model, out) = (ready.model.to_str().unwrap(), ready.file("out.safetensors"));
        let mut arguments = command.to_vec();
        if command.contains(&"--out") {
            arguments.push(out.to_str().unwrap());
        }
        arguments.extend(["--model", model]);
        let ran = run(&arguments);
        let result = answer::result_or_line(&ran, answer::is_not_finite).and_then(|result| {
            match (result, command.contains(&"--json")) {
                (true, true) => drop(answer::json(&ran)?),
                (true, false) => logits.push(read(&out)?),
                (false, _) if out.exists() => return Err("a file was left behind".into()),
                (false, _) => {}
            }
            Ok(())
        });
        let _ = std::fs::remove_file(&out);
        result.map_err(|message| format!("{}: {message}", command.join(" ")))?;
    }
    match logits.as_slice() {
        [held, cached] if held != cached => Err("other logits with --expert-cache".into()),
        [_] => Err("logits with or without --expert-cache, not both".into()),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    answer::tensors(path)?;
    std::fs::read(path).map_err(|error| error.to_string())
}

/// What there is to change in a model that runs as it is.
fn models() -> Vec<(Fixture, Vec<Change>)> {
    fixtures::all().into_iter().map(|fixture| (fixture.clone(), changes(&fixture))).collect()
}

#[test]
fn any_value_replaced_gives_a_result_or_one_clear_line() {
    let models = models();
    let mut random = ChaCha8Rng::seed_from_u64(runner::seed());
    let single = |(fixture, changes): &'_ (Fixture, Vec<Change>)| -> Vec<(usize, Change)> {
        let at = models.iter().position(|(other, _)| other == fixture).unwrap();
        changes.iter().map(|change| (at, change.clone())).collect()
    };
    let mut singles: Vec<(usize, Change)> = models.iter().flat_map(single).collect();
    singles.shuffle(&mut random);
    let cases = CASES * runner::times();
    let pairs = (cases / 5).max(cases.saturating_sub(singles.len()));
    singles.truncate(cases - pairs);
    let mut mutations: Vec<Mutation<'_>> =
        singles.into_iter().map(|(at, change)| Mutation { fixture: &models[at].0, changes: vec![change] }).collect();
    mutations.extend((0..pairs).map(|_| {
        let (fixture, changes) = &models[random.random_range(0..models.len())];
        let mut pick = || changes[random.random_range(0..changes.len())].clone();
        Mutation { fixture, changes: vec![pick(), pick()] }
    }));
    // Those of one model together, so that a worker makes few copies.
    mutations.sort_by(|a, b| a.fixture.cmp(b.fixture));
    check_all(&mutations);
}

fn check_all(mutations: &[Mutation<'_>]) {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let held: Vec<std::sync::Mutex<Option<(&Fixture, Ready)>>> = (0..workers).map(|_| Default::default()).collect();
    runner::all("mutations", mutations, |worker, mutation| {
        let mut held = held[worker].lock().unwrap();
        if held.as_ref().is_none_or(|(fixture, _)| *fixture != mutation.fixture) {
            *held = Some((mutation.fixture, Ready::new(mutation.fixture)));
        }
        check(&held.as_ref().unwrap().1, mutation)
    });
}

#[test]
fn a_gguf_file_put_together_again_is_the_same() {
    for fixture in fixtures::all().iter().filter(|fixture| fixture.is_gguf()) {
        let bytes = std::fs::read(&fixture.path).unwrap();
        let again = File::parse(&bytes).bytes();
        // A file without tensors may end before its data would begin.
        assert!(again.starts_with(&bytes) && again.len() < bytes.len() + 32, "{}", fixture.name);
    }
}
