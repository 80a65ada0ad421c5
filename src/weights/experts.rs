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
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::experts::mxfp4;
use crate::offload::store::{Layout, Part, Piece};
use crate::spec::MoeSpec;

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
/// As [`stack_order`], and for half a stack.
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
    Ok(match stack_order(moe, &tensors.shape(&gate_up)?, &tensors.shape(&down)?)? {
        Order::Columns => vec![
            slice(inner_part, &gate_up, [hidden, inner], Order::Columns),
            slice(Part::Down, &down, [width, hidden], Order::Columns),
        ],
        _ => {
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
    })
}

/// How stacked experts lie, by the shapes of gate and up projections, and of down projections: [`Order::Rows`] or [`Order::Columns`]. Only
/// where there is no gate and the experts are as wide as the hidden state can it be told from neither.
///
/// # Errors
/// [`Error::Shape`] for shapes of other experts, and for those that could be either.
pub(crate) fn stack_order(moe: &MoeSpec, gate_up: &[usize], down: &[usize]) -> Result<Order> {
    let (hidden, width) = (moe.hidden, moe.expert_width);
    let inner = moe.inner_projections().saturating_mul(width);
    let rows_first = [[moe.experts, inner, hidden], [moe.experts, hidden, width]];
    let columns_first = rows_first.map(|[experts, rows, columns]| [experts, columns, rows]);
    let matches = |shapes: [[usize; 3]; 2]| gate_up == shapes[0] && down == shapes[1];
    let wrong = |expected: String, got: &str| {
        Err(Error::shape("stacked experts", expected, format!("{gate_up:?} and {down:?}{got}")))
    };
    match (matches(rows_first), matches(columns_first)) {
        (true, false) => Ok(Order::Rows),
        (false, true) => Ok(Order::Columns),
        (true, true) => {
            wrong("shapes that tell rows from columns, or experts one by one".into(), ", which could be either")
        }
        (false, false) => {
            let shown = |shapes: [[usize; 3]; 2]| format!("{:?} and {:?}", shapes[0], shapes[1]);
            wrong(format!("{}, or {}", shown(rows_first), shown(columns_first)), "")
        }
    }
}

