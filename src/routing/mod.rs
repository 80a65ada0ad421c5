//! Routing: from gate logits to an assignment and a dispatch plan, without any tensor framework.
//!
//! `Logits → Scores → (Mass) → Router + Capacity → Assignment → DispatchPlan`, one file per noun.

mod admission;
pub mod affinity;
pub mod assignment;
pub mod balanced;
pub mod cache_aware;
pub mod capacity;
pub mod check;
pub mod drop;
pub mod expanded;
pub mod expert_choice;
pub mod hash;
pub mod logits;
pub mod mass;
pub mod metrics;
pub mod phase;
pub mod phase_kernel;
pub mod plan;
pub mod quota;
pub mod registry;
pub(crate) mod request;
pub mod router;
pub mod scores;
pub(crate) mod select;
pub(crate) mod slots;
mod state;
pub(crate) mod stream;
mod token;
pub mod topk;
