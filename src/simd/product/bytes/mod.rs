//! Products of quantised weights with activations of bytes: integers first, scales once for 32 columns.
//!
//! Sixteen weight rows are packed, 256 of their columns at a time, so that a lane is a row: a vector holds four columns of
//! each, an instruction multiplies them with a word of activations, and the scales of sixteen rows are a vector too. What
//! is packed stays in the first cache while all tokens meet it.
//!
//! Layouts of weights are ggml's (`dequantize_row_q8_0`, `_q4_K`, `_q5_K`, `_q6_K`, `_mxfp4` in ggml-quants.c). Activations are rounded to bytes with one
//! scale for each 32 of them, `scale = max |x| / 127`, as ggml does for `q8_0`. A [`Line`] holds 32 of them and what is known of them:
//!
//! | word | |
//! |---|---|
//! | 0 | `scale` |
//! | 1 | `scale · Σ bytes` |
//! | 2 | `-128 · Σ bytes`, an integer |
//! | 3, 4 | `-32 · Σ bytes` of the first sixteen, of the last |
//! | 5, 6 | zero |
//! | 7 to 14 | the bytes |
//! | 15 | zero |

#![allow(unsafe_code)]

mod along;
mod blocks;
mod narrow;

use self::blocks::{BYTES_AT, Blocks, Chunk, Mxfp4, PACKED, Q4K, Q5K, Q6K, Q8_0};
use super::rows::{BLOCK, CHUNK, GROUP, Product, Rows};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::{Kernel, LANES};

/// Tokens that meet packed weights at a time: as many sums, and nine vectors of weights, fit the registers. Run by `benches/engine`.
const TOKENS: usize = 8;

/// The same of sets with half of the registers.
const FEW_TOKENS: usize = 4;

/// How many chunks of weights are read ahead. Run by `benches/engine`.
const AHEAD_CHUNKS: usize = 2;

/// Lines of a chunk of a row of any dtype.
const PADDED: usize = Q8_0::BYTES.div_ceil(LINE_BYTES);

/// Adding it to a small number rounds it to a whole one that then stands in the lowest bits.
const SHIFT: f32 = 12_582_912.0;
/// Quantises activations: values as bytes, zeros after their end.
#[inline(always)]
pub(super) fn quantise<L: Multiply>(lanes: L, values: &[f32], lines: &mut [Line]) {
    let (shift, size) = (lanes.splat(SHIFT), lanes.repeat(0x7fff_ffff));
    for (group, line) in lines.iter_mut().enumerate() {
        let from = values.get(group * GROUP..).unwrap_or_default();
        let (low, high) = from[..from.len().min(GROUP)].split_at(from.len().min(LANES));
        let (low, high) = (lanes.load_part(low, 0.0), lanes.load_part(high, 0.0));
        let largest = lanes.fold_max(lanes.max(lanes.and(low, size), lanes.and(high, size)));
        // So small that its inverse is infinite, it stands for zeros.
        let is_zero = largest <= 127.0 * f32::MIN_POSITIVE;
        let (scale, inverse) = if is_zero { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
        let inverse = lanes.splat(inverse);
        let low = lanes.add(lanes.mul(low, inverse), shift);
        let high = lanes.add(lanes.mul(high, inverse), shift);
        let sums = [lanes.fold_sum(lanes.sub(low, shift)), lanes.fold_sum(lanes.sub(high, shift))];
        let sum = sums[0] + sums[1];
        // A byte cannot be NaN, and the largest may be another value: what is no number says so in the scale.
        let scale = if sum.is_nan() { sum } else { scale };
        let [all, first, last] = [-128.0 * sum, -32.0 * sums[0], -32.0 * sums[1]].map(|sum| (sum as i32) as u32);
        let mut words = [scale.to_bits(), (scale * sum).to_bits(), all, first, last, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let bytes = [lanes.narrow_bytes(low), lanes.narrow_bytes(high)];
        for (word, bytes) in words[BYTES_AT / 4..].iter_mut().zip(bytes.as_flattened().as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        line.0 = words;
    }
}

/// All sums of a [`Product`] of quantised weights with bytes.
#[inline(always)]
pub(super) fn product<L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let along = if L::ALONG { along::MANY } else { along::MANY_WITH_DOTS };
    if (L::ALONG || L::WIDE) && product.tokens.len() < along {
        return along::product(lanes, product);
    }
    match product.dtype {
        Dtype::Q4K => lanes.call(OfBlocks(product, Q4K)),
        Dtype::Q5K => lanes.call(OfBlocks(product, Q5K)),
        Dtype::Q6K => lanes.call(OfBlocks(product, Q6K)),
        Dtype::Mxfp4 => lanes.call(OfBlocks(product, Mxfp4)),
        _ => lanes.call(OfBlocks(product, Q8_0)),
    }
}

/// The same of one type of blocks.
struct OfBlocks<'p, 'a, Q>(&'p mut Product<'a>, Q);

impl<Q: Blocks> Kernel for OfBlocks<'_, '_, Q> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        run::<Q, L>(lanes, self.0);
    }
}

