//! What DeepSeek-V2 and its successors share: groups of experts, shared experts without a gate, latent attention.

use super::config::Config;
use super::transformer::{self, Defaults};
use crate::error::Result;
use crate::routing::scores::{GroupLimit, GroupScore};
use crate::spec::{LatentSpec, ModelSpec, MoeSpec, SharedExperts};

/// An MoE layer of `n_routed_experts`, some of them limited to groups, and `n_shared_experts` beside them.
pub(super) fn moe_spec(config: &Config) -> Result<MoeSpec> {
    if let Some(every) = config.optional_size("moe_layer_freq")?.filter(|&every| every != 1) {
        return Err(config.error("moe_layer_freq", "1", &every.to_string()));
    }
    let mut spec = transformer::moe_spec(config, "n_routed_experts", "moe_intermediate_size")?;
    let shared = config.optional_count("n_shared_experts")?.filter(|&shared| shared > 0);
    spec.shared = shared.map(|shared| SharedExperts { width: shared.saturating_mul(spec.expert_width), gated: false });
    spec.names.shared = "shared_experts".into();
    spec.scoring.scale = config.optional_number("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    Ok(spec)
}

/// The groups of `spec`, where there is more than one.
pub(super) fn groups(config: &Config, spec: &MoeSpec, score: GroupScore) -> Result<Option<GroupLimit>> {
    let (groups, top_groups) = (config.size("n_group")?, config.size("topk_group")?);
    if !spec.experts.is_multiple_of(groups) {
        let expected = format!("a divisor of n_routed_experts {}", spec.experts);
        return Err(config.error("n_group", &expected, &groups.to_string()));
    }
    if top_groups > groups {
        return Err(config.error("topk_group", &format!("at most n_group {groups}"), &top_groups.to_string()));
    }
    let allowed = spec.experts / groups * top_groups;
    if spec.top_k > allowed {
        let expected = format!("at most the {allowed} experts of topk_group {top_groups}");
        return Err(config.error("num_experts_per_tok", &expected, &spec.top_k.to_string()));
    }
    Ok((groups > 1).then_some(GroupLimit { groups, top_groups, score }))
}

/// The transformer around `moe`; `pairs` says how it rotates.
pub(super) fn model_spec(config: &Config, family: &'static str, moe: MoeSpec, pairs: bool) -> Result<ModelSpec> {
    config.expect_false("attention_bias")?;
    let defaults = Defaults { norm_eps: 1e-6, rope_theta: 10_000.0, max_positions: 4096 };
    let mut spec = transformer::model_spec(config, family, moe, defaults)?;
    if let Some(yarn) = &mut spec.yarn {
        let mut weight = None;
        for object in ["rope_scaling", "rope_parameters"] {
            weight = weight.or(config.optional_number(&format!("{object}.mscale_all_dim"))?);
        }
        yarn.score_scale = weight.map_or(1.0, |weight| transformer::yarn_scale(yarn.factor, weight).powi(2));
    }
    let latent = LatentSpec {
        query_rank: config.optional_size("q_lora_rank")?,
        kv_rank: config.size("kv_lora_rank")?,
        key_width: config.size("qk_nope_head_dim")?,
        value_width: config.size("v_head_dim")?,
        pairs,
    };
    let dense = transformer::leading_dense_blocks(config, "first_k_dense_replace", spec.layers)?;
    let extra_blocks = config.optional_count("num_nextn_predict_layers")?.unwrap_or(0);
    Ok(ModelSpec { latent: Some(latent), rotary_dim: config.size("qk_rope_head_dim")?, dense, extra_blocks, ..spec })
}

/// Refuses another value than `expected` under `key`.
pub(super) fn expect(config: &Config, key: &str, expected: &str) -> Result<()> {
    match config.optional_string(key)? {
        Some(got) if got != expected => Err(config.error(key, expected, got)),
        _ => Ok(()),
    }
}
