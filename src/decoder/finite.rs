//! No NaN and no infinity leaves the decoder: hidden states are looked at after each half of a block, logits at the end.
//!
//! `[.., n]` values, a pass over them for their exponents alone: `O(hidden)` a token and half block, where the products around it are
//! `O(hidden²)`. Weights are never looked at before something went wrong; then those of the half block are read once, for the tensor
//! that is to blame.
//!
//! Knows nothing of what a block computes.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;

use super::builder;
use crate::checkpoint::{Checkpoint, ElementType, TensorEntry};
use crate::error::{Error, Result};
use crate::spec::{BlockNames, ModelSpec};

/// A part of the decoder that gives a hidden state or logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Embedding,
    Attention(usize),
    Ffn(usize),
    Norm,
    Output,
    /// What is added to gate scores for selection, checked when it is loaded.
    SelectionBias,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Attention(block) => write!(f, "layer {block} of the model, attention"),
            Self::Ffn(block) => write!(f, "layer {block} of the model, feed-forward"),
            Self::Norm => f.write_str("last norm"),
            Self::Output => f.write_str("logits"),
            Self::SelectionBias => f.write_str("selection bias"),
        }
    }
}

/// An error of loading `spec` from `checkpoint`, with the tensor that is to blame where one is no number.
pub(super) fn of_loading(error: Error, checkpoint: &Checkpoint, spec: &ModelSpec) -> Error {
    let suspects = Suspects { checkpoint: Some(checkpoint), spec, dtype: DType::F32 };
    match error {
        Error::NonFinite { value, .. } => suspects.error(Place::SelectionBias, "", value),
        other => other,
    }
}

/// The first value that is no number, and where in the tensor it is. Where the tensor is on another device only `wait` says to look.
pub(super) fn first_non_finite(tensor: &Tensor, wait: bool) -> Result<Option<(usize, f64)>> {
    if !tensor.device().is_cpu() {
        if !wait {
            return Ok(None);
        }
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        return Ok(values.iter().position(|value| !value.is_finite()).map(|at| (at, f64::from(values[at]))));
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { return Ok(None) };
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => first(&values[start..end], |value| !value.is_finite(), f64::from),
        Storage::Cpu(CpuStorage::F16(values)) => first(&values[start..end], |value| !value.is_finite(), f16::to_f64),
        Storage::Cpu(CpuStorage::BF16(values)) => first(&values[start..end], |value| !value.is_finite(), bf16::to_f64),
        Storage::Cpu(CpuStorage::F64(values)) => first(&values[start..end], |value| !value.is_finite(), |value| value),
        _ => None,
    })
}

/// The same of rows of floats.
pub(super) fn first_of_rows(values: &[f32]) -> Option<(usize, f64)> {
    first(values, |value| !value.is_finite(), f64::from)
}

fn first<T: Copy>(values: &[T], wrong: impl Fn(T) -> bool, wide: impl Fn(T) -> f64) -> Option<(usize, f64)> {
    // All of them without a branch, which is many at a time; nearly always nothing is found.
    if !values.iter().fold(false, |any, &value| any | wrong(value)) {
        return None;
    }
    values.iter().position(|&value| wrong(value)).map(|at| (at, wide(values[at])))
}

/// Where an error looks for what is to blame.
pub(super) struct Suspects<'a> {
    /// The files; `None` where the decoder was not loaded from any.
    pub(super) checkpoint: Option<&'a Checkpoint>,
    /// How blocks call their parts, and whether the embeddings are the output weights too.
    pub(super) spec: &'a ModelSpec,
    /// Of the activations.
    pub(super) dtype: DType,
}

