//! Names of tensors: those that a decoder asks for, as transformers has them, and those in a GGUF file, with what was done to them;
//! and where the experts of a block are in one.

use super::architecture;
use crate::checkpoint::{Checkpoint, Metadata};
use crate::error::Result;
use crate::offload::store::Part;
use crate::spec::{ModelSpec, MoeSpec};
use crate::weights::experts::{Order, Slice, Tensors};

/// Where the numbers of a tensor are, under the name that it has in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TensorSource {
    /// In this one, as they are.
    Same(String),
    /// In this one, rows of a head's two halves in turns, so that neighbours are rotated against each other.
    InTurns {
        /// Its name.
        name: String,
        /// How many heads there are.
        heads: usize,
    },
    /// In a row of this one.
    Row {
        /// Its name.
        name: String,
        /// Which of its rows.
        row: usize,
    },
    /// In one, or split into keys `[heads, rank, width]` and values `[heads, width, rank]`.
    KeysAndValues {
        /// Both in one, as transformers has them.
        joined: String,
        /// Keys, their last two dimensions swapped.
        keys: String,
        /// Values.
        values: String,
    },
    /// In this one, of each of so many parts of its rows the first or the second half.
    Halves {
        /// Its name.
        name: String,
        /// How many parts there are.
        parts: usize,
        /// The second half.
        second: bool,
    },
    /// What minus these numbers are the powers of `e` of.
    Logarithms(String),
}

/// Tensors of all blocks but `weight` and `bias`: transformers' names, of FFNs those within `mlp`, and GGUF's.
const BLOCK: [(&str, &str); 46] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.router", "ffn_gate_inp"),
    ("mlp.router.layer", "ffn_gate_inp"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b"),
    ("mlp.e_score_correction_bias", "exp_probs_b"),
    // LFM2's.
    ("operator_norm", "attn_norm"),
    ("ffn_norm", "ffn_norm"),
    ("self_attn.q_layernorm", "attn_q_norm"),
    ("self_attn.k_layernorm", "attn_k_norm"),
    ("self_attn.out_proj", "attn_output"),
    ("conv.in_proj", "shortconv.in_proj"),
    ("conv.conv", "shortconv.conv"),
    ("conv.out_proj", "shortconv.out_proj"),
    ("mlp.w1", "ffn_gate"),
    ("mlp.w3", "ffn_up"),
    ("mlp.w2", "ffn_down"),
    ("mlp.expert_bias", "exp_probs_b"),
    // Delta nets.
    ("linear_attn.in_proj_qkvz", "ssm_in"),
    ("linear_attn.in_proj_qkv", "attn_qkv"),
    ("linear_attn.in_proj_z", "attn_gate"),
    ("linear_attn.in_proj_ba", "ssm_ba"),
    ("linear_attn.conv1d", "ssm_conv1d"),
    ("linear_attn.dt_bias", "ssm_dt"),
    ("linear_attn.norm", "ssm_norm"),
    ("linear_attn.out_proj", "ssm_out"),
];

/// Tensors of a delta net's block that transformers has apart, GGUF's name of each, and of both in one: there the first or the second half
/// of each key head's.
const HALVES: [(&str, &str, bool); 2] =
    [("linear_attn.in_proj_b", "ssm_beta", false), ("linear_attn.in_proj_a", "ssm_alpha", true)];

/// Tensors outside blocks.
const MODEL: [(&str, &str); 6] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("model.norm.bias", "output_norm.bias"),
    // LFM2's, under the name that llama.cpp once gave it by mistake.
    ("model.embedding_norm.weight", "token_embd_norm.weight"),
    ("lm_head.weight", "output.weight"),
    ("lm_head.bias", "output.bias"),
];

/// The names of one file.
#[derive(Clone, Debug)]
pub(crate) struct TensorNames {
    /// Query and key heads, where their rows are in turns.
    in_turns: Option<[usize; 2]>,
    /// The norm before an FFN.
    ffn_norm: &'static str,
    /// Key heads, where what they write and forget by is in one tensor.
    in_halves: Option<usize>,
}

