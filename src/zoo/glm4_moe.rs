//! GLM-4 MoE (`model_type: glm4_moe`, arXiv 2508.06471): routing as in DeepSeek-V3; biases on queries, keys and values, norms on
//! each head's queries and keys, half of a head rotated.

use super::config::Config;
use super::deepseek_v3;
use super::transformer::{self, Defaults};
use crate::error::Result;
use crate::spec::{AttentionBias, ModelSpec, MoeSpec, QkNorm};

pub(super) fn moe_spec(config: &Config) -> Result<MoeSpec> {
    deepseek_v3::biased_spec(config)
}

pub(super) fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults { norm_eps: 1e-5, rope_theta: 10_000.0, max_positions: 131_072 };
    let spec = transformer::model_spec(config, "glm4_moe", moe_spec(config)?, defaults)?;
    let share = match config.optional_number("rope_parameters.partial_rotary_factor")? {
        Some(share) => share,
        None => config.optional_number("partial_rotary_factor")?.unwrap_or(0.5),
    };
    let rotary_dim = (spec.head_dim as f64 * share) as usize;
    if rotary_dim == 0 || rotary_dim > spec.head_dim || !rotary_dim.is_multiple_of(2) {
        let expected = format!("an even part of head_dim {}", spec.head_dim);
        return Err(config.error("partial_rotary_factor", &expected, &share.to_string()));
    }
    let flag = |key: &str| -> Result<bool> { Ok(config.optional_flag(key)?.unwrap_or(false)) };
    Ok(ModelSpec {
        rotary_dim,
        attention_bias: if flag("attention_bias")? { AttentionBias::Inputs } else { AttentionBias::None },
        qk_norm: flag("use_qk_norm")?.then_some(QkNorm::PerHead),
        dense: transformer::leading_dense_blocks(config, "first_k_dense_replace", spec.layers)?,
        extra_blocks: config.optional_count("num_nextn_predict_layers")?.unwrap_or(0),
        ..spec
    })
}
