//! DeepSeek-V3 (`model_type: deepseek_v3`, arXiv 2412.19437; Moonlight): sigmoid, a bias that counts for selection only, the
//! groups whose two best experts are best together; weights normalised, then times a constant.

use super::config::Config;
use super::deepseek;
use crate::error::Result;
use crate::routing::scores::{GroupScore, Scoring};
use crate::spec::{ModelSpec, MoeSpec};

pub(super) fn moe_spec(config: &Config) -> Result<MoeSpec> {
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

pub(super) fn model_spec(config: &Config) -> Result<ModelSpec> {
    let pairs = config.flag_or("rope_interleave", true)?;
    let spec = deepseek::model_spec(config, "deepseek_v3", moe_spec(config)?, pairs, 4096)?;
    let (dense, extra_blocks) = (deepseek::dense_blocks(config, 3, spec.layers)?, deepseek::extra_blocks(config)?);
    Ok(ModelSpec { dense, extra_blocks, ..spec })
}
