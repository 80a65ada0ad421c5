//! What requests and readers share: the state of a cache behind one lock, and what wakes which.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::logical::Logical;
use super::room::Room;
use super::statistics::{Statistics, StreamWarning};
use crate::offload::residency::Paging;
use crate::offload::store::ExpertStore;

/// What requests and readers share.
pub(super) struct Shared {
    pub(super) store: Arc<ExpertStore>,
    pub(super) state: Mutex<CacheState>,
    /// There is something to read, or the cache goes.
    pub(super) work: Condvar,
    /// A read is done.
    pub(super) done: Condvar,
    /// There may be room, or another request's turn.
    pub(super) space: Condvar,
}

pub(super) struct CacheState {
    pub(super) logical: Logical,
    pub(super) room: Room,
    pub(super) paging: Paging,
    pub(super) statistics: Statistics,
    pub(super) warning: Option<StreamWarning>,
    /// Requests for room so far, and how many of them have got it.
    pub(super) tickets: u64,
    pub(super) served: u64,
    pub(super) stop: bool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, CacheState> {
        // No code of others runs under the lock, so that what a panic left there is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a reader that there is something to read, if there is. It will tell the next one.
    pub(super) fn wake_reader(&self, state: &CacheState) {
        if state.room.is_work_queued() {
            self.work.notify_one();
        }
    }

    pub(super) fn wait<'a>(&self, what: &Condvar, state: MutexGuard<'a, CacheState>) -> MutexGuard<'a, CacheState> {
        what.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
