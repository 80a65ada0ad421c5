//! Names of tensors, as checkpoints under transformers' names have them.

use serde::{Deserialize, Serialize};

/// Where an MoE layer's tensors are, relative to the layer: `{experts}.{E}.{gate_proj}.weight`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertNames {
    /// The router's linear layer.
    pub gate: String,
    /// Parent of the experts' numbers.
    pub experts: String,
    /// Gate projection of an expert, where its activation is gated.
    pub gate_proj: String,
    /// Up projection of an expert.
    pub up_proj: String,
    /// Down projection of an expert.
    pub down_proj: String,
    /// The shared expert, beside the experts; its projections have the same names as theirs.
    pub shared: String,
    /// The linear layer that weighs the shared expert.
    pub shared_gate: String,
    /// The bias of the gate that counts for selection only.
    pub selection_bias: String,
    /// Gate and up rows of stacked experts take turns (gpt-oss).
    pub stacked_in_turns: bool,
    /// Gate and up projections of all experts in one tensor, where a checkpoint has them so; it then has no `{experts}.{E}`.
    pub stacked_gate_up: String,
    /// Down projections of all experts in one tensor.
    pub stacked_down: String,
}

impl Default for ExpertNames {
    /// `gate`, `experts.E.{gate,up,down}_proj`, `shared_expert`, `shared_expert_gate`: OLMoE and Qwen, and DeepSeek but for
    /// its `shared_experts`; stacked, as transformers holds them in memory, `experts.gate_up_proj` and `experts.down_proj`.
    fn default() -> Self {
        let [gate, experts, gate_proj, up_proj, down_proj, shared, shared_gate] =
            ["gate", "experts", "gate_proj", "up_proj", "down_proj", "shared_expert", "shared_expert_gate"]
                .map(String::from);
        let [selection_bias, stacked_gate_up, stacked_down] =
            ["gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"].map(String::from);
        Self {
            gate,
            experts,
            gate_proj,
            up_proj,
            down_proj,
            shared,
            shared_gate,
            selection_bias,
            stacked_in_turns: false,
            stacked_gate_up,
            stacked_down,
        }
    }
}

/// What a model calls the parts of its blocks, and what stands around them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockNames {
    /// What everything but the output weights is in.
    pub(crate) root: &'static str,
    /// The norm before attention or what stands in its place.
    pub(crate) mixer_norm: &'static str,
    /// The norm before an FFN.
    pub(crate) ffn_norm: &'static str,
    /// The norm after all blocks.
    pub(crate) last_norm: &'static str,
    /// Norms of queries and keys.
    pub(crate) qk_norms: [&'static str; 2],
    /// What attention's heads together go through.
    pub(crate) output: &'static str,
    /// What stands in attention's place in blocks that have none.
    pub(crate) recurrent: &'static str,
}

impl Default for BlockNames {
    /// Those that nearly all have.
    fn default() -> Self {
        Self {
            root: "model",
            mixer_norm: "input_layernorm",
            ffn_norm: "post_attention_layernorm",
            last_norm: "norm",
            qk_norms: ["q_norm", "k_norm"],
            output: "o_proj",
            recurrent: "linear_attn",
        }
    }
}
