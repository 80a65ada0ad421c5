//! The layer on its own: its two ways against each other, shapes, limits, threads, what it refuses.

mod common;

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use common::{Numbers, difference, filled, numbers};
use phase_moe::experts::Function;
use phase_moe::routing::ScoreFunction;
use phase_moe::{Activation, PhaseRouter, RouteContext, Scoring, SharedExperts};
use phase_moe_burn::{CapacityRule, Error, LayerState, Moe, MoeConfig, MoeSpec, RouterKind};

/// Every kind of expert and gate that a spec can say.
fn specs() -> Vec<MoeSpec> {
    let plain = MoeSpec::new(24, 6, 2, 20).unwrap();
    let with =
        |function: Function, gated: bool| MoeSpec { activation: Activation { function, gated }, ..plain.clone() };
    vec![
        plain.clone(),
        MoeSpec {
            expert_bias: true,
            gate_bias: true,
            ..with(Function::ClampedSilu { alpha: 1.702, limit: 0.5 }, true)
        },
        MoeSpec { scoring: Scoring::sigmoid().normalized(true), selection_bias: true, ..with(Function::Gelu, true) },
        MoeSpec { shared: Some(SharedExperts { width: 12, gated: true }), ..with(Function::GeluTanh, true) },
        MoeSpec { shared: Some(SharedExperts { width: 12, gated: false }), ..with(Function::ReluSquared, false) },
    ]
}

fn layer(spec: MoeSpec, seed: u64, dtype: DType) -> Moe {
    filled(MoeConfig::of(spec).init(&Device::flex()), seed, 0.3, dtype)
}

#[test]
fn the_engine_agrees_with_burns_operations() {
    let device = Device::flex();
    for (at, spec) in specs().into_iter().enumerate() {
        for (dtype, bound) in [(DType::F32, 1e-5), (DType::BF16, 1e-2), (DType::F16, 1e-2)] {
            let layer = layer(spec.clone(), at as u64, dtype);
            let hidden: Tensor<3> = Numbers(7).tensor([3, 11, 24], &device).cast(dtype);
            let (by_engine, routed) = layer.route(hidden.clone(), &mut LayerState::default()).unwrap();
            assert!(!by_engine.is_autodiff());
            let (by_burn, other) = layer.clone().train().route(hidden.autodiff(), &mut LayerState::default()).unwrap();
            assert!(by_burn.is_autodiff(), "under autodiff its operations are recorded");
            assert_eq!((by_engine.dtype(), by_burn.dtype()), (dtype, dtype));
            assert_eq!(routed.assignment.ids().collect::<Vec<_>>(), other.assignment.ids().collect::<Vec<_>>());
            let off = difference(&numbers(by_engine), &numbers(by_burn));
            assert!(off <= bound, "{:?} {dtype:?}: {off}", spec.activation);
        }
    }
}

#[test]
fn any_rank_has_the_same_rows() {
    let device = Device::flex();
    let layer = layer(specs()[0].clone(), 1, DType::F32);
    let rows: Tensor<2> = Numbers(2).tensor([12, 24], &device);
    let expected = numbers(layer.forward(rows.clone()));
    assert_eq!(numbers(layer.forward(rows.clone().reshape([2, 6, 24]))), expected);
    assert_eq!(numbers(layer.forward(rows.clone().reshape([2, 3, 2, 24]))), expected);
    assert_eq!(numbers(layer.forward(rows.clone().slice([0..1, 0..24]).reshape([24]))), expected[..24]);
    // Rows that do not lie one after the other, and those that begin further on.
    assert_eq!(numbers(layer.forward(rows.clone().transpose().transpose())), expected);
    let turned: Tensor<2> = rows.clone().transpose().reshape([24, 12]).transpose();
    assert_eq!(numbers(layer.forward(turned)), expected);
    assert_eq!(numbers(layer.forward(rows.clone().slice([5..9, 0..24]))), expected[5 * 24..9 * 24]);
    assert_eq!(layer.forward(rows.slice([0..0, 0..24])).dims(), [0, 24]);
}

