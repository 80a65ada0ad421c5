//! Rust source as tokens: identifiers, `::` and single characters. Comments, strings and attributes other than `cfg(test)` are left out.

/// A token of the source.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    Word(String),
    /// `::`.
    Colons,
    Sign(char),
    /// `#[cfg(test)]`, or another attribute that names `cfg` and `test`.
    CfgTest,
}

impl Token {
    pub fn is(&self, sign: char) -> bool {
        *self == Self::Sign(sign)
    }

    pub fn word(&self) -> Option<&str> {
        if let Self::Word(word) = self { Some(word) } else { None }
    }
}

/// Where a string that starts with its opening quote ends.
fn after_string(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != '"' {
        at += 1 + usize::from(rest[at] == '\\');
    }
    at + 1
}

/// Where a raw string ends, if this is one: `r"…"`, `r#"…"#`.
fn after_raw_string(rest: &[char]) -> Option<usize> {
    let hashes = rest.iter().skip(1).take_while(|&&c| c == '#').count();
    (rest[0] == 'r' && rest.get(1 + hashes) == Some(&'"')).then(|| {
        let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
        let inside = &rest[2 + hashes..];
        2 + hashes + inside.windows(end.len()).position(|w| w == end).map_or(inside.len(), |at| at + end.len())
    })
}

/// Where a block comment ends, inner ones counted.
fn after_comment(rest: &[char]) -> usize {
    let (mut at, mut depth) = (2, 1);
    while at < rest.len() && depth > 0 {
        match rest[at..] {
            ['/', '*', ..] => (at, depth) = (at + 2, depth + 1),
            ['*', '/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    at
}

/// What follows `#`: an attribute's tokens, and where it ends.
fn attribute(rest: &[char]) -> Option<(Vec<Token>, usize)> {
    let open = if rest.get(1) == Some(&'!') { 2 } else { 1 };
    if rest.get(open) != Some(&'[') {
        return None;
    }
    let (mut at, mut depth) = (open, 0);
    while at < rest.len() {
        match rest[at] {
            '[' => depth += 1,
            ']' => depth -= 1,
            '"' => at += after_string(&rest[at..]) - 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            break;
        }
    }
    Some((tokens(&rest[open + 1..at - 1].iter().collect::<String>()), at))
}

/// The tokens of a source.
pub fn tokens(source: &str) -> Vec<Token> {
    let source: Vec<char> = source.chars().collect();
    let (mut at, mut tokens) = (0, Vec::new());
    while at < source.len() {
        let rest = &source[at..];
        at += match rest {
            ['/', '/', ..] => rest.iter().take_while(|&&c| c != '\n').count(),
            ['/', '*', ..] => after_comment(rest),
            ['"', ..] => after_string(rest),
            ['b', '"', ..] => 1 + after_string(&rest[1..]),
            ['b', 'r', '"' | '#', ..] => 1 + after_raw_string(&rest[1..]).unwrap_or(1),
            ['r', '"' | '#', ..] if after_raw_string(rest).is_some() => after_raw_string(rest).unwrap(),
            // A character, or else a lifetime, of which only the quote is left out.
            ['\'', '\\', _, ..] => 3 + rest[3..].iter().take_while(|&&c| c != '\'').count() + 1,
            ['\'', _, '\'', ..] => 3,
            ['\'', ..] => 1 + rest[1..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').count(),
            ['#', ..] if attribute(rest).is_some() => {
                let (inside, end) = attribute(rest).unwrap();
                let names = |name: &str| inside.iter().any(|token| token.word() == Some(name));
                if names("cfg") && names("test") && !names("not") {
                    tokens.push(Token::CfgTest);
                }
                end
            }
            [':', ':', ..] => {
                tokens.push(Token::Colons);
                2
            }
            [c, ..] if c.is_alphanumeric() || *c == '_' => {
                let word: String = rest.iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
                let length = word.chars().count();
                tokens.push(Token::Word(word));
                length
            }
            [c, ..] => {
                if !c.is_whitespace() {
                    tokens.push(Token::Sign(*c));
                }
                1
            }
            [] => unreachable!("`at` is inside"),
        };
    }
    tokens
}
