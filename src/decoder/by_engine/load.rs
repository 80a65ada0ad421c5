//! Loading the blocks of a decoder for the engine: matrices as they are stored, everything small in `f32`.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use super::attention::Attention;
use super::delta_net::DeltaNet;
use super::kept::KeptSizes;
use super::latent::LatentAttention;
use super::parts::{Linear, Norm, Rates, numbers};
use super::short_conv::ShortConv;
use super::stored::Stored;
use super::{Block, ByEngine, Mixer};
use crate::decoder::builder::var_builder;
use crate::decoder::moe_step::Ffn;
use crate::error::{Error, Result};
use crate::experts::engine::Engine;
use crate::experts::matrix::Dtype;
use crate::layer::MoeLayer;
use crate::layer::expert::Expert;
use crate::layer::load::experts;
use crate::offload::cache::ExpertCache;
use crate::parallel::ExpertParallel;
use crate::parallel::spread::Spread;
use crate::simd::attention::HeadLayout;
use crate::simd::recurrent::matrix_lines;
use crate::spec::{ModelSpec, RecurrentMixer};
use crate::weights::Weights;
use crate::weights::experts::Slice;

impl ByEngine {
    /// Of a model's files, its experts in memory or in `cache`; activations may be rounded to bf16 where `dtype` is that, keys and values are
    /// kept in `kv_dtype`.
    pub(in crate::decoder) fn load(
        weights: &Weights,
        spec: &ModelSpec,
        cache: Option<&Arc<ExpertCache>>,
        parallel: Option<&ExpertParallel>,
        [dtype, kv_dtype]: [DType; 2],
    ) -> Result<Self> {
        spec.check()?;
        let vb = var_builder(weights, DType::F32, &Device::Cpu);
        let stored = Stored { checkpoint: weights.checkpoint(), dtype };
        // One layer runs at a time: all work in the same memory.
        let engine = Arc::new(if dtype == DType::BF16 { Engine::default() } else { Engine::exact() });
        let sizes = sizes(spec, kv_dtype)?;
        let (model, hidden) = (vb.pp(spec.names.root), spec.moe.hidden);
        let embedding = stored.linear(&model.pp("embed_tokens"), [spec.vocab, hidden])?;
        let lm_head = vb.pp("lm_head");
        let output = Linear {
            weight: match spec.tied_embeddings {
                true => embedding.clone(),
                false => stored.linear(&lm_head, [spec.vocab, hidden])?,
            },
            bias: spec.output_bias.then(|| numbers(&lm_head, "bias", spec.vocab)).transpose()?,
        };
        let moe = |layer: usize, block: usize, vb: VarBuilder<'_>| -> Result<MoeLayer> {
            let (layers, count) = (spec.moe_layers(), spec.moe.experts);
            let spread = parallel.map(|parallel| Spread::new(parallel, [layer, layers], count, floats(dtype)));
            let spread = spread.transpose()?.map(Arc::new);
            let layer = match cache {
                Some(cache) => {
                    let experts = weights.cached_experts(cache, layer)?;
                    MoeLayer::load_with(&spec.moe, vb, experts, spread, &stored)?
                }
                None => {
                    // Of experts over ranks this one's.
                    let ids = (0..count).filter(|&id| spread.as_ref().is_none_or(|spread| spread.has(id)));
                    let all: BTreeMap<usize, Vec<Slice>> =
                        ids.clone().map(|id| Ok((id, weights.slices(spec, block, id)?))).collect::<Result<_>>()?;
                    let rows = stored.layer(&all.values().flatten().cloned().collect::<Vec<_>>())?;
                    let experts = experts(&spec.moe, &vb, ids, |id| Ok(all[&id].clone()), &rows)?;
                    MoeLayer::load_with(&spec.moe, vb, experts, spread.clone(), &stored)?.with_index(layer)
                }
            };
            Ok(layer.with_engine(engine.clone()))
        };
        let mut moe_layers = 0;
        let blocks = (0..spec.layers).map(|block| {
            let vb = model.pp("layers").pp(block);
            Ok(Block {
                mixer_norm: Norm::load(spec, &vb.pp(spec.names.mixer_norm))?,
                mixer: Mixer::load(spec, block, sizes.layout, &vb, &stored)?,
                windowed: spec.window.blocks.binary_search(&block).is_ok(),
                ffn_norm: Norm::load(spec, &vb.pp(spec.names.ffn_norm))?,
                ffn: match spec.dense.blocks.binary_search(&block) {
                    Ok(_) => {
                        let vb = vb.pp(&spec.ffn);
                        Ffn::Dense(Box::new(Expert::load_dense(&spec.moe, spec.dense.width, vb, &stored)?))
                    }
                    Err(_) => {
                        moe_layers += 1;
                        Ffn::Moe(Box::new(moe(moe_layers - 1, block, vb.pp(&spec.ffn))?))
                    }
                },
            })
        });
        Ok(Self {
            embedding,
            blocks: blocks.collect::<Result<_>>()?,
            norm: Norm::load(spec, &model.pp(spec.names.last_norm))?,
            output,
            engine,
            rates: Rates::new(spec),
            sizes,
        })
    }
}

