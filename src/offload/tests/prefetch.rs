//! Reads ahead: what they save, who goes first, and how they are given up.

use crate::offload::PrefetchStatistics;

use super::disk::{Bed, bed, bed_of, broken, wait_until};

fn settled(bed: &Bed) -> PrefetchStatistics {
    wait_until(|| {
        let PrefetchStatistics { issued, used, wasted, cancelled } = bed.cache.statistics().prefetch;
        issued == used + wasted + cancelled
    });
    bed.cache.statistics().prefetch
}

#[test]
fn what_was_read_ahead_is_not_read_again() {
    let bed = bed(2, 8, 6, |_| ());
    assert_eq!(bed.cache.prefetch(1, &bed.set([2, 5])).unwrap(), 2);
    assert!(bed.cache.resident(1).unwrap().is_empty(), "the logical set does not change");
    let (step, _) = bed.run(1, &[2, 5]).unwrap();
    assert_eq!((step.hits, step.misses, bed.reads()), (0, 2, 2));
    assert_eq!(settled(&bed), PrefetchStatistics { issued: 2, used: 2, ..Default::default() });
    // What is there needs no read.
    assert_eq!(bed.cache.prefetch(1, &bed.set([2, 5])).unwrap(), 2);
    assert_eq!(bed.cache.statistics().prefetch.issued, 2);
}

#[test]
fn without_room_nothing_is_read_ahead_and_no_resident_goes() {
    let bed = bed(1, 8, 4, |_| ());
    bed.run(0, &[0, 1, 2, 3]).unwrap();
    assert_eq!(bed.cache.prefetch(0, &bed.set([4, 5])).unwrap(), 0);
    assert_eq!((bed.reads(), bed.cache.statistics().prefetch), (4, PrefetchStatistics::default()));
    assert_eq!(bed.run(0, &[0, 1, 2, 3]).unwrap().0.hits, 4);
    assert_eq!(bed.reads(), 4);
}

#[test]
fn room_that_is_set_aside_is_read_into_again_and_again() {
    let bed = bed(1, 16, 4, |options| options.spare_bytes = options.budget_bytes / 4);
    bed.run(0, &[0, 1, 2]).unwrap();
    for id in 4..10 {
        let before = bed.cache.statistics().bytes_read;
        // The one before goes unused.
        assert_eq!(bed.cache.prefetch(0, &bed.set([id])).unwrap(), 1);
        wait_until(|| bed.cache.statistics().bytes_read > before);
        assert_eq!(bed.cache.statistics().prefetch.wasted, id as u64 - 4);
    }
    bed.run(0, &[0, 1, 9]).unwrap();
    let statistics = bed.cache.statistics();
    assert_eq!((statistics.prefetch.issued, statistics.prefetch.used), (6, 1));
    assert_eq!(bed.reads(), 9);
    assert!(statistics.peak_bytes <= 4 * bed.slab());
}

#[test]
fn an_urgent_read_overtakes_one_ahead_that_has_begun() {
    // Experts of a slab of a bit more than three chunks and a small one, one reader.
    let bed = bed_of(1, 4, 3 << 10, 4, |options| options.readers = 1);
    bed.disk.hold(0);
    bed.cache.prefetch(0, &bed.set([0])).unwrap();
    bed.disk.wait_for_held(1);
    std::thread::scope(|scope| {
        scope.spawn(|| bed.run(0, &[2]).unwrap());
        wait_until(|| bed.cache.statistics().requests == 1);
        bed.disk.open();
    });
    bed.run(0, &[0]).unwrap();
    let reads = bed.disk.reads.lock().unwrap().clone();
    assert_eq!(reads.len(), 10);
    let of_two = |read: &&u64| **read >= 6 << 20;
    assert!(reads[0] == 0 && reads[1..6].iter().all(|read| of_two(&read)), "{reads:?}");
    assert_eq!(settled(&bed), PrefetchStatistics { issued: 1, used: 1, ..Default::default() });
}

#[test]
fn a_read_ahead_that_turns_urgent_is_finished_first() {
    let bed = bed_of(1, 8, 2 << 10, 6, |options| options.readers = 1);
    bed.disk.hold(0);
    bed.cache.prefetch(0, &bed.set([0, 1, 2])).unwrap();
    bed.disk.wait_for_held(1);
    std::thread::scope(|scope| {
        scope.spawn(|| bed.run(0, &[2]).unwrap());
        wait_until(|| bed.cache.statistics().requests == 1);
        bed.disk.open();
    });
    bed.run(0, &[0, 1, 2]).unwrap();
    let reads = bed.disk.reads.lock().unwrap().clone();
    assert!(reads[1..4].iter().all(|&read| read > 3 << 20), "{reads:?}");
    assert_eq!(reads.len(), 12, "nothing is read twice");
}

