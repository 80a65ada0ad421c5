//! An expert as Burn's operations run it: `down(act(gate(x))·up(x))`, or `down(act(up(x)))` without a gate.
//!
//! Weights lie as `[out, in]`, as PyTorch, safetensors files and the expert engine have them, not as Burn's own linear layer has them:
//! nothing is transposed on the way from a file, and the engine reads the tensor's memory as it is.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, gelu_approximate, relu, sigmoid, silu};
use phase_moe::Activation;
use phase_moe::experts::Function;

/// One linear layer, `y = x·Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Projection {
    /// `[out, in]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

/// The FFN of one expert, or the one that all tokens share.
#[derive(Module, Debug)]
pub struct Expert {
    /// `[width, hidden]`; `None` where the activation has no gate.
    pub gate_proj: Option<Projection>,
    /// `[width, hidden]`.
    pub up_proj: Projection,
    /// `[hidden, width]`.
    pub down_proj: Projection,
}

impl Projection {
    /// `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, rows: Tensor<2>) -> Tensor<2> {
        let output = rows.matmul(self.weight.val().transpose());
        match &self.bias {
            Some(bias) => output + bias.val().unsqueeze::<2>(),
            None => output,
        }
    }
}

impl Expert {
    /// `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(&self, activation: Activation, rows: Tensor<2>) -> Tensor<2> {
        let function = activation.function;
        let up = self.up_proj.forward(rows.clone());
        let inner = match &self.gate_proj {
            Some(gate) => activate(function, gate.forward(rows)) * factor(function, up),
            None => activate(function, up),
        };
        self.down_proj.forward(inner)
    }
}

/// What the function does to the gate, or to the up projection where there is no gate.
fn activate(function: Function, x: Tensor<2>) -> Tensor<2> {
    match function {
        Function::Silu => silu(x),
        Function::Gelu => gelu(x),
        Function::GeluTanh => gelu_approximate(x),
        Function::ReluSquared => relu(x).square(),
        Function::ClampedSilu { alpha, limit } => {
            let gate = x.clamp_max(limit);
            gate.clone() * sigmoid(gate * alpha)
        }
    }
}

/// What the activated gate is multiplied by.
fn factor(function: Function, up: Tensor<2>) -> Tensor<2> {
    match function {
        Function::ClampedSilu { limit, .. } => up.clamp(-limit, limit) + 1.0,
        _ => up,
    }
}
