//! What is in a model's files, whichever their format: its configuration, and where each tensor and each expert lies.
//!
//! ```
//! use phase_moe::Weights;
//!
//! let weights = Weights::open("models/tiny-moe".as_ref())?;
//! let spec = weights.spec()?;
//! let store = weights.expert_store()?;
//! println!("{} experts a layer, at most {} bytes each", spec.moe.experts, store.slab_bytes(0));
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! `experts` says where an expert lies, `gguf` how a GGUF file says what Hugging Face's files say; files of another format would have
//! another file there. Nothing but headers and small files is read, but where `floats` is asked for numbers. Knows nothing of a tensor framework.

mod check;
pub(crate) mod experts;
mod floats;
mod gguf;

use std::hash::Hasher;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use self::experts::Slice;
use self::gguf::names::TensorNames;
pub(crate) use self::gguf::names::TensorSource;
use twox_hash::XxHash3_64;

use crate::checkpoint::{Checkpoint, Located, Metadata, locate, name_of, read_file, text};
use crate::error::{Error, Result};
use crate::offload::store::{ExpertStore, Piece};
use crate::spec::{ModelSpec, MoeSpec};
use crate::zoo;

/// The files of a model, opened: nothing of its weights is in memory.
#[derive(Clone, Debug)]
pub struct Weights {
    name: String,
    config: String,
    checkpoint: Arc<Checkpoint>,
    directory: Option<PathBuf>,
    /// What stands for files where there is no directory.
    embedded: Vec<(String, Vec<u8>)>,
    spec: OnceLock<ModelSpec>,
}

/// What the experts of a model take, as they are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertSizes {
    /// Bytes of the first expert of the first layer.
    pub first: u64,
    /// Bytes of all.
    pub all: u64,
    /// Types of their weights, in the order of their first use.
    pub dtypes: Vec<String>,
}

impl Weights {
    /// Opens the files in the directory `path`, in Hugging Face layout, or the GGUF file that `path` is or holds.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is missing or unreadable, [`Error::Checkpoint`] as [`Checkpoint::open`], [`Error::Config`] for weights
    /// that are quantised in a way that is not read; of a GGUF file as
    /// [`Weights::from_gguf`].
    pub fn open(path: &Path) -> Result<Self> {
        let directory = match locate(path)? {
            Located::Directory(directory) => directory,
            Located::Gguf(file) => {
                let name = name_of(path);
                let weights = Self::from_gguf(name.trim_end_matches(".gguf"), Checkpoint::open_gguf(&file)?)?;
                return Ok(Self { directory: file.parent().map(Path::to_owned), ..weights });
            }
        };
        let config = text(read_file(&directory.join("config.json"))?)
            .map_err(|error| Error::Config { file: "config.json".into(), detail: error.to_string() })?;
        zoo::quantization::check(&config, "config.json")?;
        let weights = Self::from_parts(name_of(&directory), config, Checkpoint::open(&directory)?);
        Ok(Self { directory: Some(directory), ..weights })
    }

    /// A model that is in no directory: what it is called, its `config.json` and its tensors.
    pub fn from_parts(name: impl Into<String>, config: impl Into<String>, checkpoint: Checkpoint) -> Self {
        Self {
            name: name.into(),
            config: config.into(),
            checkpoint: Arc::new(checkpoint),
            directory: None,
            embedded: Vec::new(),
            spec: OnceLock::new(),
        }
    }

    /// A GGUF file, whose metadata are its configuration.
    ///
    /// # Errors
    /// [`Error::UnknownName`] for an architecture that is not known, [`Error::Config`] for metadata that are missing, of another type, or
    /// of a model without experts; [`Error::Checkpoint`] where there are no embeddings, or where it is no GGUF file.
    pub fn from_gguf(name: impl Into<String>, checkpoint: Checkpoint) -> Result<Self> {
        Ok(Self::from_parts(name, gguf::config(&checkpoint)?, checkpoint))
    }

    /// The same with the bytes of a file that stands beside the others, for [`Weights::beside`].
    pub fn with_file(mut self, name: impl Into<String>, bytes: Vec<u8>) -> Self {
        self.embedded.push((name.into(), bytes));
        self
    }

    /// What to call the model: the directory's or the file's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `config.json`, or what stands for it in a GGUF file.
    #[cfg(test)]
    pub(crate) fn config(&self) -> &str {
        &self.config
    }

    /// The tensors as they are stored.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Where further files are; `None` where there are none.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// The text of a file beside the others, if there is one: `generation_config.json`, `tokenizer_config.json`, `chat_template.jinja`.
    ///
    /// # Errors
    /// [`Error::Io`] for an unreadable file, or one that is no UTF-8 text.
    pub fn beside(&self, file: &str) -> Result<Option<String>> {
        let Some(bytes) = self.bytes_beside(file)? else { return Ok(None) };
        text(bytes).map(Some).map_err(|error| Error::io(self.path(file), error))
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.as_ref().map_or(file.into(), |directory| directory.join(file))
    }

