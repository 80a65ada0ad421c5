//! Capacity: how many slots each expert, or each device, has room for in one batch.
//!
//! A [`Capacity`] holds integers; a [`CapacityRule`] makes one for a batch from a capacity factor. Limits belong to
//! **pools**: a pool is one expert, or one device with all the experts [`Placement`] puts on it, anywhere.
//!
//! ```
//! use phase_moe::{CapacityRule, Placement};
//! use phase_moe::routing::{Rounding, Shares};
//!
//! // 100 tokens, 8 experts, top 2: 200 slots, 25 an expert at factor 1.0.
//! let capacity = CapacityRule::per_expert(1.0).capacity(100, 8, 2)?;
//! assert_eq!(capacity.limits(), Some(&[25; 8][..]));
//!
//! // 200 slots over 3 devices cannot be equal: exact shares sum to 200, published systems round each up.
//! let exact = CapacityRule::per_device(1.0, 3).capacity(100, 9, 2)?;
//! assert_eq!(exact.limits(), Some(&[67, 67, 66][..]));
//! let ceil = CapacityRule::per_device(1.0, 3).with_rounding(Rounding::Ceil).capacity(100, 9, 2)?;
//! assert_eq!(ceil.limits(), Some(&[67, 67, 67][..]));
//!
//! // Two devices, the first three times as fast: it has three times the experts, and three times the room.
//! let by_speed = CapacityRule::new(1.0, Shares::PerDevice { speeds: vec![3.0, 1.0] }).capacity(100, 8, 2)?;
//! assert_eq!((by_speed.limits(), by_speed.pool_of(5)), (Some(&[150, 50][..]), 0));
//!
//! // Two devices, the second three times as fast, with the experts dealt to them in turns.
//! let dealt = Placement::new(vec![0, 1, 0, 1, 0, 1, 0, 1], 2)?;
//! let placed = CapacityRule::placed(1.0, dealt, vec![1.0, 3.0]).capacity(100, 8, 2)?;
//! assert_eq!((placed.limits(), placed.pool_of(7)), (Some(&[50, 150][..]), 1));
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of scores or routers.

mod limits;
mod placement;
mod rule;
mod share;

pub use limits::Capacity;
pub use placement::Placement;
pub use rule::{CapacityRule, Profile, Rounding, Shares};
