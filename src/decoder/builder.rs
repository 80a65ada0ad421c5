//! Stored tensors as Candle's: a `VarBuilder` over the files of a model, and the numbers of the slices that experts are.
//!
//! Tensors are read by position when they are asked for, under transformers' names whatever the files are, converted to one dtype. What
//! was done to one on its way into a GGUF file is undone: rows of queries and keys that take turns, keys and values of latent
//! attention that were split, what delta nets have in one tensor, how fast they forget, numbers in blocks. Experts of such a file stay as
//! they are stored.
//!
//! Which tensor is which is for [`weights`](crate::weights) to say.

use std::borrow::Cow;
use std::sync::Arc;

use bytemuck::{Pod, cast_slice_mut, zeroed_vec};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use half::{bf16, f16};
use safetensors::Dtype as Plain;

use crate::checkpoint::{BlockType, Checkpoint, ElementType, TensorEntry};
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::experts::mxfp4;
use crate::layer::load::Rows;
use crate::layer::packed::Packed;
use crate::layer::projection::Weight;
use crate::offload::store::Layout;
use crate::weights::experts::{Order, Slice};
use crate::weights::{TensorSource, Weights, source};

/// A builder whose tensors come from `weights`, on `device`, in `dtype`.
pub fn var_builder(weights: &Weights, dtype: DType, device: &Device) -> VarBuilder<'static> {
    over(weights.checkpoint().clone(), dtype, device)
}

/// The same over a checkpoint alone.
pub(super) fn over(checkpoint: Arc<Checkpoint>, dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(CheckpointBackend(checkpoint)), dtype, device.clone())
}

struct CheckpointBackend(Arc<Checkpoint>);

impl CheckpointBackend {
    /// The tensor of transformers' `name`, and what it is called in its file.
    fn load(&self, name: &str, dtype: DType, device: &Device) -> Result<(String, Tensor)> {
        let stored = |name: &str| whole(&self.0, name, dtype, device);
        Ok(match source(&self.0, name)? {
            TensorSource::Same(name) => {
                let tensor = stored(&name)?;
                (name, tensor)
            }
            TensorSource::Row { name, row } => {
                let tensor = self::row(&self.0, &name, row, dtype, device)?;
                (name, tensor)
            }
            TensorSource::InTurns { name, heads } => {
                let tensor = halves_apart(&stored(&name)?, heads)?;
                (name, tensor)
            }
            TensorSource::KeysAndValues { joined, keys, values } => {
                if self.has(&joined) || !self.has(&keys) {
                    let tensor = stored(&joined)?;
                    return Ok((joined, tensor));
                }
                let [left, right] = [stored(&keys), stored(&values)];
                let tensor = joined_heads(&left?, &right?);
                (keys, tensor.map_err(|error| Error::shape(values, "values beside the keys", error))?)
            }
            TensorSource::Halves { name, parts, second } => {
                let tensor = half(&stored(&name)?, parts, second)?;
                (name, tensor)
            }
            TensorSource::Logarithms(name) => {
                let numbers = whole(&self.0, &name, DType::F32, device)?.neg()?;
                // One that is no number shows as such when it is met.
                if numbers.flatten_all()?.to_vec1::<f32>()?.iter().any(|&number| number < 0.0) {
                    let detail = "expected no number above 0, got one".to_owned();
                    return Err(self.0.wrong(self.0.entry(&name)?, &name, detail));
                }
                (name, numbers.log()?.to_dtype(dtype)?)
            }
        })
    }

    fn has(&self, stored: &str) -> bool {
        self.0.tensors().contains_key(stored)
    }
}

impl SimpleBackend for CheckpointBackend {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let wrong = |stored: &str, entry: &TensorEntry, got: &[usize]| {
            self.0.wrong(entry, stored, format!("expected shape {:?}, got {got:?}", shape.dims()))
        };
        if self.0.gguf().is_none() {
            // Before it is read.
            let entry = self.0.entry(name)?;
            if entry.shape != shape.dims() {
                return Err(wrong(name, entry, &entry.shape).into());
            }
        }
        let (stored, tensor) = self.load(name, dtype, device)?;
        // Dimensions of 1 are not in a GGUF file.
        let long = |dims: &[usize]| dims.iter().copied().filter(|&size| size != 1).collect::<Vec<_>>();
        if long(tensor.dims()) != long(shape.dims()) {
            return Err(wrong(&stored, self.0.entry(&stored)?, tensor.dims()).into());
        }
        tensor.reshape(shape)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.load(name, dtype, device)?.1)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match source(&self.0, name) {
            Ok(
                TensorSource::Same(name)
                | TensorSource::InTurns { name, .. }
                | TensorSource::Row { name, .. }
                | TensorSource::Halves { name, .. }
                | TensorSource::Logarithms(name),
            ) => self.has(&name),
            Ok(TensorSource::KeysAndValues { joined, keys, .. }) => self.has(&joined) || self.has(&keys),
            Err(_) => false,
        }
    }
}