#[inline(always)]
fn run<Q: Blocks, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let columns = product.input.columns();
    let mut lines = product.workspace.take(2 * PACKED + LANES * PADDED);
    let (packed, copies) = lines.split_at_mut(2 * PACKED);
    let (mut rows, mut next) = ([std::ptr::null(); BLOCK], [std::ptr::null(); BLOCK]);
    for row in 0..BLOCK {
        rows[row] = product.weights[row].as_ptr();
        next[row] = product.row(BLOCK + row);
    }
    let chunks = columns.div_ceil(CHUNK);
    for chunk in 0..chunks {
        let (ahead, soon) = match chunk + AHEAD_CHUNKS {
            soon if soon < chunks => (&rows, soon),
            soon => (&next, (soon - chunks) % chunks),
        };
        let pairs = (columns - chunk * CHUNK).min(CHUNK).div_ceil(2 * GROUP);
        let bytes = Q::BYTES.min(product.weights[0].len() - chunk * Q::BYTES);
        for half in 0..2 {
            let (mut rows, mut at) = (rows[half * LANES..].first_chunk().expect("sixteen rows"), chunk * Q::BYTES);
            let ends;
            if bytes < Q::BYTES {
                // Rows that end within a chunk end with zeros.
                ends = padded(rows, at, bytes, copies);
                (rows, at) = (&ends, 0);
            }
            let stored = Chunk {
                rows,
                at,
                pairs,
                ahead: ahead[half * LANES..].first_chunk().expect("sixteen rows"),
                ahead_at: soon * Q::BYTES,
            };
            // SAFETY: every row has the bytes of a chunk.
            unsafe { Q::pack(lanes, &stored, &mut packed.as_chunks_mut::<PACKED>().0[half]) };
        }
        let part = PackedChunk { packed, chunk, pairs, input: product.input };
        let (mut tokens, mut sums) = (product.tokens, &mut *product.sums);
        while !tokens.is_empty() {
            let most = if L::WIDE { TOKENS } else { FEW_TOKENS };
            let count = tokens.len().div_ceil(tokens.len().div_ceil(most));
            let (now, rest) = tokens.split_at(count);
            let (into, behind) = std::mem::take(&mut sums).split_at_mut(count * BLOCK);
            (tokens, sums) = (rest, behind);
            match count {
                1 => part.run::<Q, L, 1>(lanes, now, into),
                2 => part.run::<Q, L, 2>(lanes, now, into),
                3 => part.run::<Q, L, 3>(lanes, now, into),
                4 => part.run::<Q, L, 4>(lanes, now, into),
                // The others are not compiled.
                _ if !L::WIDE => unreachable!("{count} tokens"),
                5 => part.run::<Q, L, 5>(lanes, now, into),
                6 => part.run::<Q, L, 6>(lanes, now, into),
                7 => part.run::<Q, L, 7>(lanes, now, into),
                _ => part.run::<Q, L, TOKENS>(lanes, now, into),
            }
        }
    }
    product.workspace.give_back(lines);
}

/// Copies what is left of sixteen rows, and zeros after its end; where each copy begins.
#[inline(always)]
fn padded(rows: &[*const u8; LANES], at: usize, bytes: usize, copies: &mut [Line]) -> [*const u8; LANES] {
    let mut starts = [std::ptr::null(); LANES];
    for (row, copy) in copies.chunks_exact_mut(PADDED).take(LANES).enumerate() {
        copy.fill(Line::default());
        // Read through the pointer that it is written through: one made before from a shared reference ends at the write.
        let start = copy.as_mut_ptr().cast();
        // SAFETY: a row has so many bytes left, and a copy has room for a chunk.
        unsafe { std::ptr::copy_nonoverlapping(rows[row].wrapping_add(at), start, bytes) };
        starts[row] = start.cast_const();
    }
    starts
}

/// A chunk of weights, packed, and the activations for it.
struct PackedChunk<'a> {
    packed: &'a [Line],
    chunk: usize,
    pairs: usize,
    input: Rows<'a>,
}

impl PackedChunk<'_> {
    #[inline(always)]
    fn run<Q: Blocks, L: Multiply, const T: usize>(&self, lanes: L, tokens: &[u32], sums: &mut [f32]) {
        let tokens: &[u32; T] = tokens.try_into().expect("as many tokens");
        let column = self.chunk * CHUNK;
        let mut starts = [std::ptr::null(); T];
        for (start, &token) in starts.iter_mut().zip(tokens) {
            *start = self.input.column(token, column, GROUP);
        }
        for (half, packed) in self.packed.as_chunks::<PACKED>().0.iter().enumerate() {
            let mut all = [lanes.splat(0.0); T];
            if self.chunk > 0 {
                for (all, sums) in all.iter_mut().zip(sums.as_chunks::<BLOCK>().0) {
                    *all = lanes.load(&sums.as_chunks::<LANES>().0[half]);
                }
            }
            let mut starts = starts;
            for pair in 0..self.pairs {
                // SAFETY: a row has two lines for each pair; `Rows` and `Product` have checked the numbers of both.
                unsafe {
                    if !L::ALONG {
                        Q::pair(lanes, packed, pair, &starts, &mut all);
                    } else if Q::FIT > 0 {
                        narrow::pair::<Q, L, T>(lanes, packed, pair, &starts, &mut all);
                    } else {
                        narrow::signed_pair(lanes, packed, pair, &starts, &mut all);
                    }
                }
                for start in &mut starts {
                    *start = start.wrapping_add(2);
                }
            }
            for (all, sums) in all.iter().zip(sums.as_chunks_mut::<BLOCK>().0) {
                lanes.store(*all, &mut sums.as_chunks_mut::<LANES>().0[half]);
            }
        }
    }
}
