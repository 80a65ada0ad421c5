//! The resident set against the policies' definitions.

use super::*;
use crate::routing::affinity::{Affinity, Decay};
use proptest::prelude::*;

fn set(ids: impl IntoIterator<Item = usize>) -> ExpertSet {
    let mut set = ExpertSet::new(8).unwrap();
    ids.into_iter().for_each(|id| assert!(set.insert(ExpertId::new(id, 8).unwrap())));
    set
}

fn run(policy: Policy, capacity: usize, steps: &[&[usize]]) -> (Vec<Step>, ExpertSet) {
    let mut cache = Residency::new(8, capacity, policy).unwrap();
    let steps = steps.iter().map(|ids| cache.advance(&set(ids.iter().copied())).unwrap()).collect();
    (steps, cache.resident().clone())
}

#[test]
fn the_policies_evict_whom_they_say() {
    let steps: &[&[usize]] = &[&[0], &[0], &[1], &[2]];
    assert_eq!(run(Policy::Lru, 2, steps).1, set([1, 2]));
    assert_eq!(run(Policy::Lfu, 2, steps).1, set([0, 2]));
    assert_eq!(run(Policy::Lfu, 2, &[&[0], &[1], &[2]]).1, set([1, 2]), "the older of two as rare ones goes");
}

#[test]
fn a_step_that_does_not_fit_is_streamed() {
    let (steps, resident) = run(Policy::Lru, 2, &[&[5], &[1, 2, 3, 5], &[1, 5]]);
    assert_eq!(steps[1], Step { hits: 1, misses: 3, evictions: 0 });
    assert_eq!(steps[2], Step { hits: 2, misses: 0, evictions: 0 });
    assert_eq!(resident, set([1, 5]));
    let (steps, resident) = run(Policy::Lfu, 0, &[&[5], &[5]]);
    assert_eq!((steps[1].misses, resident.len()), (1, 0));
}

#[test]
fn while_there_is_room_everybody_counts_as_resident() {
    let mut cache = Residency::shared(&[8, 8], 5, Policy::Lru).unwrap();
    cache.advance_in(0, &set([1, 2])).unwrap();
    cache.advance_in(1, &set([1, 7])).unwrap();
    assert_eq!(cache.counted_in(0), Some(&set(0..8)));
    assert_eq!(cache.resident_in(0), Some(&set([1, 2])));
    cache.advance_in(1, &set([3])).unwrap();
    assert_eq!((cache.counted_in(0), cache.counted_in(1)), (Some(&set([1, 2])), Some(&set([1, 3, 7]))));
    assert_eq!(cache.counted_in(2), None);
    let nothing = Residency::new(8, 0, Policy::Lru).unwrap();
    assert_eq!(nothing.counted_in(0), Some(&set([])), "no room is full");
}

#[test]
fn mistakes_are_named() {
    let message = Residency::new(8, 9, Policy::Lru).unwrap_err().to_string();
    assert_eq!(message, "cached experts is 9: expected 0 to experts 8");
    assert!(Residency::new(0, 0, Policy::Lru).is_err());
    let mut cache = Residency::new(8, 2, Policy::Lru).unwrap();
    let message = cache.advance(&ExpertSet::new(9).unwrap()).unwrap_err().to_string();
    assert_eq!(message, "used experts: expected a set of 8 experts, got one of 9");
    assert_eq!(
        "fifo".parse::<Policy>().unwrap_err().to_string(),
        "unknown policy `fifo`: expected one of lru, lfu, lfru, affinity"
    );
}

/// The policies by their definitions: a list of residents, scanned for the one that leaves.
struct Naive {
    policy: Policy,
    capacity: usize,
    resident: Vec<usize>,
    /// Experts in the privileged half, in order of use.
    privileged: Vec<usize>,
    last: [u64; 8],
    count: [usize; 8],
    affinity: Affinity,
    /// What stands for each expert's affinity.
    place: [i128; 8],
    step: u64,
}

impl Naive {
    fn new(policy: Policy, capacity: usize) -> Self {
        let (resident, privileged, last, count, place) = (vec![], vec![], [0; 8], [0; 8], [0; 8]);
        let affinity = Affinity::new(8, Decay::default()).unwrap();
        Self { policy, capacity, resident, privileged, last, count, affinity, place, step: 0 }
    }

