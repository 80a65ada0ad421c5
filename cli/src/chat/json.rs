//! `tojson` of chat templates: what Python's `json.dumps` writes, with its keyword arguments and without HTML's escapes.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind};

use super::filters;

/// As deep as lists and maps may lie in each other.
const MAX_DEPTH: usize = 200;

/// How `json.dumps` was asked to write.
struct Style {
    ensure_ascii: bool,
    /// What a level is moved in by; with it every item has a line of its own.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub fn filter(value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let arguments = arguments.into_values();
    let (positional, named) = from_args::<(&[Value], Kwargs)>(&arguments)?;
    if positional.len() > 4 {
        return Err(Error::new(ErrorKind::TooManyArguments, format!("tojson: expected 4, got {}", positional.len())));
    }
    let argument = |index: usize, name: &str| -> Result<Value, Error> {
        match positional.get(index) {
            Some(_) if named.has(name) => {
                Err(Error::new(ErrorKind::TooManyArguments, format!("tojson: `{name}` is given twice")))
            }
            Some(value) => Ok(value.clone()),
            None => Ok(named.get::<Option<Value>>(name)?.unwrap_or(Value::from(()))),
        }
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_true();
    let indent = indent(&argument(1, "indent")?)?;
    let separators = argument(2, "separators")?;
    let (item_separator, key_separator) = match separators.is_none() {
        true => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        false => {
            let wrong = || {
                let message = format!("tojson: separators: expected two texts, got {separators}");
                Error::new(ErrorKind::InvalidOperation, message)
            };
            let texts: Vec<Value> = separators.try_iter()?.collect();
            match &texts[..] {
                [item, key] => {
                    (item.as_str().ok_or_else(wrong)?.to_owned(), key.as_str().ok_or_else(wrong)?.to_owned())
                }
                _ => return Err(wrong()),
            }
        }
    };
    let sort_keys = argument(3, "sort_keys")?.is_true();
    named.assert_all_used()?;
    let mut text = String::new();
    Style { ensure_ascii, indent, item_separator, key_separator, sort_keys }.write(&mut text, value, 0)?;
    Ok(text)
}

/// A number of spaces, or text; none is one line.
fn indent(value: &Value) -> Result<Option<String>, Error> {
    if value.is_none() {
        return Ok(None);
    }
    if let Some(text) = value.as_str() {
        return Ok(Some(text.to_owned()));
    }
    let spaces = match bool::try_from(value.clone()) {
        Ok(flag) => i64::from(flag),
        Err(_) => i64::try_from(value.clone())?,
    };
    match usize::try_from(spaces) {
        Ok(spaces) if spaces > 1000 => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: indent {spaces} exceeds 1000")))
        }
        spaces => Ok(Some(" ".repeat(spaces.unwrap_or(0)))),
    }
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let unable = |what: &dyn std::fmt::Display| {
            Error::new(ErrorKind::BadSerialization, format!("tojson: {what} has no form in JSON"))
        };
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::BadSerialization, format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container(out, ['[', ']'], items.len(), depth, |out, index| {
                    self.write(out, &items[index], depth + 1)
                })?;
            }
            ValueKind::Map if !value.is_kwargs() => {
                let mut pairs: Vec<(Value, Value)> = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    pairs.push((key, item));
                }
                if self.sort_keys {
                    sort(&mut pairs)?;
                }
                self.container(out, ['{', '}'], pairs.len(), depth, |out, index| {
                    let (key, item) = &pairs[index];
                    let key = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                        ValueKind::Number => number(key),
                        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
                        ValueKind::None => "null".to_owned(),
                        kind => return Err(unable(&format_args!("a key that is a {kind}"))),
                    };
                    self.text(out, &key);
                    out.push_str(&self.key_separator);
                    self.write(out, item, depth + 1)
                })?;
            }
            kind => return Err(unable(&kind)),
        }
        Ok(())
    }

    /// Brackets around items, each on its line where there is an indent.
    fn container(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: usize,
        depth: usize,
        mut item: impl FnMut(&mut String, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        for index in 0..items {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            line(out, depth + 1);
            item(out, index)?;
        }
        if items > 0 {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn text(&self, out: &mut String, text: &str) {
        out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                letter if letter < ' ' || (self.ensure_ascii && letter > '~') => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        // Writing into a String does not fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                letter => out.push(letter),
            }
        }
        out.push('"');
    }
}

fn number(value: &Value) -> String {
    match filters::float(value).unwrap_or_else(|| value.to_string()).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        text => text.into(),
    }
}

/// By keys, as Python orders them: texts among themselves, numbers among themselves.
fn sort(pairs: &mut [(Value, Value)]) -> Result<(), Error> {
    let numeric = |(key, _): &(Value, Value)| matches!(key.kind(), ValueKind::Number | ValueKind::Bool);
    let texts = pairs.iter().all(|(key, _)| key.kind() == ValueKind::String);
    if pairs.len() > 1 && !texts && !pairs.iter().all(numeric) {
        let message = "tojson: sort_keys: expected keys of one kind";
        return Err(Error::new(ErrorKind::BadSerialization, message));
    }
    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(())
}
