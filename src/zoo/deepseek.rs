//! What DeepSeek-V2 and its successors share: groups of experts, shared experts without a gate, latent attention.

use super::config::Config;
use super::defaults::{self, Rotated};
use super::family::Family;
use super::rope;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::{GroupLimit, GroupScore};
use crate::spec::{DenseBlocks, LatentSpec, ModelSpec, MoeSpec, RopeScaling, SharedExperts};

/// What a family means where its configuration does not have a key, which is not where it says null.
#[derive(Clone, Copy)]
pub(super) struct Defaults {
    /// `n_shared_experts`.
    pub(super) shared: usize,
    /// `routed_scaling_factor`.
    pub(super) scale: f64,
    /// `n_group` and `topk_group`; they must be there where there is none.
    pub(super) groups: Option<usize>,
}

/// An MoE layer of `n_routed_experts`, some of them limited to groups, and `n_shared_experts` beside them.
pub(super) fn moe_spec(config: &Config, defaults: Defaults) -> Result<MoeSpec> {
    if let Some(every) = config.optional_size("moe_layer_freq")?.filter(|&every| every != 1) {
        return Err(config.error("moe_layer_freq", "1", &every.to_string()));
    }
    let mut spec = transformer::moe_spec(config, "n_routed_experts", "moe_intermediate_size")?;
    let said = |key: &str, otherwise| if config.is_absent(key) { Some(otherwise) } else { None };
    let shared = config.optional_count("n_shared_experts")?.or(said("n_shared_experts", defaults.shared));
    let shared = shared.filter(|&shared| shared > 0);
    spec.shared = shared.map(|shared| SharedExperts { width: shared.saturating_mul(spec.expert_width), gated: false });
    spec.names.shared = "shared_experts".into();
    let unsaid = if config.is_absent("routed_scaling_factor") { defaults.scale } else { 1.0 };
    spec.scoring.scale = config.optional_number("routed_scaling_factor")?.unwrap_or(unsaid) as f32;
    Ok(spec)
}

/// The groups of `spec`, where there is more than one.
pub(super) fn groups(
    config: &Config,
    spec: &MoeSpec,
    score: GroupScore,
    defaults: Defaults,
) -> Result<Option<GroupLimit>> {
    let count = |key: &str| match defaults.groups {
        Some(groups) if config.is_absent(key) => Ok(groups),
        _ => config.size(key),
    };
    let (groups, top_groups) = (count("n_group")?, count("topk_group")?);
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

/// The transformer around `moe`, without dense blocks; `pairs` says how it rotates.
pub(super) fn model_spec(
    config: &Config,
    family: &Family,
    moe: MoeSpec,
    pairs: bool,
    defaults: defaults::Defaults,
) -> Result<ModelSpec> {
    config.expect_false("attention_bias")?;
    let rotated = Rotated::Key("qk_rope_head_dim");
    let defaults = defaults::Defaults { rotated, ..defaults };
    let mut spec = transformer::model_spec(config, family, moe, defaults)?;
    if let RopeScaling::Yarn(yarn) = &mut spec.rope_scaling {
        let weight = rope::mscale_all_dim(config)?;
        yarn.score_scale = weight.map_or(1.0, |weight| rope::yarn_scale(yarn.factor, weight).powi(2));
    }
    // transformers writes it so; another number would change what is rotated.
    let head_dim = config.optional_size("head_dim")?.filter(|&head_dim| head_dim != spec.rotary_dim);
    if let Some(head_dim) = head_dim.filter(|_| family.name != "deepseek_v2") {
        let expected = format!("nothing or qk_rope_head_dim {}", spec.rotary_dim);
        return Err(config.error("head_dim", &expected, &head_dim.to_string()));
    }
    let latent = LatentSpec {
        query_rank: config.optional_size("q_lora_rank")?,
        kv_rank: config.size("kv_lora_rank")?,
        key_width: config.size("qk_nope_head_dim")?,
        value_width: config.size("v_head_dim")?,
        pairs,
    };
    Ok(ModelSpec { latent: Some(latent), ..spec })
}

/// The first blocks, which have no experts; as many as `otherwise` where the key is absent.
pub(super) fn dense_blocks(config: &Config, otherwise: usize, layers: usize) -> Result<DenseBlocks> {
    const KEY: &str = "first_k_dense_replace";
    let unsaid = if config.is_absent(KEY) { otherwise } else { 0 };
    transformer::leading_dense_blocks(config, KEY, unsaid, layers)
}

/// Blocks that predict further tokens, under either of their names.
pub(super) fn extra_blocks(config: &Config) -> Result<usize> {
    let count = config.optional_count("num_nextn_predict_layers")?.or(config.optional_count("num_mtp_layers")?);
    Ok(count.unwrap_or(0))
}

/// Refuses another value than `expected` under `key`.
pub(super) fn expect(config: &Config, key: &str, expected: &str) -> Result<()> {
    match config.optional_string(key)? {
        Some(got) if got != expected => Err(config.error(key, expected, got)),
        _ => Ok(()),
    }
}
