//! Safetensors files: a directory with one or with an index of shards; headers read and checked whole.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use safetensors::tensor::{Metadata as SafetensorsHeader, TensorInfo};

use super::gguf::MAGIC;
use super::{ByteSource, Checkpoint, DirectFile, MAX_HEADER_BYTES, NamedSource, TensorEntry, json, read_text};
use crate::error::{Error, Result};

/// What a directory of safetensors files holds: the only one, or the index of shards.
pub(super) const SAFETENSORS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

impl Checkpoint {
    /// Opens what a directory holds, whichever of the two it is.
    pub(super) fn open_directory(directory: &Path) -> Result<Self> {
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
            if entry.is_none_or(|entry| checkpoint.files[entry.source].0 != places[tensor.as_str()]) {
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
    pub(crate) fn open_files(paths: &[impl AsRef<Path>]) -> Result<Self> {
        Self::from_indexed(files(paths)?, |_| None)
    }

    /// Reads the headers of named sources: safetensors files, or the parts of one GGUF file in order, which begins with its name.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a header that is not one, a tensor outside the file, a tensor in two files, parts of several files.
    pub fn from_sources(files: Vec<(String, Box<dyn ByteSource>)>) -> Result<Self> {
        let mut start = [0; MAGIC.len()];
        // A source that cannot be read says so where its header is.
        let is_gguf =
            files.first().is_some_and(|(_, file)| file.read_exact_at(&mut start, 0).is_ok() && start == MAGIC);
        if is_gguf { Self::from_gguf_sources(files) } else { Self::from_indexed(files, |_| None) }
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
                    source: index,
                    offset: data_start + start as u64,
                };
                let place = place(&tensor);
                match (tensors.entry(tensor), place) {
                    (Entry::Vacant(vacant), _) => drop(vacant.insert(entry)),
                    (Entry::Occupied(mut taken), Some(place)) if place == name => drop(taken.insert(entry)),
                    (Entry::Occupied(taken), Some(place)) if place == files[taken.get().source].0 => {}
                    (Entry::Occupied(taken), _) => {
                        let detail = format!("tensor `{}`: expected in one file, got in two", taken.key());
                        return Err(Error::Checkpoint { file: name.clone(), detail });
                    }
                }
            }
        }
        Ok(Self { files, tensors, metadata, gguf: None })
    }
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
    use std::fs::File;

    use super::*;
    use crate::checkpoint::{NamedTensor, tensor_bytes};

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
            (b"GGUF".to_vec(), "not a GGUF file"),
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
    fn tensors_are_written_and_what_cannot_be_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.safetensors");
        let tensors = [NamedTensor::f32("a", [1, 2], &[1.0, -2.0]), NamedTensor::f32("b", [1], &[-1.0])];
        std::fs::write(&path, tensor_bytes(&tensors, None).unwrap()).unwrap();
        let file = Checkpoint::open_files(&[&path]).unwrap();
        for tensor in &tensors {
            let entry = file.entry(&tensor.name).unwrap();
            assert_eq!((entry.dtype, &entry.shape), (tensor.dtype.into(), &tensor.shape));
            assert_eq!(file.read(&tensor.name).unwrap(), tensor.bytes);
        }
        let short = NamedTensor { shape: vec![2], ..NamedTensor::f32("c", [1], &[1.0]) };
        let short = tensor_bytes(&[short], None).unwrap_err();
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
