//! Every kind of expert against a naive loop in double precision: activations, biases, shared experts, stacked and quantised
//! weights, loading, training, and weights that do not fit.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::experts::Function;
use crate::experts::tests::naive_activation;
use crate::layer::projection::Weight;
use crate::layer::{OutputNorms, Projection};
use crate::{
    Activation, CapacityRule, Error, Expert, Gate, LayerState, MoeLayer, MoeSpec, PhaseRouter, Result, RouteContext,
    Shared, SharedExperts,
};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{CpuStorage, DType, Device, Module, Storage, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CPU: Device = Device::Cpu;

/// Every function with a gate, and without one where it may be. The limit is low, so that it cuts often.
fn kinds() -> Vec<Activation> {
    let functions = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::ReluSquared];
    let plain = functions.into_iter().flat_map(|function| [true, false].map(|gated| Activation { function, gated }));
    plain.chain([Activation::clamped_swiglu(1.702, 0.6)]).collect()
}

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let scale = (*shape.last().unwrap() as f32).powf(-0.5);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| (0..3).map(|_| rng.random_range(-1f32..1.0)).sum::<f32>()).collect();
    let scale = if shape.len() == 1 { 0.5 } else { scale };
    (Tensor::from_vec(values, shape, &CPU).unwrap() * f64::from(scale)).unwrap()
}

