//! A conversation as the model was trained to read it: the chat template beside a checkpoint or in a GGUF file, in Jinja.
//!
//! `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`: text, or a list of named ones of which `default` counts; else
//! `tokenizer.chat_template` of a GGUF file. A template sees what transformers shows it: `messages`, `add_generation_prompt`, the special tokens by name, `tools` and `documents` (none),
//! in [`environment`] set up as there.

mod environment;
mod filters;
mod json;
mod limits;
mod methods;
mod source;
#[cfg(test)]
mod tests;
mod thinking;
mod time;

use std::collections::BTreeMap;

use anyhow::Result;
use jiff::Zoned;
use minijinja::value::Value;
use minijinja::{Error, context};
use phase_moe::Weights;
use phase_moe::checkpoint::Metadata;
use serde_json::Value as Json;

use crate::mistake::UserMistake;

const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Special tokens, in older checkpoints.
const TOKENS: &str = "special_tokens_map.json";
/// Of editors, before the first letter.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// In GGUF files.
const TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// One message of a conversation.
#[derive(Clone)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    pub content: String,
    /// What the model thought before it said that, where the template reads that apart.
    pub thought: Option<String>,
}

impl Message {
    /// What somebody said.
    pub fn new(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), thought: None }
    }
}

/// A model's chat template and its special tokens.
pub struct Chat {
    template: String,
    /// The file that it is in.
    file: String,
    /// `bos_token` and the others by name.
    tokens: BTreeMap<String, String>,
}

impl Chat {
    /// The template beside a model's other files.
    pub fn of(files: &Weights) -> Result<Self> {
        let mistake = |message: String| -> anyhow::Error { UserMistake(message).into() };
        let json = |file: &str| -> Result<Json> {
            let Some(text) = files.beside(file)? else { return Ok(Json::Null) };
            phase_moe::checkpoint::parse_json(&text)
                .map_err(|error| mistake(format!("{file}: expected JSON, got {error}")))
        };
        let config = json(CONFIG)?;
        let (template, file) = match (files.beside(TEMPLATE)?, &config["chat_template"]) {
            (Some(template), _) => (template, TEMPLATE.to_owned()),
            (None, Json::String(template)) => (template.clone(), CONFIG.to_owned()),
            (None, Json::Object(named)) if named["default"].is_string() => {
                (named["default"].as_str().unwrap_or_default().to_owned(), CONFIG.to_owned())
            }
            (None, Json::Array(named)) => {
                let default = named.iter().find(|template| template["name"] == "default");
                let default = default.and_then(|template| template["template"].as_str());
                let message = || mistake(format!("{CONFIG}: `chat_template`: expected one named `default`, got none"));
                (default.ok_or_else(message)?.to_owned(), CONFIG.to_owned())
            }
            (None, Json::Null) => match files.checkpoint().gguf() {
                Some(gguf) if gguf.text(TEMPLATE_KEY)?.is_some() => {
                    (gguf.text(TEMPLATE_KEY)?.unwrap_or_default().to_owned(), files.name().to_owned())
                }
                gguf => {
                    let key = gguf.map_or(String::new(), |_| format!(", or `{TEMPLATE_KEY}` in the file"));
                    let places = format!("{TEMPLATE} or {CONFIG} of {}{key}", files.name());
                    return Err(mistake(format!("--chat: expected a chat template in {places}, got none")));
                }
            },
            (None, got) => return Err(mistake(format!("{CONFIG}: `chat_template`: expected text, got {got}"))),
        };
        let text = |value: &Json| Some(value.as_str().or_else(|| value["content"].as_str())?.to_owned());
        let mut tokens: BTreeMap<String, String> = BTreeMap::new();
        // The older of the two says what counts where the newer does not list its tokens.
        let older = if config["added_tokens_decoder"].is_null() { json(TOKENS)? } else { Json::Null };
        for (name, value) in [&config, &older].into_iter().filter_map(Json::as_object).flatten() {
            if let Some(text) = text(value).filter(|_| name.ends_with("_token")) {
                tokens.insert(name.clone(), text);
            }
        }
        if let Some(gguf) = files.checkpoint().gguf() {
            for (name, token) in special_tokens(gguf)? {
                tokens.entry(name).or_insert(token);
            }
        }
        let template = template.trim_start_matches(BYTE_ORDER_MARK).to_owned();
        Ok(Self { template, file, tokens })
    }

    /// What a model answered to such a prompt, as a message of the conversation.
    pub fn answer(&self, prompt: &str, text: String) -> Message {
        let (content, thought) = thinking::parts(&self.template, prompt, text);
        Message { thought, ..Message::new("assistant", content) }
    }

    /// The prompt that a conversation is, up to where the model's next answer begins.
    pub fn write(&self, messages: &[Message]) -> Result<String> {
        self.render(messages, true)
    }

    /// A conversation without the beginning of an answer, where the template tells these apart.
    pub fn write_closed(&self, messages: &[Message]) -> Result<String> {
        self.render(messages, false)
    }

    fn render(&self, messages: &[Message], answer_begins: bool) -> Result<String> {
        let message = |message: &Message| {
            let (role, content) = (message.role, message.content.as_str());
            match &message.thought {
                Some(thought) => context! { role, content, reasoning_content => thought.as_str() },
                None => context! { role, content },
            }
        };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let none = Value::from(());
        let shown = [("messages", Value::from(messages)), ("tools", none.clone()), ("documents", none)];
        let mut context: BTreeMap<&str, Value> = shown.into();
        context.insert("add_generation_prompt", Value::from(answer_begins));
        context.extend(self.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        let context = Value::from(context);
        let (template, file) = (self.template.clone(), self.file.clone());
        let written = limits::bounded(move || environment::render(&template, &file, context, Zoned::now()));
        let written = written.map_err(|limit| UserMistake(format!("{}: {limit}", self.file)))?;
        Ok(written.map_err(|error| UserMistake(format!("{}: {}", self.file, reason(&error))))?)
    }
}

/// The special tokens that a GGUF file names, as templates call them.
fn special_tokens(gguf: &Metadata) -> Result<Vec<(String, String)>> {
    let (mut found, tokens) = (Vec::new(), gguf.texts("tokenizer.ggml.tokens")?.unwrap_or_default());
    for (name, key) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        let id = gguf.count(&format!("tokenizer.ggml.{key}_token_id"))?;
        if let Some(token) = id.and_then(|id| tokens.get(id)) {
            found.push((format!("{name}_token"), token.clone()));
        }
    }
    Ok(found)
}

/// What a template says of itself, or what is wrong with it, in one line. Its line is that of the file.
fn reason(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    format!("{line}{}", detail.replace('\n', " "))
}
