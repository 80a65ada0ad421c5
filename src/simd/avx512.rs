//! Sixteen lanes in one AVX-512 register.
//!
//! A long file because it is one table: each operation of `Lanes` and `Multiply` once, as the instructions of this set.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::lanes::{LANES, Lanes};
use super::multiply::{Kernel, LINE_BYTES, Line, Multiply, bytes_dot, narrowed, pairs_dot};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL and what came before them; with `DOTS` also BF16 and VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512<const DOTS: bool>(());

pub(super) mod plain {
    features!(is_x86_feature_detected, super::Avx512<false>:
        "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx2" "fma" "f16c" "bmi1" "bmi2" "lzcnt" "popcnt");
}

pub(super) mod dots {
    features!(is_x86_feature_detected, super::Avx512<true>:
        "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512bf16" "avx512vnni" "avx2" "fma" "f16c" "bmi1" "bmi2" "lzcnt" "popcnt");
}

impl<const DOTS: bool> Avx512<DOTS> {
    /// The proof, where the CPU gives it.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        let has = if DOTS { dots::has() } else { plain::has() };
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe {
            match DOTS {
                true => dots::compiled(Avx512(()), kernel),
                false => plain::compiled(Avx512(()), kernel),
            }
        }
    }
}

// SAFETY of every block below: `self` proves that the CPU has the instructions; the intrinsics that touch memory get
// references to arrays of exactly sixteen four-byte values, and are the unaligned ones.
impl<const DOTS: bool> Lanes for Avx512<DOTS> {
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
    fn compress(self, mask: u16, from: __m512, into: __m512, at: usize) -> __m512 {
        let behind = (0xffff_u32 << at.min(LANES)) as u16;
        // In registers alone: a load right after stores that it overlaps in part has to wait for them.
        // SAFETY: see above.
        unsafe { _mm512_mask_expand_ps(into, behind, _mm512_maskz_compress_ps(mask, from)) }
    }

    #[inline(always)]
    fn argsort(self, values: __m512, count: usize) -> u64 {
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
        let lane = self.argsort(values, LANES) >> (4 * rank);
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

// SAFETY of every block below: as above; `DOTS` proves BF16 and VNNI, without it their methods are the trait's own. The
// intrinsics that touch memory get references to as many bytes as they touch; a prefetch may name any address.
impl<const DOTS: bool> Multiply for Avx512<DOTS> {
    const WIDE: bool = true;
    const DOTS: bool = DOTS;
    const ALONG: bool = !DOTS;

    #[inline]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn words(self, vector: __m512) -> [u32; LANES] {
        let mut words = [0; LANES];
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(words.as_mut_ptr().cast(), vector) };
        words
    }

    #[inline(always)]
    fn of_words(self, words: [u32; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(words.as_ptr().cast()) }
    }

    #[inline(always)]
    fn line(self, from: &Line) -> __m512 {
        // SAFETY: see above; a line is aligned.
        unsafe { _mm512_load_ps(from.0.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_line(self, vector: __m512, into: &mut Line) {
        // SAFETY: see above; a line is aligned.
        unsafe { _mm512_store_ps(into.0.as_mut_ptr().cast(), vector) }
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; LINE_BYTES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    fn dot_pairs(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        if !DOTS {
            return self.of_words(pairs_dot(self.words(a), self.words(b), self.words(sum)));
        }
        // SAFETY: see above; both types are the same 512 bits.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }

    #[inline(always)]
    fn dot_bytes(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        if !DOTS {
            return self.of_words(bytes_dot(self.words(a), self.words(b), self.words(sum)));
        }
        // SAFETY: see above.
        unsafe {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum), a, b))
        }
    }

    #[inline(always)]
    fn convert(self, integers: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(integers)) }
    }

