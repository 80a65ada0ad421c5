//! MiniMax-M2 (`model_type: minimax_m2`): sigmoid, a bias that counts for selection only, weights normalised; experts with the names of
//! Mixtral's. RMS norm over all of a position's queries and over all of its keys, a part of each head rotated.

use super::config::Config;
use super::deepseek;
use super::defaults::{Defaults, Rotated};
use super::family::Family;
use super::mixtral;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ExpertNames, ModelSpec, MoeSpec, QkNorm};

pub(super) const FAMILY: Family = Family {
    name: "minimax_m2",
    models: "MiniMax-M2",
    gguf: &["minimax-m2"],
    checked: &["transformers", "llama.cpp"],
    reads: &["attn_type_list", "qk_norm_type", "rotary_dim", "scoring_func", "use_qk_norm", "use_routing_bias"],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    deepseek::expect(config, "scoring_func", "sigmoid")?;
    config.expect_true("use_routing_bias")?;
    let names = ExpertNames { selection_bias: "e_score_correction_bias".into(), ..mixtral::names() };
    let spec = transformer::moe_spec(config, "num_local_experts", "intermediate_size")?;
    Ok(MoeSpec { scoring: Scoring::sigmoid().normalized(true), selection_bias: true, names, ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    deepseek::expect(config, "qk_norm_type", "per_layer")?;
    config.expect_true("use_qk_norm")?;
    // Its predecessors have blocks of another kind, under 0.
    if let Some(&other) = config.sizes("attn_type_list")?.iter().find(|&&kind| kind != 1) {
        return Err(config.error("attn_type_list", "1 in all blocks", &other.to_string()));
    }
    // The published files say so what transformers calls a share.
    let head_dim = config.optional_size("head_dim")?.unwrap_or(128);
    let share = config.optional_size("rotary_dim")?.map_or(1.0, |rotated| rotated as f64 / head_dim as f64);
    let defaults = Defaults { rotated: Rotated::Share(share), ..Defaults::new(1e-6, 5e6, 196_608) };
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    Ok(ModelSpec {
        qk_norm: Some(QkNorm::Whole),
        extra_blocks: config.optional_count("num_mtp_modules")?.unwrap_or(0),
        ffn: "block_sparse_moe".into(),
        ..spec
    })
}
