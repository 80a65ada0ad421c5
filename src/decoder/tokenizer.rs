//! Text as tokens and tokens as text: a tokenizer without what it would do to a batch, what stands around a text of its own, and a
//! continuation read together with what stands before it.
//!
//! `truncation` and `padding` of a `tokenizer.json` are for batches of somebody else's and never applied. What begins a text (and in
//! some models ends it) comes from the post-processor, as in transformers. Where that adds no beginning-of-text token but
//! `tokenizer_config.json` says `add_bos_token`, it is added: transformers 5 heeds that key only for tokenizers without a
//! `tokenizer.json`, and models that rely on it were trained with the token. A GGUF file says it in `tokenizer.ggml.add_bos_token`, which
//! counts more than a `tokenizer.json` beside it.
//!
//! Tokens are no text each: a decoder drops the space before the first word, and a letter may need several tokens. So a
//! continuation is what all tokens read beyond what those before it read alone.
//!
//! What a model writes is text, marks of thinking, of tools and of channels too, whether its tokenizer calls them special or not: without
//! them gpt-oss would say `analysisThe user ..assistantfinalThe answer`. Out of a text stay the special tokens that begin or end one.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{Encoding, Token, Tokenizer};

use crate::checkpoint::json;
use crate::error::{Error, Result};
use crate::weights::Weights;

const CONFIG: &str = "tokenizer_config.json";

/// What a decoder writes for bytes that are no letter, or not yet.
const REPLACEMENT: char = '\u{fffd}';

/// A tokenizer and the tokens that it puts around a text.
#[derive(Debug)]
pub(super) struct TextTokenizer {
    tokenizer: Tokenizer,
    before: Vec<u32>,
    after: Vec<u32>,
    /// What ends a text that the model writes.
    ends: Vec<u32>,
}

impl TextTokenizer {
    /// That of a model, and what it puts around a text as the model's files say.
    pub(super) fn of(weights: &Weights) -> Result<Self> {
        let (json, file) = weights.tokenizer()?;
        let tokenizer = Self::read(&json, &file)?;
        if let Some((before, after)) = weights.said_around()? {
            return Ok(tokenizer.around(before, after));
        }
        if weights.checkpoint().gguf().is_some() {
            return Ok(tokenizer);
        }
        match weights.beside(CONFIG)? {
            Some(config) => tokenizer.configured(&config),
            None => Ok(tokenizer),
        }
    }

    /// From a `tokenizer.json`; `file` is what an error calls it.
    pub(super) fn read(json: &str, file: &str) -> Result<Self> {
        let named = |reason: String| Error::Tokenizer(format!("{file}: {reason}"));
        let mut tokenizer = parse(json).map_err(named)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(wrong)?;
        let (before, after) = around(&tokenizer)?;
        Ok(Self { tokenizer, before, after, ends: Vec::new() })
    }

    /// With what `tokenizer_config.json` says of the beginning of a text.
    pub(super) fn configured(mut self, config: &str) -> Result<Self> {
        let wrong = |detail: String| Error::Config { file: CONFIG.into(), detail };
        let config = json::parse(config).map_err(|error| wrong(format!("expected JSON, got {error}")))?;
        let token = &config["bos_token"];
        let name = token.as_str().or_else(|| token["content"].as_str());
        if let Some(name) = name.filter(|_| config["add_bos_token"] == true) {
            let id = self.tokenizer.token_to_id(name);
            let id =
                id.ok_or_else(|| wrong(format!("`bos_token`: expected a token of the tokenizer, got `{name}`")))?;
            if !self.before.contains(&id) {
                self.before.insert(0, id);
            }
        }
        Ok(self)
    }

    /// With other tokens around a text.
    pub(super) fn around(self, before: Vec<u32>, after: Vec<u32>) -> Self {
        Self { before, after, ..self }
    }

    /// With the tokens that end a text.
    pub(super) fn ended_by(self, ends: &[u32]) -> Self {
        Self { ends: ends.to_vec(), ..self }
    }

    /// What a text of its own begins with.
    pub(super) fn before(&self) -> &[u32] {
        &self.before
    }

    /// Token ids of `text` alone.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(wrong)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same with what stands around a text of its own.
    pub(super) fn encode_sequence(&self, text: &str) -> Result<Vec<u32>> {
        Ok([self.before.as_slice(), &self.encode(text)?, &self.after].concat())
    }

    /// Text of token ids, without the special tokens that begin or end a text.
    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        let text: Vec<u32> = ids.iter().copied().filter(|&id| !self.is_border(id)).collect();
        self.tokenizer.decode(&text, false).map_err(wrong)
    }

    /// Whether it begins or ends a text. A token that is not special is text there too.
    fn is_border(&self, id: u32) -> bool {
        let special = |token: String| self.tokenizer.get_added_vocabulary().is_special_token(&token);
        let mut borders = self.before.iter().chain(&self.after).chain(&self.ends);
        borders.any(|&border| border == id) && self.tokenizer.id_to_token(id).is_some_and(special)
    }

    fn kind(&self, id: u32) -> TokenKind {
        let Some(token) = self.tokenizer.id_to_token(id).filter(|_| !self.is_border(id)) else {
            return TokenKind::Skipped;
        };
        let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if digits.is_some_and(|digits| digits.len() == 2) { TokenKind::Byte } else { TokenKind::Text }
    }
}

