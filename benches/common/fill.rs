//! Random weights, fast: hashed uniform numbers instead of normal ones, and quantised blocks drawn from a few thousand that
//! are quantised once.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use phase_moe::Dtype;
use phase_moe::layer::Packed;
use rayon::prelude::*;

use super::shape::MXFP4_BLOCK;

/// SplitMix64's finaliser.
fn hash(seed: u64, at: usize) -> u64 {
    let mut bits = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(at as u64 ^ seed << 32);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// Uniform `[rows, columns]` of mean 0 and the given variance.
pub fn uniform(dtype: DType, rows: usize, columns: usize, variance: f32, seed: u64) -> Result<Tensor> {
    let reach = (3.0 * variance).sqrt();
    let value = |at| ((hash(seed, at) >> 40) as f32 / (1 << 23) as f32 - 1.0) * reach;
    let (places, shape) = ((0..rows * columns).into_par_iter(), (rows, columns));
    match dtype {
        DType::BF16 => Tensor::from_vec(places.map(|at| bf16::from_f32(value(at))).collect(), shape, &Device::Cpu),
        DType::F16 => Tensor::from_vec(places.map(|at| f16::from_f32(value(at))).collect(), shape, &Device::Cpu),
        _ => Tensor::from_vec(places.map(value).collect::<Vec<f32>>(), shape, &Device::Cpu)?.to_dtype(dtype),
    }
}

/// Quantised blocks to draw weights from.
pub struct Blocks {
    dtype: GgmlDType,
    columns: usize,
    bytes: Vec<u8>,
}

impl Blocks {
    /// Blocks for matrices of so many columns, of variance `1 / columns`.
    pub fn new(dtype: GgmlDType, columns: usize) -> Result<Self> {
        const DISTINCT: usize = 4096;
        let values = uniform(DType::F32, DISTINCT, dtype.block_size(), 1.0 / columns as f32, 0x5EED)?;
        Ok(Self { dtype, columns, bytes: QTensor::quantize(&values, dtype)?.data()?.into_owned() })
    }

    pub fn matrix(&self, rows: usize, seed: u64) -> Result<Arc<QTensor>> {
        let size = self.dtype.type_size();
        let distinct = self.bytes.len() / size;
        let mut bytes = vec![0; rows * self.columns / self.dtype.block_size() * size];
        bytes.par_chunks_mut(size).with_min_len(1024).enumerate().for_each(|(at, block)| {
            let drawn = hash(seed, at) as usize % distinct * size;
            block.copy_from_slice(&self.bytes[drawn..drawn + size]);
        });
        let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, self.dtype)?;
        Ok(Arc::new(QTensor::new(storage, (rows, self.columns))?))
    }
}

/// `[rows, columns]` in `mxfp4`, of variance about `1 / columns`.
pub fn mxfp4(rows: usize, columns: usize, seed: u64) -> Result<Packed> {
    // The root of the mean square of its numbers is 2.9.
    let exponent = (1.0 / (2.9 * (columns as f64).sqrt())).log2().round() as i32 + 127;
    let mut bytes = vec![0; rows * columns / MXFP4_BLOCK.1 * MXFP4_BLOCK.0];
    bytes.par_chunks_mut(MXFP4_BLOCK.0).with_min_len(1024).enumerate().for_each(|(at, block)| {
        block[0] = exponent as u8;
        for (half, weights) in block[1..].chunks_mut(8).enumerate() {
            weights.copy_from_slice(&hash(seed, 2 * at + half).to_le_bytes());
        }
    });
    Ok(Packed::new(Dtype::Mxfp4, rows, columns, bytes)?)
}
