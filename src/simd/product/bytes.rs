//! Products of quantised weights with activations of bytes: integers first, scales once for 32 columns.
//!
//! Sixteen weight rows are turned, 256 of their columns at a time, so that a lane is a row: a vector holds four columns of
//! each, an instruction multiplies them with a word of activations, and the scales of sixteen rows are a vector too. What
//! is turned stays in the first cache while all tokens meet it.
//!
//! Layouts of weights are ggml's (`dequantize_row_q8_0`, `_q4_K`, `_q6_K`, `_mxfp4` in ggml-quants.c). Activations are rounded to bytes with one
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

use super::{BLOCK, CHUNK, Product, Rows};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::quantized::{TWICE, power_of_two};
use crate::simd::{Kernel, LANES};

/// Activations of a line.
pub(super) const GROUP: usize = 32;

/// Where the bytes of a line begin.
const BYTES_AT: usize = 28;

/// Tokens that meet turned weights at a time: as many sums, and nine vectors of weights, fit the registers.
const TOKENS: usize = 8;

/// How many chunks of weights are read ahead.
const AHEAD_CHUNKS: usize = 2;

/// Lines of a chunk of a row of any dtype.
const PADDED: usize = Q8_0::BYTES.div_ceil(LINE_BYTES);

/// Turned weights of [`CHUNK`] columns: four pairs of groups, each 64 columns of sixteen rows.
const PAIRS: usize = CHUNK / (2 * GROUP);
/// Lines of a pair's weights; with those of `q8_0` the scales lie between them.
const PAIR: usize = 17;
/// Where the scales of groups, or of their halves, begin.
const SCALES: usize = PAIR * PAIRS;
/// Where the offsets of groups begin.
const OFFSETS: usize = SCALES + 4 * PAIRS;
/// Lines of all.
pub(super) const TURNED: usize = OFFSETS + 2 * PAIRS;

/// Adding it to a small number rounds it to a whole one that then stands in the lowest bits.
const SHIFT: f32 = 12_582_912.0;
/// A byte with sign, plus 128: without one, as the products want it.
const SIGN: u32 = 0x8080_8080;

/// Values as bytes, zeros after their end.
#[inline(always)]
pub(super) fn fill<L: Multiply>(lanes: L, values: &[f32], lines: &mut [Line]) {
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
    match product.dtype {
        Dtype::Q4K => lanes.call(Meet(product, Q4K)),
        Dtype::Q6K => lanes.call(Meet(product, Q6K)),
        Dtype::Mxfp4 => lanes.call(Meet(product, Mxfp4)),
        _ => lanes.call(Meet(product, Q8_0)),
    }
}

/// The same of one type of blocks.
struct Meet<'p, 'a, Q>(&'p mut Product<'a>, Q);

impl<Q: Blocks> Kernel for Meet<'_, '_, Q> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        run::<Q, L>(lanes, self.0);
    }
}

#[inline(always)]
fn run<Q: Blocks, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let columns = product.input.columns();
    let mut lines = product.workspace.take(2 * TURNED + LANES * PADDED);
    let (turned, copies) = lines.split_at_mut(2 * TURNED);
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
            unsafe { Q::turn(lanes, &stored, &mut turned.as_chunks_mut::<TURNED>().0[half]) };
        }
        let part = Part { turned, chunk, pairs, input: product.input };
        let (mut tokens, mut sums) = (product.tokens, &mut *product.sums);
        while !tokens.is_empty() {
            let most = if L::WIDE { TOKENS } else { 1 };
            let count = tokens.len().div_ceil(tokens.len().div_ceil(most));
            let (now, rest) = tokens.split_at(count);
            let (into, behind) = std::mem::take(&mut sums).split_at_mut(count * BLOCK);
            (tokens, sums) = (rest, behind);
            match count {
                1 => part.run::<Q, L, 1>(lanes, now, into),
                // The others are not compiled.
                _ if !L::WIDE => unreachable!("{count} tokens"),
                2 => part.run::<Q, L, 2>(lanes, now, into),
                3 => part.run::<Q, L, 3>(lanes, now, into),
                4 => part.run::<Q, L, 4>(lanes, now, into),
                5 => part.run::<Q, L, 5>(lanes, now, into),
                6 => part.run::<Q, L, 6>(lanes, now, into),
                7 => part.run::<Q, L, 7>(lanes, now, into),
                _ => part.run::<Q, L, TOKENS>(lanes, now, into),
            }
        }
    }
    product.workspace.give_back(lines);
}

