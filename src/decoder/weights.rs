//! A Candle `VarBuilder` over a [`Checkpoint`]: tensors are read by position when asked for, converted to one dtype.

use std::sync::Arc;

use bytemuck::{Pod, cast_slice_mut, zeroed_vec};
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use half::{bf16, f16};
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::error::{Error, Result};
use crate::experts::store::{ExpertStore, Part, Piece};
use crate::spec::{ExpertNames, ModelSpec, MoeSpec, StackOrder};

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
    let names = &spec.moe.names;
    let [experts, stacked] = [&names.experts, &names.stacked_gate_up].map(|name| format!("{}.{name}", spec.ffn));
    let packed = format!("{stacked}{BLOCKS}");
    let ids = |name: &str| -> Option<(usize, Option<usize>)> {
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let block = block.parse().ok()?;
        if rest == stacked || rest == packed {
            return Some((block, None));
        }
        let (expert, _) = rest.strip_prefix(&experts)?.strip_prefix('.')?.split_once('.')?;
        Some((block, Some(expert.parse().ok()?)))
    };
    for (name, entry) in checkpoint.tensors() {
        let Some((block, expert)) = ids(name) else { continue };
        let wrong = |expected: String| {
            let detail = format!("tensor `{name}`: expected {expected}");
            Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail }
        };
        // Nobody runs them.
        if (spec.layers..spec.layers.saturating_add(spec.extra_blocks)).contains(&block) {
            continue;
        }
        let parts = [("blocks", Some(block), spec.layers), ("experts", expert, spec.moe.experts)];
        for (what, id, count) in parts {
            if let Some(id) = id.filter(|&id| id >= count) {
                return Err(wrong(format!("{what} 0 to {} as the configuration says, got {id}", count - 1)));
            }
        }
        if spec.dense.blocks.binary_search(&block).is_ok() {
            return Err(wrong(format!("no experts in block {block} as the configuration says, got one")));
        }
    }
    Ok(())
}

/// The projections of every expert of every MoE layer of `spec`, where they lie in `checkpoint`: one by one or stacked, as floats or
/// in MXFP4. Nothing of them is read.
///
/// # Errors
/// [`Error::Checkpoint`] for a tensor that is missing, of another shape or no matrix of floats; [`Error::Shape`] as
/// [`MoeSpec::stack_order`](crate::spec::MoeSpec::stack_order).
pub fn expert_pieces(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<Vec<Vec<Vec<Piece>>>> {
    let layer = |block: usize| {
        let ffn = format!("model.layers.{block}.{}", spec.ffn);
        let stacked = format!("{ffn}.{}", spec.moe.names.stacked_gate_up);
        if checkpoint.tensors().contains_key(&stacked) {
            return stacked_pieces(checkpoint, &spec.moe, &ffn);
        }
        let packed = checkpoint.tensors().contains_key(&format!("{stacked}{BLOCKS}"));
        let one = if packed { packed_pieces } else { pieces };
        (0..spec.moe.experts).map(|id| one(checkpoint, &spec.moe, &ffn, id)).collect()
    };
    spec.moe_blocks().map(layer).collect()
}

/// The pieces of expert `id`, which has tensors of its own.
fn pieces(checkpoint: &Checkpoint, moe: &MoeSpec, ffn: &str, id: usize) -> Result<Vec<Piece>> {
    let ExpertNames { experts, gate_proj, up_proj, down_proj, .. } = &moe.names;
    let [wide, narrow] = [[moe.expert_width, moe.hidden], [moe.hidden, moe.expert_width]];
    let parts = [(Part::Gate, gate_proj, wide), (Part::Up, up_proj, wide), (Part::Down, down_proj, narrow)];
    let there = parts.into_iter().filter(|(part, ..)| moe.activation.gated || *part != Part::Gate);
    let piece = |(part, name, shape): (Part, &String, [usize; 2])| {
        let name = format!("{ffn}.{experts}.{id}.{name}.weight");
        let entry = checkpoint.entry(&name)?;
        if entry.shape != shape {
            let detail = format!("tensor `{name}`: expected shape {shape:?}, got {:?}", entry.shape);
            return Err(Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail });
        }
        Piece::tensor(checkpoint, part, &name)
    };
    there.map(piece).collect()
}

