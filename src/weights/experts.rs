//! Where the experts of a layer lie: the one description of it, for files of every format and for any other tensors that have names
//! and shapes.
//!
//! An expert is a list of [`Slice`]s: one for each projection, or one for gate and up projection together. Who holds experts in memory
//! reads the list once, who caches them on demand. Under transformers' names they are stored in one of three ways:
//!
//! | way | tensors | slices of an expert |
//! |---|---|---|
//! | one by one | `[width, hidden]`, `[width, hidden]`, `[hidden, width]` | all rows of each |
//! | stacked | `[experts, 2·width, hidden]` and `[experts, hidden, width]`, or each expert's matrices transposed | its rows of both |
//! | stacked in MXFP4 | the same twice, as `_blocks` `[.., columns / 32, 16]` and `_scales` `[.., columns / 32]` | its rows of all four |
//!
//! Gate rows of a stack stand before up rows; in models whose [`ExpertNames`](crate::spec::ExpertNames) say so the two take turns. The
//! shapes of both stacks tell which way they lie: the names are the same. How GGUF files have them: [`super::gguf::names`].
//!
//! Knows nothing of files or tensors beyond that, and nothing of biases.

use std::ops::Range;

use safetensors::Dtype as Plain;

use crate::checkpoint::{BlockType, Checkpoint, ElementType, TensorEntry};
use crate::error::Result;
use crate::experts::matrix::Dtype;
use crate::experts::mxfp4;
use crate::offload::store::{Layout, Part, Piece};
use crate::spec::{MoeSpec, StackOrder};

/// What a name in MXFP4 ends with, of its blocks and of their scales.
pub(crate) const MXFP4: [&str; 2] = ["_blocks", "_scales"];

/// How the numbers of a slice lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Row by row, as linear layers have them.
    Rows,
    /// Each of the matrices that it holds transposed.
    Columns,
    /// Row by row, in blocks of MXFP4 with their scales in a tensor of their own.
    Apart,
}

/// Some rows of a stored tensor that hold a part of an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) part: Part,
    /// Name of the tensor; in MXFP4 what both of its names begin with.
    pub(crate) tensor: String,
    /// What the shape of the whole tensor has to be; in MXFP4 that of its numbers.
    pub(crate) shape: Vec<usize>,
    /// Which rows, all dimensions but the last taken as one.
    pub(crate) rows: Range<usize>,
    pub(crate) order: Order,
}

/// Tensors that have names and shapes.
pub(crate) trait Tensors {
    fn has(&self, tensor: &str) -> bool;

    /// The shape of a tensor, an error where there is none.
    fn shape(&self, tensor: &str) -> Result<Vec<usize>>;
}

impl Tensors for Checkpoint {
    fn has(&self, tensor: &str) -> bool {
        self.tensors().contains_key(tensor)
    }

    fn shape(&self, tensor: &str) -> Result<Vec<usize>> {
        Ok(self.entry(tensor)?.shape.clone())
    }
}

/// The slices of expert `id` under transformers' names, all behind `prefix`.
///
/// # Errors
/// As [`MoeSpec::stack_order`], and for half a stack.
pub(crate) fn slices(moe: &MoeSpec, prefix: &str, id: usize, tensors: &impl Tensors) -> Result<Vec<Slice>> {
    let (names, width, hidden, gated) = (&moe.names, moe.expert_width, moe.hidden, moe.activation.gated);
    let [gate_up, down] = [&names.stacked_gate_up, &names.stacked_down].map(|name| format!("{prefix}{name}"));
    let (inner_part, inner) = if gated { (Part::GateUp, 2 * width) } else { (Part::Up, width) };
    let slice = |part: Part, tensor: &str, [rows, columns]: [usize; 2], order: Order| Slice {
        part,
        tensor: tensor.into(),
        shape: vec![moe.experts, rows, columns],
        rows: id * rows..(id + 1) * rows,
        order,
    };
    if tensors.has(&format!("{gate_up}{}", MXFP4[0])) {
        let inner = slice(inner_part, &gate_up, [inner, hidden], Order::Apart);
        return Ok(vec![inner, slice(Part::Down, &down, [hidden, width], Order::Apart)]);
    }
    if !tensors.has(&gate_up) {
        let single = |part: Part, name: &str, [rows, columns]: [usize; 2]| {
            let tensor = format!("{prefix}{}.{id}.{name}.weight", names.experts);
            Slice { part, tensor, shape: vec![rows, columns], rows: 0..rows, order: Order::Rows }
        };
        let gate = gated.then(|| single(Part::Gate, &names.gate_proj, [width, hidden]));
        let up = single(Part::Up, &names.up_proj, [width, hidden]);
        return Ok(gate.into_iter().chain([up, single(Part::Down, &names.down_proj, [hidden, width])]).collect());
    }
    Ok(match moe.stack_order(&tensors.shape(&gate_up)?, &tensors.shape(&down)?)? {
        StackOrder::RowsFirst => {
            let both = slice(inner_part, &gate_up, [inner, hidden], Order::Rows);
            let (start, end) = (both.rows.start, both.rows.end);
            let inner = match gated && !names.stacked_in_turns {
                true => vec![
                    Slice { part: Part::Gate, rows: start..start + width, ..both.clone() },
                    Slice { part: Part::Up, rows: start + width..end, ..both },
                ],
                false => vec![both],
            };
            inner.into_iter().chain([slice(Part::Down, &down, [hidden, width], Order::Rows)]).collect()
        }
        StackOrder::ColumnsFirst => vec![
            slice(inner_part, &gate_up, [hidden, inner], Order::Columns),
            slice(Part::Down, &down, [width, hidden], Order::Columns),
        ],
    })
}

