//! One block of the transformer: `x + attention(norm(x))`, then `x + ffn(norm(x))`, the FFN an MoE layer or one for all tokens.
//!
//! Knows nothing of other blocks, routers' states or caches of experts.

use std::sync::Arc;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_nn::kv_cache::KvCache;

use super::attention::Attention;
use super::latent::LatentAttention;
use super::norm::Norm;
use super::rotary::Rotary;
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::layer::MoeLayer;
use crate::layer::expert::Expert;
use crate::spec::ModelSpec;

/// The parts of a block; clones share weights.
#[derive(Clone)]
pub(super) struct Block {
    pub(super) attention_norm: Norm,
    pub(super) attention: Mixer,
    pub(super) ffn_norm: Norm,
    pub(super) ffn: Ffn,
    /// Positions look back only as far as the model's window.
    pub(super) windowed: bool,
}

/// How positions look at each other.
#[derive(Clone)]
pub(super) enum Mixer {
    Grouped(Attention),
    Latent(LatentAttention),
}

impl Mixer {
    pub(super) fn load(spec: &ModelSpec, vb: VarBuilder<'_>, engine: &Arc<Engine>) -> Result<Self> {
        Ok(match spec.latent {
            Some(sizes) => Self::Latent(LatentAttention::load(spec, sizes, vb, engine)?),
            None => Self::Grouped(Attention::load(spec, vb, engine)?),
        })
    }

    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        rotary: &Rotary,
        mask: Option<&Tensor>,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        match self {
            Self::Grouped(attention) => attention.forward(hidden, rotary, mask, cache),
            Self::Latent(attention) => attention.forward(hidden, rotary, mask, cache),
        }
    }
}

/// What follows attention.
#[derive(Clone)]
pub(super) enum Ffn {
    Dense(Box<Expert>),
    Moe(Box<MoeLayer>),
}

impl Block {
    pub(super) fn moe(&self) -> Option<&MoeLayer> {
        match &self.ffn {
            Ffn::Dense(_) => None,
            Ffn::Moe(moe) => Some(moe),
        }
    }

    pub(super) fn moe_mut(&mut self) -> Option<&mut MoeLayer> {
        match &mut self.ffn {
            Ffn::Dense(_) => None,
            Ffn::Moe(moe) => Some(moe),
        }
    }
}
