//! Products of quantised weights with bytes along the weight rows: 64 columns of one row at a time, integers first, then scales.
//!
//! For few tokens on sets whose instructions add products of bytes in pairs of sixteen bits. Nothing is packed, as [`super`] does for more: a row
//! is read where it lies, once for up to [`TOKENS`] rows of activations.

#![allow(unsafe_code)]

use super::blocks::BYTES_AT;
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::product::rows::{BLOCK, CHUNK, GROUP, Product};
use crate::simd::quantized::{HEAD, SIGNED_TWICE, power_of_two, scales_of};
use crate::simd::{Kernel, LANES};

/// From so many rows of activations on, packing is worth it. Run by `examples/engine_table --isa avx2`.
pub(super) const MANY: usize = 4;

/// Rows of activations that meet a weight row at a time: all that come here.
const TOKENS: usize = MANY - 1;

/// How far ahead weights are asked for. No other distance was tried; `examples/engine_table --isa avx2` runs it.
const AHEAD_BYTES: usize = 3072;

/// Bytes of the largest chunk.
const LARGEST: usize = Q8_0::BYTES;

/// What a chunk adds beside its products: its factors times numbers of the activations, lane by lane.
#[derive(Clone, Copy, PartialEq)]
enum Beside {
    Nothing,
    /// In the upper eight lanes the sums of the activations of each group.
    Sums,
    /// Those of each half of a group, times −32.
    HalfSums,
}

/// What differs between quantised dtypes along a row. Every chunk has [`Along::BYTES`] bytes at `at`.
trait Along {
    /// Bytes of a chunk.
    const BYTES: usize;
    /// Whether weights have signs; else they are below 128.
    const SIGNED: bool;
    /// What it adds beside the products.
    const BESIDE: Beside = Beside::Nothing;

    /// Factors of a chunk; nothing where every block has its own.
    ///
    /// # Safety
    /// There are the bytes of a chunk.
    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, _at: *const u8) -> L::Vector {
        lanes.splat(0.0)
    }

    /// The weights of 64 columns, a byte each.
    ///
    /// # Safety
    /// There are the bytes of a chunk.
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector;

    /// What their products count, for each four.
    ///
    /// # Safety
    /// There are the bytes of a chunk.
    unsafe fn scales<L: Multiply>(lanes: L, at: *const u8, factors: &[f32; LANES], pair: usize) -> L::Vector;
}

struct Q8_0;
struct Q4K;
struct Q5K;
struct Q6K;
struct Mxfp4;

/// `N` bytes from `at` on.
///
/// # Safety
/// They are there, as long as is read.
#[inline(always)]
unsafe fn some<'a, const N: usize>(at: *const u8, from: usize) -> &'a [u8; N] {
    // SAFETY: the caller has them.
    unsafe { &*at.add(from).cast() }
}

/// Scales in the lower lanes, offsets in the upper ones.
#[inline(always)]
fn scales_and_offsets<L: Multiply>(lanes: L, head: &[u8; HEAD]) -> L::Vector {
    let (scales, offsets) = scales_of(head);
    let mut both = [0; LANES];
    both[..8].copy_from_slice(&scales);
    both[8..].copy_from_slice(&offsets);
    let [scale, least] = [lanes.half([head[0], head[1]]), lanes.half([head[2], head[3]])];
    lanes.mul(lanes.widen_u8(both), lanes.eights(scale, -least))
}

impl Along for Q8_0 {
    const BYTES: usize = 8 * Dtype::Q8_0.block_bytes();
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        let block = 2 * pair * Dtype::Q8_0.block_bytes();
        // SAFETY: two blocks of a chunk.
        unsafe { lanes.halves(some(at, block + 2), some(at, block + Dtype::Q8_0.block_bytes() + 2)) }
    }

    #[inline(always)]
    unsafe fn scales<L: Multiply>(lanes: L, at: *const u8, _: &[f32; LANES], pair: usize) -> L::Vector {
        let block = 2 * pair * Dtype::Q8_0.block_bytes();
        // SAFETY: as above.
        let [first, second] = unsafe { [*some(at, block), *some(at, block + Dtype::Q8_0.block_bytes())] };
        lanes.eights(lanes.half(first), lanes.half(second))
    }
}

impl Along for Q4K {
    const BYTES: usize = Dtype::Q4K.block_bytes();
    const SIGNED: bool = false;
    const BESIDE: Beside = Beside::Sums;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        // SAFETY: a chunk is a block.
        scales_and_offsets(lanes, unsafe { some(at, 0) })
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        // SAFETY: a quarter of a block's weights.
        unsafe { lanes.nibbles(some(at, HEAD + 32 * pair)) }
    }

    #[inline(always)]
    unsafe fn scales<L: Multiply>(lanes: L, _: *const u8, factors: &[f32; LANES], pair: usize) -> L::Vector {
        lanes.eights(factors[2 * pair], factors[2 * pair + 1])
    }
}

