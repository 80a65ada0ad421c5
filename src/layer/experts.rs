//! Where a layer's experts are: held in memory, or in their files behind an expert cache.
//!
//! Knows nothing of how they run.

use super::check::{LikeGate, ROUTING_DTYPE};
use super::expert::{Expert, ExpertShape};
use super::projection::Projection;
use crate::error::{Error, Result};
use crate::offload::cached::{CachedExperts, ExpertBiases};
use crate::spec::MoeSpec;

/// The experts of a layer, by id.
#[derive(Clone, Debug)]
pub enum Experts {
    /// In memory, one after the other.
    Held(Vec<Expert>),
    /// In an expert cache. Such a layer runs on the CPU without gradients; routers see what is in the cache.
    Cached(CachedExperts),
}

impl From<Vec<Expert>> for Experts {
    fn from(experts: Vec<Expert>) -> Self {
        Self::Held(experts)
    }
}

impl From<CachedExperts> for Experts {
    fn from(experts: CachedExperts) -> Self {
        Self::Cached(experts)
    }
}

impl Experts {
    /// Those in memory; none where they are in a cache.
    pub(super) fn held(&self) -> &[Expert] {
        match self {
            Self::Held(experts) => experts,
            Self::Cached(_) => &[],
        }
    }

    /// The layer of a cache that they are in, if they are.
    pub(super) fn cached(&self) -> Option<&CachedExperts> {
        match self {
            Self::Held(_) => None,
            Self::Cached(experts) => Some(experts),
        }
    }

    /// Checks that they are such as `spec` says, and `count` where they are held.
    pub(super) fn check(&self, spec: &MoeSpec, count: usize, like: &LikeGate<'_>) -> Result<()> {
        match self {
            Self::Held(held) if held.len() != count => Err(Error::shape("experts", count, held.len())),
            Self::Held(held) => held.iter().enumerate().try_for_each(|(index, expert)| {
                expert.check(&format!("expert {index}"), ExpertShape::routed(spec), like)
            }),
            Self::Cached(cached) => cached.check(spec),
        }
    }

    /// Those of a cache in place of these, whose biases they get where they have none.
    pub(super) fn replaced(&self, experts: CachedExperts, spec: &MoeSpec) -> Result<CachedExperts> {
        match self {
            _ if !spec.expert_bias || experts.has_biases() => Ok(experts),
            Self::Cached(before) => Ok(experts.or_biases(before)),
            Self::Held(held) => Ok(experts.with_biases(held.iter().map(biases).collect::<Result<_>>()?)),
        }
    }
}

/// The biases of an expert in memory; none where it has none.
fn biases(expert: &Expert) -> Result<ExpertBiases> {
    let of = |projection: Option<&Projection>| -> Result<Vec<f32>> {
        let Some(bias) = projection.and_then(Projection::bias) else { return Ok(Vec::new()) };
        Ok(bias.to_dtype(ROUTING_DTYPE)?.to_vec1()?)
    };
    Ok(ExpertBiases {
        gate: of(expert.gate_proj())?,
        up: of(Some(expert.up_proj()))?,
        down: of(Some(expert.down_proj()))?,
    })
}
