//! Weights of a model's files as they are stored there, for the engine: nothing is widened but what it does not read.
//!
//! What was done to a tensor on its way into a GGUF file is undone on whole rows: those of queries and keys that take turns, keys and values of
//! latent attention that were joined, what delta nets have in one. Which tensor is which is for [`weights`](crate::weights) to say.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use crate::checkpoint::{Checkpoint, ElementType};
use crate::decoder::builder::{self, FileRows, quantized};
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::layer::Packed;
use crate::layer::borrowed::packed;
use crate::layer::load::Rows;
use crate::layer::projection::{Linears, Weight};
use crate::offload::slab::Slab;
use crate::simd::multiply::LINE_BYTES;
use crate::spec::LatentSpec;
use crate::weights::experts::{Order, Slice, dtype};
use crate::weights::{TensorSource, source};

/// The files of a model.
pub(in crate::decoder) struct Stored<'a> {
    pub(in crate::decoder) checkpoint: &'a Checkpoint,
    /// Of activations; weights of a type that the engine does not read become floats of it.
    pub(in crate::decoder) dtype: DType,
}

impl Stored<'_> {
    /// The weight of a linear layer under a builder, `[rows, columns]`.
    pub(super) fn linear(&self, vb: &VarBuilder<'_>, shape: [usize; 2]) -> Result<Packed> {
        match source(self.checkpoint, &vb.pp("weight").prefix())? {
            TensorSource::Same(name) => self.tensor(&name, &shape),
            TensorSource::KeysAndValues { joined, .. } => self.tensor(&joined, &shape),
            TensorSource::Row { name, .. } => {
                Err(Error::shape(format!("tensor `{name}`"), "a tensor of a linear layer", "rows of several"))
            }
            TensorSource::Logarithms(name) => {
                Err(Error::shape(format!("tensor `{name}`"), "a tensor of a linear layer", "numbers of heads"))
            }
            TensorSource::Halves { name, parts, second } => {
                let [rows, columns] = shape;
                let stored = self.tensor(&name, &[2 * rows, columns])?;
                if parts == 0 || !rows.is_multiple_of(parts) {
                    return Err(Error::shape("rows of a delta net", format!("{parts} parts of two halves"), 2 * rows));
                }
                let each = rows / parts;
                stored.pick((0..rows).map(|row| (2 * (row / each) + usize::from(second)) * each + row % each))
            }
            TensorSource::InTurns { name, heads } => {
                let stored = self.tensor(&name, &shape)?;
                let (rows, pairs) = (shape[0], shape[0] / heads.max(1) / 2);
                if heads == 0 || pairs * 2 * heads != rows {
                    return Err(Error::shape("rows of queries or keys", format!("{heads} heads of even width"), rows));
                }
                stored.pick((0..rows).map(|row| {
                    let (head, within) = (row / (2 * pairs), row % (2 * pairs));
                    head * 2 * pairs + 2 * (within % pairs) + within / pairs
                }))
            }
        }
    }

    /// What makes the keys of all heads of the latent's, transposed `[heads · rank, key width]`, and their values, `[heads · value width, rank]`.
    pub(super) fn keys_and_values(&self, vb: &VarBuilder<'_>, heads: usize, sizes: LatentSpec) -> Result<[Packed; 2]> {
        let LatentSpec { kv_rank, key_width, value_width, .. } = sizes;
        let name = vb.pp("weight").prefix();
        if let TensorSource::KeysAndValues { joined, keys, values } = source(self.checkpoint, &name)? {
            let has = |name: &str| self.checkpoint.tensors().contains_key(name);
            if !has(&joined) && has(&keys) {
                let keys = self.tensor(&keys, &[heads, kv_rank, key_width])?;
                return Ok([keys, self.tensor(&values, &[heads, value_width, kv_rank])?]);
            }
        }
        let both = key_width + value_width;
        let joined = self.linear(vb, [heads * both, kv_rank])?;
        let values = (0..heads * value_width).map(|row| row / value_width * both + key_width + row % value_width);
        let values = joined.pick(values)?;
        // Transposed they are other rows; blocks along the old ones mean nothing then.
        let (matrix, mut keys) = (joined.matrix()?, vec![0.0; heads * kv_rank * key_width]);
        let mut row = vec![0.0; kv_rank];
        for (head, keys) in keys.chunks_exact_mut(kv_rank * key_width).enumerate() {
            for at in 0..key_width {
                matrix.widen(crate::simd::Isa::default(), head * both + at, &mut row);
                keys[at..].iter_mut().step_by(key_width).zip(&row).for_each(|(key, number)| *key = *number);
            }
        }
        let dtype = if matrix.dtype().is_quantized() { self.floats() } else { matrix.dtype() };
        Ok([Packed::from_floats(dtype, heads * kv_rank, key_width, &keys)?, values])
    }

    /// A tensor by its name in the file, all its dimensions but the last as rows.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Packed> {
        let entry = self.checkpoint.entry(name)?;
        // Dimensions of 1 are not in a GGUF file.
        let long = |dims: &[usize]| dims.iter().copied().filter(|&size| size != 1).collect::<Vec<_>>();
        let fits = match self.checkpoint.gguf() {
            Some(_) => long(&entry.shape) == long(shape),
            None => entry.shape == shape,
        };
        if !fits {
            let detail = format!("expected shape {shape:?}, got {:?}", entry.shape);
            return Err(self.checkpoint.wrong(entry, name, detail));
        }
        let columns = shape.last().copied().unwrap_or(0);
        let rows = shape.iter().product::<usize>() / columns.max(1);
        if let Some(dtype) = dtype(entry.dtype) {
            let mut slab = Slab::new(entry.bytes);
            self.checkpoint.read_part(entry, name, 0, &mut slab.bytes_mut()[..entry.bytes])?;
            return Packed::part(dtype, [rows, columns], &Arc::new(slab), 0..entry.bytes);
        }
        let wrong = || builder::unread(self.checkpoint, entry, name);
        let ElementType::Blocks(_) = entry.dtype else {
            let detail = format!("expected dtype F32, BF16 or F16, got {:?}", entry.dtype);
            return Err(self.checkpoint.wrong(entry, name, detail));
        };
        let blocks = quantized(entry.dtype, self.checkpoint.read(name)?, &[rows, columns], &Device::Cpu)?;
        let floats = blocks.ok_or_else(wrong)?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        Packed::from_floats(self.floats(), rows, columns, &floats)
    }

    fn floats(&self) -> Dtype {
        match self.dtype {
            DType::BF16 => Dtype::Bf16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        }
    }
}