impl Along for Q5K {
    const BYTES: usize = Dtype::Q5K.block_bytes();
    const SIGNED: bool = false;
    const BESIDE: Beside = Beside::Sums;

    #[inline(always)]
    unsafe fn factors<L: Multiply>(lanes: L, at: *const u8) -> L::Vector {
        // SAFETY: a chunk is a block.
        scales_and_offsets(lanes, unsafe { some(at, 0) })
    }

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        // SAFETY: a quarter of a block's weights, and the fifth bits of all.
        unsafe { lanes.fives(some(at, HEAD + 32 + 32 * pair), some(at, HEAD), pair) }
    }

    #[inline(always)]
    unsafe fn scales<L: Multiply>(lanes: L, _: *const u8, factors: &[f32; LANES], pair: usize) -> L::Vector {
        lanes.eights(factors[2 * pair], factors[2 * pair + 1])
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

    #[inline(always)]
    unsafe fn scales<L: Multiply>(lanes: L, _: *const u8, factors: &[f32; LANES], pair: usize) -> L::Vector {
        lanes.quads(&factors.as_chunks::<4>().0[pair])
    }
}

impl Along for Mxfp4 {
    const BYTES: usize = 8 * Dtype::Mxfp4.block_bytes();
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn weights<L: Multiply>(lanes: L, at: *const u8, pair: usize) -> L::Vector {
        let block = 2 * pair * Dtype::Mxfp4.block_bytes();
        // SAFETY: two blocks of a chunk.
        let nibbles =
            unsafe { lanes.nibbles_of_two(some(at, block + 1), some(at, block + Dtype::Mxfp4.block_bytes() + 1)) };
        lanes.lookup(&SIGNED_TWICE, nibbles)
    }

    #[inline(always)]
    unsafe fn scales<L: Multiply>(lanes: L, at: *const u8, _: &[f32; LANES], pair: usize) -> L::Vector {
        let block = 2 * pair * Dtype::Mxfp4.block_bytes();
        // SAFETY: as above.
        let [[first], [second]] = unsafe { [*some(at, block), *some(at, block + Dtype::Mxfp4.block_bytes())] };
        let words = [first, second].map(|byte| f32::from_bits(u32::from(byte)));
        power_of_two(lanes, lanes.eights(words[0], words[1]))
    }
}

/// All sums of a [`Product`] of quantised weights with bytes.
#[inline(always)]
pub(crate) fn product<L: Multiply>(lanes: L, product: &mut Product<'_>) {
    match product.dtype {
        Dtype::Q4K => lanes.call(OfRows(product, Q4K)),
        Dtype::Q5K => lanes.call(OfRows(product, Q5K)),
        Dtype::Q6K => lanes.call(OfRows(product, Q6K)),
        Dtype::Mxfp4 => lanes.call(OfRows(product, Mxfp4)),
        _ => lanes.call(OfRows(product, Q8_0)),
    }
}

/// The same of one type of blocks.
struct OfRows<'p, 'a, Q>(&'p mut Product<'a>, Q);

impl<Q: Along> Kernel for OfRows<'_, '_, Q> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        run::<Q, L>(lanes, self.0);
    }
}

#[inline(always)]
fn run<Q: Along, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let (count, chunks) = (product.tokens.len(), product.input.columns().div_ceil(CHUNK));
    let beside = if Q::BESIDE == Beside::Nothing { 0 } else { count * chunks };
    let mut lines = product.workspace.take(beside);
    if Q::BESIDE != Beside::Nothing {
        sums_of::<L>(lanes, product, Q::BESIDE, chunks, &mut lines[..beside]);
    }
    let whole = product.weights[0].len() / Q::BYTES;
    let left = product.weights[0].len() - whole * Q::BYTES;
    let mut last = [0; LARGEST];
    for row in 0..BLOCK {
        let start = product.weights[row].as_ptr();
        // A row that ends within a chunk ends with zeros.
        last[..left].copy_from_slice(&product.weights[row][whole * Q::BYTES..]);
        let stored = Row { start, whole, last: &last, chunks };
        let mut done = 0;
        while done < count {
            match count - done {
                1 => done += stored.meet::<Q, L, 1>(lanes, product, &lines, row, done),
                2 => done += stored.meet::<Q, L, 2>(lanes, product, &lines, row, done),
                _ => done += stored.meet::<Q, L, TOKENS>(lanes, product, &lines, row, done),
            }
        }
    }
    product.workspace.give_back(lines);
}

