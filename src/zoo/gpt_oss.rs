//! gpt-oss (`model_type: gpt_oss`, arXiv 2508.10925): a gate with a bias, top-k, then softmax; a clamped activation, biases on all
//! projections, gate and up rows in turns, weights as floats or in MXFP4. Attention has biases and sinks, and looks back through a
//! sliding window in every other block.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::rope;
use super::transformer;
use super::window;
use crate::error::Result;
use crate::experts::activation::Activation;
use crate::routing::scores::Scoring;
use crate::spec::{AttentionBias, ExpertNames, ModelSpec, MoeSpec, RopeScaling, Yarn};

pub(super) const FAMILY: Family = Family {
    name: "gpt_oss",
    models: "gpt-oss, experts as floats or in MXFP4",
    gguf: &["gpt-oss"],
    checked: &["transformers", "llama.cpp"],
    reads: &["attention_bias", "layer_types", window::KEY, "swiglu_limit", "swiglu_alpha"],
    moe: moe_spec,
    decoder: model_spec,
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let spec = transformer::moe_spec(config, "num_local_experts", "intermediate_size")?;
    let number =
        |key: &str, default: f64| -> Result<f32> { Ok(config.optional_number(key)?.unwrap_or(default) as f32) };
    if config.has("quantization_config") {
        let method = config.string("quantization_config.quant_method")?;
        if method != "mxfp4" {
            return Err(config.error("quantization_config.quant_method", "mxfp4", method));
        }
    }
    Ok(MoeSpec {
        activation: Activation::clamped_swiglu(number("swiglu_alpha", 1.702)?, number("swiglu_limit", 7.0)?),
        expert_bias: true,
        gate_bias: true,
        scoring: Scoring::softmax().normalized(true),
        names: ExpertNames { gate: "router".into(), stacked_in_turns: true, ..ExpertNames::default() },
        ..spec
    })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let scaling = RopeScaling::Yarn(usual_yarn());
    let defaults = Defaults { scaling, ..Defaults::new(1e-5, 150_000.0, 131_072) };
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    Ok(ModelSpec {
        attention_bias: match config.optional_flag("attention_bias")? {
            Some(false) => AttentionBias::None,
            _ => AttentionBias::All,
        },
        sinks: true,
        // Every other block from the first on.
        window: window::by_block(config, spec.layers, spec.max_positions, |block| block.is_multiple_of(2), 128)?,
        ..spec
    })
}

/// What a configuration that says nothing means.
fn usual_yarn() -> Yarn {
    Yarn {
        factor: 32.0,
        original_positions: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        rotation_scale: rope::yarn_scale(32.0, 1.0),
        score_scale: 1.0,
        whole_rotations: false,
    }
}
