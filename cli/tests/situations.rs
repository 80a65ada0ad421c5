//! What the command says in situations that people have met: a table of inputs and right answers, `cli/tests/situations/*.json`.
//!
//! Each row makes a directory of files, runs the command in it and holds code, output and written tensors against what is right;
//! `source` says where the right value comes from. [`Situation`] is the format. `PHASE_MOE_SITUATION=part of a name` runs some.

#[path = "situations/gguf.rs"]
mod gguf;

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use phase_moe::Checkpoint;
use serde::Deserialize;
use serde_json::Value;

/// One row. In `run`, `file` and messages `{dir}` is the row's own directory, `{root}` the repository.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Situation {
    /// The situation, in words; unique.
    name: String,
    /// Line of the list of situations that it belongs to; for people.
    #[allow(dead_code)]
    line: u32,
    /// Where the right answer comes from; for people.
    #[allow(dead_code)]
    source: String,
    /// A directory or file of the repository whose files are copied first.
    model: Option<String>,
    /// Files to write, after those of `model`, in the order of their names.
    #[serde(default)]
    files: BTreeMap<String, Content>,
    /// What stands on standard input.
    stdin: Option<String>,
    run: Vec<String>,
    code: i32,
    stdout: Option<String>,
    #[serde(default)]
    stdout_has: Vec<String>,
    #[serde(default)]
    stderr_has: Vec<String>,
    stderr_lines: Option<usize>,
    /// JSON pointers into standard output: a value, or `{"near": number, "within": number}`.
    #[serde(default)]
    json: BTreeMap<String, Value>,
    tensor: Option<Expected>,
}

/// What a file holds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase", untagged)]
enum Content {
    /// A JSON merge patch (RFC 7396) of the file that is there.
    Merge {
        merge: Value,
    },
    Json {
        json: Value,
    },
    Text {
        text: String,
    },
    Hex {
        hex: String,
    },
    /// A file of the repository.
    Copy {
        copy: String,
    },
    /// A GGUF file of the repository with other metadata.
    Gguf {
        gguf: String,
        #[serde(default)]
        set: BTreeMap<String, gguf::Typed>,
        #[serde(default)]
        remove: Vec<String>,
    },
}

/// A tensor that the command writes, and the golden one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    file: String,
    name: String,
    like: String,
    #[serde(rename = "as")]
    golden: String,
    within: f32,
}

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn copy(from: &Path, to: &Path) {
    if from.is_file() {
        std::fs::copy(from, to.join(from.file_name().unwrap())).unwrap();
        return;
    }
    for entry in std::fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// RFC 7396: objects are joined key by key, null takes a key away, anything else replaces.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Default::default());
    }
    let Value::Object(target) = target else { unreachable!() };
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(key)),
            value => merge(target.entry(key).or_insert(Value::Null), value),
        }
    }
}

impl Content {
    fn bytes(&self, path: &Path) -> Vec<u8> {
        match self {
            Self::Merge { merge: patch } => {
                let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
                merge(&mut value, patch);
                value.to_string().into_bytes()
            }
            Self::Json { json } => json.to_string().into_bytes(),
            Self::Text { text } => text.clone().into_bytes(),
            Self::Hex { hex } => {
                let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
                (0..hex.len()).step_by(2).map(byte).collect()
            }
            Self::Copy { copy } => std::fs::read(root().join(copy)).unwrap_or_else(|error| panic!("{copy}: {error}")),
            Self::Gguf { gguf: file, set, remove } => {
                let mut file = gguf::File::parse(&std::fs::read(root().join(file)).unwrap());
                file.metadata.retain(|(key, _)| !remove.contains(key) && !set.contains_key(key));
                file.metadata.extend(set.iter().map(|(key, value)| (key.clone(), value.encoded())));
                file.bytes()
            }
        }
    }
}