    /// Who leaves, of the residents that the step does not use.
    fn victim(&self, used: &[usize]) -> Option<usize> {
        let candidates = || self.resident.iter().copied().filter(|expert| !used.contains(expert));
        let oldest = |&expert: &usize| (self.last[expert], expert);
        let rarest = |&expert: &usize| (self.count[expert], self.last[expert], expert);
        match self.policy {
            Policy::Lru => candidates().min_by_key(oldest),
            Policy::Lfu => candidates().min_by_key(rarest),
            Policy::Lfru => candidates()
                .filter(|expert| !self.privileged.contains(expert))
                .min_by_key(rarest)
                .or_else(|| candidates().min_by_key(oldest)),
            Policy::Affinity => candidates().min_by_key(|expert| (self.place[*expert], oldest(expert))),
        }
    }

    fn advance(&mut self, used: &[usize]) -> Step {
        self.step += 1;
        let fall = -f64::from(Decay::default().value()).log2() * 64.0 * 4_294_967_296.0;
        let fallen = (i128::from(self.step) * fall as i128) >> 32;
        if self.count.contains(&4095) {
            self.count.iter_mut().for_each(|count| *count /= 2);
        }
        for &expert in used {
            self.last[expert] = self.step;
            self.count[expert] += 1;
            let id = ExpertId::new(expert, 8).unwrap();
            self.affinity.use_expert(id, self.step);
            self.place[expert] = fallen + (f64::from(self.affinity.at(id, self.step)).log2() * 64.0).ceil() as i128;
        }
        let missing: Vec<usize> = used.iter().copied().filter(|expert| !self.resident.contains(expert)).collect();
        let mut step = Step { hits: used.len() - missing.len(), misses: missing.len(), evictions: 0 };
        self.privileged.retain(|expert| !used.contains(expert));
        for expert in missing {
            if self.resident.len() == self.capacity {
                let Some(victim) = self.victim(used) else { break };
                self.resident.retain(|&resident| resident != victim);
                self.privileged.retain(|&resident| resident != victim);
                step.evictions += 1;
            }
            self.resident.push(expert);
        }
        let kept = used.iter().filter(|expert| self.resident.contains(expert));
        self.privileged.extend(kept);
        let over = self.privileged.len().saturating_sub(self.capacity.div_ceil(2));
        self.privileged.drain(..over);
        step
    }
}

fn agree(policy: Policy, capacity: usize, steps: impl IntoIterator<Item = Vec<usize>>) {
    let (mut residency, mut naive) = (Residency::new(8, capacity, policy).unwrap(), Naive::new(policy, capacity));
    let mut paging = Paging::default();
    for used in steps {
        let before = residency.resident().clone();
        let step = residency.page(0, &set(used.iter().copied()), &mut paging).unwrap();
        assert_eq!(step, naive.advance(&used), "{policy:?}, step {}", naive.step);
        assert_eq!(residency.resident(), &set(naive.resident.iter().copied()), "{policy:?}, step {}", naive.step);
        // The paging is the difference.
        assert_eq!((paging.urgent.len(), paging.out.len()), (step.misses, step.evictions));
        let stay = |expert: &ExpertId| !paging.out.contains(&(0, *expert));
        let read = paging.urgent.iter().filter(|&expert| !paging.streamed.contains(expert));
        let after = before.iter().filter(stay).chain(read).map(ExpertId::index);
        assert_eq!(residency.resident(), &set(after), "{policy:?}, step {}", naive.step);
    }
}

#[test]
fn nothing_changes_over_a_run_longer_than_the_counters() {
    for policy in Policy::ALL {
        let mut seed = 5u64;
        // Experts of unequal use; some pauses are longer than the ring of affinities remembers.
        agree(
            policy,
            4,
            (0..30_000).map(|step| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (draw, pause) = (seed >> 33, step % 5_000 > 3_000);
                (0..8)
                    .filter(
                        |expert| {
                            if pause { *expert == 7 } else { draw >> (3 * expert) & 7 > *expert as u64 / 2 + 2 }
                        },
                    )
                    .collect()
            }),
        );
    }
}