impl Mixer {
    fn load(
        spec: &ModelSpec,
        block: usize,
        layout: HeadLayout,
        vb: &VarBuilder<'_>,
        stored: &Stored<'_>,
    ) -> Result<Self> {
        let (attention, recurrent) = (vb.pp("self_attn"), vb.pp(spec.names.recurrent));
        Ok(match (spec.recurrent_mixer(block), spec.latent) {
            (Some(RecurrentMixer::ShortConv(conv)), _) => {
                Self::ShortConv(ShortConv::load(spec, conv, &recurrent, stored)?)
            }
            (Some(RecurrentMixer::DeltaNet(sizes)), _) => {
                Self::DeltaNet(Box::new(DeltaNet::load(spec, sizes, &recurrent, stored)?))
            }
            (None, Some(sizes)) => Self::Latent(LatentAttention::load(spec, sizes, layout, &attention, stored)?),
            (None, None) => Self::Grouped(Attention::load(spec, layout, &attention, stored)?),
        })
    }
}

/// What blocks keep of a sequence.
fn sizes(spec: &ModelSpec, kv_dtype: DType) -> Result<KeptSizes> {
    let recurrence = spec.recurrent.as_ref().map(|recurrent| recurrent.mixer);
    let (tail, lines) = match recurrence {
        None => (0, 0),
        Some(mixer) => {
            let lines = match mixer {
                RecurrentMixer::ShortConv(_) => 0,
                RecurrentMixer::DeltaNet(net) => net.value_heads * matrix_lines(net.key_width, net.value_width),
            };
            (mixer.tail() * mixer.channels(spec.moe.hidden), lines)
        }
    };
    let kv_heads = if spec.latent.is_some() { 1 } else { spec.kv_heads };
    Ok(KeptSizes { layout: layout(spec, kv_dtype)?, kv_heads, recurrence, tail, lines })
}

/// The dtype of rows of activations that go to other ranks.
fn floats(dtype: DType) -> Dtype {
    match dtype {
        DType::BF16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// How keys and values are kept.
fn layout(spec: &ModelSpec, kv_dtype: DType) -> Result<HeadLayout> {
    let dtype = match kv_dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::Bf16,
        other => return Err(Error::parameter("dtype of keys and values", format!("{other:?}"), "F32, F16 or BF16")),
    };
    Ok(match spec.latent {
        Some(latent) => {
            HeadLayout { dtype, key: latent.kv_rank + spec.rotary_dim, value: latent.kv_rank, shared: true }
        }
        None => HeadLayout { dtype, key: spec.head_dim, value: spec.head_dim, shared: false },
    })
}
