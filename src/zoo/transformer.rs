//! The keys of `config.json` that mean the same in all families: sizes, heads, rotation, vocabulary, how many experts.

use std::collections::BTreeSet;

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::known;
use super::rope;
use super::window;
use crate::error::Result;
use crate::spec::{AttentionBias, BlockNames, DenseBlocks, ModelSpec, MoeSpec, Multipliers, Norm, SlidingWindow};

/// More blocks than any model has: a longer one is no model, and nothing counts its blocks.
const MOST_BLOCKS: usize = 1 << 16;

/// The transformer around `moe`, without biases, norms of queries and keys or dense blocks.
pub(super) fn model_spec(config: &Config, family: &Family, moe: MoeSpec, defaults: Defaults) -> Result<ModelSpec> {
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads {heads}");
        return Err(config.error("num_key_value_heads", &expected, &kv_heads.to_string()));
    }
    known::check(config, family.reads)?;
    let layers = config.size("num_hidden_layers")?;
    if layers > MOST_BLOCKS {
        return Err(config.error("num_hidden_layers", &format!("at most {MOST_BLOCKS}"), &layers.to_string()));
    }
    let head_dim = head_dim(config, moe.hidden, heads)?;
    let positions = rope::positions(config, head_dim, &defaults)?;
    if !family.reads.contains(&window::KEY) {
        window::refuse(config, positions.longest)?;
    }
    Ok(ModelSpec {
        family: family.name,
        vocab: config.size("vocab_size")?,
        layers,
        heads,
        kv_heads,
        head_dim,
        max_positions: positions.longest,
        norm: Norm::Rms,
        norm_eps: config.optional_number("rms_norm_eps")?.unwrap_or(defaults.norm_eps),
        rope_theta: positions.theta,
        rope_scaling: positions.scaling,
        rotary_dim: positions.rotary_dim,
        qk_norm: None,
        sinks: false,
        window: SlidingWindow::default(),
        latent: None,
        multipliers: Multipliers::default(),
        extra_blocks: 0,
        attention_bias: AttentionBias::None,
        output_gate: false,
        recurrent: None,
        clip_qkv: None,
        tied_embeddings: config.optional_flag("tie_word_embeddings")?.unwrap_or(false),
        output_bias: false,
        end_of_text: config.token_ids("eos_token_id")?,
        ffn: "mlp".into(),
        names: BlockNames::default(),
        dense: DenseBlocks::default(),
        moe,
        layer_top_k: Vec::new(),
    })
}

/// Biases of all of attention's projections, where `attention_bias` says so.
pub(super) fn attention_bias(config: &Config) -> Result<AttentionBias> {
    Ok(match config.optional_flag("attention_bias")?.unwrap_or(false) {
        true => AttentionBias::All,
        false => AttentionBias::None,
    })
}

fn head_dim(config: &Config, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        // Latent attention has widths of its own.
        None if config.has("kv_lora_rank") => hidden.div_ceil(heads),
        None => {
            let expected = format!("a divisor of hidden_size {hidden}");
            return Err(config.error("num_attention_heads", &expected, &heads.to_string()));
        }
    };
    Ok(head_dim)
}

/// An MoE layer of SwiGLU experts: how many, under which key, how many a token gets and how wide they are, under which key.
pub(super) fn moe_spec(config: &Config, experts_key: &str, width_key: &str) -> Result<MoeSpec> {
    let hidden = config.size("hidden_size")?;
    let activation = config.optional_string("hidden_act")?.unwrap_or("silu");
    // transformers has two names for it.
    if !["silu", "swish"].contains(&activation) {
        return Err(config.error("hidden_act", "silu", activation));
    }
    // transformers reads any of its names where the family's own is not there.
    let names = [experts_key, "num_experts", "num_local_experts"];
    let experts_key = names.into_iter().find(|key| config.has(key)).unwrap_or(experts_key);
    let (experts, top_k) = (config.size(experts_key)?, config.size("num_experts_per_tok")?);
    if top_k > experts {
        let expected = format!("at most {experts_key} {experts}");
        return Err(config.error("num_experts_per_tok", &expected, &top_k.to_string()));
    }
    MoeSpec::new(hidden, experts, top_k, config.size(width_key)?)
}

/// The blocks of Qwen's models that have no experts: those that `mlp_only_layers` names, and with `decoder_sparse_step` n all
/// but every n-th.
pub(super) fn qwen_dense_blocks(config: &Config, layers: usize) -> Result<DenseBlocks> {
    let step = config.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let named = config.sizes("mlp_only_layers")?;
    if let Some(block) = named.iter().find(|&&block| block >= layers) {
        let expected = format!("blocks of num_hidden_layers {layers}");
        return Err(config.error("mlp_only_layers", &expected, &block.to_string()));
    }
    let named: BTreeSet<usize> = named.into_iter().collect();
    let dense = |block: &usize| named.contains(block) || !(block + 1).is_multiple_of(step);
    dense_blocks(config, "mlp_only_layers and decoder_sparse_step", (0..layers).filter(dense).collect(), layers)
}

/// The first `key` blocks, which have no experts.
pub(super) fn leading_dense_blocks(config: &Config, key: &str, otherwise: usize, layers: usize) -> Result<DenseBlocks> {
    let first = config.optional_count(key)?.unwrap_or(otherwise);
    dense_blocks(config, key, (0..first.min(layers)).collect(), layers)
}

/// These blocks, `key` having named them.
pub(super) fn dense_blocks(config: &Config, key: &str, blocks: Vec<usize>, layers: usize) -> Result<DenseBlocks> {
    if blocks.len() == layers {
        return Err(config.error(key, "at least one block with experts", "none"));
    }
    let width = if blocks.is_empty() { 0 } else { config.size("intermediate_size")? };
    Ok(DenseBlocks { blocks, width })
}
