//! The threads that read: each takes a load, urgent ones first, and after every chunk looks whether something else matters more.
//!
//! Knows nothing of room or of the resident set beyond asking what to do next.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::room::{Job, Next};
use super::{Shared, State};
use crate::error::{ExpertFault, Fault};
use crate::experts::slab::Slab;

/// Reads until the cache is dropped.
pub(super) fn run(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stop {
        let Some((key, job)) = state.room.next() else {
            state = shared.wait(&shared.work, state);
            continue;
        };
        drop(state);
        state = read(shared, key, job);
    }
}

/// Reads an expert, until it is there, has failed or has to wait.
fn read(shared: &Shared, key: usize, mut job: Box<Job>) -> std::sync::MutexGuard<'_, State> {
    loop {
        let Job { slab, load } = &mut *job;
        let slab = slab.get_or_insert_with(|| Slab::new(shared.store.slab_bytes_of(key)));
        // A source that panics must not leave requests waiting for ever.
        let read = catch_unwind(AssertUnwindSafe(|| shared.store.read_chunk(key, load, slab)));
        let read = read.unwrap_or_else(|_| Err(panicked(shared, key)));
        let mut state = shared.lock();
        let result = match read {
            Ok(chunk) => {
                state.statistics.bytes_read += chunk.bytes as u64;
                if !chunk.last {
                    let next = if state.stop { Next::Stop } else { state.room.after_chunk(key, job) };
                    match next {
                        Next::Continue(more) => {
                            job = more;
                            continue;
                        }
                        Next::Stop => {
                            shared.space.notify_all();
                            return state;
                        }
                    }
                }
                Ok(())
            }
            Err(fault) => Err(fault),
        };
        state.room.finish(key, job, result);
        shared.done.notify_all();
        shared.space.notify_all();
        return state;
    }
}

fn panicked(shared: &Shared, key: usize) -> ExpertFault {
    let reason = Arc::new(std::io::Error::other("a panic"));
    shared.store.fault(key, shared.store.files(key), Fault::Read { offset: 0, bytes: 0, reason })
}
