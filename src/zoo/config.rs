//! Typed reading of a `config.json`: every miss names the file, the key, what was expected and what came.
//!
//! As in transformers a number with a decimal point is no size, and a text no number.

use serde_json::{Map, Value};

use crate::checkpoint::json;
use crate::error::{Error, Result};

/// The largest size.
const MOST: u64 = u32::MAX as u64;

/// A parsed `config.json` and the name it goes by in errors.
pub(super) struct Config {
    file: String,
    /// The object that it is, within the file's, and a dot; empty for the file's own.
    within: String,
    keys: Map<String, Value>,
}

impl Config {
    pub(super) fn parse(json: &str, file: &str) -> Result<Self> {
        let config = |detail: String| Error::Config { file: file.into(), detail };
        let value = json::parse(json).map_err(|error| config(format!("expected a JSON object, got {error}")))?;
        match value {
            Value::Object(keys) => Ok(Self { file: file.into(), within: String::new(), keys }),
            other => Err(config(format!("expected a JSON object, got {}", shown(&other)))),
        }
    }

    /// An error about `key`.
    pub(super) fn error(&self, key: &str, expected: &str, got: &str) -> Error {
        let detail = format!("key `{}{key}`: expected {expected}, got {got}", self.within);
        Error::Config { file: self.file.clone(), detail }
    }

    /// The object under `key` as a configuration of its own, if there is one; keys that it lacks are those `shared` with what is around it.
    pub(super) fn nested(&self, key: &str, shared: &[&str]) -> Option<Self> {
        let Value::Object(inner) = self.value(key)? else { return None };
        let mut keys = inner.clone();
        for name in shared {
            if let (None, Some(value)) = (keys.get(*name), self.keys.get(*name)) {
                keys.insert((*name).into(), value.clone());
            }
        }
        Some(Self { file: self.file.clone(), within: format!("{}{key}.", self.within), keys })
    }

    /// An error about the value that there is under `key`.
    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        self.error(key, expected, &self.value(key).map_or_else(|| "nothing".into(), shown))
    }

    /// The value of `key`; null counts as absent, as Hugging Face writes it. A dot reaches into a nested object.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let first = self.keys.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.get(part)).filter(|value| !value.is_null())
    }

    /// The names of what there is at the top.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// True when there is a value that is not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// True when the key is not there, which may mean something else than null.
    pub(super) fn is_absent(&self, key: &str) -> bool {
        !self.keys.contains_key(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, expected, &shown(value)))
    }

    fn required<T>(&self, key: &str, expected: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            self.error(key, expected, if self.keys.contains_key(key) { "null" } else { "nothing: the key is missing" })
        })
    }

    pub(super) fn string(&self, key: &str) -> Result<&str> {
        let value = self.typed(key, "a string", Value::as_str)?;
        self.required(key, "a string", value)
    }

    /// A positive integer.
    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let value = self.optional_size(key)?;
        self.required(key, "a positive integer", value)
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        if let Some(size) = self.value(key).and_then(Value::as_u64).filter(|&size| size > MOST) {
            return Err(self.error(key, &format!("at most {MOST}"), &size.to_string()));
        }
        let positive = |value: &Value| value.as_u64().filter(|&size| size > 0);
        Ok(self.typed(key, "a positive integer", positive)?.map(|size| size as usize))
    }

    /// An integer that may be 0.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let count = |value: &Value| value.as_u64().filter(|&count| count <= MOST);
        Ok(self.typed(key, "an integer, at least 0", count)?.map(|count| count as usize))
    }

    /// A list of integers; nothing is an empty one.
    pub(super) fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let size = |value: &Value| value.as_u64().and_then(|size| u32::try_from(size).ok()).map(|size| size as usize);
        let list = |value: &Value| value.as_array()?.iter().map(size).collect::<Option<Vec<_>>>();
        Ok(self.typed(key, "a list of integers, at least 0", list)?.unwrap_or_default())
    }

    /// A list of strings, if there is one.
    pub(super) fn optional_strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// Refuses a flag that stands for what no decoder here does.
    pub(super) fn expect_false(&self, key: &str) -> Result<()> {
        match self.optional_flag(key)? {
            Some(true) => Err(self.error(key, "false", "true")),
            _ => Ok(()),
        }
    }

    /// The same for one that stands for what is always done.
    pub(super) fn expect_true(&self, key: &str) -> Result<()> {
        match self.optional_flag(key)? {
            Some(false) => Err(self.error(key, "true", "false")),
            _ => Ok(()),
        }
    }

    /// A positive finite number.
    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a positive number", |value| {
            value.as_f64().filter(|number| number.is_finite() && *number > 0.0)
        })
    }

    /// The same, and none for 0, which some write where they mean nothing.
    pub(super) fn optional_number_or_zero(&self, key: &str) -> Result<Option<f64>> {
        match self.value(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => self.optional_number(key),
        }
    }

    /// A list of positive finite numbers.
    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let number = |value: &Value| value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        let list = |value: &Value| value.as_array()?.iter().map(number).collect::<Option<Vec<_>>>();
        let value = self.typed(key, "a list of positive numbers", list)?;
        self.required(key, "a list of positive numbers", value)
    }

    /// A positive finite number that must be there.
    pub(super) fn number(&self, key: &str) -> Result<f64> {
        let value = self.optional_number(key)?;
        self.required(key, "a positive number", value)
    }

    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A flag that is `otherwise` where the key is absent; null is false to Python.
    pub(super) fn flag_or(&self, key: &str, otherwise: bool) -> Result<bool> {
        Ok(self.optional_flag(key)?.unwrap_or(otherwise && self.is_absent(key)))
    }

    pub(super) fn optional_string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// Token ids: a number, a list of numbers, or nothing; -1 is how some say that there is none.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let ids = self.typed(key, "a token id or a list of them", |value| {
            let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            let there = list.iter().filter(|id| id.as_i64() != Some(-1));
            there.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
        })?;
        Ok(ids.unwrap_or_default())
    }
}

/// A value in an error, which is one line of some length.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(list) if list.len() > 8 => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
        value => match value.to_string() {
            text if text.chars().count() > 100 => format!("{}...", text.chars().take(100).collect::<String>()),
            text => text,
        },
    }
}