/// Numbers of the activations that meet factors of weights, a line for each token and chunk.
#[inline(always)]
fn sums_of<L: Multiply>(lanes: L, product: &Product<'_>, kind: Beside, chunks: usize, beside: &mut [Line]) {
    let columns = product.input.columns();
    for (&token, beside) in product.tokens.iter().zip(beside.chunks_exact_mut(chunks)) {
        for (chunk, into) in beside.iter_mut().enumerate() {
            let groups = (columns - chunk * CHUNK).min(CHUNK).div_ceil(GROUP);
            let start = product.input.column(token, chunk * CHUNK, GROUP);
            let mut words = [0.0f32; LANES];
            for group in 0..groups {
                // SAFETY: a row has a line for each group; `Rows` and `Product` have checked the numbers of both.
                let line = unsafe { &*start.add(group) };
                if kind == Beside::Sums {
                    words[LANES / 2 + group] = f32::from_bits(line.0[1]);
                } else {
                    let scale = f32::from_bits(line.0[0]);
                    words[2 * group] = line.0[3] as i32 as f32 * scale;
                    words[2 * group + 1] = line.0[4] as i32 as f32 * scale;
                }
            }
            lanes.store_line(lanes.load(&words), into);
        }
    }
}

/// A weight row.
struct Row<'a> {
    start: *const u8,
    /// Chunks that it has whole.
    whole: usize,
    /// What comes after them.
    last: &'a [u8; LARGEST],
    chunks: usize,
}

impl Row<'_> {
    /// Its sums with `T` tokens from `first` on; returns `T`.
    #[inline(always)]
    fn meet<Q: Along, L: Multiply, const T: usize>(
        &self,
        lanes: L,
        product: &mut Product<'_>,
        beside: &[Line],
        row: usize,
        first: usize,
    ) -> usize {
        let columns = product.input.columns();
        let tokens: &[u32; T] = product.tokens[first..].first_chunk().expect("as many tokens");
        let mut all = [lanes.splat(0.0); T];
        let mut factors = [0.0; LANES];
        let (mut inputs, of_segment) = ([std::ptr::null(); T], product.input.segment / CHUNK);
        let (mut segment, mut left) = (0, 0);
        for chunk in 0..self.chunks {
            let at = if chunk < self.whole { self.start.wrapping_add(chunk * Q::BYTES) } else { self.last.as_ptr() };
            let pairs = (columns - chunk * CHUNK).min(CHUNK).div_ceil(2 * GROUP);
            if left == 0 {
                for (input, &token) in inputs.iter_mut().zip(tokens) {
                    *input = product.input.at(token, segment);
                }
                (segment, left) = (segment + 1, of_segment);
            }
            left -= 1;
            if first == 0 {
                // Rows follow each other.
                for line in 0..Q::BYTES.div_ceil(LINE_BYTES) {
                    lanes.prefetch(self.start.wrapping_add(chunk * Q::BYTES + AHEAD_BYTES + line * LINE_BYTES));
                }
            }
            if Q::BESIDE != Beside::Nothing {
                // SAFETY: a row has the bytes of a chunk at each of them.
                let made = unsafe { Q::factors(lanes, at) };
                lanes.store(made, &mut factors);
                for (t, all) in all.iter_mut().enumerate() {
                    *all = lanes.mul_add(made, lanes.line(&beside[(first + t) * self.chunks + chunk]), *all);
                }
            }
            for pair in 0..pairs {
                // SAFETY: as above.
                let (weights, scales) = unsafe { (Q::weights(lanes, at, pair), Q::scales(lanes, at, &factors, pair)) };
                let sizes = if Q::SIGNED { lanes.sizes(weights) } else { weights };
                for (all, input) in all.iter_mut().zip(&mut inputs) {
                    let line = input.cast::<u8>();
                    *input = input.wrapping_add(2);
                    // SAFETY: a row has two lines for each pair, its scale in front of its bytes; `Rows` and `Product` have checked the
                    // numbers of both.
                    let (low, high, scale) = unsafe {
                        let scale = [line.cast::<f32>().read(), line.add(LINE_BYTES).cast::<f32>().read()];
                        (some(line, BYTES_AT), some(line, LINE_BYTES + BYTES_AT), scale)
                    };
                    let mut bytes = lanes.halves(low, high);
                    if Q::SIGNED {
                        bytes = lanes.with_signs(bytes, weights);
                    }
                    let products = lanes.convert(lanes.dot_small(sizes, bytes));
                    *all = lanes.mul_add(products, lanes.mul(scales, lanes.eights(scale[0], scale[1])), *all);
                }
            }
        }
        for (t, all) in all.into_iter().enumerate() {
            product.sums[(first + t) * BLOCK + row] = lanes.fold_sum(all);
        }
        T
    }
}
