//! What `phase` promises beyond a valid answer: nothing moves without need, order and names do not matter, any prices bound.

use crate::routing::gate_mass_bound;
use crate::{
    Assignment, Capacity, Logits, PhaseRouter, Placement, RouteMetrics, RouteRequest, RouteState, Router, RouterKind,
    TopK,
};
use proptest::prelude::*;
use proptest::sample::select;

use super::case::{Batch, Case, Gate, bits, cases, cold, noise, unit};
use super::check;
use super::flow::maximum_flow;
use super::invariants::{check_prices, gate_mass, pool_loads};
use super::runner::property;

/// The first `count` numbers in an order that `seed` decides.
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&at| noise(seed, [30, at as u64, 0]));
    order
}

#[test]
fn where_everything_fits_it_is_top_k_to_the_bit() {
    property("where_everything_fits_it_is_top_k_to_the_bit", (cases(), cases()), |(case, before)| {
        let batch = case.batch();
        let request = batch.request();
        let gate = cold(&TopK::default(), &request);
        let load: Vec<u32> = pool_loads(&request, &gate).into_iter().map(|load| load as u32).collect();
        let just = match batch.capacity.placement() {
            Some(placement) => Capacity::per_device(placement.clone(), load).unwrap(),
            None => Capacity::per_expert(load).unwrap(),
        };
        for capacity in [just, Capacity::unlimited(case.experts).unwrap()] {
            let request = RouteRequest::new(&batch.scores, batch.top_k, &capacity, request.context()).unwrap();
            let mut state = RouteState::default();
            PhaseRouter::default().route(&before.batch().request(), &mut state).unwrap();
            for mut state in [RouteState::default(), state] {
                let ours = PhaseRouter::default().route(&request, &mut state).unwrap();
                assert_eq!(bits(&ours), bits(&gate));
            }
        }
    });
}

/// The batch with `values` and `padding` in place of its own.
fn moved(case: &Case, batch: &Batch, values: Vec<f32>, padding: Option<Vec<bool>>, capacity: Capacity) -> Batch {
    let logits = Logits::new(&values, case.tokens, case.experts).unwrap();
    let scores = case.scoring().scores(&logits, case.bias().as_deref()).unwrap();
    Batch { values, scores, capacity, top_k: batch.top_k, padding, token_ids: batch.token_ids.clone() }
}

#[test]
fn the_place_in_the_batch_does_not_matter() {
    property("the_place_in_the_batch_does_not_matter", cases(), |case| {
        let here = case.batch();
        let places = shuffled(case.tokens, case.seed);
        let row = |&place: &usize| &here.values[place * case.experts..(place + 1) * case.experts];
        let padding = here.padding.as_ref().map(|padding| places.iter().map(|&place| padding[place]).collect());
        let values = places.iter().flat_map(row).copied().collect();
        let there = moved(&case, &here, values, padding, here.capacity.clone());
        // Rows with the same scores may swap, so what each distinct row got is compared as a set.
        let got = |batch: &Batch| {
            let (request, mut state) = (batch.request(), RouteState::default());
            let assignment = PhaseRouter::default().route(&request, &mut state).unwrap();
            let row = |token: usize| {
                let scores = request.scores().selection(token).iter().chain(request.scores().gate(token));
                let scores: Vec<u32> = scores.map(|score| score.to_bits()).collect();
                let slots: Vec<(usize, u32)> =
                    assignment.slots(token).map(|(expert, weight)| (expert.index(), weight.to_bits())).collect();
                (request.is_padding(token), scores, slots)
            };
            let mut rows: Vec<_> = (0..case.tokens).map(row).collect();
            rows.sort();
            (rows, state, assignment.gate_mass_bound().map(f64::to_bits))
        };
        let (here, there) = (got(&here), got(&there));
        assert_eq!(here.1, there.1, "prices");
        assert_eq!(here.2, there.2, "bounds");
        assert!(here.0 == there.0, "rows");
    });
}

