//! Replacing the dense FFN of a Candle transformer block by a mixture of experts: the block does not notice.
//!
//! Before: a FFN of width 256. After: 16 experts of width 64, of which each token uses 4, so that a token costs the same.
//! Then the block's router is exchanged for one that keeps within a capacity, and what that drops is printed.
//!
//! ```text
//! cargo run --release --example drop_in
//! ```

use std::sync::Arc;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{Linear, RmsNorm, VarBuilder, VarMap, linear_no_bias, ops::softmax, rms_norm};
use phase_moe::layer::{MoeLayer, expert::SwiGlu};
use phase_moe::routing::capacity::CapacityRule;
use phase_moe::routing::registry::RouterKind;
use phase_moe::spec::MoeSpec;

const HIDDEN: usize = 64;

/// One head of attention and a FFN, each behind a norm and beside a residual. `F` is any module.
struct Block<F> {
    norms: [RmsNorm; 2],
    qkv: [Linear; 3],
    ffn: F,
}

impl<F: Module> Block<F> {
    fn new(vb: &VarBuilder, ffn: F) -> Result<Self> {
        let norm = |name: &str| rms_norm(HIDDEN, 1e-5, vb.pp(name));
        let linear = |name: &str| linear_no_bias(HIDDEN, HIDDEN, vb.pp(name));
        Ok(Self { norms: [norm("norm_1")?, norm("norm_2")?], qkv: [linear("q")?, linear("k")?, linear("v")?], ffn })
    }

    /// What goes into the FFN, and the residual beside it.
    fn attend(&self, hidden: &Tensor) -> Result<(Tensor, Tensor)> {
        let normed = self.norms[0].forward(hidden)?;
        let [q, k, v] = self.qkv.each_ref().map(|linear| linear.forward(&normed));
        let scores = (q?.matmul(&k?.t()?)? * (HIDDEN as f64).powf(-0.5))?;
        let hidden = (hidden + softmax(&scores, D::Minus1)?.matmul(&v?)?)?;
        Ok((self.norms[1].forward(&hidden)?, hidden))
    }
}

impl<F: Module> Module for Block<F> {
    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let (normed, residual) = self.attend(hidden)?;
        residual + self.ffn.forward(&normed)?
    }
}

fn main() -> Result<()> {
    let (device, variables) = (Device::Cpu, VarMap::new());
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
    let hidden = Tensor::randn(0f32, 1.0, (2, 64, HIDDEN), &device)?;

    let dense = MoeSpec::new(HIDDEN, 1, 1, 256)?;
    let before = Block::new(&vb, SwiGlu::load(&dense, vb.pp("mlp"))?)?;
    println!("dense  FFN: {:>7} parameters, all active", dense.parameters_per_expert());
    println!("            output {:?}", before.forward(&hidden)?.dims());

    let spec = MoeSpec::new(HIDDEN, 16, 4, 64)?;
    let mut after = Block::new(&vb, MoeLayer::load(&spec, vb.pp("moe"))?)?;
    let (gate, expert) = (spec.experts * HIDDEN, spec.parameters_per_expert());
    let (all, active) = (gate + spec.experts * expert, gate + spec.top_k * expert);
    println!("sparse FFN: {all:>7} parameters, {active} active");
    println!("            output {:?}", after.forward(&hidden)?.dims());

    for (router, factor) in [(RouterKind::TopK, None), (RouterKind::TopKScore, Some(1.0))] {
        after.ffn.set_router(Arc::from(router.build(0)), factor.map(CapacityRule::per_expert));
        let (normed, _) = after.attend(&hidden)?;
        let (_, assignment) = after.ffn.forward_routed(&normed)?;
        println!("{:<12}{} of 512 slots kept, load {:?}", router.name(), assignment.kept(), assignment.load());
    }
    Ok(())
}
