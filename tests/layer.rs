//! The MoE layer through its public face: gradients, equalities with simpler layers, shapes and dtypes, padding, training
//! helpers, and input that is wrong.
#![cfg(feature = "model")]

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use phase_moe::layer::{LossFreeBias, load_balancing_loss, router_z_loss};
use phase_moe::{
    Assignment, CacheRouter, Capacity, CapacityRule, DropRule, Error, Expert, ExpertId, ExpertSet, Gate, LayerState,
    Logits, MoeLayer, MoeSpec, Result, RouteContext, RouteRequest, RouteState, Routed, Router, RouterKind, Scoring,
    Scratch, TopK,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CPU: Device = Device::Cpu;

/// Sum of three uniform numbers: close to normal, deviation 1.
fn random(rng: &mut ChaCha8Rng, shape: &[usize], deviation: f32) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> =
        (0..count).map(|_| (0..3).map(|_| rng.random_range(-1f32..1.0)).sum::<f32>() * deviation).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, absolute for small values and relative for large ones.
fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max)
}

/// The tensors of a layer and its input, from which layers are built anew: as constants or under `Var`s.
#[derive(Clone)]
struct Parts {
    spec: MoeSpec,
    hidden: Tensor,
    gate: Tensor,
    experts: Vec<[Tensor; 3]>,
    bias: Option<Vec<f32>>,
    router: Arc<dyn Router>,
    capacity: Option<CapacityRule>,
}

impl Parts {
    /// A layer of `experts` and a batch of `tokens` with logits that lie well apart.
    fn new(seed: u64, tokens: usize, spec: MoeSpec) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (wide, narrow) = ([spec.expert_width, spec.hidden], [spec.hidden, spec.expert_width]);
        let deviation = |inputs: usize| (inputs as f32).powf(-0.5);
        Self {
            hidden: random(&mut rng, &[tokens, spec.hidden], 1.0),
            gate: random(&mut rng, &[spec.experts, spec.hidden], 1.0),
            experts: (0..spec.experts)
                .map(|_| {
                    [(wide, spec.hidden), (wide, spec.hidden), (narrow, spec.expert_width)]
                        .map(|(shape, inputs)| random(&mut rng, &shape, deviation(inputs)))
                })
                .collect(),
            bias: None,
            router: Arc::new(TopK::default()),
            capacity: None,
            spec,
        }
    }

    fn layer(&self) -> MoeLayer {
        let experts = self.experts.iter().map(|[gate, up, down]| Expert::new(gate.clone(), up.clone(), down.clone()));
        let mut layer =
            MoeLayer::new(self.spec.clone(), Gate::new(self.gate.clone()), experts.collect::<Vec<_>>(), None)
                .unwrap()
                .with_router(self.router.clone());
        layer.set_capacity(self.capacity.clone());
        if let Some(bias) = &self.bias {
            layer.set_selection_bias(bias).unwrap();
        }
        layer
    }

    fn forward(&self) -> (Tensor, Routed) {
        self.layer().route(&self.hidden, &mut LayerState::default()).unwrap()
    }

    /// The tensors that gradients are checked for: input, gate, and the projections of `expert`.
    fn checked(&mut self, expert: usize) -> [(&'static str, &mut Tensor); 5] {
        let [gate, up, down] = &mut self.experts[expert];
        [
            ("input", &mut self.hidden),
            ("gate weight", &mut self.gate),
            ("gate_proj", gate),
            ("up_proj", up),
            ("down_proj", down),
        ]
    }

    /// The expert with the highest load.
    fn busiest(&self) -> usize {
        let load = self.forward().1.assignment.load();
        (0..load.len()).max_by_key(|&expert| load[expert]).unwrap()
    }
}

/// A scalar of what a forward pass gives; in `f64` where it is measured, so that only the layer rounds.
type Loss = fn(&Parts, &Tensor, &Routed) -> Tensor;

/// The output against fixed weights: every element counts differently.
fn probe(_: &Parts, output: &Tensor, _: &Routed) -> Tensor {
    let weights: Vec<f32> = (0..output.elem_count()).map(|at| (at as f32 * 0.7).sin()).collect();
    let weights = Tensor::from_vec(weights, output.shape(), &CPU).unwrap().to_dtype(DType::F64).unwrap();
    (output.to_dtype(DType::F64).unwrap() * weights).unwrap().sum_all().unwrap()
}