#[test]
fn the_names_of_experts_do_not_matter() {
    let kinds = vec![
        RouterKind::TopK,
        RouterKind::TopKArrival,
        RouterKind::TopKRank,
        RouterKind::TopKScore,
        RouterKind::Phase,
        RouterKind::Phase,
    ];
    property("the_names_of_experts_do_not_matter", (cases(), select(kinds)), |(case, kind)| {
        // Sigmoid scores do not depend on the order of the experts, not even by rounding; groups are made of neighbours.
        let bias = super::case::Bias::None;
        let case = Case { gate: Gate::Skewed, sigmoid: true, groups: None, bias, ..case };
        let here = case.batch();
        let tied = |token: usize| {
            let mut row = here.scores.selection(token).to_vec();
            row.retain(|&score| score > f32::NEG_INFINITY);
            row.sort_by(f32::total_cmp);
            row.windows(2).any(|pair| pair[0] == pair[1])
        };
        if (0..case.tokens).any(tied) {
            return;
        }
        // Expert `names[e]` of the first batch is called e in the second.
        let names = shuffled(case.experts, case.seed);
        let row = |row: &[f32]| names.iter().map(|&name| row[name]).collect::<Vec<f32>>();
        let values = here.values.chunks_exact(case.experts).flat_map(row).collect();
        let renamed = |limits: &[u32]| names.iter().map(|&name| limits[name]).collect::<Vec<u32>>();
        let capacity = match (here.capacity.limits(), here.capacity.placement()) {
            (None, _) => here.capacity.clone(),
            (Some(limits), None) => Capacity::per_expert(renamed(limits)).unwrap(),
            (Some(limits), Some(placement)) => {
                let device_of = names.iter().map(|&name| placement.device_of()[name]).collect();
                Capacity::per_device(Placement::new(device_of, placement.devices()).unwrap(), limits.to_vec()).unwrap()
            }
        };
        let there = moved(&case, &here, values, here.padding.clone(), capacity);
        let (one, other) = (cold(&*kind.build(0), &here.request()), cold(&*kind.build(0), &there.request()));
        check(&there.request(), &other, &*kind.build(0));
        let own = |assignment: &Assignment| -> Vec<Vec<usize>> {
            let row = |token: usize| assignment.slots(token).map(|(expert, _)| expert.index()).collect();
            (0..case.tokens).map(row).collect()
        };
        let there_own: Vec<Vec<usize>> =
            own(&other).into_iter().map(|row| row.into_iter().map(|expert| names[expert]).collect()).collect();
        if kind != RouterKind::Phase {
            assert_eq!(own(&one), there_own);
            return;
        }
        // Prices are found by sums over pools and from a sample, so the last bits of prices differ; counts may not.
        let metrics = [(&here, &one), (&there, &other)].map(|(batch, got)| RouteMetrics::new(&batch.request(), got));
        assert_eq!(metrics[0].kept, metrics[1].kept);
        assert_eq!(metrics[0].tokens_without_expert, metrics[1].tokens_without_expert);
        let bounds = [&one, &other].map(|assignment| assignment.gate_mass_bound().unwrap());
        for (mass, bound) in [(metrics[0].gate_mass, bounds[1]), (metrics[1].gate_mass, bounds[0])] {
            assert!(mass <= bound * (1.0 + 1e-9) + 1e-9, "{mass} above {bound}");
        }
    });
}

/// Prices of all sizes, from none to the largest `f32`.
fn prices(seed: u64, pools: usize) -> Vec<f32> {
    let size = [0.0, 1e-42, 1e-3, 0.3, 1.0, 50.0, 1e30, f32::MAX][(noise(seed, [31, 0, 0]) % 8) as usize];
    (0..pools as u64).map(|pool| if pool % 3 == seed % 3 { 0.0 } else { size * unit(seed, [32, pool, 0]) }).collect()
}

#[test]
fn prices_of_any_kind_give_a_bound() {
    let limited = |kind: &RouterKind| {
        let router = kind.build(0);
        router.respects_capacity() && router.keeps_top_k()
    };
    let kinds = select(RouterKind::ALL.into_iter().filter(limited).collect::<Vec<_>>());
    property("prices_of_any_kind_give_a_bound", (cases(), kinds, any::<u64>()), |(case, kind, seed)| {
        let batch = case.batch();
        let request = batch.request();
        let mass = gate_mass(&request, &cold(&*kind.build(seed), &request));
        let pools = batch.capacity.limits().map_or(0, <[u32]>::len);
        for prices in [Vec::new(), vec![0.0; pools], prices(seed, pools)] {
            let bound = gate_mass_bound(&request, &prices).unwrap();
            assert!(bound.is_finite() && mass <= bound * (1.0 + 1e-9) + 1e-9, "{mass} above {bound}: {prices:?}");
        }
        assert!(gate_mass_bound(&request, &vec![0.0; pools + 1]).is_err());
        for bad in [f32::NAN, -1e-30, f32::INFINITY] {
            let mut prices = prices(seed, pools);
            if let Some(first) = prices.first_mut() {
                *first = bad;
                assert!(gate_mass_bound(&request, &prices).is_err());
            }
        }
    });
}

#[test]
fn stale_prices_break_nothing() {
    let strategy = (cases(), prop::collection::vec(cases(), 1..4), any::<bool>());
    property("stale_prices_break_nothing", strategy, |(case, before, same_pools)| {
        let case = case.at_most(100, 40);
        let mut state = RouteState::default();
        for other in before {
            // Prices of another batch of this layer, or of another layer altogether.
            let (experts, pools) =
                if same_pools { (case.experts, case.pools) } else { (other.experts.min(40), other.pools) };
            let other = Case { experts, pools, ..other.at_most(100, 130) };
            PhaseRouter::default().route(&other.batch().request(), &mut state).unwrap();
        }
        let batch = case.batch();
        let request = batch.request();
        let warm = PhaseRouter::default().route(&request, &mut state).unwrap();
        check(&request, &warm, &PhaseRouter::default());
        check_prices(&request, &state, gate_mass(&request, &warm));
        assert_eq!(warm.kept() as u64, maximum_flow(&request));
    });
}
