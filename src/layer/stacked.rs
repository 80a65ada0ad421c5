//! The experts of a checkpoint, one by one in tensors of their own or all in one: `gate_up_proj` and `down_proj`.
//!
//! A stack is `[experts, 2·width, hidden]` and `[experts, hidden, width]`, as matrices of linear layers lie, or each of its
//! matrices transposed: `[experts, hidden, 2·width]` and `[experts, width, hidden]`. Gate and up projection are one after the
//! other. The shapes of both tensors tell which it is; the name says nothing, since both are written under the same ones.
//!
//! Views of the first kind share its memory; the second kind is turned once, when it is loaded.

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::expert::Expert;
use crate::error::{Error, Result};
use crate::spec::{MoeSpec, StackOrder};

/// Loads the experts of `spec` under `vb`, the layer's own builder.
pub(super) fn load_experts(spec: &MoeSpec, vb: &VarBuilder<'_>) -> Result<Vec<Expert>> {
    let names = &spec.names;
    if !vb.contains_tensor(&names.stacked_gate_up) {
        let experts = vb.pp(&names.experts);
        return (0..spec.experts).map(|expert| Expert::load(spec, experts.pp(expert))).collect();
    }
    let tensor = |name: &str| vb.get_unchecked(name);
    let (gate_up, down) = (tensor(&names.stacked_gate_up)?, tensor(&names.stacked_down)?);
    if spec.expert_bias {
        return Err(Error::shape(
            format!("`{}`", names.stacked_gate_up),
            "experts one by one, as they have biases",
            "a stack",
        ));
    }
    let turned = |stack: Tensor| stack.transpose(1, 2)?.contiguous();
    match spec.stack_order(gate_up.dims(), down.dims())? {
        StackOrder::RowsFirst => Expert::stacked(spec, &gate_up, &down),
        StackOrder::ColumnsFirst => Expert::stacked(spec, &turned(gate_up)?, &turned(down)?),
    }
}
