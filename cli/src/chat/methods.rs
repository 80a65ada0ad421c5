//! Python's methods of texts, lists and maps, as chat templates call them. Those that change something are refused by transformers.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use unicode_categories::UnicodeCategories;

/// What a method that the engine does not know gives.
pub fn call(_: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => text(value.as_str().unwrap_or_default(), method, arguments),
        ValueKind::Map => map(value, method, arguments),
        ValueKind::Seq => list(value, method, arguments),
        ValueKind::Number => number(value, method, arguments),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// A call's arguments by place or by name.
struct Arguments<'a> {
    method: &'a str,
    positional: &'a [Value],
    named: Kwargs,
}

impl<'a> Arguments<'a> {
    /// Of at most as many as there are names.
    fn new(method: &'a str, names: &[&str], arguments: &'a [Value]) -> Result<Self, Error> {
        let (positional, named) = from_args::<(&[Value], Kwargs)>(arguments)?;
        if positional.len() > names.len() {
            let message = format!("{method}: expected at most {}, got {}", names.len(), positional.len());
            return Err(Error::new(ErrorKind::TooManyArguments, message));
        }
        if let Some(name) = named.args().find(|name| !names.contains(name)) {
            return Err(Error::new(ErrorKind::TooManyArguments, format!("{method}: unknown argument `{name}`")));
        }
        Ok(Self { method, positional, named })
    }

    /// None where it is not given or `none`.
    fn value(&self, index: usize, name: &str) -> Result<Option<Value>, Error> {
        let value = match self.positional.get(index) {
            Some(value) => Some(value.clone()),
            None => self.named.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none()))
    }

    fn text(&self, index: usize, name: &str) -> Result<Option<String>, Error> {
        let Some(value) = self.value(index, name)? else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(self.wrong(name, "text", &value)),
        }
    }

    fn needed(&self, index: usize, name: &str) -> Result<String, Error> {
        let missing = || Error::new(ErrorKind::MissingArgument, format!("{}: `{name}` is missing", self.method));
        self.text(index, name)?.ok_or_else(missing)
    }

    fn integer(&self, index: usize, name: &str) -> Result<Option<i64>, Error> {
        let Some(value) = self.value(index, name)? else { return Ok(None) };
        i64::try_from(value.clone()).map(Some).map_err(|_| self.wrong(name, "an integer", &value))
    }

    fn wrong(&self, name: &str, expected: &str, got: &Value) -> Error {
        let message = format!("{}: {name}: expected {expected}, got {}", self.method, got.kind());
        Error::new(ErrorKind::InvalidOperation, message)
    }
}

