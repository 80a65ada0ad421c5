//! JSON as the files beside a checkpoint have it: written by Python, whose `json` has numbers that JSON does not.

use std::borrow::Cow;

use serde_json::Value;

/// The numbers of Python's `json` that are none of JSON's.
const NO_NUMBERS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Reads a document. A byte order mark before it is skipped. Where it says `NaN`, `Infinity` or `-Infinity`, which Python writes and
/// reads, the value is a text of that name: nothing that expects a number takes it for one.
///
/// ```
/// let config = phase_moe::checkpoint::parse_json(r#"{"loss": NaN, "note": "NaN, Infinity"}"#)?;
/// assert_eq!(config["loss"], "NaN");
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// # Errors
/// What is wrong with it as JSON.
pub fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(&quoted(text.strip_prefix('\u{feff}').unwrap_or(text)))
}

/// The document with quotes around the numbers that are none.
fn quoted(text: &str) -> Cow<'_, str> {
    let mut out = String::new();
    // Up to where the text is in `out`.
    let (mut done, mut at) = (0, 0);
    while let Some(&byte) = text.as_bytes().get(at) {
        at += match byte {
            b'"' => string_length(&text.as_bytes()[at..]),
            b'N' | b'I' | b'-' => match NO_NUMBERS.into_iter().find(|name| text[at..].starts_with(name)) {
                Some(name) => {
                    out.extend([&text[done..at], "\"", name, "\""]);
                    done = at + name.len();
                    name.len()
                }
                None => 1,
            },
            _ => 1,
        };
    }
    if done == 0 {
        return text.into();
    }
    out.push_str(&text[done..]);
    out.into()
}

/// Bytes of the string that `bytes` begins with, its quotes included; all of them where it does not end.
fn string_length(bytes: &[u8]) -> usize {
    let mut escaped = false;
    for (at, &byte) in bytes.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_python_writes_is_read_and_what_it_refuses_is_refused() {
        let cases = [
            ("{}", json!({})),
            ("\u{feff} [1, -2.5e3]", json!([1, -2500.0])),
            ("NaN", json!("NaN")),
            (r#"[NaN,Infinity , -Infinity, -1, "NaN"]"#, json!(["NaN", "Infinity", "-Infinity", -1, "NaN"])),
            (
                r#"{"a \" NaN": "\\", "b": NaN, "é": "é\\\"Infinity"}"#,
                json!({"a \" NaN": "\\", "b": "NaN", "é": "é\\\"Infinity"}),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        for text in
            ["", "nan", "inf", "+Infinity", "NaNs", "[NaN1]", "-NaN", "{NaN: 1}x", "\"NaN", "[1,]", "\u{feff}\u{feff}1"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