/// The experts of a layer as they are stored, in memory that they share: one by one they would be too small for huge pages, without which a
/// core waits for addresses as long as for weights.
pub(super) struct LayerRows<'a> {
    stored: &'a Stored<'a>,
    slab: Arc<Slab>,
    /// By tensor and first row.
    at: BTreeMap<(String, usize), (Dtype, Range<usize>)>,
}

impl Stored<'_> {
    /// Reads all `slices` of a layer that lie row by row in a type that the engine reads.
    pub(super) fn layer(&self, slices: &[Slice]) -> Result<LayerRows<'_>> {
        let (mut at, mut end) = (BTreeMap::new(), 0);
        let mut parts = Vec::new();
        for slice in slices.iter().filter(|slice| slice.order == Order::Rows) {
            let (entry, bytes) = slice.find(self.checkpoint)?;
            let Some(dtype) = dtype(entry.dtype) else { continue };
            let part = end..end + bytes.len();
            end = part.end.next_multiple_of(LINE_BYTES);
            at.insert((slice.tensor.clone(), slice.rows.start), (dtype, part.clone()));
            parts.push((slice, entry, bytes.start, part));
        }
        let mut slab = Slab::new(end);
        for (slice, entry, start, part) in parts {
            self.checkpoint.read_part(entry, &slice.tensor, start, &mut slab.bytes_mut()[part])?;
        }
        Ok(LayerRows { stored: self, slab: Arc::new(slab), at })
    }
}

impl Rows for LayerRows<'_> {
    fn rows(&self, slice: &Slice) -> Result<Weight> {
        let Some((dtype, part)) = self.at.get(&(slice.tensor.clone(), slice.rows.start)) else {
            let in_file =
                FileRows { checkpoint: self.stored.checkpoint, dtype: None, device: &Device::Cpu, name: None };
            return in_file.rows(slice);
        };
        let shape = [slice.rows.len(), slice.shape.last().copied().unwrap_or(0)];
        Ok(Packed::part(*dtype, shape, &self.slab, part.clone())?.into())
    }

    fn kept(&self, weight: Weight) -> Result<Weight> {
        match weight {
            Weight::Dense(tensor) => Ok(packed(&tensor)?.into()),
            weight => Ok(weight),
        }
    }
}

impl Linears for Stored<'_> {
    fn weight(&self, vb: &VarBuilder<'_>, shape: [usize; 2]) -> Result<Weight> {
        Ok(self.linear(vb, shape)?.into())
    }
}
