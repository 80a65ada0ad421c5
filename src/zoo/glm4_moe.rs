//! GLM-4 MoE (`model_type: glm4_moe`, arXiv 2508.06471): routing as in DeepSeek-V3; biases on queries, keys and values, norms on
//! each head's queries and keys, half of a head rotated.

use super::config::Config;
use super::defaults::Defaults;
use super::defaults::Rotated;
use super::family::Family;
use super::transformer;
use super::{deepseek, deepseek_v3};
use crate::error::Result;
use crate::spec::{AttentionBias, ModelSpec, MoeSpec, QkNorm};

pub(super) const FAMILY: Family = Family {
    name: "glm4_moe",
    models: "GLM-4.5, GLM-4.6",
    gguf: &["glm4moe"],
    checked: &["transformers", "llama.cpp"],
    reads: &[
        "attention_bias",
        "use_qk_norm",
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
    deepseek::expect(config, "scoring_func", "sigmoid")?;
    deepseek::expect(config, "topk_method", "noaux_tc")?;
    deepseek_v3::biased_spec(config, deepseek::Defaults { shared: 1, scale: 1.0, groups: Some(1) })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults { rotated: Rotated::Share(0.5), ..Defaults::new(1e-5, 10_000.0, 131_072) };
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    let flag = |key: &str| -> Result<bool> { Ok(config.optional_flag(key)?.unwrap_or(false)) };
    Ok(ModelSpec {
        attention_bias: if flag("attention_bias")? { AttentionBias::Inputs } else { AttentionBias::None },
        qk_norm: flag("use_qk_norm")?.then_some(QkNorm::PerHead),
        dense: deepseek::dense_blocks(config, 1, spec.layers)?,
        extra_blocks: deepseek::extra_blocks(config)?,
        ..spec
    })
}
