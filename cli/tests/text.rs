//! What the table of situations cannot say of text: streams that are closed, read late or never written, splits of byte pairs, and a
//! continuation token by token.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::{self, Value};
use phase_moe::{Checkpoint, LoadOptions, Model, Weights};
use tokenizers::Tokenizer;

/// Longer than anything here takes, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn phase_moe() -> Command {
    Command::new(env!("CARGO_BIN_EXE_phase-moe"))
}

/// Runs a shell line in which `$PM` is the command.
#[cfg(unix)]
fn shell(line: &str) -> Output {
    let mut shell = Command::new("bash");
    shell.args(["-c", line]).env("PM", env!("CARGO_BIN_EXE_phase-moe"));
    ended(shell.stdout(Stdio::piped()).stderr(Stdio::piped()), line)
}

/// The output of a command that must end by itself.
fn ended(command: &mut Command, name: &str) -> Output {
    let child = command.spawn().unwrap();
    let (id, (sender, receiver)) = (child.id(), mpsc::channel());
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(PATIENCE) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            let _ = Command::new("kill").arg(id.to_string()).status();
            panic!("{name}: still runs after {PATIENCE:?}");
        }
    }
}

#[cfg(unix)]
#[test]
fn a_closed_standard_error_changes_nothing() {
    let generate = "$PM generate --prompt 'And God said' --new-tokens 5";
    let expected = shell(&format!("{generate} 2>/dev/null"));
    assert!(expected.status.success() && !expected.stdout.is_empty());
    for closed in ["2>&-", "2> >(true)", "2> >(exec 0<&-; sleep 0.1)", "2>/dev/full"] {
        // So that whoever reads is gone before anything is said.
        let output = shell(&format!("exec {closed}; sleep 0.3; {generate}"));
        assert_eq!((output.status.code(), &output.stdout), (Some(0), &expected.stdout), "{closed}");
        // Commands that only have something to say, and mistakes.
        for (line, code) in [
            ("$PM generate --prompt a", 0),
            ("$PM compare --tokens 64 --router phase --capacity-factor 1", 0),
            ("$PM compare --router best", 2),
            ("$PM compare --text /no/such/file", 2),
            ("$PM generate", 2),
            ("$PM logits --ids 99999 --out /dev/null", 2),
        ] {
            let output = shell(&format!("exec {closed}; sleep 0.1; {line} >/dev/null"));
            assert_eq!(output.status.code(), Some(code), "{line} {closed}");
        }
    }
}

/// The text comes while the model still works, and stays where the run is ended from outside.
#[test]
fn one_prompt_streams() {
    let model = root().join("cli/tests/situations/text/says");
    let mut child = phase_moe()
        .args(["generate", "--prompt", "x", "--new-tokens", "90000", "--model"])
        .arg(&model)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut first = [0; 40];
    out.read_exact(&mut first).unwrap();
    assert!(first.iter().all(|&letter| letter == b'x'));
    assert!(child.try_wait().unwrap().is_none(), "all came at once");
    child.kill().unwrap();
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert!(rest.iter().all(|&letter| letter == b'x'));
    child.wait().unwrap();
}

#[test]
fn a_reader_that_leaves_ends_the_run() {
    let model = root().join("cli/tests/situations/text/says");
    let mut child = phase_moe()
        .args(["generate", "--prompt", "x", "--new-tokens", "90000", "--model"])
        .arg(&model)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 4]).unwrap();
    drop(out);
    let started = Instant::now();
    let status = child.wait().unwrap();
    assert!(started.elapsed() < PATIENCE);
    assert_eq!(status.code(), Some(0));
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

