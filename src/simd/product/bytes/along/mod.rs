//! Products of quantised weights with bytes along the weight rows: 64 columns of one row at a time, integers first, then scales.
//!
//! For few tokens on sets whose instructions add products of bytes in pairs of sixteen bits. Nothing is packed, as [`super`] does for more: a row
//! is read where it lies, once for up to [`TOKENS`] rows of activations.

#![allow(unsafe_code)]

mod stored;
#[cfg(test)]
mod tests;

use self::stored::{Along, Beside, Mxfp4, Q4K, Q5K, Q6K, Q8_0, SIGN, some};
use super::blocks::{BYTES_AT, PAIRS};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::product::rows::{BLOCK, CHUNK, GROUP, Product};
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

/// Prepared activations of a chunk: the bytes of each pair of groups, where its integers start, then the scales of the groups as the chunk's
/// factors lie, then what meets those beside.
const STARTS: usize = PAIRS;
const SCALES: usize = 2 * PAIRS;
const BESIDE: usize = SCALES + 1;
const CHUNK_LINES: usize = BESIDE + 1;

/// Bytes of the largest chunk.
const LARGEST: usize = Q8_0::BYTES;

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
    let met = lines.as_chunks_mut::<CHUNK_LINES>().0;
    for (&token, met) in product.tokens.iter().zip(met.chunks_exact_mut(chunks)) {
        for (chunk, met) in met.iter_mut().enumerate() {
            prepare::<Q, L>(lanes, product, token, chunk, met);
        }
    }
    let met = &*met;
    let whole = product.weights[0].len() / Q::BYTES;
    let left = product.weights[0].len() - whole * Q::BYTES;
    let mut last = [[0; LARGEST]; ROWS];
    for row in (0..BLOCK).step_by(ROWS) {
        let mut starts = [std::ptr::null(); ROWS];
        for at in 0..ROWS {
            starts[at] = product.weights[row + at].as_ptr();
            // A row that ends within a chunk ends with zeros.
            if left > 0 {
                last[at][..left].copy_from_slice(&product.weights[row + at][whole * Q::BYTES..]);
            }
        }
        let stored = Stored { starts, whole, last: &last, chunks, row };
        match count {
            0 => {}
            1 => stored.meet::<Q, L, 1>(lanes, product, met),
            2 => stored.meet::<Q, L, 2>(lanes, product, met),
            _ => stored.meet::<Q, L, TOKENS>(lanes, product, met),
        }
    }
    product.workspace.give_back(lines);
}

/// Whether what has been added to weights is taken off where their integers start, and not once they are sums.
const fn has_starts<Q: Along, L: Multiply>() -> bool {
    Q::ADDED != 0 && if Q::SIGNED { L::DOTS } else { !L::FOLDS }
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
    if columns < CHUNK {
        // After the end of a row there are zeros.
        into.fill(Line::default());
    }
    for pair in 0..columns.div_ceil(2 * GROUP) {
        // SAFETY: a row has two lines for each pair; `Rows` and `Product` have checked the numbers of both.
        let (low, high) = unsafe {
            let line = start.add(2 * pair * LINE_BYTES);
            (some(line, BYTES_AT), some(line, LINE_BYTES + BYTES_AT))
        };
        let bytes = lanes.halves(low, high);
        lanes.store_line(bytes, &mut into[pair]);
        if has_starts::<Q, L>() {
            let added = lanes.words(lanes.dot_small(lanes.repeat(Q::ADDED), bytes));
            lanes.store_line(lanes.of_words(added.map(u32::wrapping_neg)), &mut into[STARTS + pair]);
        }
    }
    let (mut scales, mut beside) = ([0.0f32; LANES], [0.0f32; LANES]);
    for group in 0..columns.div_ceil(GROUP) {
        // SAFETY: a row has a line for each group; as above.
        let line = unsafe { &*start.cast::<Line>().add(group) };
        let scale = f32::from_bits(line.0[0]);
        match Q::BESIDE {
            Beside::HalfSums => {
                for half in 0..2 {
                    scales[2 * group + half] = scale;
                    beside[2 * group + half] = line.0[3 + half] as i32 as f32 * scale;
                }
            }
            Beside::Sums => (scales[group], beside[LANES / 2 + group]) = (scale, -f32::from_bits(line.0[1])),
            Beside::Twelves => {
                // Of the bytes' sum there are −128.
                let twelves = line.0[2] as i32 / 128 * 12;
                (scales[group], beside[group]) = (scale, f32::from_bits(twelves as u32));
            }
            Beside::Nothing => scales[group] = scale,
        }
    }
    lanes.store_line(lanes.load(&scales), &mut into[SCALES]);
    lanes.store_line(lanes.load(&beside), &mut into[BESIDE]);
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
    fn meet<Q: Along, L: Multiply, const T: usize>(
        &self,
        lanes: L,
        product: &mut Product<'_>,
        lines: &[[Line; CHUNK_LINES]],
    ) {
        let mut inputs = [lines; T];
        for (t, input) in inputs.iter_mut().enumerate() {
            *input = &lines[t * self.chunks..(t + 1) * self.chunks];
        }
        let mut all = [[lanes.splat(0.0); T]; ROWS];
        for chunk in 0..self.whole {
            let inputs = inputs.map(|lines| &lines[chunk]);
            let mut at = self.starts;
            for at in &mut at {
                *at = at.wrapping_add(chunk * Q::BYTES);
                // Rows follow each other: after the two come two more.
                for line in 0..Q::BYTES.div_ceil(LINE_BYTES) {
                    lanes.prefetch(at.wrapping_add(AHEAD_BYTES + line * LINE_BYTES));
                }
            }
            // SAFETY: a row has the bytes of a chunk at each whole one.
            unsafe { meet_chunks::<Q, L, T>(lanes, at, inputs, &mut all) };
        }
        if self.whole < self.chunks {
            let inputs = inputs.map(|lines| &lines[self.whole]);
            let mut at = self.starts;
            for (at, last) in at.iter_mut().zip(self.last) {
                *at = last.as_ptr();
            }
            // SAFETY: there is room for the largest chunk.
            unsafe { meet_chunks::<Q, L, T>(lanes, at, inputs, &mut all) };
        }
        for (row, all) in all.into_iter().enumerate() {
            for (t, sum) in all.into_iter().enumerate() {
                product.sums[t * BLOCK + self.row + row] = lanes.fold_sum(sum);
            }
        }
    }
}

