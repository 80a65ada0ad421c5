//! Experts and their biases as Candle's tensors, from wherever [`Slice`]s say that they lie: files, or the tensors of a builder.
//!
//! Rows of a builder's tensor that lie row by row are views of it, so that gradients reach a `Var`; everything else becomes a tensor of
//! its own when it is loaded. Knows nothing of files.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};

use super::check::ROUTING_DTYPE;
use super::expert::Expert;
use super::packed::Packed;
use super::projection::{Projection, Weight};
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::experts::mxfp4;
use crate::offload::store::Part;
use crate::spec::MoeSpec;
use crate::weights::experts::{MXFP4, Order, Slice, Tensors, slices};

/// Where the numbers of slices come from.
pub(crate) trait Rows {
    /// Those of a slice as they lie; in MXFP4 joined.
    fn rows(&self, slice: &Slice) -> Result<Weight>;

    /// A projection in the form that it is kept in.
    fn kept(&self, weight: Weight) -> Result<Weight> {
        Ok(weight)
    }
}

/// Loads the experts of `moe` under `vb`, the layer's own builder, however they are stored there.
pub(super) fn from_builder(moe: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Vec<Expert>> {
    let builder = Builder { vb, whole: RefCell::default() };
    experts(moe, vb, 0..moe.experts, |id| slices(moe, "", id, &builder), &builder)
}

/// The experts `ids`, whose projections are `slices` of `rows`, with biases of `vb` where `moe` says so.
pub(crate) fn experts(
    moe: &MoeSpec,
    vb: &VarBuilder<'_>,
    ids: impl Iterator<Item = usize> + Clone,
    slices: impl Fn(usize) -> Result<Vec<Slice>>,
    rows: &impl Rows,
) -> Result<Vec<Expert>> {
    let experts = ids.clone().map(|id| expert(moe, &slices(id)?, rows)).collect::<Result<Vec<_>>>()?;
    if !moe.expert_bias {
        return Ok(experts);
    }
    // Those beside weights without a dtype of Candle's are in f32.
    let is_quantized = experts.iter().any(|expert| expert.up_proj().is_quantized());
    let biases = biases(moe, vb, if is_quantized { ROUTING_DTYPE } else { vb.dtype() })?;
    let biases = ids.filter_map(|id| biases.get(id).cloned());
    let with_biases = |(expert, [gate, up, down]): (Expert, [Option<Tensor>; 3])| {
        let missing = || Error::shape("biases of an expert", "those of up and down projection", "none");
        expert.with_biases(gate, up.ok_or_else(missing)?, down.ok_or_else(missing)?)
    };
    experts.into_iter().zip(biases).map(with_biases).collect()
}

fn expert(moe: &MoeSpec, slices: &[Slice], rows: &impl Rows) -> Result<Expert> {
    let mut weights = Vec::with_capacity(3);
    for slice in slices {
        weights.extend(projections(slice, moe.names.stacked_in_turns, rows)?);
    }
    let mut take = |wanted: Part| {
        let at = weights.iter().position(|(part, _)| *part == wanted)?;
        Some(weights.swap_remove(at).1)
    };
    let (gate, up, down) = (take(Part::Gate), take(Part::Up), take(Part::Down));
    let kept = |weight: Weight| Ok::<_, Error>(Projection::new(rows.kept(weight)?, None));
    let missing = || Error::shape("parts of an expert", "up and down projection", "others");
    Expert::from_projections(
        moe.activation,
        gate.map(kept).transpose()?,
        kept(up.ok_or_else(missing)?)?,
        kept(down.ok_or_else(missing)?)?,
    )
}

/// The projections that a slice holds, each `[out, in]`: one, or gate and up, whose rows take turns where `in_turns` says so.
pub(crate) fn projections(slice: &Slice, in_turns: bool, rows: &impl Rows) -> Result<Vec<(Part, Weight)>> {
    let weight = match rows.rows(slice)? {
        Weight::Dense(stored) if slice.order == Order::Columns => stored.t()?.contiguous()?.into(),
        weight => weight,
    };
    if slice.part != Part::GateUp {
        return Ok(vec![(slice.part, weight)]);
    }
    let [gate, up]: [Weight; 2] = match weight {
        Weight::Dense(both) => one_after_the_other(&both, in_turns)?.map(Weight::from),
        Weight::Packed(both) => both.halves(in_turns)?.map(Weight::from),
        Weight::Quantized(_) => return Err(Error::shape("gate and up projection in one", "floats or MXFP4", "others")),
    };
    Ok(vec![(Part::Gate, gate), (Part::Up, up)])
}

/// Gate and up, `[width, ..]` each, of both in one, `[2·width, ..]`.
fn one_after_the_other(both: &Tensor, in_turns: bool) -> Result<[Tensor; 2]> {
    let width = both.dim(0)? / 2;
    if !in_turns {
        return Ok([both.narrow(0, 0, width)?, both.narrow(0, width, width)?]);
    }
    let half = |half: usize| -> Result<Tensor> {
        let columns = both.elem_count() / both.dim(0)?.max(1);
        let turns = both.reshape((width, 2, columns))?.narrow(1, half, 1)?;
        let shape = [&[width], &both.dims()[1..]].concat();
        Ok(turns.contiguous()?.reshape(shape)?)
    };
    Ok([half(0)?, half(1)?])
}

/// The biases of each expert's gate, up and down projection under `vb`, stacked or one by one; of the gate where there is one.
fn biases(moe: &MoeSpec, vb: &VarBuilder<'_>, dtype: DType) -> Result<Vec<[Option<Tensor>; 3]>> {
    let (names, width, hidden, gated) = (&moe.names, moe.expert_width, moe.hidden, moe.activation.gated);
    let get = |name: &str, shape: &[usize]| vb.get_with_hints_dtype(shape, name, Init::Const(0.0), dtype);
    let is_stacked =
        ["", MXFP4[0], "_bias"].iter().any(|end| vb.contains_tensor(&format!("{}{end}", names.stacked_gate_up)));
    if !is_stacked {
        let single = |id: usize| {
            let bias = |name: &str, size: usize| get(&format!("{}.{id}.{name}.bias", names.experts), &[size]);
            let gate = gated.then(|| bias(&names.gate_proj, width)).transpose()?;
            Ok([gate, Some(bias(&names.up_proj, width)?), Some(bias(&names.down_proj, hidden)?)])
        };
        return (0..moe.experts).map(single).collect();
    }
    let inner = get(&format!("{}_bias", names.stacked_gate_up), &[moe.experts, if gated { 2 * width } else { width }])?;
    let down = get(&format!("{}_bias", names.stacked_down), &[moe.experts, hidden])?;
    let stacked = |id: usize| {
        let (inner, down) = (inner.get(id)?, down.get(id)?);
        let [gate, up] = match gated {
            true => one_after_the_other(&inner, names.stacked_in_turns)?.map(Some),
            false => [None, Some(inner)],
        };
        Ok([gate, up, Some(down)])
    };
    (0..moe.experts).map(stacked).collect()
}

/// The tensors under a builder, those of all experts kept while these are loaded.
struct Builder<'a, 'b> {
    vb: &'a VarBuilder<'b>,
    whole: RefCell<BTreeMap<String, Tensor>>,
}

impl Builder<'_, '_> {
    /// A tensor, got once.
    fn whole(&self, name: &str, get: impl FnOnce() -> candle_core::Result<Tensor>) -> Result<Tensor> {
        if let Some(whole) = self.whole.borrow().get(name) {
            return Ok(whole.clone());
        }
        let whole = get()?;
        self.whole.borrow_mut().insert(name.into(), whole.clone());
        Ok(whole)
    }

    /// The bytes that a slice has of its blocks or of its scales.
    fn bytes(&self, slice: &Slice, end: &str, of_block: &[usize]) -> Result<Vec<u8>> {
        let (name, columns) = (format!("{}{end}", slice.tensor), slice.shape.last().copied().unwrap_or(0));
        if !columns.is_multiple_of(mxfp4::WEIGHTS) {
            let expected = format!("a multiple of {} columns", mxfp4::WEIGHTS);
            return Err(Error::shape(format!("{} in mxfp4", slice.tensor), expected, columns));
        }
        let shape = [&slice.shape[..slice.shape.len() - 1], &[columns / mxfp4::WEIGHTS], of_block].concat();
        let whole =
            self.whole(&name, || self.vb.get_with_hints_dtype(shape.as_slice(), &name, Init::Const(0.0), DType::U8))?;
        let rows: usize = slice.shape.iter().rev().skip(1).product();
        let own = whole.reshape((rows, ()))?.narrow(0, slice.rows.start, slice.rows.len())?;
        Ok(own.flatten_all()?.to_vec1()?)
    }
}

impl Tensors for Builder<'_, '_> {
    fn has(&self, tensor: &str) -> bool {
        self.vb.contains_tensor(tensor)
    }

    fn shape(&self, tensor: &str) -> Result<Vec<usize>> {
        Ok(self.whole(tensor, || self.vb.get_unchecked(tensor))?.dims().to_vec())
    }
}

impl Rows for Builder<'_, '_> {
    fn rows(&self, slice: &Slice) -> Result<Weight> {
        let columns = slice.shape.last().copied().unwrap_or(0);
        if slice.order == Order::Apart {
            let blocks = self.bytes(slice, MXFP4[0], &[mxfp4::BLOCK_BYTES])?;
            let joined = mxfp4::joined(&blocks, &self.bytes(slice, MXFP4[1], &[])?)?;
            return Ok(Packed::new(Dtype::Mxfp4, slice.rows.len(), columns, joined)?.into());
        }
        if let [rows, columns] = slice.shape[..] {
            let init = Init::Randn { mean: 0.0, stdev: (columns as f64).powf(-0.5) };
            return Ok(self.vb.get_with_hints((rows, columns), &slice.tensor, init)?.into());
        }
        let whole = self.whole(&slice.tensor, || self.vb.get_unchecked(&slice.tensor))?;
        if (slice.order == Order::Columns || slice.part == Part::GateUp) && whole.track_op() {
            // Brought into form once, experts would stay what they are now, whatever an optimiser does.
            return Err(Error::shape("stacked experts under `Var`s", "rows first and gate before up", "another order"));
        }
        let expert = slice.shape[1];
        let own = whole.get(slice.rows.start / expert.max(1))?;
        Ok(own.narrow(0, slice.rows.start % expert.max(1), slice.rows.len())?.into())
    }
}