#[test]
fn reads_ahead_are_given_up_queued_or_begun() {
    let bed = bed_of(2, 4, 3 << 10, 6, |options| options.readers = 1);
    bed.disk.hold(0);
    bed.cache.prefetch(1, &bed.set([0, 1, 2])).unwrap();
    bed.disk.wait_for_held(1);
    bed.cache.cancel_prefetch(0);
    assert_eq!(bed.cache.statistics().prefetch.cancelled, 0, "another layer's");
    bed.cache.cancel_prefetch(1);
    assert_eq!(bed.cache.statistics().prefetch.cancelled, 2);
    bed.disk.open();
    assert_eq!(settled(&bed), PrefetchStatistics { issued: 3, cancelled: 3, ..Default::default() });
    assert_eq!(bed.reads(), 1, "it stops after its chunk");
    // All room is there again.
    assert_eq!(bed.run(1, &[0, 1, 2]).unwrap().1, [3]);
}

#[test]
fn a_request_makes_reads_ahead_give_way() {
    let bed = bed_of(1, 4, 3 << 10, 2, |options| options.readers = 1);
    bed.disk.hold(0);
    bed.cache.prefetch(0, &bed.set([0, 1])).unwrap();
    bed.disk.wait_for_held(1);
    std::thread::scope(|scope| {
        scope.spawn(|| bed.run(0, &[2, 3]).unwrap());
        wait_until(|| bed.cache.statistics().requests == 2);
        bed.disk.open();
    });
    assert_eq!(settled(&bed), PrefetchStatistics { issued: 2, cancelled: 2, ..Default::default() });
    assert!(bed.cache.statistics().peak_bytes <= 2 * bed.slab());
}

#[test]
fn a_request_takes_back_what_was_given_up() {
    let bed = bed_of(1, 4, 3 << 10, 4, |options| options.readers = 1);
    bed.disk.hold(0);
    bed.cache.prefetch(0, &bed.set([0])).unwrap();
    bed.disk.wait_for_held(1);
    bed.cache.cancel_prefetch(0);
    std::thread::scope(|scope| {
        scope.spawn(|| bed.run(0, &[0]).unwrap());
        wait_until(|| bed.cache.statistics().requests == 1);
        bed.disk.open();
    });
    // The small slab begins in the last page of the large one.
    assert_eq!((settled(&bed).used, bed.reads(), bed.places()), (1, 5, 4));
}

#[test]
fn what_is_about_to_leave_can_be_read_ahead() {
    let bed = bed(1, 8, 3, |options| options.spare_bytes = options.budget_bytes / 3);
    bed.run(0, &[0, 1]).unwrap();
    // 0 leaves the logical set; its bytes are still there.
    bed.run(0, &[1, 2]).unwrap();
    assert_eq!(bed.cache.prefetch(0, &bed.set([0])).unwrap(), 1);
    assert_eq!(bed.run(0, &[0]).unwrap().0.misses, 1);
    assert_eq!((bed.reads(), bed.cache.statistics().prefetch.issued), (3, 0));
}

#[test]
fn what_is_being_pushed_out_while_it_is_used_can_be_read_ahead() {
    let bed = bed(1, 8, 3, |options| options.spare_bytes = options.budget_bytes / 3);
    let held = bed.cache.run(0, &bed.set([0]), |group| {
        // In another thread: a step must not run another one.
        std::thread::scope(|scope| {
            scope.spawn(|| bed.run(0, &[1, 2]).unwrap());
        });
        assert_eq!(bed.cache.resident(0)?, bed.set([1, 2]));
        assert_eq!(bed.cache.prefetch(0, &bed.set([0]))?, 1);
        bed.check(0, 0, &group[0].1);
        Ok(())
    });
    assert_eq!(held.unwrap().misses, 1);
    assert_eq!(bed.run(0, &[0]).unwrap().0.misses, 1);
    assert_eq!((bed.reads(), bed.cache.statistics().prefetch.issued), (3, 0), "its bytes were there all the time");
}

#[test]
fn a_read_ahead_that_fails_is_read_again_when_it_is_needed() {
    let bed = bed(1, 8, 3, |_| ());
    bed.break_expert(4, broken);
    bed.cache.prefetch(0, &bed.set([4])).unwrap();
    assert_eq!(settled(&bed), PrefetchStatistics { issued: 1, wasted: 1, ..Default::default() });
    bed.disk.repair();
    bed.run(0, &[4]).unwrap();
}
