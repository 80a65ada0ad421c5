//! Sixteen lanes in plain Rust: the twin that the others are tested against, and the path of CPUs without them.

use super::lanes::{LANES, Lanes};

/// Plain Rust; every CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scalar;

/// One operation on each pair of lanes.
#[inline(always)]
fn each(a: [f32; LANES], b: [f32; LANES], operation: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|lane| operation(a[lane], b[lane]))
}

impl Lanes for Scalar {
    type Vector = [f32; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Vector {
        *from
    }

    #[inline(always)]
    fn store(self, vector: Self::Vector, into: &mut [f32; LANES]) {
        *into = vector;
    }

    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn ge(self, a: Self::Vector, b: Self::Vector) -> u16 {
        (0..LANES).fold(0, |mask, lane| mask | u16::from(a[lane] >= b[lane]) << lane)
    }

    #[inline(always)]
    fn blend(self, mask: u16, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|lane| if mask >> lane & 1 == 1 { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Self::Vector) -> Self::Vector {
        shifted.map(|value| f32::from_bits((value.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }

    #[inline(always)]
    fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]) {
        *ranks = [0; LANES];
        for &other in values {
            for (rank, &value) in ranks.iter_mut().zip(values) {
                *rank += u32::from(other > value);
            }
        }
    }
}