impl Suspects<'_> {
    /// The error for a value at `place`, with `detail` of where in it, that names the tensor where one is to blame.
    pub(super) fn error(&self, place: Place, detail: &str, value: f64) -> Error {
        let cause = self.checkpoint.map_or(String::new(), |checkpoint| self.cause(checkpoint, place));
        Error::NonFinite { place: format!("{place}{detail}"), value, cause }
    }

    fn cause(&self, checkpoint: &Checkpoint, place: Place) -> String {
        let largest_finite = match self.dtype {
            DType::F16 => f64::from(f16::MAX),
            _ => f64::from(f32::MAX),
        };
        let (mut largest, mut all_read) = ((0.0, String::new()), true);
        let of = |place: Place| checkpoint.tensors().iter().filter(move |(name, _)| self.is_of(place, name));
        let others = match place {
            // Some families' norm before it has the name that others' norm after attention has.
            Place::Ffn(block) => Some(Place::Attention(block)),
            _ => None,
        };
        for (name, entry) in of(place).chain(others.into_iter().flat_map(of)) {
            let file = checkpoint.file_of(entry);
            let mut found = None;
            // Of a tensor that cannot be read any more nothing is said.
            all_read &= each_value(checkpoint, name, entry, |at, value: f64| {
                let size = value.abs();
                if size.is_nan() || size > largest_finite {
                    found = Some((at, value));
                } else if size > largest.0 {
                    largest = (size, name.clone());
                }
                found.is_none()
            })
            .is_ok();
            if let Some((at, value)) = found {
                let at = index(at, &entry.shape);
                let why = match value.is_finite() {
                    true => format!(", more than {:?} holds (bf16 and f32 hold more)", self.dtype).to_lowercase(),
                    false => String::new(),
                };
                return format!("; tensor `{name}` of {file} has {value:?} at {at:?}{why}");
            }
        }
        let half = match self.dtype {
            DType::F16 => "; f16 ends at 65504, bf16 and f32 hold more",
            _ => "",
        };
        match largest {
            (size, name) if size > 0.0 && all_read => {
                format!("; its weights are finite, the largest is {size:e} in tensor `{name}`: an overflow{half}")
            }
            _ => half.into(),
        }
    }

    /// Whether a tensor belongs to a place, under the names of Hugging Face or of GGUF.
    fn is_of(&self, place: Place, name: &str) -> bool {
        let BlockNames { root, ffn_norm, last_norm, .. } = self.spec.names;
        let under = |stem: &str| name.strip_prefix(root).and_then(|rest| rest.strip_prefix('.')?.strip_prefix(stem));
        let in_block = |block: usize| {
            let ours = under("layers.").or(name.strip_prefix("blk."));
            let rest = ours.and_then(|rest| rest.split_once('.'));
            rest.filter(|(number, _)| number.parse() == Ok(block)).map(|(_, rest)| rest)
        };
        let is_ffn = |rest: &str| {
            let own = rest.strip_prefix(self.spec.ffn.as_str()).is_some_and(|rest| rest.starts_with('.'));
            own || ["ffn_", "exp_probs_b", ffn_norm].iter().any(|start| rest.starts_with(start))
        };
        let starts = |names: &[&str]| names.iter().any(|start| name.starts_with(start));
        match place {
            Place::Embedding => under("embed_tokens.").is_some() || starts(&["token_embd."]),
            Place::Attention(block) => in_block(block).is_some_and(|rest| !is_ffn(rest)),
            Place::Ffn(block) => in_block(block).is_some_and(is_ffn),
            // LFM2's is called after the embeddings.
            Place::Norm => under(last_norm).is_some() || starts(&["output_norm.", "token_embd_norm."]),
            Place::Output if self.spec.tied_embeddings => self.is_of(Place::Embedding, name),
            Place::Output => starts(&["lm_head.", "output."]),
            Place::SelectionBias => {
                ["e_score_correction_bias", "expert_bias", "exp_probs_b"].iter().any(|part| name.contains(part))
            }
        }
    }
}

/// An index of a row-major tensor.
fn index(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape.iter().rev().map(|&size| (at % size.max(1), at /= size.max(1)).0).collect();
    index.reverse();
    index
}

/// Bytes of a tensor that are looked at together.
const CHUNK_BYTES: usize = 1 << 20;

/// Calls `each` with the values of a tensor and their places, until it says that this is enough.
fn each_value(
    checkpoint: &Checkpoint,
    name: &str,
    entry: &TensorEntry,
    mut each: impl FnMut(usize, f64) -> bool,
) -> Result<()> {
    let unit = match entry.dtype {
        ElementType::Plain(dtype) => dtype.bitsize().div_ceil(8),
        ElementType::Blocks(blocks) => blocks.bytes,
    };
    let chunk = CHUNK_BYTES / unit * unit;
    let mut at = 0;
    for start in (0..entry.bytes).step_by(chunk) {
        let mut bytes = vec![0; chunk.min(entry.bytes - start)];
        checkpoint.read_part(entry, name, start, &mut bytes)?;
        for value in values(entry.dtype, name, bytes)? {
            if !each(at, value) {
                return Ok(());
            }
            at += 1;
        }
    }
    Ok(())
}

fn values(dtype: ElementType, name: &str, bytes: Vec<u8>) -> Result<Vec<f64>> {
    let halves = |wide: fn([u8; 2]) -> f64| bytes.as_chunks().0.iter().map(|half| wide(*half)).collect();
    Ok(match dtype {
        ElementType::Plain(Dtype::F32) => {
            bytes.as_chunks().0.iter().map(|word| f64::from(f32::from_le_bytes(*word))).collect()
        }
        ElementType::Plain(Dtype::F64) => bytes.as_chunks().0.iter().map(|word| f64::from_le_bytes(*word)).collect(),
        ElementType::Plain(Dtype::F16) => halves(|half| f16::from_le_bytes(half).to_f64()),
        ElementType::Plain(Dtype::BF16) => halves(|half| bf16::from_le_bytes(half).to_f64()),
        // Scales of MXFP4, exponents of 2 of which 255 is no number; of packed nibbles none is.
        ElementType::Plain(Dtype::U8) if name.ends_with("_scales") => bytes.into_iter().map(power_of_two).collect(),
        ElementType::Plain(_) => Vec::new(),
        // A block has a scale, then 32 nibbles.
        ElementType::Blocks(blocks) if blocks.name == "mxfp4" => {
            let scale = |block: &[u8]| block.first().map_or(0.0, |&byte| power_of_two(byte));
            bytes.chunks(blocks.bytes).flat_map(|block| std::iter::repeat_n(scale(block), blocks.numbers)).collect()
        }
        ElementType::Blocks(blocks) => {
            let numbers = bytes.len() / blocks.bytes * blocks.numbers;
            let tensor = builder::quantized(dtype, bytes, &[numbers], &Device::Cpu)?;
            let floats = tensor.map(|tensor| tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>()).transpose()?;
            floats.unwrap_or_default().into_iter().map(f64::from).collect()
        }
    })
}

fn power_of_two(exponent: u8) -> f64 {
    if exponent == u8::MAX { f64::NAN } else { f64::from(f32::powi(2.0, i32::from(exponent) - 127)) }
}
