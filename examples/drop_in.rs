//! Replacing the MoE block of a Candle transformer: the same weights, the same output, and a router to choose.
//!
//! Before: a loop over experts, as Candle's own models have it. After: `MoeLayer`, read from the same `VarBuilder`. Then the
//! block keeps within what four devices can take: `cargo run --release --example drop_in`.

use std::sync::Arc;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{Linear, VarBuilder, VarMap, linear_no_bias, ops::softmax_last_dim};
use phase_moe::{CapacityRule, LayerState, MoeLayer, MoeSpec, RouterKind};

const HIDDEN: usize = 64;
const EXPERTS: usize = 16;
const TOP_K: usize = 4;
const WIDTH: usize = 96;

/// The MoE block before: each expert in turn, weighted by 0 for the rows that chose others.
struct LoopMoe {
    gate: Linear,
    experts: Vec<[Linear; 3]>,
}

impl LoopMoe {
    fn load(vb: VarBuilder) -> Result<Self> {
        let expert = |vb: VarBuilder| {
            let linear = |name, from, to| linear_no_bias(from, to, vb.pp(name));
            let (gate, up) = (linear("gate_proj", HIDDEN, WIDTH)?, linear("up_proj", HIDDEN, WIDTH)?);
            Ok([gate, up, linear("down_proj", WIDTH, HIDDEN)?])
        };
        let experts = (0..EXPERTS).map(|index| expert(vb.pp("experts").pp(index))).collect::<Result<_>>()?;
        Ok(Self { gate: linear_no_bias(HIDDEN, EXPERTS, vb.pp("gate"))?, experts })
    }
}

impl Module for LoopMoe {
    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let scores = softmax_last_dim(&self.gate.forward(hidden)?)?;
        let chosen = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, TOP_K)?.contiguous()?;
        let weights = scores.zeros_like()?.scatter_add(&chosen, &scores.gather(&chosen, D::Minus1)?, D::Minus1)?;
        self.experts.iter().enumerate().try_fold(hidden.zeros_like()?, |output, (index, [gate, up, down])| {
            let inner = (gate.forward(hidden)?.silu()? * up.forward(hidden)?)?;
            output + down.forward(&inner)?.broadcast_mul(&weights.narrow(D::Minus1, index, 1)?)?
        })
    }
}

/// A transformer block: one head of attention, then the FFN it is given, each beside a residual.
fn block(attention: &[Linear; 3], ffn: &dyn Module, hidden: &Tensor) -> Result<Tensor> {
    let [q, k, v] = attention.each_ref().map(|linear| linear.forward(hidden));
    let scores = (q?.matmul(&k?.t()?)? * (HIDDEN as f64).powf(-0.5))?;
    let hidden = (hidden + softmax_last_dim(&scores)?.matmul(&v?)?)?;
    &hidden + ffn.forward(&hidden)?
}

fn main() -> Result<()> {
    let (device, variables) = (Device::Cpu, VarMap::new());
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
    let [q, k, v] = ["q", "k", "v"].map(|name| linear_no_bias(HIDDEN, HIDDEN, vb.pp(name)));
    let (attention, hidden) = ([q?, k?, v?], Tensor::randn(0f32, 1.0, (2, 128, HIDDEN), &device)?);

    let before = block(&attention, &LoopMoe::load(vb.pp("mlp"))?, &hidden)?;
    let mut moe = MoeLayer::load(&MoeSpec::new(HIDDEN, EXPERTS, TOP_K, WIDTH)?, vb.pp("mlp"))?;
    let after = block(&attention, &moe, &hidden)?;
    println!("largest output before {:.3}", before.abs()?.max_all()?.to_scalar::<f32>()?);
    println!("largest change after  {:.1e}", (&before - &after)?.abs()?.max_all()?.to_scalar::<f32>()?);

    for name in ["top-k-arrival", "phase"] {
        moe.set_router(Arc::from(name.parse::<RouterKind>()?.build(0)));
        moe.set_capacity(Some(CapacityRule::per_device(1.0, 4)));
        let assignment = moe.route(&hidden, &mut LayerState::default())?.1.assignment;
        let devices: Vec<u32> = assignment.load().chunks(EXPERTS / 4).map(|experts| experts.iter().sum()).collect();
        let change = (&before - block(&attention, &moe, &hidden)?)?.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()?;
        println!(
            "{name:<14} {devices:?} slots on 4 devices, {} dropped, mean change {change:.3}",
            1024 - assignment.kept()
        );
    }
    Ok(())
}
