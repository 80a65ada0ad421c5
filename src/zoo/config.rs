//! Typed reading of a `config.json`: every miss names the file, the key, what was expected and what came.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A parsed `config.json` and the name it goes by in errors.
pub(super) struct Config {
    file: String,
    keys: Map<String, Value>,
}

impl Config {
    pub(super) fn parse(json: &str, file: &str) -> Result<Self> {
        let config = |detail: String| Error::Config { file: file.into(), detail };
        let value: Value =
            serde_json::from_str(json).map_err(|error| config(format!("expected a JSON object, got {error}")))?;
        match value {
            Value::Object(keys) => Ok(Self { file: file.into(), keys }),
            other => Err(config(format!("expected a JSON object, got {other}"))),
        }
    }

    /// An error about `key`.
    pub(super) fn error(&self, key: &str, expected: &str, got: &str) -> Error {
        Error::Config { file: self.file.clone(), detail: format!("key `{key}`: expected {expected}, got {got}") }
    }

    /// The value of `key`; null counts as absent, as Hugging Face writes it. A dot reaches into a nested object.
    fn value(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let first = self.keys.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.get(part)).filter(|value| !value.is_null())
    }

    /// True when there is a value that is not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, expected, &value.to_string()))
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
        let positive = |value: &Value| value.as_u64().filter(|&size| size > 0 && size <= u32::MAX.into());
        Ok(self.typed(key, "a positive integer", positive)?.map(|size| size as usize))
    }

    /// An integer that may be 0.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let count = |value: &Value| value.as_u64().filter(|&count| count <= u32::MAX.into());
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

    /// A positive finite number.
    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a positive number", |value| {
            value.as_f64().filter(|number| number.is_finite() && *number > 0.0)
        })
    }

    /// The same where there must be one.
    pub(super) fn number(&self, key: &str) -> Result<f64> {
        let value = self.optional_number(key)?;
        self.required(key, "a positive number", value)
    }

    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn optional_string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// Token ids: a number, a list of numbers, or nothing.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.typed(key, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}