/// What is wrong with the command's answer; nothing if it is right.
fn faults(situation: &Situation) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    if let Some(model) = &situation.model {
        copy(&root().join(model), directory.path());
    }
    for (name, content) in &situation.files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content.bytes(&path)).unwrap();
    }
    let dir = directory.path().to_str().unwrap();
    let placed =
        |text: &String| text.replace("{dir}", dir).replace("{root}", concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    command.args(situation.run.iter().map(placed)).current_dir(directory.path());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // A command that does not read what stands there may be gone by now.
    let _ = input.write_all(situation.stdin.as_deref().unwrap_or_default().as_bytes());
    drop(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));

    let mut faults = Vec::new();
    if output.status.code() != Some(situation.code) {
        faults.push(format!("code {:?}, expected {}", output.status.code(), situation.code));
    }
    if situation.stdout.as_ref().map(placed).is_some_and(|expected| expected != stdout) {
        faults.push(format!("standard output is not {:?}", situation.stdout));
    }
    for (has, got, stream) in [(&situation.stdout_has, &stdout, "output"), (&situation.stderr_has, &stderr, "error")] {
        let missing = has.iter().map(placed).filter(|part| !got.contains(part));
        faults.extend(missing.map(|part| format!("standard {stream} does not have {part:?}")));
    }
    if situation.stderr_lines.is_some_and(|lines| stderr.lines().count() != lines) {
        faults.push(format!(
            "{} lines on standard error, expected {:?}",
            stderr.lines().count(),
            situation.stderr_lines
        ));
    }
    if !situation.json.is_empty() {
        let json: Value = serde_json::from_str(&stdout).unwrap_or_default();
        for (pointer, expected) in &situation.json {
            let got = json.pointer(pointer);
            let right = match (expected["near"].as_f64(), expected["within"].as_f64()) {
                (Some(near), Some(within)) => {
                    got.and_then(Value::as_f64).is_some_and(|got| (got - near).abs() <= within)
                }
                _ => got == Some(expected),
            };
            if !right {
                faults.push(format!("{pointer} is {got:?}, expected {expected}"));
            }
        }
    }
    if let (Some(expected), true) = (&situation.tensor, output.status.success()) {
        faults.extend(tensor_fault(expected, Path::new(&placed(&expected.file))));
    }
    if !faults.is_empty() {
        faults.push(format!("standard output: {stdout}\nstandard error: {stderr}"));
    }
    faults
}

fn tensor_fault(expected: &Expected, file: &Path) -> Option<String> {
    let values = |file: &Path, name: &str| -> Result<(Vec<usize>, Vec<f32>), String> {
        let checkpoint = Checkpoint::open(file).map_err(|error| error.to_string())?;
        let shape = checkpoint.entry(name).map_err(|error| error.to_string())?.shape.clone();
        let bytes = checkpoint.read(name).map_err(|error| error.to_string())?;
        Ok((shape, bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    };
    let golden = values(&root().join(&expected.like), &expected.golden).unwrap_or_else(|error| panic!("{error}"));
    let (shape, got) = match values(file, &expected.name) {
        Ok(got) => got,
        Err(error) => return Some(error),
    };
    if shape != golden.0 {
        return Some(format!("`{}` is {shape:?}, expected {:?}", expected.name, golden.0));
    }
    // A NaN is far away.
    let near = |(got, golden): &(&f32, &f32)| (*got - *golden).abs() <= expected.within;
    let far = got.len() - got.iter().zip(&golden.1).filter(near).count();
    let farthest = got.iter().zip(&golden.1).map(|(got, golden)| (got - golden).abs()).fold(0.0, f32::max);
    (far > 0).then(|| {
        format!(
            "`{}`: {far} of {} values are off by more than {}, at most {farthest}",
            expected.name,
            got.len(),
            expected.within
        )
    })
}

fn situations() -> Vec<Situation> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(root().join("cli/tests/situations"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    let read = |path: &PathBuf| -> Vec<Situation> {
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    files.iter().flat_map(read).collect()
}

#[test]
fn every_situation_has_its_right_answer() {
    let situations = situations();
    let names: HashSet<&str> = situations.iter().map(|situation| situation.name.as_str()).collect();
    assert_eq!(names.len(), situations.len(), "two situations have one name");
    assert!(!situations.is_empty());
    let only = std::env::var("PHASE_MOE_SITUATION").unwrap_or_default();
    let mut wrong = Vec::new();
    for situation in situations.iter().filter(|situation| situation.name.contains(&only)) {
        let faults = faults(situation);
        if !faults.is_empty() {
            wrong.push(format!("{}\n  {}", situation.name, faults.join("\n  ")));
        }
    }
    assert!(wrong.is_empty(), "{} of {} situations:\n{}", wrong.len(), situations.len(), wrong.join("\n"));
}
