//! A Mixture-of-Experts layer for [Burn](https://burn.dev) whose router drops no token it has room for: [`Moe`], made by [`MoeConfig`].
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use phase_moe_burn::{CapacityRule, LayerState, MoeConfig, RouterKind};
//!
//! let device = Device::flex();
//! // Four devices share sixteen experts, and each takes a quarter of the slots.
//! let config = MoeConfig::new(32, 64, 16, 2).with_router(RouterKind::Phase).with_capacity(CapacityRule::per_device(1.0, 4));
//! let layer = config.init(&device);
//! let hidden = Tensor::<3>::random([2, 40, 32], Distribution::Default, &device);
//! assert_eq!(layer.forward(hidden.clone()).dims(), [2, 40, 32]);
//!
//! // What the router did, and what it keeps for the next batch.
//! let mut state = LayerState::default();
//! let (_output, routed) = layer.route(hidden, &mut state)?;
//! assert_eq!(routed.metrics()?.survival(), 1.0);
//! # Ok::<(), phase_moe_burn::Error>(())
//! ```
//!
//! | to | there is |
//! |---|---|
//! | make a layer | [`MoeConfig`], [`MoeConfig::of`] a whole [`MoeSpec`]: shared experts, biases, activations, scores |
//! | load one from a checkpoint | [`Moe::load`]; with its experts in a cache [`Moe::load_cached`] |
//! | run it | [`Moe::forward`], [`Moe::route`] |
//! | train it | [`load_balancing_loss`], [`router_z_loss`], [`LossFreeBias`], and with feature `train` [`metric`]s for Burn's learner |
//!
//! A layer runs in one of two ways. On Burn's CPU backend Flex without autodiff its experts run on the expert engine of `phase-moe`, which reads
//! the tensors' memory as it is. Under autodiff and on other devices they run as Burn's operations, and only gate logits are brought to the host.
//! Scores, routing and the weighted sum are in `f32` either way.
//!
//! **Errors.** What can be wrong with a batch or a configuration is a typed [`Error`] of [`Moe::route`] and [`MoeConfig::try_init`];
//! [`Moe::forward`] and [`MoeConfig::init`] panic with its text, as Burn's modules do.
//!
//! **Threads.** The engine runs on the Rayon pool that it is called in, as Flex does: the global one, whose size `RAYON_NUM_THREADS` sets, or one of
//! your own (`pool.install(|| layer.forward(x))`). Results do not depend on their number.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod by_burn;
mod by_engine;
mod config;
mod expert;
mod gate;
mod layer;
mod load;
mod loss;
#[cfg(feature = "train")]
pub mod metric;
mod routed;

pub use config::MoeConfig;
pub use expert::{Expert, Projection};
pub use gate::Gate;
pub use layer::Moe;
pub use loss::{load_balancing_loss, router_z_loss};
pub use phase_moe::routing::{LayerState, LossFreeBias};
pub use phase_moe::{
    CacheOptions, CapacityRule, Error, ExpertCache, MoeSpec, Result, RouteContext, Router, RouterKind, Weights,
};
pub use routed::Routed;

/// The examples of README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}
