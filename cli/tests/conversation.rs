//! `generate --chat` without a prompt: every turn is answered as its whole conversation would be in a prompt, with keys and values kept.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A user's message, and the answer to it where there is one yet.
type Said = (String, Option<String>);

/// A template, and what it writes.
struct Template {
    jinja: &'static str,
    /// A system message, if there is one, then turns of the user's message and the answer, without the last one's.
    written: fn(Option<&str>, &[Said]) -> String,
}

/// Adds to what it wrote before.
const GROWS: Template = Template {
    jinja: "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>",
    written: |system, turns| {
        let mut text = system.map_or(String::new(), |system| format!("<system>{system}\n"));
        for (user, answer) in turns {
            text += &format!("<user>{user}\n");
            text += &answer.as_ref().map_or(String::new(), |answer| format!("<assistant>{answer}\n"));
        }
        text + "<assistant>"
    },
};

/// Keeps three letters of an answer once it is an earlier one, as templates do that leave out what was thought.
const FORGETS: Template = Template {
    jinja: "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content[:3] }}\n\
            {% else %}{{ message.content }}: {% endif %}{% endfor %}",
    written: |system, turns| {
        let mut text = system.map_or(String::new(), |system| format!("{system}: "));
        for (user, answer) in turns {
            text += &format!("{user}: ");
            let short = |answer: &String| answer.chars().take(3).collect::<String>();
            text += &answer.as_ref().map_or(String::new(), |answer| format!("{}\n", short(answer)));
        }
        text
    },
};

/// Writes another beginning every time.
const COUNTS: Template = Template {
    jinja: "{{ messages | length }} and {{ messages[-1].content }}",
    written: |system, turns| {
        let messages = usize::from(system.is_some()) + 2 * turns.len() - 1;
        format!("{messages} and {}", turns[turns.len() - 1].0)
    },
};

const MESSAGES: [&str; 4] = ["And the LORD spake unto Moses", "fn main() {", "What is the law?", "And God said"];

/// A copy of the bundled model with this template beside it.
fn model(template: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(bundled.join(file), directory.path().join(file)).unwrap();
    }
    std::fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
    directory
}

fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    let short = if arguments.contains(&"--new-tokens") { &[][..] } else { &["--new-tokens", "12"] };
    command.arg("generate").args(short).arg("--model").arg(directory).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What the command says when it is told these bytes.
