//! Sixteen lanes in two AVX2 registers.

#![allow(unsafe_code)]

mod multiply;

use std::arch::x86_64::*;

use super::lanes::{LANES, Lanes};
use super::multiply::Kernel;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2(());

pub(super) mod set {
    features!(is_x86_feature_detected, super::Avx2: "avx2" "fma" "f16c" "bmi1" "bmi2" "popcnt");
}

impl Avx2 {
    /// The proof, where the CPU gives it.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        set::has().then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe { set::compiled(self, kernel) }
    }
}

/// Lanes 0 to 7 and 8 to 15.
type Pair = (__m256, __m256);

// SAFETY of every block below: `self` proves that the CPU has the instructions; the intrinsics that touch memory get
// references to arrays of exactly sixteen four-byte values, and are the unaligned ones.
impl Lanes for Avx2 {
    type Vector = Pair;

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn store(self, vector: Pair, into: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(into.as_mut_ptr(), vector.0);
            _mm256_storeu_ps(into.as_mut_ptr().add(8), vector.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn ge(self, a: Pair, b: Pair) -> u16 {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a.0, b.0));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a.1, b.1));
            (low | high << 8) as u16
        }
    }

    #[inline(always)]
    fn blend(self, mask: u16, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let spread = |mask: u16| {
                let all = _mm256_set1_epi32(i32::from(mask));
                _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bits), bits))
            };
            (_mm256_blendv_ps(b.0, a.0, spread(mask)), _mm256_blendv_ps(b.1, a.1, spread(mask >> 8)))
        }
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let one = _mm256_set1_epi32(1.0f32.to_bits() as i32);
            let power = |half| {
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(half));
                _mm256_castsi256_ps(_mm256_add_epi32(exponent, one))
            };
            (power(shifted.0), power(shifted.1))
        }
    }

    #[inline(always)]
    fn compress(self, mask: u16, from: Pair, into: Pair, at: usize) -> Pair {
        let (low, high) = (mask & 0xff, mask >> 8);
        // SAFETY: see above.
        unsafe { append(high, from.1, append(low, from.0, into, at), at + low.count_ones() as usize) }
    }

    #[inline(always)]
    fn argsort(self, values: Pair, count: usize) -> u64 {
        // SAFETY: see above.
        unsafe {
            if count <= LANES / 2 {
                // The others are behind these.
                let low = places::<{ LANES / 2 }>(values).0;
                return order(low, 0) | 0xfedc_ba98 << 32;
            }
            let (low, high) = places::<LANES>(values);
            order(low, 0) | order(high, LANES as i32 / 2)
        }
    }

    #[inline(always)]
    fn permute(self, vector: Pair, order: u64) -> Pair {
        // SAFETY: see above.
        unsafe {
            let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
            let of = |order: u32| {
                // Only the lowest three bits of a lane count for one half; the fourth, brought to the top, chooses between both.
                let lanes = _mm256_srlv_epi32(_mm256_set1_epi32(order as i32), shifts);
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(lanes));
                let low = _mm256_permutevar8x32_ps(vector.0, lanes);
                _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(vector.1, lanes), upper)
            };
            (of(order as u32), of((order >> 32) as u32))
        }
    }

    #[inline(always)]
    fn ranked(self, values: Pair, rank: usize) -> Pair {
        // SAFETY: see above.
        unsafe {
            let (places, rank) = (places::<LANES>(values), _mm256_set1_epi32(rank as i32));
            let of = |value, place| _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(place, rank)));
            // In one lane it is, in the others nothing.
            let eight = _mm256_or_ps(of(values.0, places.0), of(values.1, places.1));
            let four = _mm256_or_ps(eight, _mm256_permute2f128_ps::<0x01>(eight, eight));
            let two = _mm256_or_ps(four, _mm256_permute_ps::<0b01_00_11_10>(four));
            let one = _mm256_or_ps(two, _mm256_permute_ps::<0b10_11_00_01>(two));
            (one, one)
        }
    }

    #[inline(always)]
    fn load_part(self, from: &[f32], fill: f32) -> Pair {
        // SAFETY: the masks name only lanes within the slice; the others are not read.
        unsafe {
            let (count, fill) = (_mm256_set1_epi32(from.len() as i32), _mm256_set1_ps(fill));
            let of = |first: usize| {
                let mask = _mm256_cmpgt_epi32(count, _mm256_add_epi32(numbers(), _mm256_set1_epi32(first as i32)));
                let some = _mm256_maskload_ps(from.as_ptr().wrapping_add(first), mask);
                _mm256_blendv_ps(fill, some, _mm256_castsi256_ps(mask))
            };
            (of(0), of(LANES / 2))
        }
    }

    #[inline(always)]
    fn fold_max(self, vector: Pair) -> f32 {
        // SAFETY: see above.
        unsafe {
            let eight = _mm256_max_ps(vector.0, vector.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn fold_sum(self, vector: Pair) -> f32 {
        // SAFETY: see above.
        unsafe {
            let eight = _mm256_add_ps(vector.0, vector.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]) {
        let all = self.load(values);
        // SAFETY: see above.
        unsafe {
            let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for &other in values {
                // A true comparison is −1 in every bit.
                let other = _mm256_set1_ps(other);
                low = _mm256_sub_epi32(low, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(all.0, other)));
                high = _mm256_sub_epi32(high, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(all.1, other)));
            }
            _mm256_storeu_si256(ranks.as_mut_ptr().cast(), low);
            _mm256_storeu_si256(ranks.as_mut_ptr().add(8).cast(), high);
        }
    }
}

/// 0 to 7.
#[inline(always)]
unsafe fn numbers() -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe { _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7) }
}

