//! Products of packed weights with bytes on sets that add products in sixteen bits: as many as fit there, then in words, then scales.

#![allow(unsafe_code)]

use super::blocks::{BYTES_AT, Blocks, OFFSETS, PACKED, PAIR, SCALES, Start, word};
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::product::rows::GROUP;

/// Words of 64 columns, four to each.
const WORDS: usize = 2 * GROUP / 4;

/// Adds the products of 64 columns of sixteen rows.
///
/// # Safety
/// There are two lines at each input.
#[inline(always)]
pub(super) unsafe fn pair<Q: Blocks, L: Multiply, const T: usize>(
    lanes: L,
    packed: &[Line; PACKED],
    pair: usize,
    inputs: &[*const Line; T],
    all: &mut [L::Vector; T],
) {
    let parts = WORDS / Q::SCALED;
    for part in 0..parts {
        let at = part * Q::SCALED;
        // Which line of the two, and the first of these words in it.
        let line = at / (WORDS / 2) * LINE_BYTES;
        let from = line + BYTES_AT + at % (WORDS / 2) * 4;
        let mut sums = [lanes.splat(0.0); T];
        if Q::START == Start::HalfSums {
            for (sum, input) in sums.iter_mut().zip(inputs) {
                // SAFETY: the caller has the lines, of which this is a word.
                *sum = unsafe { word(lanes, *input, line + 12 + part % 2 * 4) };
            }
        }
        for first in (0..Q::SCALED).step_by(Q::FIT) {
            let mut products = [lanes.splat(0.0); T];
            for at in first..first + Q::FIT {
                let weights = lanes.line(&packed[PAIR * pair + part * Q::SCALED + at]);
                for (products, input) in products.iter_mut().zip(inputs) {
                    // SAFETY: as above.
                    let made = lanes.small_products(weights, unsafe { word(lanes, *input, from + 4 * at) });
                    *products = if at == first { made } else { lanes.add_halves(*products, made) };
                }
            }
            for (sum, products) in sums.iter_mut().zip(products) {
                *sum = lanes.add_words(*sum, lanes.fold_halves(products));
            }
        }
        let scales = lanes.line(&packed[SCALES + parts * pair + part]);
        for ((all, sum), input) in all.iter_mut().zip(sums).zip(inputs) {
            // SAFETY: as above.
            let (scale, total) = unsafe { (word(lanes, *input, line), word(lanes, *input, line + 4)) };
            if Q::START == Start::Offsets {
                *all = lanes.mul_add(lanes.line(&packed[OFFSETS + parts * pair + part]), total, *all);
            }
            *all = lanes.mul_add(lanes.mul(lanes.convert(sum), scale), scales, *all);
        }
    }
}

/// The same of bytes with sign, packed as `q8_0` is: of the first group there are nine words, and two bytes before those of activations.
///
/// # Safety
/// There are two lines at each input.
#[inline(always)]
pub(super) unsafe fn signed_pair<L: Multiply, const T: usize>(
    lanes: L,
    packed: &[Line; PACKED],
    pair: usize,
    inputs: &[*const Line; T],
    all: &mut [L::Vector; T],
) {
    for (part, (words, before)) in [(0..9, 2), (9..PAIR, 0)].into_iter().enumerate() {
        let line = part * LINE_BYTES;
        let mut sums = [lanes.splat(0.0); T];
        for (at, word_at) in words.enumerate() {
            let weights = lanes.line(&packed[PAIR * pair + word_at]);
            let sizes = lanes.sizes(weights);
            for (sum, input) in sums.iter_mut().zip(inputs) {
                // SAFETY: the caller has the lines.
                let bytes = unsafe { word(lanes, *input, line + BYTES_AT - before + 4 * at) };
                *sum = lanes.add_words(*sum, lanes.dot_small(sizes, lanes.with_signs(bytes, weights)));
            }
        }
        let scales = lanes.line(&packed[SCALES + 2 * pair + part]);
        for ((all, sum), input) in all.iter_mut().zip(sums).zip(inputs) {
            // SAFETY: as above.
            let scale = unsafe { word(lanes, *input, line) };
            *all = lanes.mul_add(lanes.mul(lanes.convert(sum), scale), scales, *all);
        }
    }
}