/// Rows (or biases) of heads whose two halves take turns, one half after the other.
fn halves_apart(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let (shape, count) = (rows.shape(), rows.dim(0)?);
    if heads == 0 || !count.is_multiple_of(2 * heads) {
        return Err(Error::shape("rows of queries or keys", format!("{heads} heads of even width"), count));
    }
    let turns = rows.reshape((heads, count / heads / 2, 2, ()))?;
    Ok(turns.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}

/// Of each of so many parts of rows the first or the second half.
fn half(rows: &Tensor, parts: usize, second: bool) -> Result<Tensor> {
    let count = rows.dim(0)?;
    if parts == 0 || !count.is_multiple_of(2 * parts) {
        return Err(Error::shape("rows of a delta net", format!("{parts} parts of two halves"), count));
    }
    let halves = rows.reshape((parts, 2, count / parts / 2, ()))?;
    Ok(halves.narrow(1, usize::from(second), 1)?.contiguous()?.reshape((count / 2, ()))?)
}

/// `[heads · (key width + value width), rank]` of keys `[heads, rank, width]` and values `[heads, width, rank]`.
fn joined_heads(keys: &Tensor, values: &Tensor) -> candle_core::Result<Tensor> {
    Tensor::cat(&[keys.transpose(1, 2)?, values.clone()], 1)?.contiguous()?.flatten_to(1)
}

/// A tensor by its name in the file.
fn whole(checkpoint: &Checkpoint, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
    let entry = checkpoint.entry(name)?;
    if dtype == DType::U8 {
        // Not numbers but blocks of them.
        return match entry.dtype {
            ElementType::Plain(Plain::U8) => {
                Ok(Tensor::from_vec(checkpoint.read(name)?, entry.shape.as_slice(), device)?)
            }
            other => Err(checkpoint.wrong(entry, name, format!("expected dtype U8, got {other:?}"))),
        };
    }
    let tensor = match entry.dtype {
        ElementType::Plain(_) => floats(checkpoint, entry, name, 0, &entry.shape, device)?,
        ElementType::Blocks(_) => {
            let blocks = quantized(entry.dtype, checkpoint.read(name)?, &entry.shape, device)?;
            blocks.ok_or_else(|| unread(checkpoint, entry, name))?.dequantize(device)?
        }
    };
    Ok(tensor.to_dtype(dtype)?)
}

/// A row of a tensor by its name in the file.
fn row(checkpoint: &Checkpoint, name: &str, row: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let entry = checkpoint.entry(name)?;
    let (start, shape) = entry.row(row).ok_or_else(|| {
        checkpoint.wrong(entry, name, format!("expected more than {row} rows of floats, got {:?}", entry.shape))
    })?;
    Ok(floats(checkpoint, entry, name, start.start, shape, device)?.to_dtype(dtype)?)
}

/// `shape` floats of a tensor from byte `start` on, in their dtype there, read where they stay: a tensor of the size of a vocabulary is
/// not there twice.
fn floats(
    checkpoint: &Checkpoint,
    entry: &TensorEntry,
    name: &str,
    start: usize,
    shape: &[usize],
    device: &Device,
) -> Result<Tensor> {
    fn read<T: WithDType + Pod>(
        read: impl Fn(&mut [u8]) -> Result<()>,
        shape: &[usize],
        device: &Device,
    ) -> Result<Tensor> {
        let mut numbers: Vec<T> = zeroed_vec(shape.iter().product());
        read(cast_slice_mut(&mut numbers))?;
        Ok(Tensor::from_vec(numbers, shape, device)?)
    }
    let bytes = |bytes: &mut [u8]| checkpoint.read_part(entry, name, start, bytes);
    match entry.dtype {
        ElementType::Plain(Plain::F32) => read::<f32>(bytes, shape, device),
        ElementType::Plain(Plain::BF16) => read::<bf16>(bytes, shape, device),
        ElementType::Plain(Plain::F16) => read::<f16>(bytes, shape, device),
        _ if checkpoint.gguf().is_some() => Err(unread(checkpoint, entry, name)),
        other => Err(checkpoint.wrong(entry, name, format!("expected dtype F32, BF16 or F16, got {other:?}"))),
    }
}

pub(super) fn unread(checkpoint: &Checkpoint, entry: &TensorEntry, name: &str) -> Error {
    let expected = "F32, F16, BF16, or a quantised type that Candle reads (q4_0 to q8_0, q2_K to q6_K)";
    checkpoint.wrong(entry, name, format!("expected {expected}, got {:?}", entry.dtype))
}

/// Bytes of a file as a tensor of the type that they have there; `None` for a type that Candle does not widen.
pub(super) fn quantized(
    stored: ElementType,
    bytes: Vec<u8>,
    shape: &[usize],
    device: &Device,
) -> Result<Option<QTensor>> {
    let dtype = match stored {
        ElementType::Plain(Plain::F32) => GgmlDType::F32,
        ElementType::Plain(Plain::F16) => GgmlDType::F16,
        ElementType::Plain(Plain::BF16) => GgmlDType::BF16,
        ElementType::Plain(_) => return Ok(None),
        ElementType::Blocks(blocks) => match blocks.name {
            "q4_0" => GgmlDType::Q4_0,
            "q4_1" => GgmlDType::Q4_1,
            "q5_0" => GgmlDType::Q5_0,
            "q5_1" => GgmlDType::Q5_1,
            "q8_0" => GgmlDType::Q8_0,
            "q2_K" => GgmlDType::Q2K,
            "q3_K" => GgmlDType::Q3K,
            "q4_K" => GgmlDType::Q4K,
            "q5_K" => GgmlDType::Q5K,
            "q6_K" => GgmlDType::Q6K,
            _ => return Ok(None),
        },
    };
    Ok(Some(QTensor::new(QStorage::from_data(Cow::Owned(bytes), device, dtype)?, shape)?))
}

/// Slices of a checkpoint: those of safetensors files as floats of one dtype, but for MXFP4, those of a GGUF file as they are stored.
pub(super) struct FileRows<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    /// What floats become; `None` for what they are.
    pub(super) dtype: Option<DType>,
    pub(super) device: &'a Device,
    /// What errors call the tensors, where that is not their own name.
    pub(super) name: Option<&'a str>,
}