fn tokens(seed: u64, tokens: usize, hidden: usize) -> Tensor {
    (random(&mut ChaCha8Rng::seed_from_u64(seed), &[tokens, hidden]) * (hidden as f64).sqrt()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
    tensor.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

/// Largest difference, absolute for small values and relative for large ones.
fn worst(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f64::max)
}

/// `W·x + b` by the definition.
fn naive_projection(projection: &Projection, x: &[f64]) -> Vec<f64> {
    let Weight::Dense(weight) = projection.weight() else { panic!("the naive loop takes dense weights") };
    let bias = projection.bias().map_or(vec![0.0; weight.dims()[0]], values);
    let row = |(row, bias): (Vec<f64>, f64)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias;
    rows(weight).into_iter().zip(bias).map(row).collect()
}

fn naive_expert(expert: &Expert, x: &[f64]) -> Vec<f64> {
    let up = naive_projection(expert.up_proj(), x);
    let gate = expert.gate_proj().map_or(vec![f64::NAN; up.len()], |gate| naive_projection(gate, x));
    let inner = gate.iter().zip(&up).map(|(&gate, &up)| naive_activation(expert.activation(), gate, up));
    naive_projection(expert.down_proj(), &inner.collect::<Vec<_>>())
}

/// Softmax, top-k, weighted sum, shared expert: by the definition, token by token.
fn naive_layer(layer: &MoeLayer, gate: &Tensor, hidden: &Tensor) -> Vec<f64> {
    let (spec, gate_bias) = (layer.spec(), layer.gate().bias().map(values));
    let token = |x: Vec<f64>| {
        let dot = |row: &Vec<f64>| row.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>();
        let logits = rows(gate).iter().map(dot).collect::<Vec<_>>();
        let biased = |(at, logit): (usize, f64)| (logit + gate_bias.as_ref().map_or(0.0, |bias| bias[at])).exp();
        let scores: Vec<f64> = logits.into_iter().enumerate().map(biased).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut output = vec![0.0; spec.hidden];
        let mut add = |expert: &Expert, weight: f64| {
            output.iter_mut().zip(naive_expert(expert, &x)).for_each(|(sum, value)| *sum += weight * value);
        };
        let sum = scores.iter().sum::<f64>();
        order[..spec.top_k].iter().for_each(|&expert| add(&layer.experts()[expert], scores[expert] / sum));
        if let Some(shared) = &layer.shared {
            let weight = shared.gate().map_or(1.0, |gate| 1.0 / (1.0 + (-dot(&rows(gate)[0])).exp()));
            add(shared.expert(), weight);
        }
        output
    };
    rows(hidden).into_iter().flat_map(token).collect()
}

fn spec(activation: Activation, expert_bias: bool) -> MoeSpec {
    MoeSpec { activation, expert_bias, ..MoeSpec::new(12, 4, 2, 10).unwrap() }
}

fn expert(rng: &mut ChaCha8Rng, spec: &MoeSpec, width: usize, bias: bool) -> Expert {
    let mut projection = |rows: usize, columns: usize| {
        let weight = random(rng, &[rows, columns]);
        Projection::new(weight, bias.then(|| random(rng, &[rows])))
    };
    let gate = spec.activation.gated.then(|| projection(width, spec.hidden));
    let up = projection(width, spec.hidden);
    Expert::from_projections(spec.activation, gate, up, projection(spec.hidden, width)).unwrap()
}

/// A layer of random weights, and its gate's.
fn layer(seed: u64, spec: &MoeSpec) -> (MoeLayer, Tensor) {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let weight = (random(rng, &[spec.experts, spec.hidden]) * 3.0).unwrap();
    let gate = match spec.gate_bias {
        true => Gate::new(weight.clone()).with_bias((random(rng, &[spec.experts]) * 3.0).unwrap()),
        false => Gate::new(weight.clone()),
    };
    let experts = (0..spec.experts).map(|_| expert(rng, spec, spec.expert_width, spec.expert_bias)).collect::<Vec<_>>();
    let layer = match spec.shared {
        None => MoeLayer::new(spec.clone(), gate, experts, None),
        Some(shared) => {
            let weight = shared.gated.then(|| random(rng, &[1, spec.hidden]));
            let shared = Shared::new(expert(rng, spec, shared.width, false), weight);
            MoeLayer::new(spec.clone(), gate, experts, Some(shared))
        }
    };
    (layer.unwrap(), weight)
}

#[test]
fn tensor_operations_are_the_scalar_definition() {
    let gates: Vec<f32> = (-40..=40).map(|at| at as f32 * 0.2).collect();
    for kind in kinds() {
        // Unit weights make the expert's output its activation: gate from the first input, up from the second.
        let unit = |row: [f32; 2]| Projection::new(Tensor::new(&[row], &CPU).unwrap(), None);
        let down = Projection::new(Tensor::new(&[[1f32], [0.0]], &CPU).unwrap(), None);
        let gate = kind.gated.then(|| unit([1.0, 0.0]));
        let expert = Expert::from_projections(kind, gate, unit([0.0, 1.0]), down).unwrap();
        let inputs: Vec<f32> = gates.iter().flat_map(|&gate| [gate, 1.1 - gate * 0.7]).collect();
        let output = expert.forward(&Tensor::from_slice(&inputs, (gates.len(), 2), &CPU).unwrap()).unwrap();
        let pairs = || inputs.chunks(2).map(|pair| (pair[0], pair[1]));
        let scalar: Vec<f64> = pairs().map(|(gate, up)| kind.apply(gate, up).into()).collect();
        let naive: Vec<f64> = pairs().map(|(gate, up)| naive_activation(kind, gate.into(), up.into())).collect();
        let ours: Vec<f64> = rows(&output).into_iter().map(|row| row[0]).collect();
        assert!(worst(&ours, &scalar) < 2e-6, "{kind:?}: {}", worst(&ours, &scalar));
        assert!(worst(&scalar, &naive) < 2e-6, "{kind:?}: {}", worst(&scalar, &naive));
    }
}

#[test]
fn layers_of_every_kind_match_the_naive_loop() {
    let shared = [None, Some(true), Some(false)].map(|gated| gated.map(|gated| SharedExperts { width: 7, gated }));
    for (seed, kind) in (0..).zip(kinds()) {
        for bias in [false, true] {
            for shared in shared {
                let spec = MoeSpec { gate_bias: bias, shared, ..spec(kind, bias) };
                let ((layer, gate), hidden) = (layer(seed, &spec), tokens(seed, 17, spec.hidden));
                let off = worst(&values(&layer.forward(&hidden).unwrap()), &naive_layer(&layer, &gate, &hidden));
                assert!(off < 1e-5, "{spec:?}: off by {off}");
            }
        }
    }
}

#[test]
fn one_expert_is_its_ffn_whatever_its_kind() {
    for kind in kinds() {
        let spec = MoeSpec { experts: 1, top_k: 1, ..spec(kind, true) };
        let ((layer, _), hidden) = (layer(31, &spec), tokens(32, 9, spec.hidden));
        let dense = layer.experts()[0].forward(&hidden).unwrap();
        assert!(worst(&values(&layer.forward(&hidden).unwrap()), &values(&dense)) < 1e-6, "{kind:?}");
    }
}

#[test]
fn a_shared_expert_is_added_to_dropped_and_padded_tokens_too() {
    let shared = Some(SharedExperts { width: 7, gated: true });
    let (layer, gate) = layer(33, &MoeSpec { shared, ..spec(Activation::swiglu(), false) });
    let bare =
        MoeLayer::new(spec(Activation::swiglu(), false), Gate::new(gate), layer.experts().to_vec(), None).unwrap();
    let rule = CapacityRule::per_expert(0.4).with_minimum_mean(0.0);
    let tokens = tokens(34, 20, 12);
    let padding: Vec<bool> = (0..20).map(|token| token % 6 == 0).collect();
    let routed = |layer: &MoeLayer| {
        let layer = layer.clone().with_router(Arc::new(PhaseRouter::default())).with_capacity(rule.clone());
        let context = RouteContext { padding: Some(&padding), ..RouteContext::default() };
        let (output, routing) = layer.route_with(&tokens, context, &mut LayerState::default()).unwrap();
        (output, routing.assignment)
    };
    let ((with, assignment), (without, _)) = (routed(&layer), routed(&bare));
    assert!(assignment.kept() < 16 * 2);
    let shared: Vec<f64> = rows(&tokens)
        .iter()
        .flat_map(|x| {
            let gate =
                rows(layer.shared.as_ref().unwrap().gate().unwrap())[0].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            let weight = 1.0 / (1.0 + (-gate).exp());
            naive_expert(layer.shared.as_ref().unwrap().expert(), x).into_iter().map(move |value| value * weight)
        })
        .collect();
    assert!(worst(&values(&(with - without).unwrap()), &shared) < 1e-5);
    let none = layer.forward(&Tensor::zeros((2, 0, 12), DType::F32, &CPU).unwrap()).unwrap();
    assert_eq!(none.dims(), [2, 0, 12]);
}

/// Values in the storage behind a projection's weight.
fn stored(projection: &Projection) -> usize {
    let Weight::Dense(weight) = projection.weight() else { panic!("a dense weight") };
    let (storage, _) = weight.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => values.len(),
        Storage::Cpu(CpuStorage::F16(values)) => values.len(),
        Storage::Cpu(CpuStorage::BF16(values)) => values.len(),
        _ => panic!("another storage"),
    }
}

