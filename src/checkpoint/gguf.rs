//! GGUF files (versions 2 and 3, little-endian): their header read and checked whole, like that of a safetensors file.
//!
//! Counts and lengths are held against the bytes that are left before anything is made room for. Tensors must lie within their
//! file, where its alignment allows, and none may overlap; their dimensions, innermost first there, are turned round. A model may
//! be split over files `NAME-00001-of-00003.gguf`.
//!
//! Knows nothing of what metadata and tensors mean. Layout: the GGUF specification of ggml.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::element::ElementType;
use super::metadata::{Metadata, Value};
use super::{ByteSource, Checkpoint, DirectFile, MAX_HEADER_BYTES, NamedSource, TensorEntry};
use crate::error::{Error, Result};

pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// Bytes read at once: most headers are their tokenizer, some megabytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// List elements of all metadata: more than that is an attack, not a tokenizer.
const MAX_ELEMENTS: u64 = 1 << 24;

/// More dimensions than ggml has.
const MAX_DIMENSIONS: u32 = 4;

/// What the header of one file says.
struct Header {
    values: BTreeMap<String, Value>,
    tensors: Vec<(String, TensorEntry)>,
}

impl Checkpoint {
    /// Opens a GGUF file, or all parts of the one whose first part is at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is missing or unreadable, [`Error::Checkpoint`] for one that is no whole GGUF file or part.
    pub(crate) fn open_gguf(path: &Path) -> Result<Self> {
        let open = |path: &PathBuf| -> Result<(String, Box<dyn ByteSource>)> {
            let file = DirectFile::open(path).map_err(|error| Error::io(path, error))?;
            Ok((path.display().to_string(), Box::new(file)))
        };
        Self::from_gguf_sources(parts(path).iter().map(open).collect::<Result<_>>()?)
    }

    /// Reads the headers of named sources, the parts of one GGUF file in order.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] as [`Checkpoint::open`].
    pub(crate) fn from_gguf_sources(files: Vec<(String, Box<dyn ByteSource>)>) -> Result<Self> {
        let files: Vec<NamedSource> = files.into_iter().map(|(name, source)| (name, Arc::from(source))).collect();
        let (mut tensors, mut first) = (BTreeMap::new(), None);
        for (index, (name, source)) in files.iter().enumerate() {
            let wrong = |detail: String| Error::Checkpoint { file: name.clone(), detail };
            let header = read_header(name, source.as_ref(), index)?;
            let said = |key: &str, otherwise: i64| match header.values.get(key) {
                Some(Value::Integer(value)) => *value,
                _ => otherwise,
            };
            let got = (said("split.no", 0) + 1, said("split.count", 1).max(1));
            if got != (index as i64 + 1, files.len() as i64) {
                let (part, parts) = got;
                let expected = format!("expected part {} of {}", index + 1, files.len());
                return Err(wrong(format!(
                    "{expected}, named NAME-00001-of-00002.gguf and so on, got part {part} of {parts}"
                )));
            }
            for (tensor, entry) in header.tensors {
                if tensors.insert(tensor.clone(), entry).is_some() {
                    return Err(wrong(format!("tensor `{tensor}`: expected once, got twice")));
                }
            }
            first.get_or_insert(Metadata::new(name.clone(), header.values));
        }
        Ok(Self { files, tensors, metadata: BTreeMap::new(), gguf: first })
    }
}

/// Whether a file is not, by its name, a later part of another one.
pub(super) fn is_first_part(path: &Path) -> bool {
    parts(path).first().is_some_and(|first| first == path)
}

/// All parts of the file at `path`, by its name.
fn parts(path: &Path) -> Vec<PathBuf> {
    let split = || {
        let name = path.file_name()?.to_str()?;
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, part) = rest.rsplit_once('-')?;
        let number = |digits: &str| Some(digits).filter(|digits| digits.len() == 5)?.parse::<usize>().ok();
        number(part)?;
        let count = number(count).filter(|&count| count > 0)?;
        Some((1..=count).map(|part| path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"))).collect())
    };
    split().unwrap_or_else(|| vec![path.to_path_buf()])
}

/// Reads a header from front to back.
struct Reader<'a> {
    file: &'a str,
    source: &'a dyn ByteSource,
    length: u64,
    at: u64,
    /// Bytes of the file from `start` on.
    buffer: Vec<u8>,
    start: u64,
    /// List elements that may still come.
    elements: u64,
}