#[test]
fn affinity_falls_without_use() {
    // Used in 30 steps, then not in 80 that use others: it leaves before one that was used once, lately.
    let often = std::iter::repeat_n(vec![0], 30);
    let others = (0..80).map(|step| vec![1 + step % 2]);
    let mut cache = Residency::new(8, 4, Policy::Affinity).unwrap();
    for used in often.clone().chain(others).chain([vec![3], vec![4]]) {
        cache.advance(&set(used)).unwrap();
    }
    assert_eq!(cache.resident(), &set([1, 2, 3, 4]));
    // Right after its 30 steps it stays.
    let mut cache = Residency::new(8, 2, Policy::Affinity).unwrap();
    for used in often.chain([vec![3], vec![4]]) {
        cache.advance(&set(used)).unwrap();
    }
    assert_eq!(cache.resident(), &set([0, 4]));
}

#[test]
fn layers_that_share_room_push_each_other_out() {
    let mut cache = Residency::shared(&[8, 4], 3, Policy::Lru).unwrap();
    cache.advance_in(0, &set([1, 7])).unwrap();
    let mut second = ExpertSet::new(4).unwrap();
    second.insert(ExpertId::new(3, 4).unwrap());
    assert_eq!(cache.advance_in(1, &second).unwrap(), Step { hits: 0, misses: 1, evictions: 0 });
    cache.advance_in(0, &set([1])).unwrap();
    let mut paging = Paging::default();
    second.insert(ExpertId::new(0, 4).unwrap());
    cache.page(1, &second, &mut paging).unwrap();
    assert_eq!(paging.out, [(0, ExpertId::new(7, 8).unwrap())]);
    assert_eq!((cache.resident(), cache.resident_in(1)), (&set([1]), Some(&second)));
    assert_eq!(cache.resident_in(2), None);
    // Nothing changes when a step is refused.
    let (before, paged) = (cache.clone(), paging.clone());
    assert!(cache.page(2, &second, &mut paging).is_err() && cache.page(0, &second, &mut paging).is_err());
    assert_eq!((cache, paging), (before, paged));
}

#[test]
fn mistakes_in_layers_are_named() {
    let message = Residency::shared(&[8, 8], 17, Policy::Lru).unwrap_err().to_string();
    assert_eq!(message, "cached experts is 17: expected 0 to experts 16");
    assert!(Residency::shared(&[], 0, Policy::Lru).is_err());
    assert!(Residency::shared(&[8, 0], 0, Policy::Lru).is_err());
    assert!(Residency::shared(&[40_000, 40_000], 0, Policy::Affinity).is_err());
    let message = Residency::new(8, 8, Policy::Lru).unwrap().advance_in(1, &set([])).unwrap_err().to_string();
    assert_eq!(message, "layer: expected one of 1, got 1");
}

proptest! {
    #[test]
    fn every_policy_does_what_its_definition_says(
        steps in prop::collection::vec(prop::collection::btree_set(0usize..8, 0..6), 0..40),
        capacity in 0usize..=8,
    ) {
        for policy in Policy::ALL {
            agree(policy, capacity, steps.iter().map(|used| used.iter().copied().collect()));
        }
    }

    /// Layers that share room are one layer with the experts of all.
    #[test]
    fn shared_room_is_one_large_layer(
        steps in prop::collection::vec((any::<bool>(), prop::collection::btree_set(0usize..4, 0..5)), 0..40),
        capacity in 0usize..=8,
    ) {
        for policy in Policy::ALL {
            let mut shared = Residency::shared(&[4, 4], capacity, policy).unwrap();
            let mut one = Residency::new(8, capacity, policy).unwrap();
            for (second, used) in &steps {
                let mut part = ExpertSet::new(4).unwrap();
                used.iter().for_each(|&id| assert!(part.insert(ExpertId::new(id, 4).unwrap())));
                let whole = set(used.iter().map(|id| id + 4 * usize::from(*second)));
                let layer = usize::from(*second);
                prop_assert_eq!(shared.advance_in(layer, &part).unwrap(), one.advance(&whole).unwrap());
                let ids = |layer| shared.resident_in(layer).unwrap().iter().map(move |id| id.index() + 4 * layer);
                prop_assert_eq!(&set(ids(0).chain(ids(1))), one.resident());
            }
        }
    }
}
