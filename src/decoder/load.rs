//! Loading a decoder: from a model's files, with its experts held in memory or in an expert cache, or from the variables of a builder.

use std::sync::Arc;

use candle_nn::VarBuilder;

use super::builder::{FileRows, var_builder};
use super::by_candle::ByCandle;
use super::by_engine::ByEngine;
use super::finite::of_loading;
use super::options::LoadOptions;
use super::{Body, Decoder};
use crate::error::{Error, Result};
use crate::layer::MoeLayer;
use crate::layer::load::experts;
use crate::layer::projection::Built;
use crate::offload::cache::ExpertCache;
use crate::spec::ModelSpec;
use crate::weights::Weights;

impl Decoder {
    /// Loads a model from its files.
    ///
    /// # Errors
    /// As [`Weights::spec`]; [`Error::Checkpoint`] for tensors that are missing or of the wrong shape or
    /// dtype, [`Error::Parameter`] for a cache that no expert fits, and as [`MoeLayer::new`].
    pub fn load(weights: &Weights, options: &LoadOptions) -> Result<Self> {
        let spec = weights.spec()?;
        let cache = match options.expert_cache {
            None => None,
            Some(cache) => {
                let store = weights.expert_store()?;
                let cache = if cache.spare_bytes == 0 { cache.sparing(&store) } else { cache };
                Some(Arc::new(ExpertCache::new(Arc::new(store), cache)?))
            }
        };
        let checkpoint = weights.checkpoint();
        let body = match options.device.is_cpu() {
            true => {
                let dtypes = [options.dtype, options.kept_dtype()];
                let body = ByEngine::load(weights, spec, cache.as_ref(), options.parallel.as_ref(), dtypes);
                body.map(Box::new).map(Body::ByEngine)
            }
            false if options.parallel.is_some() => {
                Err(Error::parameter("device", format!("{:?}", options.device), "the CPU, as experts over ranks need"))
            }
            false => Self::tensors(weights, spec, cache.as_ref(), options).map(Body::ByCandle),
        };
        let body = body.map_err(|error| of_loading(error, checkpoint, spec))?;
        let parallel = options.parallel.clone();
        Ok(Self { spec: spec.clone(), body, checkpoint: Some(checkpoint.clone()), parallel })
    }

    /// The same as Candle's tensors, all in one dtype.
    fn tensors(
        weights: &Weights,
        spec: &ModelSpec,
        cache: Option<&Arc<ExpertCache>>,
        options: &LoadOptions,
    ) -> Result<ByCandle> {
        let blocks: Vec<usize> = spec.moe_blocks().collect();
        let (dtype, device) = (Some(options.dtype), &options.device);
        let rows = FileRows { checkpoint: weights.checkpoint(), dtype, device, name: None };
        ByCandle::build(spec, var_builder(weights, options.dtype, device), |layer, vb| match cache {
            Some(cache) => {
                let experts = weights.cached_experts(cache, layer)?;
                MoeLayer::load_with(&spec.moe, vb, experts, None, &Built)
            }
            None => {
                let of = |id| weights.slices(spec, blocks[layer], id);
                let experts = experts(&spec.moe, &vb, 0..spec.moe.experts, of, &rows)?;
                MoeLayer::load_with(&spec.moe, vb, experts, None, &Built)
            }
        })
    }

    /// A decoder of the tensors under `vb`, for variables to be trained among others: names are those of Hugging Face
    /// (`model.embed_tokens`, `model.layers.N`, `lm_head`, …).
    ///
    /// # Errors
    /// What the builder reports for missing tensors and wrong shapes, [`Error::Parameter`] for sizes that
    /// contradict.
    pub fn new(spec: &ModelSpec, vb: VarBuilder<'_>) -> Result<Self> {
        let body = ByCandle::build(spec, vb, |_, vb| MoeLayer::load(&spec.moe, vb))?;
        let mut decoder = Self { spec: spec.clone(), body: Body::ByCandle(body), checkpoint: None, parallel: None };
        if !spec.layer_top_k.is_empty() {
            decoder.set_top_k(&spec.layer_top_k)?;
        }
        Ok(decoder)
    }
}