fn builder(tensors: &[(&str, &Tensor)], dtype: DType) -> VarBuilder<'static> {
    let tensors = tensors.iter().map(|(name, tensor)| (name.to_string(), (*tensor).clone()));
    VarBuilder::from_tensors(tensors.collect(), dtype, &CPU)
}

#[test]
fn stacked_experts_are_views_and_equal_the_single_ones_bit_for_bit() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for kind in [Activation::swiglu(), Activation { function: Function::ReluSquared, gated: false }] {
            let (spec, rng) = (spec(kind, true), &mut ChaCha8Rng::seed_from_u64(41));
            let inner = if kind.gated { 20 } else { 10 };
            let mut cast = |shape: &[usize]| random(rng, shape).to_dtype(dtype).unwrap();
            let (gate_up, down) = (cast(&[4, inner, 12]), cast(&[4, 12, 10]));
            let (inner_bias, down_bias, gate) = (cast(&[4, inner]), cast(&[4, 12]), cast(&[4, 12]));
            let tensors = [
                ("gate.weight", &gate),
                ("experts.gate_up_proj", &gate_up),
                ("experts.gate_up_proj_bias", &inner_bias),
                ("experts.down_proj", &down),
                ("experts.down_proj_bias", &down_bias),
            ];
            let stacked = MoeLayer::load(&spec, builder(&tensors, dtype)).unwrap();
            assert!(stacked.experts().iter().all(|expert| stored(expert.up_proj()) == 4 * inner * 12));
            assert!(stacked.experts().iter().all(|expert| stored(expert.down_proj()) == 4 * 12 * 10));
            let single = (0..4).map(|at| {
                let own = |(stack, bias): (&Tensor, &Tensor), from: usize, rows: usize| {
                    let own = |stack: &Tensor| stack.get(at).unwrap().narrow(0, from, rows).unwrap();
                    Projection::new(own(stack).force_contiguous().unwrap(), Some(own(bias)))
                };
                let gate = kind.gated.then(|| own((&gate_up, &inner_bias), 0, 10));
                let up = own((&gate_up, &inner_bias), inner - 10, 10);
                Expert::from_projections(kind, gate, up, own((&down, &down_bias), 0, 12)).unwrap()
            });
            let single =
                MoeLayer::new(spec.clone(), Gate::new(gate.clone()), single.collect::<Vec<_>>(), None).unwrap();
            let hidden = tokens(42, 15, 12).to_dtype(dtype).unwrap();
            let [ours, theirs] = [stacked, single].map(|layer| values(&layer.forward(&hidden).unwrap()));
            assert_eq!(ours, theirs, "{dtype:?} {kind:?}");
            assert!(ours.iter().any(|value| value.abs() > 0.1));
        }
    }
}

