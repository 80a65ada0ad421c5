//! Routing: from gate logits to an assignment and a dispatch plan, without any tensor framework.
//!
//! `Logits → Scores → (Mass) → Router + Capacity → Assignment → DispatchPlan`, a file per noun:
//!
//! | what | where |
//! |---|---|
//! | comes in, checked and scored | `logits`, `scores` |
//! | how much room there is, on which devices | `capacity` |
//! | what a router is asked, what it keeps, the trait itself | `router` |
//! | the gate's own choice, and what is dropped when a pool is full | `topk`, `drop` |
//! | exact under limits and aware of the gate: the default | `phase` |
//! | exact under limits and blind to the gate | `quota` |
//! | prefers experts in fast memory | `cache_aware`, `affinity` |
//! | a recorded answer, given again | `forced` |
//! | published baselines | `balanced`, `expanded`, `expert_choice`, `hash`, `phase_kernel` |
//! | comes out: experts and weights, and the order in which experts want them | `assignment`, `plan` |
//! | whether an answer is one, and how good it is | `check`, `metrics` |
//! | all of that for one layer, and what it carries from batch to batch | `layer` |
//! | routers by name | `registry` |

mod admission;
pub(crate) mod affinity;
pub(crate) mod assignment;
pub(crate) mod balanced;
pub(crate) mod cache_aware;
pub(crate) mod capacity;
pub(crate) mod check;
pub(crate) mod drop;
pub(crate) mod expanded;
pub(crate) mod expert_choice;
pub(crate) mod forced;
pub(crate) mod hash;
pub(crate) mod layer;
pub(crate) mod logits;
pub(crate) mod metrics;
pub(crate) mod phase;
pub(crate) mod phase_kernel;
pub(crate) mod plan;
pub(crate) mod quota;
pub(crate) mod registry;
pub(crate) mod request;
pub(crate) mod router;
mod score_function;
pub(crate) mod scores;
pub(crate) mod select;
pub(crate) mod slots;
mod state;
pub(crate) mod stream;
#[cfg(test)]
mod tests;
mod token;
pub(crate) mod topk;

pub use self::affinity::Affinity;
pub use self::assignment::Assignment;
pub use self::cache_aware::CacheRouter;
pub use self::capacity::{Capacity, CapacityRule, Placement, Profile, Rounding, Shares};
pub use self::check::check_assignment;
pub use self::drop::DropRule;
pub use self::forced::Forced;
pub use self::layer::{LayerRouter, LayerState, LossFreeBias};
pub use self::logits::Logits;
pub use self::metrics::{Balance, RouteMetrics};
pub use self::phase::{PhaseRouter, gate_mass_bound};
pub use self::phase_kernel::{PhaseKernel, PhaseSide, permutations, phase_ring};
pub use self::plan::DispatchPlan;
pub use self::registry::{Knowledge, RouterKind};
pub use self::router::{RouteContext, RouteRequest, RouteState, Router, Scratch, TokenRequest};
pub use self::scores::{GroupLimit, GroupScore, ScoreFunction, Scores, Scoring};
pub use self::topk::TopK;
