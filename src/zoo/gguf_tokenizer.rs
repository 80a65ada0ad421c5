//! The tokenizer of a GGUF file as the `tokenizer.json` that stands for the same.
//!
//! `tokenizer.ggml.model` says which kind it is: `gpt2`, byte pairs after a split that `tokenizer.ggml.pre` names, or `llama`,
//! SentencePiece's byte pairs, whose merges are not in the file but follow from its scores. A split that is not known here is
//! an error: another one would give other tokens without a word.
//!
//! Knows nothing of the library that reads `tokenizer.json`.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::checkpoint::Metadata;
use crate::error::{Error, Result};

/// `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// What text is cut by before pairs are merged.
struct Split {
    /// What `tokenizer.ggml.pre` may say for it.
    names: &'static [&'static str],
    /// Text is brought into Unicode's form C first.
    composed: bool,
    /// One after the other; none stands for GPT-2's own, which the byte level has.
    patterns: &'static [&'static str],
    /// A word that is a token needs no merges.
    whole_words: bool,
}

/// As in the models' own `tokenizer.json`, or where they have more than tokenizers need in llama.cpp (`llama-vocab.cpp`).
const SPLITS: [Split; 5] = [
    Split { names: &["gpt-2"], composed: false, patterns: &[], whole_words: false },
    Split { names: &["olmo"], composed: true, patterns: &[], whole_words: false },
    Split {
        names: &["qwen2", "deepseek-r1-qwen"],
        composed: true,
        patterns: &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        whole_words: false,
    },
    Split {
        names: &["llama-bpe", "llama3"],
        composed: false,
        patterns: &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        whole_words: true,
    },
    Split {
        names: &["deepseek-v3"],
        composed: false,
        patterns: &[
            r"\p{N}{1,3}",
            "[一-龥\u{3040}-ゟ゠-ヿ]+",
            concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
                r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        ],
        whole_words: false,
    },
];

/// `tokenizer.json` of a GGUF file.
///
/// # Errors
/// [`Error::Config`] for metadata that are missing or of another type, [`Error::Tokenizer`] for a kind of tokenizer or of split
/// that there is nothing for here, or whose lists contradict each other: then a `tokenizer.json` beside the file helps.
pub fn tokenizer_json(metadata: &Metadata) -> Result<String> {
    let tokenizer = Source::new(metadata)?;
    let (normalizer, pre_tokenizer, decoder, model) = match metadata.text("tokenizer.ggml.model")? {
        Some("gpt2") => tokenizer.byte_level()?,
        Some("llama") => tokenizer.sentence_piece()?,
        other => return Err(unknown(metadata, "model gpt2 or llama", other)),
    };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": tokenizer.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": tokenizer.first_token()?,
        "decoder": decoder,
        "model": model,
    });
    Ok(json.to_string())
}

fn wrong(metadata: &Metadata, detail: String) -> Error {
    Error::Tokenizer(format!("{}: {detail}: put the model's tokenizer.json beside it", metadata.file()))
}

fn unknown(metadata: &Metadata, expected: &str, got: Option<&str>) -> Error {
    wrong(metadata, format!("expected a tokenizer of {expected}, got {}", got.unwrap_or("none")))
}

/// Normalizer, pre-tokenizer, decoder and model.
type Parts = (Value, Value, Value, Value);

struct Source<'a> {
    metadata: &'a Metadata,
    tokens: &'a [String],
    /// One for each token.
    types: Vec<i64>,
}

impl<'a> Source<'a> {
    fn new(metadata: &'a Metadata) -> Result<Self> {
        let Some(tokens) = metadata.texts("tokenizer.ggml.tokens")? else {
            return Err(wrong(metadata, "key `tokenizer.ggml.tokens`: expected tokens, got none".into()));
        };
        let types = metadata.integers("tokenizer.ggml.token_type")?.map(<[i64]>::to_vec);
        let types = types.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if types.len() != tokens.len() {
            let detail = format!("expected as many types as the {} tokens, got {}", tokens.len(), types.len());
            return Err(wrong(metadata, detail));
        }
        Ok(Self { metadata, tokens, types })
    }

