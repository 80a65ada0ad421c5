//! Routing: from gate logits to an assignment and a dispatch plan, without any tensor framework.
//!
//! `Logits → Scores → (Mass) → Router + Capacity → Assignment → DispatchPlan`, a file per noun:
//!
//! | what | where |
//! |---|---|
//! | comes in, checked and scored | [`logits`], [`scores`], `mass` |
//! | how much room there is, on which devices | [`capacity`] |
//! | what a router is asked, what it keeps, the trait itself | [`router`] |
//! | the gate's own choice, and what is dropped when a pool is full | [`topk`], [`drop`] |
//! | exact under limits and aware of the gate: the default | [`phase`] |
//! | exact under limits and blind to the gate | [`quota`] |
//! | prefers experts in fast memory | [`cache_aware`], [`affinity`] |
//! | published baselines | [`balanced`], [`expanded`], [`expert_choice`], [`hash`], [`phase_kernel`] |
//! | comes out: experts and weights, and the order in which experts want them | [`assignment`], [`plan`] |
//! | whether an answer is one, and how good it is | [`check`], [`metrics`] |
//! | routers by name | [`registry`] |

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
mod score_function;
pub mod scores;
pub(crate) mod select;
pub(crate) mod slots;
mod state;
pub(crate) mod stream;
mod token;
pub mod topk;