#[test]
fn several_prompts_and_json_are_printed_at_the_end() {
    let model = root().join("cli/tests/situations/text/says");
    for arguments in [&["--prompt", "x", "--prompt", "x"][..], &["--prompt", "x", "--json"]] {
        let mut command = phase_moe();
        command.args(["generate", "--new-tokens", "200", "--model"]).arg(&model).args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line == "{\n" || line == format!("{}\n", "x".repeat(200)), "{line}");
        child.wait().unwrap();
    }
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_and_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    let alone = directory.path().join("fifo");
    fifo(&alone);
    let alone_gguf = directory.path().join("model.gguf");
    fifo(&alone_gguf);
    let trace = directory.path().join("trace.safetensors");
    fifo(&trace);
    let (alone, alone_gguf, trace) = (alone.to_str().unwrap(), alone_gguf.to_str().unwrap(), trace.to_str().unwrap());
    let mut cases: Vec<(Vec<String>, String)> = Vec::new();
    let words = |words: &[&str]| words.iter().map(|word| word.to_string()).collect::<Vec<_>>();
    for (path, kind) in [(alone, "a FIFO"), (alone_gguf, "a FIFO"), ("/dev/zero", "a device")] {
        for command in
            [&["inspect"][..], &["generate", "--prompt", "a"], &["logits", "--ids", "1", "--out", "/dev/null"]]
        {
            let expected = format!("{path}: expected a checkpoint directory or a GGUF file, got {kind}");
            cases.push((words(&[command, &["--model", path]].concat()), expected));
        }
    }
    cases.push((words(&["route", "--logits", trace]), format!("{trace}: expected a file, got a FIFO")));
    cases.push((words(&["replay", "--logits", trace]), format!("{trace}: expected a file, got a FIFO")));
    let says = root().join("cli/tests/situations/text/says");
    let parts =
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"];
    for part in parts {
        let model = directory.path().join(format!("with {part}"));
        std::fs::create_dir(&model).unwrap();
        for other in ["config.json", "model.safetensors", "tokenizer.json"] {
            if other != part {
                std::fs::copy(says.join(other), model.join(other)).unwrap();
            }
        }
        fifo(&model.join(part));
        let run = words(&["generate", "--prompt", "a", "--model", model.to_str().unwrap()]);
        cases.push((run, format!("{part}: expected a file, got a FIFO")));
    }
    for (arguments, expected) in cases {
        let mut command = phase_moe();
        command.args(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = ended(&mut command, &arguments.join(" "));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(&expected) && said.lines().count() == 1, "{arguments:?}: {said}");
    }
}

#[cfg(unix)]
#[test]
fn texts_and_prompts_come_from_a_fifo_too() {
    let prompt = shell("$PM generate --prompt 'And God said' --new-tokens 5 2>/dev/null");
    let piped = shell("$PM generate --prompt-file <(echo 'And God said') --new-tokens 5 2>/dev/null");
    assert!(piped.status.success());
    assert_eq!(piped.stdout, prompt.stdout);
    // Longer than a command line may be.
    let long = shell("yes 'a b c' | head -c 400000 | $PM generate --prompt-file - --new-tokens 1 --json 2>&1");
    let said = String::from_utf8(long.stdout).unwrap();
    assert!(said.ends_with("expected at most the model's 1024\n") && said.lines().count() == 1, "{said}");
    let text = shell("$PM compare --text <(echo 'And God said') --router top-k --json");
    assert!(text.status.success(), "{}", String::from_utf8_lossy(&text.stderr));
}

/// Byte pairs by hand (`cli/tests/text/make_splits.py`).
#[test]
fn byte_pairs_are_those_of_their_split() {
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(root().join("cli/tests/text/splits.json")).unwrap()).unwrap();
    // Texts of all kinds, and such as few splits tell apart.
    for golden in [&golden, &golden["capitals"], &golden["composed"]] {
        let list = |key: &str| -> Vec<String> { serde_json::from_value(golden[key].clone()).unwrap() };
        let (tokens, merges, texts) = (list("tokens"), list("merges"), list("texts"));
        let strings = |list: &[String]| Value::Array(list.iter().map(|text| Value::String(text.clone())).collect());
        for (pre, expected) in golden["ids"].as_object().unwrap() {
            let metadata = [
                ("tokenizer.ggml.model", Value::String("gpt2".into())),
                ("tokenizer.ggml.pre", Value::String(pre.clone())),
                ("tokenizer.ggml.tokens", strings(&tokens)),
                ("tokenizer.ggml.merges", strings(&merges)),
            ];
            let tokenizer = tokenizer_of(&metadata);
            for (text, expected) in texts.iter().zip(expected.as_array().unwrap()) {
                let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
                assert_eq!(tokenizer.encode(text.as_str(), false).unwrap().get_ids(), expected, "{pre}: {text}");
                assert_eq!(&tokenizer.decode(&expected, true).unwrap(), text);
            }
        }
    }
}

