//! Conversations with models that think: what the template gets back of an answer, and what is kept where a state is recurrent.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use phase_moe::{GenerateOptions, LoadOptions, Model, Sampler, generate};
use serde_json::{Map, Value, json};

/// Of all of these models.
const WORDS: usize = 61;
const NEW_TOKENS: usize = 7;

/// A turn begins with `w1`, an answer with `w3`, and both end with `w2`.
const GROWS: &str =
    "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w3 ' }}{{ m.content }} w2 {% endfor %}w3";
/// Of an answer its first word, as templates do that leave out what was thought.
const FORGETS: &str = "{% for m in messages %}{{ 'w1 ' + m.content if m.role == 'user' else 'w3 ' + m.content.split()[0] }} w2 \
                       {% endfor %}{{ 'w3' if add_generation_prompt }}";
/// Has no beginnings of answers, and of an answer its first word.
const RUNS_ON: &str =
    "{% for m in messages %}{{ 'w1 ' + m.content if m.role == 'user' else m.content.split()[0] }} w2 {% endfor %}";
/// Counts messages first.
const COUNTS: &str = "w{{ messages | length }} {{ messages[-1].content }} w3";
/// Reads thoughts apart; an answer begins with one.
const THINKS: &str = "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w3 ' }}{{ m.content }}\
                      {% if m.reasoning_content is string %} w4 {{ m.reasoning_content }}{% endif %} w2 {% endfor %}w3 <think>";
/// Refuses marks in a text, as that of gpt-oss does.
const CHANNELS: &str = "{% for m in messages %}{% if '<|channel|>' in m.content %}{{ raise_exception('marks in a text') }}{% endif %}\
                        {{ 'w1 ' if m.role == 'user' else 'w3 <|channel|> w4 ' }}{{ m.content }} w2 {% endfor %}w3";

