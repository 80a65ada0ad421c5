//! The models of `tests/goldens` and the bundled one, each in a directory of its own with a tokenizer and texts.

use phase_moe::Weights;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Tokens of a text: fewer than the 64 positions of these models.
const TEXT_TOKENS: usize = 48;

pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A model, as it lies in the repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fixture {
    /// `zoo/mixtral`, `gguf/olmoe.gguf`.
    pub name: String,
    /// A directory or a GGUF file.
    pub path: PathBuf,
}

impl Fixture {
    pub fn is_gguf(&self) -> bool {
        self.path.is_file()
    }

    /// What cannot run, with a part of the line that says why: a tokenizer alone.
    pub fn refusal(&self) -> Option<&'static str> {
        (self.name == "gguf/sentencepiece.gguf").then_some("metadata `llama.")
    }
}

/// All models of `tests/goldens`, so that a new one is among them.
pub fn all() -> Vec<Fixture> {
    let goldens = root().join("tests/goldens");
    let mut found = Vec::new();
    let mut open = vec![goldens.clone()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let is_model = path.join("config.json").exists() || path.extension().is_some_and(|end| end == "gguf");
            if is_model {
                let name = path.strip_prefix(&goldens).unwrap().to_str().unwrap().to_owned();
                found.push(Fixture { name, path });
            } else if path.is_dir() {
                open.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() >= 20, "{found:?}");
    found
}

/// The fixture called `name`.
pub fn named(name: &str) -> Fixture {
    all().into_iter().find(|fixture| fixture.name == name).unwrap_or_else(|| panic!("no fixture {name}"))
}

/// A fixture in a directory of its own that commands can be run in.
pub struct Ready {
    pub directory: TempDir,
    /// What `--model` is given.
    pub model: PathBuf,
    /// Two files of [`TEXT_TOKENS`] words.
    pub texts: [PathBuf; 2],
    /// Of a text.
    pub prompt: String,
}

impl Ready {
    /// Tensors are copied, so that a command that destroys its input destroys the copy.
    pub fn new(fixture: &Fixture) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let model = match fixture.is_gguf() {
            true => {
                let file = directory.path().join("model.gguf");
                std::fs::copy(&fixture.path, &file).unwrap();
                file
            }
            false => {
                for file in ["config.json", "model.safetensors"] {
                    std::fs::copy(fixture.path.join(file), directory.path().join(file)).unwrap();
                }
                directory.path().to_owned()
            }
        };
        // What has no embeddings needs no words: it is refused before.
        let vocabulary = vocabulary(&model).unwrap_or(2);
        let tokenizer = words(vocabulary).to_string();
        std::fs::write(directory.path().join("tokenizer.json"), tokenizer).unwrap();
        let text = |kind: usize| {
            let word = |at: usize| format!("w{}", 1 + (at * at + 7 * at + 11 * kind) % (vocabulary - 1));
            (0..TEXT_TOKENS).map(word).collect::<Vec<_>>().join(" ")
        };
        let texts = [0, 1].map(|kind| {
            let path = directory.path().join(format!("text{kind}.txt"));
            std::fs::write(&path, text(kind)).unwrap();
            path
        });
        Self { directory, model, texts, prompt: "w1 w5 w3 w20".into() }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn vocabulary(model: &Path) -> Option<usize> {
    Some(Weights::open(model).ok()?.spec().ok()?.vocab)
}

/// A `tokenizer.json` of the words `w1`, `w2`, .. for ids of the same numbers, 0 standing for any other word.
fn words(vocabulary: usize) -> Value {
    let name = |id: usize| if id == 0 { "<unk>".into() } else { format!("w{id}") };
    let vocab: serde_json::Map<String, Value> = (0..vocabulary).map(|id| (name(id), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}
