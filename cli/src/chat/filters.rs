//! Jinja's filters, tests and functions as Python's Jinja has them, where the engine's own are missing or differ.
//!
//! Left out are those that the engine would do another way: `attr`, `pprint`. What is missing is an error with its name.

use minijinja::functions;
use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use minijinja_contrib::globals::{cycler, joiner};

/// All of them.
pub fn add(environment: &mut Environment) {
    environment.set_formatter(print);
    environment.add_filter("string", |value: &Value| match float(value) {
        Some(text) => Value::from(text),
        None if value.as_str().is_some() => value.clone(),
        None => Value::from(value.to_string()),
    });
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, escape);
    }
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    environment.add_filter("int", int);
    environment.add_filter("float", |value: &Value, default: Option<Value>, named: Kwargs| {
        let default = default.or(named.get("default")?).unwrap_or(Value::from(0.0));
        named.assert_all_used()?;
        let float = match value.as_str() {
            Some(text) => number(text),
            None if value.is_undefined() => return Err(ErrorKind::UndefinedError.into()),
            None => f64::try_from(value.clone()).ok().or(bool::try_from(value.clone()).ok().map(f64::from)),
        };
        Ok(float.map_or(default, Value::from))
    });
    environment.add_filter("center", |text: String, width: Option<usize>| {
        let missing = width.unwrap_or(80).min(1_000_000).saturating_sub(text.chars().count());
        let left = missing / 2 + (missing & width.unwrap_or(80) & 1);
        format!("{}{text}{}", " ".repeat(left), " ".repeat(missing - left))
    });
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("wordcount", |text: String| {
        text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty()).count()
    });
    environment.remove_filter("attr");
    environment.remove_filter("pprint");

    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", |value: &Value| {
        let kind = value.kind();
        let several = matches!(kind, ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined);
        several || kind == ValueKind::Iterable
    });
    // Macros and functions are the objects that are nothing else.
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);

    environment.add_function("cycler", |items: Rest<Value>| cycler(items.0));
    environment.add_function("joiner", joiner);
    environment.add_function("dict", |arguments: Rest<ValueOrKwargs>| dict("dict", arguments));
    environment.add_function("namespace", |arguments: Rest<ValueOrKwargs>| {
        let values = dict("namespace", arguments)?;
        if let Some(name) = values.try_iter()?.find(|name| name.as_str().is_some_and(|name| name.starts_with('_'))) {
            let message = format!("namespace: expected names without an underscore in front, got {name}");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        functions::namespace(Some(values.into()))
    });
}

/// What `{{ }}` prints: a float as Python writes it.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match float(value) {
        Some(text) => Ok(out.write_str(&text)?),
        None => escape_formatter(out, state, value),
    }
}

/// A float as Python's `repr` has it: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
pub fn float(value: &Value) -> Option<String> {
    if value.kind() != ValueKind::Number || value.is_integer() {
        return None;
    }
    let float = f64::try_from(value.clone()).ok()?;
    if !float.is_finite() {
        let sign = if float < 0.0 { "-" } else { "" };
        return Some(if float.is_nan() { "nan".into() } else { format!("{sign}inf") });
    }
    let text = format!("{float:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return Some(text) };
    let exponent: i32 = exponent.parse().ok()?;
    Some(format!("{digits}e{exponent:+03}"))
}

fn escape(value: &Value) -> Value {
    let text = value.to_string();
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&#39;"),
            '"' => escaped.push_str("&#34;"),
            letter => escaped.push(letter),
        }
    }
    Value::from(escaped)
}

/// `default(default_value='', boolean=false)`.
fn default(value: &Value, text: Option<Value>, boolean: Option<bool>, named: Kwargs) -> Result<Value, Error> {
    let text = text.or(named.get("default_value")?).unwrap_or(Value::from(""));
    let boolean = boolean.or(named.get("boolean")?).unwrap_or(false);
    named.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { text } else { value.clone() })
}

/// `int(default=0, base=10)`: what is no number is the default.
fn int(value: &Value, default: Option<Value>, base: Option<u32>, named: Kwargs) -> Result<Value, Error> {
    let default = default.or(named.get("default")?).unwrap_or(Value::from(0));
    let base = base.or(named.get("base")?).unwrap_or(10);
    named.assert_all_used()?;
    if value.is_undefined() {
        return Err(ErrorKind::UndefinedError.into());
    }
    if value.is_integer() {
        return Ok(value.clone());
    }
    if let Ok(flag) = bool::try_from(value.clone()) {
        return Ok(Value::from(i64::from(flag)));
    }
    let whole = |float: f64| (float.is_finite() && float.abs() < 1e36).then(|| Value::from(float as i128));
    let Some(text) = value.as_str() else {
        return Ok(f64::try_from(value.clone()).ok().and_then(whole).unwrap_or(default));
    };
    let plain = text.trim().replace('_', "").to_lowercase();
    let (sign, digits) = plain.split_at(usize::from(plain.starts_with(['-', '+'])));
    let prefix = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let digits = digits.strip_prefix(prefix).unwrap_or(digits);
    let signed = digits.starts_with(['-', '+']);
    if !(2..=36).contains(&base) || signed {
        return Ok(default);
    }
    let integer = i128::from_str_radix(&format!("{sign}{digits}"), base).ok().map(Value::from);
    Ok(integer.or_else(|| number(text).and_then(whole)).unwrap_or(default))
}

