//! Lines for people on standard error, which may be closed: nothing of what a command does depends on whether they are read.

use std::fmt::Display;
use std::io::Write;

use crate::ranks;

/// Writes one line, if anybody listens; of several processes of a job one does.
pub fn notice(line: impl Display) {
    if ranks::speaks() {
        write(line);
    }
}

/// The same of an error, which every process may have one of its own of.
pub fn error(line: impl Display) {
    if ranks::tells_errors() {
        write(line);
    }
}

fn write(line: impl Display) {
    // In one write, so that two processes do not mix their words.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
