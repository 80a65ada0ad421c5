//! Products of quantised weights with bytes along the weight rows: 64 columns of one row at a time, integers first, then scales.
//!
//! For few tokens on sets whose instructions add products of bytes in pairs of sixteen bits. Nothing is packed, as [`super`] does for more: a row
//! is read where it lies, once for up to [`TOKENS`] rows of activations.

#![allow(unsafe_code)]

use super::blocks::{BYTES_AT, PAIRS};
use crate::simd::dtype::{Dtype, HEAD};
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::product::rows::{BLOCK, CHUNK, GROUP, Product};
use crate::simd::quantized::{SMALL_TWICE, power_of_two};
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

/// A byte with sign, plus 128.
const SIGN: u32 = 0x8080_8080;

/// Bytes of the largest chunk.
const LARGEST: usize = Q8_0::BYTES;

/// What a chunk adds beside its products: its factors times numbers of the activations, lane by lane.
#[derive(Clone, Copy, PartialEq)]
enum Beside {
    Nothing,
    /// In the upper eight lanes the sums of the activations of each group, times −1.
    Sums,
    /// Integers, the sums of the bytes of each group times −12.
    Twelves,
    /// Those of each half of a group, times −32.
    HalfSums,
}

/// What differs between quantised dtypes along a row. Every chunk has [`Along::BYTES`] bytes at `at`.
trait Along {
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

struct Q8_0;
struct Q4K;
struct Q5K;
struct Q6K;
struct Mxfp4;

/// `N` bytes from `from` on.
///
/// # Safety
/// There are so many, which live as long as `'a`.
#[inline(always)]
unsafe fn some<'a, const N: usize>(at: *const u8, from: usize) -> &'a [u8; N] {
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

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::simd::lanes::Lanes;
    use crate::simd::product::{Convert, Form, Rows, Workspace};
    use crate::simd::scalar::Scalar;
    use crate::simd::tests::naive;

    /// Plain Rust that does as sets do with products of bytes (`DOTS`) or with sums of neighbours (`FOLDS`), or with neither.
    #[derive(Clone, Copy)]
    struct As<const DOTS: bool, const FOLDS: bool>;

    impl<const DOTS: bool, const FOLDS: bool> Lanes for As<DOTS, FOLDS> {
        type Vector = [f32; LANES];

        fn splat(self, value: f32) -> Self::Vector {
            Scalar.splat(value)
        }

        fn load(self, from: &[f32; LANES]) -> Self::Vector {
            *from
        }

        fn store(self, vector: Self::Vector, into: &mut [f32; LANES]) {
            *into = vector;
        }

        fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
            Scalar.add(a, b)
        }

        fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
            Scalar.sub(a, b)
        }

        fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
            Scalar.mul(a, b)
        }

        fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
            Scalar.div(a, b)
        }

        fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
            Scalar.max(a, b)
        }

        fn ge(self, a: Self::Vector, b: Self::Vector) -> u16 {
            Scalar.ge(a, b)
        }

        fn blend(self, mask: u16, a: Self::Vector, b: Self::Vector) -> Self::Vector {
            Scalar.blend(mask, a, b)
        }

        fn power_of_two(self, shifted: Self::Vector) -> Self::Vector {
            Lanes::power_of_two(Scalar, shifted)
        }

        fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]) {
            Scalar.ranks(values, ranks);
        }
    }

    impl<const DOTS: bool, const FOLDS: bool> Multiply for As<DOTS, FOLDS> {
        const DOTS: bool = DOTS;
        const FOLDS: bool = FOLDS;

        fn call<K: Kernel>(self, kernel: K) -> K::Output {
            kernel.run(self)
        }
    }

    /// What sets do that this CPU does not have is held against the definition too.
    #[test]
    fn rows_meet_bytes_whatever_a_set_has() {
        let (mut rng, mut workspace) = (ChaCha8Rng::seed_from_u64(5), Workspace::default());
        for dtype in [Dtype::Q8_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K, Dtype::Mxfp4] {
            for columns in [1056, 512, 256, 96, 32].into_iter().filter(|columns| columns % dtype.block() == 0) {
                let stored = naive::drawn(&mut rng, dtype.name(), BLOCK * columns, 1.0);
                let weights = naive::decoded(dtype.name(), &stored);
                let size = dtype.row_bytes(columns).unwrap();
                let row = |at: usize| &stored[at * size..][..size];
                let input: Vec<f32> = (0..TOKENS * columns).map(|_| rng.random_range(-1.7f32..1.7)).collect();
                let stride = Form::Bytes.stride(columns);
                let mut lines = vec![Line([u32::MAX; LANES]); TOKENS * stride];
                for (values, lines) in input.chunks_exact(columns).zip(lines.chunks_exact_mut(stride)) {
                    Convert { form: Form::Bytes, values, row: lines }.run(Scalar);
                }
                for tokens in [&[1][..], &[2, 0], &[0, 1, 2]] {
                    for set in 0..3 {
                        let mut sums = vec![f32::NAN; tokens.len() * BLOCK];
                        let product = &mut Product {
                            dtype,
                            weights: std::array::from_fn(row),
                            ahead: [row(0), row(BLOCK / 2)],
                            input: Rows::whole(&lines, Form::Bytes, columns, TOKENS),
                            tokens,
                            sums: &mut sums,
                            workspace: &mut workspace,
                        };
                        match set {
                            0 => super::product(As::<true, false>, product),
                            1 => super::product(As::<false, true>, product),
                            _ => super::product(As::<false, false>, product),
                        }
                        for (at, sum) in sums.into_iter().enumerate() {
                            let row = &weights[at % BLOCK * columns..][..columns];
                            let input = &input[tokens[at / BLOCK] as usize * columns..];
                            let products = row.iter().zip(input).map(|(w, x)| w * f64::from(*x));
                            let norm = row.iter().map(|w| w * w).sum::<f64>().sqrt();
                            let off = (f64::from(sum) - products.sum::<f64>()).abs();
                            // Activations are rounded to one part in 254 of the largest of 32.
                            assert!(
                                off <= 0.02 * norm,
                                "{}, {columns} columns, set {set}: {off} of {norm}",
                                dtype.name()
                            );
                        }
                    }
                }
            }
        }
    }
}
