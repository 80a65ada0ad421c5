//! The live line of `generate`, on terminals: it is there while a text comes, it never touches the text, and it is gone at the end.
#![cfg(unix)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// One that a command can write on, and what it gets.
struct Terminal {
    path: PathBuf,
    /// Held open until commands have ended, so that nothing of what they wrote is lost.
    held: File,
    /// Who types.
    keys: File,
    got: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
    size: (u16, u16),
}

impl Terminal {
    fn new(rows: u16, columns: u16) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(ptsname(&ours, Vec::new()).unwrap().as_bytes()));
        tcsetwinsize(&ours, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let held = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let (mut ours, got) = (File::from(ours), Arc::new(Mutex::new(Vec::new())));
        let (keys, all) = (ours.try_clone().unwrap(), got.clone());
        let reader = std::thread::spawn(move || {
            let mut some = [0; 4096];
            // An error once nobody holds the other end.
            while let Ok(count @ 1..) = ours.read(&mut some) {
                all.lock().unwrap().extend_from_slice(&some[..count]);
            }
        });
        Self { path, held, keys, got, reader, size: (rows, columns) }
    }

    fn stream(&self) -> Stdio {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap().into()
    }

    /// Types a line once the command has asked for it so often.
    fn type_line(&mut self, asked: usize, line: &str) {
        let began = Instant::now();
        while self.got.lock().unwrap().windows(3).filter(|bytes| bytes == b"\n> ").count() < asked {
            assert!(began.elapsed() < Duration::from_secs(60), "nobody asks");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.keys.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Everything that was written on it.
    fn bytes(self) -> Vec<u8> {
        drop(self.held);
        self.reader.join().unwrap();
        std::mem::take(&mut *self.got.lock().unwrap())
    }
}

/// What a terminal of this size showed after each escape and each letter, as rows of text; the last is what it shows at the end.
fn shown(bytes: &[u8], (rows, columns): (u16, u16)) -> (Vec<Vec<String>>, Vec<String>) {
    let mut parser = vt100::Parser::new(rows.try_into().unwrap(), columns.try_into().unwrap(), 0);
    let screen = |parser: &vt100::Parser| parser.screen().rows(0, columns).collect::<Vec<_>>();
    let mut all = Vec::new();
    for piece in bytes.chunks(7) {
        parser.process(piece);
        all.push(screen(&parser));
    }
    (all, without_empty_ends(screen(&parser)))
}

fn without_empty_ends(mut rows: Vec<String>) -> Vec<String> {
    rows.truncate(rows.iter().rposition(|row| !row.is_empty()).map_or(0, |last| last + 1));
    rows
}

fn is_live(row: &str) -> bool {
    row.contains(" tokens, ") && row.contains(" of slots kept") && !row.contains(" new at ")
}

const PROMPT: &str = "And God said";

fn generate(arguments: &[&str], stdout: Stdio, stderr: Stdio) -> Vec<u8> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    command.args(["generate", "--prompt", PROMPT, "--temperature", "1.2", "--new-tokens", "800"]).args(arguments);
    command.env("TERM", "xterm-256color").env_remove("NO_COLOR").stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// The text alone.
fn plain() -> String {
    String::from_utf8(generate(&[], Stdio::piped(), Stdio::null())).unwrap()
}

/// Rows of a text on a terminal where nothing else is.
fn wrapped(text: &str, size: (u16, u16)) -> Vec<String> {
    shown(text.replace('\n', "\r\n").as_bytes(), size).1
}

#[test]
fn below_a_text_on_the_same_terminal_it_never_touches_it() {
    let text = format!("{PROMPT}{}", plain());
    for size in [(400, 100), (400, 37), (6, 61), (4, 24)] {
        let terminal = Terminal::new(size.0, size.1);
        generate(&["--cached-experts", "8"], terminal.stream(), terminal.stream());
        let (all, last) = shown(&terminal.bytes(), size);
        // The figures at the end are the last line.
        let start = last.iter().rposition(|row| row.contains(" tokens of prompt"));
        let whole = wrapped(&text, (400, size.1));
        match start {
            Some(start) => {
                let rows = without_empty_ends(last[..start].to_vec());
                assert!(whole.ends_with(&rows), "{size:?}: {rows:#?}\n{whole:#?}");
                assert!(size.0 < 400 || rows.len() == whole.len(), "{size:?}");
            }
            None => assert!(size.1 < 40, "{size:?}: {last:#?}"),
        }
        assert!(!last.iter().any(|row| is_live(row)), "{size:?}: {last:#?}");
        let live = |rows: &Vec<String>| rows.iter().filter(|row| row.contains(" tokens, ")).count();
        assert!(all.iter().any(|rows| live(rows) == 1), "{size:?}: it was there");
        assert!(all.iter().all(|rows| live(rows) <= 1), "{size:?}: once at a time");
        if size.1 >= 100 {
            assert!(all.iter().flatten().any(|row| is_live(row) && row.contains(" of experts hit")));
        }
    }
}

#[test]
fn standard_output_gets_the_text_and_nothing_else() {
    let text = plain();
    // Elsewhere there is only the text.
    let terminal = Terminal::new(24, 80);
    let out = generate(&[], Stdio::piped(), terminal.stream());
    assert_eq!(String::from_utf8(out).unwrap(), text);
    let size = terminal.size;
    let (all, last) = shown(&terminal.bytes(), size);
    assert!(all.iter().flatten().any(|row| is_live(row)));
    assert!(last.iter().any(|row| row.contains(" tokens of prompt")) && !last.iter().any(|row| is_live(row)));
    // On another terminal too, where the prompt stands before it.
    let (text_terminal, line_terminal) = (Terminal::new(24, 80), Terminal::new(24, 80));
    generate(&[], text_terminal.stream(), line_terminal.stream());
    let bytes = String::from_utf8(text_terminal.bytes()).unwrap();
    assert_eq!(bytes.replace("\r\n", "\n"), format!("{PROMPT}{text}"));
    assert!(shown(&line_terminal.bytes(), (24, 80)).0.iter().flatten().any(|row| is_live(row)));
}

#[test]
fn nobody_sees_it_who_is_not_to() {
    let text = plain();
    for (arguments, term) in [(&["--quiet"][..], "xterm"), (&[], "dumb")] {
        let terminal = Terminal::new(24, 80);
        let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
        command.args(["generate", "--prompt", PROMPT, "--temperature", "1.2", "--new-tokens", "800"]).args(arguments);
        command.env("TERM", term).stdin(Stdio::null()).stdout(terminal.stream()).stderr(terminal.stream());
        assert!(command.status().unwrap().success());
        drop(command);
        let bytes = String::from_utf8(terminal.bytes()).unwrap().replace("\r\n", "\n");
        let figures = bytes.strip_prefix(&format!("{PROMPT}{text}")).expect("the text first");
        assert!(figures.contains(" tokens of prompt at ") && figures.lines().count() == 1, "{figures}");
    }
}

#[test]
fn a_conversation_has_it_under_each_answer() {
    let directory = tempfile::tempdir().unwrap();
    let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(bundled.join(file), directory.path().join(file)).unwrap();
    }
    let template = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
    std::fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
        command.args(["generate", "--chat", "--new-tokens", "300", "--model"]).arg(directory.path());
        command.env("TERM", "xterm");
        command
    };
    let lines = ["And God said", "fn main() {"];
    let mut piped = command().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    piped.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let answers = String::from_utf8(piped.wait_with_output().unwrap().stdout).unwrap();

    let mut terminal = Terminal::new(400, 120);
    let mut typed = command();
    typed.stdin(terminal.stream()).stdout(terminal.stream()).stderr(terminal.stream());
    let mut child = typed.spawn().unwrap();
    drop(typed);
    for (asked, line) in [lines[0], lines[1], "/exit"].into_iter().enumerate() {
        terminal.type_line(asked + 1, line);
    }
    assert!(child.wait().unwrap().success());
    let (all, last) = shown(&terminal.bytes(), (400, 120));
    assert!(all.iter().flatten().any(|row| is_live(row)));
    assert!(!last.iter().any(|row| is_live(row)), "{last:#?}");
    // What was typed and what was answered, between the first line and the last.
    let said: Vec<&String> = last.iter().filter(|row| !row.starts_with("> ")).collect();
    let expected = wrapped(&answers, (400, 120));
    let answered = &said[1..said.len() - 1];
    assert!(answered.iter().copied().filter(|row| !row.is_empty()).eq(expected.iter().filter(|row| !row.is_empty())));
    let asked: Vec<&String> = last.iter().filter(|row| row.starts_with("> ")).collect();
    assert_eq!(asked, ["> And God said", "> fn main() {", "> /exit"]);
    assert!(last[0].starts_with("each line is a message; ") && last.last().unwrap().contains(" of slots kept"));
}
