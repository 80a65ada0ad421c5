//! Which tokens end a text: those that a file names, and marks in its vocabulary that mean that in the families there are.
//!
//! A file names one for the text, one for a turn, one for a message. A checkpoint's `generation_config.json` lists more (Qwen's
//! `<|endoftext|>`, gpt-oss's `<|call|>`), which no key has room for, so llama.cpp goes by their texts (`src/llama-vocab.cpp`).

use super::tokenizer::{CONTROL, USER_DEFINED};
use crate::checkpoint::Metadata;
use crate::checkpoint::metadata::Value;
use crate::error::Result;

/// Of the text, of a turn, of a message (which is a call of a tool).
const KEYS: [&str; 3] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Tokens of their own that end a text wherever they are in a vocabulary.
const MARKS: [&str; 11] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<EOT>",
    "[EOT]",
    "[e~[",
];
/// Ends a message; the last one of a text too, where there is no mark for that.
const MESSAGE: &str = "<|end|>";
const TEXT: &str = "<|return|>";

/// The ids, those that the file names first.
pub(super) fn ends(metadata: &Metadata) -> Result<Vec<usize>> {
    let mut ends = Vec::new();
    for key in KEYS {
        // -1 is how some say that there is none.
        let is_none = matches!(metadata.get(key), Some(Value::Integer(-1)));
        let id = if is_none { None } else { metadata.count(key)? };
        ends.extend(id.filter(|id| !ends.contains(id)));
    }
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = metadata.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    let marks =
        || tokens.iter().zip(types).enumerate().filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED));
    let messages_go_on = marks().any(|(_, (token, _))| token == TEXT);
    for (id, (token, _)) in marks() {
        let is_end = MARKS.contains(&token.as_str()) || token == MESSAGE;
        if is_end && !ends.contains(&id) {
            ends.push(id);
        }
    }
    // Whatever the file says of it.
    ends.retain(|&id| !messages_go_on || tokens.get(id).is_none_or(|token| token != MESSAGE));
    Ok(ends)
}

#[cfg(all(test, feature = "layer"))]
mod tests {
    use candle_core::quantized::gguf_file::{self, Value};

    use super::ends;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn a_text_ends_where_the_file_or_a_mark_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |keys: &[(&str, u32)], tokens: &[&str]| {
            let texts = tokens.iter().map(|token| Value::String(token.to_string())).collect();
            // Those in angle brackets are control tokens, but for one that a text may have, and one of a user's own.
            let kind = |token: &&str| {
                Value::I32(match *token {
                    "<EOT>" => 1,
                    "<|im_end|>" => 4,
                    token => 1 + 2 * i32::from(token.starts_with('<')),
                })
            };
            let mut metadata = vec![
                ("tokenizer.ggml.tokens", Value::Array(texts)),
                ("tokenizer.ggml.token_type", Value::Array(tokens.iter().map(kind).collect())),
            ];
            metadata.extend(keys.iter().map(|(key, id)| (*key, Value::U32(*id))));
            let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
            gguf_file::write(&mut file.reopen().unwrap(), &metadata, &[]).unwrap();
            ends(Checkpoint::open(file.path()).unwrap().gguf().unwrap()).unwrap()
        };
        let [eos, eot, eom] = super::KEYS;
        assert_eq!(of(&[], &["a", "<EOT>", "<think>"]), [0; 0]);
        // As of GLM-4.7: two that no list has.
        let glm = ["a", "<|user|>", "<|observation|>", "<|endoftext|>"];
        assert_eq!(of(&[(eos, 3), (eot, 1), (eom, 2)], &glm), [3, 1, 2]);
        // As of Qwen3, which names the end of a turn alone.
        assert_eq!(of(&[(eos, 2)], &["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), [2, 0]);
        // As of gpt-oss: a message's end is not the text's.
        let harmony = ["<|return|>", "<|end|>", "<|call|>", "<|start|>"];
        assert_eq!(of(&[(eos, 0)], &harmony), [0, 2]);
        assert_eq!(of(&[(eos, 0), (eot, 1)], &harmony), [0, 2]);
        assert_eq!(of(&[(eos, 1)], &["<|end|>", "<|endoftext|>"]), [1, 0]);
    }
}
