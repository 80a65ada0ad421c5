//! A conversation as the model was trained to read it: the chat template beside a checkpoint or in a GGUF file, in Jinja.
//!
//! `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`: text, or a list of named ones of which `default` counts; else
//! `tokenizer.chat_template` of a GGUF file. A template sees what transformers shows it: `messages`, `add_generation_prompt` (true), the special tokens by name, `tools` and `documents` (none),
//! `raise_exception`, `strftime_now` (in UTC) and Python's methods of strings, lists and maps.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use phase_moe::checkpoint::{Metadata, json};
use phase_moe::decoder::model::ModelFiles;
use serde_json::Value as Json;

use crate::options::UserMistake;

const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// In GGUF files.
const TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// A model's chat template and its special tokens.
pub struct Chat {
    template: String,
    /// The file that it is in.
    file: String,
    /// `bos_token` and the others by name.
    tokens: Vec<(String, String)>,
}

impl Chat {
    /// The template beside a model's other files.
    pub fn of(files: &ModelFiles) -> Result<Self> {
        let mistake = |message: String| -> anyhow::Error { UserMistake(message).into() };
        let config: Json = match files.beside(CONFIG)? {
            None => Json::Null,
            Some(text) => {
                json::parse(&text).map_err(|error| mistake(format!("{CONFIG}: expected JSON, got {error}")))?
            }
        };
        let (template, file) = match (files.beside(TEMPLATE)?, &config["chat_template"]) {
            (Some(template), _) => (template, TEMPLATE.to_owned()),
            (None, Json::String(template)) => (template.clone(), CONFIG.to_owned()),
            (None, Json::Array(named)) => {
                let default = named.iter().find(|template| template["name"] == "default");
                let default = default.and_then(|template| template["template"].as_str());
                let message = || mistake(format!("{CONFIG}: `chat_template`: expected one named `default`, got none"));
                (default.ok_or_else(message)?.to_owned(), CONFIG.to_owned())
            }
            (None, Json::Null) => match files.checkpoint.gguf() {
                Some(gguf) if gguf.text(TEMPLATE_KEY)?.is_some() => {
                    (gguf.text(TEMPLATE_KEY)?.unwrap_or_default().to_owned(), gguf.file().to_owned())
                }
                gguf => {
                    let key = gguf.map_or(String::new(), |_| format!(", or `{TEMPLATE_KEY}` in the file"));
                    let places = format!("{TEMPLATE} or {CONFIG} of {}{key}", files.name);
                    return Err(mistake(format!("--chat: expected a chat template in {places}, got none")));
                }
            },
            (None, got) => return Err(mistake(format!("{CONFIG}: `chat_template`: expected text, got {got}"))),
        };
        let token = |(name, value): (&String, &Json)| {
            let text = value.as_str().or_else(|| value["content"].as_str());
            Some((name.clone(), text.filter(|_| name.ends_with("_token"))?.to_owned()))
        };
        let mut tokens: Vec<_> = config.as_object().into_iter().flatten().filter_map(token).collect();
        if let Some(gguf) = files.checkpoint.gguf() {
            for (name, token) in special_tokens(gguf)? {
                if tokens.iter().all(|(other, _)| *other != name) {
                    tokens.push((name, token));
                }
            }
        }
        Ok(Self { template, file, tokens })
    }

    /// The prompt that a user's message is, with what the chat is to be like, up to where the model's answer begins.
    pub fn write(&self, system: Option<&str>, user: &str) -> Result<String> {
        let mut environment = Environment::new();
        // As transformers has it: blocks leave neither their line nor what is before them on it.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| now(&format));
        for (name, token) in &self.tokens {
            environment.add_global(name.clone(), token.clone());
        }
        let message = |role: &str, content: &str| context! { role, content };
        let system = system.map(|system| message("system", system));
        let messages: Vec<Value> = system.into_iter().chain([message("user", user)]).collect();
        let (tools, documents) = (Value::from(()), Value::from(()));
        let context = context! { messages, add_generation_prompt => true, tools, documents };
        let written = environment.render_str(&self.template, context);
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

/// What a template says of itself, or what is wrong with it, in one line.
fn reason(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    format!("{line}{}", detail.replace('\n', " "))
}

/// The time in UTC by the letters that templates use.
fn now(format: &str) -> Result<String, Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    written_time(seconds, format)
}

/// Seconds since 1970 as text.
fn written_time(seconds: u64, format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (day, time) = (seconds / 86_400, seconds % 86_400);
    // Days of the civil calendar by eras of 400 years (Hinnant, "chrono-compatible low-level date algorithms"), years from March on.
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let date = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + 400 * era + u64::from(month <= 2);
    let name = MONTHS[month as usize - 1];
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        text += &match letters.next() {
            Some('Y') => year.to_string(),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{date:02}"),
            Some('B') => name.to_owned(),
            Some('b') => name[..3].to_owned(),
            Some('A') => DAYS[day as usize % 7].to_owned(),
            Some('H') => format!("{:02}", time / 3600),
            Some('M') => format!("{:02}", time / 60 % 60),
            Some('S') => format!("{:02}", time % 60),
            Some('%') => "%".to_owned(),
            other => {
                let expected = "one of %Y %m %d %B %b %A %H %M %S %%";
                let got = other.map_or("a lone %".into(), |letter| format!("%{letter}"));
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: expected {expected}, got {got}"),
                ));
            }
        };
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_written_as_python_writes_it() {
        // datetime.fromtimestamp(s, UTC).strftime(..)
        for (seconds, expected) in [
            (0, "1970-01-01 Thursday 00:00:00 01 Jan January 100%"),
            (951_782_400, "2000-02-29 Tuesday 00:00:00 29 Feb February 100%"),
            (1_782_864_059, "2026-07-01 Wednesday 00:00:59 01 Jul July 100%"),
        ] {
            assert_eq!(written_time(seconds, "%Y-%m-%d %A %H:%M:%S %d %b %B 100%%").unwrap(), expected);
        }
        assert!(written_time(0, "%q").unwrap_err().to_string().contains("got %q"));
        assert!(written_time(0, "%").is_err());
    }
}
