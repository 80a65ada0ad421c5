//! What a path to a model is: a directory in Hugging Face layout, a GGUF file by its first bytes, or one of the things that people
//! have beside them, which are named with what to give instead.
//!
//! Reads the first bytes of files and no tensors. Knows nothing of what a configuration means.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::ByteSource;
use super::file::not_a_file;
use super::gguf::{MAGIC, is_first_part};
use super::safetensors::SAFETENSORS;
use crate::error::{Error, Result};

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// A directory in Hugging Face layout.
    Directory(PathBuf),
    /// A GGUF file, the first part where it is split.
    Gguf(PathBuf),
}

/// Weights of other programs, by what a file begins with and by how its name ends.
const OTHER_WEIGHTS: &str = "convert them to safetensors or GGUF";

/// Finds the model that `path` is or holds: a GGUF file, a directory with one and no safetensors files, a directory in Hugging Face
/// layout, or the only snapshot in a model's directory of the hub's cache.
///
/// # Errors
/// [`Error::Io`] for a path that is not there or unreadable, [`Error::Checkpoint`] for one that is something else, and says what.
pub(crate) fn locate(path: &Path) -> Result<Located> {
    let wrong = |detail: String| Error::Checkpoint { file: path.display().to_string(), detail };
    let is_named_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        // As a directory it is missed by the first file that is looked for in it.
        Err(error) if error.kind() == ErrorKind::NotFound && !is_named_gguf => {
            return Ok(Located::Directory(path.to_owned()));
        }
        Err(error) => return Err(Error::io(path, error)),
    };
    if metadata.is_file() {
        return match file_kind(path)? {
            FileKind::Gguf => Ok(Located::Gguf(path.to_owned())),
            kind => Err(wrong(refused_file(path, kind))),
        };
    }
    if let Some(kind) = not_a_file(metadata.file_type()) {
        return Err(wrong(format!("expected a checkpoint directory or a GGUF file, got {kind}")));
    }
    let has = |name: &str| path.join(name).exists();
    if SAFETENSORS.iter().any(|name| has(name)) {
        return match has("config.json") || !has("adapter_config.json") {
            true => Ok(Located::Directory(path.to_owned())),
            false => Err(wrong(adapter(path))),
        };
    }
    let files = entries(path)?;
    if let Some(file) = gguf_among(path, &files)? {
        return Ok(Located::Gguf(file));
    }
    match refused_directory(path, &files)? {
        Some(Refused::Snapshot(snapshot)) => locate(&snapshot),
        Some(Refused::Other(detail)) => Err(wrong(detail)),
        // What is missing is named when it is opened.
        None => Ok(Located::Directory(path.to_owned())),
    }
}

/// What a model is to be called: the name of its directory or file; in the hub's cache, where that is a hash, the model's.
pub(crate) fn name_of(path: &Path) -> String {
    let found = path.canonicalize().ok();
    let part = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let of_snapshot = || {
        let snapshots = found.as_deref()?.parent()?;
        let model = part(snapshots.parent()?)?;
        let name = model.strip_prefix("models--").filter(|_| snapshots.ends_with("snapshots"))?;
        Some(name.replace("--", "/"))
    };
    of_snapshot().or_else(|| part(found.as_deref()?)).unwrap_or_else(|| path.display().to_string())
}

/// The GGUF file among others in a directory.
fn gguf_among(directory: &Path, files: &[PathBuf]) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for file in files {
        if is_first_part(file) && file.is_file() && file_kind(file)? == FileKind::Gguf {
            found.push(file);
        }
    }
    match found.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some((*only).clone())),
        [first, second, ..] => {
            let detail = format!("expected one GGUF file, got {} and {}", first.display(), second.display());
            Err(Error::Checkpoint { file: directory.display().to_string(), detail })
        }
    }
}

