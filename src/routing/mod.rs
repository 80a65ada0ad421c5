//! Routing: from gate logits to an assignment and a dispatch plan, without any tensor framework.
//!
//! `Logits → Scores → (Mass) → Router + Capacity → Assignment → DispatchPlan`, one file per noun.

pub mod affinity;
pub mod assignment;
pub mod cache_aware;
pub mod capacity;
pub mod drop;
pub mod hash;
pub mod logits;
pub mod mass;
pub mod metrics;
pub mod phase;
pub mod plan;
pub mod registry;
pub mod requests;
pub mod router;
pub mod scores;
mod stream;
pub mod topk;
