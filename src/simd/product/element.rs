//! What weights of floats are while they meet activations: floats or pairs of bf16.

#![allow(unsafe_code)]

use super::convert::Convert;
use super::rows::{CHUNK, Form};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::{Kernel, LANES, quantized};

/// How sixteen words of activations meet the weights of the same columns.
pub(super) trait Element {
    /// The form of the activations.
    const FORM: Form;
    /// Columns in sixteen words.
    const COLUMNS: usize = LANES;
    /// Bytes of stored weights for them.
    const BYTES: usize = LINE_BYTES;

    /// The weights at an address, which come as they are unless said otherwise.
    ///
    /// # Safety
    /// There are `BYTES` bytes to read.
    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.bytes(unsafe { &*from.cast() })
    }

    /// Products into sums.
    #[inline(always)]
    fn mac<L: Multiply>(lanes: L, weights: L::Vector, input: L::Vector, sum: L::Vector) -> L::Vector {
        match Self::FORM {
            Form::Pairs => lanes.dot_pairs(weights, input, sum),
            _ => lanes.mul_add(weights, input, sum),
        }
    }
}

/// `f32` as it is.
pub(super) struct F32AsF32;
/// `f16` as floats.
pub(super) struct F16AsF32;
/// `bf16` as floats.
pub(super) struct Bf16AsF32;
/// `bf16` as pairs.
pub(super) struct Bf16Pairs;

impl Element for F32AsF32 {
    const FORM: Form = Form::Floats;
}

impl Element for F16AsF32 {
    const FORM: Form = Form::Floats;
    const BYTES: usize = LINE_BYTES / 2;

    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.widen_f16(unsafe { &*from.cast() })
    }
}

impl Element for Bf16AsF32 {
    const FORM: Form = Form::Floats;
    const BYTES: usize = LINE_BYTES / 2;

    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.widen_bf16(unsafe { &*from.cast() })
    }
}

impl Element for Bf16Pairs {
    const FORM: Form = Form::Pairs;
    const COLUMNS: usize = 2 * LANES;
}

/// One chunk of a weight row as lines of an [`Element`]'s form.
#[inline(always)]
pub(super) fn decode<E: Element, L: Multiply>(
    lanes: L,
    dtype: Dtype,
    row: &[u8],
    chunk: usize,
    columns: usize,
    lines: &mut [Line],
) {
    let mut values = [0.0; CHUNK];
    let values = &mut values[..CHUNK.min(columns - chunk * CHUNK)];
    quantized::decode(lanes, dtype, row, chunk * CHUNK, values);
    Convert { form: E::FORM, values, row: lines }.run(lanes);
}