fn text(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let of = |names: &[&str]| Arguments::new(method, names, arguments);
    let all = |is: fn(char) -> bool| {
        of(&[])?;
        Ok(Value::from(!text.is_empty() && text.chars().all(is)))
    };
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let set = of(&["chars"])?.text(0, "chars")?;
            let strip = |letter: char| set.as_ref().map_or(is_space(letter), |set| set.contains(letter));
            let text = if method == "rstrip" { text } else { text.trim_start_matches(strip) };
            Ok(Value::from(if method == "lstrip" { text } else { text.trim_end_matches(strip) }))
        }
        "split" | "rsplit" => {
            let arguments = of(&["sep", "maxsplit"])?;
            let (separator, most) = (arguments.text(0, "sep")?, arguments.integer(1, "maxsplit")?.unwrap_or(-1));
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            if separator.as_deref() == Some("") {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: empty separator")));
            }
            Ok(Value::from(split(text, separator.as_deref(), most, method == "rsplit")))
        }
        "partition" | "rpartition" => {
            let separator = of(&["sep"])?.needed(0, "sep")?;
            if separator.is_empty() {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: empty separator")));
            }
            let (found, alone) = match method {
                "partition" => (text.split_once(&separator), [text, "", ""]),
                _ => (text.rsplit_once(&separator), ["", "", text]),
            };
            let parts = found.map_or(alone, |(before, after)| [before, &separator, after]);
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        "splitlines" => {
            let keep = of(&["keepends"])?.value(0, "keepends")?.is_some_and(|keep| keep.is_true());
            Ok(Value::from(lines(text, keep)))
        }
        "startswith" | "endswith" => {
            let arguments = of(&["what", "start", "end"])?;
            let Some(what) = arguments.value(0, "what")? else {
                return Err(Error::new(ErrorKind::MissingArgument, format!("{method}: expected text")));
            };
            let (part, _) = part(text, &arguments)?;
            let is = |what: &Value| match (what.as_str(), part) {
                (None, _) => Err(arguments.wrong("what", "text or a tuple of texts", what)),
                (Some(_), None) => Ok(false),
                (Some(what), Some(part)) if method == "startswith" => Ok(part.starts_with(what)),
                (Some(what), Some(part)) => Ok(part.ends_with(what)),
            };
            if what.is_tuple() {
                let mut found = false;
                for what in what.try_iter()? {
                    found |= is(&what)?;
                }
                return Ok(Value::from(found));
            }
            is(&what).map(Value::from)
        }
        "find" | "rfind" | "index" | "rindex" => {
            let arguments = of(&["what", "start", "end"])?;
            let (what, (part, start)) = (arguments.needed(0, "what")?, part(text, &arguments)?);
            let search = |part: &str| if method.starts_with('r') { part.rfind(&what) } else { part.find(&what) };
            match part.and_then(|part| Some(part[..search(part)?].chars().count() + start)) {
                Some(at) => Ok(Value::from(at)),
                None if method.ends_with("find") => Ok(Value::from(-1)),
                None => Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: {what:?} is not in the text"))),
            }
        }
        "count" => {
            let arguments = of(&["what", "start", "end"])?;
            let what = arguments.needed(0, "what")?;
            Ok(Value::from(part(text, &arguments)?.0.map_or(0, |part| part.matches(&what).count())))
        }
        "replace" => {
            let arguments = of(&["old", "new", "count"])?;
            let (old, new) = (arguments.needed(0, "old")?, arguments.needed(1, "new")?);
            let most = arguments.integer(2, "count")?.and_then(|count| usize::try_from(count).ok());
            Ok(Value::from(most.map_or_else(|| text.replace(&old, &new), |most| text.replacen(&old, &new, most))))
        }
        "removeprefix" => {
            let prefix = of(&["prefix"])?.needed(0, "prefix")?;
            Ok(Value::from(text.strip_prefix(&prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let suffix = of(&["suffix"])?.needed(0, "suffix")?;
            Ok(Value::from(text.strip_suffix(&suffix).unwrap_or(text)))
        }
        "join" => {
            let arguments = of(&["items"])?;
            let items = arguments.value(0, "items")?.unwrap_or(Value::UNDEFINED);
            let mut texts = Vec::new();
            for item in items.try_iter()? {
                texts.push(item.as_str().ok_or_else(|| arguments.wrong("items", "texts", &item))?.to_owned());
            }
            Ok(Value::from(texts.join(text)))
        }
        "upper" => of(&[]).map(|_| Value::from(text.to_uppercase())),
        "lower" => of(&[]).map(|_| Value::from(text.to_lowercase())),
        "capitalize" => of(&[]).map(|_| {
            let mut letters = text.chars();
            let first = letters.next().map(|letter| letter.to_uppercase().to_string()).unwrap_or_default();
            Value::from(first + &letters.as_str().to_lowercase())
        }),
        "title" => of(&[]).map(|_| Value::from(title(text))),
        "swapcase" => of(&[]).map(|_| {
            let swapped = |letter: char| match letter.is_uppercase() {
                true => letter.to_lowercase().to_string(),
                false => letter.to_uppercase().to_string(),
            };
            Value::from(text.chars().map(swapped).collect::<String>())
        }),
        "ljust" | "rjust" | "center" => {
            let arguments = of(&["width", "fill"])?;
            let fill = arguments.text(1, "fill")?.unwrap_or(" ".into());
            padded(text, width(&arguments)?, &fill, method).map(Value::from)
        }
        "zfill" => {
            let width = width(&of(&["width"])?)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let zeros = width.saturating_sub(text.chars().count());
            Ok(Value::from(format!("{sign}{}{digits}", "0".repeat(zeros))))
        }
        "isalpha" => all(|letter| letter.is_letter()),
        "isdecimal" => all(|letter| letter.is_number_decimal_digit()),
        "isdigit" => all(is_digit),
        "isnumeric" => all(char::is_numeric),
        "isalnum" => all(|letter| letter.is_letter() || letter.is_numeric()),
        "isspace" => all(is_space),
        "isascii" => of(&[]).map(|_| Value::from(text.is_ascii())),
        "islower" | "isupper" => of(&[]).map(|_| {
            let (lower, upper) = (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase));
            Value::from((lower, upper) == (method == "islower", method == "isupper"))
        }),
        "istitle" => of(&[]).map(|_| {
            let cased = text.chars().any(|letter| letter.is_lowercase() || letter.is_uppercase());
            Value::from(cased && title(text) == text)
        }),
        "isidentifier" => of(&[]).map(|_| {
            let part = |letter: char| letter == '_' || letter.is_letter() || letter.is_number_decimal_digit();
            let digit = text.starts_with(|letter: char| letter.is_number_decimal_digit());
            Value::from(!text.is_empty() && !digit && text.chars().all(part))
        }),
        "format" => format(FormatStyle::StrFormat, text, arguments).map(Value::from),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// What Python takes for white space: Unicode's and four separators of ASCII.
fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

/// Decimal digits, and those that stand high, low or in circles.
fn is_digit(letter: char) -> bool {
    letter.is_number_decimal_digit()
        || matches!(letter,
            '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '\u{1369}'..='\u{1371}' | '\u{19da}'
            | '\u{2460}'..='\u{2468}' | '\u{2474}'..='\u{247c}' | '\u{2488}'..='\u{2490}' | '\u{24ea}'
            | '\u{24f5}'..='\u{24fd}' | '\u{24ff}' | '\u{2776}'..='\u{277e}' | '\u{2780}'..='\u{2788}'
            | '\u{278a}'..='\u{2792}' | '\u{10a40}'..='\u{10a43}' | '\u{10e60}'..='\u{10e68}'
            | '\u{11052}'..='\u{1105a}' | '\u{1f100}'..='\u{1f10a}')
}

/// A text's part between two positions counted in letters, and where it starts; none where that is past its end.
fn part<'a>(text: &'a str, arguments: &Arguments) -> Result<(Option<&'a str>, usize), Error> {
    let letters = text.chars().count();
    let place = |at: i64| match usize::try_from(at) {
        Ok(at) => at,
        Err(_) => (letters as i64).saturating_add(at).max(0) as usize,
    };
    let start = place(arguments.integer(1, "start")?.unwrap_or(0));
    let end = place(arguments.integer(2, "end")?.unwrap_or(i64::MAX)).min(letters);
    if start > end {
        return Ok((None, start));
    }
    let offset = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(offset, _)| offset);
    Ok((text.get(offset(start)..offset(end)), start))
}

/// `split` and, from the end, `rsplit`: at a separator, or at runs of white space.
fn split(text: &str, separator: Option<&str>, most: usize, from_end: bool) -> Vec<Value> {
    let mut parts: Vec<&str> = Vec::new();
    match (separator, from_end) {
        (Some(separator), false) => parts.extend(text.splitn(most.saturating_add(1), separator)),
        (Some(separator), true) => parts.extend(text.rsplitn(most.saturating_add(1), separator)),
        (None, false) => {
            let mut rest = text.trim_start_matches(is_space);
            while !rest.is_empty() {
                let end = rest.find(is_space).filter(|_| parts.len() < most);
                parts.push(end.map_or(rest, |end| &rest[..end]));
                rest = end.map_or("", |end| rest[end..].trim_start_matches(is_space));
            }
        }
        (None, true) => {
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                let space = rest.char_indices().rfind(|&(_, letter)| is_space(letter)).filter(|_| parts.len() < most);
                let start = space.map(|(at, letter)| at + letter.len_utf8());
                parts.push(start.map_or(rest, |start| &rest[start..]));
                rest = start.map_or("", |start| rest[..start].trim_end_matches(is_space));
            }
        }
    }
    if from_end {
        parts.reverse();
    }
    parts.into_iter().map(Value::from).collect()
}

