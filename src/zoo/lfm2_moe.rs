//! The MoE layer of LFM2-MoE (`model_type: lfm2_moe`): sigmoid, a bias that counts for selection only, weights normalised, then
//! times a constant. The decoder around it is not here: most of its blocks are short convolutions.
//!
//! transformers adds 1e-6 to the sum that it normalises by; this does not.

use super::config::Config;
use super::family::{Decoder, Family};
use super::mixtral;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ExpertNames, MoeSpec};

pub(super) const FAMILY: Family = Family {
    name: "lfm2_moe",
    models: "LFM2-MoE",
    gguf: &[],
    checked: &["transformers"],
    reads: &[],
    moe: moe_spec,
    decoder: Decoder::Lacks("short convolutions"),
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let spec = transformer::moe_spec(config, "num_experts", "moe_intermediate_size")?;
    let normalize = config.optional_flag("norm_topk_prob")?.unwrap_or(true);
    let scale = config.optional_number("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    let selection_bias = config.optional_flag("use_expert_bias")?.unwrap_or(true);
    let names = ExpertNames { selection_bias: "expert_bias".into(), ..mixtral::names() };
    let scoring = Scoring { scale, ..Scoring::sigmoid().normalized(normalize) };
    Ok(MoeSpec { scoring, selection_bias, names, ..spec })
}