    fn bytes_beside(&self, file: &str) -> Result<Option<Vec<u8>>> {
        if let Some((_, bytes)) = self.embedded.iter().find(|(name, _)| name == file) {
            return Ok(Some(bytes.clone()));
        }
        if self.directory.is_none() {
            return Ok(None);
        }
        match read_file(&self.path(file)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::Io { reason, .. }) if reason.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The text of `tokenizer.json`, or of what stands for it in a GGUF file without one beside it.
    ///
    /// # Errors
    /// [`Error::Io`] for none or an unreadable one, [`Error::Tokenizer`] for one that is no text or, in a GGUF file, not known.
    pub fn tokenizer_json(&self) -> Result<String> {
        Ok(self.tokenizer()?.0)
    }

    /// The same, and the file that it is in.
    pub(crate) fn tokenizer(&self) -> Result<(String, String)> {
        const FILE: &str = "tokenizer.json";
        match (self.bytes_beside(FILE)?, self.checkpoint.gguf()) {
            (Some(bytes), _) => {
                let file = self.path(FILE).display().to_string();
                let json = text(bytes).map_err(|error| Error::Tokenizer(format!("{file}: {error}")))?;
                Ok((json, file))
            }
            (None, Some(metadata)) => Ok((gguf::tokenizer::tokenizer_json(metadata)?, metadata.file().to_owned())),
            (None, None) => {
                Err(Error::io(FILE, std::io::Error::new(ErrorKind::NotFound, "expected beside config.json, got none")))
            }
        }
    }

    /// The tokens before a text and after it where a GGUF file says whether its beginning has one.
    #[cfg(feature = "model")]
    pub(crate) fn said_around(&self) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
        self.checkpoint.gguf().map_or(Ok(None), gguf::tokenizer::said_around)
    }

    /// What the configuration says; that the checkpoint has its blocks and no other experts is checked with it, once.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::UnknownName`] for a family there is no file for, [`Error::Checkpoint`] for a block that is not there,
    /// for experts that the configuration does not have, one by one beside stacked ones, or in stacks of other shapes.
    pub fn spec(&self) -> Result<&ModelSpec> {
        if let Some(spec) = self.spec.get() {
            return Ok(spec);
        }
        let file = self.checkpoint.gguf().map_or("config.json", Metadata::file);
        let in_words_of_file = |error: Error| match self.checkpoint.gguf() {
            Some(metadata) => gguf::keys::in_words_of_file(error, metadata),
            None => error,
        };
        let mut spec = zoo::parse_config(&self.config, file).map_err(in_words_of_file)?;
        // Output weights that are there are the model's, whatever the configuration says: so transformers has it.
        spec.tied_embeddings &= !self.checkpoint.tensors().contains_key("lm_head.weight");
        self.check_blocks(&spec)?;
        self.check_experts(&spec)?;
        Ok(self.spec.get_or_init(|| spec))
    }

    /// Where the tensor is that transformers calls `name`, and what was done to it on its way into the file.
    ///
    /// # Errors
    /// [`Error::UnknownName`] and [`Error::Config`] for a GGUF file of another architecture than those that are known.
    pub(crate) fn source(&self, name: &str) -> Result<TensorSource> {
        source(&self.checkpoint, name)
    }

    /// The pieces of expert `id` of MoE layer `layer`, in the files of the checkpoint.
    ///
    /// # Errors
    /// As [`Weights::spec`]; [`Error::ExpertOutOfRange`] for an expert that is not there, [`Error::Checkpoint`] for a tensor that is not,
    /// or that has another shape or another type than [`Dtype`](crate::experts::matrix::Dtype) has.
    #[cfg(test)]
    pub(crate) fn pieces(&self, layer: usize, id: usize) -> Result<Vec<Piece>> {
        let spec = self.spec()?;
        let block = spec.moe_blocks().nth(layer).filter(|_| id < spec.moe.experts);
        let block = block.ok_or_else(|| no_expert(spec, layer, id))?;
        self.slices(spec, block, id)?.iter().map(|slice| slice.piece(&self.checkpoint)).collect()
    }

