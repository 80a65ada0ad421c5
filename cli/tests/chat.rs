//! `generate --chat`: templates in the style of real ones, rendered as transformers renders them, and what ends an answer.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Output};

use phase_moe::{GenerateOptions, LoadOptions, Model, Sampler, generate};
use serde_json::{Value, json};

/// In the style of ChatML: a turn between marks, a system message of its own kind, white space cut off blocks.
const MARKS: &str = "\
{%- if messages[0].role == 'system' %}
    {{- '<|start|>system\\n' + messages[0].content.strip() + '<|end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|start|>' + message.role + '\\n' + message['content'] + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}";

/// In the style of Mixtral's: a token at the start, turns that must take turns, no system message.
const TURNS: &str = "\
{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('turns must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}{{ '[ASK] ' + message['content'] + ' [/ASK]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}
";

/// A copy of the bundled model with further files beside it.
fn model(files: &[(&str, Value)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(bundled.join(file), directory.path().join(file)).unwrap();
    }
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

fn run(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    command.args(["generate", "--new-tokens", "12", "--json", "--model"]).arg(directory).args(arguments);
    command.output().unwrap()
}

fn generated(directory: &Path, arguments: &[&str]) -> Value {
    let output = run(directory, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn mistake(directory: &Path, arguments: &[&str]) -> String {
    let output = run(directory, arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

/// The text and tokens of the prompt that `generate` continues `written` with.
fn continued(directory: &Path, written: &str) -> (Value, usize) {
    let plain = generated(directory, &["--prompt", written]);
    (plain["text"].clone(), plain["prompt_tokens"].as_u64().unwrap() as usize)
}

#[test]
fn a_user_message_is_written_as_the_template_has_it() {
    let config = |template: Value| {
        json!({
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": true},
            "pad_token": null,
            "model_max_length": 1024,
            "chat_template": template,
        })
    };
    let named = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": TURNS}]);
    for (files, arguments, expected) in [
        (
            vec![("tokenizer_config.json", config(MARKS.into()))],
            vec!["--system", " Be short. "],
            "<|start|>system\nBe short.<|end|>\n<|start|>user\nWho was Moses?<|end|>\n<|start|>assistant\n",
        ),
        (
            vec![("tokenizer_config.json", config(MARKS.into()))],
            vec![],
            "<|start|>user\nWho was Moses?<|end|>\n<|start|>assistant\n",
        ),
        (vec![("tokenizer_config.json", config(named))], vec![], "<s>\n[ASK] Who was Moses? [/ASK]"),
        // The file of its own counts.
        (
            vec![("tokenizer_config.json", config("no".into())), ("chat_template.jinja", TURNS.into())],
            vec![],
            "<s>\n[ASK] Who was Moses? [/ASK]",
        ),
        (vec![("chat_template.jinja", "{{ messages[-1].content | trim | upper }}:".into())], vec![], "WHO WAS MOSES?:"),
    ] {
        let directory = model(&files);
        let arguments = [&["--chat", "--prompt", "Who was Moses?"], &arguments[..]].concat();
        let answer = generated(directory.path(), &arguments);
        let (text, prompt_tokens) = continued(directory.path(), expected);
        assert_eq!(
            (&answer["text"], answer["prompt_tokens"].as_u64()),
            (&text, Some(prompt_tokens as u64)),
            "{expected}"
        );
    }
}

#[test]
fn several_messages_are_several_chats() {
    let directory = model(&[("chat_template.jinja", MARKS.into())]);
    let both = generated(directory.path(), &["--chat", "--prompt", "Who was Moses?", "--prompt", "fn main"]);
    for (text, prompt) in both["texts"].as_array().unwrap().iter().zip(["Who was Moses?", "fn main"]) {
        let alone = generated(directory.path(), &["--chat", "--prompt", prompt]);
        assert_eq!((&text["prompt"], &text["text"]), (&prompt.into(), &alone["text"]));
        assert_eq!(text["prompt_tokens"], alone["prompt_tokens"]);
    }
}

#[test]
fn mistakes_are_named() {
    let of = |files: &[(&str, Value)], arguments: &[&str]| {
        let directory = model(files);
        mistake(directory.path(), &[&["--prompt", "a"], arguments].concat())
    };
    let none = of(&[], &["--chat"]);
    assert!(
        none.contains("--chat: expected a chat template in chat_template.jinja or tokenizer_config.json of "),
        "{none}"
    );
    let template = |text: &str| [("chat_template.jinja", Value::from(text))];
    let config = |config: Value| [("tokenizer_config.json", config)];
    for (message, expected) in [
        (
            of(&template(TURNS), &["--chat", "--system", "b"]),
            "chat_template.jinja: line 4: turns must alternate user/assistant",
        ),
        (of(&template("{% if %}"), &["--chat"]), "chat_template.jinja: line 1: "),
        (of(&template("{{ messages.none.content }}"), &["--chat"]), "chat_template.jinja: line 1: "),
        (of(&template("\n{{ strftime_now(3, 4) }}"), &["--chat"]), "line 2: "),
        (
            of(&config(json!({"chat_template": 3})), &["--chat"]),
            "tokenizer_config.json: `chat_template`: expected text, got 3",
        ),
        (of(&config(json!({"chat_template": []})), &["--chat"]), "expected one named `default`, got none"),
        (of(&config("{".into()), &["--chat"]), "tokenizer_config.json: expected JSON, got "),
        (of(&[("generation_config.json", "[".into())], &[]), "generation_config.json: expected JSON, got "),
        (
            of(&[("generation_config.json", json!({"eos_token_id": [1, -2]}))], &[]),
            "generation_config.json: `eos_token_id`: expected a token id or a list of them, got [1,-2]",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn an_answer_ends_where_the_generation_config_says() {
    let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    let load = |directory: &Path| Model::load(directory, &LoadOptions::default()).unwrap();
    let ids = |model: &Model| {
        let prompt = model.encode("And the LORD spake unto Moses, saying, ").unwrap();
        let (mut state, mut sampler) = (model.decoder().generation_state(), Sampler::new(0.0, 1.0, 1).unwrap());
        let go_on = |_| ControlFlow::Continue(());
        generate(model, &prompt, GenerateOptions::new(12), &mut state, &mut sampler, go_on).unwrap().texts.remove(0)
    };
    let plain = load(&bundled);
    let (all, from_config) = (ids(&plain), plain.end_of_text().to_vec());
    assert_eq!(all.len(), 12);
    let end = all[5];
    let first = all.iter().position(|&id| id == end).unwrap();
    for (config, expected, length) in [
        (json!({"eos_token_id": end}), vec![end], first),
        (json!({"eos_token_id": [2047, end]}), vec![2047, end], first),
        (json!({"eos_token_id": null}), from_config.clone(), 12),
        (json!({"temperature": 0.6}), from_config.clone(), 12),
    ] {
        let directory = model(&[("generation_config.json", config)]);
        let model = load(directory.path());
        assert_eq!((model.end_of_text(), ids(&model).len()), (expected.as_slice(), length));
    }
}