impl Rows for FileRows<'_> {
    fn rows(&self, slice: &Slice) -> Result<Weight> {
        let (checkpoint, rows) = (self.checkpoint, slice.rows.len());
        if slice.order == Order::Apart {
            return self.apart(slice);
        }
        let (entry, bytes) = slice.find(checkpoint)?;
        let (name, columns) = (self.name.unwrap_or(&slice.tensor), slice.shape.last().copied().unwrap_or(0));
        if checkpoint.gguf().is_none() {
            let floats = floats(checkpoint, entry, name, bytes.start, &[rows, columns], self.device)?;
            return Ok(self.dtype.map_or(Ok(floats.clone()), |dtype| floats.to_dtype(dtype))?.into());
        }
        let mut stored = vec![0; bytes.len()];
        checkpoint.read_part(entry, name, bytes.start, &mut stored)?;
        if let ElementType::Blocks(BlockType { name: "mxfp4", .. }) = entry.dtype {
            return Ok(Packed::new(Dtype::Mxfp4, rows, columns, stored)?.into());
        }
        let tensor = quantized(entry.dtype, stored, &[rows, columns], self.device)?;
        Ok(Arc::new(tensor.ok_or_else(|| unread(checkpoint, entry, name))?).into())
    }
}

impl FileRows<'_> {
    fn apart(&self, slice: &Slice) -> Result<Weight> {
        let piece = slice.piece(self.checkpoint)?;
        let Layout::Apart { source, scales } = piece.layout else {
            return Err(Error::shape("weights in mxfp4", "blocks and scales apart", "others"));
        };
        let blocks = piece.rows * piece.columns / mxfp4::WEIGHTS;
        let read = |source: usize, offset: u64, bytes: usize| -> Result<Vec<u8>> {
            let ((file, source), mut read) = (&self.checkpoint.sources()[source], vec![0; bytes]);
            source.read_exact_at(&mut read, offset).map_err(|error| Error::Checkpoint {
                file: file.clone(),
                detail: format!("tensor `{}`: expected {bytes} bytes at {offset}, got {error}", slice.tensor),
            })?;
            Ok(read)
        };
        let joined = mxfp4::joined(
            &read(piece.source, piece.offset, blocks * mxfp4::BLOCK_BYTES)?,
            &read(source, scales, blocks)?,
        )?;
        Ok(Packed::new(Dtype::Mxfp4, piece.rows, piece.columns, joined)?.into())
    }
}
