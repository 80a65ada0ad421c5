//! A Candle `VarBuilder` over a [`Checkpoint`]: tensors are read by position when asked for, converted to one dtype.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::error::{Error, Result};
use crate::experts::store::{ExpertStore, Part, Piece};
use crate::spec::{ExpertNames, ModelSpec};

/// A builder whose tensors come from `checkpoint`, on `device`, in `dtype`.
pub fn var_builder(checkpoint: Arc<Checkpoint>, dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(CheckpointBackend(checkpoint)), dtype, device.clone())
}

/// Checks that the checkpoint has no expert, and no block with experts, beyond those of `spec`: one that has contradicts its
/// configuration, and would load as another model than the one that was trained. (Missing ones are found when they are
/// asked for.)
///
/// # Errors
/// [`Error::Checkpoint`] naming the first such tensor.
pub fn check_experts(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    let experts = format!("mlp.{}.", spec.moe.names.experts);
    let ids = |name: &str| -> Option<(usize, usize)> {
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (expert, _) = rest.strip_prefix(&experts)?.split_once('.')?;
        Some((block.parse().ok()?, expert.parse().ok()?))
    };
    for (name, entry) in checkpoint.tensors() {
        let Some((block, expert)) = ids(name) else { continue };
        let parts = [("blocks", block, spec.layers), ("experts", expert, spec.moe.experts)];
        if let Some((what, id, count)) = parts.into_iter().find(|&(_, id, count)| id >= count) {
            let last = count - 1;
            let detail = format!("tensor `{name}`: expected {what} 0 to {last} as the configuration says, got {id}");
            return Err(Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail });
        }
    }
    Ok(())
}

/// Where the experts of every layer of `spec` lie in `checkpoint`; nothing of them is read.
///
/// # Errors
/// [`Error::Checkpoint`] for a tensor that is missing or that is no matrix of floats.
pub fn expert_store(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<ExpertStore> {
    let ExpertNames { experts, gate_proj, up_proj, down_proj, .. } = &spec.moe.names;
    let parts = [(Part::Gate, gate_proj), (Part::Up, up_proj), (Part::Down, down_proj)];
    let expert = |layer: usize, expert: usize| -> Result<Vec<Piece>> {
        let there = parts.iter().filter(|(part, _)| spec.moe.activation.gated || *part != Part::Gate);
        let piece = |(part, name): &(Part, &String)| {
            Piece::tensor(checkpoint, *part, &format!("model.layers.{layer}.mlp.{experts}.{expert}.{name}.weight"))
        };
        there.map(piece).collect()
    };
    let layers = (0..spec.layers).map(|layer| (0..spec.moe.experts).map(|id| expert(layer, id)).collect());
    ExpertStore::new(checkpoint.sources().to_vec(), layers.collect::<Result<_>>()?)
}

struct CheckpointBackend(Arc<Checkpoint>);

impl CheckpointBackend {
    fn tensor(&self, entry: &TensorEntry, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let stored = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => return Err(self.wrong(entry, name, "dtype F32, BF16 or F16", format!("{other:?}"))),
        };
        let bytes = self.0.read(name)?;
        Ok(Tensor::from_raw_buffer(&bytes, stored, &entry.shape, device)?.to_dtype(dtype)?)
    }

    fn wrong(&self, entry: &TensorEntry, name: &str, expected: &str, got: String) -> Error {
        let detail = format!("tensor `{name}`: expected {expected}, got {got}");
        Error::Checkpoint { file: self.0.file_of(entry).into(), detail }
    }
}

impl SimpleBackend for CheckpointBackend {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let entry = self.0.entry(name)?;
        if entry.shape != shape.dims() {
            let expected = format!("shape {:?}", shape.dims());
            return Err(self.wrong(entry, name, &expected, format!("{:?}", entry.shape)).into());
        }
        Ok(self.tensor(entry, name, dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.tensor(self.0.entry(name)?, name, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.tensors().contains_key(name)
    }
}
