//! What a tensor is made of: numbers one by one, or blocks of quantised numbers that share scales, as GGUF files have them.
//!
//! Knows nothing of how a block is laid out: only how many numbers and bytes it has.

use std::fmt;

use safetensors::Dtype;

/// Type of a tensor's elements as its file has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// Numbers that safetensors knows.
    Plain(Dtype),
    /// Blocks of quantised numbers.
    Blocks(BlockType),
}

/// A kind of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockType {
    /// Its number in GGUF files (`ggml_type`).
    pub code: u32,
    /// The name that people know: `q4_K`.
    pub name: &'static str,
    /// Numbers of a block.
    pub numbers: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

/// The plain types of GGUF files.
const PLAIN: [(u32, Dtype); 8] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (24, Dtype::I8),
    (25, Dtype::I16),
    (26, Dtype::I32),
    (27, Dtype::I64),
    (28, Dtype::F64),
    (30, Dtype::BF16),
];

/// Code, name, numbers and bytes of the others (`GGML_QUANT_SIZES` of the gguf package).
const BLOCKS: [(u32, &str, usize, usize); 24] = [
    (2, "q4_0", 32, 18),
    (3, "q4_1", 32, 20),
    (6, "q5_0", 32, 22),
    (7, "q5_1", 32, 24),
    (8, "q8_0", 32, 34),
    (9, "q8_1", 32, 40),
    (10, "q2_K", 256, 84),
    (11, "q3_K", 256, 110),
    (12, "q4_K", 256, 144),
    (13, "q5_K", 256, 176),
    (14, "q6_K", 256, 210),
    (15, "q8_K", 256, 292),
    (16, "iq2_xxs", 256, 66),
    (17, "iq2_xs", 256, 74),
    (18, "iq3_xxs", 256, 98),
    (19, "iq1_s", 256, 50),
    (20, "iq4_nl", 32, 18),
    (21, "iq3_s", 256, 110),
    (22, "iq2_s", 256, 82),
    (23, "iq4_xs", 256, 136),
    (29, "iq1_m", 256, 56),
    (34, "tq1_0", 256, 54),
    (35, "tq2_0", 256, 66),
    (39, "mxfp4", 32, 17),
];

impl ElementType {
    /// The type with a number of GGUF's.
    pub(super) fn of_code(code: u32) -> Option<Self> {
        if let Some((_, dtype)) = PLAIN.iter().find(|(plain, _)| *plain == code) {
            return Some(Self::Plain(*dtype));
        }
        let (code, name, numbers, bytes) = *BLOCKS.iter().find(|(block, ..)| *block == code)?;
        Some(Self::Blocks(BlockType { code, name, numbers, bytes }))
    }

    /// Bytes of rows of `columns` numbers; `None` where a row is no whole number of blocks, or too much to count.
    pub(crate) fn bytes(self, rows: usize, columns: usize) -> Option<usize> {
        match self {
            Self::Plain(dtype) => Some(rows.checked_mul(columns)?.checked_mul(dtype.bitsize())?.div_ceil(8)),
            Self::Blocks(blocks) if columns.is_multiple_of(blocks.numbers) => {
                (columns / blocks.numbers).checked_mul(rows)?.checked_mul(blocks.bytes)
            }
            Self::Blocks(_) => None,
        }
    }
}

impl From<Dtype> for ElementType {
    fn from(dtype: Dtype) -> Self {
        Self::Plain(dtype)
    }
}

impl PartialEq<Dtype> for ElementType {
    fn eq(&self, other: &Dtype) -> bool {
        *self == Self::Plain(*other)
    }
}

/// The name alone, as in messages.
impl fmt::Debug for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Blocks(blocks) => f.write_str(blocks.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_whole_blocks() {
        let [q4_k, f16] = [12, 1].map(|code| ElementType::of_code(code).unwrap());
        assert_eq!((q4_k.bytes(3, 512), q4_k.bytes(3, 100), q4_k.bytes(usize::MAX, 512)), (Some(864), None, None));
        assert_eq!((f16.bytes(3, 5), f16.bytes(usize::MAX, 2)), (Some(30), None));
        assert_eq!((format!("{q4_k:?}"), format!("{f16:?}")), ("q4_K".into(), "F16".into()));
        assert!(f16 == Dtype::F16 && q4_k != Dtype::F16 && ElementType::of_code(4).is_none());
    }
}