const QUANTS: [GgmlDType; 8] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

#[test]
fn quantised_experts_equal_the_layer_of_their_dequantised_weights() {
    let mut spec = MoeSpec::new(256, 3, 2, 256).unwrap();
    // A gate that wants gradients keeps layers on Candle's operations, which these are about.
    let gate = Var::from_tensor(&random(&mut ChaCha8Rng::seed_from_u64(51), &[3, 256])).unwrap().into_inner();
    let hidden = tokens(52, 7, 256);
    let forward = |spec: &MoeSpec, experts: Vec<Expert>| {
        let layer = MoeLayer::new(spec.clone(), Gate::new(gate.clone()), experts, None).unwrap();
        values(&layer.forward(&hidden).unwrap())
    };
    for dtype in QUANTS {
        for kind in [Activation::swiglu(), Activation { function: Function::ReluSquared, gated: false }] {
            spec.activation = kind;
            let rng = &mut ChaCha8Rng::seed_from_u64(53);
            let mut matrix = || Arc::new(QTensor::quantize(&random(rng, &[256, 256]), dtype).unwrap());
            let experts = [0; 3].map(|_| (kind.gated.then(&mut matrix), matrix(), matrix()));
            let dense = |at: usize| {
                let own = |matrix: &Arc<QTensor>| Projection::new(matrix.dequantize(&CPU).unwrap(), None);
                let (gate, up, down) = &experts[at];
                Expert::from_projections(kind, gate.as_ref().map(own), own(up), own(down)).unwrap()
            };
            let quantized = experts.iter().map(|(gate, up, down)| {
                let own = |matrix: &Arc<QTensor>| Projection::new(matrix.clone(), None);
                Expert::from_projections(kind, gate.as_ref().map(own), own(up), own(down)).unwrap()
            });
            let quantized: Vec<Expert> = quantized.collect();
            let (ours, theirs) = (forward(&spec, quantized.clone()), forward(&spec, (0..3).map(dense).collect()));
            assert!(worst(&ours, &theirs) < 1e-5, "{dtype:?} {kind:?}: off by {}", worst(&ours, &theirs));
            assert!(ours.iter().any(|value| value.abs() > 0.1));

            // In half precision the expert still computes in f32.
            let half = hidden.to_dtype(DType::BF16).unwrap();
            let reference = dense(1).forward(&half.to_dtype(DType::F32).unwrap()).unwrap().to_dtype(DType::BF16);
            let output = quantized[1].forward(&half).unwrap();
            assert_eq!((output.dtype(), values(&output)), (DType::BF16, values(&reference.unwrap())), "{dtype:?}");
        }
    }
}

#[test]
fn a_quantised_expert_has_biases_in_f32() {
    let (spec, rng) = (MoeSpec::new(64, 2, 1, 32).unwrap(), &mut ChaCha8Rng::seed_from_u64(54));
    let [gate, up, down] = [[32, 64], [32, 64], [64, 32]]
        .map(|shape| Arc::new(QTensor::quantize(&random(rng, &shape), GgmlDType::Q8_0).unwrap()));
    let (single, hidden) = (Expert::new(gate, up, down), tokens(55, 6, 64));
    // What takes the sizes of outputs sees the same expert.
    let biased = single.with_biases(Some(random(rng, &[32])), random(rng, &[32]), random(rng, &[64])).unwrap();
    let norms = OutputNorms::Exact.norms(&hidden, std::slice::from_ref(&biased)).unwrap();
    let first = biased.forward(&hidden.narrow(0, 0, 1).unwrap()).unwrap();
    let norm = values(&first).iter().map(|value| value * value).sum::<f64>().sqrt();
    assert!((f64::from(norms[0]) - norm).abs() < 1e-4);
    let spec = MoeSpec { experts: 1, top_k: 1, expert_bias: true, ..spec };
    MoeLayer::new(spec, Gate::new(random(rng, &[1, 64])), vec![biased], None).unwrap();
}

