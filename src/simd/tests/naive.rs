//! Stored weights in double precision, written from ggml's description of its blocks alone; and weights to draw.

use half::{bf16, f16};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Names of dtypes, columns and bytes of a block.
pub const BLOCKS: [(&str, usize, usize); 8] = [
    ("f32", 1, 4),
    ("f16", 1, 2),
    ("bf16", 1, 2),
    ("q8_0", 32, 34),
    ("q4_K", 256, 144),
    ("q5_K", 256, 176),
    ("q6_K", 256, 210),
    ("mxfp4", 32, 17),
];

fn block(dtype: &str) -> (usize, usize) {
    let (_, columns, bytes) = BLOCKS.into_iter().find(|(name, ..)| *name == dtype).expect("a known dtype");
    (columns, bytes)
}

fn half(bytes: &[u8]) -> f64 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f64()
}

/// The weights that bytes stand for.
pub fn decoded(dtype: &str, bytes: &[u8]) -> Vec<f64> {
    let blocks = bytes.chunks_exact(block(dtype).1);
    assert!(blocks.remainder().is_empty());
    match dtype {
        "f32" => blocks.map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        "f16" => blocks.map(half).collect(),
        "bf16" => blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        "q8_0" => blocks.flat_map(|b| b[2..].iter().map(|&q| half(b) * f64::from(q as i8))).collect(),
        "q4_K" => blocks.flat_map(q4_k).collect(),
        "q5_K" => blocks.flat_map(q5_k).collect(),
        "mxfp4" => blocks.flat_map(mxfp4).collect(),
        _ => blocks.flat_map(q6_k).collect(),
    }
}

/// `d, dmin` halves; twelve bytes of six-bit numbers; 128 bytes of nibbles, 32 weights in the lower ones of 32 bytes, then 32 in
/// their upper ones.
fn q4_k(block: &[u8]) -> Vec<f64> {
    (0..256).map(|at| scaled_and_offset(block, at, nibble(&block[16..], at))).collect()
}

/// The same, but before the nibbles 32 bytes whose bit `g` is the fifth bit of group `g` of 32 weights.
fn q5_k(block: &[u8]) -> Vec<f64> {
    let fifth = |at: usize| block[16 + at % 32] >> (at / 32) & 1;
    (0..256).map(|at| scaled_and_offset(block, at, nibble(&block[48..], at) | fifth(at) << 4)).collect()
}

fn nibble(bytes: &[u8], at: usize) -> u8 {
    let byte = bytes[at / 64 * 32 + at % 32];
    if (at / 32).is_multiple_of(2) { byte & 15 } else { byte >> 4 }
}

fn scaled_and_offset(block: &[u8], at: usize, q: u8) -> f64 {
    let (d, least, packed) = (half(block), half(&block[2..]), &block[4..16]);
    let (scale, offset) = match at / 32 {
        j @ 0..4 => (packed[j] & 63, packed[j + 4] & 63),
        j => (packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4),
    };
    d * f64::from(scale) * f64::from(q) - least * f64::from(offset)
}

/// 128 bytes of lower nibbles, 64 of upper pairs of bits, 16 scales, a half; each 128 weights have 64, 32 and 8 of these.
fn q6_k(block: &[u8]) -> Vec<f64> {
    let d = half(&block[208..]);
    let weight = |at: usize| {
        let (part, l) = (at / 128, at % 32);
        let (low, high) = (&block[64 * part..][..64], block[128 + 32 * part + l]);
        let q = match at % 128 / 32 {
            0 => low[l] & 15 | (high & 3) << 4,
            1 => low[l + 32] & 15 | (high >> 2 & 3) << 4,
            2 => low[l] >> 4 | (high >> 4 & 3) << 4,
            _ => low[l + 32] >> 4 | (high >> 6) << 4,
        };
        d * f64::from(block[192 + at / 16] as i8) * (f64::from(q) - 32.0)
    };
    (0..256).map(weight).collect()
}

/// An exponent; sixteen bytes of floats of four bits (a sign, two bits of exponent, one of mantissa), 16 weights in the lower
/// halves, then 16 in the upper ones.
fn mxfp4(block: &[u8]) -> Vec<f64> {
    let weight = |at: usize| {
        let byte = block[1 + at % 16];
        let bits = if at < 16 { byte & 15 } else { byte >> 4 };
        let (exponent, mantissa) = (i32::from(bits >> 1 & 3), f64::from(bits & 1));
        let size = match exponent {
            0 => mantissa / 2.0,
            _ => (1.0 + mantissa / 2.0) * 2f64.powi(exponent - 1),
        };
        let sign = if bits & 8 == 0 { 1.0 } else { -1.0 };
        sign * size * 2f64.powi(i32::from(block[0]) - 127)
    };
    (0..32).map(weight).collect()
}

/// Random weights of about the size `scale`, as bytes. Any bytes are a block but for the halves in it.
pub fn drawn(rng: &mut ChaCha8Rng, dtype: &str, count: usize, scale: f32) -> Vec<u8> {
    let value = |rng: &mut ChaCha8Rng| scale * rng.random_range(-1.7f32..1.7);
    match dtype {
        "f32" => (0..count).flat_map(|_| value(rng).to_le_bytes()).collect(),
        "f16" => (0..count).flat_map(|_| f16::from_f32(value(rng)).to_le_bytes()).collect(),
        "bf16" => (0..count).flat_map(|_| bf16::from_f32(value(rng)).to_le_bytes()).collect(),
        _ => {
            let (columns, size) = block(dtype);
            let mut bytes: Vec<u8> = (0..count / columns * size).map(|_| rng.random()).collect();
            for block in bytes.chunks_exact_mut(size) {
                let mut put = |at: usize, unit: f32| {
                    let half = f16::from_f32(scale * unit * rng.random_range(0.5f32..1.5));
                    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
                };
                match dtype {
                    "q8_0" => put(0, 1.0 / 74.0),
                    "q4_K" => {
                        put(0, 1.0 / 200.0);
                        put(2, 1.0 / 27.0);
                    }
                    "q5_K" => {
                        put(0, 1.0 / 400.0);
                        put(2, 1.0 / 27.0);
                    }
                    "mxfp4" => {
                        let exponent = (scale / 4.0).log2().round() as i32 + rng.random_range(-1..2);
                        block[0] = (127 + exponent) as u8;
                    }
                    _ => put(208, 1.0 / 1300.0),
                }
            }
            bytes
        }
    }
}
