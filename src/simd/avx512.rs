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
    fn append(self, mask: u16, from: __m512, into: __m512, at: usize) -> __m512 {
        let behind = (0xffff_u32 << at.min(LANES)) as u16;
        // In registers alone: a load right after stores that it overlaps in part has to wait for them.
        // SAFETY: see above.
        unsafe { _mm512_mask_expand_ps(into, behind, _mm512_maskz_compress_ps(mask, from)) }
    }

    #[inline(always)]
    fn falling(self, values: __m512, count: usize) -> u64 {
        // SAFETY: see above.
        unsafe {
            // As whole numbers with the same order (and one zero), of which one less makes room for equals.
            let bits = _mm512_castps_si512(_mm512_add_ps(values, _mm512_setzero_ps()));
            let keys = _mm512_xor_si512(bits, _mm512_srli_epi32::<1>(_mm512_srai_epi32::<31>(bits)));
            let mut all = [0i32; LANES];
            _mm512_storeu_si512(all.as_mut_ptr().cast(), keys);
            let mut order = two::<0>(keys, &all, 0);
            order = two::<2>(keys, &all, order);
            order = two::<4>(keys, &all, order);
            order = two::<6>(keys, &all, order);
            if count <= 8 {
                // The others are behind these.
                return order | 0xfedc_ba98 << 32;
            }
            order = two::<8>(keys, &all, order);
            order = two::<10>(keys, &all, order);
            order = two::<12>(keys, &all, order);
            two::<14>(keys, &all, order)
        }
    }

    #[inline(always)]
    fn permute(self, vector: __m512, order: u64) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
            let order = _mm512_castsi128_si512(_mm_cvtsi64_si128(order as i64));
            // Only the lowest four bits of a lane count.
            let lanes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(halves, order), shifts);
            _mm512_permutexvar_ps(lanes, vector)
        }
    }

    #[inline(always)]
    fn ranked(self, values: __m512, rank: usize) -> __m512 {
        let lane = self.falling(values, LANES) >> (4 * rank);
        // SAFETY: see above; only the lowest four bits of a lane count.
        unsafe { _mm512_permutexvar_ps(_mm512_set1_epi32(lane as i32), values) }
    }

    #[inline(always)]
    fn fold_max(self, vector: __m512) -> f32 {
        // SAFETY: see above.
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(vector), _mm512_extractf32x8_ps::<1>(vector));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn fold_sum(self, vector: __m512) -> f32 {
        // SAFETY: see above.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(vector), _mm512_extractf32x8_ps::<1>(vector));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
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

/// −1 in the lanes before each lane, 0 in the others.
const BEFORE: [[i32; LANES]; LANES] = {
    let mut before = [[0; LANES]; LANES];
    let mut at = 0;
    while at < LANES * LANES {
        before[at / LANES][at % LANES] = if at % LANES < at / LANES { -1 } else { 0 };
        at += 1;
    }
    before
};

/// Puts two lanes from `LANE` on into an order: each at the number of lanes before it.
#[inline(always)]
unsafe fn two<const LANE: usize>(keys: __m512i, all: &[i32; LANES], order: u64) -> u64 {
    // SAFETY: the caller has the instructions; loads are from arrays of sixteen four-byte values.
    unsafe {
        let first = _mm512_sub_epi32(keys, _mm512_loadu_si512(BEFORE[LANE].as_ptr().cast()));
        let first = _mm512_cmpgt_epi32_mask(first, _mm512_set1_epi32(all[LANE])).count_ones();
        let second = _mm512_sub_epi32(keys, _mm512_loadu_si512(BEFORE[LANE + 1].as_ptr().cast()));
        let second = _mm512_cmpgt_epi32_mask(second, _mm512_set1_epi32(all[LANE + 1])).count_ones();
        // To add is to join here; only, the compiler would count all joined ones in vectors, which takes three times as long.
        (order | (LANE as u64) << (4 * first)).wrapping_add((LANE as u64 + 1) << (4 * second))
    }
}

/// The first `count` lanes.
#[inline(always)]
fn part(count: usize) -> u16 {
    ((1u32 << count.min(LANES)) - 1) as u16
}