/// Lines by all that Python ends one with.
fn lines(text: &str, keep_ends: bool) -> Vec<Value> {
    let end = |letter| {
        matches!(letter, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some((at, letter)) = rest.char_indices().find(|&(_, letter)| end(letter)) {
        let after = at + if rest[at..].starts_with("\r\n") { 2 } else { letter.len_utf8() };
        lines.push(Value::from(&rest[..if keep_ends { after } else { at }]));
        rest = &rest[after..];
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    lines
}

/// Capitals after what has no case.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut inside = false;
    for letter in text.chars() {
        match inside {
            true => titled.extend(letter.to_lowercase()),
            false => titled.extend(letter.to_uppercase()),
        }
        inside = letter.is_lowercase() || letter.is_uppercase();
    }
    titled
}

fn width(arguments: &Arguments) -> Result<usize, Error> {
    let missing = || Error::new(ErrorKind::MissingArgument, format!("{}: `width` is missing", arguments.method));
    let width = arguments.integer(0, "width")?.ok_or_else(missing)?;
    match usize::try_from(width).unwrap_or(0) {
        width if width > 1_000_000 => {
            let message = format!("{}: width {width} exceeds 1000000", arguments.method);
            Err(Error::new(ErrorKind::InvalidOperation, message))
        }
        width => Ok(width),
    }
}

fn padded(text: &str, width: usize, fill: &str, method: &str) -> Result<String, Error> {
    if fill.chars().count() != 1 {
        let message = format!("{method}: fill: expected one letter, got {fill:?}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let missing = width.saturating_sub(text.chars().count());
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // Where the two sides differ, an odd width has the longer one on the left.
        _ => missing / 2 + (missing & width & 1),
    };
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

fn map(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let pairs = || -> Result<Vec<(Value, Value)>, Error> {
        Arguments::new(method, &[], arguments)?;
        value.try_iter()?.map(|key| Ok((key.clone(), value.get_item(&key)?))).collect()
    };
    match method {
        "get" => {
            let (key, default): (&Value, Option<Value>) = from_args(arguments)?;
            let found = value.get_item(key)?;
            Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
        }
        "keys" => Ok(pairs()?.into_iter().map(|(key, _)| key).collect()),
        "values" => Ok(pairs()?.into_iter().map(|(_, value)| value).collect()),
        "items" => Ok(pairs()?.into_iter().map(|(key, value)| Value::from(Tuple::from([key, value]))).collect()),
        "copy" => Arguments::new(method, &[], arguments).map(|_| value.clone()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn list(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match method {
        "count" => {
            let (what,): (&Value,) = from_args(arguments)?;
            Ok(Value::from(value.try_iter()?.filter(|item| item == what).count()))
        }
        "index" => {
            let (what,): (&Value,) = from_args(arguments)?;
            let missing = || Error::new(ErrorKind::InvalidOperation, format!("index: {what} is not in the list"));
            value.try_iter()?.position(|item| item == *what).map(Value::from).ok_or_else(missing)
        }
        "copy" => Arguments::new(method, &[], arguments).map(|_| value.clone()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn number(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    Arguments::new(method, &[], arguments)?;
    match method {
        "is_integer" => Ok(Value::from(f64::try_from(value.clone())?.fract() == 0.0)),
        "bit_length" if value.is_integer() => {
            let bits = i128::try_from(value.clone())?.unsigned_abs();
            Ok(Value::from(u128::BITS - bits.leading_zeros()))
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}
