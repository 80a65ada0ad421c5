//! A template's text before it is read: what Python's Jinja and transformers understand and the engine does not.

use std::borrow::Cow;

/// With `\n` at every line's end; `{% generation %}` .. `{% endgeneration %}`, which transformers looks at in training alone, as a
/// block that writes what is in it; escapes in texts as Python reads them.
///
/// That block is `with`, whose variables are its own too. Lines stay what they are, so that an error names the file's.
pub fn prepared(template: &str) -> String {
    let lines = match template.contains('\r') {
        true => Cow::Owned(template.replace("\r\n", "\n").replace('\r', "\n")),
        false => Cow::Borrowed(template),
    };
    let mut text = String::with_capacity(lines.len());
    let mut rest = &*lines;
    while let Some(start) = tag_start(rest) {
        text.push_str(&rest[..start]);
        rest = &rest[start..];
        let length = match rest.as_bytes()[1] {
            b'#' => rest.find("#}").map_or(rest.len(), |end| end + 2),
            b'%' => raw_block(rest).unwrap_or(0),
            _ => 0,
        };
        text.push_str(&rest[..length]);
        rest = &rest[length..];
        if length == 0 {
            let tag = &rest[..tag_length(rest)];
            match generation(tag) {
                Some([before, block, after]) => text.extend([before, block, after]),
                None => push_escaped(&mut text, tag),
            }
            rest = &rest[tag.len()..];
        }
    }
    text.push_str(rest);
    text
}

/// Where the next `{{`, `{%` or `{#` is.
fn tag_start(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|pair| matches!(pair, b"{{" | b"{%" | b"{#"))
}

/// The bytes of a tag up to its end, which is neither in a text nor in brackets; all, where it has none.
fn tag_length(tag: &str) -> usize {
    let bytes = tag.as_bytes();
    let end: &[u8] = if bytes[1] == b'%' { b"%}" } else { b"}}" };
    let (mut at, mut depth) = (2, 0usize);
    while at < bytes.len() {
        if depth == 0 && bytes[at..].starts_with(end) {
            return at + 2;
        }
        match bytes[at] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' | b'\'' => at += text_length(&bytes[at..]) - 1,
            _ => (),
        }
        at += 1;
    }
    bytes.len()
}

/// The bytes of a text in quotes; all, where it does not end.
fn text_length(text: &[u8]) -> usize {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            letter if letter == text[0] => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// The tags of the block `generation` as those of `with`.
fn generation(tag: &str) -> Option<[&str; 3]> {
    let (before, name, after) = tag_name(tag)?;
    let block = match name {
        "generation" => "with",
        "endgeneration" => "endwith",
        _ => return None,
    };
    is_tag_end(after).then_some([before, block, after])
}

/// A block's tag cut at its name.
fn tag_name(tag: &str) -> Option<(&str, &str, &str)> {
    let inner = tag.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let start = tag.len() - inner.len();
    let end =
        inner.find(|letter: char| !letter.is_alphanumeric() && letter != '_').map_or(tag.len(), |end| start + end);
    Some((&tag[..start], &tag[start..end], &tag[end..]))
}

/// Whether it is all that follows a name.
fn is_tag_end(after: &str) -> bool {
    let after = after.trim_start();
    after.strip_prefix(['-', '+']).unwrap_or(after) == "%}"
}

/// The bytes of a `raw` block with its end, where one starts here.
fn raw_block(text: &str) -> Option<usize> {
    let tag = |at: usize| {
        let end = at + text[at..].find("%}")? + 2;
        let (_, name, after) = tag_name(&text[at..end])?;
        is_tag_end(after).then_some((name, end))
    };
    let ("raw", mut at) = tag(0)? else { return None };
    while let Some(start) = text[at..].find("{%") {
        at += start;
        if let Some(("endraw", end)) = tag(at) {
            return Some(end);
        }
        at += 2;
    }
    Some(text.len())
}

/// A tag whose texts have the escapes that the engine knows.
fn push_escaped(out: &mut String, tag: &str) {
    let bytes = tag.as_bytes();
    let (mut at, mut copied) = (0, 0);
    while at < bytes.len() {
        if !matches!(bytes[at], b'"' | b'\'') {
            at += 1;
            continue;
        }
        let end = at + text_length(&bytes[at..]);
        while let Some(escape) = bytes[at..end].iter().position(|&byte| byte == b'\\') {
            at += escape;
            let (length, written) = match bytes.get(at + 1) {
                Some(b'/') => (2, r"\\/".to_owned()),
                Some(b'a') => (2, r"\x07".to_owned()),
                Some(b'v') => (2, r"\x0b".to_owned()),
                Some(b'U') => match tag.get(at + 2..at + 10).and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
                    Some(code) if code > 0x7f => match char::from_u32(code) {
                        Some(letter) => (10, letter.to_string()),
                        None => (0, String::new()),
                    },
                    _ => (0, String::new()),
                },
                _ => (0, String::new()),
            };
            if length > 0 {
                out.push_str(&tag[copied..at]);
                out.push_str(&written);
                copied = at + length;
            }
            at += length.max(2);
            if at >= end {
                break;
            }
        }
        at = end;
    }
    out.push_str(&tag[copied..]);
}
