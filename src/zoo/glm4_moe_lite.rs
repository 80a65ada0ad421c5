//! GLM-4.7-Flash (`model_type: glm4_moe_lite`): the latent attention and the routing of DeepSeek-V3; which blocks are dense is said block by
//! block.

use super::config::Config;
use super::deepseek;
use super::deepseek_v3;
use super::defaults::Defaults;
use super::family::Family;
use super::transformer;
use crate::error::Result;
use crate::spec::{DenseBlocks, ModelSpec, MoeSpec};

pub(super) const FAMILY: Family = Family {
    name: "glm4_moe_lite",
    models: "GLM-4.7-Flash",
    gguf: &["deepseek2"],
    reads: &deepseek_v3::READS,
    moe: moe_spec,
    decoder: model_spec,
    ..deepseek_v3::FAMILY
};

fn moe_spec(config: &Config) -> Result<MoeSpec> {
    deepseek::expect(config, "scoring_func", "sigmoid")?;
    deepseek::expect(config, "topk_method", "noaux_tc")?;
    deepseek_v3::biased_spec(config, deepseek::Defaults { shared: 1, scale: 1.8, groups: Some(1) })
}

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults::new(1e-5, 10_000.0, 202_752);
    let pairs = config.flag_or("rope_interleave", true)?;
    let spec = deepseek::model_spec(config, &FAMILY, moe_spec(config)?, pairs, defaults)?;
    let (dense, extra_blocks) = (dense_blocks(config, spec.layers)?, deepseek::extra_blocks(config)?);
    Ok(ModelSpec { dense, extra_blocks, ..spec })
}

/// Blocks that `mlp_layer_types` calls dense; where it says nothing the first one. The published file says both that and how many are dense.
fn dense_blocks(config: &Config, layers: usize) -> Result<DenseBlocks> {
    const KEY: &str = "mlp_layer_types";
    let Some(kinds) = config.optional_strings(KEY)? else { return deepseek::dense_blocks(config, 1, layers) };
    if kinds.len() != layers {
        let expected = format!("one for each of num_hidden_layers {layers}");
        return Err(config.error(KEY, &expected, &kinds.len().to_string()));
    }
    if let Some(other) = kinds.iter().find(|kind| !["dense", "sparse"].contains(kind)) {
        return Err(config.error(KEY, "dense or sparse", other));
    }
    let blocks = (0..layers).filter(|&block| kinds[block] == "dense").collect();
    transformer::dense_blocks(config, KEY, blocks, layers)
}