#[test]
fn a_layer_of_everything_loads_by_its_names() {
    let shared = Some(SharedExperts { width: 7, gated: true });
    let spec = MoeSpec { gate_bias: true, shared, ..spec(Activation::clamped_swiglu(1.702, 7.0), true) };
    let variables = VarMap::new();
    let load = || MoeLayer::load(&spec, VarBuilder::from_varmap(&variables, DType::F32, &CPU).pp("mlp")).unwrap();
    let layer = load();
    let (mut expected, mut count) = (BTreeMap::new(), 0);
    let mut expect = |name: String, shape: &[usize]| {
        count += shape.iter().product::<usize>();
        expected.insert(format!("mlp.{name}"), shape.to_vec());
    };
    let projections = [("gate_proj", 10, 12), ("up_proj", 10, 12), ("down_proj", 12, 10)];
    for (name, rows, columns) in projections {
        for expert in 0..4 {
            expect(format!("experts.{expert}.{name}.weight"), &[rows, columns]);
            expect(format!("experts.{expert}.{name}.bias"), &[rows]);
        }
        let [rows, columns] = [rows, columns].map(|size| if size == 10 { 7 } else { size });
        expect(format!("shared_expert.{name}.weight"), &[rows, columns]);
    }
    expect("gate.weight".into(), &[4, 12]);
    expect("gate.bias".into(), &[4]);
    expect("shared_expert_gate.weight".into(), &[1, 12]);
    let names = |variables: &VarMap| -> BTreeMap<String, Vec<usize>> {
        let data = variables.data().lock().unwrap();
        data.iter().map(|(name, variable)| (name.clone(), variable.dims().to_vec())).collect()
    };
    assert_eq!(names(&variables), expected);
    assert_eq!(spec.experts * spec.parameters_per_expert() + spec.shared_parameters(), count);

    // Every tensor counts: a change in any of them changes the output, and a second loading sees it.
    let hidden = tokens(61, 40, 12);
    let mut last = values(&layer.forward(&hidden).unwrap());
    for name in expected.keys() {
        let variable = variables.data().lock().unwrap()[name].clone();
        let changed = (variable.as_tensor() + random(&mut ChaCha8Rng::seed_from_u64(62), variable.dims())).unwrap();
        variable.set(&changed).unwrap();
        let next = values(&load().forward(&hidden).unwrap());
        assert!(worst(&next, &last) > 1e-4, "{name} changes nothing");
        last = next;
    }
}

#[test]
fn names_can_be_other_ones() {
    let mut spec =
        MoeSpec { shared: Some(SharedExperts { width: 7, gated: false }), ..MoeSpec::new(12, 2, 1, 10).unwrap() };
    spec.activation = Activation { function: Function::ReluSquared, gated: false };
    spec.names.shared = "shared_experts".into();
    let variables = VarMap::new();
    MoeLayer::load(&spec, VarBuilder::from_varmap(&variables, DType::F32, &CPU)).unwrap();
    let data = variables.data().lock().unwrap();
    assert!(data.contains_key("shared_experts.up_proj.weight"));
    assert!(!data.keys().any(|name| name.contains("gate_proj") || name.contains("shared_expert_gate")));
    assert_eq!(data.len(), 1 + 2 * 2 + 2);
}

/// A number of every element of the output.
fn loss(output: &Tensor) -> Tensor {
    let weights: Vec<f64> = (0..output.elem_count()).map(|at| (at as f64 * 0.7).sin()).collect();
    let weights = Tensor::from_vec(weights, output.shape(), &CPU).unwrap();
    (output.to_dtype(DType::F64).unwrap() * weights).unwrap().sum_all().unwrap()
}