/// A chunk of sixteen rows as stored.
struct Chunk<'a> {
    rows: &'a [*const u8; LANES],
    /// Where it begins in each of them, and how many pairs of groups it has.
    at: usize,
    pairs: usize,
    /// Whose lines are read ahead, and from where on.
    ahead: &'a [*const u8; LANES],
    ahead_at: usize,
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

/// A chunk of weights, turned, and the activations for it.
struct Part<'a> {
    turned: &'a [Line],
    chunk: usize,
    pairs: usize,
    input: Rows<'a>,
}

impl Part<'_> {
    #[inline(always)]
    fn run<Q: Blocks, L: Multiply, const T: usize>(&self, lanes: L, tokens: &[u32], sums: &mut [f32]) {
        let tokens: &[u32; T] = tokens.try_into().expect("as many tokens");
        let column = self.chunk * CHUNK;
        let mut starts = [std::ptr::null(); T];
        for (start, &token) in starts.iter_mut().zip(tokens) {
            *start = self.input.column(token, column, GROUP);
        }
        for (half, turned) in self.turned.as_chunks::<TURNED>().0.iter().enumerate() {
            let mut all = [lanes.splat(0.0); T];
            if self.chunk > 0 {
                for (all, sums) in all.iter_mut().zip(sums.as_chunks::<BLOCK>().0) {
                    *all = lanes.load(&sums.as_chunks::<LANES>().0[half]);
                }
            }
            let mut starts = starts;
            for pair in 0..self.pairs {
                // SAFETY: a row has two lines for each pair; `Rows` and `Product` have checked the numbers of both.
                unsafe { Q::pair(lanes, turned, pair, &starts, &mut all) };
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

/// What differs between quantised dtypes.
trait Blocks {
    /// Bytes of a row in a chunk.
    const BYTES: usize;

    /// Turns a chunk of sixteen rows.
    ///
    /// # Safety
    /// There are [`Blocks::BYTES`] bytes at each.
    unsafe fn turn<L: Multiply>(lanes: L, chunk: &Chunk<'_>, turned: &mut [Line; TURNED]);

    /// Adds the products of 64 columns of sixteen rows.
    ///
    /// # Safety
    /// There are two lines at each input.
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        turned: &[Line; TURNED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    );
}

struct Q8_0;
struct Q4K;
struct Q6K;
struct Mxfp4;

/// Sixteen words from each row.
///
/// # Safety
/// There are as many bytes at `at` of each row.
#[inline(always)]
unsafe fn sixteen<L: Multiply>(lanes: L, chunk: &Chunk<'_>, at: usize) -> [L::Vector; LANES] {
    // No closures here: they would be compiled without the instruction set.
    let mut words = [lanes.splat(0.0); LANES];
    for (words, row) in words.iter_mut().zip(chunk.rows) {
        // SAFETY: the caller has them.
        *words = lanes.bytes(unsafe { &*row.add(chunk.at + at).cast() });
    }
    for ahead in chunk.ahead {
        lanes.prefetch(ahead.wrapping_add(chunk.ahead_at + at));
    }
    lanes.transpose(words)
}

/// Four words from each row.
///
/// # Safety
/// There are as many bytes at `at` of each row.
#[inline(always)]
unsafe fn four<L: Multiply>(lanes: L, chunk: &Chunk<'_>, at: usize) -> [L::Vector; 4] {
    let mut words = [&[0; 16]; LANES];
    for (words, row) in words.iter_mut().zip(chunk.rows) {
        // SAFETY: the caller has them.
        *words = unsafe { &*row.add(chunk.at + at).cast() };
    }
    for ahead in chunk.ahead {
        lanes.prefetch(ahead.wrapping_add(chunk.ahead_at + at));
    }
    lanes.transpose_4(words)
}

/// A word of a line of activations, the same in every lane.
///
/// # Safety
/// There is a line, and a word at that byte of it.
#[inline(always)]
unsafe fn word<L: Multiply>(lanes: L, line: *const Line, byte: usize) -> L::Vector {
    // SAFETY: the caller has it.
    lanes.repeat(unsafe { line.cast::<u8>().add(byte).cast::<u32>().read_unaligned() })
}

/// `Σ weights · bytes + start` of `N` words from byte `at` of a line on.
///
/// # Safety
/// There is a line, and so many words.
#[inline(always)]
unsafe fn dots<L: Multiply, const N: usize>(
    lanes: L,
    weights: &[L::Vector; N],
    line: *const Line,
    at: usize,
    start: L::Vector,
) -> L::Vector {
    let mut sum = start;
    for (n, &weights) in weights.iter().enumerate() {
        // SAFETY: the caller has them.
        sum = lanes.dot_bytes(weights, unsafe { word(lanes, line, at + 4 * n) }, sum);
    }
    sum
}

impl Blocks for Q8_0 {
    const BYTES: usize = 8 * Dtype::Q8_0.block_bytes();

    /// Two blocks are seventeen words: a scale and two weights, seven words of weights, two weights and a scale, eight words of weights.
    /// Scales that stand among weights meet zeros.
    #[inline(always)]
    unsafe fn turn<L: Multiply>(lanes: L, chunk: &Chunk<'_>, turned: &mut [Line; TURNED]) {
        let sign = lanes.repeat(SIGN);
        for part in 0..(PAIR * chunk.pairs).div_ceil(LANES).min(4) {
            // SAFETY: they lie within eight blocks.
            let words = unsafe { sixteen(lanes, chunk, part * LINE_BYTES) };
            for (word, line) in words.into_iter().zip(&mut turned[part * LANES..]) {
                lanes.store_line(lanes.xor(word, sign), line);
            }
        }
        if chunk.pairs == PAIRS {
            // SAFETY: these are the last.
            let words = unsafe { four(lanes, chunk, 4 * LINE_BYTES) };
            for (word, line) in words.into_iter().zip(&mut turned[4 * LANES..]) {
                lanes.store_line(lanes.xor(word, sign), line);
            }
        }
        for pair in 0..chunk.pairs {
            let first = lanes.xor(lanes.line(&turned[PAIR * pair]), sign);
            let second = lanes.xor(lanes.line(&turned[PAIR * pair + 8]), sign);
            lanes.store_line(lanes.low_halves(first), &mut turned[SCALES + 2 * pair]);
            lanes.store_line(lanes.low_halves(lanes.shift_words(second, 16)), &mut turned[SCALES + 2 * pair + 1]);
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        turned: &[Line; TURNED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        let weights: [L::Vector; 9] = lines(lanes, turned, PAIR * pair);
        let scales = lanes.line(&turned[SCALES + 2 * pair]);
        for (sum, &line) in all.iter_mut().zip(inputs) {
            // SAFETY: the caller has the line; two bytes before its bytes and two after them are zeros.
            unsafe {
                let products = dots(lanes, &weights, line, BYTES_AT - 2, word(lanes, line, 8));
                *sum = scaled(lanes, products, word(lanes, line, 0), scales, *sum);
            }
        }
        let weights: [L::Vector; 8] = lines(lanes, turned, PAIR * pair + 9);
        let scales = lanes.line(&turned[SCALES + 2 * pair + 1]);
        for (sum, line) in all.iter_mut().zip(inputs) {
            let line = line.wrapping_add(1);
            // SAFETY: the caller has the line.
            unsafe {
                let products = dots(lanes, &weights, line, BYTES_AT, word(lanes, line, 8));
                *sum = scaled(lanes, products, word(lanes, line, 0), scales, *sum);
            }
        }
    }
}

/// `N` lines from `at` on.
#[inline(always)]
fn lines<L: Multiply, const N: usize>(lanes: L, turned: &[Line; TURNED], at: usize) -> [L::Vector; N] {
    let mut vectors = [lanes.splat(0.0); N];
    let lines: &[Line; N] = turned[at..].first_chunk().expect("lines of a pair");
    for n in 0..N {
        vectors[n] = lanes.line(&lines[n]);
    }
    vectors
}

/// `sum + integers · scale · scales`.
#[inline(always)]
fn scaled<L: Multiply>(
    lanes: L,
    integers: L::Vector,
    scale: L::Vector,
    scales: L::Vector,
    sum: L::Vector,
) -> L::Vector {
    lanes.mul_add(lanes.mul(lanes.floats(integers), scale), scales, sum)
}

/// The upper two bits of every byte, where bits 4 and 5 are.
#[inline(always)]
fn upper<L: Multiply>(lanes: L, word: L::Vector) -> L::Vector {
    lanes.shift_left_4(lanes.and(lanes.shift_right(word, lanes.repeat(0x0006_0006)), lanes.repeat(0x0303_0303)))
}

impl Blocks for Q4K {
    const BYTES: usize = Dtype::Q4K.block_bytes();

    #[inline(always)]
    unsafe fn turn<L: Multiply>(lanes: L, chunk: &Chunk<'_>, turned: &mut [Line; TURNED]) {
        let low = lanes.repeat(0x0f0f_0f0f);
        // SAFETY: a block begins with sixteen bytes of scales.
        let [factors, first, second, both] = unsafe { four(lanes, chunk, 0) };
        let (scale, least) = (lanes.low_halves(factors), lanes.low_halves(lanes.shift_words(factors, 16)));
        let least = lanes.sub(lanes.splat(0.0), least);
        // Four six-bit numbers in a word; of the last four the upper two bits stand above those of the first.
        let six = lanes.repeat(0x3f3f_3f3f);
        let nibbles = [lanes.and(both, low), lanes.and(lanes.shift_right(both, lanes.repeat(0x0004_0004)), low)];
        let scales = [lanes.and(first, six), lanes.xor(nibbles[0], upper(lanes, first))];
        let offsets = [lanes.and(second, six), lanes.xor(nibbles[1], upper(lanes, second))];
        for group in 0..2 * PAIRS {
            let factor = lanes.mul(lanes.byte_floats(scales[group / 4], group % 4), scale);
            lanes.store_line(factor, &mut turned[SCALES + group]);
            let offset = lanes.mul(lanes.byte_floats(offsets[group / 4], group % 4), least);
            lanes.store_line(offset, &mut turned[OFFSETS + group]);
        }
        let by = lanes.repeat(0x0004_0004);
        for part in 0..2 {
            // SAFETY: then come 128 bytes of weights.
            let words = unsafe { sixteen(lanes, chunk, 16 + part * LINE_BYTES) };
            for (at, word) in words.into_iter().enumerate() {
                let line = PAIR * (2 * part + at / 8) + at % 8;
                lanes.store_line(lanes.and(word, low), &mut turned[line]);
                lanes.store_line(lanes.and(lanes.shift_right(word, by), low), &mut turned[line + 8]);
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        turned: &[Line; TURNED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        for half in 0..2 {
            let weights: [L::Vector; 8] = lines(lanes, turned, PAIR * pair + 8 * half);
            let scales = lanes.line(&turned[SCALES + 2 * pair + half]);
            let offsets = lanes.line(&turned[OFFSETS + 2 * pair + half]);
            for (sum, line) in all.iter_mut().zip(inputs) {
                let line = line.wrapping_add(half);
                // SAFETY: the caller has the line.
                unsafe {
                    let products = dots(lanes, &weights, line, BYTES_AT, lanes.splat(0.0));
                    *sum = lanes.mul_add(offsets, word(lanes, line, 4), *sum);
                    *sum = scaled(lanes, products, word(lanes, line, 0), scales, *sum);
                }
            }
        }
    }
}

impl Blocks for Q6K {
    const BYTES: usize = Dtype::Q6K.block_bytes();

    #[inline(always)]
    unsafe fn turn<L: Multiply>(lanes: L, chunk: &Chunk<'_>, turned: &mut [Line; TURNED]) {
        let (sign, low, pair) = (lanes.repeat(SIGN), lanes.repeat(0x0f0f_0f0f), lanes.repeat(0x0303_0303));
        // SAFETY: sixteen bytes of scales, and their factor in the last two.
        let (scales, last) = unsafe { (four(lanes, chunk, 192), four(lanes, chunk, 194)) };
        let factor = lanes.low_halves(lanes.shift_words(last[3], 16));
        for at in 0..4 * PAIRS {
            let scale = lanes.byte_floats(lanes.xor(scales[at / 4], sign), at % 4);
            let scale = lanes.mul(lanes.sub(scale, lanes.splat(128.0)), factor);
            lanes.store_line(scale, &mut turned[SCALES + at]);
        }
        // SAFETY: 128 bytes of the lower four bits, then 64 of the upper two.
        let upper = unsafe { sixteen(lanes, chunk, 128) };
        for half in 0..2 {
            // SAFETY: as above.
            let lower = unsafe { sixteen(lanes, chunk, half * LINE_BYTES) };
            for (at, lower) in lower.into_iter().enumerate() {
                for odd in 0..2 {
                    let by = [4 * odd, 4 * odd + 2 * (at / 8)];
                    let nibbles = lanes.and(lanes.shift_right(lower, lanes.repeat(by[0] as u32 * 0x0001_0001)), low);
                    let pairs = lanes.shift_right(upper[8 * half + at % 8], lanes.repeat(by[1] as u32 * 0x0001_0001));
                    // The two have no bit in common.
                    let weights = lanes.xor(nibbles, lanes.shift_left_4(lanes.and(pairs, pair)));
                    lanes.store_line(weights, &mut turned[PAIR * (2 * half + odd) + at]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        turned: &[Line; TURNED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        for quarter in 0..4 {
            let weights: [L::Vector; 4] = lines(lanes, turned, PAIR * pair + 4 * quarter);
            let scales = lanes.line(&turned[SCALES + 4 * pair + quarter]);
            for (sum, line) in all.iter_mut().zip(inputs) {
                let (line, half) = (line.wrapping_add(quarter / 2), quarter % 2);
                // SAFETY: the caller has the line.
                unsafe {
                    let start = word(lanes, line, 12 + 4 * half);
                    let products = dots(lanes, &weights, line, BYTES_AT + 16 * half, start);
                    *sum = scaled(lanes, products, word(lanes, line, 0), scales, *sum);
                }
            }
        }
    }
}

impl Blocks for Mxfp4 {
    const BYTES: usize = 8 * Dtype::Mxfp4.block_bytes();

    /// Eight blocks are 34 words, in which scales and weights begin at any byte: two words are joined into one of weights.
    #[inline(always)]
    unsafe fn turn<L: Multiply>(lanes: L, chunk: &Chunk<'_>, turned: &mut [Line; TURNED]) {
        let mut words = [lanes.splat(0.0); 35];
        // SAFETY: they lie within eight blocks.
        let (first, second, last) =
            unsafe { (sixteen(lanes, chunk, 0), sixteen(lanes, chunk, LINE_BYTES), four(lanes, chunk, 120)) };
        words[..LANES].copy_from_slice(&first);
        words[LANES..2 * LANES].copy_from_slice(&second);
        words[32..34].copy_from_slice(&last[2..]);
        let (low, by) = (lanes.repeat(0x0f0f_0f0f), lanes.repeat(0x0004_0004));
        for group in 0..2 * PAIRS {
            let at = Dtype::Mxfp4.block_bytes() * group;
            let scale = lanes.and(lanes.shift_words(words[at / 4], 8 * (at % 4) as u32), lanes.repeat(0xff));
            lanes.store_line(power_of_two(lanes, scale), &mut turned[SCALES + group]);
            let (at, line) = (at + 1, PAIR * (group / 2) + 8 * (group % 2));
            for word in 0..4 {
                let (word_at, shift) = (at / 4 + word, 8 * (at % 4) as u32);
                // The two have no bit in common.
                let nibbles = lanes.xor(
                    lanes.shift_words(words[word_at], shift),
                    lanes.shift_words_left(words[word_at + 1], 32 - shift),
                );
                let upper = lanes.and(lanes.shift_right(nibbles, by), low);
                lanes.store_line(lanes.lookup(&TWICE, lanes.and(nibbles, low)), &mut turned[line + word]);
                lanes.store_line(lanes.lookup(&TWICE, upper), &mut turned[line + 4 + word]);
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        turned: &[Line; TURNED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        for half in 0..2 {
            let weights: [L::Vector; 8] = lines(lanes, turned, PAIR * pair + 8 * half);
            let scales = lanes.line(&turned[SCALES + 2 * pair + half]);
            for (sum, line) in all.iter_mut().zip(inputs) {
                let line = line.wrapping_add(half);
                // SAFETY: the caller has the line.
                unsafe {
                    let products = dots(lanes, &weights, line, BYTES_AT, word(lanes, line, 8));
                    *sum = scaled(lanes, products, word(lanes, line, 0), scales, *sum);
                }
            }
        }
    }
}
