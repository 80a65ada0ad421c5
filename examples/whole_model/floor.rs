//! How fast a token could be: what it reads at the speed of memory, or its integer products at the speed of the cores.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use phase_moe::{Dtype, Engine, Matrix};

use crate::reads::{Reads, seconds};
use crate::shape::{Mixture, Shape, type_name};

/// All threads together; the best seen.
pub struct Floors {
    smoke: bool,
    reads_gb_per_second: f64,
    /// Gigabytes of weights a second that meet one token where they lie in the second cache, by type.
    pub products: BTreeMap<&'static str, f64>,
}

impl Floors {
    pub fn new(smoke: bool) -> Self {
        Self { smoke, reads_gb_per_second: 0.0, products: BTreeMap::new() }
    }

    pub fn read_gb_per_second(&self) -> f64 {
        self.reads_gb_per_second
    }

    /// Measures once more, products with a matrix of the size of an expert's.
    ///
    /// # Errors
    /// Those of a product.
    pub fn raise(&mut self, shape: &Shape) -> Result<()> {
        // What is read goes before a model comes, which may be held to so much memory.
        let mut reads = Reads::new(self.smoke);
        reads.raise();
        self.reads_gb_per_second = self.reads_gb_per_second.max(reads.gb_per_second);
        drop(reads);
        let (rows, columns) = (shape.width, shape.hidden);
        let weights = (0..rows * columns).map(|at| (at * 7919 % 8191) as f32 / 8191.0 - 0.5).collect();
        let weights = Tensor::from_vec::<_, f32>(weights, (rows, columns), &Device::Cpu)?;
        let input: Vec<f32> = (0..columns).map(|at| (at * 31 % 64) as f32 / 64.0 - 0.5).collect();
        let engine = Engine::default();
        for (dtype, stored) in
            [(Dtype::Q4K, GgmlDType::Q4K), (Dtype::Q6K, GgmlDType::Q6K), (Dtype::Q8_0, GgmlDType::Q8_0)]
        {
            let quantised = QTensor::quantize(&weights, stored)?;
            let bytes = quantised.data()?;
            let weight = Matrix::new(dtype, rows, columns, &bytes)?;
            let input = Matrix::from_f32(1, columns, &input)?;
            engine.product(input, weight, &mut vec![0.0; rows])?;
            // More than one call, so that a clock's tick is nothing; every thread its own, as each has a second cache of its own.
            const CALLS: usize = 64;
            let seconds = seconds(|| {
                rayon::broadcast(|_| {
                    let mut output = vec![0.0; rows];
                    for _ in 0..CALLS {
                        engine.product(input, weight, &mut output).expect("a product that worked before");
                    }
                });
            });
            let rate = self.products.entry(type_name(stored)).or_default();
            *rate = rate.max(1e-9 * (rayon::current_num_threads() * CALLS * bytes.len()) as f64 / seconds);
        }
        Ok(())
    }

    /// Tokens a second if reading were all: active weights as stored, keys and values of this depth.
    pub fn read_tokens_per_second(&self, shape: &Shape, mixture: Mixture, depth: usize) -> f64 {
        let weights: f64 = shape.step_bytes(mixture).values().sum();
        1e9 * self.reads_gb_per_second / (weights + shape.kv_bytes(depth))
    }

    /// Tokens a second if products of quantised weights were all; `None` where there are none.
    pub fn product_tokens_per_second(&self, shape: &Shape, mixture: Mixture) -> Option<f64> {
        let bytes = shape.step_bytes(mixture);
        let seconds: f64 = bytes.iter().filter_map(|(name, bytes)| Some(1e-9 * bytes / self.products.get(name)?)).sum();
        (seconds > 0.0).then_some(1.0 / seconds)
    }
}
