//! Checkpoints: which tensor lies where, read with positioned reads through one seam, [`ByteSource`].
//!
//! A [`Checkpoint`] is one or more safetensors files (a directory with `model.safetensors` or an index of shards, or bytes
//! in memory), or a [GGUF file](Checkpoint::open_gguf) with its [`Metadata`]. Opening reads headers only; a tensor's bytes are read when asked for. Nothing is mapped: a file that
//! shrinks while open gives an error, not a signal. Headers are checked whole before anything in them is trusted.
//! Files are read through [`DirectFile`]; a FIFO or a device is no file ([`open_file`]). [`tensor_bytes`] and [`write_tensors`] are the
//! other direction: [`NamedTensor`]s to one safetensors file.
//!
//! Knows nothing of tensor frameworks or models.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Metadata as SafetensorsHeader, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensorError};

pub use self::direct::{DirectFile, PAGE_BYTES};
pub use self::element::{BlockType, ElementType};
pub use self::file::{open_file, read_file, read_text, text, without_mark};
pub use self::locate::{Located, locate, name_of};
pub use self::metadata::{Metadata, Value};
use crate::error::{Error, Result};

mod direct;
mod element;
mod file;
mod gguf;
pub mod json;
mod locate;
mod metadata;

/// Bytes that can be read at a position: a file, or memory.
pub trait ByteSource: Send + Sync + Debug {
    /// Number of bytes there are.
    ///
    /// # Errors
    /// When the system cannot tell.
    fn len(&self) -> std::io::Result<u64>;

