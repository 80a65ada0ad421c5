//! Qwen3-Next (`model_type: qwen3_next`): gated delta nets (arXiv 2412.06464) in three of four blocks; in the others attention whose output
//! is weighed by a sigmoid, a part of each head rotated. Softmax, top-k, weights normalised, a shared expert weighed by a sigmoid. Norms are
//! stored as what they differ from 1 by.

use super::config::Config;
use super::deepseek;
use super::defaults::{Defaults, Rotated};
use super::family::Family;
use super::recurrent;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{DeltaNet, ModelSpec, MoeSpec, Norm, QkNorm, RecurrentMixer, SharedExperts};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_next",
    models: "Qwen3-Next, Qwen3-Coder-Next",
    gguf: &["qwen3next"],
    checked: &["transformers", "llama.cpp"],
    reads: &READS,
    moe: moe_spec,
    decoder: model_spec,
};

pub(super) const READS: [&str; 5] =
    ["attention_bias", "attn_output_gate", "layer_types", "norm_topk_prob", "shared_expert_intermediate_size"];

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    experts(config, config.flag_or("norm_topk_prob", true)?)
}

/// The layer, whose weights may be normalised.
pub(super) fn experts(config: &Config, normalized: bool) -> Result<MoeSpec> {
    let shared = SharedExperts { width: config.size("shared_expert_intermediate_size")?, gated: true };
    let spec = transformer::moe_spec(config, "num_experts", "moe_intermediate_size")?;
    Ok(MoeSpec { shared: Some(shared), scoring: Scoring::softmax().normalized(normalized), ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let spec = around(config, &FAMILY, moe_spec(config)?, true)?;
    Ok(ModelSpec { dense: transformer::qwen_dense_blocks(config, spec.layers)?, ..spec })
}

/// The transformer around `moe`; projections of its delta nets are in two tensors where they are `fused`.
pub(super) fn around(config: &Config, family: &Family, moe: MoeSpec, fused: bool) -> Result<ModelSpec> {
    config.expect_true("attn_output_gate")?;
    // Where it is not there transformers takes 256, whatever the hidden state's width.
    config.size("head_dim")?;
    let defaults = Defaults { rotated: Rotated::Share(0.25), ..Defaults::new(1e-6, 10_000.0, 32_768) };
    let spec = transformer::model_spec(config, family, moe, defaults)?;
    let size = |key: &str, otherwise: usize| -> Result<usize> { Ok(config.optional_size(key)?.unwrap_or(otherwise)) };
    let net = DeltaNet {
        key_heads: size("linear_num_key_heads", 16)?,
        value_heads: size("linear_num_value_heads", 32)?,
        key_width: size("linear_key_head_dim", 128)?,
        value_width: size("linear_value_head_dim", 128)?,
        conv_width: recurrent::conv_width(config, "linear_conv_kernel_dim", 4)?,
        fused: fused && !config.optional_flag(APART)?.unwrap_or(false),
        tiled: config.optional_flag(TILED)?.unwrap_or(false),
    };
    if !net.value_heads.is_multiple_of(net.key_heads) {
        let expected = format!("a multiple of linear_num_key_heads {}", net.key_heads);
        return Err(config.error("linear_num_value_heads", &expected, &net.value_heads.to_string()));
    }
    Ok(ModelSpec {
        norm: if config.optional_flag(WHOLE_NORMS)?.unwrap_or(false) { Norm::Rms } else { Norm::RmsFromOne },
        qk_norm: Some(QkNorm::PerHead),
        attention_bias: transformer::attention_bias(config)?,
        output_gate: true,
        extra_blocks: deepseek::extra_blocks(config)?,
        recurrent: recurrent::named_or_each(config, "linear_attention", RecurrentMixer::DeltaNet(net), spec.layers)?,
        ..spec
    })
}

/// What GGUF files of Qwen3.5 do to the order of value heads; no `config.json` has it.
pub(crate) const TILED: &str = "linear_value_heads_tiled";

/// What GGUF files of Qwen3-Next do to projections that are fused elsewhere; no `config.json` has it.
pub(crate) const APART: &str = "linear_projections_apart";

/// What GGUF files do to weights of norms, one being added to them; no `config.json` has it.
pub(crate) const WHOLE_NORMS: &str = "norm_weights_whole";
