//! `completions` and `man`: what shells and manuals know of the command line, made from its own description; and words as a shell takes them.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use clap_complete::Shell;
use clap_mangen::Man as Page;

use crate::output::{Destination, Inputs};
use crate::terminal::write_out;

/// Writes completions for a shell to standard output.
///
/// Example: phase-moe completions bash > ~/.local/share/bash-completion/completions/phase-moe
#[derive(Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub fn run(self, mut line: clap::Command) -> Result<()> {
        let (name, mut script) = (line.get_name().to_owned(), Vec::new());
        clap_complete::generate(self.shell, &mut line, name, &mut script);
        write_out(&script)
    }
}

/// Writes the manual: the main page to standard output, or all pages into a directory.
///
/// Example: phase-moe man --out ~/.local/share/man/man1
#[derive(Args)]
pub struct Man {
    /// Directory for phase-moe.1 and a page of each command [default: phase-moe.1 alone, to standard output]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Man {
    pub fn run(self, mut line: clap::Command) -> Result<()> {
        // Gives each command its full name.
        line.build();
        let Some(directory) = self.out else { return write_out(&page(line.clone())?.1) };
        let of_commands = line.get_subcommands().filter(|command| command.get_name() != "help").cloned();
        for command in std::iter::once(line.clone()).chain(of_commands) {
            let (name, page) = page(command)?;
            let out = Destination::open("--out", &directory.join(name))?;
            out.apart_from(&Inputs::default())?.write(&page)?;
        }
        Ok(())
    }
}

/// Name and text of a command's page.
fn page(command: clap::Command) -> Result<(String, Vec<u8>)> {
    let (page, mut text) = (Page::new(command), Vec::new());
    page.render(&mut text)?;
    Ok((page.get_filename(), text))
}

/// A word as a shell would take it back.
pub fn quoted(word: &str) -> String {
    let plain = |character: char| character.is_alphanumeric() || "-_.,/:=+@%".contains(character);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_are_quoted_where_a_shell_would_part_them() {
        let words = ["--tokens", "1,2", "And it", "it's", "", "$x", "größe"];
        let expected = ["--tokens", "1,2", "'And it'", r"'it'\''s'", "''", "'$x'", "größe"];
        assert_eq!(words.map(quoted), expected);
    }
}
