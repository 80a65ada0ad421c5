//! A Candle `VarBuilder` over a [`Checkpoint`]: tensors are read by position when asked for, converted to one dtype. Names are those
//! of transformers, whatever the files are.

use std::sync::Arc;

use bytemuck::{Pod, cast_slice_mut, zeroed_vec};
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use half::{bf16, f16};
use safetensors::Dtype;

use super::gguf::{self, GgufBackend};
use crate::checkpoint::{Checkpoint, ElementType, TensorEntry};
use crate::error::{Error, Result};
use crate::offload::store::{ExpertStore, Part, Piece};
use crate::spec::{ExpertNames, ModelSpec, MoeSpec, StackOrder};

/// A builder whose tensors come from `checkpoint`, on `device`, in `dtype`.
pub fn var_builder(checkpoint: Arc<Checkpoint>, dtype: DType, device: &Device) -> VarBuilder<'static> {
    let backend: Box<dyn SimpleBackend> = match checkpoint.gguf() {
        Some(_) => Box::new(GgufBackend::new(checkpoint)),
        None => Box::new(CheckpointBackend(checkpoint)),
    };
    VarBuilder::from_backend(backend, dtype, device.clone())
}

/// Checks that the checkpoint has all blocks of `spec`, by the norm that each begins with: before anything else counts them, and before
/// those that are there are read.
///
/// # Errors
/// [`Error::Checkpoint`] naming the first norm that is not there.
pub fn check_blocks(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    let norm = |block: usize| match checkpoint.gguf() {
        Some(_) => format!("blk.{block}.attn_norm.weight"),
        None => format!("model.layers.{block}.input_layernorm.weight"),
    };
    (0..spec.layers).try_for_each(|block| checkpoint.entry(&norm(block)).map(drop))
}

/// Checks that the checkpoint has no expert, and no block with experts, beyond those of `spec`: one that has contradicts its
/// configuration, and would load as another model than the one that was trained. Likewise for experts that are there both one by
/// one and stacked, and for stacks of other shapes. (Missing ones are found when they are asked for.)
///
/// # Errors
/// [`Error::Checkpoint`] naming the first such tensor.
pub fn check_experts(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    if checkpoint.gguf().is_some() {
        return gguf::check_experts(checkpoint, spec);
    }
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
        let stack = format!("model.layers.{block}.{stacked}");
        if expert.is_some() && checkpoint.tensors().contains_key(&stack) {
            return Err(wrong(format!("experts one by one or stacked, got it beside `{stack}`")));
        }
    }
    spec.moe_blocks()
        .try_for_each(|block| check_stack(checkpoint, &spec.moe, &format!("model.layers.{block}.{}", spec.ffn)))
}

/// Checks the shapes of stacked experts under `ffn`, if there are any, where file and tensors can be named.
fn check_stack(checkpoint: &Checkpoint, moe: &MoeSpec, ffn: &str) -> Result<()> {
    let [gate_up, down] = [&moe.names.stacked_gate_up, &moe.names.stacked_down].map(|name| format!("{ffn}.{name}"));
    let Some(entry) = checkpoint.tensors().get(&gate_up) else { return Ok(()) };
    let Err(error) = moe.stack_order(&entry.shape, &checkpoint.entry(&down)?.shape) else { return Ok(()) };
    let detail = format!("tensors `{gate_up}` and `{down}`: {error}");
    Err(Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail })
}

/// The projections of every expert of every MoE layer of `spec`, where they lie in `checkpoint`: one by one or stacked, as floats or
/// in MXFP4. Nothing of them is read.
///
/// # Errors
/// [`Error::Checkpoint`] for a tensor that is missing, of another shape or no matrix of floats; [`Error::Shape`] as
/// [`MoeSpec::stack_order`](crate::spec::MoeSpec::stack_order).
pub fn expert_pieces(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<Vec<Vec<Vec<Piece>>>> {
    let layer = |block: usize| {
        if checkpoint.gguf().is_some() {
            return gguf::pieces(checkpoint, &spec.moe, block);
        }
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

/// What the experts of a checkpoint take, as they are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertSizes {
    /// Bytes of the first expert of the first layer.
    pub first: u64,
    /// Bytes of all.
    pub all: u64,
    /// Types of their weights, in the order of their first use.
    pub dtypes: Vec<String>,
}

/// Counts what the experts of `spec` take, every one that it names being there in the shape it says.
///
/// # Errors
/// As [`expert_pieces`], but not for types in a GGUF file that nothing here reads.
pub fn expert_sizes(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<ExpertSizes> {
    let experts: Vec<Vec<(String, u64)>> = match checkpoint.gguf() {
        Some(_) => {
            let blocks = spec.moe_blocks().map(|block| gguf::sizes(checkpoint, &spec.moe, block));
            blocks.collect::<Result<Vec<_>>>()?.concat()
        }
        None => {
            let part = |piece: &Piece| {
                let row = piece.dtype.row_bytes(piece.columns).unwrap_or(0);
                (piece.dtype.to_string(), (row * piece.rows) as u64)
            };
            expert_pieces(checkpoint, spec)?.iter().flatten().map(|pieces| pieces.iter().map(part).collect()).collect()
        }
    };
    let mut sizes = ExpertSizes::default();
    for (index, (dtype, bytes)) in
        experts.into_iter().enumerate().flat_map(|(index, parts)| parts.into_iter().map(move |part| (index, part)))
    {
        sizes.all += bytes;
        sizes.first += if index == 0 { bytes } else { 0 };
        if !sizes.dtypes.contains(&dtype) {
            sizes.dtypes.push(dtype);
        }
    }
    Ok(sizes)
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
            ElementType::Plain(Dtype::F32) => DType::F32,
            ElementType::Plain(Dtype::BF16) => DType::BF16,
            ElementType::Plain(Dtype::F16) => DType::F16,
            // Not numbers but blocks of them: whoever wants them asks for bytes.
            ElementType::Plain(Dtype::U8) if dtype == DType::U8 => DType::U8,
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
