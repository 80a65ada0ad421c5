//! LFM2-MoE (`model_type: lfm2_moe`, arXiv 2511.23404): short convolutions in most blocks, attention in the others; sigmoid, a bias that
//! counts for selection only, weights normalised, then times a constant; the first blocks are dense. Experts have the names of Mixtral's.
//!
//! transformers adds 1e-6 to the sum that it normalises by; this does not.

use super::config::Config;
use super::defaults::Defaults;
use super::family::Family;
use super::mixtral;
use super::recurrent;
use super::transformer;
use crate::error::Result;
use crate::routing::scores::Scoring;
use crate::spec::{BlockNames, ExpertNames, ModelSpec, MoeSpec, QkNorm, RecurrentMixer, ShortConv};

pub(super) const FAMILY: Family = Family {
    name: "lfm2_moe",
    models: "LFM2-8B-A1B",
    gguf: &["lfm2moe"],
    checked: &["transformers", "llama.cpp"],
    reads: &["layer_types", "norm_topk_prob", "routed_scaling_factor", "use_expert_bias"],
    moe: moe_spec,
    decoder: model_spec,
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

fn model_spec(config: &Config) -> Result<ModelSpec> {
    let spec = transformer::model_spec(config, &FAMILY, moe_spec(config)?, Defaults::new(1e-5, 1e6, 128_000))?;
    let width = recurrent::conv_width(config, "conv_L_cache", 3)?;
    let conv = ShortConv { width, bias: config.optional_flag("conv_bias")?.unwrap_or(false) };
    let tied = match config.optional_flag("tie_embedding")? {
        Some(tied) => tied,
        None => config.optional_flag("tie_word_embeddings")?.unwrap_or(true),
    };
    Ok(ModelSpec {
        norm_eps: config.optional_number("norm_eps")?.unwrap_or(1e-5),
        qk_norm: Some(QkNorm::PerHead),
        recurrent: recurrent::named(config, "conv", RecurrentMixer::ShortConv(conv), spec.layers)?,
        tied_embeddings: tied,
        dense: transformer::leading_dense_blocks(config, "num_dense_layers", 2, spec.layers)?,
        ffn: "feed_forward".into(),
        names: BlockNames {
            mixer_norm: "operator_norm",
            ffn_norm: "ffn_norm",
            last_norm: "embedding_norm",
            qk_norms: ["q_layernorm", "k_layernorm"],
            output: "out_proj",
            recurrent: "conv",
            ..BlockNames::default()
        },
        ..spec
    })
}
