//! Steps: what they see, what stays, and what happens when it does not fit.

use std::sync::Arc;

use crate::offload::residency::Residency;
use crate::offload::{Scope, Step};
use crate::{CacheOptions, Error, ExpertCache, Policy};
use proptest::prelude::*;

use super::disk::{bed, set, store, wait_until};

#[test]
fn what_is_resident_is_not_read_again() {
    let bed = bed(2, 8, 4, |_| ());
    assert_eq!((bed.cache.capacity(0), bed.cache.capacity(1), bed.cache.capacity(2)), (2, 2, 0));
    assert_eq!(bed.run(0, &[1, 5]).unwrap(), (Step { hits: 0, misses: 2, evictions: 0 }, vec![2]));
    assert_eq!(bed.run(1, &[5]).unwrap().0.misses, 1);
    assert_eq!(bed.reads(), 3);
    assert_eq!(bed.run(0, &[1, 5]).unwrap(), (Step { hits: 2, misses: 0, evictions: 0 }, vec![2]));
    assert_eq!(bed.run(0, &[]).unwrap(), (Step::default(), vec![]));
    assert_eq!(bed.reads(), 3);
    assert_eq!(bed.run(0, &[1, 2]).unwrap().0, Step { hits: 1, misses: 1, evictions: 1 });
    assert_eq!(bed.cache.resident(0).unwrap(), bed.set([1, 2]));
    let statistics = bed.cache.statistics();
    assert_eq!((statistics.requests, statistics.hits, statistics.misses, statistics.evictions), (7, 3, 4, 1));
    assert_eq!((statistics.streamed_steps, bed.cache.take_warning()), (0, None));
    assert!(statistics.bytes <= 4 * bed.slab() && statistics.bytes_read > 0);
}

#[test]
fn a_step_that_does_not_fit_runs_in_groups_with_one_warning() {
    // Smaller than a token's experts, and than a batch's.
    let bed = bed(2, 16, 5, |options| options.readers = 2);
    let (step, groups) = bed.run(0, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    assert_eq!((step.misses, groups.iter().sum::<usize>()), (10, 10));
    assert!(groups.len() > 1, "{groups:?}");
    assert_eq!(bed.cache.resident(0).unwrap(), bed.set([0, 1, 2]));
    let warning = bed.cache.take_warning().unwrap();
    assert_eq!((warning.layer, warning.experts, warning.capacity), (0, 10, 3));
    let text = "a step of layer 0 uses 10 experts and the cache has room for 3: the rest are read for every such step";
    assert_eq!(warning.to_string(), text);
    bed.run(1, &[3, 5, 7, 9]).unwrap();
    assert_eq!(bed.cache.take_warning(), None);
    let statistics = bed.cache.statistics();
    assert_eq!(statistics.streamed_steps, 2);
    assert!(statistics.streamed_rounds > 2 && statistics.peak_bytes <= 5 * bed.slab());
}

#[test]
fn a_budget_of_one_expert_serves_every_layer() {
    for scope in [Scope::PerLayer, Scope::Global] {
        let bed = bed(3, 4, 1, |options| options.scope = scope);
        for layer in [0, 1, 2, 0, 0] {
            let (_, groups) = bed.run(layer, &[0, 3]).unwrap();
            assert_eq!(groups, [1, 1]);
        }
        assert_eq!(bed.cache.statistics().peak_bytes, bed.slab());
    }
}

#[test]
fn a_budget_below_one_expert_is_an_error() {
    let (store, _) = store(2, 4, 4);
    let (store, options) = (Arc::new(store), CacheOptions::new(0));
    let slab = store.slab_bytes(0);
    let message = |options| ExpertCache::new(store.clone(), options).unwrap_err().to_string();
    let expected = format!("expected at least {slab} bytes, the largest expert, and ");
    let short = message(CacheOptions { budget_bytes: slab - 1, ..options });
    assert_eq!(short, format!("expert cache budget is {} bytes: {expected}0 to spare", slab - 1));
    let short = message(CacheOptions { budget_bytes: 2 * slab, spare_bytes: slab + 1, ..options });
    assert!(short.ends_with(&format!("{} to spare", slab + 1)), "{short}");
    let none = message(CacheOptions { budget_bytes: 2 * slab, readers: 0, ..options });
    assert_eq!(none, "expert readers is 0: expected at least 1");
}

#[test]
fn mistakes_change_nothing() {
    let bed = bed(2, 8, 4, |_| ());
    bed.run(0, &[1]).unwrap();
    let before = (bed.cache.statistics(), bed.cache.resident(0).unwrap());
    let run = |layer, experts| bed.cache.run(layer, &set(experts, [1]), |_| Ok(())).unwrap_err().to_string();
    assert_eq!(run(2, 8), "layer: expected one of the cache's, got 2");
    assert_eq!(run(0, 9), "used experts: expected a set of 8 experts, got one of 9");
    assert!(bed.cache.prefetch(2, &set(8, [1])).is_err() && bed.cache.prefetch(0, &set(9, [1])).is_err());
    assert!(bed.cache.resident(2).is_err());
    bed.cache.cancel_prefetch(7);
    assert_eq!((bed.cache.statistics(), bed.cache.resident(0).unwrap()), before);
}

#[test]
fn work_that_fails_or_panics_lets_go_of_its_experts() {
    let bed = bed(1, 8, 2, |_| ());
    let failed = bed.cache.run(0, &bed.set([1, 2]), |_| Err(Error::TopKZero));
    assert!(matches!(failed, Err(Error::TopKZero)));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        bed.cache.run(0, &bed.set([3, 4]), |_| panic!("work"))
    }));
    assert!(panicked.is_err());
    assert_eq!(bed.run(0, &[5, 6]).unwrap().1, [2]);
}

