//! The activation of a block of products on sixteen lanes, biases added: what stands between an expert's projections.
//!
//! The scalar definition is [`Activation::apply`].

use std::f32::consts::FRAC_2_PI;
use std::ops::Range;

use crate::experts::activation::{Activation, Function};
use crate::simd::multiply::Multiply;
use crate::simd::product::BLOCK;
use crate::simd::score::logistic;
use crate::simd::{Kernel, LANES};

/// The activation of a block of products: `[rows, BLOCK]` sums into columns `into` of `[rows, stride]` values.
pub(super) struct Activate<'a> {
    pub(super) activation: Activation,
    /// Of the first sixteen sums of a row and of the others, from their column of the width on.
    pub(super) biases: [&'a [f32]; 2],
    pub(super) sums: &'a mut [f32],
    pub(super) values: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) into: Range<usize>,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        let Self { activation, biases, .. } = self;
        let biases = [lanes.load_part(biases[0], 0.0), lanes.load_part(biases[1], 0.0)];
        for (sums, values) in self.sums.as_chunks::<BLOCK>().0.iter().zip(self.values.chunks_exact_mut(self.stride)) {
            let values = &mut values[self.into.clone()];
            let halves = sums.as_chunks::<LANES>().0;
            let (low, high) =
                (lanes.add(lanes.load(&halves[0]), biases[0]), lanes.add(lanes.load(&halves[1]), biases[1]));
            if activation.gated {
                lanes.store_part(gated(lanes, activation, low, high), values);
            } else {
                let (first, second) = values.split_at_mut(values.len().min(LANES));
                lanes.store_part(function(lanes, activation.function, low), first);
                lanes.store_part(function(lanes, activation.function, high), second);
            }
        }
    }
}

/// [`Activation::apply`] of gate and up projection, in every lane.
#[inline(always)]
fn gated<L: Multiply>(lanes: L, activation: Activation, gate: L::Vector, up: L::Vector) -> L::Vector {
    let up = match activation.function {
        Function::ClampedSilu { limit, .. } => {
            let up = lanes.blend(lanes.ge(up, lanes.splat(limit)), lanes.splat(limit), up);
            let up = lanes.blend(lanes.ge(lanes.splat(-limit), up), lanes.splat(-limit), up);
            lanes.add(up, lanes.splat(1.0))
        }
        _ => up,
    };
    lanes.mul(function(lanes, activation.function, gate), up)
}

/// The function of an activation, in every lane.
#[inline(always)]
fn function<L: Multiply>(lanes: L, function: Function, x: L::Vector) -> L::Vector {
    match function {
        Function::Silu => lanes.mul(x, logistic(lanes, x)),
        Function::GeluTanh => {
            // (1 + tanh z) / 2 = σ(2 z)
            let cube = lanes.mul_add(lanes.mul(x, x), lanes.splat(0.044_715), lanes.splat(1.0));
            let twice = lanes.mul(lanes.mul(lanes.splat(2.0 * FRAC_2_PI.sqrt()), x), cube);
            lanes.mul(x, logistic(lanes, twice))
        }
        Function::ReluSquared => {
            let positive = lanes.blend(lanes.ge(lanes.splat(0.0), x), lanes.splat(0.0), x);
            lanes.mul(positive, positive)
        }
        Function::ClampedSilu { alpha, limit } => {
            let gate = lanes.blend(lanes.ge(x, lanes.splat(limit)), lanes.splat(limit), x);
            lanes.mul(gate, logistic(lanes, lanes.mul(gate, lanes.splat(alpha))))
        }
        Function::Gelu => {
            let mut values = [0.0; LANES];
            lanes.store(x, &mut values);
            for value in &mut values {
                *value = Activation { function, gated: false }.apply(0.0, *value);
            }
            lanes.load(&values)
        }
    }
}
