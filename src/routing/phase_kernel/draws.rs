//! The reference kernel's random draws: rand 0.8 on ChaCha8, written out because rand 0.9 draws differently.
//!
//! rand 0.8 takes the high half of `number · bound` and draws again while the low half lies past the largest multiple
//! `bound · 2^i` that fits (Lemire 2019, arXiv 1805.10941, with a coarser zone); rand 0.9 corrects the bias with a second
//! number instead, and packs several shuffle indices into one. ChaCha8 and `seed_from_u64` are the same in both.
//!
//! Knows nothing of kernels.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Permutations of `rows` positions for the source and the target side, as the reference shuffles them from one seed.
pub fn permutations(rows: u32, seed: u64) -> [Vec<u32>; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    [(); 2].map(|()| {
        let mut order: Vec<u32> = (0..rows).collect();
        for last in (1..rows).rev() {
            order.swap(last as usize, draw_u32(&mut rng, last + 1) as usize);
        }
        order
    })
}

/// A number below `bound` as rand 0.8's `gen_range` draws a `usize` on 64-bit machines: the high half of a product, redrawn
/// while the low half lies past the largest power-of-two multiple of `bound`.
pub(super) fn draw_u64(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let zone = (bound << bound.leading_zeros()).wrapping_sub(1);
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 <= zone {
            return (product >> 64) as u64;
        }
    }
}

/// The same on 32 bits, which is how rand 0.8's `shuffle` draws an index.
pub(super) fn draw_u32(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    let zone = (bound << bound.leading_zeros()).wrapping_sub(1);
    loop {
        let product = u64::from(rng.next_u32()) * u64::from(bound);
        if product as u32 <= zone {
            return (product >> 32) as u32;
        }
    }
}
