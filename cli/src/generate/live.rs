//! The line that says how a generation goes, on standard error while its text appears on standard output; there only where standard error is
//! a terminal, and gone before anything else is said.
//!
//! Both may be the same terminal. The line then stands in the row below the text, where it is drawn after a piece of text and
//! wiped away before the text comes to that row: standard output gets the text and nothing else, in the pieces that it comes in.
//!
//! ```text
//! And God said unto him, What is
//! 24 tokens, 210 tokens/s, 100.0 % of slots kept, 61.2 % of experts hit
//! ```

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::terminal::is_terminal;
use console::{Term, measure_text_width, style, truncate_str};

/// A line changes no more often.
const PACE: Duration = Duration::from_millis(100);

/// Down a row, which scrolls where there is none, and up again: then there is one below. Keeps the column, as a line feed does not.
const MAKE_ROOM: &str = "\x0b\x1b[A";
/// Saves where the text goes on, and stands at the start of the next row, which is empty then.
const BELOW: &str = "\x1b7\x1b[B\r\x1b[K";
/// Where the text goes on.
const BACK: &str = "\x1b8";
/// Wipes all after the end of the text.
const WIPE_BELOW: &str = "\x1b[J";
/// An empty row, from its start.
const WIPE: &str = "\r\x1b[K";

/// A line that comes and goes.
pub struct Live {
    place: Place,
    /// Where in its row the text ends.
    column: usize,
    drawn: bool,
    last: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nowhere.
    Hidden,
    /// In the row of the cursor: the text is elsewhere.
    Here,
    /// Under the text.
    Below,
}

impl Live {
    /// One that nobody sees where standard error is no terminal, or one that cannot move its cursor.
    pub fn new(quiet: bool) -> Self {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        let place = match (is_terminal(), std::io::stderr().is_terminal()) {
            _ if quiet || is_dumb => Place::Hidden,
            (_, false) => Place::Hidden,
            (false, true) => Place::Here,
            (true, true) => where_both_are(),
        };
        Self { place, column: 0, drawn: false, last: None }
    }

    /// Makes way for `text`, which is written next.
    pub fn before(&mut self, text: &str) {
        if self.place != Place::Below || text.is_empty() {
            return;
        }
        let (column, stays) = end_of(self.column, text, columns());
        // At the right edge too: what is wiped there is a letter.
        if !stays {
            self.wipe();
        }
        self.column = column;
    }

    /// Says how it goes, where that was not said just now; what was written before is on the terminal.
    pub fn after(&mut self, status: impl FnOnce() -> String) {
        let is_due = !self.drawn || self.last.is_none_or(|last| last.elapsed() >= PACE);
        // At the right edge a terminal goes to the next row before it writes again, or not: leave it.
        if self.place == Place::Hidden || !is_due || (self.place == Place::Below && self.column >= columns()) {
            return;
        }
        let status = style(truncate_str(&status(), columns().saturating_sub(1), "…").into_owned()).for_stderr().dim();
        self.write(&match self.place {
            Place::Below => format!("{MAKE_ROOM}{BELOW}{status}{BACK}"),
            _ => format!("{WIPE}{status}"),
        });
        (self.drawn, self.last) = (true, Some(Instant::now()));
    }

    /// The line goes.
    pub fn wipe(&mut self) {
        if std::mem::take(&mut self.drawn) {
            self.write(if self.place == Place::Below { WIPE_BELOW } else { WIPE });
        }
    }

    /// Nothing depends on whether anybody sees it.
    fn write(&self, text: &str) {
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// Also before an error is printed.
impl Drop for Live {
    fn drop(&mut self) {
        self.wipe();
    }
}

/// Columns of the terminal.
fn columns() -> usize {
    Term::stderr().size_checked().map_or(80, |(_, columns)| usize::from(columns)).max(1)
}

/// Where `text` ends that begins at a column of a row of `width`, and whether it stays in that row, its last column left free.
fn end_of(column: usize, text: &str, width: usize) -> (usize, bool) {
    let (mut column, mut stays) = (column, true);
    for letter in text.chars() {
        let wide = measure_text_width(letter.encode_utf8(&mut [0; 4]));
        let wraps = column + wide > width;
        column = match letter {
            '\n' | '\r' => 0,
            '\t' => ((column / 8 + 1) * 8).min(width - 1),
            _ if wraps => wide,
            _ => column + wide,
        };
        // Sequences that move the cursor are not followed.
        stays &= !letter.is_control() && !wraps && column < width;
    }
    (column, stays)
}

/// Where both streams are terminals: below the text if that is one terminal, with room for a line.
#[cfg(unix)]
fn where_both_are() -> Place {
    use std::fs::File;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::fs::MetadataExt;

    let device = |stream: BorrowedFd<'_>| Some(File::from(stream.try_clone_to_owned().ok()?).metadata().ok()?.rdev());
    match (device(std::io::stdout().as_fd()), device(std::io::stderr().as_fd())) {
        (Some(text), Some(line)) if text != line => Place::Here,
        (Some(_), Some(_)) => {
            let has_room = Term::stderr().size_checked().is_some_and(|(rows, columns)| rows >= 3 && columns >= 20);
            if has_room { Place::Below } else { Place::Hidden }
        }
        _ => Place::Hidden,
    }
}

#[cfg(not(unix))]
fn where_both_are() -> Place {
    Place::Hidden
}

#[cfg(test)]
mod tests {
    use super::end_of;

    #[test]
    fn where_a_text_ends_is_known_before_it_is_written() {
        for (column, text, expected) in [
            (0, "In the", (6, true)),
            (6, "", (6, true)),
            (6, " b", (8, true)),
            (8, "eg", (10, false)),
            (10, "i", (1, false)),
            (9, "漢", (2, false)),
            (7, "漢", (9, true)),
            (3, "a\u{301}", (4, true)),
            (3, "a\n", (0, false)),
            (3, "a\nbc", (2, false)),
            (1, "\t", (8, false)),
            (4, "0123456789", (4, false)),
        ] {
            assert_eq!(end_of(column, text, 10), expected, "{text:?} from {column}");
        }
    }
}