    /// True when there are none.
    ///
    /// # Errors
    /// When the system cannot tell.
    fn is_empty(&self) -> std::io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buffer` with the bytes from `offset`.
    ///
    /// # Errors
    /// [`std::io::ErrorKind::UnexpectedEof`] when there are fewer, or what the system reports.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()>;
}

impl ByteSource for File {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    #[cfg(unix)]
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
        while !buffer.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(self, buffer, offset)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => {
                    buffer = &mut buffer[read..];
                    offset += read as u64;
                }
            }
        }
        Ok(())
    }

    /// Where there are no files, as in a browser.
    #[cfg(not(any(unix, windows)))]
    fn read_exact_at(&self, _: &mut [u8], _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

impl ByteSource for &'static [u8] {
    fn len(&self) -> std::io::Result<u64> {
        Ok((**self).len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.get(start..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Element type as stored.
    pub dtype: ElementType,
    /// Shape as stored.
    pub shape: Vec<usize>,
    /// Length in bytes.
    pub bytes: usize,
    file: usize,
    offset: u64,
}

impl TensorEntry {
    /// Which of [`Checkpoint::sources`] its bytes are in.
    pub fn source(&self) -> usize {
        self.file
    }

    /// Where in that source they begin.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// A named [`ByteSource`] that can be read by several.
pub type NamedSource = (String, Arc<dyn ByteSource>);

/// The tensors of a model and where their bytes are.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<NamedSource>,
    tensors: BTreeMap<String, TensorEntry>,
    metadata: BTreeMap<String, String>,
    gguf: Option<Metadata>,
}

/// What a directory of safetensors files holds: the only one, or the index of shards.
const SAFETENSORS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// A header longer than this is an attack, not a model (safetensors' own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, in `path`, or the one GGUF file that is
    /// there where neither is; or the GGUF file that `path` is.
    ///
    /// # Errors
    /// [`Error::Io`] when a file is missing or unreadable, [`Error::Checkpoint`] when it is not what it says: naming the file,
    /// the tensor, what was expected and what came.
    pub fn open(path: &Path) -> Result<Self> {
        let directory = match locate(path)? {
            Located::Gguf(file) => return Self::open_gguf(&file),
            Located::Directory(directory) => directory,
        };
        let [single, index] = SAFETENSORS.map(|name| directory.join(name));
        if single.exists() || !index.exists() {
            return Self::open_files(&[single]);
        }
        let text = read_text(&index)?;
        let name = index.display().to_string();
        let wrong = |detail: String| Error::Checkpoint { file: name.clone(), detail };
        let parsed: serde_json::Value =
            json::parse(&text).map_err(|error| wrong(format!("expected JSON, got {error}")))?;
        let map = parsed.get("weight_map").and_then(serde_json::Value::as_object);
        let map = map.ok_or_else(|| wrong("expected an object `weight_map`, got none".into()))?;
        if map.is_empty() {
            return Err(wrong("expected tensors in `weight_map`, got none".into()));
        }
        let (mut shards, mut places) = (BTreeSet::new(), HashMap::new());
        for (tensor, shard) in map {
            let shard = shard.as_str().filter(|shard| !shard.contains(['/', '\\']));
            let shard = shard
                .ok_or_else(|| wrong(format!("tensor `{tensor}`: expected a file name, got {:?}", map[tensor])))?;
            let path = directory.join(shard);
            places.insert(tensor.as_str(), path.display().to_string());
            shards.insert(path);
        }
        let paths: Vec<_> = shards.into_iter().collect();
        let checkpoint = Self::from_indexed(files(&paths)?, |tensor| places.get(tensor).map(String::as_str))?;
        for (tensor, shard) in map {
            let entry = checkpoint.tensors.get(tensor);
            if entry.is_none_or(|entry| checkpoint.files[entry.file].0 != places[tensor.as_str()]) {
                let shard = shard.as_str().unwrap_or_default();
                return Err(wrong(format!("tensor `{tensor}`: expected in {shard}, got none")));
            }
        }
        Ok(checkpoint)
    }

    /// Opens safetensors files by path.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_files(paths: &[impl AsRef<Path>]) -> Result<Self> {
        Self::from_sources(files(paths)?)
    }

    /// Reads the headers of named sources.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a header that is not one, a tensor outside the file, a tensor in two files.
    pub fn from_sources(files: Vec<(String, Box<dyn ByteSource>)>) -> Result<Self> {
        Self::from_indexed(files, |_| None)
    }

    /// The same where an index may say which file a tensor is in that is in two.
    fn from_indexed<'a>(
        files: Vec<(String, Box<dyn ByteSource>)>,
        place: impl Fn(&str) -> Option<&'a str>,
    ) -> Result<Self> {
        let files: Vec<NamedSource> = files.into_iter().map(|(name, source)| (name, source.into())).collect();
        let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        for (index, (name, source)) in files.iter().enumerate() {
            let (header, data_start) = read_header(name, source.as_ref())?;
            metadata.extend(header.metadata().clone().unwrap_or_default());
            for (tensor, info) in header.tensors() {
                let (start, end) = info.data_offsets;
                let entry = TensorEntry {
                    dtype: info.dtype.into(),
                    shape: info.shape.clone(),
                    bytes: end - start,
                    file: index,
                    offset: data_start + start as u64,
                };
                let place = place(&tensor);
                match (tensors.entry(tensor), place) {
                    (Entry::Vacant(vacant), _) => drop(vacant.insert(entry)),
                    (Entry::Occupied(mut taken), Some(place)) if place == name => drop(taken.insert(entry)),
                    (Entry::Occupied(taken), Some(place)) if place == files[taken.get().file].0 => {}
                    (Entry::Occupied(taken), _) => {
                        let detail = format!("tensor `{}`: expected in one file, got in two", taken.key());
                        return Err(Error::Checkpoint { file: name.clone(), detail });
                    }
                }
            }
        }
        Ok(Self { files, tensors, metadata, gguf: None })
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// The files, or what stands for them.
    pub fn sources(&self) -> &[NamedSource] {
        &self.files
    }

    /// The metadata of a GGUF file; `None` where the tensors are in safetensors files.
    pub fn gguf(&self) -> Option<&Metadata> {
        self.gguf.as_ref()
    }

    /// Free-form metadata of safetensors files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The entry of a tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is none.
    pub fn entry(&self, tensor: &str) -> Result<&TensorEntry> {
        self.tensors.get(tensor).ok_or_else(|| Error::Checkpoint {
            file: match self.files.as_slice() {
                [] => "no file".into(),
                [(only, _)] => only.clone(),
                [(first, _), others @ ..] => format!("{first} and {} more", others.len()),
            },
            detail: format!("tensor `{tensor}`: expected in the checkpoint, got none"),
        })
    }

    /// The file a tensor is in.
    pub fn file_of(&self, entry: &TensorEntry) -> &str {
        &self.files[entry.file].0
    }

    /// Reads the bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is no such tensor or the read fails or comes back short.
    pub fn read(&self, tensor: &str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.entry(tensor)?.bytes];
        self.read_into(tensor, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads the bytes of a tensor into memory that is there.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; [`Error::Shape`] for memory of another length.
    pub fn read_into(&self, tensor: &str, bytes: &mut [u8]) -> Result<()> {
        let entry = self.entry(tensor)?;
        if bytes.len() != entry.bytes {
            return Err(Error::shape(format!("memory for tensor `{tensor}`"), entry.bytes, bytes.len()));
        }
        let (file, source) = &self.files[entry.file];
        source.read_exact_at(bytes, entry.offset).map_err(|error| Error::Checkpoint {
            file: file.clone(),
            detail: format!("tensor `{tensor}`: expected {} bytes at {}, got {error}", entry.bytes, entry.offset),
        })
    }
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

impl NamedTensor {
    /// From `f32` values.
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes }
    }

    /// From `i32` values.
    pub fn i32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::I32, shape: shape.into(), bytes }
    }

    /// From `u32` values.
    pub fn u32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[u32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::U32, shape: shape.into(), bytes }
    }
}

/// The bytes of a safetensors file of tensors and free-form metadata.
///
/// # Errors
/// [`Error::Checkpoint`] for a tensor whose bytes do not fill its shape.
pub fn tensor_bytes(tensors: &[NamedTensor], metadata: Option<HashMap<String, String>>) -> Result<Vec<u8>> {
    let wrong = |name: &str, error: SafeTensorError| Error::Checkpoint {
        file: "tensors to be written".into(),
        detail: format!("tensor `{name}`: {error}"),
    };
    let mut views = Vec::with_capacity(tensors.len());
    for NamedTensor { name, dtype, shape, bytes } in tensors {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| wrong(name, error))?;
        views.push((name.as_str(), view));
    }
    safetensors::serialize(views, metadata).map_err(|error| wrong("*", error))
}

/// Writes tensors and free-form metadata to a safetensors file, over whatever `path` is.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written, which may then be there in part; as [`tensor_bytes`].
pub fn write_tensors(path: &Path, tensors: &[NamedTensor], metadata: Option<HashMap<String, String>>) -> Result<()> {
    // Not `serialize_to_file`, which renames a temporary file of mode 0600 over whatever `path` is, `/dev/null` included.
    std::fs::write(path, tensor_bytes(tensors, metadata)?).map_err(|reason| Error::io(path, reason))
}

/// The files at `paths`, to be read by position.
fn files(paths: &[impl AsRef<Path>]) -> Result<Vec<(String, Box<dyn ByteSource>)>> {
    let open = |path: &Path| -> Result<(String, Box<dyn ByteSource>)> {
        let file = DirectFile::open(path).map_err(|error| Error::io(path, error))?;
        Ok((path.display().to_string(), Box::new(file)))
    };
    paths.iter().map(|path| open(path.as_ref())).collect()
}

/// Reads and checks the header of a safetensors file; returns it and where the data begin.
fn read_header(name: &str, source: &dyn ByteSource) -> Result<(SafetensorsHeader, u64)> {
    let wrong = |detail: String| Error::Checkpoint { file: name.into(), detail };
    let io = |error: std::io::Error| wrong(format!("expected a readable file, got {error}"));
    let length = source.len().map_err(io)?;
    let mut prefix = [0; 8];
    if length < 8 {
        return Err(wrong(format!("expected a safetensors header of at least 8 bytes, got {length} bytes")));
    }
    source.read_exact_at(&mut prefix, 0).map_err(io)?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > MAX_HEADER_BYTES || header_length > length - 8 {
        let got = match &prefix {
            b"version " => "a pointer of Git LFS, without what `git lfs pull` fetches".to_owned(),
            _ => format!("a header length of {header_length}"),
        };
        return Err(wrong(format!(
            "expected a safetensors header within the file's {length} bytes, got {got}: truncated, or not a safetensors file"
        )));
    }
    let mut header = vec![0; header_length as usize];
    source.read_exact_at(&mut header, 8).map_err(io)?;
    // Deserialising checks that tensors neither overlap nor leave gaps and that shape and dtype give their length, but does not
    // always say which tensor is at fault.
    let metadata: SafetensorsHeader = serde_json::from_slice(&header).map_err(|error| {
        wrong(misplaced(&header).unwrap_or_else(|| format!("expected a safetensors header, got {error}")))
    })?;
    let end = end_of_tensors(metadata.tensors().into_iter()).map_err(wrong)?;
    let data_start = 8 + header_length;
    if data_start + end as u64 != length {
        return Err(wrong(format!("expected {} bytes as the header says, got {length}", data_start + end as u64)));
    }
    Ok((metadata, data_start))
}

/// What is wrong with the first tensor of a refused header that does not lie as it should, if that is what is wrong.
fn misplaced(header: &[u8]) -> Option<String> {
    let mut header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    header.remove("__metadata__");
    let info = |(name, value)| Some((name, serde_json::from_value::<TensorInfo>(value).ok()?));
    let tensors: Vec<_> = header.into_iter().map(info).collect::<Option<_>>()?;
    end_of_tensors(tensors.iter().map(|(name, info)| (name.clone(), info))).err()
}

/// Where the data end that begin at 0 and that tensors fill one after another, each as long as its shape and dtype say.
fn end_of_tensors<'a>(tensors: impl Iterator<Item = (String, &'a TensorInfo)>) -> Result<usize, String> {
    let mut spans: Vec<_> = tensors.map(|(name, info)| (info.data_offsets, name, info)).collect();
    spans.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    let mut end = 0;
    for ((start, stop), tensor, info) in spans {
        let elements = info.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let bytes =
            elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize())).map(|bits| bits.div_ceil(8));
        if start != end || stop < start || bytes != Some(stop - start) {
            return Err(format!(
                "tensor `{tensor}`: expected {:?} {:?} to fill the bytes from {end}, got the span {start}..{stop}",
                info.dtype, info.shape
            ));
        }
        end = stop;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend((0..data).map(|byte| byte as u8));
        bytes
    }

    fn open(bytes: Vec<u8>) -> Result<Checkpoint, String> {
        let bytes: &'static [u8] = bytes.leak();
        Checkpoint::from_sources(vec![("m.safetensors".into(), Box::new(bytes))]).map_err(|error| error.to_string())
    }

    fn both(second: &str) -> String {
        let rest = r#"{"dtype":"F32","shape":[2],"data_offsets":[8,16]}"#;
        format!(r#"{},"{second}":{rest}}}"#, ONE.trim_end_matches('}').to_owned() + "}")
    }

    const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn a_sound_file_reads_back() {
        let checkpoint = open(file(ONE, 8)).unwrap();
        assert_eq!(checkpoint.entry("a").unwrap().shape, [2]);
        assert_eq!(checkpoint.read("a").unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
        let missing = checkpoint.read("b").unwrap_err().to_string();
        assert_eq!(missing, "m.safetensors: tensor `b`: expected in the checkpoint, got none");
    }

    #[test]
    fn every_attack_on_the_header_is_refused() {
        let cases = [
            (vec![], "at least 8 bytes"),
            (b"GGUF".to_vec(), "at least 8 bytes"),
            (b"\x80\x02}q\x00(X\x05\x00\x00\x00state".to_vec(), "not a safetensors file"),
            (file(ONE, 7), "expected 70 bytes as the header says, got 69"),
            (file(ONE, 9), "expected 70 bytes as the header says, got 71"),
            (file("{", 0), "expected a safetensors header"),
            (file(r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#, 8), "expected a safetensors header"),
            (file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8), "tensor"),
            (file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, 12), "tensor"),
            (file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8), "tensor"),
            (
                file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,800]}}"#, 8),
                "tensor `a`: expected F32 [2] to fill the bytes from 0, got the span 0..800",
            ),
            (file(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0), "tensor"),
            (
                file(
                    r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                    12,
                ),
                "tensor",
            ),
        ];
        for (bytes, expected) in cases {
            let shown = String::from_utf8_lossy(&bytes).into_owned();
            let error = open(bytes).expect_err(&shown);
            assert!(error.starts_with("m.safetensors: ") && error.contains(expected), "{shown}: {error}");
        }
    }

    #[test]
    fn tensors_are_written_and_what_cannot_be_is_an_error_with_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.safetensors");
        let tensors = [NamedTensor::f32("a", [1, 2], &[1.0, -2.0]), NamedTensor::i32("b", [1], &[-1])];
        write_tensors(&path, &tensors, None).unwrap();
        let file = Checkpoint::open_files(&[&path]).unwrap();
        for tensor in &tensors {
            let entry = file.entry(&tensor.name).unwrap();
            assert_eq!((entry.dtype, &entry.shape), (tensor.dtype.into(), &tensor.shape));
            assert_eq!(file.read(&tensor.name).unwrap(), tensor.bytes);
        }
        let nowhere = directory.path().join("no").join("t.safetensors");
        let error = write_tensors(&nowhere, &tensors, None).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == nowhere), "{error}");
        let short = write_tensors(&path, &[NamedTensor::u32("c", [2], &[1])], None).unwrap_err();
        assert!(matches!(short, Error::Checkpoint { .. }), "{short}");
    }

    #[test]
    fn a_file_that_shrinks_while_open_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        std::fs::write(&path, file(ONE, 8)).unwrap();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(40).unwrap();
        assert!(checkpoint.read("a").unwrap_err().to_string().contains("tensor `a`: expected 8 bytes at 62"));
    }

    #[test]
    fn shards_missing_from_the_index_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
        let index = |map: &str| write("model.safetensors.index.json", format!(r#"{{"weight_map":{map}}}"#).as_bytes());
        let error = || Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(error().contains("model.safetensors: "));
        index(r#"{"a":"one.safetensors","b":"two.safetensors"}"#);
        write("one.safetensors", &file(ONE, 8));
        assert!(error().contains("two.safetensors"));
        write("two.safetensors", &file(r#"{"c":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8));
        assert!(error().contains("tensor `b`: expected in two.safetensors, got none"));
        write("two.safetensors", &file(ONE, 8));
        assert!(error().contains("tensor `b`: expected in two.safetensors, got none"));
        // In both, and the index does not say in which.
        index(r#"{"b":"one.safetensors","c":"two.safetensors"}"#);
        assert!(error().contains("tensor `a`: expected in one file, got in two"));
        for place in ["one.safetensors", "two.safetensors"] {
            write("one.safetensors", &file(&both("b"), 16));
            write("two.safetensors", &file(&both("c"), 16));
            index(&format!(r#"{{"a":"{place}","b":"one.safetensors","c":"two.safetensors"}}"#));
            let checkpoint = Checkpoint::open(directory.path()).unwrap();
            assert!(checkpoint.file_of(checkpoint.entry("a").unwrap()).ends_with(place));
            assert_eq!(checkpoint.tensors().len(), 3);
        }
        index(r#"{"a":"../one.safetensors"}"#);
        assert!(error().contains("expected a file name"));
    }
}
