//! What products need of sixteen lanes in two AVX2 registers.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Avx2, Pair};
use crate::simd::dtype::HEAD;
use crate::simd::lanes::LANES;
use crate::simd::multiply::{Kernel, LINE_BYTES, Line, Multiply};

// SAFETY of every block below: `self` proves that the CPU has the instructions; the intrinsics that touch memory get references to as many bytes as they touch.
impl Multiply for Avx2 {
    const ALONG: bool = true;
    const FOLDS: bool = true;

    #[inline]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn line(self, from: &Line) -> Pair {
        // SAFETY: see above; a line is aligned.
        unsafe { (_mm256_load_ps(from.0.as_ptr().cast()), _mm256_load_ps(from.0.as_ptr().add(8).cast())) }
    }

    #[inline(always)]
    fn store_line(self, vector: Pair, into: &mut Line) {
        // SAFETY: see above; a line is aligned.
        unsafe {
            _mm256_store_ps(into.0.as_mut_ptr().cast(), vector.0);
            _mm256_store_ps(into.0.as_mut_ptr().add(8).cast(), vector.1);
        }
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; LINE_BYTES]) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_ps(from.as_ptr().cast()), _mm256_loadu_ps(from.as_ptr().add(32).cast())) }
    }

    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, sum: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_fmadd_ps(a.0, b.0, sum.0), _mm256_fmadd_ps(a.1, b.1, sum.1)) }
    }

    #[inline(always)]
    fn widen_u8(self, from: [u8; LANES]) -> Pair {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.as_ptr().cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.as_ptr().add(8).cast()));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }

    #[inline(always)]
    fn and(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_and_ps(a.0, b.0), _mm256_and_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn xor(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_xor_ps(a.0, b.0), _mm256_xor_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn shift_words(self, a: Pair, by: u32) -> Pair {
        // SAFETY: see above.
        unsafe {
            let by = _mm_cvtsi32_si128(by as i32);
            let of = |half| _mm256_castsi256_ps(_mm256_srl_epi32(_mm256_castps_si256(half), by));
            (of(a.0), of(a.1))
        }
    }

    #[inline(always)]
    fn shift_words_left(self, a: Pair, by: u32) -> Pair {
        // SAFETY: see above.
        unsafe {
            let by = _mm_cvtsi32_si128(by as i32);
            let of = |half| _mm256_castsi256_ps(_mm256_sll_epi32(_mm256_castps_si256(half), by));
            (of(a.0), of(a.1))
        }
    }

    #[inline(always)]
    fn convert(self, integers: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |half| _mm256_cvtepi32_ps(_mm256_castps_si256(half));
            (of(integers.0), of(integers.1))
        }
    }

    #[inline(always)]
    fn halves(self, low: &[u8; 32], high: &[u8; 32]) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_ps(low.as_ptr().cast()), _mm256_loadu_ps(high.as_ptr().cast())) }
    }

    #[inline(always)]
    fn eights(self, first: f32, second: f32) -> Pair {
        // SAFETY: see above.
        unsafe { (_mm256_set1_ps(first), _mm256_set1_ps(second)) }
    }

    #[inline(always)]
    fn quads(self, from: &[f32; 4]) -> Pair {
        // SAFETY: see above; four numbers are read.
        unsafe {
            let all = _mm_loadu_ps(from.as_ptr());
            let low = _mm256_set_m128(_mm_permute_ps::<0x55>(all), _mm_permute_ps::<0x00>(all));
            (low, _mm256_set_m128(_mm_permute_ps::<0xff>(all), _mm_permute_ps::<0xaa>(all)))
        }
    }

    #[inline(always)]
    fn nibbles(self, from: &[u8; 32]) -> Pair {
        // SAFETY: see above.
        unsafe {
            let (all, mask) = (_mm256_loadu_si256(from.as_ptr().cast()), _mm256_set1_epi8(0x0f));
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(all), mask);
            (_mm256_castsi256_ps(_mm256_and_si256(all, mask)), _mm256_castsi256_ps(high))
        }
    }

    #[inline(always)]
    fn nibbles_of_two(self, first: &[u8; 16], second: &[u8; 16]) -> Pair {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi8(0x0f);
            let of = |from: &[u8; 16]| {
                let all = _mm_loadu_si128(from.as_ptr().cast());
                _mm256_castsi256_ps(_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(all), all), mask))
            };
            (of(first), of(second))
        }
    }

    #[inline(always)]
    fn fives(self, low: &[u8; 32], high: &[u8; 32], pair: usize) -> Pair {
        // SAFETY: see above.
        unsafe {
            let (all, mask) = (_mm256_loadu_si256(low.as_ptr().cast()), _mm256_set1_epi8(0x0f));
            let (high, sixteen) = (_mm256_loadu_si256(high.as_ptr().cast()), _mm256_set1_epi8(0x10));
            let first = _mm256_set1_epi8((1u8 << (2 * pair)) as i8);
            let join = |nibbles, bit| {
                let has = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
                _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(nibbles, mask), _mm256_and_si256(has, sixteen)))
            };
            (join(all, first), join(_mm256_srli_epi16::<4>(all), _mm256_add_epi8(first, first)))
        }
    }

    #[inline(always)]
    fn sixes(self, low: &[u8; LINE_BYTES], high: &[u8; 32], second: bool) -> Pair {
        // SAFETY: see above.
        unsafe {
            let (four, two) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi8(0x03));
            let mut nibbles =
                [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(low.as_ptr().add(32).cast())];
            let mut pairs = _mm256_loadu_si256(high.as_ptr().cast());
            if second {
                nibbles = [_mm256_srli_epi16::<4>(nibbles[0]), _mm256_srli_epi16::<4>(nibbles[1])];
                pairs = _mm256_srli_epi16::<4>(pairs);
            }
            let join = |nibbles, pairs| {
                let pairs = _mm256_slli_epi16::<4>(_mm256_and_si256(pairs, two));
                _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(nibbles, four), pairs))
            };
            (join(nibbles[0], pairs), join(nibbles[1], _mm256_srli_epi16::<2>(pairs)))
        }
    }

    #[inline(always)]
    fn sizes(self, a: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |half| _mm256_castsi256_ps(_mm256_abs_epi8(_mm256_castps_si256(half)));
            (of(a.0), of(a.1))
        }
    }

    #[inline(always)]
    fn with_signs(self, a: Pair, by: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |a, by| _mm256_castsi256_ps(_mm256_sign_epi8(_mm256_castps_si256(a), _mm256_castps_si256(by)));
            (of(a.0, by.0), of(a.1, by.1))
        }
    }

    #[inline(always)]
    fn dot_small(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above. Two products of at most 128 · 127 fit sixteen bits.
        unsafe {
            let one = _mm256_set1_epi16(1);
            let of = |a, b| {
                let pairs = _mm256_maddubs_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
                _mm256_castsi256_ps(_mm256_madd_epi16(pairs, one))
            };
            (of(a.0, b.0), of(a.1, b.1))
        }
    }

    #[inline(always)]
    fn small_products(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |a, b| _mm256_castsi256_ps(_mm256_maddubs_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
            (of(a.0, b.0), of(a.1, b.1))
        }
    }

    #[inline(always)]
    fn add_halves(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |a, b| _mm256_castsi256_ps(_mm256_add_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
            (of(a.0, b.0), of(a.1, b.1))
        }
    }

    #[inline(always)]
    fn fold_halves(self, a: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let one = _mm256_set1_epi16(1);
            let of = |half| _mm256_castsi256_ps(_mm256_madd_epi16(_mm256_castps_si256(half), one));
            (of(a.0), of(a.1))
        }
    }

    #[inline(always)]
    fn add_words(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |a, b| _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
            (of(a.0, b.0), of(a.1, b.1))
        }
    }

    #[inline(always)]
    fn fours(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (sums_of_two(sums_of_two(a.0, a.1), sums_of_two(b.0, b.1)), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    fn small_fours(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe { (sums_of_two(small_sums_of_two(a.0, a.1), small_sums_of_two(b.0, b.1)), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    fn eights_of_fours(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let [a, b] = [_mm256_castps_si256(a.0), _mm256_castps_si256(b.0)];
            let low = _mm256_permute2x128_si256::<0x20>(a, b);
            let sums = _mm256_add_epi32(low, _mm256_permute2x128_si256::<0x31>(a, b));
            (_mm256_castsi256_ps(sums), _mm256_setzero_ps())
        }
    }

    #[inline(always)]
    fn in_order(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            (_mm256_permutevar8x32_ps(a.0, order), _mm256_permutevar8x32_ps(b.0, order))
        }
    }

    #[inline(always)]
    fn scales_and_offsets(self, head: &[u8; HEAD]) -> Pair {
        // SAFETY: see above; sixteen bytes are read.
        unsafe {
            let head = _mm_loadu_si128(head.as_ptr().cast());
            // Words 1 and 2 have six bits of the first four groups, and above them two more of the last four, whose lower bits are in word 3.
            let low = _mm_shuffle_epi32::<0b11_10_11_01>(head);
            let high = _mm_shuffle_epi32::<0b10_10_01_01>(head);
            let low = _mm_and_si128(
                _mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 0, 4)),
                _mm_setr_epi32(0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f),
            );
            let high = _mm_and_si128(_mm_srli_epi32::<2>(high), _mm_setr_epi32(0, 0x3030_3030, 0, 0x3030_3030));
            let all = _mm_or_si128(low, high);
            let scales = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all));
            let offsets = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(all, all)));
            let halves = _mm_cvtph_ps(head);
            let (scale, least) = (_mm256_broadcastss_ps(halves), _mm256_broadcastss_ps(_mm_movehdup_ps(halves)));
            (_mm256_mul_ps(scales, scale), _mm256_mul_ps(offsets, least))
        }
    }

    #[inline(always)]
    fn widen_i8(self, from: [u8; LANES]) -> Pair {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().add(8).cast()));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }

    #[inline(always)]
    fn widen_bytes(self, bytes: Pair) -> [Pair; 4] {
        // SAFETY: see above.
        unsafe {
            let of = |sixteen: __m128i| {
                let low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(sixteen));
                (low, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(sixteen))))
            };
            let [low, high] = [_mm256_castps_si256(bytes.0), _mm256_castps_si256(bytes.1)];
            let (first, third) = (of(_mm256_castsi256_si128(low)), of(_mm256_castsi256_si128(high)));
            [first, of(_mm256_extracti128_si256::<1>(low)), third, of(_mm256_extracti128_si256::<1>(high))]
        }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], a: Pair) -> Pair {
        // SAFETY: see above; the table has sixteen bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            let of = |half| _mm256_castsi256_ps(_mm256_shuffle_epi8(table, _mm256_castps_si256(half)));
            (of(a.0), of(a.1))
        }
    }

    #[inline(always)]
    fn low_halves(self, a: Pair) -> Pair {
        // SAFETY: see above.
        unsafe {
            let of = |words| {
                let low = _mm256_and_si256(_mm256_castps_si256(words), _mm256_set1_epi32(0xffff));
                let packed = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packus_epi32(low, low));
                _mm256_cvtph_ps(_mm256_castsi256_si128(packed))
            };
            (of(a.0), of(a.1))
        }
    }

    #[inline(always)]
    fn half(self, from: [u8; 2]) -> f32 {
        // SAFETY: see above.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(from))))) }
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u8; 32]) -> Pair {
        // SAFETY: see above.
        unsafe {
            let low = _mm_loadu_si128(from.as_ptr().cast());
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(16).cast())))
        }
    }

    #[inline(always)]
    fn widen_bf16(self, from: &[u8; 32]) -> Pair {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().add(16).cast()));
            let [low, high] = [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)];
            (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }

    #[inline(always)]
    fn transpose(self, rows: [Pair; LANES]) -> [Pair; LANES] {
        let mut columns = rows;
        for half in 0..2 {
            let (mut left, mut right) = ([rows[0].0; 8], [rows[0].0; 8]);
            for i in 0..8 {
                (left[i], right[i]) = rows[8 * half + i];
            }
            // SAFETY: see above.
            let (left, right) = unsafe { (transposed(left), transposed(right)) };
            for i in 0..8 {
                if half == 0 {
                    (columns[i].0, columns[8 + i].0) = (left[i], right[i]);
                } else {
                    (columns[i].1, columns[8 + i].1) = (left[i], right[i]);
                }
            }
        }
        columns
    }

    #[inline(always)]
    fn transpose_4(self, rows: [&[u8; 16]; LANES]) -> [Pair; 4] {
        // SAFETY: see above; every row has sixteen bytes.
        let (low, high) = unsafe { (quarters(&rows[..8]), quarters(&rows[8..])) };
        [(low[0], high[0]), (low[1], high[1]), (low[2], high[2]), (low[3], high[3])]
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: see above; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Sums of each two words: of the lower halves of `a` and `b`, then of the upper ones.
#[inline(always)]
unsafe fn sums_of_two(a: __m256, b: __m256) -> __m256 {
    // SAFETY: the caller has the instructions.
    unsafe { _mm256_castsi256_ps(_mm256_hadd_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b))) }
}

