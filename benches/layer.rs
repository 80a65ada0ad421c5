//! The forward pass of a whole MoE layer, against the loop over experts as candle-transformers 0.11.1 writes it in
//! `qwen3_moe.rs`, with the same weights on the same input.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use phase_moe::layer::MoeLayer;
use phase_moe::layer::expert::Expert;
use phase_moe::layer::gate::Gate;
use phase_moe::spec::MoeSpec;

/// A quarter of OLMoE's layer in every direction but top_k: 201 MB of weights in f32, more than a cache holds.
const HIDDEN: usize = 1024;
const WIDTH: usize = 512;
const EXPERTS: usize = 32;
const TOP_K: usize = 8;
const TOKENS: [usize; 4] = [1, 8, 64, 512];

/// Gate and experts, as tensors that both sides share.
struct Weights {
    gate: Tensor,
    experts: Vec<Expert>,
}

impl Weights {
    fn random(dtype: DType) -> Result<Self> {
        let random = |rows: usize, columns: usize| {
            Tensor::randn(0f32, (columns as f32).powf(-0.5), (rows, columns), &Device::Cpu)?.to_dtype(dtype)
        };
        let expert = |_| Ok(Expert::new(random(WIDTH, HIDDEN)?, random(WIDTH, HIDDEN)?, random(HIDDEN, WIDTH)?));
        Ok(Self { gate: random(EXPERTS, HIDDEN)?, experts: (0..EXPERTS).map(expert).collect::<Result<_>>()? })
    }

    fn layer(&self) -> Result<MoeLayer> {
        let spec = MoeSpec::new(HIDDEN, EXPERTS, TOP_K, WIDTH)?;
        Ok(MoeLayer::new(spec, Gate::new(self.gate.clone()), self.experts.clone())?)
    }

    /// The loop of candle-transformers, `norm_topk_prob` off; the gate's softmax in f32 as in this crate.
    fn candle_loop(&self, tokens: &Tensor) -> Result<Tensor> {
        let scores = softmax_last_dim(&tokens.matmul(&self.gate.t()?)?.to_dtype(DType::F32)?)?;
        let experts = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, TOP_K)?.contiguous()?;
        let weights = scores.gather(&experts, D::Minus1)?.to_vec2::<f32>()?;
        let (mut rows_of, mut weights_of) = (vec![vec![]; EXPERTS], vec![vec![]; EXPERTS]);
        for (row, (weights, experts)) in weights.iter().zip(experts.to_vec2::<u32>()?).enumerate() {
            for (&weight, expert) in weights.iter().zip(experts) {
                rows_of[expert as usize].push(row as u32);
                weights_of[expert as usize].push(weight);
            }
        }
        let mut output = tokens.zeros_like()?;
        for (expert, (rows, weights)) in self.experts.iter().zip(rows_of.iter().zip(&weights_of)) {
            if rows.is_empty() {
                continue;
            }
            let rows = Tensor::new(rows.as_slice(), tokens.device())?;
            let weights = Tensor::new(weights.as_slice(), tokens.device())?.reshape(((), 1))?;
            let result = expert.forward(&tokens.index_select(&rows, 0)?)?;
            let result = result.broadcast_mul(&weights.to_dtype(tokens.dtype())?)?;
            output = output.index_add(&rows, &result, 0)?;
        }
        Ok(output)
    }
}

fn layer(criterion: &mut Criterion) {
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 5e-2)] {
        let weights = Weights::random(dtype).expect("memory for the weights");
        let layer = weights.layer().expect("weights that fit");
        let mut group = criterion.benchmark_group(format!("layer/cpu/{}", dtype.as_str()));
        group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
        for tokens in TOKENS {
            let hidden = Tensor::randn(0f32, 1.0, (tokens, HIDDEN), &Device::Cpu).and_then(|t| t.to_dtype(dtype));
            let hidden = hidden.expect("an input");
            check_equal(&layer.forward(&hidden), &weights.candle_loop(&hidden), tolerance);
            let name = format!("hidden={HIDDEN},width={WIDTH},tokens={tokens},experts={EXPERTS},top_k={TOP_K}");
            group.throughput(Throughput::Elements(tokens as u64));
            group.bench_function(BenchmarkId::new("moe-layer", &name), |bencher| {
                bencher.iter(|| layer.forward(black_box(&hidden)));
            });
            group.bench_function(BenchmarkId::new("candle-loop", &name), |bencher| {
                bencher.iter(|| weights.candle_loop(black_box(&hidden)));
            });
        }
        group.finish();
    }
}

/// A comparison of times means nothing unless both sides compute the same.
fn check_equal(ours: &Result<Tensor>, theirs: &Result<Tensor>, tolerance: f32) {
    let values = |tensor: &Result<Tensor>| {
        let tensor = tensor.as_ref().expect("a forward pass").to_dtype(DType::F32).expect("a float dtype");
        tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).expect("values")
    };
    let worst = values(ours).iter().zip(values(theirs)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "the two sides differ by {worst}");
}

criterion_group!(benches, layer);
criterion_main!(benches);
