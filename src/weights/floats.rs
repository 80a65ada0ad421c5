//! Numbers of a model's files for doors without a loader of their own: tensors by transformers' names, an expert's matrices and biases, all in
//! `f32`, whatever their type and their order in the files.
//!
//! Knows nothing of what they are for.

use std::sync::Arc;

use super::experts::{MXFP4, dtype};
use super::{TensorSource, Weights, no_expert};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::experts::matrix::Matrix;
use crate::offload::cache::ExpertCache;
use crate::offload::cached::{CachedExperts, ExpertBiases, weights};
use crate::offload::store::ExpertStore;
use crate::spec::MoeSpec;

/// Weights and biases of a projection.
type ProjectionFloats = (Vec<f32>, Vec<f32>);

impl Weights {
    /// The tensor that transformers calls `name`, row-major. Of types it may have those that [`Dtype`](crate::experts::matrix::Dtype) lists.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it is missing, of another shape or of another type; [`Error::Shape`] for one that a GGUF file holds in
    /// another form (queries, keys, values, parts of recurrences); [`Error::UnknownName`] and [`Error::Config`] as [`Weights::from_gguf`].
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (stored, row) = match self.source(name)? {
            TensorSource::Same(stored) => (stored, None),
            TensorSource::Row { name, row } => (name, Some(row)),
            TensorSource::InTurns { .. }
            | TensorSource::KeysAndValues { .. }
            | TensorSource::Halves { .. }
            | TensorSource::Logarithms(_) => {
                let expected = "one that lies as it is";
                return Err(Error::shape(format!("tensor `{name}`"), expected, "rows in another order"));
            }
        };
        let checkpoint: &Checkpoint = self.checkpoint();
        let entry = checkpoint.entry(&stored)?;
        let part = match row {
            Some(row) => entry.row(row),
            None => Some((0..entry.bytes, entry.shape.as_slice())),
        };
        // Dimensions of 1 are not in a GGUF file.
        let long = |dims: &[usize]| dims.iter().copied().filter(|&size| size != 1).collect::<Vec<_>>();
        let is_gguf = checkpoint.gguf().is_some();
        let fits = |stored: &[usize]| if is_gguf { long(stored) == long(shape) } else { stored == shape };
        let Some((bytes, _)) = part.filter(|(_, stored)| fits(stored)) else {
            let of_row = row.map_or(String::new(), |row| format!(" in row {row}"));
            let detail = format!("expected shape {shape:?}{of_row}, got {:?}", entry.shape);
            return Err(checkpoint.wrong(entry, &stored, detail));
        };
        let dtype = dtype(entry.dtype).ok_or_else(|| {
            let expected = "F32, F16, BF16, q8_0, q4_K, q5_K, q6_K or mxfp4";
            checkpoint.wrong(entry, &stored, format!("expected dtype {expected}, got {:?}", entry.dtype))
        })?;
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<usize>() / columns.max(1);
        let mut numbers = vec![0; bytes.len()];
        checkpoint.read_part(entry, &stored, bytes.start, &mut numbers)?;
        Ok(Matrix::new(dtype, rows, columns, &numbers)?.to_f32())
    }

    /// The experts of a layer that `moe` describes and whose tensors' names begin with `prefix` and a dot (`model.layers.3.mlp`), by id, read one
    /// after the other: gate, up and down projection of each, weights `[out, in]` row-major and biases `[out]`. No gate where the activation
    /// has none; no numbers of biases where there are none.
    ///
    /// # Errors
    /// Those of [`MoeSpec::new`] for sizes that are none; as [`Weights::floats`] for biases; of an expert [`Error::Checkpoint`] for a tensor that is not there, or of another shape or type than
    /// those that are read, and [`Error::Expert`] when a read fails.
    pub fn experts(
        &self,
        moe: &MoeSpec,
        prefix: &str,
    ) -> Result<impl Iterator<Item = Result<[Option<ProjectionFloats>; 3]>>> {
        moe.check()?;
        let mut biases = self.expert_biases(moe, prefix)?.into_iter();
        Ok((0..moe.experts).map(move |id| {
            let slices = self.slices_under(moe, prefix, id)?;
            let pieces = slices.iter().map(|slice| slice.piece(self.checkpoint())).collect::<Result<Vec<_>>>()?;
            let store = ExpertStore::new(self.checkpoint().sources().to_vec(), vec![vec![pieces]])?;
            let mut slabs = store.slabs(0, 0)?;
            let expert = weights(moe, &store.load(0, 0, &mut slabs)?, None)?;
            let ExpertBiases { gate, up, down } = biases.next().unwrap_or_default();
            let parts = [(expert.gate, gate), (Some(expert.up), up), (Some(expert.down), down)];
            Ok(parts.map(|(part, bias)| part.map(|projection| (projection.weight.to_f32(), bias))))
        }))
    }

    /// The experts of MoE layer `layer`, counted without blocks that have none, in a cache of [`Weights::expert_store`]: for a layer that runs
    /// them on the engine.
    ///
    /// # Errors
    /// As [`Weights::spec`] and [`Weights::floats`], [`Error::Shape`] for a cache of another model, [`Error::ExpertOutOfRange`] for a layer that
    /// is not there.
    pub fn cached_experts(&self, cache: &Arc<ExpertCache>, layer: usize) -> Result<CachedExperts> {
        let spec = self.spec()?;
        let block = spec.moe_blocks().nth(layer).ok_or_else(|| no_expert(spec, layer, 0))?;
        let biases = self.expert_biases(&spec.moe, &format!("{}.{}", spec.block_prefix(block), spec.ffn))?;
        let experts = CachedExperts::new(cache.clone(), layer).with_biases(biases);
        experts.check(&spec.moe)?;
        Ok(experts)
    }

    /// The biases of a layer's experts, stacked or one by one as they are there; none where they have none.
    fn expert_biases(&self, moe: &MoeSpec, prefix: &str) -> Result<Vec<ExpertBiases>> {
        if !moe.expert_bias {
            return Ok(Vec::new());
        }
        let (names, width, hidden, gated) = (&moe.names, moe.expert_width, moe.hidden, moe.activation.gated);
        let get = |name: String, shape: &[usize]| self.floats(&format!("{prefix}.{name}"), shape);
        let has = |name: String| self.checkpoint().tensors().contains_key(&format!("{prefix}.{name}"));
        if !["", MXFP4[0], "_bias"].iter().any(|end| has(format!("{}{end}", names.stacked_gate_up))) {
            let single = |id: usize| {
                let bias = |name: &str, size: usize| get(format!("{}.{id}.{name}.bias", names.experts), &[size]);
                let gate = if gated { bias(&names.gate_proj, width)? } else { Vec::new() };
                Ok(ExpertBiases { gate, up: bias(&names.up_proj, width)?, down: bias(&names.down_proj, hidden)? })
            };
            return (0..moe.experts).map(single).collect();
        }
        let inner = if gated { 2 * width } else { width };
        let inners = get(format!("{}_bias", names.stacked_gate_up), &[moe.experts, inner])?;
        let downs = get(format!("{}_bias", names.stacked_down), &[moe.experts, hidden])?;
        let stacked = |(inner, down): (&[f32], &[f32])| {
            let every_second = |first: usize| inner[first..].iter().copied().step_by(2).collect();
            let (gate, up) = match (gated, names.stacked_in_turns) {
                (false, _) => (Vec::new(), inner.to_vec()),
                (true, true) => (every_second(0), every_second(1)),
                (true, false) => (inner[..width].to_vec(), inner[width..].to_vec()),
            };
            ExpertBiases { gate, up, down: down.to_vec() }
        };
        Ok(inners.chunks_exact(inner).zip(downs.chunks_exact(hidden)).map(stacked).collect())
    }
}
