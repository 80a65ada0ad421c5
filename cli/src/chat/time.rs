//! `strftime_now` of chat templates: local time by the letters of Python's `datetime.now().strftime`.

use jiff::Zoned;
use jiff::fmt::strtime;

/// The time as a format has it, in English; what is no directive stays as it is, as with the C library.
///
/// Python's time of day has no zone, so that `%z` and `%Z` are empty.
pub fn written(now: &Zoned, format: &str) -> String {
    let mut text = String::new();
    let mut rest = format;
    while let Some(start) = rest.find('%') {
        text.push_str(&rest[..start]);
        rest = &rest[start..];
        let options = rest[1..].find(|letter: char| !"_-0^#123456789".contains(letter)).map_or(rest.len(), |at| at + 1);
        // `%Ey` and `%Od` are for other calendars and digits.
        let (skipped, letter) = match rest[options..].chars().next() {
            Some('E' | 'O') => (1, rest[options + 1..].chars().next()),
            letter => (0, letter),
        };
        let length = options + skipped + letter.map_or(0, char::len_utf8);
        match letter.and_then(|letter| directive(now, &rest[1..options], letter)) {
            Some(written) => text.push_str(&written),
            None => text.push_str(&rest[..length]),
        }
        rest = &rest[length..];
    }
    text.push_str(rest);
    text
}

/// One directive with what stands between `%` and its letter.
fn directive(now: &Zoned, options: &str, letter: char) -> Option<String> {
    let format = |format: &str| strtime::format(format, now).ok();
    match letter {
        'f' => Some(format!("{:06}", now.subsec_nanosecond() / 1000)),
        'z' | 'Z' => Some(String::new()),
        'c' => format("%a %b %e %H:%M:%S %Y"),
        'x' | 'D' => format("%m/%d/%y"),
        'X' | 'T' => format("%H:%M:%S"),
        'r' => format("%I:%M:%S %p"),
        'F' => format("%Y-%m-%d"),
        'R' => format("%H:%M"),
        'n' => Some("\n".into()),
        't' => Some("\t".into()),
        '%' => Some("%".into()),
        // Names in the other case are capitals.
        'a' | 'A' | 'b' | 'B' | 'h' => format(&format!("%{}{letter}", options.replace('#', "^"))),
        'd' | 'e' | 'H' | 'I' | 'j' | 'k' | 'l' | 'M' | 'm' | 'p' | 'P' | 'S' | 's' | 'u' | 'U' | 'V' | 'w' | 'W'
        | 'y' | 'Y' | 'C' | 'G' | 'g' => format(&format!("%{options}{letter}")),
        _ => None,
    }
}
