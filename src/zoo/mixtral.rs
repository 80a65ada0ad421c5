//! Mixtral (`model_type: mixtral`, arXiv 2401.04088): softmax, top-k, weights normalised; experts in `block_sparse_moe`, their
//! projections `w1` (gate), `w3` (up) and `w2` (down).

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::transformer;
use super::window;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{ExpertNames, ModelSpec, MoeSpec};

pub(super) const FAMILY: Family = Family {
    name: "mixtral",
    models: "Mixtral",
    gguf: &["llama"],
    checked: &["transformers", "llama.cpp"],
    reads: &[window::KEY],
    moe: moe_spec,
    decoder: model_spec,
};

/// Names of experts that are called by the letters of the paper.
pub(super) fn names() -> ExpertNames {
    let [gate_proj, up_proj, down_proj] = ["w1", "w3", "w2"].map(String::from);
    ExpertNames { gate_proj, up_proj, down_proj, ..ExpertNames::default() }
}

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    let spec = transformer::moe_spec(config, "num_local_experts", "intermediate_size")?;
    Ok(MoeSpec { scoring: Scoring::softmax().normalized(true), names: names(), ..spec })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults::new(1e-5, 1e6, 131_072);
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, defaults)?;
    let window = window::everywhere(config, spec.layers, spec.max_positions, None)?;
    Ok(ModelSpec { ffn: "block_sparse_moe".into(), window, ..spec })
}