/// Paths in a directory, in order.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let io = |error| Error::io(directory, error);
    let entries = std::fs::read_dir(directory).map_err(io)?;
    let mut paths = entries.map(|entry| Ok(entry.map_err(io)?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// What a file is by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    Gguf,
    Safetensors,
    Json,
    /// Of a large file in a repository, where the file itself was not fetched.
    LfsPointer,
    /// Of another program: what it is called.
    Other(&'static str),
    Html,
    Empty,
    Unknown,
}

/// Whether `path` is a safetensors file, by its name or by what it begins with.
pub(crate) fn is_safetensors(path: &Path) -> Result<bool> {
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors"));
    Ok(path.is_file() && (named || matches!(file_kind(path)?, FileKind::Safetensors)))
}

fn file_kind(path: &Path) -> Result<FileKind> {
    let io = |error| Error::io(path, error);
    let file = File::open(path).map_err(io)?;
    let length = ByteSource::len(&file).map_err(io)?;
    let mut bytes = [0; 64];
    let known = &mut bytes[..length.min(64) as usize];
    ByteSource::read_exact_at(&file, known, 0).map_err(io)?;
    let known = &*known;
    let text = known.strip_prefix(b"\xef\xbb\xbf").unwrap_or(known).trim_ascii_start();
    // Eight bytes of a length, then JSON.
    let header = known.first_chunk().map(|&prefix| u64::from_le_bytes(prefix));
    Ok(match known {
        [] => FileKind::Empty,
        _ if known.starts_with(&MAGIC) => FileKind::Gguf,
        _ if known.starts_with(b"version https://git-lfs") => FileKind::LfsPointer,
        _ if header.is_some_and(|header| header > 1 && header <= length - 8) && known.get(8) == Some(&b'{') => {
            FileKind::Safetensors
        }
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => FileKind::Other("PyTorch weights"),
        [0x89, b'H', b'D', b'F', ..] => FileKind::Other("HDF5 weights"),
        _ if [b"lmgg", b"fmgg", b"tjgg", b"algg"].iter().any(|magic| known.starts_with(*magic)) => {
            FileKind::Other("a GGML file from before GGUF")
        }
        _ if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) => {
            FileKind::Other("an ONNX model")
        }
        _ if text.starts_with(b"<") => FileKind::Html,
        _ if text.starts_with(b"{") || text.starts_with(b"[") => FileKind::Json,
        _ => FileKind::Unknown,
    })
}

/// Why a file is no model, and what to do.
fn refused_file(path: &Path, kind: FileKind) -> String {
    let directory = match path.parent().map(|parent| parent.display().to_string()) {
        Some(parent) if !parent.is_empty() => parent,
        _ => ".".into(),
    };
    let expected = "expected a directory or a GGUF file, which begins with `GGUF`";
    match kind {
        FileKind::Gguf => String::new(),
        FileKind::Safetensors => {
            let missing = match path.with_file_name("config.json").exists() {
                true => "",
                false => ", with a config.json, which it does not have,",
            };
            format!("{expected}, got a safetensors file: give the directory that it is in{missing} ({directory})")
        }
        FileKind::Json => format!("{expected}, got a JSON file: give the directory that it is in ({directory})"),
        FileKind::LfsPointer => {
            format!("{expected}, got a pointer of Git LFS to it: fetch the file itself with `git lfs pull`")
        }
        FileKind::Other(what) => format!("{expected}, got {what}: {OTHER_WEIGHTS}"),
        FileKind::Html => format!("{expected}, got a page of HTML or XML: the download brought something else"),
        FileKind::Empty => format!("{expected}, got an empty file"),
        FileKind::Unknown => {
            let mut begin = [0; 4];
            let read = File::open(path).and_then(|file| ByteSource::read_exact_at(&file, &mut begin, 0));
            let begin = read.map_or("fewer bytes".into(), |()| format!("`{}`", begin.escape_ascii()));
            format!("{expected}, got {begin}")
        }
    }
}

/// Why a directory without safetensors and GGUF files is no model.
enum Refused {
    /// It has one, in a place of its own.
    Snapshot(PathBuf),
    Other(String),
}

/// None where it holds nothing that is known.
fn refused_directory(path: &Path, files: &[PathBuf]) -> Result<Option<Refused>> {
    let has = |name: &str| path.join(name).exists();
    let expected = "expected config.json with model.safetensors or its index, or a GGUF file";
    let other = |detail: String| Ok(Some(Refused::Other(format!("{expected}, got {detail}"))));
    if let Some(refused) = hub_cache(path, files)? {
        return Ok(Some(refused));
    }
    if has("adapter_config.json") {
        return Ok(Some(Refused::Other(adapter(path))));
    }
    let name = |file: &PathBuf| file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let names: Vec<String> = files.iter().map(name).collect();
    let first = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    if let Some(file) = first(&[".safetensors"]) {
        return other(match has("config.json") {
            true => format!("{file} alone: name it model.safetensors, or fetch the index of all parts"),
            false => format!("{file} without a config.json: give a checkpoint in Hugging Face layout"),
        });
    }
    for (ends, what) in [
        (&[".bin", ".pt", ".pth", ".ckpt"][..], "PyTorch weights"),
        (&[".onnx"], "an ONNX model"),
        (&[".h5", ".keras"], "Keras weights"),
        (&[".msgpack"], "Flax weights"),
        (&[".npz"], "MLX or NumPy weights"),
    ] {
        if let Some(file) = first(ends) {
            return other(format!("{what} ({file}): {OTHER_WEIGHTS}"));
        }
    }
    // Its weights are missed by their name when they are opened.
    if has("config.json") {
        return Ok(None);
    }
    let below: Vec<&PathBuf> = files.iter().filter(|file| file.join("config.json").is_file()).collect();
    match below.as_slice() {
        [] => Ok(None),
        [only] => other(format!("a directory above one: give {}", only.display())),
        [first, second, ..] => {
            let which = format!("give one of them, as {} or {}", first.display(), second.display());
            other(format!("a directory above {}: {which}", below.len()))
        }
    }
}

/// A model's directory in the hub's cache, `models--org--name`, or the whole cache.
fn hub_cache(path: &Path, files: &[PathBuf]) -> Result<Option<Refused>> {
    let snapshots = path.join("snapshots");
    if snapshots.is_dir() {
        let found: Vec<PathBuf> = entries(&snapshots)?.into_iter().filter(|snapshot| snapshot.is_dir()).collect();
        let main = std::fs::read_to_string(path.join("refs").join("main")).ok();
        let main = main.map(|hash| snapshots.join(hash.trim())).filter(|snapshot| found.contains(snapshot));
        let what = "a model's directory in the hub's cache";
        return Ok(Some(match (found.as_slice(), main) {
            ([], _) => Refused::Other(format!("expected a model, got {what} without a snapshot: download it again")),
            ([only], _) => Refused::Snapshot(only.clone()),
            ([first, ..], main) => {
                let give = main.as_ref().unwrap_or(first).display();
                let detail =
                    format!("expected a model, got {what} with {} snapshots: give one, as {give}", found.len());
                Refused::Other(detail)
            }
        }));
    }
    let is_model = |file: &&PathBuf| {
        let name = file.file_name().map(|name| name.to_string_lossy());
        name.is_some_and(|name| name.starts_with("models--"))
    };
    Ok(files.iter().find(is_model).map(|model| {
        let detail = format!("expected a model, got a cache of the hub: give a model in it, as {}", model.display());
        Refused::Other(detail)
    }))
}

/// What an adapter is, and of what.
fn adapter(path: &Path) -> String {
    let config = std::fs::read_to_string(path.join("adapter_config.json")).unwrap_or_default();
    let config = super::json::parse(&config).unwrap_or_default();
    let text = |key: &str| config[key].as_str().map(str::to_owned);
    let kind = text("peft_type").unwrap_or("PEFT".into());
    let base = text("base_model_name_or_path").filter(|base| !base.is_empty());
    let base = base.map_or("its base model".to_owned(), |base| format!("its base model {base}"));
    format!("expected a whole model, got an adapter ({kind}, adapter_config.json): merge it into {base}, and give that")
}
