//! The bundled model: beside the manifest in a checkout, embedded in the binary elsewhere.

use std::path::PathBuf;

use phase_moe::{Checkpoint, Result, Weights};

macro_rules! embedded {
    ($name:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/model/", $name))
    };
}

const NAME: &str = "tiny-moe";
static CONFIG: &[u8] = embedded!("config.json");
static TOKENIZER: &[u8] = embedded!("tokenizer.json");
static TENSORS: &[u8] = embedded!("model.safetensors");
static TEXTS: [(&str, &[u8]); 3] = [
    ("scripture.txt", embedded!("eval/scripture.txt")),
    ("code.txt", embedded!("eval/code.txt")),
    ("reference.txt", embedded!("eval/reference.txt")),
];

/// The directory in a checkout, if there is one.
fn directory() -> Option<PathBuf> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/model"));
    path.join("config.json").is_file().then_some(path)
}

/// The model's files.
pub fn files() -> Result<Weights> {
    if let Some(directory) = directory() {
        return Weights::open(&directory);
    }
    let source = (format!("embedded {NAME}/model.safetensors"), Box::new(TENSORS) as Box<_>);
    let config = String::from_utf8_lossy(CONFIG);
    let weights = Weights::from_parts(NAME, config, Checkpoint::from_sources(vec![source])?);
    Ok(weights.with_file("tokenizer.json", TOKENIZER.to_vec()))
}

/// Name and text of the held-out evaluation texts.
pub fn texts() -> Vec<(String, String)> {
    let decode = |(name, bytes): &(&str, &[u8])| (name.to_string(), String::from_utf8_lossy(bytes).into_owned());
    TEXTS.iter().map(decode).collect()
}
