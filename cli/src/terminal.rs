//! What standard output can show: how wide it is, whether in colour, and whether more than ASCII.
//!
//! Reports are written for it as one text, in Unicode; where the locale has ASCII alone, a few characters become others on the way out.

use std::io::{IsTerminal, Write};

use anyhow::Result;
use clap::ColorChoice;
use console::{Style, Term};

use crate::ranks;

/// Columns where there is no terminal to ask.
const WIDTH: usize = 80;

/// Fewer columns than this hold no table.
const LEAST_WIDTH: usize = 40;

/// Standard output, as far as a report has to know it.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// Columns.
    pub width: usize,
    colour: bool,
    unicode: bool,
}

/// How a text stands out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mark {
    /// The best of its kind.
    Best,
    /// A loss.
    Bad,
    /// What explains something else.
    Aside,
}

impl Terminal {
    /// As standard output is. In a pipe there are 80 columns, or as many as `COLUMNS` says, and colour only where it is asked for.
    pub fn of_stdout(colour: ColorChoice) -> Self {
        let stdout = Term::stdout();
        let asked = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        let width = match is_terminal() {
            // A terminal that does not know its width says 0.
            true => stdout.size_checked().map(|(_, columns)| usize::from(columns)).filter(|&columns| columns > 0),
            false => asked(),
        };
        let colour = match colour {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // Off a terminal and where `NO_COLOR` is set there is none.
            ColorChoice::Auto => console::colors_enabled() && !ranks::is_job(),
        };
        Self {
            width: width.unwrap_or(WIDTH).max(LEAST_WIDTH),
            colour,
            unicode: is_unicode(|name| std::env::var(name).ok()),
        }
    }

    /// Plain text of so many columns.
    #[cfg(test)]
    pub fn plain(width: usize) -> Self {
        Self { width, colour: false, unicode: true }
    }

    /// The same with colours.
    #[cfg(test)]
    pub fn in_colour(self) -> Self {
        Self { colour: true, ..self }
    }

    /// `text` as it stands out here.
    pub fn marked(&self, mark: Mark, text: &str) -> String {
        let style = Style::new().force_styling(self.colour);
        match mark {
            Mark::Best => style.bold(),
            Mark::Bad => style.red(),
            Mark::Aside => style.dim(),
        }
        .apply_to(text)
        .to_string()
    }

    /// Writes a report to standard output.
    pub fn print(&self, report: &str) -> Result<()> {
        let report = if self.unicode { report.to_owned() } else { report.chars().map(ascii).collect() };
        write_out(report.as_bytes())
    }

    /// `text` in lines of at most the width, broken between words; all but the first begin with `indent` spaces.
    pub fn wrapped(&self, text: &str, indent: usize) -> String {
        let (mut wrapped, mut column) = (String::new(), 0);
        for word in text.split(' ') {
            let width = console::measure_text_width(word);
            if column > indent && column + width > self.width {
                wrapped.truncate(wrapped.trim_end_matches(' ').len());
                wrapped.push('\n');
                wrapped.push_str(&" ".repeat(indent));
                column = indent;
            }
            wrapped.push_str(word);
            wrapped.push(' ');
            column += width + 1;
        }
        wrapped.truncate(wrapped.trim_end_matches(' ').len());
        wrapped
    }
}

/// Whether somebody looks at standard output. The processes of a job all have a terminal of their launcher's, whatever that one writes to.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal() && !ranks::is_job()
}

/// Writes to standard output as it is.
pub fn write_out(bytes: &[u8]) -> Result<()> {
    Ok(std::io::stdout().write_all(bytes)?)
}

/// Whether the locale's characters are Unicode's: the first of the variables that is set decides, as for the C library.
fn is_unicode(variable: impl Fn(&str) -> Option<String>) -> bool {
    if cfg!(windows) {
        return true;
    }
    let set = |name: &&str| variable(name).is_some_and(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find(set).and_then(variable).unwrap_or_default();
    let locale = locale.to_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// The bars of loads, lowest first.
pub const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What stands for a character of a report where there is ASCII alone.
fn ascii(character: char) -> char {
    const BARS_IN_ASCII: [char; 8] = ['.', ':', '-', '=', '+', '*', '#', '@'];
    match character {
        '×' => 'x',
        '–' | '−' => '-',
        _ => BARS.iter().position(|&bar| bar == character).map_or(character, |bar| BARS_IN_ASCII[bar]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_is_the_locale() {
        let locale = |set: &[(&str, &str)]| {
            is_unicode(|name| set.iter().find(|(is, _)| *is == name).map(|(_, value)| value.to_string()))
        };
        assert!(locale(&[("LANG", "en_GB.UTF-8")]) && locale(&[("LC_ALL", ""), ("LC_CTYPE", "C.utf8")]));
        assert!(!locale(&[]) && !locale(&[("LANG", "C")]) && !locale(&[("LC_ALL", "C"), ("LANG", "C.UTF-8")]));
    }

    #[test]
    fn every_bar_and_sign_has_its_own_in_ascii() {
        let bars: String = BARS.into_iter().map(ascii).collect();
        assert!(bars.is_ascii());
        assert_eq!(bars.chars().collect::<std::collections::HashSet<_>>().len(), 8);
        assert_eq!("2.00 × –".chars().map(ascii).collect::<String>(), "2.00 x -");
    }

    #[test]
    fn text_is_broken_between_words() {
        let text =
            Terminal::plain(40).wrapped("  max load  the fullest expert's load over its share of the demand", 12);
        assert_eq!(text, "  max load  the fullest expert's load\n            over its share of the demand");
        let long = "x".repeat(60);
        assert_eq!(Terminal::plain(40).wrapped(&long, 4), long, "a word is never broken");
    }

    #[test]
    fn what_stands_out_is_marked_in_colour_alone() {
        let plain = Terminal::plain(80);
        assert_eq!(plain.marked(Mark::Bad, "x"), "x");
        assert_eq!(plain.in_colour().marked(Mark::Bad, "x"), "\u{1b}[31mx\u{1b}[0m");
    }
}
