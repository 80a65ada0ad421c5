//! Norms of a row: RMS norm (arXiv 1910.07467), `x / √(mean(x²) + ε) · weight`; layer norm (arXiv 1607.06450), which takes the mean away
//! first and adds a bias. Sums run in sixteen lanes that are folded in halves.

use super::{Kernel, LANES, Lanes, Multiply};

/// Rows of as many numbers as there are weights, each normed in place.
pub(crate) struct RmsNorm<'a> {
    pub(crate) rows: &'a mut [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        for row in self.rows.chunks_exact_mut(self.weight.len().max(1)) {
            let scale = 1.0 / (square(lanes, row) / row.len() as f32 + self.eps).sqrt();
            scaled(lanes, row, scale, self.weight);
        }
    }
}

/// The same of layer norm.
pub(crate) struct LayerNorm<'a> {
    pub(crate) rows: &'a mut [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        for row in self.rows.chunks_exact_mut(self.weight.len().max(1)) {
            let mean = row.iter().sum::<f32>() / row.len() as f32;
            row.iter_mut().for_each(|number| *number -= mean);
            let scale = 1.0 / (square(lanes, row) / row.len() as f32 + self.eps).sqrt();
            scaled(lanes, row, scale, self.weight);
            row.iter_mut().zip(self.bias).for_each(|(number, bias)| *number += bias);
        }
    }
}

/// `Σ x²`.
#[inline(always)]
fn square<L: Lanes>(lanes: L, row: &[f32]) -> f32 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let last = lanes.load_part(rest, 0.0);
    let mut sum = lanes.mul(last, last);
    for numbers in whole {
        let numbers = lanes.load(numbers);
        sum = lanes.add(sum, lanes.mul(numbers, numbers));
    }
    lanes.fold_sum(sum)
}

/// `x · scale · weight` in place of `x`.
#[inline(always)]
fn scaled<L: Lanes>(lanes: L, row: &mut [f32], scale: f32, weight: &[f32]) {
    let factor = lanes.splat(scale);
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    let (weights, last) = weight.as_chunks::<LANES>();
    for (numbers, weights) in whole.iter_mut().zip(weights) {
        lanes.store(lanes.mul(lanes.mul(lanes.load(numbers), factor), lanes.load(weights)), numbers);
    }
    for (number, weight) in rest.iter_mut().zip(last) {
        *number = *number * scale * weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn every_set_norms_as_the_definition() {
        for width in [1, 5, 16, 40, 2048] {
            let from: Vec<f32> = (0..2 * width).map(|at| ((at * 7919 % 101) as f32 - 50.0) / 7.0).collect();
            let weight: Vec<f32> = (0..width).map(|at| 1.0 + (at % 3) as f32).collect();
            let bias: Vec<f32> = (0..width).map(|at| (at % 5) as f32).collect();
            for isa in Isa::all() {
                let (mut rms, mut layer) = (from.clone(), from.clone());
                isa.run(RmsNorm { rows: &mut rms, weight: &weight, eps: 1e-5 });
                isa.run(LayerNorm { rows: &mut layer, weight: &weight, bias: &bias, eps: 1e-5 });
                for ((from, rms), layer) in from.chunks(width).zip(rms.chunks(width)).zip(layer.chunks(width)) {
                    let wide: Vec<f64> = from.iter().map(|&number| f64::from(number)).collect();
                    let mean = wide.iter().sum::<f64>() / width as f64;
                    let power =
                        |about: f64| wide.iter().map(|x| (x - about).powi(2)).sum::<f64>() / width as f64 + 1e-5;
                    let (of_rms, of_layer) = (power(0.0).sqrt(), power(mean).sqrt());
                    for at in 0..width {
                        let weight = f64::from(weight[at]);
                        let expected =
                            [wide[at] / of_rms * weight, (wide[at] - mean) / of_layer * weight + f64::from(bias[at])];
                        let got = [rms[at], layer[at]].map(f64::from);
                        for (got, expected) in got.into_iter().zip(expected) {
                            assert!(
                                (got - expected).abs() <= 2e-4 * expected.abs().max(1.0),
                                "{isa} {width}: {got} {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
