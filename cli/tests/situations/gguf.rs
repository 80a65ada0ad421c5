//! GGUF files with other metadata: reads a file into keys, tensors and data, and writes it again.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, version 3, little endian.

use serde::Deserialize;

/// A GGUF file whose metadata can be changed; tensors stay as they are.
pub struct File {
    /// Keys in their order, with type and value as they are stored.
    pub metadata: Vec<(String, Vec<u8>)>,
    tensors: u64,
    /// Names, shapes, types and offsets of the tensors, as they are stored.
    infos: Vec<u8>,
    data: Vec<u8>,
}

/// A value of metadata.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code)]
pub enum Typed {
    U8(u8),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Strings(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    U32s(Vec<u32>),
}

/// Where the tensors' data begin is a multiple of this, where the file does not say otherwise.
const ALIGNMENT: usize = 32;

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Typed {
    /// Type and value, as a file has them.
    pub fn encoded(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::U8(value) => put(0, &value.to_le_bytes()),
            Self::U32(value) => put(4, &value.to_le_bytes()),
            Self::I32(value) => put(5, &value.to_le_bytes()),
            Self::F32(value) => put(6, &value.to_le_bytes()),
            Self::Bool(value) => put(7, &[u8::from(*value)]),
            Self::U64(value) => put(10, &value.to_le_bytes()),
            Self::I64(value) => put(11, &value.to_le_bytes()),
            Self::F64(value) => put(12, &value.to_le_bytes()),
            Self::String(value) => {
                put(8, &[]);
                text(&mut out, value);
            }
            Self::Strings(values) => {
                put(9, &list(8, values.len()));
                values.iter().for_each(|value| text(&mut out, value));
            }
            Self::F32s(values) => put(9, &numbers(6, values.iter().map(|value| value.to_le_bytes()))),
            Self::I32s(values) => put(9, &numbers(5, values.iter().map(|value| value.to_le_bytes()))),
            Self::U32s(values) => put(9, &numbers(4, values.iter().map(|value| value.to_le_bytes()))),
        }
        out
    }
}

/// The head of a list: type and number of its values.
fn list(kind: u32, count: usize) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((count as u64).to_le_bytes());
    out
}

fn numbers(kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) -> Vec<u8> {
    let mut out = list(kind, values.len());
    out.extend(values.flatten());
    out
}

/// Bytes of a value of `kind` that begins at `at`, without the four of its type.
fn length(bytes: &[u8], at: usize, kind: u32) -> usize {
    match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        8 => 8 + long(bytes, at) as usize,
        9 => {
            let (inner, count) = (word(bytes, at), long(bytes, at + 4));
            (0..count).fold(12, |length, _| length + self::length(bytes, at + length, inner))
        }
        other => panic!("type {other}"),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl File {
    pub fn parse(bytes: &[u8]) -> Self {
        assert_eq!(&bytes[..4], b"GGUF");
        let (tensors, keys) = (long(bytes, 8), long(bytes, 16));
        let (mut at, mut metadata) = (24, Vec::new());
        for _ in 0..keys {
            let end = at + 8 + long(bytes, at) as usize;
            let key = String::from_utf8(bytes[at + 8..end].to_vec()).unwrap();
            at = end + 4 + length(bytes, end + 4, word(bytes, end));
            metadata.push((key, bytes[end..at].to_vec()));
        }
        let first = at;
        for _ in 0..tensors {
            at += 8 + long(bytes, at) as usize;
            at += 4 + 8 * word(bytes, at) as usize + 12;
        }
        let alignment = metadata.iter().find(|(key, _)| key == "general.alignment");
        let alignment = alignment.map_or(ALIGNMENT, |(_, value)| word(value, 4) as usize);
        let data = bytes[at.next_multiple_of(alignment).min(bytes.len())..].to_vec();
        Self { metadata, tensors, infos: bytes[first..at].to_vec(), data }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensors.to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            out.extend(value);
        }
        out.extend(&self.infos);
        let alignment = self.metadata.iter().find(|(key, _)| key == "general.alignment");
        let alignment = alignment.map_or(ALIGNMENT, |(_, value)| word(value, 4) as usize);
        out.resize(out.len().next_multiple_of(alignment), 0);
        out.extend(&self.data);
        out
    }
}