    /// A number that another model's files hardly have: of the configuration, of every tensor's name, type and shape, and of the first bytes of
    /// some. Processes that run one model together compare it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that cannot be read.
    pub fn digest(&self) -> Result<u64> {
        const SAMPLES: usize = 64;
        const BYTES: usize = 4096;
        let tensors = self.checkpoint.tensors();
        let mut hash = XxHash3_64::new();
        hash.write(self.config.as_bytes());
        for (at, (name, entry)) in tensors.iter().enumerate() {
            hash.write(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape).as_bytes());
            if at % tensors.len().div_ceil(SAMPLES) == 0 {
                let mut bytes = vec![0; entry.bytes.min(BYTES)];
                self.checkpoint.read_part(entry, name, 0, &mut bytes)?;
                hash.write(&bytes);
            }
        }
        Ok(hash.finish())
    }

    /// All experts as a store to load them from.
    ///
    /// # Errors
    /// As [`Weights::spec`]; [`Error::ExpertOutOfRange`] for an expert that is not there, [`Error::Checkpoint`] for a tensor that is not,
    /// or that has another shape or another type than [`Dtype`](crate::experts::matrix::Dtype) has.
    pub fn expert_store(&self) -> Result<ExpertStore> {
        let spec = self.spec()?;
        let expert = |block, id| -> Result<Vec<Piece>> {
            self.slices(spec, block, id)?.iter().map(|slice| slice.piece(&self.checkpoint)).collect()
        };
        let layer = |block| (0..spec.moe.experts).map(|id| expert(block, id)).collect();
        ExpertStore::new(self.checkpoint.sources().to_vec(), spec.moe_blocks().map(layer).collect::<Result<_>>()?)
    }

    /// Counts what the experts take, every one that the configuration names being there in the shape it says.
    ///
    /// # Errors
    /// As [`Weights::expert_store`], but not for block types of a GGUF file that nothing here reads.
    pub fn expert_sizes(&self) -> Result<ExpertSizes> {
        let (spec, mut sizes) = (self.spec()?, ExpertSizes::default());
        for (index, (block, id)) in
            spec.moe_blocks().flat_map(|block| (0..spec.moe.experts).map(move |id| (block, id))).enumerate()
        {
            for slice in self.slices(spec, block, id)? {
                let (dtype, bytes) = slice.size(&self.checkpoint)?;
                sizes.all += bytes as u64;
                sizes.first += if index == 0 { bytes as u64 } else { 0 };
                if !sizes.dtypes.contains(&dtype) {
                    sizes.dtypes.push(dtype);
                }
            }
        }
        Ok(sizes)
    }

    /// Bytes of tensors that no forward pass reads: those for seeing pictures, and for guessing further tokens.
    ///
    /// # Errors
    /// As [`Weights::spec`].
    pub fn unread_bytes(&self) -> Result<u64> {
        let spec = self.spec()?;
        let layers = match self.checkpoint.gguf() {
            Some(_) => "blk.".to_owned(),
            None => format!("{}.layers.", spec.names.root),
        };
        let is_extra = |name: &str| {
            let block = name.strip_prefix(&layers).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            block.is_some_and(|block| block >= spec.layers) || UNREAD.iter().any(|start| name.starts_with(start))
        };
        let tensors = self.checkpoint.tensors().iter().filter(|(name, _)| is_extra(name));
        Ok(tensors.map(|(_, entry)| entry.bytes as u64).sum())
    }

    /// Where expert `id` of a block lies.
    pub(crate) fn slices(&self, spec: &ModelSpec, block: usize, id: usize) -> Result<Vec<Slice>> {
        self.slices_under(&spec.moe, &format!("{}.{}", spec.block_prefix(block), spec.ffn), id)
    }

    /// Where expert `id` of a layer lies whose tensors transformers calls `{prefix}.`.
    fn slices_under(&self, moe: &MoeSpec, prefix: &str, id: usize) -> Result<Vec<Slice>> {
        let Some(metadata) = self.checkpoint.gguf() else {
            return experts::slices(moe, &format!("{prefix}."), id, self.checkpoint.as_ref());
        };
        let block = prefix.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let block = block.ok_or_else(|| Error::Checkpoint {
            file: metadata.file().into(),
            detail: format!("experts under `{prefix}`: expected `model.layers.` and a number, as a GGUF file has them"),
        })?;
        Ok(gguf::names::slices(moe, block, id, self.checkpoint.as_ref()))
    }
}

/// What the names of tensors begin with that are for pictures or for guessing further tokens (Qwen3.5).
const UNREAD: [&str; 3] = ["model.visual.", "visual.", "mtp."];

/// The error for an expert that is not there.
fn no_expert(spec: &ModelSpec, layer: usize, id: usize) -> Error {
    Error::ExpertOutOfRange {
        operand: format!("layer {layer}"),
        id: i64::try_from(id).unwrap_or(i64::MAX),
        expected: format!("one of {} in each of {} layers", spec.moe.experts, spec.moe_layers()),
    }
}

/// Where the tensor of transformers' `name` is in `checkpoint`.
pub(crate) fn source(checkpoint: &Checkpoint, name: &str) -> Result<TensorSource> {
    let same = || TensorSource::Same(name.into());
    let Some(metadata) = checkpoint.gguf() else { return Ok(same()) };
    Ok(TensorNames::new(metadata)?.source(name).unwrap_or_else(same))
}
