//! Stored weights into floats; layouts of quantised ones are ggml's (`dequantize_row_q8_0`, `_q4_K`, `_q5_K`, `_q6_K`, `_mxfp4` in ggml-quants.c).

use super::dtype::{Dtype, HEAD, scales_of};
use super::lanes::LANES;
use super::multiply::Multiply;
use super::product::rows::CHUNK;

/// Values that share a scale.
const GROUP: usize = 32;

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
                let head = first_16(block);
                for (quarter, values) in values.as_chunks_mut().0.iter_mut().enumerate() {
                    scaled_and_offset(lanes, head, quarter, unpack_q4_k(lanes, block, quarter), values);
                }
            }
        }
        Dtype::Q5K => {
            for (values, block) in values.as_chunks_mut::<CHUNK>().0.iter_mut().zip(row.as_chunks().0) {
                let head = first_16(block);
                for (quarter, values) in values.as_chunks_mut().0.iter_mut().enumerate() {
                    scaled_and_offset(lanes, head, quarter, unpack_q5_k(lanes, block, quarter), values);
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
        Dtype::Mxfp4 => {
            for (values, block) in values.as_chunks_mut::<GROUP>().0.iter_mut().zip(row.as_chunks().0) {
                let floats = lanes.widen_bytes(unpack_mxfp4(lanes, block));
                let scale = power_of_two(lanes, lanes.repeat(u32::from(block[0])));
                for (part, values) in values.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    lanes.store(lanes.mul(lanes.sub(floats[part], lanes.splat(128.0)), scale), values);
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

#[inline(always)]
fn first_16<const N: usize>(block: &[u8; N]) -> &[u8; HEAD] {
    block.first_chunk().expect("a longer block")
}

/// The floats of a quarter of a `q4_K` or `q5_K` block, whose weights are bytes.
#[inline(always)]
fn scaled_and_offset<L: Multiply>(
    lanes: L,
    head: &[u8; HEAD],
    quarter: usize,
    weights: L::Vector,
    values: &mut [f32; 2 * GROUP],
) {
    let (scales, offsets) = scales_of(head);
    let [scale, least] = [lanes.half([head[0], head[1]]), lanes.half([head[2], head[3]])];
    let floats = lanes.widen_bytes(weights);
    for (part, values) in values.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let group = 2 * quarter + part / 2;
        let scale = lanes.splat(scale * f32::from(scales[group]));
        let least = lanes.splat(-(least * f32::from(offsets[group])));
        lanes.store(lanes.mul_add(floats[part], scale, least), values);
    }
}

/// The bytes of a `q8_0` block after its scale.
#[inline(always)]
fn last_32(block: &[u8; Dtype::Q8_0.block_bytes()]) -> &[u8; 32] {
    block.last_chunk().expect("34 bytes")
}

/// A quarter of a `q4_K` block, 64 weights in order, as bytes.
#[inline(always)]
fn unpack_q4_k<L: Multiply>(lanes: L, block: &[u8; Dtype::Q4K.block_bytes()], quarter: usize) -> L::Vector {
    lanes.nibbles(block[HEAD + 32 * quarter..].first_chunk().expect("32 bytes"))
}

/// The same of a `q5_K` block.
#[inline(always)]
fn unpack_q5_k<L: Multiply>(lanes: L, block: &[u8; Dtype::Q5K.block_bytes()], quarter: usize) -> L::Vector {
    let fifths = block[HEAD..].first_chunk().expect("32 bytes");
    lanes.fives(block[HEAD + 32 + 32 * quarter..].first_chunk().expect("32 bytes"), fifths, quarter)
}

/// A quarter of a `q6_K` block, 64 weights in order plus 32, as bytes.
#[inline(always)]
fn unpack_q6_k<L: Multiply>(lanes: L, block: &[u8; Dtype::Q6K.block_bytes()], quarter: usize) -> L::Vector {
    let low = block[64 * (quarter / 2)..].first_chunk().expect("64 bytes");
    let high = block[128 + 32 * (quarter / 2)..].first_chunk().expect("32 bytes");
    lanes.sixes(low, high, !quarter.is_multiple_of(2))
}

/// Twice the number that four bits of MXFP4 stand for, plus 128: sign, two bits of exponent, one of mantissa.
pub(super) const TWICE: [u8; 16] = [128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116];

/// `2^(e − 128)` of words that are bytes: half a scale of MXFP4, whose weights count twice. Of 255 it is no number.
#[inline(always)]
pub(super) fn power_of_two<L: Multiply>(lanes: L, exponents: L::Vector) -> L::Vector {
    // 255 gives infinity; 0 gives zero, which stands for a number too small for an exponent of its own.
    let power = lanes.max(lanes.shift_words_left(exponents, 23), lanes.repeat(0x0040_0000));
    lanes.mul(lanes.add(power, lanes.sub(power, power)), lanes.splat(0.5))
}

/// [`TWICE`] with 12 added in place of 128: the least that leaves no sign.
pub(super) const SMALL_TWICE: [u8; 16] = less(TWICE, 128 - 12);

const fn less(mut table: [u8; 16], by: u8) -> [u8; 16] {
    let mut at = 0;
    while at < table.len() {
        table[at] = table[at].wrapping_sub(by);
        at += 1;
    }
    table
}

/// The 32 weights of an `mxfp4` block in order, as bytes of [`TWICE`], then what does not count.
#[inline(always)]
fn unpack_mxfp4<L: Multiply>(lanes: L, block: &[u8; Dtype::Mxfp4.block_bytes()]) -> L::Vector {
    let weights = block.last_chunk().expect("16 bytes");
    lanes.lookup(&TWICE, lanes.nibbles_of_two(weights, weights))
}
