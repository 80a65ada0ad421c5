//! The exact answers, written plainly, and the properties that must hold against them.

use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::routing::capacity::{Capacity, CapacityRule, Placement};
use crate::routing::logits::Logits;
use crate::routing::metrics::RouteMetrics;
use crate::routing::router::RouteContext;
use crate::routing::scores::{GroupLimit, GroupScore, Scores, Scoring};
use crate::routing::topk::TopK;

/// Min-cost flow by shortest paths, one unit at a time.
struct Flow {
    arcs: Vec<(usize, usize, i64, f64)>,
    nodes: usize,
}

impl Flow {
    fn arc(&mut self, from: usize, to: usize, room: i64, cost: f64) {
        self.arcs.extend([(from, to, room, cost), (to, from, 0, -cost)]);
    }

    /// Sends units from node 0 to node 1 while `go_on(cost of the next)`; returns units and cost.
    fn send(&mut self, go_on: impl Fn(f64) -> bool) -> (u64, f64) {
        let (mut units, mut total) = (0, 0.0);
        loop {
            let mut cost = vec![f64::INFINITY; self.nodes];
            let mut by = vec![usize::MAX; self.nodes];
            cost[0] = 0.0;
            let mut changed = true;
            while changed {
                changed = false;
                for (at, &(from, to, room, price)) in self.arcs.iter().enumerate() {
                    if room > 0 && cost[from] + price < cost[to] - 1e-12 {
                        (cost[to], by[to], changed) = (cost[from] + price, at, true);
                    }
                }
            }
            if cost[1] == f64::INFINITY || !go_on(cost[1]) {
                return (units, total);
            }
            (units, total) = (units + 1, total + cost[1]);
            let mut node = 1;
            while node != 0 {
                let at = by[node];
                self.arcs[at].2 -= 1;
                self.arcs[at ^ 1].2 += 1;
                node = self.arcs[at].0;
            }
        }
    }
}

/// What is best possible: most slots; most served tokens at that; most gate mass of any assignment within the limits.
fn exact(request: &RouteRequest<'_>) -> (u64, u64, f64) {
    let (scores, capacity) = (request.scores(), request.capacity());
    let limits = capacity.limits().unwrap();
    let (tokens, experts) = (scores.tokens(), scores.experts());
    let build = |first: f64, gate: f64| {
        let mut flow = Flow { arcs: Vec::new(), nodes: 2 + tokens + experts + limits.len() };
        for token in (0..tokens).filter(|&token| !request.is_padding(token)) {
            flow.arc(0, 2 + token, 1, first);
            flow.arc(0, 2 + token, request.top_k() as i64 - 1, 0.0);
            for expert in (0..experts).filter(|&expert| scores.is_allowed(token, expert)) {
                flow.arc(2 + token, 2 + tokens + expert, 1, -gate * f64::from(scores.gate(token)[expert]));
            }
        }
        for expert in 0..experts {
            flow.arc(2 + tokens + expert, 2 + tokens + experts + capacity.pool_of(expert as u16), 1 << 40, 0.0);
        }
        for (pool, &limit) in limits.iter().enumerate() {
            flow.arc(2 + tokens + experts + pool, 1, i64::from(limit), 0.0);
        }
        flow
    };
    let (slots, served) = build(-1.0, 0.0).send(|_| true);
    let (_, mass) = build(0.0, 1.0).send(|cost| cost < 0.0);
    (slots, (-served).round() as u64, -mass)
}

