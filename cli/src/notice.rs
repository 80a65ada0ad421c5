//! Lines for people on standard error, which may be closed: nothing of what a command does depends on whether they are read.

use std::fmt::Display;
use std::io::Write;

/// Writes one line, if anybody listens.
pub fn notice(line: impl Display) {
    // In one write, so that two processes do not mix their words.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
