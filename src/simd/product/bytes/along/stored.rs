//! Quantised weights along a row: what a chunk of 256 columns has as bytes, as factors, and beside its products, for each dtype.

#![allow(unsafe_code)]

use crate::simd::LANES;
use crate::simd::dtype::{Dtype, HEAD};
use crate::simd::multiply::Multiply;
use crate::simd::product::bytes::blocks::PAIRS;
use crate::simd::quantized::{SMALL_TWICE, power_of_two};

/// A byte with sign, plus 128.
pub(super) const SIGN: u32 = 0x8080_8080;

/// What a chunk adds beside its products: its factors times numbers of the activations, lane by lane.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Beside {
    Nothing,
    /// In the upper eight lanes the sums of the activations of each group, times −1.
    Sums,
    /// Integers, the sums of the bytes of each group times −12.
    Twelves,
    /// Those of each half of a group, times −32.
    HalfSums,
}

/// What differs between quantised dtypes along a row. Every chunk has [`Along::BYTES`] bytes at `at`.
pub(super) trait Along {
    /// Bytes of a chunk.
    const BYTES: usize;
    /// Whether weights have signs; else they are below 64.
    const SIGNED: bool;
    /// What has been added to each byte of a weight so that it has no sign, or is where products of bytes want that.
    const ADDED: u32 = 0;
    /// What it adds beside the products.
    const BESIDE: Beside = Beside::Nothing;

    /// Factors of a chunk: of its groups in the lower lanes, or of all halves of groups.
    ///
    /// # Safety
    /// There are the bytes of a chunk.
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector;

    /// The weights of 64 columns, a byte each.
    ///
    /// # Safety
    /// There are the bytes of a chunk.
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector;
}

pub(super) struct Q8_0;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Mxfp4;

/// `N` bytes from `from` on.
///
/// # Safety
/// There are so many, which live as long as `'a`.
#[inline(always)]
pub(super) unsafe fn some<'a, const N: usize>(at: *const u8, from: usize) -> &'a [u8; N] {
    // SAFETY: the caller has them.
    unsafe { &*at.add(from).cast() }
}

impl Along for Q8_0 {
    const BYTES: usize = 8 * Dtype::Q8_0.block_bytes();
    const SIGNED: bool = true;
    const ADDED: u32 = SIGN;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        let mut halves = [0; 32];
        for (four, halves) in halves.as_chunks_mut::<8>().0.iter_mut().take(2).enumerate() {
            let mut word = 0;
            for group in 0..4 {
                // SAFETY: eight blocks of a chunk.
                let half = unsafe { *some(at, (4 * four + group) * Dtype::Q8_0.block_bytes()) };
                word |= u64::from(u16::from_le_bytes(half)) << (16 * group);
            }
            *halves = word.to_le_bytes();
        }
        lanes.widen_f16(&halves)
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        let block = 2 * pair * Dtype::Q8_0.block_bytes();
        // SAFETY: two blocks of a chunk.
        unsafe { lanes.halves(some(at, block + 2), some(at, block + Dtype::Q8_0.block_bytes() + 2)) }
    }
}

impl Along for Q4K {
    const BYTES: usize = Dtype::Q4K.block_bytes();
    const SIGNED: bool = false;
    const BESIDE: Beside = Beside::Sums;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        // SAFETY: a chunk is a block.
        lanes.scales_and_offsets(unsafe { some(at, 0) })
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        // SAFETY: a quarter of a block's weights.
        unsafe { lanes.nibbles(some(at, HEAD + 32 * pair)) }
    }
}

impl Along for Q5K {
    const BYTES: usize = Dtype::Q5K.block_bytes();
    const SIGNED: bool = false;
    const BESIDE: Beside = Beside::Sums;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        // SAFETY: a chunk is a block.
        lanes.scales_and_offsets(unsafe { some(at, 0) })
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        // SAFETY: a quarter of a block's weights, and the fifth bits of all.
        unsafe { lanes.fives(some(at, HEAD + 32 + 32 * pair), some(at, HEAD), pair) }
    }
}

impl Along for Q6K {
    const BYTES: usize = Dtype::Q6K.block_bytes();
    const SIGNED: bool = false;
    const BESIDE: Beside = Beside::HalfSums;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        // SAFETY: a chunk is a block, which ends with its scales and their factor.
        let (scales, factor) = unsafe { (*some(at, 192), *some(at, 208)) };
        lanes.mul(lanes.widen_i8(scales), lanes.splat(lanes.half(factor)))
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        // SAFETY: half of a block's weights.
        unsafe { lanes.sixes(some(at, 64 * (pair / 2)), some(at, 128 + 32 * (pair / 2)), !pair.is_multiple_of(2)) }
    }
}

impl Along for Mxfp4 {
    const BYTES: usize = 8 * Dtype::Mxfp4.block_bytes();
    const SIGNED: bool = false;
    const ADDED: u32 = 0x0c0c_0c0c;
    const BESIDE: Beside = Beside::Twelves;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        // What does not count is 1/2: numbers that are too small for an exponent of their own take longer.
        let mut exponents = [127; LANES];
        let mut word = 0;
        for group in 0..2 * PAIRS {
            // SAFETY: eight blocks of a chunk.
            let [exponent] = unsafe { *some(at, group * Dtype::Mxfp4.block_bytes()) };
            word |= u64::from(exponent) << (8 * group);
        }
        exponents[..8].copy_from_slice(&word.to_le_bytes());
        // Floats that are whole have these in their lowest bits beside 2²³.
        let whole = lanes.add(lanes.widen_u8(exponents), lanes.splat(8_388_608.0));
        power_of_two(lanes, lanes.and(whole, lanes.repeat(0xff)))
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        let block = 2 * pair * Dtype::Mxfp4.block_bytes();
        // SAFETY: two blocks of a chunk.
        let nibbles =
            unsafe { lanes.nibbles_of_two(some(at, block + 1), some(at, block + Dtype::Mxfp4.block_bytes() + 1)) };
        lanes.lookup(&SMALL_TWICE, nibbles)
    }
}