/// Text as Python's `float` reads it.
fn number(text: &str) -> Option<f64> {
    text.trim().replace('_', "").parse().ok()
}

/// `indent(width=4, first=false, blank=false)`, the width a number of spaces or text.
fn indent(text: String, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let arguments = arguments.into_values();
    type Given = (Option<Value>, Option<bool>, Option<bool>, Kwargs);
    let (width, first, blank, named) = from_args::<Given>(&arguments)?;
    let width = width.or(named.get("width")?).unwrap_or(Value::from(4));
    let first = first.or(named.get("first")?).unwrap_or(false);
    let blank = blank.or(named.get("blank")?).unwrap_or(false);
    named.assert_all_used()?;
    let indent = match width.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(width)?.min(1000)),
    };
    let mut indented = String::new();
    let line_end = |text: &str| text.ends_with('\n');
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            indented.push('\n');
        }
        let last_of_an_ended_text = line_end(&text) && indented.len() >= text.len();
        if (index == 0 && first) || (index > 0 && (blank || !line.is_empty()) && !last_of_an_ended_text) {
            indented.push_str(&indent);
        }
        indented.push_str(line);
    }
    Ok(indented)
}

/// `truncate(length=255, killwords=false, end='...', leeway=5)`.
fn truncate(text: String, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let arguments = arguments.into_values();
    type Given = (Option<usize>, Option<bool>, Option<String>, Option<usize>, Kwargs);
    let (length, killwords, end, leeway, named) = from_args::<Given>(&arguments)?;
    let length = length.or(named.get("length")?).unwrap_or(255);
    let killwords = killwords.or(named.get("killwords")?).unwrap_or(false);
    let end = end.or(named.get("end")?).unwrap_or("...".into());
    let leeway = leeway.or(named.get("leeway")?).unwrap_or(5);
    named.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("truncate: length {length} is below that of {end:?}"),
        ));
    };
    let start: String = text.chars().take(kept).collect();
    let start = if killwords { &start } else { start.rsplit_once(' ').map_or(&*start, |(before, _)| before) };
    Ok(format!("{start}{end}"))
}

/// `dictsort(case_sensitive=false, by='key', reverse=false)`.
fn dictsort(value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<Vec<Value>, Error> {
    let arguments = arguments.into_values();
    type Given = (Option<bool>, Option<String>, Option<bool>, Kwargs);
    let (case_sensitive, by, reverse, named) = from_args::<Given>(&arguments)?;
    let case_sensitive = case_sensitive.or(named.get("case_sensitive")?).unwrap_or(false);
    let by = by.or(named.get("by")?).unwrap_or("key".into());
    let reverse = reverse.or(named.get("reverse")?).unwrap_or(false);
    named.assert_all_used()?;
    let of = match by.as_str() {
        "key" => 0,
        "value" => 1,
        other => {
            let message = format!("dictsort: by: expected key or value, got {other}");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    if value.kind() != ValueKind::Map {
        let message = format!("dictsort: expected a map, got {}", value.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let mut pairs = Vec::new();
    for key in value.try_iter()? {
        let pair = [key.clone(), value.get_item(&key)?];
        let order = match pair[of].as_str() {
            Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
            _ => pair[of].clone(),
        };
        pairs.push((order, pair));
    }
    pairs.sort_by(|(a, _), (b, _)| if reverse { b.cmp(a) } else { a.cmp(b) });
    Ok(pairs.into_iter().map(|(_, pair)| Value::from(minijinja::value::Tuple::from(pair))).collect())
}

/// What Python's `dict` makes of a map or pairs, then names.
fn dict(function: &str, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let arguments = arguments.into_values();
    let (first, named) = from_args::<(Option<Value>, Kwargs)>(&arguments)?;
    let Some(pairs) = first.filter(|first| first.kind() != ValueKind::Map) else {
        let first = from_args::<(Option<Value>, Kwargs)>(&arguments)?.0;
        return functions::dict(first, named);
    };
    let mut texts: Vec<(String, Value)> = Vec::new();
    for pair in pairs.try_iter()? {
        let (name, value) = (pair.get_item_by_index(0)?, pair.get_item_by_index(1)?);
        let wrong =
            || Error::new(ErrorKind::InvalidOperation, format!("{function}: expected texts as names, got {name}"));
        texts.push((name.as_str().ok_or_else(wrong)?.to_owned(), value));
    }
    for name in named.args() {
        texts.push((name.to_owned(), named.peek(name)?));
    }
    functions::dict(None, Kwargs::from_iter(texts))
}