/// A chunk of each row with `T` tokens, into sums: one token meets all rows before the next columns come, several meet one row after the
/// other, for which there are registers.
///
/// # Safety
/// There are the bytes of a chunk at each of them.
#[inline(always)]
unsafe fn meet_chunks<Q: Along, L: Multiply, const T: usize>(
    lanes: L,
    at: [*const u8; ROWS],
    inputs: [&[Line; CHUNK_LINES]; T],
    all: &mut [[L::Vector; T]; ROWS],
) {
    if T == 1 {
        // SAFETY: the caller has the bytes.
        return unsafe { meet_chunk::<Q, L, T, ROWS>(lanes, at, inputs, all) };
    }
    for (at, all) in at.into_iter().zip(all) {
        // SAFETY: as above.
        unsafe { meet_chunk::<Q, L, T, 1>(lanes, [at], inputs, std::array::from_mut(all)) };
    }
}

/// A chunk of `R` rows with `T` tokens, into sums.
///
/// # Safety
/// There are the bytes of a chunk at each of them.
#[inline(always)]
unsafe fn meet_chunk<Q: Along, L: Multiply, const T: usize, const R: usize>(
    lanes: L,
    at: [*const u8; R],
    inputs: [&[Line; CHUNK_LINES]; T],
    all: &mut [[L::Vector; T]; R],
) {
    let mut products = [[[lanes.splat(0.0); PAIRS]; T]; R];
    for pair in 0..PAIRS {
        for row in 0..R {
            // SAFETY: the caller has the bytes.
            let weights = unsafe { Q::weights(lanes, at[row], pair) };
            for t in 0..T {
                let bytes = lanes.line(&inputs[t][pair]);
                let start = match has_starts::<Q, L>() {
                    true => lanes.line(&inputs[t][STARTS + pair]),
                    false => lanes.splat(0.0),
                };
                products[row][t][pair] = match (L::DOTS, Q::SIGNED) {
                    (true, true) => lanes.dot_bytes(lanes.xor(weights, lanes.repeat(SIGN)), bytes, start),
                    (true, false) => lanes.dot_bytes(weights, bytes, start),
                    (false, true) => lanes.dot_small(lanes.sizes(weights), lanes.with_signs(bytes, weights)),
                    (false, false) => lanes.add_words(lanes.dot_small(weights, bytes), start),
                };
                // Folded as soon as there are two, which frees their registers.
                if L::FOLDS && pair % 2 == 1 {
                    let [a, b] = [products[row][t][pair - 1], products[row][t][pair]];
                    // Products of four fit sixteen bits where weights are below 64: 63 · 127 · 4.
                    products[row][t][pair / 2] = if Q::SIGNED { lanes.fours(a, b) } else { lanes.small_fours(a, b) };
                }
            }
        }
    }
    for row in 0..R {
        // SAFETY: as above.
        let made = unsafe { Q::factors(lanes, at[row]) };
        for t in 0..T {
            let sum = &mut all[row][t];
            if matches!(Q::BESIDE, Beside::Sums | Beside::HalfSums) {
                *sum = lanes.mul_add(made, lanes.line(&inputs[t][BESIDE]), *sum);
            }
            *sum = scaled::<Q, L>(lanes, products[row][t], made, inputs[t], *sum);
        }
    }
}

/// Integers of a chunk, products of four columns each or what became of them, times the factors of groups, or of halves of groups, into sums.
#[inline(always)]
fn scaled<Q: Along, L: Multiply>(
    lanes: L,
    products: [L::Vector; PAIRS],
    made: L::Vector,
    input: &[Line; CHUNK_LINES],
    sums: L::Vector,
) -> L::Vector {
    let factors = lanes.mul(made, lanes.line(&input[SCALES]));
    let by_halves = Q::BESIDE == Beside::HalfSums;
    if L::FOLDS {
        let [a, b, ..] = products;
        let folded = match Q::BESIDE {
            Beside::HalfSums => lanes.in_order(a, b),
            Beside::Twelves => lanes.add_words(lanes.eights_of_fours(a, b), lanes.line(&input[BESIDE])),
            _ => lanes.eights_of_fours(a, b),
        };
        return lanes.mul_add(lanes.convert(folded), factors, sums);
    }
    let (mut sums, mut stored) = (sums, [0.0; LANES]);
    lanes.store(factors, &mut stored);
    for (pair, products) in products.into_iter().enumerate() {
        let factors = match by_halves {
            true => lanes.quads_of(factors, &stored, pair),
            false => lanes.eights_of(factors, &stored, pair),
        };
        sums = lanes.mul_add(lanes.convert(products), factors, sums);
    }
    sums
}
