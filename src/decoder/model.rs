//! A model ready to use: decoder, tokenizer and name, loaded from a directory in Hugging Face layout or a GGUF file.
//!
//! ```no_run
//! use phase_moe::{LoadOptions, Model};
//!
//! let model = Model::load("models/tiny-moe".as_ref(), &LoadOptions::default())?;
//! let ids = model.encode("In the beginning")?;
//! # Ok::<(), phase_moe::Error>(())
//! ```

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::Decoder;
use super::options::LoadOptions;
use super::tokenizer::{Continuation, TextTokenizer};
use crate::checkpoint::json;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// The tokens that end a text as `generation_config.json` has them, a number or a list; `None` where it does not say.
fn end_of_text(weights: &Weights) -> Result<Option<Vec<u32>>> {
    const FILE: &str = "generation_config.json";
    let Some(text) = weights.beside(FILE)? else { return Ok(None) };
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

/// A decoder with its tokenizer.
#[derive(Clone, Debug)]
pub struct Model {
    name: String,
    decoder: Decoder,
    tokenizer: Arc<TextTokenizer>,
    end_of_text: Vec<u32>,
}

impl Model {
    /// Loads a directory with `config.json`, `*.safetensors`, `tokenizer.json` and, where there is one, `generation_config.json`; or a GGUF
    /// file.
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Model::new`].
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self> {
        Self::new(&Weights::open(path)?, options)
    }

    /// Loads the model from files that are open.
    ///
    /// # Errors
    /// As [`Decoder::load`]; [`Error::Io`] for no tokenizer and [`Error::Tokenizer`] for one that is unusable.
    pub fn new(weights: &Weights, options: &LoadOptions) -> Result<Self> {
        let (tokenizer, end_of_text) = (TextTokenizer::of(weights)?, end_of_text(weights)?);
        let decoder = Decoder::load(weights, options)?;
        let end_of_text = end_of_text.unwrap_or_else(|| decoder.spec().end_of_text.clone());
        let tokenizer = Arc::new(tokenizer.ended_by(&end_of_text));
        Ok(Self { name: weights.name().into(), decoder, tokenizer, end_of_text })
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

    /// Text of token ids that come after those `before`: what all of them read beyond what those read alone, so that the first
    /// word keeps the space before it. Special tokens are text as they are called, but for those that begin or end a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer cannot.
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
    /// As [`Model::decode_after`].
    pub fn continuation(&self, before: &[u32]) -> Result<Continuation> {
        Continuation::after(self.tokenizer.clone(), before)
    }
}
