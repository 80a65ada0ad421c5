//! Tables of slots, `[tokens, top_k]` expert ids: how large one may be, what stands in an empty slot, and the order of a row.
//!
//! Knows nothing of how the slots were filled.

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

/// Puts a token's slots in order of falling selection score, ties to the lowest id, as top-k has them; empty ones last. What is
/// `kept` goes along.
#[inline(always)]
pub(crate) fn sort_slots(chosen: &mut [u16], kept: &mut [bool], selection: &[f32]) {
    let count = chosen.len();
    sort_few(
        &mut (chosen, kept),
        count,
        |(chosen, _), a, b| comes_before(chosen[a], chosen[b], selection),
        |(chosen, kept), a, b| {
            chosen.swap(a, b);
            kept.swap(a, b);
        },
    );
}

/// Whether a token lists expert `a` before expert `b`; an empty slot comes last.
#[inline(always)]
pub(crate) fn comes_before(a: u16, b: u16, selection: &[f32]) -> bool {
    let score = |expert: u16| selection.get(usize::from(expert)).copied().unwrap_or(f32::NEG_INFINITY);
    score(a) > score(b) || (score(a) == score(b) && a < b)
}

/// Insertion sort of a few things that are nearly in order: `before` compares what lies in two places, `swap` exchanges it.
#[inline(always)]
pub(crate) fn sort_few<T>(
    few: &mut T,
    count: usize,
    before: impl Fn(&T, usize, usize) -> bool,
    swap: impl Fn(&mut T, usize, usize),
) {
    for slot in 1..count {
        let mut place = slot;
        while place > 0 && before(few, place, place - 1) {
            swap(few, place, place - 1);
            place -= 1;
        }
    }
}
