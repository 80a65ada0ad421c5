//! Gradients by Burn's autodiff against finite differences of the layer without it, which runs on the expert engine: two ways that share nothing.

mod common;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use common::{Numbers, filled, numbers};
use phase_moe::experts::Function;
use phase_moe::{Activation, Scoring, SharedExperts};
use phase_moe_burn::{
    CapacityRule, LayerState, LossFreeBias, Moe, MoeConfig, MoeSpec, RouterKind, load_balancing_loss, router_z_loss,
};

/// Adds to one number of one parameter, counted as they are visited.
struct Nudge {
    parameter: usize,
    element: usize,
    by: f32,
    seen: usize,
}

impl ModuleMapper for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.seen += 1;
        if self.seen != self.parameter + 1 {
            return param;
        }
        param.map(|old| {
            let (shape, device, mut values) = (old.dims(), old.device(), numbers(old));
            values[self.element] += self.by;
            Tensor::from_data(TensorData::new(values, shape), &device)
        })
    }
}

/// The gradient of every parameter, `None` where it has none, and whether it wants one.
struct Read<'a> {
    gradients: &'a Gradients,
    of: Vec<(Option<Vec<f32>>, bool, usize)>,
}

impl ModuleVisitor for Read<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let size = value.dims().iter().product();
        self.of.push((value.grad(self.gradients).map(numbers), value.is_require_grad(), size));
    }
}

const TOKENS: usize = 13;

/// A number that depends on all that a layer gives, both losses too.
fn objective(layer: &Moe, hidden: Tensor<2>, weigh: &Tensor<2>) -> (Tensor<1>, Vec<i32>) {
    let (output, routed) = layer.route(hidden, &mut LayerState::default()).unwrap();
    let weigh = if output.is_autodiff() { weigh.clone().autodiff() } else { weigh.clone() };
    let sum = (output * weigh).sum() + load_balancing_loss(&routed) * 0.5 + router_z_loss(&routed) * 0.25;
    (sum, routed.assignment.ids().collect())
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let plain = MoeSpec::new(5, 4, 2, 6).unwrap();
    let open = Activation { function: Function::Gelu, gated: false };
    let clamped = Activation { function: Function::ClampedSilu { alpha: 1.702, limit: 0.6 }, gated: true };
    let specs = [
        plain.clone(),
        MoeSpec {
            scoring: Scoring::softmax().normalized(true),
            shared: Some(SharedExperts { width: 3, gated: true }),
            ..plain.clone()
        },
        MoeSpec {
            scoring: Scoring::sigmoid().normalized(true),
            selection_bias: true,
            activation: open,
            ..plain.clone()
        },
        MoeSpec { expert_bias: true, gate_bias: true, activation: clamped, ..plain },
    ];
    let (mut compared, mut moved) = (0, 0);
    for (at, spec) in specs.into_iter().enumerate() {
        // Half of the layers under a limit that drops nothing and moves slots.
        let mut config = MoeConfig::of(spec);
        if at % 2 == 1 {
            let rule = CapacityRule::per_expert(1.0).with_minimum_mean(0.0);
            config = config.with_router(RouterKind::Phase).with_capacity(rule);
        }
        let device = Device::flex();
        let layer = filled(config.init(&device), 11 + at as u64, 0.8, DType::F32);
        let mut stream = Numbers(90 + at as u64);
        let (hidden, weigh): (Tensor<2>, Tensor<2>) =
            (stream.tensor([TOKENS, 5], &device), stream.tensor([TOKENS, 5], &device));
        let trained = layer.clone().train();
        let input = hidden.clone().autodiff().require_grad();
        let gradients = objective(&trained, input.clone(), &weigh).0.backward();
        let mut read = Read { gradients: &gradients, of: Vec::new() };
        trained.visit(&mut read);

        let mut check = |name: &str, expected: f32, differ: &dyn Fn(f32) -> (f32, Vec<i32>)| {
            const STEP: f32 = 4e-3;
            let ((more, ids), (less, other)) = (differ(STEP), differ(-STEP));
            if ids != other {
                moved += 1; // A token goes elsewhere: there is no derivative here.
                return;
            }
            let got = (more - less) / (2.0 * STEP);
            compared += 1;
            assert!((got - expected).abs() <= 3e-2 * (0.2 + expected.abs()), "{at}, {name}: {got} and {expected}");
        };
        for (parameter, (gradient, wanted, size)) in read.of.iter().enumerate() {
            let Some(gradient) = gradient else {
                assert!(!wanted || at % 2 == 0, "parameter {parameter} of layer {at} has no gradient");
                continue;
            };
            assert!(wanted, "parameter {parameter} of layer {at} is not trained");
            for element in (0..*size).step_by(1 + size / 5) {
                check(&format!("parameter {parameter} at {element}"), gradient[element], &|by| {
                    let nudged = layer.clone().map(&mut Nudge { parameter, element, by, seen: 0 });
                    let (sum, ids) = objective(&nudged, hidden.clone(), &weigh);
                    (sum.into_scalar::<f32>(), ids)
                });
            }
        }
        let gradient = numbers(input.grad(&gradients).unwrap());
        for element in (0..TOKENS * 5).step_by(7) {
            check(&format!("input at {element}"), gradient[element], &|by| {
                let mut values = numbers(hidden.clone());
                values[element] += by;
                let (sum, ids) = objective(&layer, common::tensor(values, [TOKENS, 5], &device), &weigh);
                (sum.into_scalar::<f32>(), ids)
            });
        }
    }
    assert!(compared > 250 && moved < compared / 4, "{compared} compared, {moved} where a token goes elsewhere");
}