/// Compares every gradient of `loss` with a central difference.
fn check_gradients(name: &str, parts: &Parts, loss: Loss, of_experts: bool) {
    const STEP: f32 = 4e-3;
    let expert = parts.busiest();
    let (_, routing) = parts.forward();
    let choice: Vec<i32> = routing.assignment.ids().collect();
    let measure = |parts: &Parts| {
        let (output, routing) = parts.forward();
        assert_eq!(routing.assignment.ids().collect::<Vec<_>>(), choice, "{name}: the step flips a choice");
        loss(parts, &output, &routing).to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap()
    };
    for at in 0..if of_experts { 5 } else { 2 } {
        let mut tracked = parts.clone();
        let (operand, tensor) = &mut tracked.checked(expert)[at];
        let variable = Var::from_tensor(tensor).unwrap();
        **tensor = variable.as_tensor().clone();
        let (operand, shape) = (*operand, tensor.dims().to_vec());
        let (output, routing) = tracked.forward();
        let gradients = loss(&tracked, &output, &routing).backward().unwrap();
        let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("{name}: no gradient of the {operand}"));

        let mut largest = 0f32;
        for (element, ours) in values(gradient).into_iter().enumerate() {
            let moved = |step: f32| {
                let mut moved = parts.clone();
                let tensor = &mut moved.checked(expert)[at].1;
                let mut changed = values(tensor);
                changed[element] += step;
                **tensor = Tensor::from_vec(changed, shape.as_slice(), &CPU).unwrap();
                measure(&moved)
            };
            let difference = ((moved(STEP) - moved(-STEP)) / (2.0 * f64::from(STEP))) as f32;
            let off = (ours - difference).abs() / (1.0 + difference.abs());
            assert!(off < 2e-3, "{name}: {operand} element {element}: gradient {ours}, difference {difference}");
            largest = largest.max(ours.abs());
        }
        assert!(largest > 1e-2, "{name}: gradient of the {operand} is nearly zero, {largest}");
    }
}

fn small(scoring: Scoring) -> MoeSpec {
    MoeSpec { scoring, ..MoeSpec::new(6, 4, 2, 5).unwrap() }
}

fn sigmoid_scaled() -> Scoring {
    Scoring { scale: 2.5, ..Scoring::sigmoid().normalized(true) }
}

/// Room for about half of the slots, the lowest scores dropped.
fn dropping(parts: Parts) -> Parts {
    let capacity = CapacityRule::per_expert(0.6).with_minimum_mean(0.0);
    Parts { router: Arc::new(TopK { drop: Some(DropRule::Score) }), capacity: Some(capacity), ..parts }
}