    #[inline(always)]
    fn and(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_and_ps(a, b) }
    }

    #[inline(always)]
    fn xor(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_xor_ps(a, b) }
    }

    #[inline(always)]
    fn shift_right(self, a: __m512, by: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_srlv_epi16(_mm512_castps_si512(a), _mm512_castps_si512(by))) }
    }

    #[inline(always)]
    fn shift_left_4(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi16::<4>(_mm512_castps_si512(a))) }
    }

    #[inline(always)]
    fn shift_words(self, a: __m512, by: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_srlv_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(by as i32))) }
    }

    #[inline(always)]
    fn shift_words_left(self, a: __m512, by: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_sllv_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(by as i32))) }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], a: __m512) -> __m512 {
        // SAFETY: see above; the table has sixteen bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_shuffle_epi8(table, _mm512_castps_si512(a)))
        }
    }

    #[inline(always)]
    fn low_halves(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_castps_si512(a))) }
    }

    #[inline(always)]
    fn narrow_bytes(self, a: __m512) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; there are sixteen bytes to write.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(a))) };
        bytes
    }

    #[inline(always)]
    fn halves(self, low: &[u8; 32], high: &[u8; 32]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let low = _mm512_castps256_ps512(_mm256_loadu_ps(low.as_ptr().cast()));
            _mm512_insertf32x8::<1>(low, _mm256_loadu_ps(high.as_ptr().cast()))
        }
    }

    #[inline(always)]
    fn eights(self, first: f32, second: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second)) }
    }

    #[inline(always)]
    fn quads(self, from: &[f32; 4]) -> __m512 {
        // SAFETY: see above; four numbers are read.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(from.as_ptr())))
        }
    }

    #[inline(always)]
    fn eights_of(self, vector: __m512, _: &[f32; LANES], pair: usize) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(2 * pair as i32)), vector)
        }
    }

    #[inline(always)]
    fn quads_of(self, vector: __m512, _: &[f32; LANES], pair: usize) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * pair as i32)), vector)
        }
    }

    #[inline(always)]
    fn sizes(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_abs_epi8(_mm512_castps_si512(a))) }
    }

    #[inline(always)]
    fn with_signs(self, a: __m512, by: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let (a, by) = (_mm512_castps_si512(a), _mm512_castps_si512(by));
            let turned = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(by), _mm512_setzero_si512(), a);
            _mm512_castsi512_ps(_mm512_maskz_mov_epi8(_mm512_test_epi8_mask(by, by), turned))
        }
    }

    #[inline(always)]
    fn dot_small(self, a: __m512, b: __m512) -> __m512 {
        if DOTS {
            return self.dot_bytes(a, b, self.splat(0.0));
        }
        // SAFETY: see above. Two products of at most 128 · 127 fit sixteen bits.
        unsafe {
            let pairs = _mm512_maddubs_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b));
            _mm512_castsi512_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn small_products(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_maddubs_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b))) }
    }

    #[inline(always)]
    fn add_halves(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_add_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b))) }
    }

    #[inline(always)]
    fn fold_halves(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_madd_epi16(_mm512_castps_si512(a), _mm512_set1_epi16(1))) }
    }

    #[inline(always)]
    fn add_words(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))) }
    }

    #[inline(always)]
    fn widen_u8(self, from: [u8; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn widen_i8(self, from: [u8; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn widen_bytes(self, bytes: __m512) -> [__m512; 4] {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm512_castps_si512(bytes);
            [
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(bytes))),
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<1>(bytes))),
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<2>(bytes))),
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<3>(bytes))),
            ]
        }
    }

    #[inline(always)]
    fn half(self, from: [u8; 2]) -> f32 {
        // SAFETY: see above.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(from))))) }
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u8; 32]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn widen_bf16(self, from: &[u8; 32]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn narrow_bf16(self, low: __m512, high: __m512) -> __m512 {
        if !DOTS {
            return self.of_words(narrowed(self.words(low), self.words(high)));
        }
        // SAFETY: see above; both types are the same 512 bits.
        unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) }
    }

    #[inline(always)]
    fn fold_sums(self, v: [__m512; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // Pairs of vectors become one, four times; after the first two steps a lane of 128 bits holds four vectors' sums.
            let [a, b, c, d] = [
                quad([v[0], v[1], v[2], v[3]]),
                quad([v[4], v[5], v[6], v[7]]),
                quad([v[8], v[9], v[10], v[11]]),
                quad([v[12], v[13], v[14], v[15]]),
            ];
            let (low, high) = (lanes_sum(a, b), lanes_sum(c, d));
            lanes_sum(low, high)
        }
    }

    #[inline(always)]
    fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
        // SAFETY: see above.
        unsafe { transposed(rows) }
    }

    #[inline(always)]
    fn transpose_4(self, rows: [&[u8; 16]; LANES]) -> [__m512; 4] {
        // SAFETY: see above; every row has sixteen bytes.
        unsafe {
            let quarters = [quarter(rows, 0), quarter(rows, 1), quarter(rows, 2), quarter(rows, 3)];
            let (a, b) = (_mm512_unpacklo_ps(quarters[0], quarters[1]), _mm512_unpacklo_ps(quarters[2], quarters[3]));
            let (c, d) = (_mm512_unpackhi_ps(quarters[0], quarters[1]), _mm512_unpackhi_ps(quarters[2], quarters[3]));
            let (a, b, c, d) = (_mm512_castps_pd(a), _mm512_castps_pd(b), _mm512_castps_pd(c), _mm512_castps_pd(d));
            [
                _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: see above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Rows `i`, `i + 4`, `i + 8` and `i + 12` in the four lanes of 128 bits.
#[inline(always)]
unsafe fn quarter(rows: [&[u8; 16]; LANES], i: usize) -> __m512 {
    // SAFETY: the caller has the instructions; every row has sixteen bytes.
    unsafe {
        let low = _mm512_castps128_ps512(_mm_loadu_ps(rows[i].as_ptr().cast()));
        let low = _mm512_insertf32x4::<1>(low, _mm_loadu_ps(rows[i + 4].as_ptr().cast()));
        let low = _mm512_insertf32x4::<2>(low, _mm_loadu_ps(rows[i + 8].as_ptr().cast()));
        _mm512_insertf32x4::<3>(low, _mm_loadu_ps(rows[i + 12].as_ptr().cast()))
    }
}

/// The sums of four vectors, four parts of each: lane `4 i + j` holds part `i` of vector `j`.
#[inline(always)]
unsafe fn quad(v: [__m512; 4]) -> __m512 {
    // SAFETY: the caller has the instructions.
    unsafe {
        let low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        let high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        let (low, high) = (_mm512_castps_pd(low), _mm512_castps_pd(high));
        let even = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        _mm512_add_ps(even, _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)))
    }
}

/// Neighbouring lanes of 128 bits added: those of `a`, then those of `b`.
#[inline(always)]
unsafe fn lanes_sum(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller has the instructions.
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)) }
}

/// Sixteen rows of sixteen words as columns: by pairs of words, pairs of pairs, and twice by lanes of 128 bits.
#[inline(always)]
unsafe fn transposed(rows: [__m512; LANES]) -> [__m512; LANES] {
    // SAFETY: the caller has the instructions.
    unsafe {
        let (mut one, mut two) = (rows, rows);
        for i in 0..8 {
            one[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            one[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..4 {
            for half in 0..2 {
                let (a, b) = (_mm512_castps_pd(one[4 * i + half]), _mm512_castps_pd(one[4 * i + 2 + half]));
                two[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                two[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        for i in 0..2 {
            for j in 0..4 {
                one[8 * i + j] = _mm512_shuffle_f32x4::<0x88>(two[8 * i + j], two[8 * i + 4 + j]);
                one[8 * i + 4 + j] = _mm512_shuffle_f32x4::<0xdd>(two[8 * i + j], two[8 * i + 4 + j]);
            }
        }
        for j in 0..8 {
            two[j] = _mm512_shuffle_f32x4::<0x88>(one[j], one[8 + j]);
            two[8 + j] = _mm512_shuffle_f32x4::<0xdd>(one[j], one[8 + j]);
        }
        two
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
