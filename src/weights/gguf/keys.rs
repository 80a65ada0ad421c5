//! Errors over a GGUF file's configuration in the file's own words: [`gguf`](super) writes its metadata as a `config.json`, and
//! who reads that names its keys.

use crate::checkpoint::Metadata;
use crate::error::Error;

/// Keys of a configuration and what a GGUF file has for them, behind its architecture's name.
const KEYS: &[(&str, &str)] = &[
    ("attention_bias", "attn_q.bias"),
    ("attention_multiplier", "attention.scale"),
    ("conv_L_cache", "shortconv.l_cache"),
    ("clip_qkv", "attention.clamp_kqv"),
    ("embedding_multiplier", "embedding_scale"),
    ("first_k_dense_replace", "leading_dense_block_count"),
    ("head_dim", "attention.key_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("kv_lora_rank", "attention.kv_lora_rank"),
    ("linear_conv_kernel_dim", "ssm.conv_kernel"),
    ("linear_key_head_dim", "ssm.state_size"),
    ("linear_num_key_heads", "ssm.group_count"),
    ("linear_num_value_heads", "ssm.time_step_rank"),
    ("linear_value_head_dim", "ssm.inner_size"),
    ("logits_scaling", "logit_scale"),
    ("max_position_embeddings", "context_length"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("n_group", "expert_group_count"),
    ("n_routed_experts", "expert_count"),
    ("n_shared_experts", "expert_shared_count"),
    ("norm_eps", "attention.layer_norm_rms_epsilon"),
    ("norm_topk_prob", "expert_weights_norm"),
    ("num_attention_heads", "attention.head_count"),
    ("num_dense_layers", "leading_dense_block_count"),
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("num_hidden_layers", "block_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("num_local_experts", "expert_count"),
    ("num_nextn_predict_layers", "nextn_predict_layers"),
    ("original_max_position_embeddings", "rope.scaling.original_context_length"),
    ("partial_rotary_factor", "rope.dimension_count"),
    ("q_lora_rank", "attention.q_lora_rank"),
    ("qk_rope_head_dim", "rope.dimension_count"),
    ("residual_multiplier", "residual_scale"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("routed_scaling_factor", "expert_weights_scale"),
    ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ("shared_intermediate_size", "expert_shared_feed_forward_length"),
    ("sliding_window", "attention.sliding_window"),
    ("topk_group", "expert_group_used_count"),
    ("v_head_dim", "attention.value_length"),
];

/// Those of stretched positions, under `rope_scaling` or `rope_parameters`.
const SCALING: &[(&str, &str)] = &[
    ("rope_type", "type"),
    ("type", "type"),
    ("factor", "factor"),
    ("original_max_position_embeddings", "original_context_length"),
    ("attention_factor", "yarn_attn_factor"),
    ("short_mscale", "attn_factor"),
    ("long_mscale", "attn_factor"),
    ("beta_fast", "yarn_beta_fast"),
    ("beta_slow", "yarn_beta_slow"),
    ("mscale", "yarn_log_multiplier"),
    ("mscale_all_dim", "yarn_log_multiplier"),
];

/// The same error; of this file's configuration, with the file's names of its keys.
pub(crate) fn in_words_of_file(error: Error, metadata: &Metadata) -> Error {
    match error {
        Error::Config { file, detail } if file == metadata.file() => {
            let architecture = metadata.text("general.architecture").ok().flatten().unwrap_or_default();
            Error::Config { file, detail: translated(&detail, architecture) }
        }
        other => other,
    }
}

fn translated(text: &str, architecture: &str) -> String {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '.';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !is_name(letter)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        out.push_str(&key(word, architecture).unwrap_or_else(|| word.to_owned()));
        let next = after.find(is_name).unwrap_or(after.len());
        out.push_str(&after[..next]);
        rest = &after[next..];
    }
    out
}

/// What a GGUF file calls a key of a configuration.
fn key(word: &str, architecture: &str) -> Option<String> {
    let of =
        |table: &[(&str, &'static str)], word: &str| table.iter().find(|(key, _)| *key == word).map(|(_, name)| *name);
    if word == "eos_token_id" {
        return Some("tokenizer.ggml.eos_token_id".into());
    }
    if word == "vocab_size" {
        return Some("token_embd.weight".into());
    }
    let scaling = ["rope_scaling", "rope_parameters"].into_iter().find_map(|map| word.strip_prefix(map));
    match scaling {
        Some("") => Some(format!("{architecture}.rope.scaling")),
        Some(key) => Some(match key.trim_start_matches('.') {
            "rope_theta" => format!("{architecture}.rope.freq_base"),
            key => format!("{architecture}.rope.scaling.{}", of(SCALING, key).unwrap_or(key)),
        }),
        None => Some(format!("{architecture}.{}", of(KEYS, word)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_file() {
        for (text, expected) in [
            (
                "key `num_attention_heads`: expected a positive integer, got 0",
                "key `llama.attention.head_count`: expected a positive integer, got 0",
            ),
            (
                "key `rope_scaling.factor`: expected more, got -1",
                "key `llama.rope.scaling.factor`: expected more, got -1",
            ),
            ("key `rope_parameters.rope_theta`: got 1.5", "key `llama.rope.freq_base`: got 1.5"),
            (
                "key `sliding_window`: expected at least max_position_embeddings 64, got 63",
                "key `llama.attention.sliding_window`: expected at least llama.context_length 64, got 63",
            ),
            ("nothing of ours: é", "nothing of ours: é"),
            ("", ""),
        ] {
            assert_eq!(translated(text, "llama"), expected);
        }
    }
}