/// The layers whose gradients are checked; the seeds give choices that no step flips, and loads that are not balanced.
fn gradient_cases() -> [(&'static str, Parts); 5] {
    [
        ("softmax", Parts::new(1, 5, small(Scoring::softmax()))),
        ("softmax, normalised", Parts::new(2, 5, small(Scoring::softmax().normalized(true)))),
        (
            "sigmoid, normalised, scaled, biased",
            Parts { bias: Some(vec![0.5, -0.3, 0.0, 0.2]), ..Parts::new(3, 5, small(sigmoid_scaled())) },
        ),
        ("softmax, dropping", dropping(Parts::new(4, 6, small(Scoring::softmax())))),
        ("sigmoid, normalised, dropping", dropping(Parts::new(25, 6, small(sigmoid_scaled())))),
    ]
}

#[test]
fn gradients_of_the_output_match_finite_differences() {
    for (name, parts) in gradient_cases() {
        let kept = parts.forward().1.assignment.kept();
        assert_eq!(kept < parts.hidden.dims()[0] * 2, parts.capacity.is_some(), "{name}: kept {kept}");
        check_gradients(name, &parts, probe, true);
    }
}

#[test]
fn gradients_of_the_balancing_losses_match_finite_differences() {
    for (name, parts) in gradient_cases() {
        check_gradients(name, &parts, |_, _, routing| load_balancing_loss(routing).unwrap(), false);
        check_gradients(name, &parts, |_, _, routing| router_z_loss(routing).unwrap(), false);
    }
}

#[test]
fn tracked_and_untracked_forward_agree() {
    for (name, parts) in gradient_cases() {
        let mut tracked = parts.clone();
        for (_, tensor) in tracked.checked(0) {
            *tensor = Var::from_tensor(tensor).unwrap().as_tensor().clone();
        }
        let ((ours, routing), (theirs, _)) = (tracked.forward(), parts.forward());
        let off = worst(&ours, &theirs);
        assert!(routing.logits.track_op() && off < 1e-6, "{name}: off by {off}");
    }
}

/// The definition, token by token: the weighted sum of the FFNs of the kept slots.
fn naive(parts: &Parts, assignment: &Assignment) -> Tensor {
    let rows = (0..assignment.tokens()).map(|token| {
        let row = parts.hidden.narrow(0, token, 1).unwrap();
        assignment.slots(token).fold(row.zeros_like().unwrap(), |sum, (expert, weight)| {
            let output = dense(&row, &parts.experts[expert.index()]);
            (sum + (output * f64::from(weight)).unwrap()).unwrap()
        })
    });
    Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
}

/// A dense SwiGLU FFN.
fn dense(rows: &Tensor, [gate, up, down]: &[Tensor; 3]) -> Tensor {
    let gate = rows.matmul(&gate.t().unwrap()).unwrap().silu().unwrap();
    (gate * rows.matmul(&up.t().unwrap()).unwrap()).unwrap().matmul(&down.t().unwrap()).unwrap()
}

#[test]
fn the_output_is_the_weighted_sum_over_slots() {
    for (name, parts) in gradient_cases() {
        let (output, routing) = parts.forward();
        assert!(worst(&output, &naive(&parts, &routing.assignment)) < 1e-5, "{name}");
    }
    let parts = Parts::new(6, 97, MoeSpec { scoring: sigmoid_scaled(), ..MoeSpec::new(24, 12, 3, 20).unwrap() });
    let (output, routing) = parts.forward();
    assert!(worst(&output, &naive(&parts, &routing.assignment)) < 1e-4);
}

#[test]
fn one_expert_is_a_dense_ffn() {
    for scoring in [Scoring::softmax().normalized(true), Scoring::sigmoid().normalized(true)] {
        let parts = Parts::new(7, 11, MoeSpec { scoring, ..MoeSpec::new(16, 1, 1, 24).unwrap() });
        assert!(worst(&parts.forward().0, &dense(&parts.hidden, &parts.experts[0])) < 1e-5, "{scoring:?}");
    }
}

#[test]
fn an_expert_takes_any_rank() {
    let parts = Parts::new(22, 12, MoeSpec::new(8, 1, 1, 6).unwrap());
    let [gate, up, down] = parts.experts[0].clone();
    let (expert, expected) = (Expert::new(gate, up, down), dense(&parts.hidden, &parts.experts[0]));
    for shape in [&[12, 8][..], &[3, 4, 8], &[2, 3, 2, 8]] {
        let output = expert.forward(&parts.hidden.reshape(shape).unwrap()).unwrap();
        assert_eq!((output.dims(), values(&output)), (shape, values(&expected)));
    }
}

#[test]
fn dropless_equals_a_capacity_that_never_binds_bit_for_bit() {
    let dropless = Parts::new(8, 64, MoeSpec::new(16, 8, 2, 12).unwrap());
    for rule in [CapacityRule::per_expert(1e3), CapacityRule::per_device(1e3, 4)] {
        for name in ["top-k-arrival", "top-k-score"] {
            let router: Arc<dyn Router> = Arc::from(name.parse::<RouterKind>().unwrap().build(1));
            let limited = Parts { router, capacity: Some(rule.clone()), ..dropless.clone() };
            let ((ours, routing), (theirs, reference)) = (limited.forward(), dropless.forward());
            assert!(routing.capacity.limits().is_some(), "{name}: no limit applied");
            assert_eq!(routing.assignment, reference.assignment, "{name}");
            assert_eq!(values(&ours), values(&theirs), "{name}");
        }
    }
}

/// The same router without a short way for a token.
struct Long<R>(R);

impl<R: Router> Router for Long<R> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn respects_capacity(&self) -> bool {
        self.0.respects_capacity()
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        self.0.route_into(request, state, scratch, assignment)
    }
}