fn told(directory: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = command(directory, arguments).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// The turns of a conversation, from their JSON.
fn turns(directory: &Path, arguments: &[&str], lines: &[&str]) -> Vec<Value> {
    let output = told(directory, &[&["--chat", "--json"], arguments].concat(), (lines.join("\n") + "\n").as_bytes());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What a prompt is continued with, by a model that has seen nothing else, and its tokens.
fn alone(directory: &Path, arguments: &[&str], prompt: &str) -> (Value, u64) {
    let output = told(directory, &[&["--json", "--prompt", prompt], arguments].concat(), b"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let plain: Value = serde_json::from_slice(&output.stdout).unwrap();
    (plain["text"].clone(), plain["prompt_tokens"].as_u64().unwrap())
}

#[test]
fn a_turn_is_answered_as_its_whole_conversation_would_be() {
    for (template, system, options, keeps) in [
        (&GROWS, None, &[][..], true),
        (&GROWS, Some("Be short."), &["--layer-top-k", "4,2,1,3"], true),
        (&GROWS, None, &["--expert-cache", "1MiB"], true),
        (&FORGETS, Some("Be short."), &[], true),
        (&COUNTS, None, &[], false),
    ] {
        let directory = model(template.jinja);
        let said = system.map_or(vec![], |system| vec!["--system", system]);
        let turns = turns(directory.path(), &[options, &said].concat(), &MESSAGES);
        assert_eq!(turns.len(), MESSAGES.len());
        let mut past: Vec<Said> = Vec::new();
        for (index, (turn, message)) in turns.iter().zip(MESSAGES).enumerate() {
            past.push((message.into(), None));
            let written = (template.written)(system, &past);
            let (text, tokens) = alone(directory.path(), options, &written);
            assert_eq!((turn["user"].as_str(), &turn["text"]), (Some(message), &text), "{written}");
            let [kept, read] = ["kept_tokens", "prompt_tokens"].map(|key| turn[key].as_u64().unwrap());
            assert_eq!(kept + read, tokens, "{written}");
            // More than half of it is there already, or nothing but a beginning that happens to be the same.
            assert_eq!(2 * kept > tokens, keeps && index > 0, "{kept} of {tokens}: {written}");
            past[index].1 = Some(text.as_str().unwrap().into());
        }
    }
}

#[test]
fn answers_are_lines_and_figures_come_at_the_end() {
    let directory = model(GROWS.jinja);
    let expected = turns(directory.path(), &[], &MESSAGES[..2]);
    let input = [MESSAGES[0], "", "  ", MESSAGES[1], "/exit", MESSAGES[2]].join("\r\n");
    let output = told(directory.path(), &["--chat"], input.as_bytes());
    assert_eq!(output.status.code(), Some(0));
    let answers: String = expected.iter().map(|turn| format!("{}\n", turn["text"].as_str().unwrap())).collect();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), answers);
    let figures = String::from_utf8(output.stderr).unwrap();
    let read: u64 = expected.iter().map(|turn| turn["prompt_tokens"].as_u64().unwrap()).sum();
    assert!(figures.starts_with(&format!("{read} tokens of messages at ")), "{figures}");
    assert!(figures.contains(", 24 new at ") && figures.lines().count() == 1, "{figures}");
    // Nothing said is no mistake.
    let output = told(directory.path(), &["--chat"], b"");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
}

#[test]
fn another_conversation_begins_where_it_is_cleared() {
    let directory = model(GROWS.jinja);
    let lines = [MESSAGES[0], MESSAGES[1], "/clear", MESSAGES[2]];
    let cleared = turns(directory.path(), &["--system", "Be short."], &lines);
    let fresh = turns(directory.path(), &["--system", "Be short."], &MESSAGES[2..3]);
    assert_eq!(cleared.len(), 3);
    let of = |turn: &Value| ["text", "kept_tokens", "prompt_tokens"].map(|key| turn[key].clone());
    assert_eq!(of(&cleared[2]), of(&fresh[0]));
}

#[test]
fn a_message_that_does_not_fit_is_left_out_and_nothing_else_is_lost() {
    let directory = model(GROWS.jinja);
    let long = "and it came to pass ".repeat(400);
    let with = turns(directory.path(), &[], &[MESSAGES[0], &long, MESSAGES[1]]);
    let without = turns(directory.path(), &[], &MESSAGES[..2]);
    assert_eq!(
        (with[0]["text"].as_str(), with[2]["text"].as_str()),
        (without[0]["text"].as_str(), without[1]["text"].as_str())
    );
    assert_eq!(with[1]["text"], Value::Null);
    let error = with[1]["error"].as_str().unwrap();
    assert!(error.contains("and the model has 1024 positions: this message is left out; /clear begins"), "{error}");
    assert!(with.iter().zip([false, true, false]).all(|(turn, is)| turn.get("error").is_some() == is));
    let output = told(directory.path(), &["--chat"], long.as_bytes());
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("the conversation would have "));
    // An answer ends where the positions do.
    let most = "and it came to pass ".repeat(195);
    let output = told(directory.path(), &["--chat", "--new-tokens", "1000"], most.as_bytes());
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("stopped at the model's 1024 positions\n"));
}

#[test]
fn hits_are_of_each_turn_and_mistakes_are_named() {
    let directory = model(GROWS.jinja);
    let cached = turns(directory.path(), &["--cached-experts", "8", "--router", "cache"], &MESSAGES);
    assert!(cached.iter().all(|turn| turn["hit_rate"].as_f64().is_some_and(|rate| (0.0..=1.0).contains(&rate))));
    let bytes = turns(
        directory.path(),
        &["--expert-cache", "1GiB", "--prefetch", "off"],
        &[MESSAGES[0], "/clear", MESSAGES[0]],
    );
    assert!(bytes[0]["expert_bytes_read"].as_u64() > Some(0));
    assert_eq!((bytes[1]["expert_bytes_read"].as_u64(), &bytes[1]["text"]), (Some(0), &bytes[0]["text"]));
    for (arguments, input, expected) in [
        (&["--chat"][..], &b"\xff\n"[..], "standard input"),
        (&["--system", "a"], b"", "--chat"),
        (&["--json"], b"", "--prompt"),
    ] {
        let output = told(directory.path(), arguments, input);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message}");
    }
    let turns = "{% if messages | length > 1 %}{{ raise_exception('one message alone') }}{% endif %}a";
    let output = told(model(turns).path(), &["--chat"], b"a\nb\n");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("chat_template.jinja: line 1: one message alone"));
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_the_answer_and_not_the_conversation() {
    use rustix::process::{Pid, Signal, kill_process};

    let directory = model(GROWS.jinja);
    let arguments = ["--chat", "--threads", "1", "--new-tokens", "1000"];
    let mut child = command(directory.path(), &arguments).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    input.write_all(b"And God said\n").unwrap();
    output.read_exact(&mut [0; 8]).unwrap();
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::INT).unwrap();
    // The line of the answer ends.
    let mut rest = Vec::new();
    while rest.last() != Some(&b'\n') {
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        rest.push(byte[0]);
    }
    input.write_all(b"And God said\n").unwrap();
    output.read_exact(&mut [0; 8]).unwrap();
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::INT).unwrap();
    input.write_all(b"/exit\n").unwrap();
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(0));
    let figures = String::from_utf8(done.stderr).unwrap();
    let new: usize = figures.split(" tokens/s, ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((2..1900).contains(&new), "{figures}");
}
