//! The tensors of a GGUF file for a decoder: experts as they are stored, everything else as floats of one dtype.
//!
//! An expert is a part of a tensor that holds all of its layer's, `[experts, rows, columns]`: views of one copy of it in memory, or
//! ranges of the file for an expert cache. Quantised weights that are no expert's are widened when they are loaded. What
//! llama.cpp did to a tensor on its way into the file is undone: rows of queries and keys that take turns, keys and
//! values of latent attention that were split.
//!
//! Knows nothing of metadata: which tensor is which is for [`gguf_names`](crate::weights::gguf::names) to say.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use safetensors::Dtype as StoredDtype;

use crate::checkpoint::{BlockType, Checkpoint, ElementType, TensorEntry};
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::layer::expert::Expert;
use crate::layer::packed::Packed;
use crate::layer::projection::{Projection, Weight};
use crate::offload::store::{Part, Piece};
use crate::spec::{ModelSpec, MoeSpec};
use crate::weights::gguf::names::{TensorNames, TensorSource, single, stack};

/// Tensors by the names that transformers gives them.
pub(super) struct GgufBackend {
    checkpoint: Arc<Checkpoint>,
    names: Result<TensorNames>,
}

impl GgufBackend {
    pub(super) fn new(checkpoint: Arc<Checkpoint>) -> Self {
        let names = TensorNames::new(checkpoint.gguf().unwrap_or(&Default::default()));
        Self { checkpoint, names }
    }

    fn source(&self, name: &str) -> Result<TensorSource> {
        let names = match &self.names {
            Ok(names) => names,
            // The configuration was read from the same metadata, so this is for those who have brought another.
            Err(error) => return Err(Error::shape("GGUF architecture", "one that is known", error)),
        };
        Ok(names.source(name).unwrap_or_else(|| TensorSource::Same(name.into())))
    }

    /// The tensor of transformers' `name`, in `f32` or as stored, in transformers' shape but for dimensions of 1.
    fn load(&self, name: &str, device: &Device) -> Result<(String, Tensor)> {
        Ok(match self.source(name)? {
            TensorSource::Same(name) => {
                let tensor = self.stored(&name, device)?;
                (name, tensor)
            }
            TensorSource::InTurns { name, heads } => {
                let tensor = halves_apart(&self.stored(&name, device)?, heads)?;
                (name, tensor)
            }
            TensorSource::KeysAndValues { joined, keys, values } => {
                if self.has(&joined) || !self.has(&keys) {
                    let tensor = self.stored(&joined, device)?;
                    return Ok((joined, tensor));
                }
                let [left, right] = [&keys, &values].map(|name| self.stored(name, device));
                let tensor = joined_heads(&left?, &right?);
                (keys, tensor.map_err(|error| Error::shape(values, "values beside the keys", error))?)
            }
        })
    }

    fn has(&self, stored: &str) -> bool {
        self.checkpoint.tensors().contains_key(stored)
    }

    /// A tensor by its name in the file.
    fn stored(&self, name: &str, device: &Device) -> Result<Tensor> {
        let entry = self.checkpoint.entry(name)?;
        let plain = match entry.dtype {
            ElementType::Plain(StoredDtype::F32) => DType::F32,
            ElementType::Plain(StoredDtype::F16) => DType::F16,
            ElementType::Plain(StoredDtype::BF16) => DType::BF16,
            ElementType::Plain(_) => return Err(unread(&self.checkpoint, entry, name)),
            ElementType::Blocks(_) => return Ok(quantized(&self.checkpoint, name, device)?.dequantize(device)?),
        };
        Ok(Tensor::from_raw_buffer(&self.checkpoint.read(name)?, plain, &entry.shape, device)?)
    }

    fn wrong_shape(&self, stored: &str, expected: &Shape, got: &[usize]) -> Error {
        let file = self.checkpoint.entry(stored).map(|entry| self.checkpoint.file_of(entry));
        let detail = format!("tensor `{stored}`: expected shape {:?}, got {got:?}", expected.dims());
        Error::Checkpoint { file: file.unwrap_or_default().into(), detail }
    }
}

