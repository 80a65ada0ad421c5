//! What every answer of every router must satisfy. The fuzz targets include this file: it knows only what is public.

use crate::routing::gate_mass_bound;
use crate::{Assignment, DispatchPlan, RouteMetrics, RouteRequest, RouteState, Router, check_assignment};

/// Room for rounding in sums of `f32` scores.
const RELATIVE: f64 = 1e-9;

/// Slots that all live tokens together can use at most: top_k each, fewer where masks leave fewer.
pub fn usable_slots(request: &RouteRequest<'_>) -> usize {
    let (scores, top_k) = (request.scores(), request.top_k());
    let allowed = |token: usize| (0..scores.experts()).filter(|&expert| scores.is_allowed(token, expert)).count();
    (0..scores.tokens()).filter(|&token| !request.is_padding(token)).map(|token| allowed(token).min(top_k)).sum()
}

/// Kept slots per expert or device.
pub fn pool_loads(request: &RouteRequest<'_>, assignment: &Assignment) -> Vec<u64> {
    let capacity = request.capacity();
    let mut pools = vec![0; capacity.limits().map_or(request.scores().experts(), <[u32]>::len)];
    for (expert, load) in assignment.load().into_iter().enumerate() {
        pools[capacity.pool_of(expert as u16)] += u64::from(load);
    }
    pools
}

/// Checks `assignment`, the answer of `router` to `request`: with the library's own check, which users of a router run too, and
/// for what that one has no time for.
pub fn check(request: &RouteRequest<'_>, assignment: &Assignment, router: &dyn Router) {
    let (scores, top_k) = (request.scores(), request.top_k());
    check_assignment(router, request, assignment).unwrap_or_else(|error| panic!("{error}"));
    let ids: Vec<i32> = assignment.ids().collect();
    let dropped = ids.iter().filter(|&&id| id == -1).count();
    let width = assignment.width();
    assert_eq!(assignment.kept() + dropped, scores.tokens() * width, "kept + dropped");
    // Only expert choice gives a token another number of experts than it asked for.
    let usual = width == top_k;
    assert!(!usual || assignment.kept() <= usable_slots(request), "more kept than can be used");

    assert_eq!(assignment.load().iter().map(|&load| load as usize).sum::<usize>(), assignment.kept());
    check_plan(assignment);

    let metrics = RouteMetrics::new(request, assignment);
    assert_eq!(metrics.demand, request.live_tokens() as u64 * top_k as u64);
    assert_eq!(metrics.kept, assignment.kept() as u64);
    let mass = gate_mass(request, assignment);
    assert!((metrics.gate_mass - mass).abs() <= 1e-6 * (1.0 + mass), "{} {mass}", metrics.gate_mass);
    assert!(!usual || metrics.survival() <= 1.0);
    if let Some(bound) = assignment.gate_mass_bound() {
        assert!(bound.is_finite() && mass <= bound * (1.0 + RELATIVE) + RELATIVE, "mass {mass} above bound {bound}");
    }
}

/// The plan is a permutation of the kept slots, sorted by expert and then by token, each with its own weight.
pub fn check_plan(assignment: &Assignment) {
    let (plan, width) = (DispatchPlan::from(assignment), assignment.width());
    let ids: Vec<i32> = assignment.ids().collect();
    let mut expected: Vec<usize> = (0..ids.len()).filter(|&slot| ids[slot] >= 0).collect();
    expected.sort_by_key(|&slot| (ids[slot], slot));
    assert_eq!(plan.slots().iter().map(|&slot| slot as usize).collect::<Vec<_>>(), expected);
    assert_eq!([plan.tokens().len(), plan.weights().len()], [expected.len(); 2]);
    for (at, &slot) in expected.iter().enumerate() {
        assert_eq!(plan.tokens()[at] as usize, slot / width);
        assert_eq!(plan.weights()[at].to_bits(), assignment.weights()[slot].to_bits());
    }
    let load: Vec<u32> = plan.offsets().windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!((plan.offsets()[0], load), (0, assignment.load()));
    let busy: Vec<(usize, usize)> = plan.busy_experts().map(|(expert, range)| (expert, range.len())).collect();
    let loaded = |(expert, &load): (usize, &u32)| (load > 0).then_some((expert, load as usize));
    assert_eq!(busy, assignment.load().iter().enumerate().filter_map(loaded).collect::<Vec<_>>());
}

/// Sum of the gate scores of the kept slots.
pub fn gate_mass(request: &RouteRequest<'_>, assignment: &Assignment) -> f64 {
    let held = |token: usize| {
        let gate = request.scores().gate(token);
        assignment.slots(token).map(|(expert, _)| f64::from(gate[expert.index()])).sum::<f64>()
    };
    (0..assignment.tokens()).map(held).sum()
}

/// Prices that a limited routing left: one per pool, usable as the next start, and a certificate by themselves.
pub fn check_prices(request: &RouteRequest<'_>, state: &RouteState, mass: f64) {
    let Some(limits) = request.capacity().limits() else { return };
    assert_eq!(state.prices().len(), limits.len());
    assert!(state.prices().iter().all(|price| price.is_finite() && *price >= 0.0), "{:?}", state.prices());
    let bound = gate_mass_bound(request, state.prices()).expect("prices were checked");
    assert!(mass <= bound * (1.0 + RELATIVE) + RELATIVE, "mass {mass} above bound {bound} of the prices left");
}
