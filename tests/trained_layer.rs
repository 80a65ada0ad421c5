//! A layer that was trained, saved and loaded is the same layer: every parameter there is, of every family, by the loop that
//! `layer::loss` documents.
#![cfg(feature = "model")]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use phase_moe::experts::Function;
use phase_moe::layer::{LossFreeBias, load_balancing_loss, router_z_loss};
use phase_moe::{Activation, Batch, Decoder, Expert, Gate, LayerState, MoeLayer, MoeSpec, Scoring, SharedExperts, zoo};

const CPU: Device = Device::Cpu;
const TOKENS: usize = 96;

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn input(hidden: usize) -> Tensor {
    let values: Vec<f32> = (0..TOKENS * hidden).map(|at| ((at * at) as f32 * 0.37).sin()).collect();
    Tensor::from_vec(values, (TOKENS, hidden), &CPU).unwrap()
}

/// Sets every matrix to numbers of this test's own, so that each run trains the same layer.
fn initialise(vars: &VarMap) {
    let data = vars.data().lock().unwrap();
    let mut seed = 7u64;
    for var in data.iter().collect::<BTreeMap<_, _>>().into_values().filter(|var| var.rank() > 1) {
        let deviation = 1.7 / (var.dim(1).unwrap() as f32).sqrt();
        let draw = |_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * deviation
        };
        let drawn: Vec<f32> = (0..var.elem_count()).map(draw).collect();
        var.set(&Tensor::from_vec(drawn, var.shape(), &CPU).unwrap()).unwrap();
    }
}

/// All variables by name.
fn parameters(vars: &VarMap) -> BTreeMap<String, Vec<f32>> {
    vars.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), values(var))).collect()
}

/// The loop of `layer::loss`, a few steps.
fn train(layer: &mut MoeLayer, vars: &VarMap, spec: &MoeSpec) {
    let mut optimiser = AdamW::new_lr(vars.all_vars(), 1e-2).unwrap();
    let mut bias = LossFreeBias::new(spec.experts, 0.02).unwrap();
    let input = input(spec.hidden);
    // An odd number: steps of a bias cannot all cancel.
    for _ in 0..5 {
        let (output, routing) = layer.route(&input, &mut LayerState::default()).unwrap();
        let loss = (output - &input).unwrap().sqr().unwrap().mean_all().unwrap();
        let balance = (load_balancing_loss(&routing).unwrap() * 0.01).unwrap();
        let z = (router_z_loss(&routing).unwrap() * 0.001).unwrap();
        optimiser.backward_step(&((loss + balance).unwrap() + z).unwrap()).unwrap();
        if spec.selection_bias {
            bias.update(&routing.assignment.load()).unwrap();
            layer.set_selection_bias(bias.values()).unwrap();
        }
    }
}

fn load(spec: &MoeSpec, vars: &VarMap) -> MoeLayer {
    MoeLayer::load(spec, VarBuilder::from_varmap(vars, DType::F32, &CPU).pp("mlp")).unwrap()
}

/// Names of the parameters that a layer of `spec` has, from what the specification says alone.
fn expected_names(spec: &MoeSpec) -> Vec<String> {
    let names = &spec.names;
    let projections = |of: String, bias: bool| {
        let gate = spec.activation.gated.then_some(&names.gate_proj);
        let all = gate.into_iter().chain([&names.up_proj, &names.down_proj]);
        all.flat_map(|name| {
            let kinds = if bias { &["weight", "bias"][..] } else { &["weight"] };
            kinds.iter().map(|kind| format!("{of}.{name}.{kind}")).collect::<Vec<_>>()
        })
        .collect::<Vec<_>>()
    };
    let mut all = vec![format!("{}.weight", names.gate)];
    if spec.gate_bias {
        all.push(format!("{}.bias", names.gate));
    }
    if spec.selection_bias {
        all.push(names.selection_bias.clone());
    }
    for expert in 0..spec.experts {
        all.extend(projections(format!("{}.{expert}", names.experts), spec.expert_bias));
    }
    if let Some(shared) = spec.shared {
        all.extend(projections(names.shared.clone(), false));
        if shared.gated {
            all.push(format!("{}.weight", names.shared_gate));
        }
    }
    all.sort();
    all.into_iter().map(|name| format!("mlp.{name}")).collect()
}