fn tokenizer_of(metadata: &[(&str, Value)]) -> Tokenizer {
    let file = tempfile::NamedTempFile::new().unwrap();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut file.reopen().unwrap(), &metadata, &[]).unwrap();
    let checkpoint = Checkpoint::open(file.path()).unwrap();
    Tokenizer::from_bytes(Weights::from_parts("m", "", checkpoint).tokenizer_json().unwrap()).unwrap()
}

/// What llama.cpp puts around a text (`src/llama-vocab.cpp`): what the file says, and else what its kind has.
#[test]
fn a_gguf_says_what_stands_around_a_text() {
    let tokens: Vec<Value> =
        (0..20).map(|id| Value::String(if id == 0 { "a".into() } else { format!("<{id}>") })).collect();
    let around = |model: &str, pre: &str, more: &[(&str, Value)]| {
        let mut metadata = vec![
            ("tokenizer.ggml.model", Value::String(model.into())),
            ("tokenizer.ggml.pre", Value::String(pre.into())),
            ("tokenizer.ggml.tokens", Value::Array(tokens.clone())),
            ("tokenizer.ggml.merges", Value::Array(vec![Value::String("a a".into())])),
        ];
        metadata.extend(more.iter().map(|(key, value)| (*key, value.clone())));
        if model == "llama" {
            metadata.push(("tokenizer.ggml.scores", Value::Array(vec![Value::F32(0.0); 20])));
        } else {
            metadata[2].1 = Value::Array([&tokens[..19], &[Value::String("aa".into())]].concat());
        }
        tokenizer_of(&metadata).encode("", true).unwrap().get_ids().to_vec()
    };
    let bos = |id| ("tokenizer.ggml.bos_token_id", Value::U32(id));
    let eos = |id| ("tokenizer.ggml.eos_token_id", Value::U32(id));
    let (add, no) = (
        || ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        || ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    );
    let end = || ("tokenizer.ggml.add_eos_token", Value::Bool(true));
    let cases = [
        ("llama", "default", vec![], &[1][..]),
        ("llama", "default", vec![bos(5)], &[5]),
        ("llama", "default", vec![bos(5), no()], &[]),
        ("llama", "default", vec![bos(5), eos(6), end()], &[5, 6]),
        ("llama", "default", vec![no(), end()], &[2]),
        ("gpt2", "gpt-2", vec![bos(5)], &[]),
        ("gpt2", "gpt-2", vec![bos(5), add()], &[5]),
        ("gpt2", "gpt-2", vec![add()], &[11]),
        ("gpt2", "llama-bpe", vec![bos(5)], &[5]),
        ("gpt2", "llama-bpe", vec![bos(5), no()], &[]),
        ("gpt2", "deepseek-llm", vec![bos(5), eos(5), add(), end()], &[5, 5]),
        ("gpt2", "glm4", vec![add()], &[]),
        ("gpt2", "glm4", vec![bos(5), add()], &[5]),
    ];
    for (model, pre, more, expected) in cases {
        assert_eq!(around(model, pre, &more), expected, "{model} {pre} {more:?}");
    }
}

