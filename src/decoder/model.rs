//! A model ready to use: decoder, tokenizer and name, loaded from a checkpoint directory in Hugging Face layout.
//!
//! ```no_run
//! use phase_moe::decoder::model::{LoadOptions, Model};
//!
//! let model = Model::load("models/tiny-moe".as_ref(), &LoadOptions::default())?;
//! let ids = model.encode("In the beginning")?;
//! # Ok::<(), phase_moe::error::Error>(())
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use serde_json::Value;

use super::finite::of_loading;
use super::tokenizer::{Continuation, TextTokenizer};
use super::{Decoder, weights};
use crate::checkpoint::{Checkpoint, Located, Metadata, json, locate, name_of, read_file, read_text, text};
use crate::error::{Error, Result};
use crate::offload::cache::{CacheOptions, ExpertCache};
use crate::spec::ModelSpec;
use crate::zoo;

/// In which dtype and where to hold the weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Dtype of the weights in memory, whatever the checkpoint's.
    pub dtype: DType,
    /// Device of the weights.
    pub device: Device,
    /// Experts stay in their files, in their dtype there, and come into memory within a budget; `None` loads all of them.
    pub expert_cache: Option<CacheOptions>,
}

impl Default for LoadOptions {
    /// `f32` on the CPU, all experts in memory.
    fn default() -> Self {
        Self { dtype: DType::F32, device: Device::Cpu, expert_cache: None }
    }
}

/// The files of a checkpoint, as text and tensors.
#[derive(Debug)]
pub struct ModelFiles {
    /// What to call the model: the directory's name.
    pub name: String,
    /// `config.json`, or what stands for it in a GGUF file.
    pub config: String,
    /// `tokenizer.json`, if there is one: only text needs it, and a GGUF file has its own.
    pub tokenizer: Option<Vec<u8>>,
    /// The tensors.
    pub checkpoint: Arc<Checkpoint>,
    /// Where further files are, which not everybody needs; `None` where there are none.
    pub directory: Option<PathBuf>,
}

impl ModelFiles {
    /// Opens the files in the directory `path`, or the GGUF file that `path` is or holds.
    ///
    /// # Errors
    /// [`Error::Io`] for an unreadable file or a missing one other than `tokenizer.json`, [`Error::Checkpoint`] as
    /// [`Checkpoint::open`]; of a GGUF file as [`crate::weights::gguf::config`].
    pub fn open(path: &Path) -> Result<Self> {
        let path = match locate(path)? {
            Located::Directory(directory) => directory,
            Located::Gguf(file) => {
                let checkpoint = Arc::new(Checkpoint::open_gguf(&file)?);
                let tokenizer = file.with_file_name("tokenizer.json");
                return Ok(Self {
                    name: name_of(path).trim_end_matches(".gguf").into(),
                    config: crate::weights::gguf::config(&checkpoint)?,
                    checkpoint,
                    tokenizer: tokenizer.exists().then(|| read_file(&tokenizer)).transpose()?,
                    directory: file.parent().map(Path::to_owned),
                });
            }
        };
        let config = text(read_file(&path.join("config.json"))?)
            .map_err(|error| Error::Config { file: "config.json".into(), detail: error.to_string() })?;
        zoo::quantization::check(&config, "config.json")?;
        let tokenizer = path.join("tokenizer.json");
        Ok(Self {
            name: name_of(&path),
            config,
            checkpoint: Arc::new(Checkpoint::open(&path)?),
            tokenizer: tokenizer.exists().then(|| read_file(&tokenizer)).transpose()?,
            directory: Some(path),
        })
    }

