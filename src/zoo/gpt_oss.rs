//! The MoE layer of gpt-oss (`model_type: gpt_oss`): a gate with a bias, top-k, then softmax; a clamped activation, biases on all
//! projections, gate and up rows in turns. Its weights as floats, not in MXFP4. The decoder around it is not here: attention has
//! sinks and a sliding window.

use super::config::Config;
use super::transformer;
use crate::error::Result;
use crate::experts::activation::Activation;
use crate::routing::scores::Scoring;
use crate::spec::{ExpertNames, MoeSpec};

pub(super) fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let spec = transformer::moe_spec(config, "num_local_experts", "intermediate_size")?;
    let number =
        |key: &str, default: f64| -> Result<f32> { Ok(config.optional_number(key)?.unwrap_or(default) as f32) };
    Ok(MoeSpec {
        activation: Activation::clamped_swiglu(number("swiglu_alpha", 1.702)?, number("swiglu_limit", 7.0)?),
        expert_bias: true,
        gate_bias: true,
        scoring: Scoring::softmax().normalized(true),
        names: ExpertNames { gate: "router".into(), stacked_in_turns: true, ..ExpertNames::default() },
        ..spec
    })
}