/// Routes and checks everything that holds for any request; returns the assignment.
fn route(request: &RouteRequest<'_>, state: &mut RouteState) -> Assignment {
    let assignment = PhaseRouter::default().route(request, state).unwrap();
    let (scores, capacity) = (request.scores(), request.capacity());
    if let Some(limits) = capacity.limits() {
        let mut load = vec![0; limits.len()];
        assignment.load().iter().zip(0..).for_each(|(slots, expert)| load[capacity.pool_of(expert)] += slots);
        assert!(load.iter().zip(limits).all(|(load, limit)| load <= limit), "{load:?} {limits:?}");
        assert_eq!(state.prices().len(), limits.len());
        assert!(state.prices().iter().all(|price| price.is_finite() && *price >= 0.0));
        let bound = gate_mass_bound(request, state.prices()).unwrap();
        assert!(RouteMetrics::new(request, &assignment).gate_mass <= bound * (1.0 + 1e-12) + 1e-12);
    }
    for token in 0..scores.tokens() {
        let held: Vec<usize> = assignment.slots(token).map(|(expert, _)| expert.index()).collect();
        assert!(!request.is_padding(token) || held.is_empty());
        assert!(held.iter().all(|&expert| scores.is_allowed(token, expert)));
        let selection = scores.selection(token);
        let ordered = |pair: &[usize]| {
            selection[pair[0]] > selection[pair[1]] || (selection[pair[0]] == selection[pair[1]] && pair[0] < pair[1])
        };
        assert!(held.windows(2).all(ordered), "token {token}: {held:?} {selection:?}");
        assert!(assignment.slots(token).all(|(_, weight)| weight.is_finite()));
    }
    let mass = RouteMetrics::new(request, &assignment).gate_mass;
    assert!(mass <= assignment.gate_mass_bound().unwrap() * (1.0 + 1e-12) + 1e-12);
    assignment
}

/// The same, against the exact answers.
fn check(request: &RouteRequest<'_>, state: &mut RouteState) -> Assignment {
    let assignment = route(request, state);
    let (slots, served, mass) = exact(request);
    let metrics = RouteMetrics::new(request, &assignment);
    let bound = assignment.gate_mass_bound().unwrap();
    assert_eq!(metrics.kept, slots, "slots");
    assert_eq!(request.live_tokens() as u64 - metrics.tokens_without_expert, served, "served tokens");
    assert!(metrics.gate_mass <= mass + 1e-5, "{} above the optimum {mass}", metrics.gate_mass);
    assert!(mass <= bound + 1e-6, "optimum {mass} above the bound {bound}");
    if !request.scores().has_masks() {
        assert_eq!(slots, request.capacity().feasible_slots(request.live_tokens(), request.top_k()));
    }
    assignment
}

pub(super) fn scores_of(values: &[f32], experts: usize, scoring: Scoring, bias: Option<&[f32]>) -> Scores {
    scoring.scores(&Logits::new(values, values.len() / experts, experts).unwrap(), bias).unwrap()
}

