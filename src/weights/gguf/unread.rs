//! Metadata and tensors of a GGUF file that would change what the model computes and that nothing here reads, by architecture: refused.

use super::Architecture;
use crate::error::Result;

/// Numbers, those that say nothing, and the architectures that read them.
const NUMBERS: [(&str, &[f64], &[&str]); 16] = [
    ("attention.scale", &[0.0], &["granitemoe"]),
    ("embedding_scale", &[0.0, 1.0], &["granitemoe"]),
    ("residual_scale", &[0.0, 1.0], &["granitemoe"]),
    ("logit_scale", &[0.0, 1.0], &["granitemoe"]),
    ("attention.clamp_kqv", &[0.0], &["olmoe"]),
    ("attention.temperature_scale", &[0.0], &[]),
    ("attention.max_alibi_bias", &[0.0], &[]),
    ("attn_logit_softcapping", &[0.0], &[]),
    ("router_logit_softcapping", &[0.0], &[]),
    ("final_logit_softcapping", &[0.0], &[]),
    ("expert_weights_scale", &[0.0, 1.0], &["deepseek2", "glm4moe"]),
    ("expert_group_count", &[0.0, 1.0], &["deepseek2", "glm4moe"]),
    ("nextn_predict_layers", &[0.0], &["deepseek2", "glm4moe", "qwen3next", "qwen35moe"]),
    // 1 is softmax, 2 sigmoid.
    ("expert_gating_func", &[0.0, 1.0], &["deepseek2", "glm4moe", "minimax-m2", "lfm2moe"]),
    ("expert_gating_func", &[0.0, 2.0], &SOFTMAX),
    ("rope.freq_base_swa", &[0.0], &[]),
];

/// Architectures whose experts have softmax scores, and DeepSeek's, which may.
const SOFTMAX: [&str; 9] =
    ["llama", "olmoe", "qwen2moe", "qwen3moe", "granitemoe", "deepseek2", "phimoe", "qwen3next", "qwen35moe"];

/// Those that have biases of queries, keys and values, and norms of queries and keys.
const BIASED: [&str; 5] = ["qwen2moe", "qwen3moe", "glm4moe", "gpt-oss", "phimoe"];
const NORMED: [&str; 7] = ["olmoe", "qwen3moe", "glm4moe", "minimax-m2", "lfm2moe", "qwen3next", "qwen35moe"];

/// Parts of a block, and the architectures that read them.
const TENSORS: [(&str, &[&str]); 16] = [
    ("attn_q.bias", &BIASED),
    ("attn_k.bias", &BIASED),
    ("attn_v.bias", &BIASED),
    ("attn_output.bias", &["qwen3moe", "gpt-oss", "phimoe"]),
    ("attn_norm.bias", &["phimoe"]),
    ("ffn_norm.bias", &["phimoe"]),
    ("attn_q_norm.weight", &NORMED),
    ("attn_k_norm.weight", &NORMED),
    ("attn_sinks.weight", &["gpt-oss"]),
    ("exp_probs_b.bias", &["deepseek2", "glm4moe", "minimax-m2", "lfm2moe"]),
    ("ffn_gate_inp.bias", &["gpt-oss"]),
    ("ffn_gate_exps.bias", &["gpt-oss"]),
    ("ffn_up_exps.bias", &["gpt-oss"]),
    ("ffn_down_exps.bias", &["gpt-oss"]),
    ("ffn_gate_inp_shexp.weight", &["qwen2moe", "qwen3next", "qwen35moe"]),
    ("ffn_up_shexp.weight", &["qwen2moe", "deepseek2", "glm4moe", "qwen3next", "qwen35moe"]),
];

impl Architecture<'_> {
    /// Refuses what is not read.
    pub(super) fn check_unread(&self) -> Result<()> {
        for (name, neutral, architectures) in NUMBERS {
            if architectures.contains(&self.architecture) {
                continue;
            }
            if let Some(number) = self.number(name)?.filter(|number| !neutral.contains(number)) {
                let expected = format!("nothing or {}", neutral[neutral.len() - 1]);
                return Err(self.metadata.error(&self.key(name), &expected, &number.to_string()));
            }
        }
        let sections = self.metadata.integers(&self.key("rope.dimension_sections"))?.unwrap_or_default();
        if self.architecture != "qwen35moe" && sections.iter().any(|&section| section != 0) {
            return Err(self.metadata.error(
                &self.key("rope.dimension_sections"),
                "nothing",
                "positions of several kinds",
            ));
        }
        // Granite's switch: without it there is no rotation at all.
        if self.architecture == "granitemoe" && self.flag("rope.scaling.finetuned")? == Some(false) {
            return Err(self.metadata.error(&self.key("rope.scaling.finetuned"), "true", "false"));
        }
        let window = self.count("attention.sliding_window")?.filter(|&window| window > 0);
        if let Some(window) = window.filter(|_| self.architecture != "gpt-oss") {
            let context = self.required("context_length")?;
            if window < context {
                let expected = format!("nothing or at least the context length {context}");
                return Err(self.metadata.error(&self.key("attention.sliding_window"), &expected, &window.to_string()));
            }
        }
        for (name, entry) in self.checkpoint.tensors() {
            let Some((_, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { continue };
            let unread = TENSORS.iter().any(|(unread, read)| *unread == part && !read.contains(&self.architecture));
            // Of numbers that stand for others times a scale of their own.
            if unread || part.ends_with(".scale") {
                let expected = format!("no such tensor in a model of {}", self.architecture);
                let file = self.checkpoint.file_of(entry).into();
                let detail = format!("tensor `{name}`: expected {expected}, got one");
                return Err(crate::error::Error::Checkpoint { file, detail });
            }
        }
        Ok(())
    }
}