#[test]
fn sixteen_threads_that_want_one_expert_read_it_once() {
    let bed = bed(1, 8, 2, |_| ());
    bed.disk.hold(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| bed.run(0, &[3]).unwrap());
        }
        wait_until(|| bed.cache.statistics().requests == 16);
        bed.disk.open();
    });
    assert_eq!(bed.reads(), 1);
    let statistics = bed.cache.statistics();
    assert_eq!((statistics.hits, statistics.misses), (15, 1));
}

#[test]
fn two_steps_that_each_hold_half_of_what_they_need_finish() {
    let bed = bed(2, 8, 4, |options| options.scope = Scope::Global);
    std::thread::scope(|scope| {
        for layer in 0..2 {
            let bed = &bed;
            scope.spawn(move || {
                for turn in 0..300 {
                    bed.run(layer, &[turn % 8, (turn + 3) % 8, (turn + 6) % 8]).unwrap();
                }
            });
        }
    });
    assert!(bed.cache.statistics().peak_bytes <= 4 * bed.slab());
}

#[test]
fn layers_of_several_sizes_share_one_budget() {
    let (small, disk) = store(1, 4, 4);
    drop(small);
    // The same disk, cut into experts of two sizes.
    use crate::checkpoint::NamedSource;
    use crate::offload::store::{Layout, Part, Piece};
    use crate::{Dtype, ExpertStore};
    let (part, dtype, layout) = (Part::Up, Dtype::F32, Layout::Rows);
    let piece = |offset, rows| Piece { part, source: 0, offset, dtype, rows, columns: 16, layout };
    let layers = vec![
        (0..4).map(|id| vec![piece(64 * id, 1)]).collect(),
        (0..4).map(|id| vec![piece(64 * id, 100)]).collect::<Vec<_>>(),
    ];
    let source: NamedSource = ("disk".into(), disk);
    let store = Arc::new(ExpertStore::new(vec![source], layers).unwrap());
    assert_eq!((store.slab_bytes(0), store.slab_bytes(1)), (8192, 12_288));
    for scope in [Scope::PerLayer, Scope::Global] {
        for budget_bytes in [12_288, 20_480, 40_000] {
            let cache =
                ExpertCache::new(store.clone(), CacheOptions { scope, ..CacheOptions::new(budget_bytes) }).unwrap();
            for turn in 0..40 {
                let wanted = set(4, [turn % 4, (turn + 1) % 4]);
                let mut seen = 0;
                cache
                    .run(turn / 2 % 2, &wanted, |group| {
                        seen += group.len();
                        Ok(())
                    })
                    .unwrap();
                assert_eq!(seen, 2);
                assert!(cache.statistics().bytes <= budget_bytes);
            }
            assert!(cache.statistics().peak_bytes <= budget_bytes);
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<(usize, Vec<usize>)>> {
    let ids = prop::collection::btree_set(0usize..6, 0..6).prop_map(|ids| ids.into_iter().collect());
    prop::collection::vec((0usize..3, ids), 0..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// What is resident, hit, missed and evicted is what the logical sets say, whatever was read, read ahead or cancelled when.
    #[test]
    fn the_resident_set_is_the_logical_one(
        steps in steps(),
        ahead in prop::collection::vec(prop::collection::btree_set(0usize..6, 0..4), 30),
        room in 1usize..12,
        set_aside in 0usize..2,
    ) {
        for scope in [Scope::PerLayer, Scope::Global] {
            for policy in Policy::ALL {
                let bed = bed(3, 6, room + set_aside, |options| {
                    (options.scope, options.policy) = (scope, policy);
                    options.spare_bytes = options.budget_bytes / (room + set_aside) * set_aside;
                });
                let share = |layer| room / 3 + usize::from(layer < room % 3);
                let mut naive: Vec<Residency> = match scope {
                    Scope::PerLayer => (0..3).map(|layer| Residency::new(6, share(layer).min(6), policy).unwrap()).collect(),
                    Scope::Global => vec![Residency::shared(&[6, 6, 6], room, policy).unwrap()],
                };
                let mut totals = (0, 0, 0);
                for (turn, (layer, ids)) in steps.iter().enumerate() {
                    if turn % 3 == 1 {
                        bed.cache.prefetch((layer + 1) % 3, &bed.set(ahead[turn].iter().copied())).unwrap();
                    }
                    if turn % 7 == 5 {
                        bed.cache.cancel_prefetch(*layer);
                    }
                    let (step, groups) = bed.run(*layer, ids).unwrap();
                    let (which, inside) = if scope == Scope::Global { (0, *layer) } else { (*layer, 0) };
                    let expected = naive[which].advance_in(inside, &bed.set(ids.iter().copied())).unwrap();
                    prop_assert_eq!(step, expected);
                    let resident = naive[which].resident_in(inside).unwrap();
                    prop_assert_eq!(&bed.cache.resident(*layer).unwrap(), resident);
                    // Whatever fits is served at once.
                    if ids.iter().all(|&id| resident.contains(crate::ExpertId::new(id, 6).unwrap())) {
                        prop_assert!(groups.len() <= 1);
                    }
                    totals = (totals.0 + step.hits as u64, totals.1 + step.misses as u64, totals.2 + step.evictions as u64);
                    prop_assert!(bed.cache.statistics().bytes <= (room + set_aside) * bed.slab());
                }
                let statistics = bed.cache.statistics();
                prop_assert_eq!((statistics.hits, statistics.misses, statistics.evictions), totals);
                prop_assert!(statistics.peak_bytes <= (room + set_aside) * bed.slab());
            }
        }
    }
}
