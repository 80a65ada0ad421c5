//! The experts of a checkpoint, one by one in tensors of their own or all in one: `gate_up_proj` and `down_proj`.
//!
//! A stack is `[experts, 2·width, hidden]` and `[experts, hidden, width]`, as matrices of linear layers lie, or each of its
//! matrices transposed: `[experts, hidden, 2·width]` and `[experts, width, hidden]`. Gate and up projection are one after the
//! other, or row by row in turns (gpt-oss), and may have biases `[experts, 2·width]` and `[experts, hidden]`. The shapes of both tensors tell which it is; the name says nothing, since both are written under the same ones.
//!
//! In MXFP4 a tensor is two, `gate_up_proj_blocks` `[experts, 2·width, hidden / 32, 16]` and `gate_up_proj_scales` without the last of
//! these, always with rows first.
//!
//! Experts of the first kind are views of it; other kinds are brought into its form once, when they are loaded. Rows in turns stay
//! where they are in MXFP4.

use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};

use super::cached::ExpertBiases;
use super::check::ROUTING_DTYPE;
use super::expert::Expert;
use super::packed::Packed;
use super::projection::Projection;
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;
use crate::experts::mxfp4;
use crate::spec::{MoeSpec, StackOrder};

/// Loads the experts of `spec` under `vb`, the layer's own builder.
pub(super) fn load_experts(spec: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Vec<Expert>> {
    let names = &spec.names;
    if vb.contains_tensor(&format!("{}_blocks", names.stacked_gate_up)) {
        return load_packed(spec, vb);
    }
    if !vb.contains_tensor(&names.stacked_gate_up) {
        let experts = vb.pp(&names.experts);
        return (0..spec.experts).map(|expert| Expert::load(spec, experts.pp(expert))).collect();
    }
    let tensor = |name: &str| vb.get_unchecked(name);
    let (mut gate_up, mut down) = (tensor(&names.stacked_gate_up)?, tensor(&names.stacked_down)?);
    let columns_first = spec.stack_order(gate_up.dims(), down.dims())? == StackOrder::ColumnsFirst;
    if (columns_first || names.stacked_in_turns) && (gate_up.track_op() || down.track_op()) {
        // Brought into form once, experts would stay what they are now, whatever an optimiser does.
        return Err(Error::shape("stacked experts under `Var`s", "rows first and gate before up", "another order"));
    }
    if columns_first {
        let turned = |stack: Tensor| stack.transpose(1, 2)?.contiguous();
        (gate_up, down) = (turned(gate_up)?, turned(down)?);
    }
    if names.stacked_in_turns {
        gate_up = one_after_the_other(&gate_up)?;
    }
    let experts = Expert::stacked(spec, &gate_up, &down)?;
    match spec.expert_bias {
        true => StackedBiases::load(spec, vb, vb.dtype())?.join(experts),
        false => Ok(experts),
    }
}

/// The same where they are stacked in MXFP4.
fn load_packed(spec: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Vec<Expert>> {
    let (names, width, hidden, gated) = (&spec.names, spec.expert_width, spec.hidden, spec.activation.gated);
    let inner = if gated { 2 * width } else { width };
    let stack = |name: &str, rows: usize, columns: usize| {
        if !columns.is_multiple_of(mxfp4::WEIGHTS) {
            let expected = format!("a multiple of {} columns", mxfp4::WEIGHTS);
            return Err(Error::shape(format!("{name} in mxfp4"), expected, columns));
        }
        let (blocks, init) = (columns / mxfp4::WEIGHTS, Init::Const(0.0));
        let bytes = |suffix: &str, shape: &[usize]| -> Result<Vec<u8>> {
            let tensor = vb.get_with_hints_dtype(shape, &format!("{name}_{suffix}"), init, DType::U8)?;
            Ok(tensor.flatten_all()?.to_vec1()?)
        };
        let scales = bytes("scales", &[spec.experts, rows, blocks])?;
        let joined = mxfp4::joined(&bytes("blocks", &[spec.experts, rows, blocks, mxfp4::BLOCK_BYTES])?, &scales)?;
        Packed::new(Dtype::Mxfp4, spec.experts * rows, columns, joined)
    };
    let (gate_up, down) = (stack(&names.stacked_gate_up, inner, hidden)?, stack(&names.stacked_down, hidden, width)?);
    let expert = |id: usize| {
        let own = gate_up.of_rows(id * inner..(id + 1) * inner)?;
        let (gate, up) = match (gated, names.stacked_in_turns) {
            (false, _) => (None, own),
            (true, true) => (Some(own.interleaved(0)?), own.interleaved(1)?),
            (true, false) => {
                let half = |half: usize| gate_up.of_rows(id * inner + half * width..id * inner + (half + 1) * width);
                (Some(half(0)?), half(1)?)
            }
        };
        let projection = |weight: Packed| Projection::new(weight, None);
        let down = down.of_rows(id * hidden..(id + 1) * hidden)?;
        Expert::from_projections(spec.activation, gate.map(projection), projection(up), projection(down))
    };
    let experts = (0..spec.experts).map(expert).collect::<Result<_>>()?;
    match spec.expert_bias {
        // Beside weights without a dtype of Candle's.
        true => StackedBiases::load(spec, vb, ROUTING_DTYPE)?.join(experts),
        false => Ok(experts),
    }
}

/// Loads the biases of all experts alone, stacked or one by one.
pub(super) fn load_biases(spec: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Vec<ExpertBiases>> {
    let names = &spec.names;
    if vb.contains_tensor(&format!("{}_bias", names.stacked_gate_up)) {
        let stacked = StackedBiases::load(spec, vb, ROUTING_DTYPE)?;
        let biases = |id: usize| {
            let [gate, up, down] = stacked.of(id)?;
            let values = |bias: Tensor| bias.to_vec1::<f32>();
            Ok(ExpertBiases { gate: values(gate)?, up: values(up)?, down: values(down)? })
        };
        return (0..spec.experts).map(biases).collect();
    }
    let biases = |id: usize| {
        let vb = vb.pp(&names.experts).pp(id);
        let bias = |name: &str, size: usize| -> Result<Vec<f32>> {
            Ok(vb.pp(name).get_with_hints_dtype(size, "bias", Init::Const(0.0), ROUTING_DTYPE)?.to_vec1()?)
        };
        let gate = if spec.activation.gated { bias(&names.gate_proj, spec.expert_width)? } else { Vec::new() };
        Ok(ExpertBiases {
            gate,
            up: bias(&names.up_proj, spec.expert_width)?,
            down: bias(&names.down_proj, spec.hidden)?,
        })
    };
    (0..spec.experts).map(biases).collect()
}

/// Biases of all experts, gate before up.
struct StackedBiases {
    inner: Tensor,
    down: Tensor,
    width: usize,
    gated: bool,
}

impl StackedBiases {
    fn load(spec: &MoeSpec, vb: &VarBuilder<'_>, dtype: DType) -> Result<Self> {
        let (names, width, gated) = (&spec.names, spec.expert_width, spec.activation.gated);
        let get = |name: &str, size: usize| {
            vb.get_with_hints_dtype((spec.experts, size), &format!("{name}_bias"), Init::Const(0.0), dtype)
        };
        let mut inner = get(&names.stacked_gate_up, if gated { 2 * width } else { width })?;
        if names.stacked_in_turns {
            inner = one_after_the_other(&inner)?;
        }
        Ok(Self { inner, down: get(&names.stacked_down, spec.hidden)?, width, gated })
    }

    /// Those of an expert's gate, up and down projection.
    fn of(&self, id: usize) -> Result<[Tensor; 3]> {
        let inner = self.inner.get(id)?;
        let gate = inner.narrow(0, 0, if self.gated { self.width } else { 0 })?;
        Ok([gate, inner.narrow(0, inner.dim(0)? - self.width, self.width)?, self.down.get(id)?])
    }

    fn join(&self, experts: Vec<Expert>) -> Result<Vec<Expert>> {
        let with_biases = |(id, expert): (usize, Expert)| {
            let [gate, up, down] = self.of(id)?;
            expert.with_biases(self.gated.then_some(gate), up, down)
        };
        experts.into_iter().enumerate().map(with_biases).collect()
    }
}

/// Gate rows before up rows, `[experts, 2·width, ..]`, of rows that take turns.
fn one_after_the_other(turns: &Tensor) -> Result<Tensor> {
    let (shape, (experts, inner)) = (turns.shape(), (turns.dim(0)?, turns.dim(1)?));
    let split = turns.reshape((experts, inner / 2, 2, ()))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}