impl TensorNames {
    /// Those of the file with these metadata.
    ///
    /// # Errors
    /// As [`config`](super::config).
    pub(crate) fn new(metadata: &Metadata) -> Result<Self> {
        let architecture = architecture(metadata)?;
        let in_turns = match architecture {
            "llama" | "granitemoe" => {
                let key = format!("{architecture}.attention.head_count");
                let heads = metadata.required_count(&key)?;
                Some([heads, metadata.count(&format!("{key}_kv"))?.unwrap_or(heads)])
            }
            _ => None,
        };
        let in_halves = match architecture {
            "qwen3next" => Some(metadata.required_count("qwen3next.ssm.group_count")?),
            _ => None,
        };
        let after_attention = ["glm4moe", "gpt-oss", "qwen3next", "qwen35moe"].contains(&architecture);
        Ok(Self { in_turns, ffn_norm: if after_attention { "post_attention_norm" } else { "ffn_norm" }, in_halves })
    }

    /// Where the tensor is that transformers calls `name`; `None` for one that no file has.
    pub(crate) fn source(&self, name: &str) -> Option<TensorSource> {
        if let Some((_, stored)) = MODEL.iter().find(|(known, _)| *known == name) {
            return Some(TensorSource::Same((*stored).into()));
        }
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let rest = rest.replace("block_sparse_moe.", "mlp.").replace("feed_forward.", "mlp.");
        let rest = rest.replace(".shared_experts.", ".shared_expert.");
        if let Some((id, part)) = rest.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.')) {
            // Of experts themselves slices say where they are.
            let part = part.strip_suffix("_proj.bias")?;
            return Some(TensorSource::Row {
                name: format!("blk.{block}.ffn_{part}_exps.bias"),
                row: id.parse().ok()?,
            });
        }
        if rest == "self_attn.sinks" {
            return Some(TensorSource::Same(format!("blk.{block}.attn_sinks.weight")));
        }
        if rest == "linear_attn.A_log" {
            return Some(TensorSource::Logarithms(format!("blk.{block}.ssm_a")));
        }
        let (stem, kind) = match rest.rsplit_once('.') {
            Some((stem, kind @ ("weight" | "bias"))) => (stem, kind),
            _ => (rest.as_str(), "bias"),
        };
        if let Some((_, stored, second)) = HALVES.iter().find(|(known, ..)| *known == stem) {
            return Some(match self.in_halves {
                Some(parts) => {
                    TensorSource::Halves { name: format!("blk.{block}.ssm_ba.{kind}"), parts, second: *second }
                }
                None => TensorSource::Same(format!("blk.{block}.{stored}.{kind}")),
            });
        }
        let (_, stored) = BLOCK.iter().find(|(known, _)| *known == stem)?;
        let named = |stored: &str| format!("blk.{block}.{stored}.{kind}");
        Some(match (*stored, self.in_turns) {
            ("attn_kv_b", _) => TensorSource::KeysAndValues {
                joined: named(stored),
                keys: named("attn_k_b"),
                values: named("attn_v_b"),
            },
            ("attn_q", Some([heads, _])) | ("attn_k", Some([_, heads])) => {
                TensorSource::InTurns { name: named(stored), heads }
            }
            ("ffn_norm", _) => TensorSource::Same(named(self.ffn_norm)),
            _ => TensorSource::Same(named(stored)),
        })
    }
}

/// The slices of expert `id` of a block: each of a tensor of its own, as files from before experts were stacked have them, or some rows of
/// one that holds all experts' gate, up or down projections, or gate and up projections joined.
pub(in crate::weights) fn slices(moe: &MoeSpec, block: usize, id: usize, tensors: &impl Tensors) -> Vec<Slice> {
    let (experts, width, hidden) = (moe.experts, moe.expert_width, moe.hidden);
    let joined = format!("blk.{block}.ffn_gate_up_exps.weight");
    let parts = [
        (Part::Gate, "gate", [width, hidden]),
        (Part::Up, "up", [width, hidden]),
        (Part::Down, "down", [hidden, width]),
    ];
    let slice = |(part, name, [rows, columns]): (Part, &str, [usize; 2])| {
        let single = format!("blk.{block}.ffn_{name}.{id}.weight");
        let (tensor, shape, first) = if part != Part::Down && tensors.has(&joined) {
            let half = usize::from(part == Part::Up);
            (joined.clone(), vec![experts, 2 * rows, columns], (2 * id + half) * rows)
        } else if tensors.has(&single) {
            (single, vec![rows, columns], 0)
        } else {
            (format!("blk.{block}.ffn_{name}_exps.weight"), vec![experts, rows, columns], id * rows)
        };
        Slice { part, tensor, shape, rows: first..first + rows, order: Order::Rows }
    };
    parts.into_iter().filter(|(part, ..)| moe.activation.gated || *part != Part::Gate).map(slice).collect()
}

