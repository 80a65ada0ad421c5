//! DeepSeek-V2 (`model_type: deepseek_v2`, arXiv 2405.04434): softmax, top-k, of the groups with the best experts where the model
//! is large; weights as they are, times a constant.

use super::config::Config;
use super::deepseek;
use super::defaults::Defaults;
use super::family::Family;
use crate::error::Result;
use crate::routing::scores::GroupScore;
use crate::spec::{ModelSpec, MoeSpec};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v2",
    models: "DeepSeek-V2",
    gguf: &["deepseek2"],
    checked: &["transformers", "llama.cpp"],
    reads: &[
        "attention_bias",
        "rope_interleave",
        "n_shared_experts",
        "routed_scaling_factor",
        "n_group",
        "scoring_func",
        "norm_topk_prob",
    ],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    // The published code scales normalised weights in no case, transformers all in any case: no model says what is right.
    config.expect_false("norm_topk_prob")?;
    deepseek::expect(config, "scoring_func", "softmax")?;
    let defaults = deepseek::Defaults { shared: 2, scale: 1.0, groups: None };
    let mut spec = deepseek::moe_spec(config, defaults)?;
    spec.scoring.groups = match config.optional_string("topk_method")? {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => deepseek::groups(config, &spec, GroupScore::Max, defaults)?,
        Some(other) => return Err(config.error("topk_method", "greedy or group_limited_greedy", other)),
    };
    Ok(spec)
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    if config.optional_flag("rope_interleave")? == Some(false) {
        return Err(config.error("rope_interleave", "true, as this family rotates", "false"));
    }
    let spec = deepseek::model_spec(config, &FAMILY, moe_spec(config)?, true, Defaults::new(1e-6, 10_000.0, 2048))?;
    Ok(ModelSpec { dense: deepseek::dense_blocks(config, 0, spec.layers)?, ..spec })
}
