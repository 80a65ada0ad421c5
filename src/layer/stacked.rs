//! The experts of a checkpoint, one by one in tensors of their own or all in one: `gate_up_proj` and `down_proj`.
//!
//! A stack is `[experts, 2·width, hidden]` and `[experts, hidden, width]`, as matrices of linear layers lie, or each of its
//! matrices transposed: `[experts, hidden, 2·width]` and `[experts, width, hidden]`. Gate and up projection are one after the
//! other, or row by row in turns (gpt-oss), and may have biases `[experts, 2·width]` and `[experts, hidden]`. The shapes of both tensors tell which it is; the name says nothing, since both are written under the same ones.
//!
//! Experts of the first kind are views of it; other kinds are brought into its form once, when they are loaded.

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::expert::Expert;
use crate::error::Result;
use crate::spec::{MoeSpec, StackOrder};

/// Loads the experts of `spec` under `vb`, the layer's own builder.
pub(super) fn load_experts(spec: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Vec<Expert>> {
    let names = &spec.names;
    if !vb.contains_tensor(&names.stacked_gate_up) {
        let experts = vb.pp(&names.experts);
        return (0..spec.experts).map(|expert| Expert::load(spec, experts.pp(expert))).collect();
    }
    let tensor = |name: &str| vb.get_unchecked(name);
    let (mut gate_up, mut down) = (tensor(&names.stacked_gate_up)?, tensor(&names.stacked_down)?);
    if spec.stack_order(gate_up.dims(), down.dims())? == StackOrder::ColumnsFirst {
        let turned = |stack: Tensor| stack.transpose(1, 2)?.contiguous();
        (gate_up, down) = (turned(gate_up)?, turned(down)?);
    }
    if names.stacked_in_turns {
        gate_up = one_after_the_other(&gate_up)?;
    }
    let experts = Expert::stacked(spec, &gate_up, &down)?;
    if !spec.expert_bias {
        return Ok(experts);
    }
    let (width, inner) = (spec.expert_width, gate_up.dim(1)?);
    let mut inner_bias = vb.get((spec.experts, inner), &format!("{}_bias", names.stacked_gate_up))?;
    if names.stacked_in_turns {
        inner_bias = one_after_the_other(&inner_bias)?;
    }
    let down_bias = vb.get((spec.experts, spec.hidden), &format!("{}_bias", names.stacked_down))?;
    let with_biases = |(id, expert): (usize, Expert)| {
        let inner_bias = inner_bias.get(id)?;
        let gate = spec.activation.gated.then(|| inner_bias.narrow(0, 0, width)).transpose()?;
        expert.with_biases(gate, inner_bias.narrow(0, inner - width, width)?, down_bias.get(id)?)
    };
    experts.into_iter().enumerate().map(with_biases).collect()
}

/// Gate rows before up rows, `[experts, 2·width, ..]`, of rows that take turns.
fn one_after_the_other(turns: &Tensor) -> Result<Tensor> {
    let (shape, (experts, inner)) = (turns.shape(), (turns.dim(0)?, turns.dim(1)?));
    let split = turns.reshape((experts, inner / 2, 2, ()))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}
