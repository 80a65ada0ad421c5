//! The keys of `config.json` that mean the same in all families: sizes, heads, rotation, vocabulary, how many experts.

use super::config::Config;
use crate::error::Result;
use crate::spec::{AttentionBias, DenseBlocks, ModelSpec, MoeSpec, Multipliers, Norm, SlidingWindow, Yarn};

/// Defaults that a family has where its configuration is silent.
pub(super) struct Defaults {
    pub(super) norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) max_positions: usize,
}

/// The transformer around `moe`, without biases, norms of queries and keys or dense blocks.
pub(super) fn model_spec(config: &Config, family: &'static str, moe: MoeSpec, defaults: Defaults) -> Result<ModelSpec> {
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads {heads}");
        return Err(config.error("num_key_value_heads", &expected, &kv_heads.to_string()));
    }
    let head_dim = head_dim(config, moe.hidden, heads)?;
    Ok(ModelSpec {
        family,
        vocab: config.size("vocab_size")?,
        layers: config.size("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(defaults.max_positions),
        norm: Norm::Rms,
        norm_eps: config.optional_number("rms_norm_eps")?.unwrap_or(defaults.norm_eps),
        // transformers 5 nests it, earlier versions do not.
        rope_theta: match config.optional_number("rope_parameters.rope_theta")? {
            Some(theta) => theta,
            None => config.optional_number("rope_theta")?.unwrap_or(defaults.rope_theta),
        },
        yarn: yarn(config)?,
        rotary_dim: head_dim,
        qk_norm: None,
        sinks: false,
        window: SlidingWindow::default(),
        latent: None,
        multipliers: Multipliers::default(),
        extra_blocks: 0,
        attention_bias: AttentionBias::None,
        clip_qkv: None,
        tied_embeddings: config.optional_flag("tie_word_embeddings")?.unwrap_or(false),
        output_bias: false,
        end_of_text: config.token_ids("eos_token_id")?,
        ffn: "mlp".into(),
        dense: DenseBlocks::default(),
        moe,
    })
}

fn head_dim(config: &Config, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("a divisor of hidden_size {hidden}");
            return Err(config.error("num_attention_heads", &expected, &heads.to_string()));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(config.error("head_dim", "an even number (rotary embedding)", &head_dim.to_string()));
    }
    Ok(head_dim)
}

/// Stretched positions, if there are any: YaRN, and no other kind.
fn yarn(config: &Config) -> Result<Option<Yarn>> {
    for object in ["rope_scaling", "rope_parameters"] {
        let mut kind = None;
        for key in ["rope_type", "type"] {
            kind = kind.or(config.optional_string(&format!("{object}.{key}"))?);
        }
        match kind {
            Some("default") => {}
            Some("yarn") => return yarn_in(config, object).map(Some),
            Some(other) => return Err(config.error(object, "rope_type default or yarn", other)),
            None if object == "rope_scaling" && config.has(object) => {
                return Err(config.error(object, "null or rope_type default or yarn", "something else"));
            }
            None => {}
        }
    }
    Ok(None)
}

fn yarn_in(config: &Config, object: &str) -> Result<Yarn> {
    let key = |key: &str| format!("{object}.{key}");
    let number = |name: &str| config.optional_number(&key(name));
    let factor = config.number(&key("factor"))?;
    let rotation_scale = match (number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?) {
        (Some(scale), ..) => scale,
        (None, Some(above), Some(below)) => yarn_scale(factor, above) / yarn_scale(factor, below),
        (None, ..) => yarn_scale(factor, 1.0),
    };
    Ok(Yarn {
        factor,
        original_positions: config.size(&key("original_max_position_embeddings"))?,
        beta_fast: number("beta_fast")?.unwrap_or(32.0),
        beta_slow: number("beta_slow")?.unwrap_or(1.0),
        rotation_scale,
        score_scale: 1.0,
        whole_rotations: config.optional_flag(&key("truncate"))?.unwrap_or(true),
    })
}

/// How much sharper attention has to be at `factor` times the positions (arXiv 2309.00071, section 3.4).
pub(super) fn yarn_scale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// An MoE layer of SwiGLU experts: how many, under which key, how many a token gets and how wide they are, under which key.
pub(super) fn moe_spec(config: &Config, experts_key: &str, width_key: &str) -> Result<MoeSpec> {
    let hidden = config.size("hidden_size")?;
    let activation = config.optional_string("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(config.error("hidden_act", "silu", activation));
    }
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
    let dense = |block: &usize| named.contains(block) || !(block + 1).is_multiple_of(step);
    dense_blocks(config, "mlp_only_layers and decoder_sparse_step", (0..layers).filter(dense).collect(), layers)
}

/// The first `key` blocks, which have no experts.
pub(super) fn leading_dense_blocks(config: &Config, key: &str, layers: usize) -> Result<DenseBlocks> {
    let first = config.optional_count(key)?.unwrap_or(0);
    dense_blocks(config, key, (0..first.min(layers)).collect(), layers)
}

fn dense_blocks(config: &Config, key: &str, blocks: Vec<usize>, layers: usize) -> Result<DenseBlocks> {
    if blocks.len() == layers {
        return Err(config.error(key, "at least one block with experts", "none"));
    }
    let width = if blocks.is_empty() { 0 } else { config.size("intermediate_size")? };
    Ok(DenseBlocks { blocks, width })
}

/// Refuses attention that looks back less far than the model's positions, which nothing here does.
pub(super) fn refuse_sliding_window(config: &Config, positions: usize) -> Result<()> {
    match config.optional_size("sliding_window")? {
        Some(window) if window < positions => {
            let expected = format!("null or at least max_position_embeddings {positions}");
            Err(config.error("sliding_window", &expected, &window.to_string()))
        }
        _ => Ok(()),
    }
}
