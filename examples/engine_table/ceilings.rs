//! What this machine can do at best, measured: reading memory and multiplying matrices.

use std::hint::black_box;

use candle_core::{DType, Result, Tensor};
use half::bf16;
use phase_moe::{Dtype, Engine, Matrix};

use crate::common::fill::uniform;
use crate::common::shape::{Format, Shape};
use crate::reads::{Reads, seconds};

/// All threads together; the best seen, since a busy neighbour only takes away.
pub struct Ceilings {
    pub reads: Reads,
    pub f32_gflops: f64,
    pub bf16_gflops: f64,
}

impl Ceilings {
    /// Nothing measured yet.
    pub fn new(smoke: bool) -> Self {
        Self { reads: Reads::new(smoke), f32_gflops: 0.0, bf16_gflops: 0.0 }
    }

    /// Measures once more.
    pub fn raise(&mut self, smoke: bool) -> Result<()> {
        let sizes: &[_] = match smoke {
            true => &[(256, 256, 256)],
            false => &[(512, 1024, 2048), (1024, 1024, 1024), (1024, 2048, 2048)],
        };
        self.reads.raise();
        self.f32_gflops = self.f32_gflops.max(products(DType::F32, sizes)?);
        // Without bf16 instructions widening the operands is the best way there is.
        self.bf16_gflops = self.bf16_gflops.max(products(DType::BF16, sizes)?).max(self.f32_gflops);
        Ok(())
    }

    /// The least milliseconds in which an input of so many tokens, touching so many experts, could be done where memory is read
    /// at this rate.
    pub fn floor_millis(&self, shape: Shape, format: Format, tokens: usize, touched: f64, gb_per_second: f64) -> f64 {
        let read = touched * shape.expert_bytes(format) / (gb_per_second * 1e9);
        let operations = (2 * shape.expert_weights() * tokens * shape.top_k) as f64;
        let gflops = if matches!(format.name, "f32" | "f16") { self.f32_gflops } else { self.bf16_gflops };
        read.max(operations / (gflops * 1e9)) * 1e3
    }
}

/// The best GFLOP/s of a product `[m, k] · [n, k]ᵀ` at these `(m, k, n)`, by Candle or by this crate.
fn products(dtype: DType, sizes: &[(usize, usize, usize)]) -> Result<f64> {
    let (mut best, engine) = (0f64, Engine::default());
    for &(m, k, n) in sizes {
        let (a, b) = (uniform(dtype, m, k, 1.0, 1)?, uniform(dtype, n, k, 1.0, 2)?);
        let gflops = |seconds: f64| 2.0 * (m * k * n) as f64 / seconds / 1e9;
        let transposed = b.t()?;
        a.matmul(&transposed)?;
        best = best.max(gflops(seconds(|| {
            black_box(a.matmul(&transposed)).expect("a product that worked before");
        })));
        // The same by this crate's engine, on the same numbers as bytes.
        let (input, weight) = (bytes(&a)?, bytes(&b)?);
        let dtype = if dtype == DType::BF16 { Dtype::Bf16 } else { Dtype::F32 };
        let (input, weight) = (Matrix::new(dtype, m, k, &input)?, Matrix::new(dtype, n, k, &weight)?);
        let mut output = vec![0.0; m * n];
        best = best.max(gflops(seconds(|| engine.product(input, weight, &mut output).expect("shapes that fit"))));
    }
    Ok(best)
}

/// A tensor's numbers, little-endian.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::BF16 => flat.to_vec1::<bf16>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => flat.to_vec1::<f32>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}
