//! Sixteen lanes in one AVX-512 register.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof, where the CPU gives it.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi1,bmi2,lzcnt,popcnt")]
        fn compiled<K: Kernel>(lanes: Avx512, kernel: K) -> K::Output {
            kernel.run(lanes)
        }
        // SAFETY: `self` proves the features; AVX2, BMI1 and LZCNT come with every CPU that has AVX-512.
        unsafe { compiled(self, kernel) }
    }
}

// SAFETY of every block below: `self` proves that the CPU has the instructions; the intrinsics that touch memory get
// references to arrays of exactly sixteen four-byte values, and are the unaligned ones.
impl Lanes for Avx512 {
    type Vector = __m512;
    type Few = (__m512, __m512i);

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, vector: __m512, into: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(into.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn ge(self, a: __m512, b: __m512) -> u16 {
        // SAFETY: see above.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b) }
    }

    #[inline(always)]
    fn blend(self, mask: u16, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(mask, b, a) }
    }

    #[inline(always)]
    fn power_of_two(self, shifted: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(1.0f32.to_bits() as i32)))
        }
    }

    #[inline(always)]
    fn none(self) -> Self::Few {
        // SAFETY: see above.
        unsafe { (_mm512_set1_ps(f32::NEG_INFINITY), _mm512_setzero_si512()) }
    }

    #[inline(always)]
    fn append(self, few: &mut Self::Few, count: usize, mask: u16, vector: __m512, first: u32) {
        // In registers: pieces that were stored one over the other could not be loaded again without waiting for all of them.
        // SAFETY: see above.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32));
            let places = (((1u64 << mask.count_ones()) - 1) << count.min(LANES)) as u16;
            few.0 = _mm512_mask_expand_ps(few.0, places, _mm512_maskz_compress_ps(mask, vector));
            few.1 = _mm512_mask_expand_epi32(few.1, places, _mm512_maskz_compress_epi32(mask, ids));
        }
    }

    #[inline(always)]
    fn unpack(self, few: Self::Few, values: &mut [f32; LANES], ids: &mut [u32; LANES]) {
        // SAFETY: see above.
        unsafe {
            _mm512_storeu_ps(values.as_mut_ptr(), few.0);
            _mm512_storeu_si512(ids.as_mut_ptr().cast(), few.1);
        }
    }

    #[inline(always)]
    fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]) {
        // SAFETY: see above.
        unsafe {
            let all = _mm512_loadu_ps(values.as_ptr());
            let one = _mm512_set1_epi32(1);
            let mut sums = [_mm512_setzero_si512(); 4];
            for four in values.as_chunks::<4>().0 {
                for (sum, &other) in sums.iter_mut().zip(four) {
                    let larger = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(all, _mm512_set1_ps(other));
                    *sum = _mm512_mask_add_epi32(*sum, larger, *sum, one);
                }
            }
            let sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
            _mm512_storeu_si512(ranks.as_mut_ptr().cast(), sum);
        }
    }

    #[inline(always)]
    fn equal(self, ranks: &[u32; LANES], rank: u32) -> u16 {
        // SAFETY: see above.
        unsafe { _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(ranks.as_ptr().cast()), _mm512_set1_epi32(rank as i32)) }
    }

    #[inline(always)]
    fn load_part(self, from: &[f32], fill: f32) -> __m512 {
        let mask = part(from.len());
        // SAFETY: the mask names only lanes within the slice; the others are not read.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from.as_ptr()) }
    }

    #[inline(always)]
    fn store_part(self, vector: __m512, into: &mut [f32]) {
        let mask = part(into.len());
        // SAFETY: the mask names only lanes within the slice; the others are not written.
        unsafe { _mm512_mask_storeu_ps(into.as_mut_ptr(), mask, vector) }
    }
}

/// The first `count` lanes.
#[inline(always)]
fn part(count: usize) -> u16 {
    ((1u32 << count.min(LANES)) - 1) as u16
}