impl Reader<'_> {
    fn wrong(&self, detail: String) -> Error {
        Error::Checkpoint { file: self.file.into(), detail }
    }

    /// The next `count` bytes, of `what`.
    fn take(&mut self, count: u64, what: &str) -> Result<&[u8]> {
        let left = self.length - self.at;
        if count > left {
            let (at, length) = (self.at, self.length);
            return Err(self.wrong(format!(
                "expected {what} of {count} bytes at {at}, got a file of {length} bytes: truncated, or not a GGUF file"
            )));
        }
        let end = self.at + count;
        if end > MAX_HEADER_BYTES {
            return Err(self.wrong(format!("expected a header of at most {MAX_HEADER_BYTES} bytes, got more")));
        }
        if end > self.start + self.buffer.len() as u64 {
            self.buffer.resize(count.max(CHUNK_BYTES).min(left) as usize, 0);
            self.start = self.at;
            if let Err(error) = self.source.read_exact_at(&mut self.buffer, self.at) {
                return Err(self.wrong(format!("expected a readable file, got {error}")));
            }
        }
        let from = (self.at - self.start) as usize;
        self.at = end;
        Ok(&self.buffer[from..from + count as usize])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// How many there are of what takes at least `bytes` each.
    fn count(&mut self, what: &str, bytes: u64) -> Result<u64> {
        let count = self.u64(what)?;
        let left = self.length - self.at;
        if count > left / bytes {
            return Err(self.wrong(format!(
                "{what}: expected at most {}, as many as the {left} bytes left can hold, got {count}",
                left / bytes
            )));
        }
        Ok(count)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let length = self.count(what, 1)?;
        match std::str::from_utf8(self.take(length, what)?) {
            Ok(name) => Ok(name.into()),
            Err(error) => Err(self.wrong(format!("{what}: expected UTF-8, got {error}"))),
        }
    }

    /// Text that people wrote, which is not always UTF-8.
    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.count(what, 1)?;
        Ok(String::from_utf8_lossy(self.take(length, what)?).into_owned())
    }

    fn integer(&mut self, kind: u32, what: &str) -> Result<Option<i64>> {
        Ok(Some(match kind {
            0 => i64::from(u8::from_le_bytes(self.array(what)?)),
            1 => i64::from(i8::from_le_bytes(self.array(what)?)),
            2 => i64::from(u16::from_le_bytes(self.array(what)?)),
            3 => i64::from(i16::from_le_bytes(self.array(what)?)),
            4 => i64::from(u32::from_le_bytes(self.array(what)?)),
            5 => i64::from(i32::from_le_bytes(self.array(what)?)),
            7 => match self.array(what)? {
                [flag @ 0..=1] => i64::from(flag),
                [other] => return Err(self.wrong(format!("{what}: expected true (1) or false (0), got {other}"))),
            },
            10 => match i64::try_from(self.u64(what)?) {
                Ok(value) => value,
                Err(_) => return Err(self.wrong(format!("{what}: expected an integer below 2^63, got more"))),
            },
            11 => i64::from_le_bytes(self.array(what)?),
            _ => return Ok(None),
        }))
    }

    fn value(&mut self, kind: u32, what: &str) -> Result<Value> {
        if let Some(value) = self.integer(kind, what)? {
            return Ok(if kind == 7 { Value::Flag(value == 1) } else { Value::Integer(value) });
        }
        Ok(match kind {
            6 => {
                let value = f32::from_le_bytes(self.array(what)?);
                Value::Number(value.to_string().parse().unwrap_or(f64::from(value)))
            }
            12 => Value::Number(f64::from_le_bytes(self.array(what)?)),
            8 => Value::Text(self.text(what)?),
            9 => self.list(what)?,
            other => return Err(self.wrong(format!("{what}: expected a type of value from 0 to 12, got {other}"))),
        })
    }

    fn list(&mut self, what: &str) -> Result<Value> {
        let kind = self.u32(what)?;
        let bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            other => {
                return Err(self.wrong(format!("{what}: expected a list of numbers or texts, got one of type {other}")));
            }
        };
        let count = self.count(what, bytes)?;
        let Some(left) = self.elements.checked_sub(count) else {
            return Err(self.wrong(format!("{what}: expected lists of at most {MAX_ELEMENTS} elements, got more")));
        };
        self.elements = left;
        Ok(match kind {
            8 => Value::Texts((0..count).map(|_| self.text(what)).collect::<Result<_>>()?),
            6 => {
                let numbers = (0..count).map(|_| Ok(f64::from(f32::from_le_bytes(self.array(what)?))));
                Value::Numbers(numbers.collect::<Result<_>>()?)
            }
            12 => Value::Numbers((0..count).map(|_| Ok(f64::from_le_bytes(self.array(what)?))).collect::<Result<_>>()?),
            _ => {
                let integers = (0..count).map(|_| Ok(self.integer(kind, what)?.unwrap_or_default()));
                Value::Integers(integers.collect::<Result<_>>()?)
            }
        })
    }

    /// Name, type and shape of the next tensor; where it begins behind the header is in `offset`.
    fn tensor(&mut self, file: usize) -> Result<(String, TensorEntry)> {
        let name = self.name("name of a tensor")?;
        let what = format!("tensor `{name}`");
        let dimensions = self.u32(&what)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.wrong(format!("{what}: expected 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&what)?;
            match usize::try_from(size).ok().filter(|&size| size > 0) {
                Some(size) => shape.insert(0, size),
                None => return Err(self.wrong(format!("{what}: expected dimensions of at least 1, got {size}"))),
            }
        }
        let code = self.u32(&what)?;
        let Some(dtype) = ElementType::of_code(code) else {
            return Err(self.wrong(format!("{what}: expected a type that is known here, got type {code}")));
        };
        let (columns, rows) = shape.split_last().unwrap_or((&1, &[]));
        let rows = rows.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let Some(bytes) = rows.and_then(|rows| dtype.bytes(rows, *columns)) else {
            return Err(self.wrong(format!("{what}: expected rows of whole blocks, got {dtype:?} {shape:?}")));
        };
        let offset = self.u64(&what)?;
        Ok((name, TensorEntry { dtype, shape, bytes, source: file, offset }))
    }
}

