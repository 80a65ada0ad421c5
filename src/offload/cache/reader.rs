//! Those who read: each takes the load of a slab, urgent ones first, and after every chunk looks whether something else matters more.
//! Beside threads that do nothing else, a request reads while it waits.
//!
//! Knows nothing of room or of the resident set beyond asking what to do next.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, MutexGuard};

use super::loading::Job;
use super::shared::{CacheState, Shared};
use crate::error::{ExpertFault, Fault};
use crate::offload::slab::Slab;

/// Reads until the cache is dropped.
pub(super) fn run(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stop {
        let Some((key, job)) = state.room.next() else {
            state = shared.wait(&shared.work, state);
            continue;
        };
        shared.wake_reader(&state);
        drop(state);
        state = read(shared, key, job);
    }
}

/// Reads a slab, until it is there, has failed or has to wait.
pub(super) fn read(shared: &Shared, key: usize, mut job: Job) -> MutexGuard<'_, CacheState> {
    loop {
        let Job { at, slab, load } = &mut job;
        let slab = slab.get_or_insert_with(|| Slab::new(shared.store.slab_bytes_of(key)[*at]));
        // A source that panics must not leave requests waiting for ever.
        let read = catch_unwind(AssertUnwindSafe(|| shared.store.read_chunk(key, *at, load, slab)));
        let read = read.unwrap_or_else(|_| Err(panicked(shared, key)));
        let mut state = shared.lock();
        let result = match read {
            Ok(chunk) => {
                state.statistics.bytes_read += chunk.bytes as u64;
                if !chunk.last {
                    let next = if state.stop { None } else { state.room.after_chunk(key, job) };
                    let Some(more) = next else {
                        shared.wake_reader(&state);
                        // It may have failed meanwhile.
                        shared.done.notify_all();
                        shared.space.notify_all();
                        return state;
                    };
                    job = more;
                    continue;
                }
                Ok(())
            }
            Err(fault) => Err(fault),
        };
        if state.room.finish(key, job, result) {
            shared.done.notify_all();
            shared.space.notify_all();
        }
        shared.wake_reader(&state);
        return state;
    }
}

fn panicked(shared: &Shared, key: usize) -> ExpertFault {
    let reason = Arc::new(std::io::Error::other("a panic"));
    shared.store.fault(key, shared.store.files(key), Fault::Read { offset: 0, bytes: 0, reason })
}