/// A continuation is what the tokenizer makes of all tokens beyond what it makes of those before, however long it goes on.
#[test]
fn a_continuation_is_the_rest_of_the_whole() {
    let models = ["models/tiny-moe", "cli/tests/situations/text/says"];
    for (model, (vocabulary, borders)) in models.iter().zip([(2048u64, &[0u32][..]), (32, &[1, 2])]) {
        let path = root().join(model);
        let tokenizer = Tokenizer::from_file(path.join("tokenizer.json")).unwrap();
        let model = Model::load(&path, &LoadOptions::default()).unwrap();
        let mut seed = 7u64;
        for round in 0..60 {
            let mut ids: Vec<u32> = (0..400)
                .map(|_| {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ((seed >> 33) % vocabulary) as u32
                })
                .collect();
            ids.truncate(20 + round * 6);
            let (before, after) = ids.split_at(round % 20);
            // The beginning and the end are the special tokens of both, but for the unknown token, which is text.
            let is_text = |id: &&u32| !borders.contains(id);
            let text = |ids: &[u32]| {
                let ids: Vec<u32> = ids.iter().filter(is_text).copied().collect();
                tokenizer.decode(&ids, false).unwrap()
            };
            // Bytes before it that are no letter alone may become one.
            let (whole, alone) = (text(&ids), text(before));
            let shared: usize =
                whole.chars().zip(alone.chars()).take_while(|(a, b)| a == b).map(|(letter, _)| letter.len_utf8()).sum();
            let expected = &whole[shared..];
            assert_eq!(model.decode_after(before, after).unwrap(), expected, "{before:?} {after:?}");
        }
    }
    let model = Model::load(&root().join("cli/tests/situations/text/says"), &LoadOptions::default()).unwrap();
    let ids = model.encode("hello world").unwrap();
    let mut continuation = model.continuation(&ids[..1]).unwrap();
    assert_eq!(continuation.push(ids[1]).unwrap(), " world");
    // The bytes of a letter come with the token after them; what a run of them is, is not known before.
    let bytes: Vec<String> = [3, 4, 5].map(|id| continuation.push(id).unwrap()).into();
    assert_eq!(bytes, ["", "", ""]);
    assert_eq!(continuation.clone().finish().unwrap(), "€");
    assert_eq!(continuation.push(ids[0]).unwrap(), "€ hello");
}

/// Marks of thinking, tools and channels are text, whether the tokenizer calls them special or not; what begins or ends a text is not.
#[test]
fn marks_that_a_model_writes_are_text() {
    let bundled = root().join("models/tiny-moe");
    let plain = Model::load(&bundled, &LoadOptions::default()).unwrap();
    let generated = |path: &Path, arguments: &[&str]| {
        let mut command = phase_moe();
        command.args(["generate", "--new-tokens", "12", "--model"]).arg(path).args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // Every token that the bundled model goes on with becomes a special one, so that each of them would be left out.
    let prompt = "And the LORD spake unto Moses, saying, ";
    let streamed = generated(&bundled, &["--prompt", prompt]);
    let ids = plain.encode(&format!("{prompt}{}", streamed.trim_end_matches('\n'))).unwrap();
    let file = std::fs::read_to_string(bundled.join("tokenizer.json")).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&file).unwrap();
    let vocabulary = Tokenizer::from_bytes(&file).unwrap();
    let prompt_ids = plain.encode(prompt).unwrap();
    // With a space in front: written in that letter they are found in no prompt.
    let marks: std::collections::BTreeSet<u32> = ids[prompt_ids.len()..].iter().copied().collect();
    let marks: Vec<u32> =
        marks.into_iter().filter(|id| vocabulary.id_to_token(*id).unwrap().starts_with('Ġ')).collect();
    assert!(marks.len() > 2, "{marks:?}");
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    for &id in &marks {
        let content = vocabulary.id_to_token(id).unwrap();
        let mark = serde_json::json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        });
        added.push(mark);
    }
    let directory = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(bundled.join(file), directory.path().join(file)).unwrap();
    }
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(directory.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    assert_eq!(generated(directory.path(), &["--prompt", prompt]), streamed);
    assert_eq!(generated(directory.path(), &["--chat", "--prompt", prompt]), streamed);
    for arguments in [&["--prompt", prompt, "--json"][..], &["--chat", "--prompt", prompt, "--json"]] {
        let answer: serde_json::Value = serde_json::from_str(&generated(directory.path(), arguments)).unwrap();
        assert_eq!(answer["text"].as_str(), streamed.strip_suffix('\n'));
    }
    let [first, last] = [marks[0], marks[1]];
    let of = |model: &Model| model.decode_after(&[], &[first, last, 0]).unwrap();
    let model = Model::load(directory.path(), &LoadOptions::default()).unwrap();
    let both = vocabulary.decode(&[first, last], true).unwrap();
    assert_eq!((of(&plain), of(&model)), (both.clone(), both.clone()), "the end of a text is not in it");
    // Where a mark is what ends a text, it is not in it.
    std::fs::write(directory.path().join("generation_config.json"), format!("{{\"eos_token_id\": [0, {last}]}}"))
        .unwrap();
    let model = Model::load(directory.path(), &LoadOptions::default()).unwrap();
    assert_eq!(of(&model), vocabulary.decode(&[first], true).unwrap());
}
