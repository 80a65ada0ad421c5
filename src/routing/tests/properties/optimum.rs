//! Against exact solvers: as many slots as can be, then as many tokens, then the most gate mass.

use std::cell::Cell;

use crate::{PhaseRouter, RouteMetrics, RouteRequest, RouteState, Router, RouterKind};
use proptest::prelude::*;

use super::case::{Bias, Case, cases, cold};
use super::flow::{best, best_by_trying, maximum_flow};
use super::invariants::{gate_mass, usable_slots};
use super::runner::property;

/// Slots there is room for when nothing is masked: each pool can take so many, and no expert one token twice.
fn room_without_masks(request: &RouteRequest<'_>) -> u64 {
    let (capacity, live) = (request.capacity(), request.live_tokens() as u64);
    let demand = live * request.top_k() as u64;
    let Some(limits) = capacity.limits() else { return demand };
    let pools = limits.iter().zip(capacity.pool_sizes());
    demand.min(pools.map(|(&limit, size)| u64::from(limit).min(live * size as u64)).sum())
}

#[test]
fn kept_slots_are_the_maximum_flow() {
    property("kept_slots_are_the_maximum_flow", cases(), |case| {
        let batch = case.batch();
        let request = batch.request();
        let assignment = cold(&PhaseRouter::default(), &request);
        let most = maximum_flow(&request);
        assert_eq!(assignment.kept() as u64, most);
        if !request.scores().has_masks() {
            assert_eq!(most, room_without_masks(&request));
            assert_eq!(most, batch.capacity.feasible_slots(request.live_tokens(), batch.top_k));
        }
        if most == usable_slots(&request) as u64 {
            assert!((0..case.tokens).all(|token| {
                let allowed = (0..case.experts).filter(|&expert| request.scores().is_allowed(token, expert)).count();
                request.is_padding(token) || assignment.slots(token).count() == allowed.min(batch.top_k)
            }));
        }
        // Augmenting paths never take a token's last slot: as many tokens are served as with one slot each.
        let single = RouteRequest::new(&batch.scores, 1, &batch.capacity, request.context()).unwrap();
        let without = RouteMetrics::new(&request, &assignment).tokens_without_expert;
        assert_eq!(request.live_tokens() as u64 - without, maximum_flow(&single), "served tokens");
    });
}

#[test]
fn quota_keeps_all_that_has_room() {
    property("quota_keeps_all_that_has_room", (cases(), any::<u64>()), |(case, seed)| {
        let batch = case.batch();
        let request = batch.request();
        let assignment = cold(&*RouterKind::PhaseQuota.build(seed), &request);
        let kept = assignment.kept() as u64;
        assert_eq!(kept, maximum_flow(&request));
        let single = RouteRequest::new(&batch.scores, 1, &batch.capacity, request.context()).unwrap();
        let without = RouteMetrics::new(&request, &assignment).tokens_without_expert;
        assert_eq!(request.live_tokens() as u64 - without, maximum_flow(&single), "served tokens");
        if !request.scores().has_masks() {
            assert_eq!(kept, room_without_masks(&request));
            let live = (0..case.tokens).filter(|&token| !request.is_padding(token));
            let counts: Vec<usize> = live.map(|token| assignment.slots(token).count()).collect();
            let (least, most) = (counts.iter().min(), counts.iter().max());
            assert!(most.is_none_or(|most| most - least.unwrap() <= 1), "{counts:?}");
        }
    });
}

#[test]
fn the_solver_finds_what_trying_everything_finds() {
    property("the_solver_finds_what_trying_everything_finds", cases(), |case| {
        let batch = case.at_most(4, 4).batch();
        let request = batch.request();
        let (solved, tried) = (best(&request), best_by_trying(&request));
        assert_eq!((solved.slots, solved.served), (tried.slots, tried.served));
        assert_eq!(solved.slots, maximum_flow(&request));
        assert!((solved.mass - tried.mass).abs() < 1e-5 && (solved.any_mass - tried.any_mass).abs() < 1e-5);
    });
}

#[test]
fn small_batches_are_as_good_as_can_be() {
    let name = "small_batches_are_as_good_as_can_be";
    let lost = Cell::new(Lost::default());
    property(name, cases(), |case| {
        let batch = case.at_most(12, 7).batch();
        let (request, mut state) = (batch.request(), RouteState::default());
        let assignment = PhaseRouter::default().route(&request, &mut state).unwrap();
        let (best, metrics) = (best(&request), RouteMetrics::new(&request, &assignment));
        let (mass, bound) = (gate_mass(&request, &assignment), assignment.gate_mass_bound().unwrap());
        assert_eq!(metrics.kept, best.slots, "slots");
        assert_eq!(request.live_tokens() as u64 - metrics.tokens_without_expert, best.served, "served tokens");
        assert!(mass <= best.mass + 1e-5, "{mass} above the optimum {}", best.mass);
        assert!(best.any_mass <= bound * (1.0 + 1e-9) + 1e-5, "optimum {} above the bound {bound}", best.any_mass);
        // With a bias the gate mass is not what is aimed at.
        if case.bias == Bias::None && best.mass > 0.0 {
            let mut sums = lost.get();
            sums.add(best.mass - mass, best.mass);
            lost.set(sums);
        }
    });
    let lost = lost.get();
    eprintln!("{name}: {lost:?}");
    assert!(lost.mass <= 1e-5 * lost.of && lost.worst <= PhaseRouter::default().gap, "{lost:?}");
}

/// Gate mass that `phase` kept less of than the best with as many slots and served tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Lost {
    mass: f64,
    of: f64,
    worst: f64,
    batches: u32,
}

impl Lost {
    fn add(&mut self, mass: f64, of: f64) {
        self.mass += mass;
        self.of += of;
        self.worst = self.worst.max(mass / of);
        self.batches += 1;
    }
}

/// The gap is a promise about every batch, the small ones too; without a gap what is kept is the optimum itself.
#[test]
fn small_batches_are_within_the_gap_of_the_optimum() {
    let lost = Cell::new(Lost::default());
    property("small_batches_are_within_the_gap_of_the_optimum", (cases(), any::<bool>()), |(case, exact)| {
        let batch = Case { bias: Bias::None, ..case }.at_most(12, 7).batch();
        let (request, gap) = (batch.request(), if exact { 0.0 } else { PhaseRouter::default().gap });
        let assignment = cold(&PhaseRouter::new(gap, 24).unwrap(), &request);
        let (best, mass) = (best(&request), gate_mass(&request, &assignment));
        let bound = assignment.gate_mass_bound().unwrap();
        assert!(mass >= (1.0 - gap) * best.mass - 1e-6, "{mass} of {}", best.mass);
        // The bound is that of any assignment, which may drop slots that the order keeps.
        assert!(bound <= best.any_mass * (1.0 + 2e-7) / (1.0 - gap) + 1e-6, "bound {bound} above {}", best.any_mass);
        if best.mass > 0.0 {
            let mut sums = lost.get();
            sums.add(best.mass - mass, best.mass);
            lost.set(sums);
        }
    });
    eprintln!("small batches: {:?}", lost.get());
}