    fn vocab(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    /// Tokens that are found in text before anything is cut.
    fn added(&self) -> Vec<Value> {
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        let whole = tokens.filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED));
        let added = whole.map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": *kind != USER_DEFINED,
            })
        });
        added.collect()
    }

    /// What a text begins with, where special tokens are asked for.
    fn first_token(&self) -> Result<Value> {
        let metadata = self.metadata;
        let is_sentence_piece = metadata.text("tokenizer.ggml.model")? == Some("llama");
        let add = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(is_sentence_piece);
        let Some(id) = metadata.count("tokenizer.ggml.bos_token_id")?.filter(|_| add) else { return Ok(Value::Null) };
        let Some(token) = self.tokens.get(id) else {
            return Err(wrong(metadata, format!("expected a first token below {}, got {id}", self.tokens.len())));
        };
        let [special, text] =
            [json!({"SpecialToken": {"id": token, "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}})];
        Ok(json!({
            "type": "TemplateProcessing",
            "single": [special, text],
            "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token.as_str(): {"id": token, "ids": [id], "tokens": [token]}},
        }))
    }

    fn byte_level(&self) -> Result<Parts> {
        let metadata = self.metadata;
        let pre = metadata.text("tokenizer.ggml.pre")?;
        let known = SPLITS.iter().find(|split| pre.is_some_and(|pre| split.names.contains(&pre)));
        let Some(split) = known else {
            let names: Vec<&str> = SPLITS.iter().flat_map(|split| split.names).copied().collect();
            return Err(unknown(metadata, &format!("pre {}", names.join(", ")), pre));
        };
        let Some(merges) = metadata.texts("tokenizer.ggml.merges")? else {
            return Err(wrong(metadata, "expected merges, got none".into()));
        };
        // A space stands between the two, and neither of them is empty.
        let pair = |merge: &String| {
            let at = merge.char_indices().skip(1).find(|(_, letter)| *letter == ' ').map(|(at, _)| at);
            let pair = at.map(|at| json!([merge[..at], merge[at + 1..]]));
            pair.ok_or_else(|| wrong(metadata, format!("expected merges of two tokens, got `{merge}`")))
        };
        let merges = merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
        let cut = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut cuts: Vec<Value> = split.patterns.iter().map(cut).collect();
        cuts.push(byte_level(cuts.is_empty()));
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": split.whole_words,
            "vocab": self.vocab(), "merges": merges,
        });
        let normalizer = if split.composed { json!({"type": "NFC"}) } else { Value::Null };
        Ok((normalizer, json!({"type": "Sequence", "pretokenizers": cuts}), byte_level(true), model))
    }

    fn sentence_piece(&self) -> Result<Parts> {
        let metadata = self.metadata;
        let scores = metadata.numbers("tokenizer.ggml.scores")?.unwrap_or(&[]);
        if scores.len() != self.tokens.len() {
            let detail = format!("expected as many scores as the {} tokens, got {}", self.tokens.len(), scores.len());
            return Err(wrong(metadata, detail));
        }
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let (mut before, mut after) =
            (Vec::new(), vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})]);
        if metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
            before.push(json!({"type": "Prepend", "prepend": "▁"}));
            after.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        before.push(replace(" ", "▁"));
        let unknown = self.types.iter().position(|&kind| kind == UNKNOWN).map(|id| &self.tokens[id]);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": self.vocab(), "merges": self.merges(scores),
        });
        Ok((
            json!({"type": "Sequence", "normalizers": before}),
            Value::Null,
            json!({"type": "Sequence", "decoders": after}),
            model,
        ))
    }

    /// Every way to make a token of two, those of the best token first.
    fn merges(&self, scores: &[f64]) -> Vec<[&'a str; 2]> {
        let normal = self.tokens.iter().zip(&self.types).enumerate().filter(|(_, (_, kind))| **kind == NORMAL);
        let ids: HashMap<&str, usize> = normal.map(|(id, (token, _))| (token.as_str(), id)).collect();
        let mut found = Vec::new();
        for (&token, &id) in &ids {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&first), Some(&second)) = (ids.get(left), ids.get(right)) {
                    found.push((id, first, second, [left, right]));
                }
            }
        }
        // Ties in the order of tokens, so that the result is the same in every run.
        found.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then_with(|| (a.0, a.1, a.2).cmp(&(b.0, b.1, b.2))));
        found.into_iter().map(|(.., pair)| pair).collect()
    }
}