/// The pieces of all experts of a layer that has them stacked.
fn stacked_pieces(checkpoint: &Checkpoint, moe: &MoeSpec, ffn: &str) -> Result<Vec<Vec<Piece>>> {
    let [gate_up, down] = [&moe.names.stacked_gate_up, &moe.names.stacked_down].map(|name| format!("{ffn}.{name}"));
    let order = moe.stack_order(&checkpoint.entry(&gate_up)?.shape, &checkpoint.entry(&down)?.shape)?;
    let rows = |part: Part, name: &str, first: usize, rows: usize| {
        Piece::tensor(checkpoint, part, name)?.of_rows(first..first + rows)
    };
    let (width, hidden, gated) = (moe.expert_width, moe.hidden, moe.activation.gated);
    let inner = if gated { Part::GateUp } else { Part::Up };
    let expert = |id: usize| match order {
        StackOrder::RowsFirst if gated && !moe.names.stacked_in_turns => Ok(vec![
            rows(Part::Gate, &gate_up, 2 * id * width, width)?,
            rows(Part::Up, &gate_up, (2 * id + 1) * width, width)?,
            rows(Part::Down, &down, id * hidden, hidden)?,
        ]),
        StackOrder::RowsFirst => {
            let inner_rows = if gated { 2 * width } else { width };
            Ok(vec![rows(inner, &gate_up, id * inner_rows, inner_rows)?, rows(Part::Down, &down, id * hidden, hidden)?])
        }
        StackOrder::ColumnsFirst => Ok(vec![
            rows(inner, &gate_up, id * hidden, hidden)?.transposed()?,
            rows(Part::Down, &down, id * width, width)?.transposed()?,
        ]),
    };
    (0..moe.experts).map(expert).collect()
}

/// How the name of a stack in MXFP4 ends, that of its blocks.
const BLOCKS: &str = "_blocks";

/// The pieces of expert `id` of a layer that has them stacked in MXFP4.
fn packed_pieces(checkpoint: &Checkpoint, moe: &MoeSpec, ffn: &str, id: usize) -> Result<Vec<Piece>> {
    let (width, hidden, gated) = (moe.expert_width, moe.hidden, moe.activation.gated);
    let (part, inner) = if gated { (Part::GateUp, 2 * width) } else { (Part::Up, width) };
    let piece = |part: Part, name: &str, rows: usize, columns: usize| {
        Piece::mxfp4(checkpoint, part, &format!("{ffn}.{name}"), [moe.experts, rows, columns], id)
    };
    let names = &moe.names;
    Ok(vec![
        piece(part, &names.stacked_gate_up, inner, hidden)?,
        piece(Part::Down, &names.stacked_down, hidden, width)?,
    ])
}

/// The same as a store to load them from.
///
/// # Errors
/// As [`expert_pieces`].
pub fn expert_store(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<ExpertStore> {
    ExpertStore::new(checkpoint.sources().to_vec(), expert_pieces(checkpoint, spec)?)
}

struct CheckpointBackend(Arc<Checkpoint>);

impl CheckpointBackend {
    fn tensor(&self, entry: &TensorEntry, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let stored = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            // Not numbers but blocks of them: whoever wants them asks for bytes.
            Dtype::U8 if dtype == DType::U8 => DType::U8,
            other => {
                let expected = if dtype == DType::U8 { "dtype U8" } else { "dtype F32, BF16 or F16" };
                return Err(self.wrong(entry, name, expected, format!("{other:?}")));
            }
        };
        if dtype == DType::U8 && stored != dtype {
            return Err(self.wrong(entry, name, "dtype U8", format!("{:?}", entry.dtype)));
        }
        let tensor = match stored {
            DType::F32 => self.numbers::<f32>(entry, name, device),
            DType::U8 => self.numbers::<u8>(entry, name, device),
            DType::BF16 => self.numbers::<bf16>(entry, name, device),
            _ => self.numbers::<f16>(entry, name, device),
        };
        Ok(tensor?.to_dtype(dtype)?)
    }

    /// A tensor read where it stays: one of the size of a vocabulary is not there twice.
    fn numbers<T: WithDType + Pod>(&self, entry: &TensorEntry, name: &str, device: &Device) -> Result<Tensor> {
        let mut numbers: Vec<T> = zeroed_vec(entry.shape.iter().product());
        self.0.read_into(name, cast_slice_mut(&mut numbers))?;
        Ok(Tensor::from_vec(numbers, entry.shape.as_slice(), device)?)
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
