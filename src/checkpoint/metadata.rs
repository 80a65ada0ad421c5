//! The metadata of a GGUF file: names and values, read with what was expected of them.
//!
//! Knows nothing of what they mean.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Any integer.
    Integer(i64),
    /// Any float; of 32 bits the shortest decimal that stands for it, so that 1e-5 is 1e-5.
    Number(f64),
    /// True or false.
    Flag(bool),
    /// Text.
    Text(String),
    /// A list of integers or flags.
    Integers(Vec<i64>),
    /// A list of floats.
    Numbers(Vec<f64>),
    /// A list of texts.
    Texts(Vec<String>),
}

impl Value {
    fn kind(&self) -> String {
        match self {
            Self::Integer(value) => value.to_string(),
            Self::Number(value) => value.to_string(),
            Self::Flag(value) => value.to_string(),
            Self::Text(value) => format!("`{}`", value.chars().take(40).collect::<String>()),
            Self::Integers(list) => format!("{} integers", list.len()),
            Self::Numbers(list) => format!("{} numbers", list.len()),
            Self::Texts(list) => format!("{} texts", list.len()),
        }
    }
}

/// All values of a file, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    file: String,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(file: String, values: BTreeMap<String, Value>) -> Self {
        Self { file, values }
    }

    /// The file they are from.
    pub(crate) fn file(&self) -> &str {
        &self.file
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// An error about a key.
    pub(crate) fn error(&self, key: &str, expected: &str, got: &str) -> Error {
        Error::Config { file: self.file.clone(), detail: format!("metadata `{key}`: expected {expected}, got {got}") }
    }

    fn typed<'a, T>(&'a self, key: &str, expected: &str, get: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        get(value).map(Some).ok_or_else(|| self.error(key, expected, &value.kind()))
    }

    /// An integer that may be 0. A list of equal ones, one for each block, counts as one.
    ///
    /// # Errors
    /// [`Error::Config`] for anything else; as all of these.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        let count = |value: i64| u32::try_from(value).ok().map(|count| count as usize);
        self.typed(key, "an integer, at least 0", |value| match value {
            Value::Integer(value) => count(*value),
            Value::Integers(list) => {
                let first = *list.first()?;
                if list.iter().all(|value| *value == first) { count(first) } else { None }
            }
            _ => None,
        })
    }

    /// The same where there must be one.
    ///
    /// # Errors
    /// As [`Metadata::count`], and where there is none.
    pub(crate) fn required_count(&self, key: &str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| self.error(key, "an integer", "nothing: the key is missing"))
    }

    /// A finite number.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |value| match value {
            Value::Number(value) => Some(*value).filter(|value| value.is_finite()),
            Value::Integer(value) => Some(*value as f64),
            _ => None,
        })
    }

    /// True or false.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Flag(value) => Some(*value),
            _ => None,
        })
    }

    /// Text.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "text", |value| match value {
            Value::Text(value) => Some(value.as_str()),
            _ => None,
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "a list of texts", |value| match value {
            Value::Texts(list) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// A list of integers.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        self.typed(key, "a list of integers", |value| match value {
            Value::Integers(list) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// A list of numbers.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub(crate) fn numbers(&self, key: &str) -> Result<Option<&[f64]>> {
        self.typed(key, "a list of numbers", |value| match value {
            Value::Numbers(list) => Some(list.as_slice()),
            _ => None,
        })
    }
}
