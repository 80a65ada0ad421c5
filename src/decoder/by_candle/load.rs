//! Loading the blocks of a decoder as tensors under a builder.

use std::sync::Arc;

use candle_nn::{Embedding, Init, VarBuilder};

use super::attention::Attention;
use super::delta_net::DeltaNet;
use super::latent::LatentAttention;
use super::linear::Linear;
use super::norm::Norm;
use super::short_conv::ShortConv;
use super::{Block, ByCandle, Mixer};
use crate::decoder::moe_step::Ffn;
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::layer::MoeLayer;
use crate::layer::expert::Expert;
use crate::layer::projection::Built;
use crate::spec::{ModelSpec, RecurrentMixer};

impl Mixer {
    fn load(spec: &ModelSpec, block: usize, vb: &VarBuilder<'_>, engine: &Arc<Engine>) -> Result<Self> {
        let (attention, recurrent) = (vb.pp("self_attn"), vb.pp(spec.names.recurrent));
        Ok(match (spec.recurrent_mixer(block), spec.latent) {
            (Some(RecurrentMixer::ShortConv(conv)), _) => {
                Self::ShortConv(ShortConv::load(spec, conv, recurrent, engine)?)
            }
            (Some(RecurrentMixer::DeltaNet(sizes)), _) => {
                Self::DeltaNet(Box::new(DeltaNet::load(spec, sizes, recurrent, engine)?))
            }
            (None, Some(sizes)) => Self::Latent(LatentAttention::load(spec, sizes, attention, engine)?),
            (None, None) => Self::Grouped(Attention::load(spec, attention, engine)?),
        })
    }
}

impl ByCandle {
    /// Of the tensors under `vb`, the MoE layers as `moe` makes them of their number and builder.
    pub(in crate::decoder) fn build(
        spec: &ModelSpec,
        vb: VarBuilder<'_>,
        moe: impl Fn(usize, VarBuilder<'_>) -> Result<MoeLayer>,
    ) -> Result<Self> {
        spec.check()?;
        let (model, hidden) = (vb.pp(spec.names.root), spec.moe.hidden);
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
                mixer_norm: Norm::load(spec, vb.pp(spec.names.mixer_norm))?,
                mixer: Mixer::load(spec, block, &vb, &engine)?,
                windowed: spec.window.blocks.binary_search(&block).is_ok(),
                ffn_norm: Norm::load(spec, vb.pp(spec.names.ffn_norm))?,
                ffn: match spec.dense.blocks.binary_search(&block) {
                    Ok(_) => {
                        Ffn::Dense(Box::new(Expert::load_dense(&spec.moe, spec.dense.width, vb.pp(&spec.ffn), &Built)?))
                    }
                    Err(_) => {
                        let layer = moe_layers;
                        moe_layers += 1;
                        Ffn::Moe(Box::new(moe(layer, vb.pp(&spec.ffn))?.with_index(layer).with_engine(engine.clone())))
                    }
                },
            })
        });
        Ok(Self {
            embedding: Embedding::new(embeddings, hidden),
            blocks: blocks.collect::<Result<_>>()?,
            norm: Norm::load(spec, model.pp(spec.names.last_norm))?,
            output: Linear::new(output, output_bias, engine),
        })
    }
}