impl SimpleBackend for GgufBackend {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let (stored, tensor) = self.load(name, device)?;
        // Dimensions of 1 are not in the file.
        let long = |dims: &[usize]| dims.iter().copied().filter(|&size| size != 1).collect::<Vec<_>>();
        if long(tensor.dims()) != long(shape.dims()) {
            return Err(self.wrong_shape(&stored, &shape, tensor.dims()).into());
        }
        tensor.reshape(shape)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.load(name, device)?.1.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match self.source(name) {
            Ok(TensorSource::Same(name) | TensorSource::InTurns { name, .. }) => self.has(&name),
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

/// `[heads · (key width + value width), rank]` of keys `[heads, rank, width]` and values `[heads, width, rank]`.
fn joined_heads(keys: &Tensor, values: &Tensor) -> candle_core::Result<Tensor> {
    let joined = Tensor::cat(&[keys.transpose(1, 2)?.to_dtype(DType::F32)?, values.to_dtype(DType::F32)?], 1)?;
    joined.contiguous()?.flatten_to(1)
}

fn unread(checkpoint: &Checkpoint, entry: &TensorEntry, name: &str) -> Error {
    let expected = "F32, F16, BF16, or a quantised type that Candle reads (q4_0 to q8_0, q2_K to q6_K)";
    let detail = format!("tensor `{name}`: expected {expected}, got {:?}", entry.dtype);
    Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail }
}

/// A tensor as it is stored.
fn quantized(checkpoint: &Checkpoint, name: &str, device: &Device) -> Result<QTensor> {
    let entry = checkpoint.entry(name)?;
    let dtype = ggml_dtype(entry.dtype).ok_or_else(|| unread(checkpoint, entry, name))?;
    let storage = QStorage::from_data(Cow::Owned(checkpoint.read(name)?), device, dtype)?;
    Ok(QTensor::new(storage, entry.shape.as_slice())?)
}

/// Whole blocks of a quantised type as floats.
pub(super) fn floats(stored: ElementType, bytes: Vec<u8>) -> Result<Vec<f32>> {
    let ElementType::Blocks(blocks) = stored else { return Ok(Vec::new()) };
    let Some(dtype) = ggml_dtype(stored) else { return Ok(Vec::new()) };
    let numbers = bytes.len() / blocks.bytes * blocks.numbers;
    let tensor = QTensor::new(QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, dtype)?, numbers)?;
    Ok(tensor.dequantize(&Device::Cpu)?.to_vec1()?)
}

/// Candle's name of a type; `None` for those that it does not widen.
fn ggml_dtype(stored: ElementType) -> Option<GgmlDType> {
    Some(match stored {
        ElementType::Plain(StoredDtype::F32) => GgmlDType::F32,
        ElementType::Plain(StoredDtype::F16) => GgmlDType::F16,
        ElementType::Plain(StoredDtype::BF16) => GgmlDType::BF16,
        ElementType::Plain(_) => return None,
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
            _ => return None,
        },
    })
}

/// Where a part of an expert is: rows of a tensor.
struct Place {
    part: Part,
    tensor: String,
    rows: Range<usize>,
}

/// The parts of expert `id` of a block, whose tensors have the shapes that `moe` says.
fn places(checkpoint: &Checkpoint, moe: &MoeSpec, block: usize, id: usize) -> Result<Vec<Place>> {
    let (width, hidden) = (moe.expert_width, moe.hidden);
    let both = stack(block, "gate_up");
    let is_joined = checkpoint.tensors().contains_key(&both);
    let parts = [
        (Part::Gate, "gate", [width, hidden]),
        (Part::Up, "up", [width, hidden]),
        (Part::Down, "down", [hidden, width]),
    ];
    let there = parts.into_iter().filter(|(part, ..)| moe.activation.gated || *part != Part::Gate);
    let place = |(part, name, [rows, columns]): (Part, &str, [usize; 2])| {
        let (tensor, shape, first) = match (part, single(block, name, id)) {
            (Part::Gate | Part::Up, _) if is_joined => {
                let half = usize::from(part == Part::Up);
                (both.clone(), vec![moe.experts, 2 * width, hidden], (2 * id + half) * width)
            }
            (_, one) if checkpoint.tensors().contains_key(&one) => (one, vec![rows, columns], 0),
            _ => (stack(block, name), vec![moe.experts, rows, columns], id * rows),
        };
        let entry = checkpoint.entry(&tensor)?;
        if entry.shape != shape {
            let detail = format!("tensor `{tensor}`: expected shape {shape:?}, got {:?}", entry.shape);
            return Err(Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail });
        }
        Ok(Place { part, tensor, rows: first..first + rows })
    };
    there.map(place).collect()
}