#[test]
fn a_token_alone_is_routed_as_if_it_were_a_batch() {
    fn check<R: Router + Clone + 'static>(router: R) {
        for scoring in [Scoring::softmax(), Scoring::softmax().normalized(true), Scoring::sigmoid()] {
            let parts = Parts::new(31, 40, MoeSpec { scoring, ..MoeSpec::new(16, 32, 4, 12).unwrap() });
            let short = Parts { router: Arc::new(router.clone()), ..parts.clone() }.layer();
            let long = Parts { router: Arc::new(Long(router.clone())), ..parts.clone() }.layer();
            let mut resident = ExpertSet::new(32).unwrap();
            (0..32).step_by(3).for_each(|id| {
                resident.insert(ExpertId::new(id, 32).unwrap());
            });
            let [mut ours, mut theirs] = [LayerState::default(), LayerState::default()];
            for at in 0..40 {
                let token = parts.hidden.narrow(0, at, 1).unwrap();
                let context = RouteContext { step: at as u64, resident: Some(&resident), ..RouteContext::default() };
                let (output, routed) = short.route_with(&token, context, &mut ours).unwrap();
                let (expected, reference) = long.route_with(&token, context, &mut theirs).unwrap();
                assert_eq!(values(&output), values(&expected), "{} {scoring:?} {at}", router.name());
                assert_eq!(routed.assignment, reference.assignment);
                assert_eq!(values(&routed.logits), values(&reference.logits));
                assert_eq!(ours.router, theirs.router);
            }
        }
    }
    check(TopK::default());
    check(CacheRouter::default());
    check(CacheRouter::default().with_target_hit_rate(0.8).unwrap());
}

#[test]
fn one_thread_and_many_give_the_same_bits() {
    let parts = dropping(Parts::new(9, 1024, MoeSpec::new(48, 64, 4, 32).unwrap()));
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| parts.forward())
    };
    let (output, routing) = on(1);
    for threads in [2, 5] {
        let (other, other_routing) = on(threads);
        assert_eq!(routing.assignment, other_routing.assignment, "{threads} threads");
        assert_eq!(values(&output), values(&other), "{threads} threads");
    }
}

#[test]
fn shape_and_dtype_are_those_of_the_input() {
    let parts = Parts::new(10, 24, MoeSpec::new(16, 4, 2, 12).unwrap());
    let reference = parts.forward().0;
    for (dtype, tolerance) in [(DType::F32, 0.0), (DType::F16, 4e-3), (DType::BF16, 2e-2)] {
        let cast = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
        let experts = parts.experts.iter().map(|projections| projections.each_ref().map(cast)).collect();
        let typed = Parts { hidden: cast(&parts.hidden), gate: cast(&parts.gate), experts, ..parts.clone() };
        let layer = typed.layer();
        for shape in [&[24, 16][..], &[2, 12, 16], &[2, 3, 4, 16]] {
            let output = layer.forward(&typed.hidden.reshape(shape).unwrap()).unwrap();
            assert_eq!((output.dims(), output.dtype()), (shape, dtype));
            let off = worst(&output.reshape((24, 16)).unwrap(), &reference);
            assert!(off <= tolerance, "{dtype:?} {shape:?}: off by {off}");
        }
    }
}

#[test]
fn a_hidden_state_of_any_layout_and_size_works() {
    let parts = Parts::new(11, 10, MoeSpec::new(8, 4, 2, 6).unwrap());
    let (layer, reference) = (parts.layer(), parts.forward().0);
    let transposed = parts.hidden.t().unwrap().contiguous().unwrap().t().unwrap();
    assert!(!transposed.is_contiguous());
    assert_eq!(values(&layer.forward(&transposed).unwrap()), values(&reference));
    let narrowed = Tensor::cat(&[&parts.hidden, &parts.hidden], 1).unwrap().narrow(1, 8, 8).unwrap();
    assert_eq!(values(&layer.forward(&narrowed).unwrap()), values(&reference));

    // One token, with and without a batch dimension: as one of many (the matrix product may round differently).
    let row = reference.narrow(0, 0, 1).unwrap();
    for shape in [&[8][..], &[1, 8], &[1, 1, 8]] {
        let output = layer.forward(&parts.hidden.narrow(0, 0, 1).unwrap().reshape(shape).unwrap()).unwrap();
        assert_eq!(output.dims(), shape);
        assert!(worst(&output.reshape((1, 8)).unwrap(), &row) < 1e-6);
    }
}

