//! How weights lie in memory: plain floats, or blocks that share scales, as GGUF files have them.
//!
//! | dtype | block | bytes | a weight is |
//! |---|---|---|---|
//! | `f32`, `f16`, `bf16` | 1 | 4, 2, 2 | itself |
//! | `q8_0` | 32 | 34 | `d · q`, q an `i8` |
//! | `q4_K` | 256 | 144 | `d · s · q − dmin · m`, q of 4 bits, s and m of 6 bits for each 32 |
//! | `q5_K` | 256 | 176 | the same, q of 5 bits |
//! | `q6_K` | 256 | 210 | `d · s · (q − 32)`, q of 6 bits, s an `i8` for each 16 |
//! | `mxfp4` | 32 | 17 | `2^(e − 127) · q`, e a byte, q one of ±{0, ½, 1, 1½, 2, 3, 4, 6} by 4 bits; of e = 255 no number |
//!
//! Layouts of blocks: ggml's `block_q8_0`, `block_q4_K`, `block_q5_K`, `block_q6_K` and `block_mxfp4` (ggml-common.h). All little-endian. MXFP4 is a format
//! of the OCP Microscaling specification; a block's scale comes first, then the weights 0 to 15 in the lower halves of sixteen
//! bytes and 16 to 31 in the upper ones.

use std::fmt;

/// The type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// Blocks of 32 bytes with one scale.
    Q8_0,
    /// Blocks of 256 four-bit weights, a scale and an offset for each 32.
    Q4K,
    /// Blocks of 256 five-bit weights, a scale and an offset for each 32.
    Q5K,
    /// Blocks of 256 six-bit weights, a scale for each 16.
    Q6K,
    /// Blocks of 32 floats of four bits, a scale that is a power of two.
    Mxfp4,
}

impl Dtype {
    /// All of them.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K, Self::Mxfp4];

    /// Weights that share a block; a row holds whole blocks.
    pub(crate) const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Mxfp4 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 2 + 2 + 12 + 128,
            Self::Q5K => 2 + 2 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
            Self::Mxfp4 => 1 + 16,
        }
    }

    /// Bytes of a row of `columns` weights; `None` where that is no whole number of blocks, or too much to count.
    pub const fn row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block()) {
            return None;
        }
        (columns / self.block()).checked_mul(self.block_bytes())
    }

    /// Whether weights lie in blocks with shared scales.
    pub(crate) const fn is_quantized(self) -> bool {
        self.block() > 1
    }

    /// The name that people know: `f32`, `bf16`, `q4_K`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_K",
            Self::Q5K => "q5_K",
            Self::Q6K => "q6_K",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes that a `q4_K` and a `q5_K` block begin with: two halves, and six-bit scales and offsets of eight groups.
pub(super) const HEAD: usize = 2 + 2 + 12;

/// The scales and the offsets in it.
#[inline(always)]
pub(super) fn scales_of(head: &[u8; HEAD]) -> ([u8; 8], [u8; 8]) {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (scales, offsets, both) = (word(4), word(8), word(12));
    let first = 0x3f3f_3f3f;
    let upper = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let join = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let (low, high) = (both & 0x0f0f_0f0f, both >> 4 & 0x0f0f_0f0f);
    (join(scales & first, low | upper(scales)), join(offsets & first, high | upper(offsets)))
}
