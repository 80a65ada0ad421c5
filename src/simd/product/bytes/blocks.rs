//! What differs between quantised dtypes: how a chunk of sixteen rows is packed, and how 64 columns of it meet activations.

#![allow(unsafe_code)]

use crate::simd::LANES;
use crate::simd::dtype::{Dtype, HEAD};
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::product::rows::{CHUNK, GROUP};
use crate::simd::quantized::{SMALL_TWICE, TWICE, power_of_two};

/// Where the bytes of a line begin.
pub(super) const BYTES_AT: usize = 28;

/// Packed weights of [`CHUNK`] columns: four pairs of groups, each 64 columns of sixteen rows.
pub(super) const PAIRS: usize = CHUNK / (2 * GROUP);
/// Lines of a pair's weights; with those of `q8_0` the scales lie between them.
pub(super) const PAIR: usize = 17;
/// Where the scales of groups, or of their halves, begin.
pub(super) const SCALES: usize = PAIR * PAIRS;
/// Where the offsets of groups begin.
pub(super) const OFFSETS: usize = SCALES + 4 * PAIRS;
/// Lines of all.
pub(super) const PACKED: usize = OFFSETS + 2 * PAIRS;

/// A byte with sign, plus 128: without one, as the products want it.
const SIGN: u32 = 0x8080_8080;

/// A chunk of sixteen rows as stored.
pub(super) struct Chunk<'a> {
    pub(super) rows: &'a [*const u8; LANES],
    /// Where it begins in each of them, and how many pairs of groups it has.
    pub(super) at: usize,
    pub(super) pairs: usize,
    /// Whose lines are read ahead, and from where on.
    pub(super) ahead: &'a [*const u8; LANES],
    pub(super) ahead_at: usize,
}

/// What is added to products, where [`Blocks::FIT`] is not 0.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Start {
    /// The offsets of groups times the sums of their activations.
    Offsets,
    /// −32 times the sums of the bytes of each half of a group.
    HalfSums,
}

/// What differs between quantised dtypes.
pub(super) trait Blocks {
    /// Bytes of a row in a chunk.
    const BYTES: usize;
    /// Words of four columns that share a scale.
    const SCALED: usize = 8;
    /// How many words' products with bytes can be added in sixteen bits; 0 for those with sign.
    const FIT: usize = 0;
    /// What the sums of products begin with.
    const START: Start = Start::Offsets;

    /// Packs a chunk of sixteen rows.
    ///
    /// # Safety
    /// There are [`Blocks::BYTES`] bytes at each.
    unsafe fn pack<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]);

    /// Adds the products of 64 columns of sixteen rows.
    ///
    /// # Safety
    /// There are two lines at each input.
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        packed: &[Line; PACKED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    );
}

