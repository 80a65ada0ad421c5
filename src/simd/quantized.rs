//! Quantised weights: blocks into floats, and products of their integers with activations of bytes.
//!
//! Layouts are ggml's (`dequantize_row_q8_0`, `_q4_K`, `_q6_K` in ggml-quants.c). Activations are rounded to bytes with one scale for each 32
//! of them, `scale = max |x| / 127`, as ggml does for `q8_0`.

use super::LANES;
use super::dtype::Dtype;
use super::multiply::{Line, Multiply};
use super::product::CHUNK;

/// Lines of bytes, scales and sums for [`CHUNK`] activations.
pub(crate) const CHUNK_LINES: usize = 9;

/// Values that share a scale.
const GROUP: usize = 32;

/// Adding it to a small number rounds it to a whole one that then stands in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// Up to [`CHUNK`] values as bytes; zeros after their end.
#[inline(always)]
pub(super) fn to_bytes<L: Multiply>(lanes: L, values: &[f32], lines: &mut [Line]) {
    let (zero, shift, sign) = (lanes.splat(0.0), lanes.splat(SHIFT), lanes.repeat(0x7fff_ffff));
    let mut sums = [0.0f32; LANES];
    for quarter in 0..CHUNK / (2 * GROUP) {
        let mut bytes = [0u8; 2 * GROUP];
        let mut scales = [0.0f32; 2];
        for half in 0..2 {
            let group = 2 * quarter + half;
            let from = values.get(group * GROUP..).unwrap_or_default();
            let (low, high) = from[..from.len().min(GROUP)].split_at(from.len().min(LANES));
            let (low, high) = (lanes.load_part(low, 0.0), lanes.load_part(high, 0.0));
            let largest = lanes.fold_max(lanes.max(lanes.and(low, sign), lanes.and(high, sign)));
            // So small that its inverse is infinite, it stands for zeros.
            let is_zero = largest <= 127.0 * f32::MIN_POSITIVE;
            let (scale, inverse) = if is_zero { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
            let inverse = lanes.splat(inverse);
            let low = lanes.add(lanes.mul(low, inverse), shift);
            let high = lanes.add(lanes.mul(high, inverse), shift);
            let sum = lanes.fold_sum(lanes.add(lanes.sub(low, shift), lanes.sub(high, shift)));
            for (bytes, vector) in bytes[half * GROUP..][..GROUP].chunks_exact_mut(LANES).zip([low, high]) {
                for (byte, word) in bytes.iter_mut().zip(lanes.words(vector)) {
                    *byte = word as u8;
                }
            }
            // A byte cannot be NaN, and the largest may be another value: what is no number says so in the scale.
            let scale = if sum.is_nan() { sum } else { scale };
            scales[half] = scale;
            sums[LANES / 2 + group] = scale * sum;
        }
        lanes.store_line(lanes.bytes(&bytes), &mut lines[2 * quarter]);
        lanes.store_line(lanes.two(scales[0], scales[1]), &mut lines[2 * quarter + 1]);
    }
    lanes.store_line(lanes.add(lanes.load(&sums), zero), &mut lines[CHUNK_LINES - 1]);
}

/// Weights of a row from column `first` on, a multiple of [`CHUNK`], as floats.
#[inline(always)]
pub(crate) fn decode<L: Multiply>(lanes: L, dtype: Dtype, row: &[u8], first: usize, values: &mut [f32]) {
    let row = &row[first / dtype.block() * dtype.block_bytes()..];
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in values.iter_mut().zip(row.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::F16 => widen::<L, true>(lanes, row, values),
        Dtype::Bf16 => widen::<L, false>(lanes, row, values),
        Dtype::Q8_0 => {
            for (values, block) in values.as_chunks_mut::<GROUP>().0.iter_mut().zip(row.as_chunks().0) {
                let scale = lanes.splat(lanes.half([block[0], block[1]]));
                for (values, bytes) in values.as_chunks_mut::<LANES>().0.iter_mut().zip(last_32(block).as_chunks().0) {
                    lanes.store(lanes.mul(lanes.widen_i8(*bytes), scale), values);
                }
            }
        }
        Dtype::Q4K => {
            for (values, block) in values.as_chunks_mut::<CHUNK>().0.iter_mut().zip(row.as_chunks().0) {
                let (scales, offsets) = scales_q4_k(block);
                let [scale, least] = [lanes.half([block[0], block[1]]), lanes.half([block[2], block[3]])];
                for (quarter, values) in values.as_chunks_mut::<{ 2 * GROUP }>().0.iter_mut().enumerate() {
                    let floats = lanes.widen_bytes(unpack_q4_k(lanes, block, quarter));
                    for (part, values) in values.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                        let group = 2 * quarter + part / 2;
                        let scale = lanes.splat(scale * f32::from(scales[group]));
                        let least = lanes.splat(-(least * f32::from(offsets[group])));
                        lanes.store(lanes.mul_add(floats[part], scale, least), values);
                    }
                }
            }
        }
        Dtype::Q6K => {
            for (values, block) in values.as_chunks_mut::<CHUNK>().0.iter_mut().zip(row.as_chunks().0) {
                let scale = lanes.half([block[208], block[209]]);
                for (quarter, values) in values.as_chunks_mut::<{ 2 * GROUP }>().0.iter_mut().enumerate() {
                    let floats = lanes.widen_bytes(unpack_q6_k(lanes, block, quarter));
                    for (part, values) in values.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                        let scale = lanes.splat(scale * f32::from(block[192 + 4 * quarter + part] as i8));
                        lanes.store(lanes.mul(lanes.sub(floats[part], lanes.splat(32.0)), scale), values);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn widen<L: Multiply, const IEEE: bool>(lanes: L, row: &[u8], values: &mut [f32]) {
    let (whole, rest) = values.as_chunks_mut::<LANES>();
    for (values, bytes) in whole.iter_mut().zip(row.as_chunks::<32>().0) {
        lanes.store(if IEEE { lanes.widen_f16(bytes) } else { lanes.widen_bf16(bytes) }, values);
    }
    let mut last = [0; 32];
    last[..2 * rest.len()].copy_from_slice(&row[32 * whole.len()..][..2 * rest.len()]);
    lanes.store_part(if IEEE { lanes.widen_f16(&last) } else { lanes.widen_bf16(&last) }, rest);
}

/// Six-bit scales and offsets of the eight groups of a `q4_K` block.
#[inline(always)]
fn scales_q4_k(block: &[u8; Dtype::Q4K.block_bytes()]) -> ([u8; 8], [u8; 8]) {
    let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let (scales, offsets, both) = (word(4), word(8), word(12));
    let first = 0x3f3f_3f3f;
    let upper = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let join = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let (low, high) = (both & 0x0f0f_0f0f, both >> 4 & 0x0f0f_0f0f);
    (join(scales & first, low | upper(scales)), join(offsets & first, high | upper(offsets)))
}

/// Two lanes' numbers, eight times each.
const fn eights(first: u32, second: u32) -> [u32; LANES] {
    let mut lanes = [first; LANES];
    let mut lane = LANES / 2;
    while lane < LANES {
        lanes[lane] = second;
        lane += 1;
    }
    lanes
}

/// Four lanes' numbers from `first` on, four times each.
const fn fours(first: u32) -> [u32; LANES] {
    let mut lanes = [0; LANES];
    let mut lane = 0;
    while lane < LANES {
        lanes[lane] = first + lane as u32 / 4;
        lane += 1;
    }
    lanes
}

/// Products of one quantised dtype with activations of bytes.
pub(super) trait Blocks {
    /// Adds a chunk of a weight row times activations to sums.
    fn dot<L: Multiply>(lanes: L, row: &[u8], chunk: usize, input: &[Line; CHUNK_LINES], sum: L::Vector) -> L::Vector;
}

pub(super) struct Q8_0;
pub(super) struct Q4K;
pub(super) struct Q6K;

impl Blocks for Q8_0 {
    #[inline(always)]
    fn dot<L: Multiply>(lanes: L, row: &[u8], chunk: usize, input: &[Line; CHUNK_LINES], sum: L::Vector) -> L::Vector {
        let blocks = row.as_chunks::<{ Dtype::Q8_0.block_bytes() }>().0;
        let first = chunk * CHUNK / GROUP;
        dot_q8_0(lanes, &blocks[first..blocks.len().min(first + CHUNK / GROUP)], input, sum)
    }
}

impl Blocks for Q4K {
    #[inline(always)]
    fn dot<L: Multiply>(lanes: L, row: &[u8], chunk: usize, input: &[Line; CHUNK_LINES], sum: L::Vector) -> L::Vector {
        dot_q4_k(lanes, &row.as_chunks().0[chunk], input, sum)
    }
}

impl Blocks for Q6K {
    #[inline(always)]
    fn dot<L: Multiply>(lanes: L, row: &[u8], chunk: usize, input: &[Line; CHUNK_LINES], sum: L::Vector) -> L::Vector {
        dot_q6_k(lanes, &row.as_chunks().0[chunk], input, sum)
    }
}

/// A byte with sign, plus 128: without one, as the products want it.
const SIGN: u32 = 0x8080_8080;

#[inline(always)]
fn dot_q8_0<L: Multiply>(
    lanes: L,
    blocks: &[[u8; Dtype::Q8_0.block_bytes()]],
    input: &[Line; CHUNK_LINES],
    mut sum: L::Vector,
) -> L::Vector {
    const NONE: [u8; Dtype::Q8_0.block_bytes()] = [0; Dtype::Q8_0.block_bytes()];
    if let Some(blocks) = blocks.as_chunks::<{ CHUNK / GROUP }>().0.first() {
        for quarter in 0..CHUNK / GROUP / 2 {
            sum = dot_pair(lanes, [&blocks[2 * quarter], &blocks[2 * quarter + 1]], input, quarter, sum);
        }
        return sum;
    }
    for (quarter, pair) in blocks.chunks(2).enumerate() {
        sum = dot_pair(lanes, [&pair[0], pair.get(1).unwrap_or(&NONE)], input, quarter, sum);
    }
    sum
}

/// Two `q8_0` blocks with a quarter of a chunk of activations.
#[inline(always)]
fn dot_pair<L: Multiply>(
    lanes: L,
    [low, high]: [&[u8; Dtype::Q8_0.block_bytes()]; 2],
    input: &[Line; CHUNK_LINES],
    quarter: usize,
    sum: L::Vector,
) -> L::Vector {
    let (zero, sign) = (lanes.splat(0.0), lanes.repeat(SIGN));
    let weights = lanes.xor(lanes.halves(last_32(low), last_32(high)), sign);
    let scales = lanes.two(lanes.half([low[0], low[1]]), lanes.half([high[0], high[1]]));
    let bytes = lanes.line(&input[2 * quarter]);
    let scales = lanes.mul(scales, lanes.line(&input[2 * quarter + 1]));
    // What 128 too many at each weight would add is taken off before.
    let start = lanes.sub_integers(zero, lanes.dot_bytes(sign, bytes, zero));
    lanes.mul_add(lanes.floats(lanes.dot_bytes(weights, bytes, start)), scales, sum)
}

/// The bytes of a `q8_0` block after its scale.
#[inline(always)]
fn last_32(block: &[u8; Dtype::Q8_0.block_bytes()]) -> &[u8; 32] {
    block.last_chunk().expect("34 bytes")
}

/// A quarter of a `q4_K` block, 64 weights in order, as bytes.
#[inline(always)]
fn unpack_q4_k<L: Multiply>(lanes: L, block: &[u8; Dtype::Q4K.block_bytes()], quarter: usize) -> L::Vector {
    /// The upper eight words by 4 bits, the lower ones by none.
    const BY: Line = Line(eights(0, 0x0004_0004));
    let bytes: &[u8; 32] = block[16 + 32 * quarter..].first_chunk().expect("32 bytes");
    lanes.and(lanes.shift_right(lanes.halves(bytes, bytes), lanes.line(&BY)), lanes.repeat(0x0f0f_0f0f))
}

/// A quarter of a `q6_K` block, 64 weights in order plus 32, as bytes.
#[inline(always)]
fn unpack_q6_k<L: Multiply>(lanes: L, block: &[u8; Dtype::Q6K.block_bytes()], quarter: usize) -> L::Vector {
    /// Pairs of bits for the lower and the upper eight words: of the first two groups, of the last two.
    const BY: [Line; 2] = [Line(eights(0, 0x0002_0002)), Line(eights(0x0004_0004, 0x0006_0006))];
    let low: &[u8; 64] = block[64 * (quarter / 2)..].first_chunk().expect("64 bytes");
    let high: &[u8; 32] = block[128 + 32 * (quarter / 2)..].first_chunk().expect("32 bytes");
    let low = lanes.bytes(low);
    let nibbles = if quarter.is_multiple_of(2) { low } else { lanes.shift_right(low, lanes.repeat(0x0004_0004)) };
    let pairs = lanes.shift_right(lanes.halves(high, high), lanes.line(&BY[quarter % 2]));
    let pairs = lanes.shift_left_4(lanes.and(pairs, lanes.repeat(0x0303_0303)));
    // The two have no bit in common.
    lanes.xor(lanes.and(nibbles, lanes.repeat(0x0f0f_0f0f)), pairs)
}

#[inline(always)]
fn dot_q4_k<L: Multiply>(
    lanes: L,
    block: &[u8; Dtype::Q4K.block_bytes()],
    input: &[Line; CHUNK_LINES],
    mut sum: L::Vector,
) -> L::Vector {
    const LANES_OF: [[u32; LANES]; 4] = [eights(0, 1), eights(2, 3), eights(4, 5), eights(6, 7)];
    let zero = lanes.splat(0.0);
    let (scales, offsets) = scales_q4_k(block);
    let both = (u128::from(u64::from_le_bytes(scales)) | u128::from(u64::from_le_bytes(offsets)) << 64).to_le_bytes();
    let factors = lanes.two(lanes.half([block[0], block[1]]), -lanes.half([block[2], block[3]]));
    let factors = lanes.mul(lanes.widen_u8(both), factors);
    for quarter in 0..4 {
        let weights = unpack_q4_k(lanes, block, quarter);
        let products = lanes.dot_bytes(weights, lanes.line(&input[2 * quarter]), zero);
        let scales = lanes.mul(lanes.pick(factors, &LANES_OF[quarter]), lanes.line(&input[2 * quarter + 1]));
        sum = lanes.mul_add(lanes.floats(products), scales, sum);
    }
    lanes.mul_add(factors, lanes.line(&input[CHUNK_LINES - 1]), sum)
}

#[inline(always)]
fn dot_q6_k<L: Multiply>(
    lanes: L,
    block: &[u8; Dtype::Q6K.block_bytes()],
    input: &[Line; CHUNK_LINES],
    mut sum: L::Vector,
) -> L::Vector {
    const LANES_OF: [[u32; LANES]; 4] = [fours(0), fours(4), fours(8), fours(12)];
    let zero = lanes.splat(0.0);
    let scales: [u8; LANES] = *block[192..].first_chunk().expect("16 scales");
    let factors = lanes.mul(lanes.widen_i8(scales), lanes.splat(lanes.half([block[208], block[209]])));
    for quarter in 0..4 {
        let weights = unpack_q6_k(lanes, block, quarter);
        let bytes = lanes.line(&input[2 * quarter]);
        // What 32 too many at each weight would add is taken off before.
        let start = lanes.sub_integers(zero, lanes.dot_bytes(lanes.repeat(0x2020_2020), bytes, zero));
        let products = lanes.floats(lanes.dot_bytes(weights, bytes, start));
        let scales = lanes.mul(lanes.pick(factors, &LANES_OF[quarter]), lanes.line(&input[2 * quarter + 1]));
        sum = lanes.mul_add(products, scales, sum);
    }
    sum
}