#[test]
fn zero_tokens_give_zero_tokens() {
    for (name, parts) in gradient_cases() {
        for shape in [&[0, 6][..], &[0, 3, 6], &[2, 0, 6]] {
            let empty = Tensor::zeros(shape, DType::F32, &CPU).unwrap();
            let empty = Parts { hidden: empty, ..parts.clone() };
            let (output, routing) = empty.forward();
            assert_eq!((output.dims(), output.dtype(), routing.assignment.kept()), (shape, DType::F32, 0), "{name}");
            for loss in [load_balancing_loss(&routing), router_z_loss(&routing)] {
                assert_eq!(loss.unwrap().to_scalar::<f32>().unwrap(), 0.0, "{name}");
            }
        }
    }
}

#[test]
fn padding_takes_no_room_and_gets_nothing() {
    let live = dropping(Parts::new(12, 12, MoeSpec::new(8, 4, 2, 6).unwrap()));
    // The same tokens with padding between them, and in front: 8 of 20.
    let padding: Vec<bool> = (0..20).map(|at| at < 4 || at % 4 == 3).collect();
    assert_eq!(padding.iter().filter(|&&pad| pad).count(), 8);
    let mut next = 0..;
    let sources: Vec<u32> = padding.iter().map(|&pad| if pad { 0 } else { next.next().unwrap() }).collect();
    let hidden = live.hidden.index_select(&Tensor::new(sources, &CPU).unwrap(), 0).unwrap();
    let context = RouteContext { padding: Some(&padding), ..RouteContext::default() };
    let (output, routing) = live.layer().route_with(&hidden, context, &mut LayerState::default()).unwrap();

    let (expected, reference) = live.forward();
    assert_eq!(routing.capacity, reference.capacity);
    assert_eq!(routing.assignment.load(), reference.assignment.load());
    let rows = output.to_vec2::<f32>().unwrap().into_iter().zip(&padding);
    let (padded, kept): (Vec<_>, Vec<_>) = rows.partition(|(_, pad)| **pad);
    assert!(padded.iter().all(|(row, _)| row.iter().all(|value| *value == 0.0)));
    let kept: Vec<f32> = kept.into_iter().flat_map(|(row, _)| row).collect();
    assert!(kept.iter().zip(values(&expected)).all(|(a, b)| (a - b).abs() < 1e-6));

    let losses = |routing: &Routed| {
        [load_balancing_loss(routing), router_z_loss(routing)].map(|loss| loss.unwrap().to_scalar::<f32>().unwrap())
    };
    for (ours, theirs) in losses(&routing).into_iter().zip(losses(&reference)) {
        assert!((ours - theirs).abs() < 1e-5, "loss {ours} with padding, {theirs} without");
    }
    let metrics = routing.metrics().unwrap();
    assert_eq!((metrics.demand, metrics.kept), (24, reference.assignment.kept() as u64));
}

#[test]
fn the_balancing_loss_is_one_when_balanced_and_sees_past_a_full_expert() {
    // Each token wants one expert of four, strongly; the identity as gate makes the hidden state the logits.
    let loss = |wanted: &[u32], dropping: bool| {
        let hidden = (Tensor::eye(4, DType::F32, &CPU).unwrap() * 30.0).unwrap();
        let parts = Parts {
            hidden: hidden.index_select(&Tensor::new(wanted, &CPU).unwrap(), 0).unwrap(),
            gate: Tensor::eye(4, DType::F32, &CPU).unwrap(),
            ..Parts::new(13, 1, MoeSpec::new(4, 4, 1, 3).unwrap())
        };
        let parts = if dropping { self::dropping(parts) } else { parts };
        load_balancing_loss(&parts.forward().1).unwrap().to_scalar::<f32>().unwrap()
    };
    assert!((loss(&[0, 1, 2, 3], false) - 1.0).abs() < 1e-5);
    assert!((loss(&[2, 2, 2, 2], false) - 4.0).abs() < 1e-5);
    let skewed = loss(&[0, 0, 0, 1], false);
    assert!((skewed - 2.5).abs() < 1e-5 && (loss(&[0, 0, 0, 1], true) - skewed).abs() < 1e-6);
}