impl Slice {
    /// The tensor in a checkpoint, of the shape that it has to have, and which of its bytes the slice is; not for MXFP4 apart.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for none, or one of another shape.
    pub(crate) fn find<'a>(&self, checkpoint: &'a Checkpoint) -> Result<(&'a TensorEntry, Range<usize>)> {
        let entry = checkpoint.entry(&self.tensor)?;
        if entry.shape != self.shape {
            let detail = format!("expected shape {:?}, got {:?}", self.shape, entry.shape);
            return Err(checkpoint.wrong(entry, &self.tensor, detail));
        }
        let all: usize = entry.shape.iter().rev().skip(1).product();
        let row = entry.bytes / all.max(1);
        Ok((entry, self.rows.start * row..self.rows.end * row))
    }

    /// Type, as it is shown, and bytes of the slice, whether anything here reads such a type or not.
    pub(super) fn size(&self, checkpoint: &Checkpoint) -> Result<(String, usize)> {
        if self.order != Order::Apart
            && let (TensorEntry { dtype: ElementType::Blocks(blocks), .. }, bytes) = self.find(checkpoint)?
        {
            return Ok((blocks.name.into(), bytes.len()));
        }
        let piece = self.piece(checkpoint)?;
        Ok((piece.dtype.to_string(), piece.dtype.row_bytes(piece.columns).unwrap_or(0) * piece.rows))
    }

    /// The slice as a matrix in the files of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is not there, of another shape, or not of a [`Dtype`].
    pub(crate) fn piece(&self, checkpoint: &Checkpoint) -> Result<Piece> {
        if self.order == Order::Apart {
            return self.apart(checkpoint);
        }
        let (entry, bytes) = self.find(checkpoint)?;
        let wrong = |expected: &str| {
            checkpoint.wrong(entry, &self.tensor, format!("expected dtype {expected}, got {:?}", entry.dtype))
        };
        let dtype = match entry.dtype {
            ElementType::Plain(Plain::F32) => Dtype::F32,
            ElementType::Plain(Plain::F16) => Dtype::F16,
            ElementType::Plain(Plain::BF16) => Dtype::Bf16,
            ElementType::Blocks(BlockType { name: "q8_0", .. }) => Dtype::Q8_0,
            ElementType::Blocks(BlockType { name: "q4_K", .. }) => Dtype::Q4K,
            ElementType::Blocks(BlockType { name: "q6_K", .. }) => Dtype::Q6K,
            ElementType::Blocks(BlockType { name: "mxfp4", .. }) => Dtype::Mxfp4,
            ElementType::Plain(_) => return Err(wrong("F32, BF16 or F16")),
            ElementType::Blocks(_) => return Err(wrong("q8_0, q4_K, q6_K or mxfp4")),
        };
        let (rows, columns) = (self.rows.len(), self.shape.last().copied().unwrap_or(0));
        let (rows, columns, layout) = match self.order {
            Order::Columns => (columns, rows, Layout::Columns),
            _ => (rows, columns, Layout::Rows),
        };
        let offset = entry.offset() + bytes.start as u64;
        Ok(Piece { part: self.part, source: entry.source(), offset, dtype, rows, columns, layout })
    }

    /// The same in MXFP4.
    fn apart(&self, checkpoint: &Checkpoint) -> Result<Piece> {
        let columns = self.shape.last().copied().unwrap_or(0);
        let find = |suffix: &str, of_block: &[usize]| {
            let name = format!("{}{suffix}", self.tensor);
            let shape = [&self.shape[..self.shape.len() - 1], &[columns / mxfp4::WEIGHTS], of_block].concat();
            let entry = checkpoint.entry(&name)?;
            if entry.dtype != ElementType::Plain(Plain::U8) || entry.shape != shape {
                let detail = format!("expected U8 {shape:?}, got {:?} {:?}", entry.dtype, entry.shape);
                return Err(checkpoint.wrong(entry, &name, detail));
            }
            let all: usize = self.shape.iter().rev().skip(1).product();
            Ok((entry.source(), entry.offset() + (entry.bytes / all.max(1) * self.rows.start) as u64))
        };
        let (source, offset) = find(MXFP4[0], &[mxfp4::BLOCK_BYTES])?;
        let (of_scales, scales) = find(MXFP4[1], &[])?;
        let layout = Layout::Apart { source: of_scales, scales };
        Ok(Piece { part: self.part, source, offset, dtype: Dtype::Mxfp4, rows: self.rows.len(), columns, layout })
    }
}