    /// The text of `file` beside the others, if there is one: `generation_config.json`, `tokenizer_config.json`, `chat_template.jinja`.
    ///
    /// # Errors
    /// [`Error::Io`] for an unreadable file, or one that is no UTF-8 text.
    pub fn beside(&self, file: &str) -> Result<Option<String>> {
        let Some(path) = self.directory.as_ref().map(|directory| directory.join(file)) else { return Ok(None) };
        match read_text(&path) {
            Ok(text) => Ok(Some(text)),
            Err(Error::Io { reason, .. }) if reason.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The tokenizer, and what it puts around a text as these files say.
    fn text_tokenizer(&self) -> Result<TextTokenizer> {
        const FILE: &str = "tokenizer.json";
        let gguf = self.checkpoint.gguf();
        let Some(bytes) = &self.tokenizer else {
            let reason = || std::io::Error::new(std::io::ErrorKind::NotFound, "expected beside config.json, got none");
            let metadata = gguf.ok_or_else(|| Error::io(FILE, reason()))?;
            return TextTokenizer::read(
                crate::weights::gguf::tokenizer::tokenizer_json(metadata)?.as_bytes(),
                metadata.file(),
            );
        };
        let file = self.directory.as_ref().map_or(FILE.into(), |directory| directory.join(FILE).display().to_string());
        let tokenizer = TextTokenizer::read(bytes, &file)?;
        Ok(match gguf {
            Some(metadata) => match crate::weights::gguf::tokenizer::said_around(metadata)? {
                Some((before, after)) => tokenizer.around(before, after),
                None => tokenizer,
            },
            None => match self.beside("tokenizer_config.json")? {
                Some(config) => tokenizer.configured(&config)?,
                None => tokenizer,
            },
        })
    }

    /// The tokens that end a text as `generation_config.json` has them, a number or a list; `None` where it does not say.
    fn end_of_text(&self) -> Result<Option<Vec<u32>>> {
        const FILE: &str = "generation_config.json";
        let Some(text) = self.beside(FILE)? else { return Ok(None) };
        let wrong = |detail: String| Error::Config { file: FILE.into(), detail };
        let config: Value = json::parse(&text).map_err(|error| wrong(format!("expected JSON, got {error}")))?;
        let ids = match config.get("eos_token_id") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        // -1 is how some say that there is none.
        let ids = ids.iter().filter(|id| id.as_i64() != Some(-1));
        let ids: Option<Vec<u32>> = ids.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
        let got =
            || wrong(format!("`eos_token_id`: expected a token id or a list of them, got {}", config["eos_token_id"]));
        ids.map(Some).ok_or_else(got)
    }

    /// What the configuration says, and that the checkpoint has its blocks and no other experts.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::UnknownName`] for a family there is no file for, [`Error::Checkpoint`] as
    /// [`weights::check_experts`].
    pub fn spec(&self) -> Result<ModelSpec> {
        let file = self.checkpoint.gguf().map_or("config.json", Metadata::file);
        let in_its_words = |error: Error| match self.checkpoint.gguf() {
            Some(metadata) => crate::weights::gguf::keys::in_words_of_file(error, metadata),
            None => error,
        };
        let mut spec = zoo::parse_config(&self.config, file).map_err(in_its_words)?;
        // Output weights that are there are the model's, whatever the configuration says: so transformers has it.
        spec.tied_embeddings &= !self.checkpoint.tensors().contains_key("lm_head.weight");
        weights::check_blocks(&self.checkpoint, &spec)?;
        weights::check_experts(&self.checkpoint, &spec)?;
        Ok(spec)
    }

    /// The transformer alone, which needs no tokenizer.
    ///
    /// # Errors
    /// As [`Model::from_files`], but for those of the tokenizer; [`Error::Parameter`] for a cache that no expert fits.
    pub fn decoder(&self, options: &LoadOptions) -> Result<Decoder> {
        let spec = self.spec()?;
        let vb = weights::var_builder(self.checkpoint.clone(), options.dtype, &options.device);
        let decoder = match (options.expert_cache, self.checkpoint.gguf()) {
            (None, Some(_)) => Decoder::load_gguf(&spec, vb, &self.checkpoint),
            (None, None) => Decoder::load(&spec, vb),
            (Some(cache), _) => {
                let store = weights::expert_store(&self.checkpoint, &spec)?;
                let cache = if cache.spare_bytes == 0 { cache.sparing(&store) } else { cache };
                let cache = ExpertCache::new(Arc::new(store), cache)?;
                Decoder::load_cached(&spec, vb, Arc::new(cache))
            }
        };
        let decoder = decoder.map_err(|error| of_loading(error, &self.checkpoint, &spec))?;
        Ok(decoder.with_checkpoint(self.checkpoint.clone()))
    }
}

/// A decoder with its tokenizer.
#[derive(Clone)]
pub struct Model {
    name: String,
    decoder: Decoder,
    tokenizer: Arc<TextTokenizer>,
    end_of_text: Vec<u32>,
}

impl Model {
    /// Loads `config.json`, `*.safetensors`, `tokenizer.json` and, where there is one, `generation_config.json` from `directory`.
    ///
    /// # Errors
    /// As [`ModelFiles::open`] and [`Model::from_files`].
    pub fn load(directory: &Path, options: &LoadOptions) -> Result<Self> {
        Self::from_files(&ModelFiles::open(directory)?, options)
    }

    /// Builds the model from opened files.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::UnknownName`] for a family there is no file for, [`Error::Checkpoint`] for tensors that are
    /// missing, of the wrong shape or dtype, or of experts that the configuration does not have, [`Error::Io`] for no tokenizer
    /// and [`Error::Tokenizer`] for one that is unusable.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let tokenizer = files.text_tokenizer()?;
        let end_of_text = files.end_of_text()?;
        let decoder = files.decoder(options)?;
        let end_of_text = end_of_text.unwrap_or_else(|| decoder.spec().end_of_text.clone());
        Ok(Self { name: files.name.clone(), decoder, tokenizer: Arc::new(tokenizer), end_of_text })
    }

    /// The tokens that end a text: those of `generation_config.json` where it has any, else those of `config.json`.
    pub fn end_of_text(&self) -> &[u32] {
        &self.end_of_text
    }

    /// What the model is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The transformer.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The transformer, to change routers or top_k.
    pub fn decoder_mut(&mut self) -> &mut Decoder {
        &mut self.decoder
    }

    /// Token ids of `text`, without special tokens but those that it names.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer cannot.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text)
    }

    /// Token ids of `text` as a sequence of its own, with the special tokens that the tokenizer puts around one: its
    /// [beginning](Model::sequence_start), and its end where the tokenizer has that too.
    ///
    /// # Errors
    /// As [`Model::encode`].
    pub fn encode_sequence(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode_sequence(text)
    }

    /// What every sequence begins with: a beginning-of-text token, of some models more than one, of many none.
    pub fn sequence_start(&self) -> &[u32] {
        self.tokenizer.before()
    }

    /// Text of token ids.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer cannot.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids)
    }

    /// Text of token ids that come after those `before`: what all of them read beyond what those read alone, so that the first
    /// word keeps the space before it.
    ///
    /// # Errors
    /// As [`Model::decode`].
    pub fn decode_after(&self, before: &[u32], ids: &[u32]) -> Result<String> {
        let mut continuation = self.continuation(before)?;
        let mut text = String::new();
        for &id in ids {
            text += &continuation.push(id)?;
        }
        Ok(text + &continuation.finish()?)
    }

    /// The same token by token.
    ///
    /// # Errors
    /// As [`Model::decode`].
    pub fn continuation(&self, before: &[u32]) -> Result<Continuation> {
        Continuation::after(self.tokenizer.clone(), before)
    }
}
