//! Checkpoints: which tensor lies where, read with positioned reads through one seam, [`ByteSource`].
//!
//! A [`Checkpoint`] is one or more safetensors files (a directory with `model.safetensors` or an index of shards, or bytes
//! in memory), or a GGUF file with its [`Metadata`]. Opening reads headers only, and checks them whole before
//! anything in them is trusted; a tensor's bytes are read when asked for. Nothing is mapped: a file that shrinks while open gives an
//! error, not a signal. Files are read past the page cache where that can be; a FIFO or a device is no file. [`tensor_bytes`] is the
//! other direction: [`NamedTensor`]s to one safetensors file.
//!
//! Knows nothing of tensor frameworks or models.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub(crate) use self::direct::{DirectFile, PAGE_BYTES};
pub(crate) use self::file::{open_file, read_file, read_text};
pub(crate) use self::locate::{Located, is_safetensors, locate, name_of};
pub use self::{
    element::{BlockType, ElementType},
    file::text,
    json::parse as parse_json,
    metadata::Metadata,
    write::{NamedTensor, tensor_bytes},
};
use crate::error::{Error, Result};

mod direct;
mod element;
mod file;
mod gguf;
pub(crate) mod json;
mod locate;
pub(crate) mod metadata;
mod safetensors;
mod write;

/// Bytes that can be read at a position: a file, or memory.
#[allow(clippy::len_without_is_empty, reason = "a length that has to be asked of the system")]
pub trait ByteSource: Send + Sync + Debug {
    /// Number of bytes there are.
    ///
    /// # Errors
    /// When the system cannot tell.
    fn len(&self) -> std::io::Result<u64>;

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
    /// Which of [`Checkpoint::sources`] its bytes are in.
    pub source: usize,
    /// Where in that source they begin.
    pub offset: u64,
}

impl TensorEntry {
    /// Which bytes are those of a row, and the row's shape; the first dimension counts rows.
    pub(crate) fn row(&self, row: usize) -> Option<(Range<usize>, &[usize])> {
        let (&rows, shape) = self.shape.split_first()?;
        let bytes = self.bytes.checked_div(rows)?;
        (row < rows).then_some((row * bytes..(row + 1) * bytes, shape))
    }
}

/// A named [`ByteSource`] that can be read by several.
pub(crate) type NamedSource = (String, Arc<dyn ByteSource>);

/// The tensors of a model and where their bytes are.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<NamedSource>,
    tensors: BTreeMap<String, TensorEntry>,
    metadata: BTreeMap<String, String>,
    gguf: Option<Metadata>,
}

/// A header longer than this is an attack, not a model (safetensors' own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, in `path`, or the one GGUF file that is
    /// there where neither is; or the safetensors or GGUF file that `path` is.
    ///
    /// # Errors
    /// [`Error::Io`] when a file is missing or unreadable, [`Error::Checkpoint`] when it is not what it says: naming the file,
    /// the tensor, what was expected and what came.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if is_safetensors(path)? {
            return Self::open_files(&[path]);
        }
        let directory = match locate(path)? {
            Located::Gguf(file) => return Self::open_gguf(&file),
            Located::Directory(directory) => directory,
        };
        Self::open_directory(&directory)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// The files, or what stands for them.
    pub fn sources(&self) -> &[(String, Arc<dyn ByteSource>)] {
        &self.files
    }

    /// The metadata of a GGUF file; `None` where the tensors are in safetensors files.
    pub fn gguf(&self) -> Option<&Metadata> {
        self.gguf.as_ref()
    }

    /// Free-form metadata of safetensors files.
    pub(crate) fn metadata(&self) -> &BTreeMap<String, String> {
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
    pub(crate) fn file_of(&self, entry: &TensorEntry) -> &str {
        &self.files[entry.source].0
    }

    /// Reads the bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is no such tensor or the read fails or comes back short.
    pub fn read(&self, tensor: &str) -> Result<Vec<u8>> {
        let entry = self.entry(tensor)?;
        let mut bytes = vec![0; entry.bytes];
        self.read_part(entry, tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads some of a tensor's bytes, from byte `start` on; `name` is what an error calls it.
    pub(crate) fn read_part(&self, entry: &TensorEntry, name: &str, start: usize, bytes: &mut [u8]) -> Result<()> {
        let (offset, count) = (entry.offset + start as u64, bytes.len());
        self.files[entry.source]
            .1
            .read_exact_at(bytes, offset)
            .map_err(|error| self.wrong(entry, name, format!("expected {count} bytes at {offset}, got {error}")))
    }

    /// What is wrong with a tensor.
    pub(crate) fn wrong(&self, entry: &TensorEntry, name: &str, detail: String) -> Error {
        Error::Checkpoint { file: self.file_of(entry).into(), detail: format!("tensor `{name}`: {detail}") }
    }
}