/// Reads and checks the header of the part `index`.
fn read_header(file: &str, source: &dyn ByteSource, index: usize) -> Result<Header> {
    let wrong = |detail: String| Error::Checkpoint { file: file.into(), detail };
    let length = source.len().map_err(|error| wrong(format!("expected a readable file, got {error}")))?;
    let (buffer, start) = (Vec::new(), 0);
    let mut reader = Reader { file, source, length, at: 0, buffer, start, elements: MAX_ELEMENTS };
    let magic: [u8; 4] = reader.array("magic number")?;
    if magic != MAGIC {
        return Err(wrong(format!("expected a GGUF file, which begins with `GGUF`, got {magic:?}")));
    }
    match reader.u32("version")? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(wrong("expected a little-endian GGUF file, got a big-endian one".into()));
        }
        version => return Err(wrong(format!("expected GGUF version 2 or 3, got {version}"))),
    }
    // Of a tensor: its name's length, dimensions, one of them, type and offset; of a value: its name's length, type, a byte.
    let tensors = reader.count("number of tensors", 8 + 4 + 8 + 4 + 8)?;
    let count = reader.count("number of metadata values", 8 + 4 + 1)?;
    let mut values = BTreeMap::new();
    for _ in 0..count {
        let key = reader.name("name of a metadata value")?;
        let what = format!("metadata `{key}`");
        let kind = reader.u32(&what)?;
        let value = reader.value(kind, &what)?;
        if values.insert(key, value).is_some() {
            return Err(wrong(format!("{what}: expected once, got twice")));
        }
    }
    let mut tensors = (0..tensors).map(|_| reader.tensor(index)).collect::<Result<Vec<_>>>()?;
    let alignment = match values.get("general.alignment") {
        None => 32,
        Some(Value::Integer(alignment)) if *alignment > 0 && alignment % 8 == 0 => *alignment as u64,
        Some(_) => {
            return Err(wrong("metadata `general.alignment`: expected a multiple of 8, got another value".into()));
        }
    };
    let Some(data) = reader.at.checked_next_multiple_of(alignment) else {
        return Err(wrong(format!("metadata `general.alignment`: expected one below the file's {length} bytes")));
    };
    place(&mut tensors, data, alignment, length).map_err(wrong)?;
    Ok(Header { values, tensors })
}

/// Makes offsets behind the header into offsets in the file, which they must lie in, apart from each other.
fn place(tensors: &mut [(String, TensorEntry)], data: u64, alignment: u64, length: u64) -> Result<(), String> {
    tensors.sort_by(|a, b| (a.1.offset, &a.0).cmp(&(b.1.offset, &b.0)));
    let mut free = data;
    for (name, entry) in tensors {
        let (bytes, offset) = (entry.bytes as u64, entry.offset);
        let start = data.checked_add(offset).filter(|_| offset % alignment == 0);
        let end = start.and_then(|start| start.checked_add(bytes)).filter(|end| *end <= length);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(format!(
                "tensor `{name}`: expected {bytes} bytes within the file's {length}, at a multiple of {alignment} behind {data}, \
                 got offset {offset}"
            ));
        };
        if start < free {
            return Err(format!(
                "tensor `{name}`: expected to begin at {free} or later, got {start}, within another one"
            ));
        }
        (entry.offset, free) = (start, end);
    }
    Ok(())
}