/// Checks that the file has no experts beyond those of `spec`.
pub(in crate::weights) fn check_experts(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    for (name, entry) in checkpoint.tensors() {
        let Some((block, rest)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { continue };
        let (Ok(block), true) = (block.parse::<usize>(), rest.starts_with("ffn_gate_inp.")) else { continue };
        let wrong = |expected: String| {
            checkpoint.wrong(entry, name, format!("expected {expected} as the metadata say, got one"))
        };
        if block >= spec.layers.saturating_add(spec.extra_blocks) {
            return Err(wrong(format!("no block after {}", spec.layers - 1)));
        }
        if spec.dense.blocks.binary_search(&block).is_ok() {
            return Err(wrong(format!("no experts in block {block}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_cpp() {
        let same = |name: &str| Some(TensorSource::Same(name.into()));
        let names = TensorNames { in_turns: Some([4, 2]), ffn_norm: "ffn_norm", in_halves: None };
        assert_eq!(names.source("lm_head.weight"), same("output.weight"));
        assert_eq!(names.source("model.layers.12.block_sparse_moe.gate.weight"), same("blk.12.ffn_gate_inp.weight"));
        let key = names.source("model.layers.0.self_attn.k_proj.weight");
        assert_eq!(key, Some(TensorSource::InTurns { name: "blk.0.attn_k.weight".into(), heads: 2 }));
        let names = TensorNames { in_turns: None, ffn_norm: "post_attention_norm", in_halves: Some(2) };
        let found = names.source("model.layers.3.mlp.shared_experts.up_proj.weight");
        assert_eq!(found, same("blk.3.ffn_up_shexp.weight"));
        assert_eq!(names.source("model.layers.3.mlp.gate.e_score_correction_bias"), same("blk.3.exp_probs_b.bias"));
        assert_eq!(names.source("model.layers.3.self_attn.q_proj.bias"), same("blk.3.attn_q.bias"));
        let norm = names.source("model.layers.3.post_attention_layernorm.weight");
        assert_eq!(norm, same("blk.3.post_attention_norm.weight"));
        assert_eq!(names.source("model.layers.3.self_attn.sinks"), same("blk.3.attn_sinks.weight"));
        let bias = names.source("model.layers.3.mlp.experts.7.up_proj.bias");
        assert_eq!(bias, Some(TensorSource::Row { name: "blk.3.ffn_up_exps.bias".into(), row: 7 }));
        let bias = names.source("model.layers.3.block_sparse_moe.e_score_correction_bias");
        assert_eq!(bias, same("blk.3.exp_probs_b.bias"));
        let bias = names.source("model.layers.3.feed_forward.expert_bias");
        assert_eq!(bias, same("blk.3.exp_probs_b.bias"));
        assert_eq!(names.source("model.layers.3.linear_attn.dt_bias"), same("blk.3.ssm_dt.bias"));
        let forgets = names.source("model.layers.3.linear_attn.A_log");
        assert_eq!(forgets, Some(TensorSource::Logarithms("blk.3.ssm_a".into())));
        let forgets = names.source("model.layers.3.linear_attn.in_proj_a.weight");
        let half = TensorSource::Halves { name: "blk.3.ssm_ba.weight".into(), parts: 2, second: true };
        assert_eq!(forgets, Some(half));
        assert!(names.source("model.layers.3.mlp.experts.0.up_proj.weight").is_none());
        assert!(names.source("model.layers").is_none() && names.source("").is_none());
    }
}