#[test]
fn gradients_of_every_kind_match_finite_differences() {
    const STEP: f64 = 1e-5;
    for kind in kinds() {
        let (spec, rng) = (spec(kind, true), &mut ChaCha8Rng::seed_from_u64(71));
        let hidden = tokens(72, 6, spec.hidden);
        let shapes: [&[usize]; 6] = [&[10, 12], &[10], &[10, 12], &[10], &[12, 10], &[12]];
        let mut tensors = vec![hidden.to_dtype(DType::F64).unwrap()];
        tensors.extend(shapes.map(|shape| random(rng, shape).to_dtype(DType::F64).unwrap()));
        let measure = |tensors: &[Tensor]| {
            let projection = |at: usize| Projection::new(tensors[at].clone(), Some(tensors[at + 1].clone()));
            let gate = kind.gated.then(|| projection(1));
            let expert = Expert::from_projections(kind, gate, projection(3), projection(5)).unwrap();
            loss(&expert.forward(&tensors[0]).unwrap())
        };
        for at in (0..7).filter(|at| kind.gated || ![1, 2].contains(at)) {
            let variable = Var::from_tensor(&tensors[at]).unwrap();
            let mut tracked = tensors.clone();
            tracked[at] = variable.as_tensor().clone();
            let gradients = measure(&tracked).backward().unwrap();
            let gradient = values(gradients.get(&variable).expect("a gradient"));
            for (element, ours) in gradient.iter().enumerate() {
                let moved = |step: f64| {
                    let (mut moved, mut changed) = (tensors.clone(), values(&tensors[at]));
                    changed[element] += step;
                    moved[at] = Tensor::from_vec(changed, tensors[at].shape(), &CPU).unwrap();
                    measure(&moved).to_scalar::<f64>().unwrap()
                };
                let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                let off = (ours - difference).abs() / (1.0 + difference.abs());
                assert!(off < 1e-4, "{kind:?}: tensor {at} element {element}: {ours}, difference {difference}");
            }
            assert!(gradient.iter().any(|value| value.abs() > 1e-2), "{kind:?}: tensor {at}");
        }
    }
}

#[test]
fn gradients_reach_every_tensor_of_a_layer_of_everything() {
    for kind in kinds() {
        let shared = Some(SharedExperts { width: 7, gated: true });
        let spec = MoeSpec { gate_bias: true, shared, top_k: 4, ..spec(kind, true) };
        let variables = VarMap::new();
        let layer = MoeLayer::load(&spec, VarBuilder::from_varmap(&variables, DType::F32, &CPU)).unwrap();
        let hidden = tokens(73, 20, 12);
        let gradients = loss(&layer.forward(&hidden).unwrap()).backward().unwrap();
        for (name, variable) in variables.data().lock().unwrap().iter() {
            let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{kind:?}: no gradient of {name}"));
            assert!(values(gradient).iter().any(|value| value.abs() > 1e-3), "{kind:?}: {name}");
        }
    }
}

#[test]
fn gradients_pass_through_stacked_and_quantised_experts() {
    let (spec, rng) = (MoeSpec::new(32, 2, 2, 32).unwrap(), &mut ChaCha8Rng::seed_from_u64(74));
    let gate_up = Var::from_tensor(&random(rng, &[2, 64, 32])).unwrap();
    let down = random(rng, &[2, 32, 32]);
    let gate = Var::from_tensor(&random(rng, &[2, 32])).unwrap();
    let hidden = Var::from_tensor(&tokens(75, 5, 32)).unwrap();
    let backward = |layer: MoeLayer| loss(&layer.forward(&hidden).unwrap()).backward().unwrap();
    let forward = |experts: Vec<Expert>| {
        backward(MoeLayer::new(spec.clone(), Gate::new(gate.as_tensor().clone()), experts, None).unwrap())
    };
    let tensors = [
        ("gate.weight", gate.as_tensor()),
        ("experts.gate_up_proj", gate_up.as_tensor()),
        ("experts.down_proj", &down),
    ];
    let gradients = backward(MoeLayer::load(&spec, builder(&tensors, DType::F32)).unwrap());
    let expert = |at: usize| {
        let rows = |from: usize| gate_up.as_detached_tensor().get(at).unwrap().narrow(0, from, 32).unwrap();
        Var::from_tensor(&rows(0)).and_then(|gate| Ok((gate, Var::from_tensor(&rows(32))?))).unwrap()
    };
    let parts = [expert(0), expert(1)];
    let single = |at: usize| {
        let (gate, up) = &parts[at];
        Expert::new(gate.as_tensor().clone(), up.as_tensor().clone(), down.get(at).unwrap())
    };
    let reference = forward(vec![single(0), single(1)]);
    let own = parts.iter().flat_map(|(gate, up)| [gate, up]).flat_map(|part| values(reference.get(part).unwrap()));
    assert_eq!(values(gradients.get(&gate_up).unwrap()), own.collect::<Vec<_>>());

    let quantize =
        |view: &Tensor| Arc::new(QTensor::quantize(&view.force_contiguous().unwrap(), GgmlDType::F32).unwrap());
    let part =
        |at: usize, from: usize| quantize(&gate_up.as_detached_tensor().get(at).unwrap().narrow(0, from, 32).unwrap());
    let own = |at: usize| Expert::new(part(at, 0), part(at, 32), quantize(&down.get(at).unwrap()));
    let quantized = forward(vec![own(0), own(1)]);
    for variable in [&gate, &hidden] {
        let off = worst(&values(quantized.get(variable).unwrap()), &values(reference.get(variable).unwrap()));
        assert!(off < 1e-5, "off by {off}");
    }
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Err(error @ (Error::Shape { .. } | Error::Parameter { .. })) => error.to_string(),
        Err(error) => panic!("another error: {error:?}"),
        Ok(_) => panic!("no error"),
    }
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &CPU).unwrap()
}