#[test]
fn loss_free_bias_moves_against_the_load() {
    let mut bias = LossFreeBias::new(4, 0.25).unwrap();
    bias.update(&[0, 2, 6, 2]).unwrap();
    assert_eq!(bias.values(), [0.25, 0.25, -0.25, 0.25]);
    bias.update(&[3, 3, 3, 3]).unwrap();
    assert_eq!(bias.values(), [0.25, 0.25, -0.25, 0.25]);
    bias.update(&[0, 0, 0, 0]).unwrap();
    assert_eq!(bias.values(), [0.25, 0.25, -0.25, 0.25]);
    assert_eq!(bias.update(&[1; 3]).unwrap_err().to_string(), "expert load: expected 4 values, got 3 values");
    for rate in [0.0, -0.1, f32::NAN, f32::INFINITY] {
        let error = LossFreeBias::new(4, rate).unwrap_err().to_string();
        assert_eq!(error, format!("bias update rate is {rate}: expected a positive finite number"));
    }
}

#[test]
fn loss_free_bias_balances_skewed_logits() {
    // Four of sixteen experts are liked best by most tokens.
    let (tokens, experts, top_k) = (256, 16, 2);
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    let mut logits = values(&random(&mut rng, &[tokens, experts], 1.0));
    logits.chunks_exact_mut(experts).for_each(|row| row[..4].iter_mut().for_each(|logit| *logit += 1.5));
    let logits = Logits::new(&logits, tokens, experts).unwrap();
    let capacity = Capacity::unlimited(experts).unwrap();
    let mut bias = LossFreeBias::new(experts, 0.01).unwrap();
    let mut violations = Vec::new();
    for _ in 0..100 {
        let scores = Scoring::sigmoid().scores(&logits, Some(bias.values())).unwrap();
        let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
        let load = TopK::default().route(&request, &mut RouteState::default()).unwrap().load();
        violations.push(f64::from(*load.iter().max().unwrap()) / (tokens * top_k / experts) as f64 - 1.0);
        bias.update(&load).unwrap();
    }
    let (first, last) = (violations[0], violations[violations.len() - 1]);
    assert!(first > 1.5 && last < 0.25, "max violation {first} at first, {last} at last");
}

#[test]
fn a_few_steps_of_gradient_descent_learn() {
    let parts = Parts::new(15, 64, MoeSpec::new(8, 4, 2, 16).unwrap());
    // The target is what another layer of the same size makes of the same tokens.
    let teacher = Parts { hidden: parts.hidden.clone(), ..Parts::new(16, 1, parts.spec.clone()) };
    let target = teacher.forward().0;
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &CPU);
    let layer = MoeLayer::load(&parts.spec, vb).unwrap();
    assert_eq!(variables.all_vars().len(), 1 + 3 * 4);

    let step = || {
        let (output, routing) = layer.route(&parts.hidden, &mut LayerState::default()).unwrap();
        let error = (output - &target).unwrap().sqr().unwrap().mean_all().unwrap();
        let balance = load_balancing_loss(&routing).unwrap();
        let loss = (&error + (balance * 0.01).unwrap()).unwrap();
        let gradients = loss.backward().unwrap();
        for variable in variables.all_vars() {
            let gradient = gradients.get(&variable).expect("a gradient for every weight");
            variable.set(&(variable.as_tensor() - (gradient * 0.5).unwrap()).unwrap()).unwrap();
        }
        loss.to_scalar::<f32>().unwrap()
    };
    let losses: Vec<f32> = (0..60).map(|_| step()).collect();
    assert!(losses[59] < 0.6 * losses[0], "loss {} at first, {} at last", losses[0], losses[59]);
}