/// The losses of Candle's layer on the same logits.
#[test]
fn losses_are_those_of_the_candle_layer() {
    use candle_core::{DType as Candle, Device as Cpu, Tensor as Other};
    use phase_moe::{Expert, Gate, MoeLayer};
    let spec = MoeSpec::new(5, 4, 2, 6).unwrap();
    for spec in [spec.clone(), MoeSpec { scoring: Scoring::sigmoid(), ..spec }] {
        let device = Device::flex();
        let layer = filled(MoeConfig::of(spec.clone()).init(&device), 4, 0.8, DType::F32);
        let hidden: Tensor<2> = Numbers(3).tensor([TOKENS, 5], &device);
        let padding: Vec<bool> = (0..TOKENS).map(|token| token > 9).collect();
        let context = phase_moe::RouteContext { padding: Some(&padding), ..Default::default() };
        let (_, routed) = layer.route_with(hidden.clone(), context, &mut LayerState::default()).unwrap();
        let ours = [load_balancing_loss(&routed), router_z_loss(&routed)].map(|loss| loss.into_scalar::<f32>());

        let other = |values: Vec<f32>, shape: &[usize]| Other::from_vec(values, shape, &Cpu::Cpu).unwrap();
        let zeros = |shape: &[usize]| Other::zeros(shape, Candle::F32, &Cpu::Cpu).unwrap();
        let expert = || Expert::new(zeros(&[6, 5]), zeros(&[6, 5]), zeros(&[5, 6]));
        let gate = Gate::new(other(numbers(layer.gate.weight.val()), &[4, 5]));
        let candle = MoeLayer::new(spec, gate, (0..4).map(|_| expert()).collect::<Vec<_>>(), None).unwrap();
        let (_, theirs) =
            candle.route_with(&other(numbers(hidden), &[TOKENS, 5]), context, &mut LayerState::default()).unwrap();
        let losses = [phase_moe::layer::load_balancing_loss(&theirs), phase_moe::layer::router_z_loss(&theirs)];
        for (ours, theirs) in ours.into_iter().zip(losses) {
            let theirs = theirs.unwrap().to_scalar::<f32>().unwrap();
            assert!((ours - theirs).abs() <= 1e-5 * theirs.abs(), "{ours} and {theirs}");
        }
    }
}

/// Loss-free balancing evens out loads that were not.
#[test]
fn the_loss_free_bias_balances() {
    let spec = MoeSpec { selection_bias: true, scoring: Scoring::sigmoid(), ..MoeSpec::new(8, 4, 1, 4).unwrap() };
    let mut layer = filled(MoeConfig::of(spec).init(&Device::flex()), 2, 0.5, DType::F32);
    let hidden: Tensor<2> = Numbers(1).tensor::<2>([64, 8], &Device::flex()) + 0.5;
    let mut bias = LossFreeBias::new(4, 0.02).unwrap();
    let mut largest = Vec::new();
    for _ in 0..60 {
        let (_, routed) = layer.route(hidden.clone(), &mut LayerState::default()).unwrap();
        let load = routed.assignment.load();
        largest.push(*load.iter().max().unwrap());
        bias.update(&load).unwrap();
        layer.set_selection_bias(bias.values()).unwrap();
    }
    assert!(largest[0] > 28 && *largest.last().unwrap() <= 20, "{largest:?}");
}
