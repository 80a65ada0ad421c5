//! Rows that meet bytes, whatever an instruction set has.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::simd::lanes::Lanes;
use crate::simd::product::{Convert, Form, Rows, Workspace};
use crate::simd::scalar::Scalar;
use crate::simd::tests::naive;

/// Plain Rust that does as sets do with products of bytes (`DOTS`) or with sums of neighbours (`FOLDS`), or with neither.
#[derive(Clone, Copy)]
struct As<const DOTS: bool, const FOLDS: bool>;

impl<const DOTS: bool, const FOLDS: bool> Lanes for As<DOTS, FOLDS> {
    type Vector = [f32; LANES];

    fn splat(self, value: f32) -> Self::Vector {
        Scalar.splat(value)
    }

    fn load(self, from: &[f32; LANES]) -> Self::Vector {
        *from
    }

    fn store(self, vector: Self::Vector, into: &mut [f32; LANES]) {
        *into = vector;
    }

    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        Scalar.add(a, b)
    }

    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        Scalar.sub(a, b)
    }

    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        Scalar.mul(a, b)
    }

    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        Scalar.div(a, b)
    }

    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        Scalar.max(a, b)
    }

    fn ge(self, a: Self::Vector, b: Self::Vector) -> u16 {
        Scalar.ge(a, b)
    }

    fn blend(self, mask: u16, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        Scalar.blend(mask, a, b)
    }

    fn power_of_two(self, shifted: Self::Vector) -> Self::Vector {
        Lanes::power_of_two(Scalar, shifted)
    }

    fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]) {
        Scalar.ranks(values, ranks);
    }
}

impl<const DOTS: bool, const FOLDS: bool> Multiply for As<DOTS, FOLDS> {
    const DOTS: bool = DOTS;
    const FOLDS: bool = FOLDS;

    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

/// What sets do that this CPU does not have is held against the definition too.
#[test]
fn rows_meet_bytes_whatever_a_set_has() {
    let (mut rng, mut workspace) = (ChaCha8Rng::seed_from_u64(5), Workspace::default());
    for dtype in [Dtype::Q8_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K, Dtype::Mxfp4] {
        for columns in [1056, 512, 256, 96, 32].into_iter().filter(|columns| columns % dtype.block() == 0) {
            let stored = naive::drawn(&mut rng, dtype.name(), BLOCK * columns, 1.0);
            let weights = naive::decoded(dtype.name(), &stored);
            let size = dtype.row_bytes(columns).unwrap();
            let row = |at: usize| &stored[at * size..][..size];
            let input: Vec<f32> = (0..TOKENS * columns).map(|_| rng.random_range(-1.7f32..1.7)).collect();
            let stride = Form::Bytes.stride(columns);
            let mut lines = vec![Line([u32::MAX; LANES]); TOKENS * stride];
            for (values, lines) in input.chunks_exact(columns).zip(lines.chunks_exact_mut(stride)) {
                Convert { form: Form::Bytes, values, row: lines }.run(Scalar);
            }
            for tokens in [&[1][..], &[2, 0], &[0, 1, 2]] {
                for set in 0..3 {
                    let mut sums = vec![f32::NAN; tokens.len() * BLOCK];
                    let product = &mut Product {
                        dtype,
                        weights: std::array::from_fn(row),
                        ahead: [row(0), row(BLOCK / 2)],
                        input: Rows::whole(&lines, Form::Bytes, columns, TOKENS),
                        tokens,
                        sums: &mut sums,
                        workspace: &mut workspace,
                    };
                    match set {
                        0 => super::product(As::<true, false>, product),
                        1 => super::product(As::<false, true>, product),
                        _ => super::product(As::<false, false>, product),
                    }
                    for (at, sum) in sums.into_iter().enumerate() {
                        let row = &weights[at % BLOCK * columns..][..columns];
                        let input = &input[tokens[at / BLOCK] as usize * columns..];
                        let products = row.iter().zip(input).map(|(w, x)| w * f64::from(*x));
                        let norm = row.iter().map(|w| w * w).sum::<f64>().sqrt();
                        let off = (f64::from(sum) - products.sum::<f64>()).abs();
                        // Activations are rounded to one part in 254 of the largest of 32.
                        assert!(off <= 0.02 * norm, "{}, {columns} columns, set {set}: {off} of {norm}", dtype.name());
                    }
                }
            }
        }
    }
}