/// Tokens whose scores are all nothing have weights of nothing, with gradients that are numbers, under variables as without.
#[test]
fn scores_of_nothing_weigh_nothing() {
    let spec = MoeSpec { scoring: Scoring::sigmoid().normalized(true), ..MoeSpec::new(8, 4, 2, 16).unwrap() };
    let variables = VarMap::new();
    let layer = MoeLayer::load(&spec, VarBuilder::from_varmap(&variables, DType::F32, &CPU)).unwrap();
    let gate = variables.data().lock().unwrap()["gate.weight"].clone();
    gate.set(&Tensor::full(-100f32, (4, 8), &CPU).unwrap()).unwrap();
    let hidden = Tensor::ones((3, 8), DType::F32, &CPU).unwrap();
    let (output, routed) = layer.route(&hidden, &mut LayerState::default()).unwrap();
    assert_eq!((routed.assignment.kept(), values(&output)), (6, vec![0.0; 24]));
    let gradients = output.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(values(gradients.get(&gate).unwrap()).iter().all(|gradient| gradient.is_finite()));
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Err(error @ (Error::Shape { .. } | Error::NonFiniteLogit { .. } | Error::Parameter { .. })) => {
            error.to_string()
        }
        Err(error) => panic!("another error: {error:?}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn a_hidden_state_that_does_not_fit_is_named() {
    let layer = Parts::new(17, 3, MoeSpec::new(8, 4, 2, 6).unwrap()).layer();
    let error = |shape: &[usize], dtype| {
        message(layer.route(&Tensor::zeros(shape, dtype, &CPU).unwrap(), &mut LayerState::default()))
    };
    assert_eq!(error(&[3, 9], DType::F32), "hidden state: expected [.., 8], got [3, 9]");
    assert_eq!(error(&[8, 3], DType::F32), "hidden state: expected [.., 8], got [8, 3]");
    assert_eq!(error(&[3, 0], DType::F32), "hidden state: expected [.., 8], got [3, 0]");
    assert_eq!(error(&[9], DType::F32), "hidden state: expected [.., 8], got [9]");
    assert_eq!(error(&[], DType::F32), "hidden state: expected [.., 8], got []");
    for (dtype, name) in [(DType::BF16, "BF16"), (DType::F16, "F16"), (DType::F64, "F64"), (DType::U32, "U32")] {
        assert_eq!(error(&[3, 8], dtype), format!("hidden state: expected F32 like the gate weight, got {name}"));
    }
    // Through `Module`, the message is the same and the typed error can be had back.
    let error = layer.forward(&Tensor::zeros((3, 9), DType::F32, &CPU).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "hidden state: expected [.., 8], got [3, 9]");
    assert!(matches!(Error::from(error), Error::Shape { .. }));
}

#[test]
fn a_context_of_another_batch_is_named() {
    let parts = Parts::new(18, 3, MoeSpec::new(8, 4, 2, 6).unwrap());
    let error = |context| message(parts.layer().route_with(&parts.hidden, context, &mut LayerState::default()));
    let padding = RouteContext { padding: Some(&[false; 5]), ..RouteContext::default() };
    assert_eq!(error(padding), "padding: expected 3 tokens, got 5 values");
    let ids = RouteContext { token_ids: Some(&[1; 2]), ..RouteContext::default() };
    assert_eq!(error(ids), "token ids: expected 3 tokens, got 2 values");
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let parts = Parts::new(19, 3, MoeSpec::new(8, 4, 2, 6).unwrap());
    let error = |change: &dyn Fn(&mut Parts)| {
        let mut parts = parts.clone();
        change(&mut parts);
        let experts = parts.experts.iter().map(|[gate, up, down]| Expert::new(gate.clone(), up.clone(), down.clone()));
        message(MoeLayer::new(parts.spec.clone(), Gate::new(parts.gate.clone()), experts.collect::<Vec<_>>(), None))
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &CPU).unwrap();
    assert_eq!(error(&|p| p.gate = zeros(&[5, 8], DType::F32)), "gate weight: expected [4, 8], got [5, 8]");
    assert_eq!(error(&|p| p.gate = zeros(&[32], DType::F32)), "gate weight: expected [4, 8], got [32]");
    assert_eq!(
        error(&|p| p.experts[2][0] = zeros(&[8, 6], DType::F32)),
        "expert 2 gate_proj: expected [6, 8], got [8, 6]"
    );
    assert_eq!(
        error(&|p| p.experts[1][1] = zeros(&[6, 9], DType::F32)),
        "expert 1 up_proj: expected [6, 8], got [6, 9]"
    );
    assert_eq!(
        error(&|p| p.experts[3][2] = zeros(&[6, 8], DType::F32)),
        "expert 3 down_proj: expected [8, 6], got [6, 8]"
    );
    assert_eq!(
        error(&|p| p.experts[3][2] = zeros(&[8, 6], DType::BF16)),
        "expert 3 down_proj: expected F32 like the gate weight, got BF16"
    );
    assert_eq!(error(&|p| p.experts.truncate(3)), "experts: expected 4, got 3");
    assert_eq!(error(&|p| p.experts.push(p.experts[0].clone())), "experts: expected 4, got 5");
    assert_eq!(error(&|p| p.spec.hidden = 0), "hidden is 0: expected at least 1");

    let mut layer = parts.layer();
    assert_eq!(message(layer.set_selection_bias(&[0.0; 3])), "selection bias: expected 4 values, got 3 values");
    assert_eq!(
        message(layer.set_selection_bias(&[0.0, f32::NAN, 0.0, 0.0])),
        "selection bias is NaN: expected finite numbers"
    );
    assert_eq!(layer.set_top_k(5).unwrap_err().to_string(), "top_k 5 exceeds experts 4");
    assert_eq!(layer.set_top_k(0).unwrap_err().to_string(), "top_k is 0: expected at least 1");
    assert_eq!(layer.spec().top_k, 2);
}

#[test]
fn weights_or_tokens_that_are_no_numbers_are_found_at_the_gate() {
    let parts = Parts::new(20, 3, MoeSpec::new(8, 4, 2, 6).unwrap());
    let spoil = |tensor: &Tensor, at: usize, bad: f32| {
        let mut spoiled = values(tensor);
        spoiled[at] = bad;
        Tensor::from_vec(spoiled, tensor.shape(), &CPU).unwrap()
    };
    let policy = "expected a finite number or -inf (masked)";
    let gate = Parts { gate: spoil(&parts.gate, 2 * 8, f32::NAN), ..parts.clone() };
    assert_eq!(
        message(gate.layer().route(&parts.hidden, &mut LayerState::default())),
        format!("logit of token 0, expert 2 is NaN: {policy}")
    );
    let error = message(parts.layer().route(&spoil(&parts.hidden, 8, f32::NAN), &mut LayerState::default()));
    assert_eq!(error, format!("logit of token 1, expert 0 is NaN: {policy}"));
    // An infinite activation gives +inf to one expert and -inf to another; the first is an error, wherever it is.
    let error = parts.layer().route(&spoil(&parts.hidden, 16, f32::INFINITY), &mut LayerState::default()).unwrap_err();
    assert!(matches!(error, Error::NonFiniteLogit { token: 2, .. }), "{error}");
}

#[test]
fn a_capacity_that_cannot_be_is_named() {
    let blind = Parts::new(21, 64, MoeSpec::new(8, 4, 2, 6).unwrap());
    let limited = Parts { capacity: Some(CapacityRule::per_expert(1.0)), ..blind.clone() };
    let error = limited.layer().route(&blind.hidden, &mut LayerState::default()).unwrap_err();
    assert!(matches!(error, Error::CapacityIgnored { router: "top-k" }));
    assert_eq!(error.to_string(), "capacity: expected a router that keeps within it, got top-k");
    let parts = Parts { router: Arc::new(TopK { drop: Some(DropRule::Score) }), ..blind };
    let error = |rule| {
        message(
            Parts { capacity: Some(rule), ..parts.clone() }.layer().route(&parts.hidden, &mut LayerState::default()),
        )
    };
    for factor in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
        let expected = format!("capacity factor is {factor}: expected a positive finite number");
        assert_eq!(error(CapacityRule::per_expert(factor)), expected);
    }
    assert_eq!(error(CapacityRule::per_device(1.0, 5)), "devices is 5: expected 1 to experts 4");
}

#[test]
fn a_builder_without_a_tensor_names_it() {
    let tensors = HashMap::from([("gate.weight".to_string(), Tensor::zeros((4, 8), DType::F32, &CPU).unwrap())]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let error = MoeLayer::load(&MoeSpec::new(8, 4, 2, 6).unwrap(), vb).err().unwrap();
    assert!(matches!(error, Error::Candle(_)) && error.to_string().contains("experts.0.gate_proj.weight"), "{error}");
}