#[test]
fn a_full_device_drops_nothing_and_prices_stay_warm() {
    let config =
        MoeConfig::new(24, 20, 8, 2).with_router(RouterKind::Phase).with_capacity(CapacityRule::per_device(1.0, 4));
    let layer = filled(config.init(&Device::flex()), 3, 1.0, DType::F32);
    let hidden: Tensor<2> = Numbers(4).tensor([64, 24], &Device::flex());
    let mut state = LayerState::default();
    for step in 1..3 {
        let (_, routed) = layer.route(hidden.clone(), &mut state).unwrap();
        let metrics = routed.metrics().unwrap();
        assert_eq!((metrics.survival(), routed.assignment.kept()), (1.0, 128));
        let load = routed.assignment.load();
        assert!(load.chunks(2).all(|device| device.iter().sum::<u32>() == 32), "{load:?}");
        assert_eq!(state.step, step);
    }
    assert_eq!(state.router.prices().len(), 4);
    // The same layer without its limits asks more of some devices.
    let (_, routed) = layer.with_capacity(None).route(hidden, &mut LayerState::default()).unwrap();
    assert!(routed.assignment.load().chunks(2).any(|device| device.iter().sum::<u32>() != 32));
}

#[test]
fn the_output_does_not_depend_on_the_number_of_threads() {
    let layer = layer(specs()[3].clone(), 5, DType::F32);
    let hidden: Tensor<2> = Numbers(6).tensor([70, 24], &Device::flex());
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| numbers(layer.forward(hidden.clone())))
    };
    assert_eq!(on(1), on(4));
}

#[test]
fn padding_and_token_ids_reach_the_router() {
    let config = MoeConfig::new(24, 20, 6, 2).with_router(RouterKind::Hash);
    let layer = filled(config.init(&Device::flex()), 8, 0.3, DType::F32);
    let hidden: Tensor<2> = Numbers(9).tensor([4, 24], &Device::flex());
    let (ids, padding) = ([5, 6, 5, 6], [false, false, false, true]);
    let context = RouteContext { token_ids: Some(&ids), padding: Some(&padding), ..RouteContext::default() };
    let (output, routed) = layer.route_with(hidden, context, &mut LayerState::default()).unwrap();
    let chosen: Vec<i32> = routed.assignment.ids().collect();
    assert_eq!((chosen[..2].to_vec(), chosen[6..].to_vec()), (chosen[4..6].to_vec(), vec![-1, -1]));
    assert!(numbers(output)[3 * 24..].iter().all(|&value| value == 0.0));
    assert_eq!(routed.padding, Some(padding.to_vec()));
}

#[test]
fn what_it_refuses_it_names() {
    let device = Device::flex();
    let of = |config: MoeConfig| config.try_init(&device).unwrap_err();
    assert!(matches!(of(MoeConfig::new(8, 8, 0, 1)), Error::ExpertCount { .. }));
    assert!(matches!(of(MoeConfig::new(8, 8, 4, 5)), Error::TopKExceedsExperts { .. }));
    assert!(matches!(of(MoeConfig::new(8, 8, 4, 0)), Error::TopKZero));
    assert!(matches!(of(MoeConfig::new(0, 8, 4, 1)), Error::Parameter { name: "hidden", .. }));
    let deaf = MoeConfig::new(8, 8, 4, 1).with_router(RouterKind::TopK).with_capacity(CapacityRule::per_expert(1.0));
    assert!(matches!(of(deaf), Error::CapacityIgnored { router: "top-k" }));

    let layer = MoeConfig::new(8, 8, 4, 1).init(&device);
    let route =
        |layer: &Moe, hidden: Tensor<2>| layer.route(hidden, &mut LayerState::default()).unwrap_err().to_string();
    let wide = Tensor::zeros([3, 9], &device);
    assert_eq!(route(&layer, wide), "hidden state: expected [.., 8], got [3, 9]");
    let halves = Tensor::zeros([3, 8], (&device, DType::BF16));
    assert_eq!(route(&layer, halves), "hidden state: expected F32 like the gate weight, got BF16");
    let none = MoeSpec { expert_width: 0, expert_bias: true, ..MoeSpec::new(8, 4, 1, 8).unwrap() };
    assert!(matches!(of(MoeConfig::of(none)), Error::Parameter { name: "expert_width", .. }));
    let nan = Tensor::full([3, 8], f32::NAN, &device);
    assert!(route(&layer, nan).contains("NaN"));
    let limited = layer.clone().with_capacity(Some(CapacityRule::per_expert(1.0)));
    assert!(route(&limited, Tensor::zeros([30, 8], &device)).contains("top-k"));
    let padding = [true; 2];
    let context = RouteContext { padding: Some(&padding), ..RouteContext::default() };
    let error = layer.route_with(Tensor::<2>::zeros([3, 8], &device), context, &mut LayerState::default()).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");

    let mut layer = layer;
    assert!(matches!(layer.set_top_k(5), Err(Error::TopKExceedsExperts { .. })));
    assert_eq!(layer.spec().top_k, 1);
    assert!(layer.set_selection_bias(&[0.0; 4]).unwrap_err().to_string().contains("selection_bias"));
    let spec = MoeSpec { selection_bias: true, ..MoeSpec::new(8, 4, 1, 8).unwrap() };
    let mut layer = MoeConfig::of(spec).init(&device);
    assert!(layer.set_selection_bias(&[0.0; 3]).is_err() && layer.set_selection_bias(&[f32::NAN; 4]).is_err());
    layer.set_selection_bias(&[0.0, 9.0, 0.0, 0.0]).unwrap();
    let (_, routed) = layer.route(Tensor::<2>::zeros([2, 8], &device), &mut LayerState::default()).unwrap();
    assert_eq!(routed.assignment.load(), [0, 2, 0, 0]);
}