#[test]
fn experts_that_do_not_fit_are_named() {
    let spec = spec(Activation::swiglu(), true);
    let (fits, _) = layer(81, &spec);
    let error = |expert: Expert| {
        let mut experts = fits.experts().to_vec();
        experts[2] = expert;
        message(MoeLayer::new(spec.clone(), Gate::new(zeros(&[4, 12])), experts, None))
    };
    let bare = Expert::new(zeros(&[10, 12]), zeros(&[10, 12]), zeros(&[12, 10]));
    let biased = |gate: &Tensor, up: &[usize], down: &[usize]| {
        bare.clone().with_biases(Some(gate.clone()), zeros(up), zeros(down)).unwrap()
    };
    assert_eq!(error(bare.clone()), "expert 2 gate_proj bias: expected [10], got none");
    assert_eq!(error(biased(&zeros(&[10]), &[11], &[12])), "expert 2 up_proj bias: expected [10], got [11]");
    assert_eq!(error(biased(&zeros(&[10]), &[10], &[1, 12])), "expert 2 down_proj bias: expected [12], got [1, 12]");
    let half = zeros(&[10]).to_dtype(DType::BF16).unwrap();
    assert_eq!(
        error(biased(&half, &[10], &[12])),
        "expert 2 gate_proj bias: expected F32 like the gate weight, got BF16"
    );
    let other = expert(
        &mut ChaCha8Rng::seed_from_u64(82),
        &self::spec(Activation { function: Function::Gelu, gated: true }, true),
        10,
        true,
    );
    assert_eq!(
        error(other),
        "expert 2 activation: expected Activation { function: Silu, gated: true }, got Activation { function: Gelu, gated: true }"
    );
    let unbiased = MoeSpec { expert_bias: false, ..spec.clone() };
    let experts = fits.experts().to_vec();
    let error = message(MoeLayer::new(unbiased.clone(), Gate::new(zeros(&[4, 12])), experts, None));
    assert_eq!(error, "expert 0 gate_proj bias: expected none, got [10]");

    let one = || Projection::new(zeros(&[10, 12]), None);
    let two = || Projection::new(zeros(&[12, 10]), None);
    assert_eq!(
        message(Expert::from_projections(Activation::swiglu(), None, one(), two())),
        "gate_proj: expected one, as the activation is gated, got none"
    );
    assert_eq!(
        message(Expert::from_projections(
            Activation { function: Function::ReluSquared, gated: false },
            Some(one()),
            one(),
            two()
        )),
        "gate_proj: expected none, as the activation is not gated, got one"
    );
    assert_eq!(
        message(bare.with_biases(None, zeros(&[10]), zeros(&[12]))),
        "gate_proj bias: expected one, as the activation is gated, got none"
    );
    let wrong = MoeSpec { activation: Activation::clamped_swiglu(f32::NAN, 7.0), ..unbiased };
    assert_eq!(message(wrong.check()), "activation alpha is NaN: expected a finite number");
}

