//! GGUF files that are wrong: each fault is an error that names the file and the operand. The sound file is that of the goldens.

use std::path::{Path, PathBuf};

use crate::checkpoint::metadata::Value;
use crate::{Checkpoint, Decoder, Error, LoadOptions, Model, Result, Weights};
use proptest::prelude::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf").join(name)
}

fn sound() -> Vec<u8> {
    std::fs::read(fixture("olmoe.gguf")).unwrap()
}

/// A value of metadata: type and bytes.
type Stored = (u32, Vec<u8>);

/// A tensor: dimensions innermost first, type, offset.
type Placed = (Vec<u64>, u32, u64);

fn count(value: u32) -> Stored {
    (4, value.to_le_bytes().to_vec())
}

fn text(value: &str) -> Stored {
    (8, [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat())
}

/// A file of these metadata and tensors, and `data` bytes behind them.
fn file(values: &[(&str, Stored)], tensors: &[(&str, Placed)], data: usize) -> Vec<u8> {
    let mut bytes = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((values.len() as u64).to_le_bytes());
    for (key, (kind, value)) in values {
        bytes.extend(text(key).1);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    }
    for (name, (dimensions, kind, offset)) in tensors {
        bytes.extend(text(name).1);
        bytes.extend((dimensions.len() as u32).to_le_bytes());
        bytes.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    let bytes: &'static [u8] = bytes.leak();
    Checkpoint::from_gguf_sources(vec![("m.gguf".into(), Box::new(bytes))])
}

fn error(bytes: Vec<u8>) -> String {
    let error = open(bytes).unwrap_err();
    assert!(matches!(&error, Error::Checkpoint { file, .. } if file == "m.gguf") && error.is_user_error(), "{error}");
    error.to_string()
}

#[test]
fn a_sound_file_says_what_it_holds() {
    let list =
        |kind: u32, count: u64, values: &[u8]| (9, [&kind.to_le_bytes(), &count.to_le_bytes()[..], values].concat());
    let values = [
        ("integer", (1, vec![255])),
        ("number", (6, 1e-5f32.to_le_bytes().to_vec())),
        ("double", (12, 0.1f64.to_le_bytes().to_vec())),
        ("flag", (7, vec![1])),
        ("text", text("text")),
        ("texts", list(8, 2, &[text("a").1, text("").1].concat())),
        ("integers", list(3, 2, &[1, 0, 255, 255])),
        ("numbers", list(6, 1, &0.5f32.to_le_bytes())),
        ("flags", list(7, 2, &[1, 0])),
    ];
    let tensors = [("b", (vec![32, 3, 2], 8, 64)), ("a", (vec![2, 3], 0, 0))];
    let checkpoint = open(file(&values, &tensors, 64 + 6 * 34)).unwrap();
    let metadata = checkpoint.gguf().unwrap();
    let expected = [
        ("integer", Value::Integer(-1)),
        ("number", Value::Number(1e-5)),
        ("double", Value::Number(0.1)),
        ("flag", Value::Flag(true)),
        ("text", Value::Text("text".into())),
        ("texts", Value::Texts(vec!["a".into(), String::new()])),
        ("integers", Value::Integers(vec![1, -1])),
        ("numbers", Value::Numbers(vec![0.5])),
        ("flags", Value::Integers(vec![1, 0])),
    ];
    for (key, value) in expected {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    let shapes: Vec<_> =
        checkpoint.tensors().iter().map(|(name, entry)| (name.as_str(), entry.shape.clone(), entry.bytes)).collect();
    assert_eq!(shapes, [("a", vec![3, 2], 24), ("b", vec![2, 3, 32], 6 * 34)]);
    assert_eq!(checkpoint.read("b").unwrap().len(), 6 * 34);
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let sound = sound();
    assert!(open(sound.clone()).is_ok());
    for length in (0..sound.len()).step_by(64).chain([1, 3, 5, 7, 9, 23, sound.len() - 33]) {
        let error = error(sound[..length].to_vec());
        assert!(error.contains("expected"), "{length}: {error}");
    }
}

#[test]
fn what_is_no_gguf_file_is_named() {
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = sound();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        error(file)
    };
    assert!(changed(0, b"GGML").ends_with("expected a GGUF file, which begins with `GGUF`, got [71, 71, 77, 76]"));
    assert!(changed(4, &1u32.to_le_bytes()).ends_with("expected GGUF version 2 or 3, got 1"));
    assert!(changed(4, &3u32.to_be_bytes()).ends_with("expected a little-endian GGUF file, got a big-endian one"));
    for at in [8, 16] {
        let error = changed(at, &u64::MAX.to_le_bytes());
        assert!(error.contains("number of ") && error.ends_with("got 18446744073709551615"), "{error}");
    }
    assert!(changed(24, &(1u64 << 40).to_le_bytes()).contains("name of a metadata value: expected at most"));
}

#[test]
fn wrong_values_are_named() {
    let one = |value: Stored| error(file(&[("key", value)], &[], 0));
    let list = |kind: u32, count: u64| (9, [&kind.to_le_bytes(), &count.to_le_bytes()[..], &[0; 64]].concat());
    assert!(one((13, vec![0; 8])).ends_with("metadata `key`: expected a type of value from 0 to 12, got 13"));
    assert!(one((7, vec![2])).ends_with("expected true (1) or false (0), got 2"));
    assert!(one((10, vec![255; 8])).ends_with("expected an integer below 2^63, got more"));
    assert!(one(list(9, 1)).ends_with("expected a list of numbers or texts, got one of type 9"));
    assert!(one(list(6, 1 << 60)).contains("metadata `key`: expected at most "));
    assert!(error(file(&[("key", count(1)), ("key", count(1))], &[], 0)).ends_with("expected once, got twice"));
    for alignment in [0, 12] {
        let error = error(file(&[("general.alignment", count(alignment))], &[], 0));
        assert!(error.contains("`general.alignment`: expected a multiple of 8"), "{error}");
    }
    let text = error(file(&[("general.alignment", text("32"))], &[], 0));
    assert!(text.contains("`general.alignment`"), "{text}");
}

#[test]
fn tensors_that_lie_wrong_are_named() {
    let tensors = |tensors: &[(&str, Placed)]| error(file(&[], tensors, 128));
    let one = |dimensions: &[u64], kind: u32, offset: u64| tensors(&[("t", (dimensions.to_vec(), kind, offset))]);
    assert!(one(&[], 0, 0).ends_with("tensor `t`: expected 1 to 4 dimensions, got 0"));
    assert!(one(&[1; 5], 0, 0).ends_with("expected 1 to 4 dimensions, got 5"));
    assert!(one(&[4, 0], 0, 0).ends_with("expected dimensions of at least 1, got 0"));
    assert!(one(&[4], 4, 0).ends_with("expected a type that is known here, got type 4"));
    assert!(one(&[48], 8, 0).ends_with("expected rows of whole blocks, got q8_0 [48]"));
    assert!(one(&[u64::MAX, u64::MAX], 0, 0).contains("expected rows of whole blocks"));
    for (size, offset) in [(33, 0), (8, 8), (8, 1 << 40), (8, u64::MAX - 31)] {
        let error = one(&[size], 0, offset);
        assert!(error.contains("tensor `t`: expected ") && error.ends_with(&format!("got offset {offset}")), "{error}");
    }
    let overlap = tensors(&[("a", (vec![16], 0, 0)), ("b", (vec![8], 0, 32))]);
    assert!(
        overlap.contains("tensor `b`: expected to begin at ") && overlap.ends_with("within another one"),
        "{overlap}"
    );
    let twice = tensors(&[("a", (vec![8], 0, 0)), ("a", (vec![8], 0, 32))]);
    assert!(twice.ends_with("tensor `a`: expected once, got twice"), "{twice}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Whatever bytes a header has, it is read or refused; what is read is a model or refused.
    #[test]
    fn no_bytes_of_a_header_end_the_process(changes in prop::collection::vec((0usize..3000, any::<u8>()), 1..4)) {
        let mut bytes = sound();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(checkpoint) = open(bytes) {
            let _ = Weights::from_gguf("m", checkpoint).and_then(|weights| weights.spec().map(|_| ()));
        }
    }
}

/// What loading the sound file says after `change`.
fn load(name: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> Result<()> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.gguf");
    std::fs::write(&path, change(std::fs::read(fixture(name)).unwrap())).unwrap();
    let files = Weights::open(&path)?;
    let held = Decoder::load(&files, &LoadOptions::default()).map(|_| ());
    let pieces = files.expert_store().map(|_| ());
    held.and(pieces)
}

/// Replaces every occurrence of one text by another of the same length.
fn renamed(bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let (mut bytes, mut at) = (bytes, 0);
    while at + from.len() <= bytes.len() {
        if &bytes[at..at + from.len()] == from.as_bytes() {
            bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        }
        at += 1;
    }
    bytes
}

#[test]
fn a_missing_tensor_or_one_of_another_shape_is_named() {
    let names = [
        "blk.1.attn_q.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.1.ffn_up_exps.weight",
        "blk.0.ffn_norm.weight",
        "token_embd.weight",
        "output_norm.weight",
    ];
    assert!(load("olmoe.gguf", |bytes| bytes).is_ok());
    for name in names {
        let other = name.replace("weight", "missin");
        let error = load("olmoe.gguf", |bytes| renamed(bytes, name, &other)).unwrap_err();
        let expected = format!("tensor `{name}`: expected in the checkpoint, got none");
        assert!(matches!(error, Error::Checkpoint { .. }) && error.to_string().ends_with(&expected), "{name}: {error}");
    }
    // Two tensors in each other's place.
    let swapped = |bytes: Vec<u8>, a: &str, b: &str| {
        let aside = "#".repeat(a.len());
        renamed(renamed(renamed(bytes, a, &aside), b, a), &aside, b)
    };
    let swaps = [
        ("blk.0.attn_k.weight", "blk.0.attn_q.weight", "expected shape [16, 32], got [32, 32]"),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight", "expected shape [6, 20, 32], got [6, 32, 20]"),
    ];
    for (a, b, expected) in swaps {
        let error = load("olmoe.gguf", |bytes| swapped(bytes, a, b)).unwrap_err().to_string();
        assert!(error.contains("m.gguf: tensor `blk.0.") && error.contains("expected shape"), "{error}");
        assert!(error.ends_with(expected) || error.ends_with("got [16, 32]"), "{error}");
    }
}

#[test]
fn metadata_that_are_missing_or_make_no_model_are_named() {
    let error =
        |name: &str, from: &str, to: &str| load(name, |bytes| renamed(bytes, from, to)).unwrap_err().to_string();
    let unknown = error("olmoe.gguf", "\u{5}\0\0\0\0\0\0\0olmoe", "\u{5}\0\0\0\0\0\0\0gemma");
    assert_eq!(
        unknown,
        "unknown GGUF architecture `gemma`: expected one of olmoe, llama, qwen2moe, qwen3moe, qwen3next, qwen35moe, deepseek2, glm4moe, minimax-m2, granitemoe, gpt-oss, phimoe, lfm2moe"
    );
    let missing = [
        ("olmoe.gguf", "general.architecture", "expected text, got nothing: the key is missing"),
        ("olmoe.gguf", "olmoe.block_count", "expected an integer, got nothing: the key is missing"),
        ("llama.gguf", "llama.expert_count", "expected a model with experts, got none"),
        ("llama.gguf", "llama.attention.head_count", "expected an integer, got nothing: the key is missing"),
        ("deepseek2.gguf", "deepseek2.attention.kv_lora_rank", "expected an integer, got nothing: the key is missing"),
        ("deepseek2.gguf", "deepseek2.rope.dimension_count", "expected an integer, got nothing: the key is missing"),
    ];
    for (name, key, expected) in missing {
        let length = |key: &str| format!("{}\0\0\0\0\0\0\0{key}", char::from(key.len() as u8));
        let got = error(name, &length(key), &length(&key.to_uppercase()));
        assert!(got.ends_with(&format!("m.gguf: metadata `{key}`: {expected}")), "{got}");
    }
}

/// Another integer of four bytes under a key.
fn set(bytes: Vec<u8>, key: &str, value: u32) -> Vec<u8> {
    let mut bytes = bytes;
    let at = bytes.windows(key.len()).position(|part| part == key.as_bytes()).unwrap() + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    bytes
}

#[test]
fn metadata_that_contradict_the_tensors_or_each_other_are_named() {
    let cases = [
        (
            "olmoe",
            "block_count",
            1,
            "tensor `blk.1.ffn_gate_inp.weight`: expected no block after 0 as the metadata say, got one",
        ),
        ("olmoe", "block_count", 3, "tensor `blk.2.attn_norm.weight`: expected in the checkpoint, got none"),
        (
            "olmoe",
            "block_count",
            0,
            "metadata `olmoe.block_count`: expected more than olmoe.nextn_predict_layers 0, got 0",
        ),
        (
            "olmoe",
            "expert_count",
            5,
            "tensor `blk.0.ffn_gate_exps.weight`: expected shape [5, 20, 32], got [6, 20, 32]",
        ),
        (
            "olmoe",
            "expert_used_count",
            7,
            "key `olmoe.expert_used_count`: expected at most olmoe.expert_count 6, got 7",
        ),
        ("olmoe", "attention.head_count", 0, "key `olmoe.attention.head_count`: expected a positive integer, got 0"),
        (
            "olmoe",
            "feed_forward_length",
            21,
            "tensor `blk.0.ffn_gate_exps.weight`: expected shape [6, 21, 32], got [6, 20, 32]",
        ),
        ("llama", "rope.dimension_count", 6, "metadata `llama.rope.dimension_count`: expected the head's 8, got 6"),
        (
            "llama",
            "attention.head_count_kv",
            3,
            "key `llama.attention.head_count_kv`: expected a divisor of llama.attention.head_count 4, got 3",
        ),
        (
            "deepseek2",
            "leading_dense_block_count",
            2,
            "key `deepseek2.leading_dense_block_count`: expected at least one block with experts, got none",
        ),
        (
            "deepseek2",
            "expert_gating_func",
            3,
            "metadata `deepseek2.expert_gating_func`: expected 1 (softmax) or 2 (sigmoid), got 3",
        ),
        (
            "deepseek2",
            "rope.dimension_count",
            12,
            "metadata `deepseek2.attention.key_length_mla`: expected more than the rotated 12, got 12",
        ),
        (
            "deepseek2",
            "expert_group_used_count",
            5,
            "key `deepseek2.expert_group_used_count`: expected at most deepseek2.expert_group_count 4, got 5",
        ),
        (
            "qwen3moe",
            "attention.key_length",
            8,
            "metadata `qwen3moe.attention.value_length`: expected the head's 8, got 6",
        ),
    ];
    for (architecture, key, value, expected) in cases {
        let key = format!("{architecture}.{key}");
        let error = load(&format!("{architecture}.gguf"), |bytes| set(bytes, &key, value)).unwrap_err();
        assert!(error.is_user_error() && error.to_string().ends_with(&format!("m.gguf: {expected}")), "{key}: {error}");
    }
}

#[test]
fn a_directory_holds_one_file_and_one_file_may_have_parts() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("one.gguf"), sound()).unwrap();
    let files = Weights::open(directory.path()).unwrap();
    assert_eq!(files.spec().unwrap().family, "olmoe");
    assert_eq!(Weights::open(&path("one.gguf")).unwrap().name(), "one");
    std::fs::write(path("two.gguf"), sound()).unwrap();
    let error = Weights::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("expected one GGUF file, got ") && error.ends_with("two.gguf"), "{error}");
    assert!(Weights::open(&path("none.gguf")).is_err_and(|error| matches!(error, Error::Io { .. })));

    // A part says which one it is.
    let parts = tempfile::tempdir().unwrap();
    let path = |part: usize| parts.path().join(format!("m-{part:05}-of-00002.gguf"));
    let part = |number: u16, tensor: &str| {
        let values = [("split.no", (2, number.to_le_bytes().to_vec())), ("split.count", (2, vec![2, 0]))];
        file(&values, &[(tensor, (vec![8], 0, 0))], 32)
    };
    std::fs::write(path(1), part(0, "a")).unwrap();
    assert!(Checkpoint::open(parts.path()).is_err_and(|error| matches!(error, Error::Io { .. })));
    std::fs::write(path(2), part(1, "b")).unwrap();
    for opened in [parts.path().to_path_buf(), path(1), path(2)] {
        let checkpoint = Checkpoint::open(&opened).unwrap();
        assert_eq!(checkpoint.tensors().keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.file_of(checkpoint.entry("b").unwrap()), path(2).display().to_string());
    }
    std::fs::write(path(2), part(0, "b")).unwrap();
    let error = Checkpoint::open(parts.path()).unwrap_err().to_string();
    assert!(error.contains("expected part 2 of 2, ") && error.ends_with("got part 1 of 2"), "{error}");
    std::fs::write(path(2), part(1, "a")).unwrap();
    assert!(Checkpoint::open(parts.path()).unwrap_err().to_string().ends_with("tensor `a`: expected once, got twice"));
}

#[test]
fn a_file_without_a_tokenizer_runs_on_ids_alone() {
    let files = Weights::open(&fixture("olmoe.gguf")).unwrap();
    assert!(Decoder::load(&files, &LoadOptions::default()).is_ok());
    let error = Model::new(&files, &LoadOptions::default()).err().unwrap();
    assert!(matches!(error, Error::Tokenizer(_)), "{error}");
    let expected =
        "olmoe.gguf: key `tokenizer.ggml.tokens`: expected tokens, got none: put the model's tokenizer.json beside it";
    assert!(error.to_string().ends_with(expected), "{error}");
}