#[test]
#[should_panic(expected = "Moe: hidden state: expected [.., 8], got [2, 7]")]
fn forward_panics_as_burns_modules_do() {
    MoeConfig::new(8, 8, 4, 1).init(&Device::flex()).forward(Tensor::<2>::zeros([2, 7], &Device::flex()));
}

#[test]
fn scores_without_a_gradient_are_refused_under_autodiff_alone() {
    let spec = MoeSpec::new(8, 4, 2, 8).unwrap();
    let function = ScoreFunction::SparseMixer { jitter: 0.01 };
    let spec = MoeSpec { scoring: Scoring { function, ..spec.scoring }, ..spec };
    let layer = layer(spec, 3, DType::F32);
    let hidden: Tensor<2> = Numbers(3).tensor([5, 8], &Device::flex());
    layer.forward(hidden.clone());
    let error = layer.train().route(hidden.autodiff(), &mut LayerState::default()).unwrap_err();
    assert!(matches!(error, Error::Parameter { name: "score function under autodiff", .. }), "{error}");
}

#[test]
fn routers_of_ones_own_are_taken() {
    let layer = layer(specs()[0].clone(), 1, DType::F32).with_router(Arc::new(PhaseRouter::default()));
    let layer = layer.with_capacity(Some(CapacityRule::per_expert(1.0))).with_index(3);
    let (_, routed) =
        layer.route(Numbers(2).tensor::<2>([60, 24], &Device::flex()), &mut LayerState::default()).unwrap();
    assert_eq!(routed.assignment.load(), [20; 6]);
}

/// Parts that are trained beside parts that are not: gradients reach what wants them, whatever else could run on the engine.
#[test]
fn parts_may_be_trained_alone() {
    let device = Device::flex();
    let plain = layer(specs()[3].clone(), 4, DType::F32);
    let hidden: Tensor<2> = Numbers(5).tensor([9, 24], &device);
    let expected = numbers(plain.forward(hidden.clone()));
    // Experts alone, the shared one alone, the gate alone.
    let trained = plain.clone().train();
    let [mut experts, mut shared, mut gate] = [plain.clone(), plain.clone(), plain];
    experts.experts = trained.experts.clone();
    shared.shared_expert = trained.shared_expert.clone();
    gate.gate = trained.gate.clone();
    for (layer, weight) in [
        (&experts, experts.experts[0].up_proj.weight.val()),
        (&shared, shared.shared_expert.as_ref().unwrap().up_proj.weight.val()),
        (&gate, gate.gate.weight.val()),
    ] {
        let output = layer.forward(hidden.clone());
        assert!(difference(&numbers(output.clone()), &expected) <= 1e-5);
        let gradients = output.square().sum().backward();
        assert!(numbers(weight.grad(&gradients).unwrap()).iter().any(|&value| value != 0.0));
    }
}