/// Of every mask the numbers of its bits, then zeros.
const BITS: [[u8; 8]; 256] = {
    let mut all = [[0; 8]; 256];
    let mut mask = 0;
    while mask < all.len() {
        let (mut bit, mut count) = (0, 0);
        while bit < 8 {
            if mask >> bit & 1 == 1 {
                all[mask][count] = bit as u8;
                count += 1;
            }
            bit += 1;
        }
        mask += 1;
    }
    all
};

/// The first `at` lanes of `into`, then those of the mask, of which there are at most eight.
#[inline(always)]
unsafe fn append(mask: u16, from: __m256, into: Pair, at: usize) -> Pair {
    // SAFETY: the caller has the instructions; an entry of the table has eight bytes.
    unsafe {
        // Turned by `at` lanes the first one stands where it belongs in one of both halves.
        let lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(BITS[usize::from(mask & 0xff)].as_ptr().cast()));
        let before = _mm256_set1_epi32(at as i32);
        let turned = _mm256_permutevar8x32_epi32(lanes, _mm256_sub_epi32(numbers(), before));
        let kept = _mm256_permutevar8x32_ps(from, turned);
        let low = _mm256_cmpgt_epi32(before, numbers());
        let high = _mm256_cmpgt_epi32(before, _mm256_add_epi32(numbers(), _mm256_set1_epi32(8)));
        let low = _mm256_blendv_ps(kept, into.0, _mm256_castsi256_ps(low));
        (low, _mm256_blendv_ps(kept, into.1, _mm256_castsi256_ps(high)))
    }
}

/// −1 in the lanes after each lane, 0 in the others.
const AFTER: [[i32; 8]; 8] = {
    let mut after = [[0; 8]; 8];
    let mut at = 0;
    while at < 64 {
        after[at / 8][at % 8] = if at % 8 > at / 8 { -1 } else { 0 };
        at += 1;
    }
    after
};

/// For each lane how many of the first `COUNT` come before it by falling value, equals in the order they stand in.
#[inline(always)]
unsafe fn places<const COUNT: usize>(values: Pair) -> (__m256i, __m256i) {
    // SAFETY: the caller has the instructions; loads are from arrays of eight four-byte values.
    unsafe {
        // As whole numbers with the same order (and one zero), of which one less makes room for equals.
        let key = |half| {
            let bits = _mm256_castps_si256(_mm256_add_ps(half, _mm256_setzero_ps()));
            _mm256_xor_si256(bits, _mm256_srli_epi32::<1>(_mm256_srai_epi32::<31>(bits)))
        };
        let keys = [key(values.0), key(values.1)];
        let mut all = [0i32; LANES];
        _mm256_storeu_si256(all.as_mut_ptr().cast(), keys[0]);
        _mm256_storeu_si256(all.as_mut_ptr().add(8).cast(), keys[1]);
        let less = _mm256_add_epi32(keys[1], _mm256_set1_epi32(-1));
        let mut places = [_mm256_setzero_si256(); 2];
        for at in 0..COUNT {
            let (other, after) = (_mm256_set1_epi32(all[at]), _mm256_loadu_si256(AFTER[at % 8].as_ptr().cast()));
            let than = match at < 8 {
                true => [_mm256_add_epi32(keys[0], after), less],
                false => [keys[0], _mm256_add_epi32(keys[1], after)],
            };
            // A true comparison is −1.
            for half in 0..COUNT.div_ceil(8) {
                places[half] = _mm256_sub_epi32(places[half], _mm256_cmpgt_epi32(other, than[half]));
            }
        }
        (places[0], places[1])
    }
}

/// The numbers of eight lanes from `first` on, four bits each, at their places.
#[inline(always)]
unsafe fn order(places: __m256i, first: i32) -> u64 {
    // SAFETY: the caller has the instructions.
    unsafe {
        let (by, lanes) = (_mm256_slli_epi32::<2>(places), _mm256_add_epi32(numbers(), _mm256_set1_epi32(first)));
        let of = |lanes, by| _mm256_sllv_epi64(_mm256_cvtepu32_epi64(lanes), _mm256_cvtepu32_epi64(by));
        let low = of(_mm256_castsi256_si128(lanes), _mm256_castsi256_si128(by));
        let high = of(_mm256_extracti128_si256::<1>(lanes), _mm256_extracti128_si256::<1>(by));
        let four = _mm256_or_si256(low, high);
        let two = _mm_or_si128(_mm256_castsi256_si128(four), _mm256_extracti128_si256::<1>(four));
        (_mm_cvtsi128_si64(two) | _mm_extract_epi64::<1>(two)) as u64
    }
}
