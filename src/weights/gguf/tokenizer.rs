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
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;

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

/// Byte pairs of Llama 3, and of LFM2.
const LLAMA_3: &[&str] = &["llama-bpe", "llama3", "llama-v3", "lfm2"];

/// Byte pairs of ChatGLM, whose texts have no first token unless the file names one.
const CHATGLM: &[&str] = &["glm4", "chatglm-bpe"];

/// Of both: numbers in threes.
const NUMBERS_IN_THREES: &[&str] = &[concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)];

/// Words of scripts that have capitals, as DeepSeek's first tokenizer lists them.
const CASED_LETTERS: &str = concat!(
    r"\s?[",
    "A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-\u{2AF}\u{370}-\u{373}",
    "\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}",
    "\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}",
    "\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}",
    "\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}",
    "\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}",
    "\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}",
    "\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}",
    "\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}",
    "\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}",
    "\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}",
    "\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}",
    "]+"
);

/// The same for punctuation, in ASCII and as wide as East Asian letters are.
const WIDE_PUNCTUATION: &str =
    concat!(r"\s?[!-/:-~", "\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}", "]+");

/// Chinese, Japanese and Korean, and what lies between.
const EAST_ASIAN: &str = "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";

/// As in the models' own `tokenizer.json`, or where they have more than tokenizers need in llama.cpp (`llama-vocab.cpp`).
const SPLITS: [Split; 11] = [
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
    // Marks belong to the letters before them.
    Split {
        names: &["qwen35"],
        composed: true,
        patterns: &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        whole_words: false,
    },
    Split { names: LLAMA_3, composed: false, patterns: NUMBERS_IN_THREES, whole_words: true },
    Split { names: CHATGLM, composed: false, patterns: NUMBERS_IN_THREES, whole_words: false },
    Split {
        names: &["refact", "starcoder", "smollm"],
        composed: false,
        patterns: &[r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
        whole_words: false,
    },
    // gpt-oss: capitals begin a word.
    Split {
        names: &["gpt-4o", "minimax-m2"],
        composed: false,
        patterns: &[concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        whole_words: false,
    },
    Split {
        names: &["deepseek-llm"],
        composed: false,
        patterns: &[r"[\r\n]", CASED_LETTERS, WIDE_PUNCTUATION, r"\s+$", EAST_ASIAN, r"\p{N}+"],
        whole_words: false,
    },
    Split {
        names: &["deepseek-coder"],
        composed: false,
        patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"],
        whole_words: false,
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
pub(crate) fn tokenizer_json(metadata: &Metadata) -> Result<String> {
    let tokenizer = Vocabulary::new(metadata)?;
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
        "post_processor": tokenizer.template()?,
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

/// Which tokens llama.cpp puts around a text.
struct Around {
    first: Option<usize>,
    last: Option<usize>,
}

impl Around {
    /// As the file says, and where it does not, as its kind of tokenizer has it: tokens 1 and 2 of SentencePiece, whose texts begin with
    /// one, and 11 of byte pairs, where only those of Llama 3 do.
    fn of(metadata: &Metadata) -> Result<Self> {
        let pre = metadata.text("tokenizer.ggml.pre")?;
        let is = |names: &[&str]| pre.is_some_and(|pre| names.contains(&pre));
        let (begins, first, last) = match metadata.text("tokenizer.ggml.model")? {
            Some("llama") => (true, Some(1), Some(2)),
            Some("gpt2") => (is(LLAMA_3), Some(11).filter(|_| !is(CHATGLM)), Some(11)),
            _ => (false, None, None),
        };
        let tokens = metadata.texts("tokenizer.ggml.tokens")?.map_or(0, <[String]>::len);
        let token = |name: &str, otherwise: Option<usize>, added: bool| -> Result<Option<usize>> {
            let added = metadata.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(added);
            let said = metadata.count(&format!("tokenizer.ggml.{name}_token_id"))?;
            Ok(said.or(otherwise.filter(|&id| id < tokens)).filter(|_| added))
        };
        Ok(Self { first: token("bos", first, begins)?, last: token("eos", last, false)? })
    }
}

/// The tokens before a text and after it where the file says whether its beginning has one, for those who take the tokenizer from
/// elsewhere; `None` where it does not say.
///
/// # Errors
/// [`Error::Config`] for metadata of another type.
#[cfg(feature = "model")]
pub(crate) fn said_around(metadata: &Metadata) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
    if metadata.flag("tokenizer.ggml.add_bos_token")?.is_none() {
        return Ok(None);
    }
    let Around { first, last } = Around::of(metadata)?;
    // [`Metadata::count`] gives no more than 32 bits.
    let ids = |id: Option<usize>| id.into_iter().map(|id| id as u32).collect();
    Ok(Some((ids(first), ids(last))))
}

struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: &'a [String],
    /// One for each token.
    types: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
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

    /// What stands around a text, where special tokens are asked for.
    fn template(&self) -> Result<Value> {
        let around = Around::of(self.metadata)?;
        let named = |id: usize| {
            let expected = format!("expected tokens around a text below {}, got {id}", self.tokens.len());
            self.tokens.get(id).map(|token| (id, token)).ok_or_else(|| wrong(self.metadata, expected))
        };
        let first = around.first.map(named).transpose()?;
        let last = around.last.map(named).transpose()?;
        if first.is_none() && last.is_none() {
            return Ok(Value::Null);
        }
        let special = |token: Option<(usize, &String)>| {
            token.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": 0}}))
        };
        let sequence = |id: &str, kind: usize| json!({"Sequence": {"id": id, "type_id": kind}});
        let around =
            |text: Vec<Value>| -> Vec<Value> { special(first).into_iter().chain(text).chain(special(last)).collect() };
        let defined =
            |(id, token): (usize, &String)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
        let defined: Map<String, Value> = [first, last].into_iter().flatten().map(defined).collect();
        Ok(json!({
            "type": "TemplateProcessing",
            "single": around(vec![sequence("A", 0)]),
            "pair": around(vec![sequence("A", 0), sequence("B", 1)]),
            "special_tokens": defined,
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