/// What the expert engine calls a type of a file; `None` for one that it does not read.
pub(crate) fn dtype(stored: ElementType) -> Option<Dtype> {
    Some(match stored {
        ElementType::Plain(Plain::F32) => Dtype::F32,
        ElementType::Plain(Plain::F16) => Dtype::F16,
        ElementType::Plain(Plain::BF16) => Dtype::Bf16,
        ElementType::Blocks(BlockType { name: "q8_0", .. }) => Dtype::Q8_0,
        ElementType::Blocks(BlockType { name: "q4_K", .. }) => Dtype::Q4K,
        ElementType::Blocks(BlockType { name: "q5_K", .. }) => Dtype::Q5K,
        ElementType::Blocks(BlockType { name: "q6_K", .. }) => Dtype::Q6K,
        ElementType::Blocks(BlockType { name: "mxfp4", .. }) => Dtype::Mxfp4,
        _ => return None,
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
        let dtype = dtype(entry.dtype).ok_or_else(|| match entry.dtype {
            ElementType::Plain(_) => wrong("F32, BF16 or F16"),
            ElementType::Blocks(_) => wrong("q8_0, q4_K, q5_K, q6_K or mxfp4"),
        })?;
        let (rows, columns) = (self.rows.len(), self.shape.last().copied().unwrap_or(0));
        let (rows, columns, layout) = match self.order {
            Order::Columns => (columns, rows, Layout::Columns),
            _ => (rows, columns, Layout::Rows),
        };
        let offset = entry.offset + bytes.start as u64;
        Ok(Piece { part: self.part, source: entry.source, offset, dtype, rows, columns, layout })
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
            Ok((entry.source, entry.offset + (entry.bytes / all.max(1) * self.rows.start) as u64))
        };
        let (source, offset) = find(MXFP4[0], &[mxfp4::BLOCK_BYTES])?;
        let (of_scales, scales) = find(MXFP4[1], &[])?;
        let layout = Layout::Apart { source: of_scales, scales };
        Ok(Piece { part: self.part, source, offset, dtype: Dtype::Mxfp4, rows: self.rows.len(), columns, layout })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    impl Tensors for BTreeMap<&str, Vec<usize>> {
        fn has(&self, tensor: &str) -> bool {
            self.contains_key(tensor)
        }

        fn shape(&self, tensor: &str) -> Result<Vec<usize>> {
            self.get(tensor).cloned().ok_or_else(|| Error::shape(tensor, "one", "none"))
        }
    }

    /// Parts of expert 1 of three, their tensors and rows.
    fn rows(moe: &MoeSpec, tensors: &[(&'static str, [usize; 3])]) -> Vec<(Part, String, Range<usize>)> {
        let tensors: BTreeMap<&str, Vec<usize>> = tensors.iter().map(|(name, shape)| (*name, shape.to_vec())).collect();
        let slices = slices(moe, "ffn.", 1, &tensors).unwrap();
        slices.into_iter().map(|slice| (slice.part, slice.tensor.replace("ffn.experts.", ""), slice.rows)).collect()
    }

    #[test]
    fn every_way_to_store_experts_has_its_rows() {
        let mut moe = MoeSpec::new(4, 3, 2, 5).unwrap();
        let place = |part: Part, tensor: &str, rows: Range<usize>| (part, tensor.to_string(), rows);
        let [gate, up] = [(Part::Gate, "1.gate_proj.weight"), (Part::Up, "1.up_proj.weight")];
        let down = |rows| place(Part::Down, "down_proj", rows);
        let single =
            [place(gate.0, gate.1, 0..5), place(up.0, up.1, 0..5), place(Part::Down, "1.down_proj.weight", 0..4)];
        assert_eq!(rows(&moe, &[]), single);
        let by_rows = [("ffn.experts.gate_up_proj", [3, 10, 4]), ("ffn.experts.down_proj", [3, 4, 5])];
        let halves = [place(Part::Gate, "gate_up_proj", 10..15), place(Part::Up, "gate_up_proj", 15..20), down(4..8)];
        assert_eq!(rows(&moe, &by_rows), halves);
        let by_columns = [("ffn.experts.gate_up_proj", [3, 4, 10]), ("ffn.experts.down_proj", [3, 5, 4])];
        assert_eq!(rows(&moe, &by_columns), [place(Part::GateUp, "gate_up_proj", 4..8), down(5..10)]);
        let both = [place(Part::GateUp, "gate_up_proj", 10..20), down(4..8)];
        assert_eq!(rows(&moe, &[("ffn.experts.gate_up_proj_blocks", [0; 3])]), both);
        moe.names.stacked_in_turns = true;
        assert_eq!(rows(&moe, &by_rows), both);
        moe.activation.gated = false;
        let by_rows = [("ffn.experts.gate_up_proj", [3, 5, 4]), by_rows[1]];
        assert_eq!(rows(&moe, &by_rows), [place(Part::Up, "gate_up_proj", 5..10), down(4..8)]);
    }

    #[test]
    fn the_order_of_a_stack_is_told_by_both_shapes_or_not_at_all() {
        let order = |spec: &MoeSpec, gate_up: [usize; 3], down: [usize; 3]| {
            stack_order(spec, &gate_up, &down).map_err(|error| error.to_string())
        };
        // Twice the width is the hidden width, or the width is: one of the two shapes alone says nothing.
        for (hidden, width) in [(8, 4), (8, 8), (6, 4)] {
            let spec = MoeSpec::new(hidden, 5, 2, width).unwrap();
            let rows = order(&spec, [5, 2 * width, hidden], [5, hidden, width]);
            assert_eq!(rows, Ok(Order::Rows));
            let columns = order(&spec, [5, hidden, 2 * width], [5, width, hidden]);
            assert_eq!(columns, Ok(Order::Columns));
        }
        let spec = MoeSpec::new(8, 5, 2, 4).unwrap();
        assert!(order(&spec, [4, 8, 8], [4, 8, 4]).unwrap_err().starts_with("stacked experts: expected [5, 8, 8]"));
        let mut open = MoeSpec::new(8, 5, 2, 8).unwrap();
        open.activation.gated = false;
        assert!(order(&open, [5, 8, 8], [5, 8, 8]).unwrap_err().contains("which could be either"));
    }
}
