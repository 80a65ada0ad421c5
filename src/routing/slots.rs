//! Tables of slots, `[tokens, top_k]` expert ids: how large one may be, and what stands in an empty slot.
//!
//! Knows nothing of what is in the slots.

use crate::error::{Error, Result};

/// Marks a slot without an expert in compact tables of ids.
pub(crate) const EMPTY: u16 = u16::MAX;

/// Checks that the slots of a batch can be counted in 32 bits, as plans do.
pub(crate) fn check_slots(tokens: usize, top_k: usize) -> Result<()> {
    match tokens.checked_mul(top_k).filter(|&slots| slots < u32::MAX as usize) {
        Some(_) => Ok(()),
        None => Err(Error::shape("batch", "fewer than 2^32 - 1 slots", format!("{tokens} tokens · top_k {top_k}"))),
    }
}

/// Checks `1 ≤ top_k ≤ experts`.
pub(crate) fn check_top_k(top_k: usize, experts: usize) -> Result<()> {
    match top_k {
        0 => Err(Error::TopKZero),
        _ if top_k > experts => Err(Error::TopKExceedsExperts { top_k, experts }),
        _ => Ok(()),
    }
}
