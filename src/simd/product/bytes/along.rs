//! Products of quantised weights with bytes along the weight rows: 64 columns of one row at a time, integers first, then scales.
//!
//! For few tokens on sets whose instructions add products of bytes in pairs of sixteen bits. Nothing is packed, as [`super`] does for more: a row
//! is read where it lies, once for up to [`TOKENS`] rows of activations.

#![allow(unsafe_code)]

use super::blocks::{BYTES_AT, PAIRS};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::product::rows::{BLOCK, CHUNK, GROUP, Product};
use crate::simd::quantized::{HEAD, SIGNED_TWICE, power_of_two, scales_of};
use crate::simd::{Kernel, LANES};

/// From so many rows of activations on, packing is worth it. Run by `examples/engine_table --isa avx2`.
pub(super) const MANY: usize = 4;

/// The same where products of bytes are instructions.
pub(super) const MANY_WITH_DOTS: usize = 2;

/// Rows of activations that meet a weight row at a time: all that come here.
const TOKENS: usize = MANY - 1;

/// How far ahead weights are asked for. No other distance was tried; `examples/engine_table --isa avx2` runs it.
const AHEAD_BYTES: usize = 3072;

/// Weight rows side by side.
const ROWS: usize = 2;

/// Lines of prepared activations for a pair of groups, and for a chunk with what meets its factors.
const PAIR_LINES: usize = 3;
const CHUNK_LINES: usize = PAIR_LINES * PAIRS + 1;