fn round_trip(about: &str, spec: &MoeSpec) {
    let (vars, file) = (VarMap::new(), tempfile::NamedTempFile::new().unwrap());
    let mut layer = load(spec, &vars);
    initialise(&vars);
    let before = parameters(&vars);
    assert_eq!(before.keys().cloned().collect::<Vec<_>>(), expected_names(spec), "{about}");
    train(&mut layer, &vars, spec);
    let after = parameters(&vars);
    for (name, before) in &before {
        assert_ne!(before, &after[name], "{about}: `{name}` was not trained");
    }
    vars.save(file.path()).unwrap();

    let input = input(spec.hidden);
    let (trained, routed) = layer.route(&input, &mut LayerState::default()).unwrap();
    // Into variables again: the same operations, so the same bits.
    let mut again = VarMap::new();
    let reloaded = load(spec, &again);
    again.load(file.path()).unwrap();
    assert_eq!(parameters(&again), after, "{about}");
    let (output, again) = reloaded.route(&input, &mut LayerState::default()).unwrap();
    assert_eq!(again.assignment, routed.assignment, "{about}");
    assert_eq!(values(&output), values(&trained), "{about}");
    // Into plain tensors, which run on the engine: the file against the trained layer's own.
    let own = vars.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    let engine = |vb: VarBuilder<'_>| {
        MoeLayer::load(spec, vb.pp("mlp")).unwrap().route(&input, &mut LayerState::default()).unwrap()
    };
    let bytes = std::fs::read(file.path()).unwrap();
    let (output, by_engine) = engine(VarBuilder::from_buffered_safetensors(bytes, DType::F32, &CPU).unwrap());
    let (wanted, _) = engine(VarBuilder::from_tensors(own, DType::F32, &CPU));
    assert_eq!(values(&output), values(&wanted), "{about}");
    assert!(by_engine.assignment.ids().eq(routed.assignment.ids()), "{about}");
    for (got, wanted) in values(&output).iter().zip(values(&trained)) {
        assert!((got - wanted).abs() < 1e-4 * (1.0 + wanted.abs()), "{about}: {got}, not {wanted}");
    }
}

fn everything() -> MoeSpec {
    MoeSpec {
        activation: Activation { function: Function::ClampedSilu { alpha: 1.702, limit: 7.0 }, gated: true },
        expert_bias: true,
        gate_bias: true,
        selection_bias: true,
        shared: Some(SharedExperts { width: 20, gated: true }),
        scoring: Scoring { scale: 1.5, ..Scoring::sigmoid().normalized(true) },
        ..MoeSpec::new(16, 6, 2, 24).unwrap()
    }
}

#[test]
fn all_parameters_of_any_kind_of_layer_are_saved() {
    round_trip("everything", &everything());
    let plain = MoeSpec::new(16, 6, 2, 24).unwrap();
    round_trip("nothing but gate and experts", &plain);
    let relu = MoeSpec {
        activation: Activation { function: Function::ReluSquared, gated: false },
        selection_bias: true,
        ..plain.clone()
    };
    round_trip("no gate projection", &MoeSpec { scoring: Scoring::sigmoid(), ..relu });
    round_trip(
        "a shared expert without a gate",
        &MoeSpec { shared: Some(SharedExperts { width: 24, gated: false }), ..plain },
    );
}

#[test]
fn all_families_save_under_the_names_they_are_read_by() {
    for family in zoo::FAMILIES.iter().map(|family| family.name) {
        // OLMoE has its own directory of fixtures.
        let directory = if family == "olmoe" { "olmoe_random".into() } else { format!("zoo/{family}") };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(directory).join("config.json");
        let spec = zoo::parse_moe_config(&std::fs::read_to_string(path).unwrap(), "config.json").unwrap();
        if family == "phimoe" {
            // Its gradient is an estimate of its own: such a layer does not train here.
            let error = load(&spec, &VarMap::new())
                .route(&input(spec.hidden), &mut LayerState::default())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("score function under `Var`s"), "{error}");
            continue;
        }
        round_trip(family, &spec);
    }
}