/// The same of words that have sixteen bits.
#[inline(always)]
unsafe fn small_sums_of_two(a: __m256, b: __m256) -> __m256 {
    // SAFETY: as above.
    unsafe {
        let both = _mm256_packs_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
        _mm256_castsi256_ps(_mm256_madd_epi16(both, _mm256_set1_epi16(1)))
    }
}

/// Word `i` of row `j` as word `j` of vector `i`.
#[inline(always)]
unsafe fn transposed(rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller has the instructions.
    unsafe {
        let (mut one, mut two) = (rows, rows);
        for i in 0..4 {
            one[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            one[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..2 {
            for half in 0..2 {
                let (a, b) = (_mm256_castps_pd(one[4 * i + half]), _mm256_castps_pd(one[4 * i + 2 + half]));
                two[4 * i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                two[4 * i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            }
        }
        for i in 0..4 {
            one[i] = _mm256_permute2f128_ps::<0x20>(two[i], two[4 + i]);
            one[4 + i] = _mm256_permute2f128_ps::<0x31>(two[i], two[4 + i]);
        }
        one
    }
}

/// Word `i` of eight rows as vector `i`.
#[inline(always)]
unsafe fn quarters(rows: &[&[u8; 16]]) -> [__m256; 4] {
    // SAFETY: the caller has the instructions; every row has sixteen bytes.
    unsafe {
        let mut two = [_mm256_setzero_ps(); 4];
        for i in 0..4 {
            two[i] = _mm256_loadu2_m128(rows[i + 4].as_ptr().cast(), rows[i].as_ptr().cast());
        }
        let (a, b) = (_mm256_unpacklo_ps(two[0], two[1]), _mm256_unpacklo_ps(two[2], two[3]));
        let (c, d) = (_mm256_unpackhi_ps(two[0], two[1]), _mm256_unpackhi_ps(two[2], two[3]));
        let (a, b, c, d) = (_mm256_castps_pd(a), _mm256_castps_pd(b), _mm256_castps_pd(c), _mm256_castps_pd(d));
        [
            _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)),
            _mm256_castpd_ps(_mm256_unpacklo_pd(c, d)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)),
        ]
    }
}
