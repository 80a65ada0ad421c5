//! What several tests need: numbers of tensors, tensors of numbers, a stream of both.
#![allow(dead_code, reason = "every test takes what it needs")]

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};

/// Reproducible numbers in −1..1, without a crate: a linear congruential generator (Knuth, MMIX).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn vector(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    pub fn tensor<const D: usize>(&mut self, shape: [usize; D], device: &Device) -> Tensor<D> {
        tensor(self.vector(shape.iter().product()), shape, device)
    }
}

pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

pub fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.without_autodiff().cast(DType::F32).into_data().iter::<f32>().collect()
}

/// The largest difference over the largest number of `right`.
pub fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    let largest = right.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let difference = left.iter().zip(right).fold(0f32, |worst, (left, right)| worst.max((left - right).abs()));
    assert!(difference.is_finite() && largest > 0.0);
    difference / largest
}

/// A module's weights of numbers of a stream, in another type.
pub struct Filled<'a> {
    pub numbers: &'a mut Numbers,
    pub scale: f32,
    pub dtype: DType,
}

impl ModuleMapper for Filled<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|old| {
            let (shape, device) = (old.dims(), old.device());
            let values: Vec<f32> =
                self.numbers.vector(shape.iter().product()).iter().map(|value| value * self.scale).collect();
            Tensor::from_data(TensorData::new(values, shape), (&device, self.dtype))
        })
    }
}

/// The same module with such weights.
pub fn filled<M: Module>(module: M, seed: u64, scale: f32, dtype: DType) -> M {
    module.map(&mut Filled { numbers: &mut Numbers(seed), scale, dtype })
}
