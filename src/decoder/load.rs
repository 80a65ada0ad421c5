//! Loading a decoder: from a model's files, with its experts held in memory or in an expert cache, or from the variables of a builder.

use std::sync::Arc;

use candle_nn::{Embedding, Init, VarBuilder};

use super::Decoder;
use super::block::{Block, Ffn, Mixer};
use super::builder::{FileRows, var_builder};
use super::finite::of_loading;
use super::linear::Linear;
use super::norm::Norm;
use super::options::LoadOptions;
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::layer::MoeLayer;
use crate::layer::cached::CachedExperts;
use crate::layer::expert::Expert;
use crate::layer::load::experts;
use crate::offload::cache::ExpertCache;
use crate::spec::ModelSpec;
use crate::weights::Weights;

impl Decoder {
    /// Loads a model from its files.
    ///
    /// # Errors
    /// As [`Weights::spec`]; [`Error::Checkpoint`](crate::error::Error::Checkpoint) for tensors that are missing or of the wrong shape or
    /// dtype, [`Error::Parameter`](crate::error::Error::Parameter) for a cache that no expert fits, and as [`MoeLayer::new`].
    pub fn load(weights: &Weights, options: &LoadOptions) -> Result<Self> {
        let spec = weights.spec()?;
        let vb = var_builder(weights, options.dtype, &options.device);
        let blocks: Vec<usize> = spec.moe_blocks().collect();
        let cache = match options.expert_cache {
            None => None,
            Some(cache) => {
                let store = weights.expert_store()?;
                let cache = if cache.spare_bytes == 0 { cache.sparing(&store) } else { cache };
                Some(Arc::new(ExpertCache::new(Arc::new(store), cache)?))
            }
        };
        let checkpoint = weights.checkpoint();
        let rows = FileRows { checkpoint, dtype: options.dtype, device: &options.device, name: None };
        let moe = |layer: usize, vb: VarBuilder<'_>| match &cache {
            Some(cache) => MoeLayer::load_with(&spec.moe, vb, CachedExperts::new(cache.clone(), layer)),
            None => {
                let experts = experts(&spec.moe, &vb, |id| weights.slices(spec, blocks[layer], id), &rows)?;
                MoeLayer::load_with(&spec.moe, vb, experts)
            }
        };
        let decoder = Self::build(spec, vb, moe).map_err(|error| of_loading(error, checkpoint, spec))?;
        Ok(Self { checkpoint: Some(checkpoint.clone()), ..decoder })
    }

    /// A decoder of the tensors under `vb`, for variables to be trained among others: names are those of Hugging Face
    /// (`model.embed_tokens`, `model.layers.N`, `lm_head`, …).
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes, [`Error::Parameter`](crate::error::Error::Parameter) for sizes that
    /// contradict.
    pub fn new(spec: &ModelSpec, vb: VarBuilder<'_>) -> Result<Self> {
        Self::build(spec, vb, |_, vb| MoeLayer::load(&spec.moe, vb))
    }

    fn build(
        spec: &ModelSpec,
        vb: VarBuilder<'_>,
        moe: impl Fn(usize, VarBuilder<'_>) -> Result<MoeLayer>,
    ) -> Result<Self> {
        spec.check()?;
        let (model, hidden) = (vb.pp("model"), spec.moe.hidden);
        let table = |vb: VarBuilder<'_>, stdev| {
            vb.get_with_hints((spec.vocab, hidden), "weight", Init::Randn { mean: 0.0, stdev })
        };
        let embeddings = table(model.pp("embed_tokens"), 0.02)?;
        let output = match spec.tied_embeddings {
            true => embeddings.clone(),
            false => table(vb.pp("lm_head"), 0.02)?,
        };
        let output_bias = match spec.output_bias {
            true => Some(vb.pp("lm_head").get_with_hints(spec.vocab, "bias", Init::Const(0.0))?),
            false => None,
        };
        // One layer runs at a time: all work in the same memory.
        let engine = Arc::new(Engine::default());
        let mut moe_layers = 0;
        let blocks = (0..spec.layers).map(|block| {
            let vb = model.pp("layers").pp(block);
            Ok(Block {
                attention_norm: Norm::load(spec, vb.pp("input_layernorm"))?,
                attention: Mixer::load(spec, vb.pp("self_attn"), &engine)?,
                windowed: spec.window.blocks.binary_search(&block).is_ok(),
                ffn_norm: Norm::load(spec, vb.pp("post_attention_layernorm"))?,
                ffn: match spec.dense.blocks.binary_search(&block) {
                    Ok(_) => Ffn::Dense(Box::new(Expert::load_dense(&spec.moe, spec.dense.width, vb.pp(&spec.ffn))?)),
                    Err(_) => {
                        let layer = moe_layers;
                        moe_layers += 1;
                        Ffn::Moe(Box::new(moe(layer, vb.pp(&spec.ffn))?.with_index(layer).with_engine(engine.clone())))
                    }
                },
            })
        });
        Ok(Self {
            spec: spec.clone(),
            embedding: Embedding::new(embeddings, hidden),
            blocks: blocks.collect::<Result<_>>()?,
            norm: Norm::load(spec, model.pp("norm"))?,
            output: Linear::new(output, output_bias, engine),
            checkpoint: None,
        })
    }
}
