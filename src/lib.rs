#![cfg_attr(feature = "model", doc = include_str!("crate.md"))]
#![cfg_attr(not(feature = "model"), doc = "Mixture-of-Experts routing, without any tensor framework.")]
#![deny(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(unreachable_pub))]
// What the rooms above the core alone use is there without them too.
#![cfg_attr(not(feature = "model"), allow(dead_code))]

// Checkpoints are little-endian, and what lies in them is used as it lies.
#[cfg(target_endian = "big")]
compile_error!("phase-moe reads weights where they lie, which are little-endian: big-endian targets are not supported");

pub mod checkpoint;
#[cfg(feature = "model")]
pub mod decoder;
pub mod error;
#[cfg(feature = "model")]
pub mod eval;
pub(crate) mod expert;
pub mod experts;
#[cfg(feature = "layer")]
pub mod layer;
pub mod offload;
pub mod parallel;
pub mod routing;
pub(crate) mod simd;
pub(crate) mod spec;
pub(crate) mod weights;
pub mod zoo;

pub use checkpoint::Checkpoint;
#[cfg(feature = "model")]
pub use decoder::{Batch, Decoder, DecoderState, GenerateOptions, Generation, LoadOptions, Model, Sampler, generate};
pub use error::{Error, Result};
pub use expert::{ExpertId, ExpertSet};
pub use experts::{Activation, Dtype, Engine, ExpertWeights, Matrix, Work};
#[cfg(feature = "layer")]
pub use layer::{Expert, Experts, Gate, MoeLayer, Routed, Shared};
pub use offload::{Admission, CacheOptions, CachedExperts, ExpertCache, ExpertStore, Policy};
pub use routing::{
    Assignment, CacheRouter, Capacity, CapacityRule, DispatchPlan, DropRule, LayerState, Logits, PhaseRouter,
    Placement, RouteContext, RouteMetrics, RouteRequest, RouteState, Router, RouterKind, Scores, Scoring, Scratch,
    TokenRequest, TopK, check_assignment,
};
pub use simd::Isa;
pub use spec::{ExpertNames, ModelSpec, MoeSpec, SharedExperts};
pub use weights::{ExpertSizes, Weights};

/// The examples of README are tests.
#[cfg(all(doctest, feature = "model"))]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(any(doc, doctest))]
#[cfg(feature = "model")]
#[doc = include_str!("../docs/swap.md")]
pub mod guide {}