/// A model of `tests/goldens/zoo` whose tokens are words, some of them marks, which are special tokens.
fn model(family: &str, template: &str, marks: &[(u32, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let files = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/zoo")).join(family);
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(files.join(file), directory.path().join(file)).unwrap();
    }
    let mark = |id: u32| marks.iter().find(|mark| mark.0 == id).map(|mark| mark.1.to_owned());
    let name = |id: usize| mark(id as u32).unwrap_or_else(|| format!("w{id}"));
    let vocabulary: Map<String, Value> = (0..WORDS).map(|id| (name(id), json!(id))).collect();
    let special = |&(id, content): &(u32, &str)| {
        let mut token = json!({"id": id, "content": content, "special": true});
        for key in ["single_word", "lstrip", "rstrip", "normalized"] {
            token[key] = json!(false);
        }
        token
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": marks.iter().map(special).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    // No word ends an answer.
    for (file, content) in [
        ("tokenizer.json", tokenizer.to_string()),
        ("generation_config.json", json!({"eos_token_id": []}).to_string()),
        ("chat_template.jinja", template.into()),
    ] {
        std::fs::write(directory.path().join(file), content).unwrap();
    }
    directory
}

/// What the command prints as JSON, a value a line.
fn run(directory: &Path, arguments: &[&str], input: &str) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    command.args(["generate", "--json", "--new-tokens", &NEW_TOKENS.to_string(), "--model"]).arg(directory);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::Deserializer::from_slice(&output.stdout).into_iter().map(Result::unwrap).collect()
}

/// Holds turns against what a model that has seen nothing else answers to the whole text; what was kept of each.
fn kept(directory: &Path, turns: &[Value], written: &[String]) -> Vec<u64> {
    assert_eq!(turns.len(), written.len());
    let each = turns.iter().zip(written).map(|(turn, written)| {
        let alone = run(directory, &["--prompt", written], "").remove(0);
        assert_eq!(turn["text"], alone["text"], "{written}");
        let [kept, read] = ["kept_tokens", "prompt_tokens"].map(|key| turn[key].as_u64().unwrap());
        assert_eq!(Some(kept + read), alone["prompt_tokens"].as_u64(), "{written}");
        kept
    });
    each.collect()
}

fn text(turn: &Value) -> &str {
    turn["text"].as_str().unwrap().trim()
}

#[test]
fn a_recurrent_state_goes_back_to_where_the_last_answer_began() {
    let said = ["w10 w11", "w12", "w13"];
    for (family, is_recurrent) in
        [("lfm2_moe", true), ("qwen3_next", true), ("qwen3_5_moe", true), ("gpt_oss", false), ("minimax_m2", false)]
    {
        for template in [GROWS, FORGETS, RUNS_ON, COUNTS] {
            let directory = model(family, template, &[]);
            let turns = run(directory.path(), &["--chat"], &(said.join("\n") + "\n"));
            let (mut past, mut written, mut kept_most) = (String::new(), Vec::new(), vec![0]);
            for (index, (said, turn)) in said.iter().zip(&turns).enumerate() {
                past += &format!("w1 {said} w2 ");
                let words = past.split_whitespace().count() as u64;
                let answer = text(turn);
                let first = answer.split_whitespace().next().unwrap();
                let (prompt, said_again, kept) = match template {
                    // The last word of an answer has not been through the model.
                    GROWS => (format!("{past}w3"), format!("w3 {answer} w2 "), words + NEW_TOKENS as u64),
                    // All up to the answer, and in one that is there its first word too.
                    FORGETS => {
                        (format!("{past}w3"), format!("w3 {first} w2 "), words + if is_recurrent { 0 } else { 2 })
                    }
                    // The last word before the answer is what a pass for the answer needs.
                    RUNS_ON => (past.clone(), format!("{first} w2 "), if is_recurrent { words - 1 } else { words + 1 }),
                    _ => (format!("w{} {said} w3", 2 * index + 1), String::new(), 0),
                };
                written.push(prompt);
                past += &said_again;
                kept_most.push(kept);
            }
            kept_most.pop();
            assert_eq!(kept(directory.path(), &turns, &written), kept_most, "{family}: {written:?}");
        }
    }
}

/// What a model goes on with.
fn continued(directory: &Path, prompt: &str) -> Vec<u32> {
    let model = Model::load(directory, &LoadOptions::default()).unwrap();
    let (mut state, mut sampler) = (model.decoder().generation_state(), Sampler::new(0.0, 1.0, 1).unwrap());
    let (ids, options) = (model.encode(prompt).unwrap(), GenerateOptions::new(NEW_TOKENS));
    let go_on = |_| ControlFlow::Continue(());
    generate(&model, &ids, options, &mut state, &mut sampler, go_on).unwrap().texts.remove(0)
}

#[test]
fn a_template_gets_thoughts_apart_where_it_reads_them() {
    let think = (60, "<think>");
    let first = "w1 w10 w2 w3 <think>";
    let ids = continued(model("qwen3_next", THINKS, &[think]).path(), first);
    // The third word of the answer is what ends the thought; without such a word all of it is the thought.
    let close = ids[2];
    assert!(!ids[..2].contains(&close) && close > 13, "{ids:?}");
    for marks in [&[think, (close, "</think>")][..], &[think]] {
        let directory = model("qwen3_next", THINKS, marks);
        let turns = run(directory.path(), &["--chat"], "w10\nw11\n");
        let answer = text(&turns[0]);
        let (thought, said) = answer.split_once("</think>").unwrap_or((answer, ""));
        assert_eq!(said.is_empty(), marks.len() == 1, "{answer}");
        assert_eq!(answer.split_whitespace().count(), NEW_TOKENS, "marks are in the text: {answer}");
        let next = format!("w1 w10 w2 w3 {} w4 {} w2 w1 w11 w2 w3 <think>", said.trim(), thought.trim());
        kept(directory.path(), &turns, &[first.into(), next]);
    }
}

#[test]
fn a_template_that_refuses_marks_gets_what_was_said() {
    let first = "w1 w10 w2 w3";
    let ids = continued(model("qwen3_next", CHANNELS, &[]).path(), first);
    for channel in ["final", "analysis"] {
        let marks = [(ids[0], "<|channel|>"), (ids[1], channel), (ids[2], "<|message|>")];
        assert!(
            !ids[3..].iter().any(|id| marks.iter().any(|mark| mark.0 == *id)) && ids[..3].iter().all(|&id| id > 13)
        );
        let directory = model("qwen3_next", CHANNELS, &marks);
        let turns = run(directory.path(), &["--chat"], "w10\nw11\n");
        let said = text(&turns[0]).strip_prefix(&format!("<|channel|> {channel} <|message|> ")).unwrap();
        let said = if channel == "final" { said } else { "" };
        let next = format!("{first} <|channel|> w4 {said} w2 w1 w11 w2 w3");
        kept(directory.path(), &turns, &[first.into(), next]);
    }
}
