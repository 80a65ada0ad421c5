//! Tokenizers of GGUF files: SentencePiece's against the sentencepiece package (`tests/goldens/make_gguf_goldens.py`), what is not known
//! here refused. Byte pairs are in `gguf_model.rs`, with the bundled model.

use std::path::{Path, PathBuf};

use crate::{Checkpoint, Error, Result, Weights};
use candle_core::quantized::gguf_file::{self, Value};
use tokenizers::Tokenizer;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf").join(name)
}

fn json(path: &Path) -> Result<String> {
    Weights::from_parts("m", "", Checkpoint::open(path)?).tokenizer_json()
}

#[test]
fn sentence_piece_gives_the_same_tokens() {
    let tokenizer = Tokenizer::from_bytes(json(&fixture("sentencepiece.gguf")).unwrap()).unwrap();
    let samples: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture("sentencepiece.json")).unwrap()).unwrap();
    assert!(samples.len() > 10);
    for sample in samples {
        let text = sample["text"].as_str().unwrap();
        // Tokens that control something are found in text here, as llama.cpp does where it is asked to parse them.
        if text.contains("</s>") {
            continue;
        }
        let expected: Vec<u32> =
            sample["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, false).unwrap().get_ids(), expected, "{text}");
        assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
        if !text.is_empty() {
            assert_eq!(tokenizer.encode(text, true).unwrap().get_ids()[0], 1, "a text begins with its token");
        }
    }
}

/// What a file with these metadata says.
fn error(metadata: &[(&str, Value)]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut file.reopen().unwrap(), &metadata, &[]).unwrap();
    let error = json(file.path()).unwrap_err();
    assert!(matches!(error, Error::Tokenizer(_)), "{error}");
    error.to_string().replace(&format!("tokenizer: {}: ", file.path().display()), "")
}

#[test]
fn what_would_give_other_tokens_is_refused() {
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|text| Value::String(text.to_string())).collect());
    let text = |text: &str| Value::String(text.into());
    let tokens = || ("tokenizer.ggml.tokens", texts(&["a", "b", "ab"]));
    let beside = "put the model's tokenizer.json beside it";
    assert_eq!(
        error(&[tokens(), ("tokenizer.ggml.model", text("rwkv"))]),
        format!("expected a tokenizer of model gpt2 or llama, got rwkv: {beside}")
    );
    assert_eq!(error(&[tokens()]), format!("expected a tokenizer of model gpt2 or llama, got none: {beside}"));
    let bytes = || ("tokenizer.ggml.model", text("gpt2"));
    assert_eq!(
        error(&[tokens(), bytes(), ("tokenizer.ggml.pre", text("tekken"))]),
        format!(
            "expected a tokenizer of pre gpt-2, olmo, qwen2, deepseek-r1-qwen, qwen35, llama-bpe, llama3, llama-v3, lfm2, glm4, chatglm-bpe, refact, starcoder, smollm, gpt-4o, minimax-m2, deepseek-llm, deepseek-coder, deepseek-v3, got tekken: {beside}"
        )
    );
    assert!(error(&[tokens(), bytes()]).ends_with(&format!("got none: {beside}")));
    let pre = || ("tokenizer.ggml.pre", text("qwen2"));
    assert_eq!(error(&[tokens(), bytes(), pre()]), format!("expected merges, got none: {beside}"));
    let merges = ("tokenizer.ggml.merges", texts(&["ab"]));
    assert_eq!(
        error(&[tokens(), bytes(), pre(), merges]),
        format!("expected merges of two tokens, got `ab`: {beside}")
    );
    let types = ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)]));
    assert_eq!(error(&[tokens(), bytes(), types]), format!("expected as many types as the 3 tokens, got 1: {beside}"));
    let pieces = ("tokenizer.ggml.model", text("llama"));
    assert_eq!(error(&[tokens(), pieces]), format!("expected as many scores as the 3 tokens, got 0: {beside}"));
}

#[test]
fn byte_pairs_are_cut_as_the_file_says() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|text| Value::String(text.to_string())).collect());
    let encode = |pre: &str, text: &str| {
        let metadata = [
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", Value::String(pre.into())),
            ("tokenizer.ggml.tokens", texts(&["1", "2", "3", "4", "12", "123", "34", "a", "<end>", "é"])),
            ("tokenizer.ggml.merges", texts(&["1 2", "12 3", "3 4"])),
            ("tokenizer.ggml.token_type", Value::Array([1, 1, 1, 1, 1, 1, 1, 1, 3, 4].map(Value::I32).into())),
        ];
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        gguf_file::write(&mut file.reopen().unwrap(), &metadata, &[]).unwrap();
        let tokenizer = Tokenizer::from_bytes(json(file.path()).unwrap()).unwrap();
        tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    };
    // GPT-2 takes numbers whole, Qwen digit by digit, Llama 3 and DeepSeek-V3 in threes.
    assert_eq!(encode("gpt-2", "1234"), [5, 3]);
    assert_eq!(encode("qwen2", "1234"), [0, 1, 2, 3]);
    assert_eq!(encode("llama-bpe", "1234"), [5, 3]);
    assert_eq!(encode("llama-bpe", "12312"), [5, 4]);
    assert_eq!(encode("deepseek-v3", "12312a"), [5, 4, 7]);
    assert_eq!(encode("deepseek-v3", "a<end>1éa"), [7, 8, 0, 9, 7]);
}
