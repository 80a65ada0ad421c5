//! `MoeLayer` through the expert engine against the same layer through Candle's operations, which is what weights that want
//! gradients take.
#![cfg(feature = "model")]

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use phase_moe::experts::Function;
use phase_moe::layer::Projection;
use phase_moe::{Activation, Expert, Gate, LayerState, MoeLayer, MoeSpec, Shared, SharedExperts};

/// Numbers that are the same in every run.
fn drawn(seed: u32, shape: &[usize], scale: f32, dtype: DType) -> Tensor {
    let count = shape.iter().product::<usize>() as u32;
    let value = |at: u32| {
        let mixed = (at ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
        let mixed = (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35);
        ((mixed ^ mixed >> 16) as f32 / u32::MAX as f32 - 0.5) * 3.5 * scale
    };
    Tensor::from_iter((0..count).map(value), &Device::Cpu).unwrap().reshape(shape).unwrap().to_dtype(dtype).unwrap()
}

/// What makes a tensor of a layer: itself, or a variable of the same numbers.
type Make = fn(Tensor) -> Tensor;

fn plain(tensor: Tensor) -> Tensor {
    tensor
}

fn variable(tensor: Tensor) -> Tensor {
    Var::from_tensor(&tensor).unwrap().as_tensor().clone()
}

/// A layer of drawn weights, all of them made by `make`.
fn layer(spec: &MoeSpec, dtype: DType, make: Make) -> MoeLayer {
    let matrix = |seed: u32, rows: usize, columns: usize| {
        make(drawn(seed, &[rows, columns], (columns as f32).powf(-0.5), dtype))
    };
    let expert = |seed: u32, width: usize, bias: bool| {
        let projection = |seed: u32, rows: usize, columns: usize| {
            let weight = Projection::from(matrix(seed, rows, columns));
            if bias { weight.with_bias(make(drawn(seed + 50, &[rows], 0.1, dtype))) } else { weight }
        };
        let gate = spec.activation.gated.then(|| projection(seed, width, spec.hidden));
        let (up, down) = (projection(seed + 1, width, spec.hidden), projection(seed + 2, spec.hidden, width));
        Expert::from_projections(spec.activation, gate, up, down).unwrap()
    };
    let mut gate = Gate::new(matrix(7, spec.experts, spec.hidden));
    if spec.gate_bias {
        gate = gate.with_bias(make(drawn(8, &[spec.experts], 0.1, dtype)));
    }
    let experts = (0..spec.experts as u32)
        .map(|id| expert(100 * (id + 1), spec.expert_width, spec.expert_bias))
        .collect::<Vec<_>>();
    match spec.shared {
        None => MoeLayer::new(spec.clone(), gate, experts, None).unwrap(),
        Some(shared) => {
            let gate_weight = shared.gated.then(|| matrix(9, 1, spec.hidden));
            let shared = Shared::new(expert(10, shared.width, false), gate_weight);
            MoeLayer::new(spec.clone(), gate, experts, Some(shared)).unwrap()
        }
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, in units of the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// The length of the difference, in units of the length.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    let length = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    length(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / length(&mut b.iter().copied()).max(f32::MIN_POSITIVE)
}

fn every_kind() -> Vec<MoeSpec> {
    let clamped = Activation { function: Function::ClampedSilu { alpha: 1.702, limit: 7.0 }, gated: true };
    let base = || MoeSpec::new(48, 6, 2, 40).unwrap();
    let gelu_tanh = Activation { function: Function::GeluTanh, gated: true };
    vec![
        base(),
        MoeSpec { activation: Activation { function: Function::Gelu, gated: true }, expert_bias: true, ..base() },
        MoeSpec { activation: gelu_tanh, ..base() },
        MoeSpec {
            activation: Activation { function: Function::ReluSquared, gated: false },
            expert_bias: true,
            ..base()
        },
        MoeSpec { activation: clamped, expert_bias: true, gate_bias: true, ..base() },
        MoeSpec { shared: Some(SharedExperts { width: 56, gated: true }), ..base() },
        MoeSpec { shared: Some(SharedExperts { width: 33, gated: false }), ..base() },
        MoeSpec::new(37, 5, 3, 29).unwrap(),
        MoeSpec::new(300, 4, 4, 520).unwrap(),
        MoeSpec::new(64, 1, 1, 32).unwrap(),
    ]
}

#[test]
fn the_engine_computes_what_candle_computes() {
    for spec in every_kind() {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1e-2), (DType::F16, 3e-3)] {
            let (fast, oracle) = (layer(&spec, dtype, plain), layer(&spec, dtype, variable));
            for tokens in [0, 1, 3, 17, 150] {
                let hidden = drawn(tokens as u32, &[tokens, spec.hidden], 1.0, dtype);
                let (ours, routed) = fast.route(&hidden, &mut LayerState::default()).unwrap();
                let (theirs, expected) = oracle.route(&hidden, &mut LayerState::default()).unwrap();
                assert!(!ours.track_op() && ours.dtype() == dtype && ours.dims() == [tokens, spec.hidden]);
                // Rounded logits may tie: then there is nothing to compare.
                if routed.assignment.ids().eq(expected.assignment.ids()) {
                    // In half precision both sides round, each at places of its own: single values may differ by a few units.
                    let worst = match dtype {
                        DType::F32 => difference(&ours, &theirs),
                        _ => distance(&ours, &theirs),
                    };
                    assert!(worst <= tolerance, "{dtype:?}, {tokens} tokens, {spec:?}: {worst}");
                } else {
                    assert!(dtype != DType::F32, "{tokens} tokens, {spec:?}: other experts");
                }
            }
        }
    }
}