pub(super) struct Q8_0;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Mxfp4;

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
pub(super) unsafe fn word<L: Multiply>(lanes: L, line: *const Line, byte: usize) -> L::Vector {
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
    unsafe fn pack<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]) {
        // Along a word bytes keep their signs.
        let sign = lanes.repeat(if L::ALONG { 0 } else { SIGN });
        for part in 0..(PAIR * chunk.pairs).div_ceil(LANES).min(4) {
            // SAFETY: they lie within eight blocks.
            let words = unsafe { sixteen(lanes, chunk, part * LINE_BYTES) };
            for (word, line) in words.into_iter().zip(&mut packed[part * LANES..]) {
                lanes.store_line(lanes.xor(word, sign), line);
            }
        }
        if chunk.pairs == PAIRS {
            // SAFETY: these are the last.
            let words = unsafe { four(lanes, chunk, 4 * LINE_BYTES) };
            for (word, line) in words.into_iter().zip(&mut packed[4 * LANES..]) {
                lanes.store_line(lanes.xor(word, sign), line);
            }
        }
        for pair in 0..chunk.pairs {
            let first = lanes.xor(lanes.line(&packed[PAIR * pair]), sign);
            let second = lanes.xor(lanes.line(&packed[PAIR * pair + 8]), sign);
            lanes.store_line(lanes.low_halves(first), &mut packed[SCALES + 2 * pair]);
            lanes.store_line(lanes.low_halves(lanes.shift_words(second, 16)), &mut packed[SCALES + 2 * pair + 1]);
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        packed: &[Line; PACKED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        let weights: [L::Vector; 9] = lines(lanes, packed, PAIR * pair);
        let scales = lanes.line(&packed[SCALES + 2 * pair]);
        for (sum, &line) in all.iter_mut().zip(inputs) {
            // SAFETY: the caller has the line; two bytes before its bytes and two after them are zeros.
            unsafe {
                let products = dots(lanes, &weights, line, BYTES_AT - 2, word(lanes, line, 8));
                *sum = scaled(lanes, products, word(lanes, line, 0), scales, *sum);
            }
        }
        let weights: [L::Vector; 8] = lines(lanes, packed, PAIR * pair + 9);
        let scales = lanes.line(&packed[SCALES + 2 * pair + 1]);
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
fn lines<L: Multiply, const N: usize>(lanes: L, packed: &[Line; PACKED], at: usize) -> [L::Vector; N] {
    let mut vectors = [lanes.splat(0.0); N];
    let lines: &[Line; N] = packed[at..].first_chunk().expect("lines of a pair");
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
    lanes.mul_add(lanes.mul(lanes.convert(integers), scale), scales, sum)
}

/// The upper two bits of every byte, where bits 4 and 5 are.
#[inline(always)]
fn upper<L: Multiply>(lanes: L, word: L::Vector) -> L::Vector {
    lanes.shift_words_left(lanes.and(lanes.shift_words(word, 6), lanes.repeat(0x0303_0303)), 4)
}

impl Blocks for Q4K {
    const BYTES: usize = Dtype::Q4K.block_bytes();
    const FIT: usize = 8;

    #[inline(always)]
    unsafe fn pack<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]) {
        // SAFETY: a block begins with its scales.
        unsafe { pack_scales(lanes, chunk, packed) };
        let low = lanes.repeat(0x0f0f_0f0f);
        for part in 0..2 {
            // SAFETY: then come 128 bytes of weights.
            let words = unsafe { sixteen(lanes, chunk, HEAD + part * LINE_BYTES) };
            for (at, word) in words.into_iter().enumerate() {
                let line = PAIR * (2 * part + at / 8) + at % 8;
                lanes.store_line(lanes.and(word, low), &mut packed[line]);
                lanes.store_line(lanes.and(lanes.shift_words(word, 4), low), &mut packed[line + 8]);
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        packed: &[Line; PACKED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        for half in 0..2 {
            let weights: [L::Vector; 8] = lines(lanes, packed, PAIR * pair + 8 * half);
            let scales = lanes.line(&packed[SCALES + 2 * pair + half]);
            let offsets = lanes.line(&packed[OFFSETS + 2 * pair + half]);
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

/// Packs the scales and the offsets of sixteen rows of blocks that begin as `q4_K` and `q5_K` do.
///
/// # Safety
/// There are [`HEAD`] bytes at each.
#[inline(always)]
unsafe fn pack_scales<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]) {
    let low = lanes.repeat(0x0f0f_0f0f);
    // SAFETY: the caller has them.
    let [factors, first, second, both] = unsafe { four(lanes, chunk, 0) };
    let (scale, least) = (lanes.low_halves(factors), lanes.low_halves(lanes.shift_words(factors, 16)));
    let least = lanes.sub(lanes.splat(0.0), least);
    // Four six-bit numbers in a word; of the last four the upper two bits stand above those of the first.
    let six = lanes.repeat(0x3f3f_3f3f);
    let nibbles = [lanes.and(both, low), lanes.and(lanes.shift_words(both, 4), low)];
    let scales = [lanes.and(first, six), lanes.xor(nibbles[0], upper(lanes, first))];
    let offsets = [lanes.and(second, six), lanes.xor(nibbles[1], upper(lanes, second))];
    for group in 0..2 * PAIRS {
        let factor = lanes.mul(lanes.byte_floats(scales[group / 4], group % 4), scale);
        lanes.store_line(factor, &mut packed[SCALES + group]);
        let offset = lanes.mul(lanes.byte_floats(offsets[group / 4], group % 4), least);
        lanes.store_line(offset, &mut packed[OFFSETS + group]);
    }
}

impl Blocks for Q5K {
    const BYTES: usize = Dtype::Q5K.block_bytes();
    const FIT: usize = 4;

    #[inline(always)]
    unsafe fn pack<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]) {
        // SAFETY: a block begins with its scales.
        unsafe { pack_scales(lanes, chunk, packed) };
        let (low, one) = (lanes.repeat(0x0f0f_0f0f), lanes.repeat(0x0101_0101));
        // SAFETY: then come 32 bytes of fifth bits.
        let fifths = unsafe { [four(lanes, chunk, HEAD), four(lanes, chunk, HEAD + 16)] };
        for part in 0..2 {
            // SAFETY: then 128 bytes of the lower four bits.
            let words = unsafe { sixteen(lanes, chunk, HEAD + 32 + part * LINE_BYTES) };
            for (at, word) in words.into_iter().enumerate() {
                let (pair, at) = (2 * part + at / 8, at % 8);
                for half in 0..2 {
                    let nibbles = lanes.and(lanes.shift_words(word, 4 * half as u32), low);
                    let fifth = lanes.shift_words(fifths[at / 4][at % 4], (2 * pair + half) as u32);
                    // The two have no bit in common.
                    let weights = lanes.xor(nibbles, lanes.shift_words_left(lanes.and(fifth, one), 4));
                    lanes.store_line(weights, &mut packed[PAIR * pair + 8 * half + at]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        packed: &[Line; PACKED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        // SAFETY: as for the caller; the bytes are fewer than 128 there too.
        unsafe { Q4K::pair(lanes, packed, pair, inputs, all) }
    }
}

impl Blocks for Q6K {
    const BYTES: usize = Dtype::Q6K.block_bytes();
    const SCALED: usize = 4;
    const FIT: usize = 2;
    const START: Start = Start::HalfSums;

    #[inline(always)]
    unsafe fn pack<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]) {
        let (sign, low, pair) = (lanes.repeat(SIGN), lanes.repeat(0x0f0f_0f0f), lanes.repeat(0x0303_0303));
        // SAFETY: sixteen bytes of scales, and their factor in the last two.
        let (scales, last) = unsafe { (four(lanes, chunk, 192), four(lanes, chunk, 194)) };
        let factor = lanes.low_halves(lanes.shift_words(last[3], 16));
        for at in 0..4 * PAIRS {
            let scale = lanes.byte_floats(lanes.xor(scales[at / 4], sign), at % 4);
            let scale = lanes.mul(lanes.sub(scale, lanes.splat(128.0)), factor);
            lanes.store_line(scale, &mut packed[SCALES + at]);
        }
        // SAFETY: 128 bytes of the lower four bits, then 64 of the upper two.
        let upper = unsafe { sixteen(lanes, chunk, 128) };
        for half in 0..2 {
            // SAFETY: as above.
            let lower = unsafe { sixteen(lanes, chunk, half * LINE_BYTES) };
            for (at, lower) in lower.into_iter().enumerate() {
                for odd in 0..2 {
                    let by = [4 * odd, 4 * odd + 2 * (at / 8)];
                    let nibbles = lanes.and(lanes.shift_words(lower, by[0] as u32), low);
                    let pairs = lanes.shift_words(upper[8 * half + at % 8], by[1] as u32);
                    // The two have no bit in common.
                    let weights = lanes.xor(nibbles, lanes.shift_words_left(lanes.and(pairs, pair), 4));
                    lanes.store_line(weights, &mut packed[PAIR * (2 * half + odd) + at]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        packed: &[Line; PACKED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        for quarter in 0..4 {
            let weights: [L::Vector; 4] = lines(lanes, packed, PAIR * pair + 4 * quarter);
            let scales = lanes.line(&packed[SCALES + 4 * pair + quarter]);
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
    const FIT: usize = 4;

    /// Eight blocks are 34 words, in which scales and weights begin at any byte: two words are joined into one of weights.
    #[inline(always)]
    unsafe fn pack<L: Multiply>(lanes: L, chunk: &Chunk<'_>, packed: &mut [Line; PACKED]) {
        let mut words = [lanes.splat(0.0); 35];
        // SAFETY: they lie within eight blocks.
        let (first, second, last) =
            unsafe { (sixteen(lanes, chunk, 0), sixteen(lanes, chunk, LINE_BYTES), four(lanes, chunk, 120)) };
        words[..LANES].copy_from_slice(&first);
        words[LANES..2 * LANES].copy_from_slice(&second);
        words[32..34].copy_from_slice(&last[2..]);
        let low = lanes.repeat(0x0f0f_0f0f);
        // Above zero by 128, which products take back as integers, or by 12, so that four words' products fit sixteen bits.
        let table = if L::ALONG { &SMALL_TWICE } else { &TWICE };
        for group in 0..2 * PAIRS {
            let at = Dtype::Mxfp4.block_bytes() * group;
            let scale = lanes.and(lanes.shift_words(words[at / 4], 8 * (at % 4) as u32), lanes.repeat(0xff));
            let scale = power_of_two(lanes, scale);
            lanes.store_line(scale, &mut packed[SCALES + group]);
            if L::ALONG {
                lanes.store_line(lanes.mul(scale, lanes.splat(-12.0)), &mut packed[OFFSETS + group]);
            }
            let (at, line) = (at + 1, PAIR * (group / 2) + 8 * (group % 2));
            for word in 0..4 {
                let (word_at, shift) = (at / 4 + word, 8 * (at % 4) as u32);
                // The two have no bit in common.
                let nibbles = lanes.xor(
                    lanes.shift_words(words[word_at], shift),
                    lanes.shift_words_left(words[word_at + 1], 32 - shift),
                );
                let upper = lanes.and(lanes.shift_words(nibbles, 4), low);
                lanes.store_line(lanes.lookup(table, lanes.and(nibbles, low)), &mut packed[line + word]);
                lanes.store_line(lanes.lookup(table, upper), &mut packed[line + 4 + word]);
            }
        }
    }

    #[inline(always)]
    unsafe fn pair<L: Multiply, const T: usize>(
        lanes: L,
        packed: &[Line; PACKED],
        pair: usize,
        inputs: &[*const Line; T],
        all: &mut [L::Vector; T],
    ) {
        for half in 0..2 {
            let weights: [L::Vector; 8] = lines(lanes, packed, PAIR * pair + 8 * half);
            let scales = lanes.line(&packed[SCALES + 2 * pair + half]);
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