#[test]
fn whoever_sets_the_bias_all_see_it() {
    let (spec, vars) = (everything(), VarMap::new());
    let mut layer = load(&spec, &vars);
    let clone = layer.clone();
    let bias: Vec<f32> = (0..spec.experts).map(|expert| expert as f32 * 0.25 - 0.5).collect();
    layer.set_selection_bias(&bias).unwrap();
    assert_eq!(clone.selection_bias().unwrap().as_deref(), Some(&bias[..]));
    let name = "mlp.gate.e_score_correction_bias";
    assert_eq!(parameters(&vars)[name], bias);
    // An update rule may go on from there.
    assert_eq!(LossFreeBias::resume(&bias, 0.1).unwrap().values(), bias);
    assert!(LossFreeBias::resume(&[f32::NAN], 0.1).is_err());
    // The variable itself, as `VarMap::load` sets it.
    let other = Tensor::new(&[9f32, 8.0, 0.0, 0.0, 0.0, 0.0], &CPU).unwrap();
    vars.data().lock().unwrap()[name].set(&other).unwrap();
    for layer in [&layer, &clone] {
        let (_, routed) = layer.route(&input(spec.hidden), &mut LayerState::default()).unwrap();
        assert!(routed.assignment.ids().all(|id| id < 2), "the variable is not what selects");
    }
    // Without gradients, in tensors of its own, the same holds among clones.
    let tensors =
        vars.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    let mut plain = MoeLayer::load(&spec, VarBuilder::from_tensors(tensors, DType::F32, &CPU).pp("mlp")).unwrap();
    let clone = plain.clone();
    plain.set_selection_bias(&bias).unwrap();
    assert_eq!(clone.selection_bias().unwrap().as_deref(), Some(&bias[..]));
    assert_eq!(layer.selection_bias().unwrap(), Some(values(&other)), "a copy is another layer");
}

#[test]
fn a_bias_that_would_not_be_saved_is_refused() {
    let spec = MoeSpec { selection_bias: false, ..everything() };
    let mut layer = load(&spec, &VarMap::new());
    let error = layer.set_selection_bias(&[0.0; 6]).unwrap_err().to_string();
    assert_eq!(
        error,
        "selection bias of a layer in training: expected `selection_bias` in the layer's spec, so that it is saved with the \
         other variables, got none"
    );
    // A gate made by hand keeps to the variable it is given.
    let bias = candle_core::Var::zeros(6, DType::F32, &CPU).unwrap();
    let gate = Gate::new(Tensor::zeros((6, 16), DType::F32, &CPU).unwrap()).with_selection_bias(&bias).unwrap();
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    let held = vec![Expert::new(zeros((4, 16)), zeros((4, 16)), zeros((16, 4))); 6];
    let layer = MoeLayer::new(MoeSpec::new(16, 6, 2, 4).unwrap(), gate, held, None).unwrap();
    bias.set(&Tensor::ones(6, DType::F32, &CPU).unwrap()).unwrap();
    assert_eq!(layer.selection_bias().unwrap(), Some(vec![1.0; 6]));
}

#[test]
fn a_model_saves_the_biases_of_all_its_layers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/zoo/deepseek_v3/config.json");
    let spec = zoo::parse_config(&std::fs::read_to_string(path).unwrap(), "config.json").unwrap();
    let (vars, file) = (VarMap::new(), tempfile::NamedTempFile::new().unwrap());
    let mut decoder = Decoder::new(&spec, VarBuilder::from_varmap(&vars, DType::F32, &CPU)).unwrap();
    for (at, layer) in decoder.moe_layers_mut().enumerate() {
        let bias: Vec<f32> = (0..spec.moe.experts).map(|expert| ((expert * 7 + at) % 5) as f32 * 0.3).collect();
        layer.set_selection_bias(&bias).unwrap();
    }
    vars.save(file.path()).unwrap();
    let batch = Batch::new(&[&[1, 2, 3, 4, 5][..]]).unwrap();
    let logits = |decoder: &Decoder| values(&decoder.forward(&batch, &mut decoder.batch_state()).unwrap());
    let mut again = VarMap::new();
    let reloaded = Decoder::new(&spec, VarBuilder::from_varmap(&again, DType::F32, &CPU)).unwrap();
    again.load(file.path()).unwrap();
    assert_eq!(logits(&reloaded), logits(&decoder));
    let bytes = std::fs::read(file.path()).unwrap();
    let plain = Decoder::new(&spec, VarBuilder::from_buffered_safetensors(bytes, DType::F32, &CPU).unwrap()).unwrap();
    for (got, wanted) in plain.moe_layers().zip(decoder.moe_layers()) {
        assert_eq!(got.selection_bias().unwrap(), wanted.selection_bias().unwrap());
        assert!(wanted.selection_bias().unwrap().unwrap().iter().any(|bias| *bias > 0.0));
    }
}