#[test]
fn weights_that_want_gradients_get_them() {
    let spec = MoeSpec::new(16, 4, 2, 24).unwrap();
    let hidden = drawn(3, &[5, 16], 1.0, DType::F32);
    let output = layer(&spec, DType::F32, variable).forward(&hidden).unwrap();
    assert!(output.track_op(), "the forward pass of variables is part of a graph");
    // And an input that wants one does too, whatever the weights are.
    let input = Var::from_tensor(&hidden).unwrap();
    let output = layer(&spec, DType::F32, plain).forward(input.as_tensor()).unwrap();
    let gradients = output.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = gradients.get(input.as_tensor()).expect("a gradient of the input");
    assert!(values(gradient).iter().any(|value| value.abs() > 1e-6));
}

#[test]
fn quantised_weights_are_close_to_what_they_stand_for() {
    let spec = MoeSpec::new(256, 4, 2, 512).unwrap();
    let gate = || Gate::new(drawn(7, &[4, 256], 0.0625, DType::F32));
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K, GgmlDType::Q3K] {
        let quantize = |seed: u32, rows: usize, columns: usize| {
            let tensor = drawn(seed, &[rows, columns], (columns as f32).powf(-0.5), DType::F32);
            Arc::new(QTensor::quantize(&tensor, dtype).unwrap())
        };
        let parts: Vec<[Arc<QTensor>; 3]> = (1..=4)
            .map(|id| [quantize(3 * id, 512, 256), quantize(3 * id + 1, 512, 256), quantize(3 * id + 2, 256, 512)])
            .collect();
        let quantized = parts.iter().map(|[gate, up, down]| Expert::new(gate.clone(), up.clone(), down.clone()));
        let fast = MoeLayer::new(spec.clone(), gate(), quantized.collect::<Vec<_>>(), None).unwrap();
        let dense = parts.iter().map(|parts| {
            let [gate, up, down] = parts.each_ref().map(|part| variable(part.dequantize(&Device::Cpu).unwrap()));
            Expert::new(gate, up, down)
        });
        let oracle = MoeLayer::new(spec.clone(), gate(), dense.collect::<Vec<_>>(), None).unwrap();
        for tokens in [1, 2, 9, 40, 200] {
            let hidden = drawn(tokens as u32, &[tokens, 256], 1.0, DType::F32);
            let worst = difference(&fast.forward(&hidden).unwrap(), &oracle.forward(&hidden).unwrap());
            // Activations are rounded to bytes or bf16; types that the engine does not read take Candle's way.
            let tolerance = if dtype == GgmlDType::Q3K { 1e-5 } else { 2e-2 };
            assert!(worst <= tolerance, "{dtype:?}, {tokens} tokens: {worst}");
        }
    }
}

#[test]
fn stacked_weights_are_read_where_they_lie() {
    let spec = MoeSpec::new(64, 4, 2, 48).unwrap();
    let gate = || Gate::new(drawn(7, &[4, 64], 0.125, DType::BF16));
    let gate_up = drawn(1, &[4, 96, 64], 0.125, DType::BF16);
    let down = drawn(2, &[4, 64, 48], 0.125, DType::BF16);
    let tensors = [
        ("gate.weight", drawn(7, &[4, 64], 0.125, DType::BF16)),
        ("experts.gate_up_proj", gate_up.clone()),
        ("experts.down_proj", down.clone()),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_string(), tensor)).into_iter().collect();
    let stacked = MoeLayer::load(&spec, VarBuilder::from_tensors(tensors, DType::BF16, &Device::Cpu)).unwrap();
    let own = |id: usize| {
        let own = |tensor: &Tensor, start, rows| {
            tensor.get(id).unwrap().narrow(0, start, rows).unwrap().force_contiguous().unwrap()
        };
        Expert::new(own(&gate_up, 0, 48), own(&gate_up, 48, 48), own(&down, 0, 64))
    };
    let single = MoeLayer::new(spec.clone(), gate(), (0..4).map(own).collect::<Vec<_>>(), None).unwrap();
    let hidden = drawn(3, &[2, 9, 64], 1.0, DType::BF16);
    assert_eq!(values(&stacked.forward(&hidden).unwrap()), values(&single.forward(&hidden).unwrap()));
    // Rows that do not follow each other in memory are right too.
    let turned = drawn(4, &[64, 9], 1.0, DType::BF16).t().unwrap();
    let straight = turned.contiguous().unwrap();
    assert_eq!(values(&stacked.forward(&turned).unwrap()), values(&stacked.forward(&straight).unwrap()));
}

#[test]
fn one_expert_is_a_dense_ffn_and_threads_change_no_bit() {
    let spec = MoeSpec::new(128, 1, 1, 320).unwrap();
    let (fast, hidden) = (layer(&spec, DType::F32, plain), drawn(5, &[70, 128], 1.0, DType::F32));
    let dense = fast.experts()[0].forward(&hidden).unwrap();
    assert!(difference(&fast.forward(&hidden).unwrap(), &dense) <= 1e-5);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| values(&fast.forward(&hidden).unwrap()))
    };
    assert_eq!(on(1), on(3));
}