/// A tensor of experts in memory.
#[derive(Clone)]
enum Stored {
    Quantized(Arc<QTensor>),
    /// In MXFP4, which Candle does not have.
    Packed(Packed),
}

impl Stored {
    fn load(checkpoint: &Checkpoint, name: &str, device: &Device) -> Result<Self> {
        let entry = checkpoint.entry(name)?;
        match (entry.dtype, entry.shape.split_last()) {
            (ElementType::Blocks(BlockType { name: "mxfp4", .. }), Some((&columns, rows))) => {
                let rows = rows.iter().product();
                Ok(Self::Packed(Packed::new(Dtype::Mxfp4, rows, columns, checkpoint.read(name)?)?))
            }
            _ => Ok(Self::Quantized(Arc::new(quantized(checkpoint, name, device)?))),
        }
    }

    fn rows(&self, rows: Range<usize>) -> Result<Weight> {
        match self {
            Self::Quantized(tensor) => Weight::rows(tensor.clone(), rows),
            Self::Packed(packed) => Ok(packed.of_rows(rows)?.into()),
        }
    }
}

/// The experts of a block, as they are stored: on the CPU views of one copy of each tensor.
pub(super) fn experts(checkpoint: &Checkpoint, moe: &MoeSpec, block: usize, device: &Device) -> Result<Vec<Expert>> {
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    let mut projection = |place: Place| -> Result<Projection> {
        let stored = match tensors.get(&place.tensor) {
            Some(stored) => stored.clone(),
            None => {
                let stored = Stored::load(checkpoint, &place.tensor, device)?;
                tensors.insert(place.tensor, stored.clone());
                stored
            }
        };
        Ok(Projection::new(stored.rows(place.rows)?, None))
    };
    let mut expert = |id: usize| {
        let (mut gate, mut rest) = (None, Vec::new());
        for place in places(checkpoint, moe, block, id)? {
            match place.part {
                Part::Gate => gate = Some(projection(place)?),
                _ => rest.push(projection(place)?),
            }
        }
        let [up, down] = <[Projection; 2]>::try_from(rest)
            .map_err(|rest| Error::shape("parts of an expert", "up and down projection", rest.len()))?;
        Expert::from_projections(moe.activation, gate, up, down)
    };
    (0..moe.experts).map(&mut expert).collect()
}

/// The pieces of all experts of a block, in the file.
pub(super) fn pieces(checkpoint: &Checkpoint, moe: &MoeSpec, block: usize) -> Result<Vec<Vec<Piece>>> {
    let piece = |place: Place| Piece::tensor(checkpoint, place.part, &place.tensor)?.of_rows(place.rows);
    let expert = |id: usize| places(checkpoint, moe, block, id)?.into_iter().map(piece).collect();
    (0..moe.experts).map(expert).collect()
}

/// Type and bytes of the parts of all experts of a block, whether anything here can read them or not.
pub(super) fn sizes(checkpoint: &Checkpoint, moe: &MoeSpec, block: usize) -> Result<Vec<Vec<(String, u64)>>> {
    let part = |place: Place| {
        let entry = checkpoint.entry(&place.tensor)?;
        let rows: usize = entry.shape.iter().rev().skip(1).product();
        let name = match entry.dtype {
            ElementType::Plain(dtype) => format!("{dtype:?}").to_lowercase(),
            ElementType::Blocks(blocks) => blocks.name.into(),
        };
        Ok((name, (entry.bytes / rows.max(1) * place.rows.len()) as u64))
    };
    (0..moe.experts).map(|id| places(checkpoint, moe, block, id)?.into_iter().map(part).collect()).collect()
}

/// Checks that the file has no experts beyond those of `spec`.
pub(super) fn check_experts(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    for (name, entry) in checkpoint.tensors() {
        let Some((block, rest)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { continue };
        let (Ok(block), true) = (block.parse::<usize>(), rest.starts_with("ffn_gate_inp.")) else { continue };
        let wrong = |expected: String| {
            let detail = format!("tensor `{name}`: expected {expected} as the metadata say, got one");
            Error::Checkpoint { file: checkpoint.file_of(entry).into(), detail }
        };
        if block >= spec.layers.saturating_add(spec.extra_blocks) {
            return Err(wrong(format!("no block after {}", spec.layers - 1)));
        }
        if spec.dense.blocks.binary_search(&block).is_ok() {
            return Err(wrong(format!("no experts in block {block}")));
        }
    }
    Ok(())
}
