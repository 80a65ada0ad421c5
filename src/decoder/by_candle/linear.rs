//! A linear layer of the decoder: `y = x·Wᵀ + b`, `[.., columns] → [.., rows]`.
//!
//! Weights in bf16 on the CPU are multiplied by the expert engine, which reads them as they lie: Candle's own product first makes `f32` of all
//! of them, in every forward pass. Everything else is Candle's, with its backward pass.
//!
//! Knows nothing of what the layer is for.

use std::sync::Arc;

use candle_core::{DType, Module, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::error::Result;
use crate::experts::engine::Engine;
use crate::layer::borrowed;

/// Clones share weights.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    inner: candle_nn::Linear,
    engine: Arc<Engine>,
    by_engine: bool,
}

impl Linear {
    /// With `weight` `[rows, columns]` and `bias` `[rows]`, on an engine that other layers use too.
    pub(super) fn new(weight: Tensor, bias: Option<Tensor>, engine: Arc<Engine>) -> Self {
        let free = bias.as_ref().is_none_or(|bias| !bias.track_op());
        let by_engine = free && weight.dtype() == DType::BF16 && borrowed::fits(&weight);
        Self { inner: candle_nn::Linear::new(weight, bias), engine, by_engine }
    }

    /// Its weights, `[rows, columns]`.
    pub(super) fn weight(&self) -> &Tensor {
        self.inner.weight()
    }

    /// Loads `weight` and, where it has one, `bias`.
    pub(super) fn load(
        vb: &VarBuilder<'_>,
        [rows, columns]: [usize; 2],
        bias: bool,
        engine: &Arc<Engine>,
    ) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: (columns as f64).powf(-0.5) };
        let weight = vb.get_with_hints((rows, columns), "weight", init)?;
        let bias = bias.then(|| vb.get_with_hints(rows, "bias", Init::Const(0.0))).transpose()?;
        Ok(Self::new(weight, bias, engine.clone()))
    }
}

impl Module for Linear {
    fn forward(&self, input: &Tensor) -> candle_core::Result<Tensor> {
        let fits = self.by_engine && input.dtype() == DType::BF16 && input.device().is_cpu() && !input.track_op();
        if !fits {
            return self.inner.forward(input);
        }
        let product = borrowed::product(&self.engine, input, self.inner.weight())?;
        match self.inner.bias() {
            Some(bias) => product.broadcast_add(bias),
            None => Ok(product),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn both_ways_agree_to_what_bf16_holds() {
        let draw = |shape: &[usize]| {
            let values = Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            values.to_dtype(DType::BF16).unwrap()
        };
        for (shape, rows) in [(&[3, 5, 64][..], 48), (&[1, 64], 33), (&[2, 1, 64], 1), (&[40, 64], 200)] {
            let (input, weight, bias) = (draw(shape), draw(&[rows, 64]), draw(&[rows]));
            let linear = Linear::new(weight.clone(), Some(bias.clone()), Arc::default());
            assert!(linear.by_engine);
            let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
            let ours = linear.forward(&input).unwrap();
            assert_eq!((ours.dims().last(), ours.dtype(), ours.rank()), (Some(&rows), DType::BF16, shape.len()));
            let expected = candle_nn::Linear::new(wide(&weight), Some(wide(&bias))).forward(&wide(&input)).unwrap();
            let off = (wide(&ours) - &expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(off.to_scalar::<f32>().unwrap() < 0.3, "{off}");
            assert_eq!(wide(&ours).dims(), expected.dims());
        }
        // Neither a view nor numbers of another kind go by the engine.
        assert!(!Linear::new(draw(&[8, 64]).t().unwrap(), None, Arc::default()).by_engine);
        assert!(!Linear::new(draw(&[8, 64]).to_dtype(DType::F32).unwrap(), None, Arc::default()).by_engine);
    }
}