#[test]
fn gates_and_shared_experts_that_do_not_fit_are_named() {
    let shared = SharedExperts { width: 7, gated: true };
    let with = MoeSpec { gate_bias: true, shared: Some(shared), ..spec(Activation::swiglu(), false) };
    let (layer, weight) = layer(83, &with);
    let experts = || layer.experts().to_vec();
    let gate = || Gate::new(weight.clone()).with_bias(zeros(&[4]));
    let ffn = |width: usize| Expert::new(zeros(&[width, 12]), zeros(&[width, 12]), zeros(&[12, width]));
    let error = |spec: &MoeSpec, gate: Gate, shared: Option<Shared>| {
        message(MoeLayer::new(spec.clone(), gate, experts(), shared))
    };
    let fits = || Some(Shared::new(ffn(7), Some(zeros(&[1, 12]))));
    assert_eq!(error(&with, Gate::new(weight.clone()), fits()), "gate bias: expected [4], got none");
    let long = Gate::new(weight.clone()).with_bias(zeros(&[5]));
    assert_eq!(error(&with, long, fits()), "gate bias: expected [4], got [5]");
    assert_eq!(error(&with, gate(), None), "shared expert: expected one of width 7, got none");
    let narrow = Some(Shared::new(ffn(6), Some(zeros(&[1, 12]))));
    assert_eq!(error(&with, gate(), narrow), "shared expert gate_proj: expected [7, 12], got [6, 12]");
    assert_eq!(error(&with, gate(), Some(Shared::new(ffn(7), None))), "shared expert gate: expected [1, 12], got none");
    let tall = Some(Shared::new(ffn(7), Some(zeros(&[12]))));
    assert_eq!(error(&with, gate(), tall), "shared expert gate: expected [1, 12], got [12]");
    let open = MoeSpec { shared: Some(SharedExperts { gated: false, ..shared }), ..with.clone() };
    assert_eq!(error(&open, gate(), fits()), "shared expert gate: expected none, got [1, 12]");
    let without = MoeSpec { shared: None, ..with.clone() };
    assert_eq!(error(&without, gate(), fits()), "shared expert: expected none, got one");
    assert_eq!(error(&MoeSpec { gate_bias: false, ..without }, gate(), None), "gate bias: expected none, got [4]");
    let empty = MoeSpec { shared: Some(SharedExperts { width: 0, ..shared }), ..with };
    assert_eq!(message(empty.check()), "shared expert width is 0: expected at least 1");
}

#[test]
fn stacks_and_quantised_tensors_that_do_not_fit_are_named() {
    let spec = MoeSpec::new(64, 2, 1, 32).unwrap();
    let quantized = |shape: &[usize]| Arc::new(QTensor::quantize(&zeros(shape), GgmlDType::Q8_0).unwrap());
    let stacked = |gate_up: &[usize], down: &[usize]| {
        let tensors = [
            ("gate.weight", &zeros(&[2, 64])),
            ("experts.gate_up_proj", &zeros(gate_up)),
            ("experts.down_proj", &zeros(down)),
        ];
        message(MoeLayer::load(&spec, builder(&tensors, DType::F32)))
    };
    let expected = "stacked experts: expected [2, 64, 64] and [2, 64, 32], or [2, 64, 64] and [2, 32, 64], got ";
    assert_eq!(stacked(&[2, 32, 64], &[2, 64, 32]), format!("{expected}[2, 32, 64] and [2, 64, 32]"));
    assert_eq!(stacked(&[2, 64, 64], &[64, 32]), format!("{expected}[2, 64, 64] and [64, 32]"));

    let one = MoeSpec { experts: 1, expert_bias: true, ..spec };
    let new = |weight: Weight, bias: DType| {
        let bias = |size: usize| zeros(&[size]).to_dtype(bias).unwrap();
        let projection = |shape: &[usize]| Projection::new(quantized(shape), Some(bias(shape[0])));
        let (gate, up) = (Projection::new(weight, Some(bias(32))), projection(&[32, 64]));
        let expert = Expert::from_projections(Activation::swiglu(), Some(gate), up, projection(&[64, 32])).unwrap();
        MoeLayer::new(one.clone(), Gate::new(zeros(&[1, 64])), vec![expert], None)
    };
    let fits = || Weight::from(quantized(&[32, 64]));
    assert!(new(fits(), DType::F32).is_ok());
    let error = |weight: Weight| message(new(weight, DType::F32));
    assert_eq!(error(quantized(&[64, 32]).into()), "expert 0 gate_proj: expected [32, 64], got [64, 32]");
    assert_eq!(error(quantized(&[1, 32, 64]).into()), "expert 0 gate_proj: expected [32, 64], got [1, 32, 64]");
    let short = QStorage::from_data(vec![0; 34].into(), &CPU, GgmlDType::Q8_0).unwrap();
    let short = Arc::new(QTensor::new(short, (32, 64)).unwrap());
    assert_eq!(error(short.into()), "expert 0 gate_proj: expected 2176 bytes for [32, 64] in Q8_0, got 34 bytes");
    assert_eq!(
        message(new(fits(), DType::F16)),
        "expert 0 gate_proj bias: expected F32 beside a quantised weight, got F16"
    );
}
