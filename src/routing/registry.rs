//! The routers by name: the one place where the names of the command line are compared.
//!
//! ```
//! use phase_moe::RouterKind;
//!
//! let router = "quota".parse::<RouterKind>()?.build(42);
//! assert_eq!(router.name(), "quota");
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! What a router can be told beyond its scores is said here too ([`RouterKind::understands`]), for all commands.
//!
//! Knows nothing else of what the routers do; each has its defaults, and further settings are made on its own type.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::routing::balanced::{auction::Auction, sinkhorn::Sinkhorn};
use crate::routing::cache_aware::CacheRouter;
use crate::routing::drop::DropRule;
use crate::routing::expanded::ExpandedDrop;
use crate::routing::expert_choice::ExpertChoice;
use crate::routing::hash::{Hash, WeightedHash};
use crate::routing::phase::PhaseRouter;
use crate::routing::phase_kernel::PhaseKernel;
use crate::routing::quota::PhaseQuota;
use crate::routing::router::Router;
use crate::routing::topk::TopK;

/// A router that the command line can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterKind {
    /// The gate's own choice, dropless.
    TopK,
    /// The same, dropping past the capacity in order of arrival.
    TopKArrival,
    /// The same, dropping the last of the lowest choices.
    TopKRank,
    /// The same, dropping the lowest scores.
    TopKScore,
    /// The same, overflow going to local experts with room.
    ExpandedDrop,
    /// Each expert picks its tokens.
    ExpertChoice,
    /// Scores balanced by entropy-regularised transport, then top-k.
    Sinkhorn,
    /// Balanced assignment by auction.
    Auction,
    /// Uniform hash of the token id.
    Hash,
    /// Hash of the token id in proportion to capacity.
    WeightedHash,
    /// The published phase kernel.
    PhaseKernel,
    /// Exact quotas on a ring, blind to the gate.
    #[serde(rename = "quota")]
    PhaseQuota,
    /// Gate-aware and exact: price, claim, place.
    Phase,
    /// Prefers experts in fast memory, within a bound on lost gate mass; ignores capacity.
    Cache,
    /// The same on top of `phase`, within its limits.
    #[serde(rename = "cache+phase")]
    CachePhase,
}

/// What a router may be told that not every router understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Knowledge {
    /// Limits on how many slots an expert or a device takes.
    Limits,
    /// Which experts are in fast memory, and what they are worth there.
    Memory,
}

impl RouterKind {
    /// True where `told` changes what the router does: telling it to another one is a mistake.
    pub fn understands(self, told: Knowledge) -> bool {
        match told {
            Knowledge::Limits => self.build(0).respects_capacity(),
            Knowledge::Memory => matches!(self, Self::Cache | Self::CachePhase),
        }
    }

    /// All routers, in the order in which tables list them.
    pub const ALL: [Self; 15] = [
        Self::TopK,
        Self::TopKArrival,
        Self::TopKRank,
        Self::TopKScore,
        Self::ExpandedDrop,
        Self::ExpertChoice,
        Self::Sinkhorn,
        Self::Auction,
        Self::Hash,
        Self::WeightedHash,
        Self::PhaseKernel,
        Self::PhaseQuota,
        Self::Phase,
        Self::Cache,
        Self::CachePhase,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        self.build(0).name()
    }

    /// The router with its defaults; `seed` is used by those that draw.
    pub fn build(self, seed: u64) -> Box<dyn Router> {
        self.build_with(seed, &CacheRouter::default())
    }

    /// The same with the settings of `cache` where the router is memory-aware.
    pub fn build_with(self, seed: u64, cache: &CacheRouter) -> Box<dyn Router> {
        match self {
            Self::TopK => Box::new(TopK { drop: None }),
            Self::TopKArrival => Box::new(TopK { drop: Some(DropRule::Arrival) }),
            Self::TopKRank => Box::new(TopK { drop: Some(DropRule::Rank) }),
            Self::TopKScore => Box::new(TopK { drop: Some(DropRule::Score) }),
            Self::ExpandedDrop => Box::new(ExpandedDrop::default()),
            Self::ExpertChoice => Box::new(ExpertChoice),
            Self::Sinkhorn => Box::new(Sinkhorn::default()),
            Self::Auction => Box::new(Auction::default()),
            Self::Hash => Box::new(Hash { seed }),
            Self::WeightedHash => Box::new(WeightedHash { seed }),
            Self::PhaseKernel => Box::new(PhaseKernel::published(seed)),
            Self::PhaseQuota => Box::new(PhaseQuota { seed }),
            Self::Phase => Box::new(PhaseRouter::default()),
            Self::Cache => Box::new(cache.clone()),
            Self::CachePhase => Box::new(cache.clone().with_phase(PhaseRouter::default())),
        }
    }
}

impl std::str::FromStr for RouterKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Error::by_name("router", &Self::ALL, Self::name, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_router_understands() {
        let deaf = |told| RouterKind::ALL.into_iter().filter(|kind| !kind.understands(told)).collect::<Vec<_>>();
        assert_eq!(deaf(Knowledge::Limits), [RouterKind::TopK, RouterKind::Cache]);
        assert_eq!(deaf(Knowledge::Memory), RouterKind::ALL[..13]);
    }

    #[test]
    fn every_name_finds_its_router() {
        for kind in RouterKind::ALL {
            assert_eq!(kind.name().parse::<RouterKind>().unwrap(), kind);
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("{:?}", kind.name()));
            assert_eq!(serde_json::from_str::<RouterKind>(&json).unwrap(), kind);
        }
        assert_eq!(
            "round-robin".parse::<RouterKind>().unwrap_err().to_string(),
            "unknown router `round-robin`: expected one of top-k, top-k-arrival, top-k-rank, top-k-score, expanded-drop, \
             expert-choice, sinkhorn, auction, hash, weighted-hash, phase-kernel, quota, phase, cache, cache+phase"
        );
    }
}
