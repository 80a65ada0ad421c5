//! The budget, watched from inside the reads while eight threads run steps.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::offload::Scope;
use crate::{ExpertCache, Policy};

use super::disk::bed_of;

#[test]
fn the_budget_holds_at_every_read_under_eight_threads() {
    for (room, scope, policy) in [
        (1, Scope::Global, Policy::Lru),
        (3, Scope::PerLayer, Policy::Lfu),
        (9, Scope::Global, Policy::Lfru),
        (14, Scope::PerLayer, Policy::Affinity),
    ] {
        let bed = bed_of(3, 8, 600, room, |options| (options.scope, options.policy) = (scope, policy));
        let (budget, slab) = (room * bed.slab(), bed.slab());
        let (cache, samples) = (Arc::new(OnceLock::<Weak<ExpertCache>>::new()), Arc::new(AtomicUsize::new(0)));
        cache.set(Arc::downgrade(&bed.cache)).unwrap();
        let seen = samples.clone();
        bed.disk.set_fault(move |_| {
            if let Some(cache) = cache.get().and_then(Weak::upgrade) {
                let bytes = cache.statistics().bytes;
                assert!(bytes <= budget && bytes.is_multiple_of(slab), "{bytes} of {budget}");
                // A counter that is read when the threads are done.
                seen.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        std::thread::scope(|scope| {
            for thread in 0..8usize {
                let bed = &bed;
                scope.spawn(move || {
                    for turn in 0..60 {
                        let at = 5 * thread + 3 * turn;
                        if turn % 4 == 0 {
                            bed.cache.prefetch(at % 3, &bed.set([turn % 8, (turn + 5) % 8])).unwrap();
                        }
                        bed.run(turn % 3, &[at % 8, (at + 1) % 8, (at + 3) % 8]).unwrap();
                    }
                });
            }
        });
        assert!(samples.load(Ordering::Relaxed) > 0);
        let statistics = bed.cache.statistics();
        assert_eq!(statistics.requests, 8 * 60 * 3);
        assert!(statistics.peak_bytes <= budget);
    }
}
