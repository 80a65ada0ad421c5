//! Sixteen lanes in four NEON registers.

#![allow(unsafe_code)]

use std::arch::aarch64::*;

use super::lanes::{LANES, Lanes};
use super::multiply::{Kernel, Multiply};

/// Proof that the CPU has NEON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neon(());

pub(super) mod set {
    features!(is_aarch64_feature_detected, super::Neon: "neon");
}

impl Neon {
    /// The proof, where the CPU gives it.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        set::has().then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the feature.
        unsafe { set::compiled(self, kernel) }
    }
}

/// Lanes 0 to 3, 4 to 7, 8 to 11, 12 to 15.
type Quad = [float32x4_t; 4];

// SAFETY of every block below: `self` proves that the CPU has the instructions; the intrinsics that touch memory get
// pointers to four values inside arrays of exactly sixteen.
impl Lanes for Neon {
    type Vector = Quad;

    #[inline(always)]
    fn splat(self, value: f32) -> Quad {
        // SAFETY: see above.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Quad {
        // SAFETY: see above.
        std::array::from_fn(|part| unsafe { vld1q_f32(from.as_ptr().add(4 * part)) })
    }

    #[inline(always)]
    fn store(self, vector: Quad, into: &mut [f32; LANES]) {
        for (part, vector) in vector.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe { vst1q_f32(into.as_mut_ptr().add(4 * part), vector) }
        }
    }

    #[inline(always)]
    fn add(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: see above.
        std::array::from_fn(|part| unsafe { vaddq_f32(a[part], b[part]) })
    }

    #[inline(always)]
    fn sub(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: see above.
        std::array::from_fn(|part| unsafe { vsubq_f32(a[part], b[part]) })
    }

    #[inline(always)]
    fn mul(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: see above.
        std::array::from_fn(|part| unsafe { vmulq_f32(a[part], b[part]) })
    }

    #[inline(always)]
    fn div(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: see above.
        std::array::from_fn(|part| unsafe { vdivq_f32(a[part], b[part]) })
    }

    #[inline(always)]
    fn max(self, a: Quad, b: Quad) -> Quad {
        // SAFETY: see above.
        std::array::from_fn(|part| unsafe { vmaxq_f32(a[part], b[part]) })
    }

    #[inline(always)]
    fn ge(self, a: Quad, b: Quad) -> u16 {
        const BITS: [u32; 4] = [1, 2, 4, 8];
        (0..4).fold(0, |mask, part| {
            // SAFETY: see above; `BITS` has four values.
            let bits = unsafe { vaddvq_u32(vandq_u32(vcgeq_f32(a[part], b[part]), vld1q_u32(BITS.as_ptr()))) };
            mask | (bits as u16) << (4 * part)
        })
    }

    #[inline(always)]
    fn blend(self, mask: u16, a: Quad, b: Quad) -> Quad {
        const BITS: [u32; 4] = [1, 2, 4, 8];
        std::array::from_fn(|part| {
            // SAFETY: see above; `BITS` has four values.
            unsafe {
                let set = vtstq_u32(vdupq_n_u32(u32::from(mask >> (4 * part))), vld1q_u32(BITS.as_ptr()));
                vbslq_f32(set, a[part], b[part])
            }
        })
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Quad) -> Quad {
        // SAFETY: see above.
        shifted.map(|part| unsafe {
            let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(part));
            vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(1.0f32.to_bits())))
        })
    }

    #[inline(always)]
    fn fold_max(self, vector: Quad) -> f32 {
        // SAFETY: see above.
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(vector[0], vector[2]), vmaxq_f32(vector[1], vector[3]))) }
    }

    #[inline(always)]
    fn fold_sum(self, vector: Quad) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = vaddq_f32(vaddq_f32(vector[0], vector[2]), vaddq_f32(vector[1], vector[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }

    #[inline(always)]
    fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]) {
        let all = self.load(values);
        // SAFETY: see above; a true comparison is all ones, which is −1.
        unsafe {
            let mut sums = [vdupq_n_u32(0); 4];
            for &other in values {
                let other = vdupq_n_f32(other);
                for (sum, &part) in sums.iter_mut().zip(&all) {
                    *sum = vsubq_u32(*sum, vcgtq_f32(other, part));
                }
            }
            for (part, sum) in sums.into_iter().enumerate() {
                vst1q_u32(ranks.as_mut_ptr().add(4 * part), sum);
            }
        }
    }
}

// SAFETY of every block below: as above.
impl Multiply for Neon {
    #[inline]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn mul_add(self, a: Quad, b: Quad, sum: Quad) -> Quad {
        let mut sums = sum;
        for part in 0..4 {
            // SAFETY: see above.
            sums[part] = unsafe { vfmaq_f32(sum[part], a[part], b[part]) };
        }
        sums
    }
}
