//! DeepSeek-V3 (`model_type: deepseek_v3`, arXiv 2412.19437; Moonlight): sigmoid, a bias that counts for selection only, the
//! groups whose two best experts are best together; weights normalised, then times a constant.

use super::config::Config;
use super::deepseek;
use super::defaults::Defaults;
use super::family::Family;
use crate::error::Result;
use crate::routing::scores::{GroupScore, Scoring};
use crate::spec::{ModelSpec, MoeSpec};

/// What this and families with its attention and routing read.
pub(super) const READS: [&str; 7] = [
    "attention_bias",
    "rope_interleave",
    "n_shared_experts",
    "routed_scaling_factor",
    "n_group",
    "scoring_func",
    "norm_topk_prob",
];

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v3",
    models: "DeepSeek-V3, Moonlight",
    gguf: &["deepseek2"],
    checked: &["transformers", "llama.cpp"],
    reads: &READS,
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    deepseek::expect(config, "scoring_func", "sigmoid")?;
    deepseek::expect(config, "topk_method", "noaux_tc")?;
    biased_spec(config, deepseek::Defaults { shared: 1, scale: 2.5, groups: None })
}

/// The same routing in other families, which have no key for it.
pub(super) fn biased_spec(config: &Config, defaults: deepseek::Defaults) -> Result<MoeSpec> {
    let spec = deepseek::moe_spec(config, defaults)?;
    let normalize = config.flag_or("norm_topk_prob", true)?;
    let groups = deepseek::groups(config, &spec, GroupScore::TopTwo, defaults)?;
    let scoring = Scoring { scale: spec.scoring.scale, groups, ..Scoring::sigmoid().normalized(normalize) };
    Ok(MoeSpec { scoring, selection_bias: true, ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let pairs = config.flag_or("rope_interleave", true)?;
    let spec = deepseek::model_spec(config, &FAMILY, moe_spec(config)?, pairs, Defaults::new(1e-6, 10_000.0, 4096))?;
    let (dense, extra_blocks) = (deepseek::dense_blocks(config, 3, spec.layers)?, deepseek::extra_blocks(config)?);
    Ok(ModelSpec { dense, extra_blocks, ..spec })
}