/// Logits with popular experts (`seed` says which): what a trained gate looks like on one topic, batch after batch.
pub(super) fn skewed(tokens: usize, experts: usize, seed: u64, batch: u64) -> Scores {
    let normal = |rng: &mut ChaCha8Rng| -> f32 { (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0 };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let popularity: Vec<f32> = (0..experts).map(|_| normal(&mut rng)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 1000 * (batch + 1));
    let values: Vec<f32> = (0..tokens * experts).map(|at| normal(&mut rng) + popularity[at % experts]).collect();
    scores_of(&values, experts, Scoring::softmax().normalized(true), None)
}

#[derive(Clone, Debug)]
struct Case {
    experts: usize,
    top_k: usize,
    values: Vec<f32>,
    device_of: Option<Vec<u16>>,
    limits: Vec<u32>,
    padding: Vec<bool>,
    bias: Option<Vec<f32>>,
    prices: Vec<f32>,
}

impl Case {
    fn with<T>(&self, run: impl FnOnce(&RouteRequest<'_>) -> T) -> T {
        let scores = scores_of(&self.values, self.experts, Scoring::softmax().normalized(true), self.bias.as_deref());
        let capacity = match &self.device_of {
            Some(device_of) => {
                let placement = Placement::new(device_of.clone(), self.limits.len()).unwrap();
                Capacity::per_device(placement, self.limits.clone()).unwrap()
            }
            None => Capacity::per_expert(self.limits.clone()).unwrap(),
        };
        let context = RouteContext { padding: Some(&self.padding), ..RouteContext::default() };
        run(&RouteRequest::new(&scores, self.top_k, &capacity, context).unwrap())
    }
}

fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -3.0f32..3.0,
        2 => prop::sample::select(vec![0.0f32, -0.0, 1.0, 2.0]),
        2 => Just(f32::NEG_INFINITY),
        1 => prop::sample::select(vec![f32::MAX, f32::MIN, 1e-40]),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (1usize..8, 0usize..12, any::<bool>(), any::<bool>(), 1usize..4, any::<bool>()).prop_flat_map(
        |(experts, tokens, per_device, masked, devices, biased)| {
            let pools = if per_device { devices } else { experts };
            let value = if masked { logit().boxed() } else { (-3.0f32..3.0).boxed() };
            let price = prop_oneof![0.0f32..2.0, prop::sample::select(vec![f32::NAN, -1.0, f32::MAX, f32::INFINITY])];
            (
                1..=experts,
                prop::collection::vec(value, tokens * experts),
                prop::collection::vec(0..devices as u16, experts),
                prop::collection::vec(prop_oneof![3 => 0u32..8, 1 => Just(0), 1 => Just(1000)], pools),
                prop::collection::vec(prop::bool::weighted(0.15), tokens),
                prop::collection::vec(-1.0f32..1.0, experts),
                prop::collection::vec(price, 0..=pools),
            )
                .prop_map(move |(top_k, values, device_of, limits, padding, bias, prices)| Case {
                    experts,
                    top_k,
                    values,
                    device_of: per_device.then_some(device_of),
                    limits,
                    padding,
                    bias: biased.then_some(bias),
                    prices,
                })
        },
    )
}

/// The state of a layer whose last batch ended with these prices.
fn with_prices(prices: &[f32]) -> RouteState {
    let mut state = RouteState::default();
    state.prices.extend_from_slice(prices);
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn slots_served_tokens_and_bound_are_exact(case in case()) {
        case.with(|request| check(request, &mut with_prices(&case.prices)));
    }

    #[test]
    fn the_place_in_the_batch_does_not_matter(case in case(), seed in 0u64..1000) {
        let tokens = case.padding.len();
        let mut places: Vec<usize> = (0..tokens).collect();
        places.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let row = |place: &usize| case.values[place * case.experts..(place + 1) * case.experts].to_vec();
        let moved = Case {
            values: places.iter().flat_map(row).collect(),
            padding: places.iter().map(|&place| case.padding[place]).collect(),
            ..case.clone()
        };
        let (mut first, mut second) = (RouteState::default(), RouteState::default());
        let here = case.with(|request| route(request, &mut first));
        let there = moved.with(|request| route(request, &mut second));
        prop_assert_eq!(first, second);
        prop_assert_eq!(here.gate_mass_bound(), there.gate_mass_bound());
        // Rows with the same scores may swap: compare what each distinct row of scores got, as a set.
        let got = |assignment: &Assignment, case: &Case| {
            case.with(|request| {
                let mut all: Vec<(bool, Vec<u32>, Vec<usize>)> = (0..tokens)
                    .map(|token| (
                        request.is_padding(token),
                        request.scores().selection(token).iter().map(|score| score.to_bits()).collect(),
                        assignment.slots(token).map(|(expert, _)| expert.index()).collect(),
                    ))
                    .collect();
                all.sort();
                all
            })
        };
        prop_assert_eq!(got(&here, &case), got(&there, &moved));
    }

    #[test]
    fn where_everything_fits_it_is_top_k_to_the_bit(case in case()) {
        case.with(|request| {
            let gate = TopK::default().route(request, &mut RouteState::default()).unwrap();
            let unlimited = Capacity::unlimited(case.experts).unwrap();
            let free = RouteRequest::new(request.scores(), case.top_k, &unlimited, request.context()).unwrap();
            let bits = |assignment: &Assignment| -> Vec<u32> { assignment.weights().iter().map(|w| w.to_bits()).collect() };
            let load = gate.load();
            let just = Capacity::per_expert(load).unwrap();
            let just = RouteRequest::new(request.scores(), case.top_k, &just, request.context()).unwrap();
            for request in [free, just] {
                let mut state = with_prices(&case.prices);
                let ours = PhaseRouter::default().route(&request, &mut state).unwrap();
                assert_eq!((ours.raw(), bits(&ours)), (gate.raw(), bits(&gate)));
                if case.bias.is_none() {
                    let (mass, bound) = (RouteMetrics::new(&request, &ours).gate_mass, ours.gate_mass_bound().unwrap());
                    assert!((mass - bound).abs() < 1e-9 * (1.0 + mass), "{mass} {bound}");
                }
            }
        });
    }
}

#[test]
fn crafted_batches_keep_all_that_can_be_kept() {
    let batches: [(&str, Vec<f32>, usize); 4] = [
        ("identical rows", [2.0, 1.0, 0.5, 0.0, -1.0, -2.0].repeat(40), 6),
        ("all equal", vec![0.0; 240], 6),
        ("one hot", (0..240).map(|at| if at % 6 == 0 { f32::MAX } else { f32::MIN }).collect(), 6),
        ("all want the same two", (0..240).map(|at| if at % 6 < 2 { 9.0 } else { (at as f32).sin() }).collect(), 6),
    ];
    for (name, values, experts) in &batches {
        for scoring in [Scoring::softmax(), Scoring::sigmoid()] {
            let scores = scores_of(values, *experts, scoring, None);
            for top_k in [1, 2, 5, 6] {
                for limits in [vec![0; 6], vec![7; 6], vec![14; 6], vec![40; 6], vec![40, 0, 3, 100, 0, 1]] {
                    for capacity in [
                        Capacity::per_expert(limits.clone()).unwrap(),
                        Capacity::per_device(Placement::new(vec![2, 0, 2, 2, 5, 0], 6).unwrap(), limits.clone())
                            .unwrap(),
                    ] {
                        let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
                        let assignment = check(&request, &mut RouteState::default());
                        assert!(assignment.kept() > 0 || capacity.total() == Some(0), "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn group_limits_and_biases_stay_inside_the_allowed_experts() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let values: Vec<f32> = (0..200 * 16).map(|_| rng.random_range(-2.0..2.0)).collect();
    let bias: Vec<f32> = (0..16).map(|_| rng.random_range(-0.3..0.3)).collect();
    let groups = Some(GroupLimit { groups: 4, top_groups: 2, score: GroupScore::TopTwo });
    let scores = scores_of(&values, 16, Scoring { groups, ..Scoring::sigmoid().normalized(true) }, Some(&bias));
    for factor in [0.5, 1.0, 1.25] {
        let capacity = CapacityRule::per_expert(factor).capacity(200, 16, 4).unwrap();
        let request = RouteRequest::new(&scores, 4, &capacity, RouteContext::default()).unwrap();
        check(&request, &mut RouteState::default());
    }
}

#[test]
fn quality_on_skewed_logits() {
    for seed in 0..3 {
        let scores = skewed(1024, 64, seed, 0);
        let rules = [
            CapacityRule::per_expert(1.0),
            CapacityRule::per_expert(1.25),
            CapacityRule::per_device(1.0, 4),
            CapacityRule::per_device(1.25, 4),
            CapacityRule::per_device(1.0, 8),
            CapacityRule::per_device(1.25, 8),
        ];
        for rule in rules {
            let capacity = rule.capacity(1024, 64, 8).unwrap();
            let request = RouteRequest::new(&scores, 8, &capacity, RouteContext::default()).unwrap();
            let assignment = route(&request, &mut RouteState::default());
            let metrics = RouteMetrics::new(&request, &assignment);
            let share = metrics.gate_mass / assignment.gate_mass_bound().unwrap();
            eprintln!("seed {seed} MaxVio {:.1}: {share:.6} {rule:?}", metrics.demand_max_violation);
            assert_eq!(metrics.survival(), 1.0);
            assert!(share >= 0.9995, "seed {seed}: {share} {rule:?}");
        }
    }
}

#[test]
fn the_first_and_the_last_quarter_lose_alike() {
    let (tokens, scores) = (1024, skewed(1024, 32, 9, 0));
    let capacity = CapacityRule::per_expert(0.5).capacity(tokens, 32, 4).unwrap();
    let request = RouteRequest::new(&scores, 4, &capacity, RouteContext::default()).unwrap();
    let assignment = route(&request, &mut RouteState::default());
    assert_eq!(assignment.kept() as u64, capacity.total().unwrap());
    let quarter =
        |at: usize| -> usize { (at * 256..(at + 1) * 256).map(|token| assignment.slots(token).count()).sum() };
    for at in 0..4 {
        assert!(quarter(at).abs_diff(512) < 40, "quarter {at} keeps {}", quarter(at));
    }
}

#[test]
fn less_source_mass_loses_between_equal_losses() {
    // All three want expert 0 for 0.5 (sigmoid of 0) and have nothing else; the second also has 0.5 elsewhere, out of
    // reach, and so the least share on its choice.
    let low = -40.0;
    let values = [0.0, low, low, 0.0, low, 0.0, 0.0, low, low];
    let scores = scores_of(&values, 3, Scoring::sigmoid(), None);
    let capacity = Capacity::per_expert(vec![2, 0, 0]).unwrap();
    let request = RouteRequest::new(&scores, 1, &capacity, RouteContext::default()).unwrap();
    let assignment = check(&request, &mut RouteState::default());
    assert_eq!(assignment.ids().collect::<Vec<_>>(), [0, -1, 0]);
}

#[test]
fn a_large_batch_in_another_order_gets_the_same() {
    let (tokens, experts) = (2048, 32);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let rows: Vec<Vec<f32>> = (0..tokens)
        .map(|_| (0..experts).map(|expert| rng.random_range(-2.0..2.0) + (expert as f32).sin()).collect())
        .collect();
    let mut places: Vec<usize> = (0..tokens).collect();
    places.shuffle(&mut rng);
    let run = |rows: &[Vec<f32>], factor: f64| {
        let scores = scores_of(&rows.concat(), experts, Scoring::softmax(), None);
        let capacity = CapacityRule::per_expert(factor).capacity(tokens, experts, 4).unwrap();
        let request = RouteRequest::new(&scores, 4, &capacity, RouteContext::default()).unwrap();
        let mut state = RouteState::default();
        let ids: Vec<i32> = route(&request, &mut state).ids().collect();
        (ids, state)
    };
    let moved: Vec<Vec<f32>> = places.iter().map(|&place| rows[place].clone()).collect();
    for factor in [0.5, 1.0, 1.25] {
        let (here, there) = (run(&rows, factor), run(&moved, factor));
        assert_eq!(here.1, there.1);
        for (at, &place) in places.iter().enumerate() {
            assert_eq!(here.0[place * 4..place * 4 + 4], there.0[at * 4..at * 4 + 4], "token {place}");
        }
    }
}

#[test]
fn one_and_many_threads_agree() {
    let scores = skewed(2048, 64, 4, 0);
    let capacity = CapacityRule::per_expert(1.0).capacity(2048, 64, 8).unwrap();
    let request = RouteRequest::new(&scores, 8, &capacity, RouteContext::default()).unwrap();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut state = RouteState::default();
        let assignment = pool.install(|| PhaseRouter::default().route(&request, &mut state).unwrap());
        (assignment, state)
    };
    let one = on(1);
    assert!(one == on(2) && one == on(7));
}

#[test]
fn parameters_are_checked() {
    let message = |gap, sweeps| PhaseRouter::new(gap, sweeps).unwrap_err().to_string();
    assert_eq!(message(f64::NAN, 1), "gap is NaN: expected at least 0 and below 1");
    assert_eq!(message(-0.1, 1), "gap is -0.1: expected at least 0 and below 1");
    assert_eq!(message(1e-4, 0), "max_sweeps is 0: expected at least 1");
    let scores = scores_of(&[0.0; 4], 2, Scoring::softmax(), None);
    let capacity = Capacity::per_expert(vec![1, 1]).unwrap();
    let request = RouteRequest::new(&scores, 1, &capacity, RouteContext::default()).unwrap();
    let message = |prices: &[f32]| gate_mass_bound(&request, prices).unwrap_err().to_string();
    assert_eq!(message(&[0.0]), "prices: expected 2 pools or none, got 1 values");
    assert_eq!(message(&[0.0, -1.0]), "price is -1: expected a finite number, at least 0");
    let bound = gate_mass_bound(&request, &[0.25, 0.25]).unwrap();
    assert!((1.0..1.0001).contains(&bound), "{bound}");
}
