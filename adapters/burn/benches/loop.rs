//! The loop over experts that a Burn user would write, against [`Moe`], in one run on Flex: the same weights, the same choice of experts.
//!
//! `cargo bench --bench loop` prints a table of medians; times are those of this machine, the ratios are what counts.

use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{DType, Device, Distribution, IndexingUpdateOp, Int, Tensor, TensorData};
use phase_moe_burn::{LayerState, Moe, MoeConfig};

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

/// Burn's linear weights, `[in, out]`, of every expert: gate, up, down.
struct Loop {
    gate: Tensor<2>,
    experts: Vec<[Tensor<2>; 3]>,
    top_k: usize,
}

impl Loop {
    fn of(layer: &Moe) -> Self {
        // As Burn's linear layers hold them: transposed and whole, not a view.
        let turned = |weight: &Param<Tensor<2>>| {
            let weight = weight.val().transpose();
            let (shape, device, dtype) = (weight.dims(), weight.device(), weight.dtype());
            Tensor::from_data(
                TensorData::new(weight.cast(DType::F32).into_data().iter::<f32>().collect(), shape),
                (&device, dtype),
            )
        };
        let expert = |expert: &phase_moe_burn::Expert| {
            let gate = &expert.gate_proj.as_ref().expect("gated experts").weight;
            [turned(gate), turned(&expert.up_proj.weight), turned(&expert.down_proj.weight)]
        };
        Self {
            gate: turned(&layer.gate.weight),
            experts: layer.experts.iter().map(expert).collect(),
            top_k: layer.spec().top_k,
        }
    }

    /// Combine weights and experts of each token's slots.
    fn choose(&self, x: &Tensor<2>) -> (Tensor<2>, Vec<i64>) {
        let scores = softmax(x.clone().matmul(self.gate.clone()).cast(DType::F32), 1);
        let (weights, chosen) = scores.topk_with_indices(self.top_k, 1);
        (weights, chosen.into_data().iter::<i64>().collect())
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (device, dtype, [tokens, hidden]) = (x.device(), x.dtype(), x.dims());
        let (weights, chosen) = self.choose(&x);
        let weights = weights.reshape([tokens * self.top_k, 1]);
        let mut output = Tensor::<2>::zeros([tokens, hidden], (&device, DType::F32));
        for (expert, [gate, up, down]) in self.experts.iter().enumerate() {
            let slots: Vec<i64> =
                chosen.iter().zip(0..).filter(|(chosen, _)| **chosen == expert as i64).map(|(_, slot)| slot).collect();
            if slots.is_empty() {
                continue;
            }
            let count = slots.len();
            let rows: Vec<i64> = slots.iter().map(|slot| slot / self.top_k as i64).collect();
            let rows: Tensor<1, Int> = Tensor::from_data(TensorData::new(rows, [count]), &device);
            let slots: Tensor<1, Int> = Tensor::from_data(TensorData::new(slots, [count]), &device);
            let input = x.clone().select(0, rows.clone());
            let inner = silu(input.clone().matmul(gate.clone())) * input.matmul(up.clone());
            let weighted = inner.matmul(down.clone()).cast(DType::F32) * weights.clone().select(0, slots);
            output = output.select_assign(0, rows, weighted, IndexingUpdateOp::Add);
        }
        output.cast(dtype)
    }
}

/// The largest difference of two outputs over the largest number, where both sent a token to the same experts, and how many tokens went elsewhere:
/// in bf16 many logits are equal, and which of them counts is nobody's to say.
fn difference(by_loop: &Loop, layer: &Moe, x: &Tensor<2>) -> (f32, usize) {
    let [tokens, hidden] = x.dims();
    let numbers = |tensor: Tensor<2>| tensor.cast(DType::F32).into_data().iter::<f32>().collect::<Vec<_>>();
    let (_, theirs) = by_loop.choose(x);
    let (output, routed) = layer.route(x.clone(), &mut LayerState::default()).expect("a batch of this layer");
    let ours: Vec<i64> = routed.assignment.ids().map(i64::from).collect();
    let sorted = |ids: &[i64]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    let (left, right) = (numbers(output), numbers(by_loop.forward(x.clone())));
    let largest = right.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let (mut off, mut elsewhere) = (0f32, 0);
    for token in 0..tokens {
        let (slots, row) = (token * by_loop.top_k..(token + 1) * by_loop.top_k, token * hidden..(token + 1) * hidden);
        if sorted(&ours[slots.clone()]) != sorted(&theirs[slots]) {
            elsewhere += 1;
            continue;
        }
        off = left[row.clone()].iter().zip(&right[row]).fold(off, |off, (left, right)| off.max((left - right).abs()));
    }
    (off / largest, elsewhere)
}

/// Seconds of one call in the median of many, at least three.
fn median(mut call: impl FnMut()) -> f64 {
    call();
    let mut times = Vec::new();
    let started = Instant::now();
    while times.len() < 3 || (started.elapsed().as_secs_f64() < 1.0 && times.len() < 200) {
        let now = Instant::now();
        call();
        times.push(now.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let device = Device::flex();
    device.seed(1);
    // OLMoE-1B-7B's block: 64 experts of width 1024 over 2048, 8 a token.
    let config = MoeConfig::new(2048, 1024, 64, 8);
    println!(
        "| dtype | tokens | Burn's loop, ms | phase-moe-burn, ms | ratio | off by | tokens elsewhere |\n|---|---|---|---|---|---|---|"
    );
    for dtype in [DType::F32, DType::BF16] {
        let layer = config.init(&device).map(&mut Cast(dtype));
        let by_loop = Loop::of(&layer);
        for tokens in [1, 8, 64, 512] {
            let x = Tensor::<2>::random([tokens, 2048], Distribution::Normal(0.0, 1.0), &device).cast(dtype);
            let (off, elsewhere) = difference(&by_loop, &layer, &x);
            let theirs = median(|| drop(by_loop.forward(x.clone()).into_data()));
            let ours = median(|| drop(layer.forward(x.clone()).into_data()));
            println!(
                "| {dtype:?} | {tokens} | {:.2} | {:.2} | {:.2} | {off:.1e} | {elsewhere} |",
                theirs * 1e3,
                ours * 1e3,
                theirs / ours
            );
        }
    }
}