/// What a token is to a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    Text,
    /// One byte: several in a row are text together, or none of them is.
    Byte,
    /// Not in the text, nor between the bytes that it stands between.
    Skipped,
}

/// The text of a continuation, token by token; see [`Model::continuation`](super::model::Model::continuation).
///
/// Text is held back until it can no longer change: an unfinished letter, and bytes until another token follows.
#[derive(Clone, Debug)]
pub struct Continuation {
    tokenizer: Arc<TextTokenizer>,
    /// The last tokens, as many as the text of the next one needs before it.
    ids: Vec<u32>,
    /// What of their text is not to be given out (again).
    given: String,
    /// The last token of text was a byte.
    bytes: bool,
}

impl Continuation {
    /// Tokens from which on earlier ones are let go, and how many are left then.
    const LONG: usize = 128;
    const SHORT: usize = 32;

    pub(super) fn after(tokenizer: Arc<TextTokenizer>, before: &[u32]) -> Result<Self> {
        let given = tokenizer.decode(before)?;
        let mut this = Self { tokenizer, ids: before.to_vec(), given, bytes: false };
        this.let_go()?;
        Ok(this)
    }

    /// What the next token adds to the text; often nothing yet.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer cannot.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        match self.tokenizer.kind(id) {
            TokenKind::Text => self.bytes = false,
            TokenKind::Byte => self.bytes = true,
            TokenKind::Skipped => {}
        }
        if self.bytes {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.ids)?;
        let new = self.new_part(&text).trim_end_matches(REPLACEMENT).to_owned();
        if !new.is_empty() {
            let end = text.len() - self.new_part(&text).len() + new.len();
            self.given = text[..end].to_owned();
            if end == text.len() && self.ids.len() > Self::LONG {
                self.let_go()?;
            }
        }
        Ok(new)
    }

    /// What was held back, as it stands.
    ///
    /// # Errors
    /// As [`Continuation::push`].
    pub fn finish(&self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(self.new_part(&text).to_owned())
    }

    /// What `text` has beyond what it shares with the text that is given.
    fn new_part<'a>(&self, text: &'a str) -> &'a str {
        if let Some(new) = text.strip_prefix(&self.given) {
            return new;
        }
        let shared = text.chars().zip(self.given.chars()).take_while(|(a, b)| a == b);
        &text[shared.map(|(letter, _)| letter.len_utf8()).sum::<usize>()..]
    }

    /// Keeps the last tokens alone, where their text is the end of the text of all: not cut within a letter, nor empty, because then
    /// the decoder could take the next token for the first of the text.
    fn let_go(&mut self) -> Result<()> {
        let start = self.ids.len().saturating_sub(Self::SHORT);
        let kept = &self.ids[start..];
        if start == 0 || kept.first().is_none_or(|&id| self.tokenizer.kind(id) != TokenKind::Text) {
            return Ok(());
        }
        let text = self.tokenizer.decode(kept)?;
        if !text.trim().is_empty() && !text.starts_with(REPLACEMENT) && self.given.ends_with(&text) {
            (self.ids, self.given) = (kept.to_vec(), text);
        }
        Ok(())
    }
}

fn wrong(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

/// A `tokenizer.json` that can be used.
fn parse(json: &str) -> Result<Tokenizer, String> {
    #[derive(Deserialize)]
    struct PostProcessor {
        #[serde(default)]
        post_processor: Value,
    }
    let tokenizer = Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
    // A template that names a token which it does not have would end the process where it is applied.
    let parsed: PostProcessor = serde_json::from_str(json).map_err(|error| error.to_string())?;
    match unknown_token(&parsed.post_processor) {
        Some(token) => Err(format!("`post_processor`: expected `{token}` in `special_tokens`, got none")),
        None => Ok(tokenizer),
    }
}

/// A token of a template that the template does not define.
fn unknown_token(processor: &Value) -> Option<&str> {
    let inner = processor["processors"].as_array().into_iter().flatten().find_map(unknown_token);
    let pieces = ["single", "pair"].into_iter().flat_map(|kind| processor[kind].as_array().into_iter().flatten());
    let mut named = pieces.filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    inner.or_else(|| named.find(|name| processor["special_tokens"].get(name).is_none()))
}

/// What the post-processor puts before a text and after it.
fn around(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
    let whole = tokenizer.post_process(text, None, true).map_err(wrong)?;
    let mut parts =
        whole.get_ids().iter().zip(whole.get_special_tokens_mask()).map(|(&id, &special)| (id, special == 1));
    let before = parts.by_ref().take_while(|&(_, special)| special).map(|(id, _)| id).collect();
    Ok((before, parts.filter(|&(_, special)| special).map(|(id, _)| id).collect()))
}