/// A byte with sign, plus 128.
const SIGN: u32 = 0x8080_8080;

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

    /// What their products count, for each four; the chunk's factors come as a vector and as they lie in memory.
    ///
    /// # Safety
    /// There are the bytes of a chunk.
    unsafe fn scales<L: Multiply>(
        lanes: L,
        at: *const u8,
        made: L::Vector,
        factors: &[f32; LANES],
        pair: usize,
    ) -> L::Vector;
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
    unsafe fn scales<L: Multiply>(lanes: L, at: *const u8, _: L::Vector, _: &[f32; LANES], pair: usize) -> L::Vector {
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
    unsafe fn scales<L: Multiply>(
        lanes: L,
        _: *const u8,
        made: L::Vector,
        factors: &[f32; LANES],
        pair: usize,
    ) -> L::Vector {
        lanes.eights_of(made, factors, pair)
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
    unsafe fn scales<L: Multiply>(
        lanes: L,
        _: *const u8,
        made: L::Vector,
        factors: &[f32; LANES],
        pair: usize,
    ) -> L::Vector {
        lanes.eights_of(made, factors, pair)
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
    unsafe fn scales<L: Multiply>(
        lanes: L,
        _: *const u8,
        made: L::Vector,
        factors: &[f32; LANES],
        pair: usize,
    ) -> L::Vector {
        lanes.quads_of(made, factors, pair)
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
    unsafe fn scales<L: Multiply>(lanes: L, at: *const u8, _: L::Vector, _: &[f32; LANES], pair: usize) -> L::Vector {
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
    let mut lines = product.workspace.take(count * chunks * CHUNK_LINES);
    for (&token, lines) in product.tokens.iter().zip(lines.chunks_exact_mut(chunks * CHUNK_LINES)) {
        for (chunk, lines) in lines.as_chunks_mut::<CHUNK_LINES>().0.iter_mut().enumerate() {
            prepare::<Q, L>(lanes, product, token, chunk, lines);
        }
    }
    let whole = product.weights[0].len() / Q::BYTES;
    let left = product.weights[0].len() - whole * Q::BYTES;
    let mut last = [[0; LARGEST]; ROWS];
    for row in (0..BLOCK).step_by(ROWS) {
        let mut starts = [std::ptr::null(); ROWS];
        for at in 0..ROWS {
            starts[at] = product.weights[row + at].as_ptr();
            // A row that ends within a chunk ends with zeros.
            last[at][..left].copy_from_slice(&product.weights[row + at][whole * Q::BYTES..]);
        }
        let stored = Stored { starts, whole, last: &last, chunks, row };
        match count {
            0 => {}
            1 => stored.meet::<Q, L, 1>(lanes, product, &lines),
            2 => stored.meet::<Q, L, 2>(lanes, product, &lines),
            _ => stored.meet::<Q, L, TOKENS>(lanes, product, &lines),
        }
    }
    product.workspace.give_back(lines);
}

/// Activations of a chunk as rows of weights meet them: of each pair of groups the bytes, their scales and where integers start; then what
/// meets the chunk's factors. Made once for all rows.
#[inline(always)]
fn prepare<Q: Along, L: Multiply>(
    lanes: L,
    product: &Product<'_>,
    token: u32,
    chunk: usize,
    into: &mut [Line; CHUNK_LINES],
) {
    let columns = (product.input.columns() - chunk * CHUNK).min(CHUNK);
    let start = product.input.column(token, chunk * CHUNK, GROUP).cast::<u8>();
    for pair in 0..columns.div_ceil(2 * GROUP) {
        // SAFETY: a row has two lines for each pair, its scale in front of its bytes; `Rows` and `Product` have checked the numbers of both.
        let (low, high, scale) = unsafe {
            let line = start.add(2 * pair * LINE_BYTES);
            let scale = [line.cast::<f32>().read(), line.add(LINE_BYTES).cast::<f32>().read()];
            (some(line, BYTES_AT), some(line, LINE_BYTES + BYTES_AT), scale)
        };
        let bytes = lanes.halves(low, high);
        lanes.store_line(bytes, &mut into[PAIR_LINES * pair]);
        lanes.store_line(lanes.eights(scale[0], scale[1]), &mut into[PAIR_LINES * pair + 1]);
        if L::DOTS && Q::SIGNED {
            let of_128 = lanes.words(lanes.dot_bytes(lanes.repeat(SIGN), bytes, lanes.splat(0.0)));
            lanes.store_line(lanes.of_words(of_128.map(u32::wrapping_neg)), &mut into[PAIR_LINES * pair + 2]);
        }
    }
    if Q::BESIDE == Beside::Nothing {
        return;
    }
    let mut words = [0.0f32; LANES];
    for group in 0..columns.div_ceil(GROUP) {
        // SAFETY: a row has a line for each group; as above.
        let line = unsafe { &*start.cast::<Line>().add(group) };
        if Q::BESIDE == Beside::Sums {
            words[LANES / 2 + group] = f32::from_bits(line.0[1]);
        } else {
            let scale = f32::from_bits(line.0[0]);
            words[2 * group] = line.0[3] as i32 as f32 * scale;
            words[2 * group + 1] = line.0[4] as i32 as f32 * scale;
        }
    }
    lanes.store_line(lanes.load(&words), &mut into[CHUNK_LINES - 1]);
}

/// Weight rows that are met side by side: two streams come faster from memory than one, and two sums wait for nobody.
struct Stored<'a> {
    starts: [*const u8; ROWS],
    /// Chunks that they have whole.
    whole: usize,
    /// What comes after them.
    last: &'a [[u8; LARGEST]; ROWS],
    chunks: usize,
    /// Which row of the block is the first.
    row: usize,
}

impl Stored<'_> {
    /// Their sums with `T` tokens, whose activations are `lines`.
    #[inline(always)]
    fn meet<Q: Along, L: Multiply, const T: usize>(&self, lanes: L, product: &mut Product<'_>, lines: &[Line]) {
        let columns = product.input.columns();
        let mut all = [[lanes.splat(0.0); ROWS]; T];
        for chunk in 0..self.chunks {
            let pairs = (columns - chunk * CHUNK).min(CHUNK).div_ceil(2 * GROUP);
            let mut inputs = [&[Line([0; LANES]); CHUNK_LINES]; T];
            for (t, input) in inputs.iter_mut().enumerate() {
                *input = lines[(t * self.chunks + chunk) * CHUNK_LINES..].first_chunk().expect("a chunk's lines");
            }
            for (row, &start) in self.starts.iter().enumerate() {
                let start = start.wrapping_add(chunk * Q::BYTES);
                let at = if chunk < self.whole { start } else { self.last[row].as_ptr() };
                // Rows follow each other: after the two come two more.
                for line in 0..Q::BYTES.div_ceil(LINE_BYTES) {
                    lanes.prefetch(start.wrapping_add(AHEAD_BYTES + line * LINE_BYTES));
                }
                let mut factors = [0.0; LANES];
                let mut made = lanes.splat(0.0);
                if Q::BESIDE != Beside::Nothing {
                    // SAFETY: a row has the bytes of a chunk at each of them.
                    made = unsafe { Q::factors(lanes, at) };
                    lanes.store(made, &mut factors);
                    for t in 0..T {
                        all[t][row] = lanes.mul_add(made, lanes.line(&inputs[t][CHUNK_LINES - 1]), all[t][row]);
                    }
                }
                for pair in 0..pairs {
                    // SAFETY: as above.
                    let weights = unsafe { Q::weights(lanes, at, pair) };
                    // SAFETY: as above.
                    let scales = unsafe { Q::scales(lanes, at, made, &factors, pair) };
                    for t in 0..T {
                        let bytes = lanes.line(&inputs[t][PAIR_LINES * pair]);
                        let products = if L::DOTS && Q::SIGNED {
                            let start = lanes.line(&inputs[t][PAIR_LINES * pair + 2]);
                            lanes.dot_bytes(lanes.xor(weights, lanes.repeat(SIGN)), bytes, start)
                        } else if Q::SIGNED {
                            lanes.dot_small(lanes.sizes(weights), lanes.with_signs(bytes, weights))
                        } else {
                            lanes.dot_small(weights, bytes)
                        };
                        let scaled = lanes.mul(lanes.convert(products), lanes.line(&inputs[t][PAIR_LINES * pair + 1]));
                        all[t][row] = lanes.mul_add(scaled, scales, all[t][row]);
                    }
                }
            }
        }
        for (t, all) in all.into_iter().enumerate() {
            for (row, sum) in all.into_iter().enumerate() {
                product.sums[t * BLOCK + self.row + row] = lanes.fold_sum(sum);
            }
        }
    }
}
