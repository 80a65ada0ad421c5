//! Where the bytes of experts are: which slabs exist, which experts are in them, which may leave, and that they are never more than the budget.
//!
//! ```text
//!            start                 all slabs are there
//! Absent ------------> Loading --------------------------> Present
//!    ^                    | cancelled, failed                 | evicted
//!    +--------------------+-----------------------------------+
//! ```
//!
//! An expert that is loading is in a list as long as a reader could take one of its slabs. Reads ahead wait while something urgent is
//! being read.
//!
//! `held` bytes of slabs exist or are promised, `held ≤ budget`. Of them `locked` are being read or used and cannot be had; the rest
//! goes when room is needed, in this order: slabs that no expert is in, experts that are no longer resident, experts read ahead and
//! never used, and at last residents, the most recently used first (what a stream lends; they are read again at their next use).
//!
//! Each operation takes constant time. Knows nothing of threads, files or what the logical resident set is made of.

use std::sync::Arc;

use super::loading::{Job, Loading};
use super::statistics::PrefetchStatistics;
use crate::error::ExpertFault;
use crate::offload::policy::lists::Lists;
use crate::offload::slab::Slab;

/// Lists of keys; a key is in at most one.
const URGENT: usize = 0;
const AHEAD: usize = 1;
const STALE: usize = 2;
const READ_AHEAD: usize = 3;
const RESIDENT: usize = 4;
const LISTS: usize = 5;

enum State {
    Absent,
    Loading(Box<Loading>),
    Present(Arc<Vec<Slab>>),
}

struct Entry {
    state: State,
    bytes: usize,
    /// Which of the sizes of slabs.
    size: usize,
    /// Requests that use it or wait for it.
    pins: usize,
    /// The logical set holds it.
    resident: bool,
    /// Read ahead, and not used so far.
    ahead: bool,
    /// A request waits for the read.
    urgent: bool,
    /// The read is to be given up.
    cancelled: bool,
    /// For those who waited for a read that failed.
    failure: Option<ExpertFault>,
}

impl Entry {
    /// Whether it has to be read, and nobody has yet to hear that it could not be.
    fn is_absent(&self) -> bool {
        matches!(self.state, State::Absent) && self.failure.is_none()
    }
}

/// What a request finds.
pub(super) enum Found {
    Here(Arc<Vec<Slab>>),
    Failed(ExpertFault),
    NotYet,
}

/// Experts of the same sizes, whose slabs may become each other's.
struct Size {
    slabs: Vec<usize>,
    /// Slabs that no expert is in.
    spare: Vec<Vec<Slab>>,
}

impl Size {
    fn bytes(&self) -> usize {
        self.slabs.iter().sum()
    }
}

/// Slabs, and which experts are in them.
pub(super) struct Room {
    budget: usize,
    held: usize,
    peak: usize,
    /// Bytes being read or pinned.
    locked: usize,
    /// Bytes of residents that are not pinned.
    resting: usize,
    sizes: Vec<Size>,
    entries: Vec<Entry>,
    lists: Lists,
    /// Keys being read, at most as many as there are readers.
    reading: Vec<usize>,
    /// Slabs being read that a request waits for.
    urgent_reads: usize,
    /// Residents whose room was lent.
    pub(super) lent: u64,
    pub(super) prefetch: PrefetchStatistics,
}

impl Room {
    /// Room for `budget` bytes; an expert, by its key, takes slabs of such sizes.
    pub(super) fn new<'a>(budget: usize, slabs: impl Iterator<Item = &'a [usize]>) -> Self {
        let (mut sizes, mut entries): (Vec<Size>, Vec<Entry>) = (Vec::new(), Vec::new());
        for slabs in slabs {
            let size = sizes.iter().position(|size| size.slabs == slabs).unwrap_or_else(|| {
                sizes.push(Size { slabs: slabs.to_vec(), spare: Vec::new() });
                sizes.len() - 1
            });
            entries.push(Entry {
                state: State::Absent,
                bytes: sizes[size].bytes(),
                size,
                pins: 0,
                resident: false,
                ahead: false,
                urgent: false,
                cancelled: false,
                failure: None,
            });
        }
        Self {
            budget,
            held: 0,
            peak: 0,
            locked: 0,
            resting: 0,
            lists: Lists::new(entries.len(), LISTS),
            sizes,
            entries,
            reading: Vec::new(),
            urgent_reads: 0,
            lent: 0,
            prefetch: PrefetchStatistics::default(),
        }
    }

    pub(super) fn held(&self) -> usize {
        self.held
    }

    pub(super) fn peak(&self) -> usize {
        self.peak
    }

    /// Bytes that can be had without lending.
    fn free(&self) -> usize {
        self.budget - self.locked - self.resting
    }

    /// Follows the logical set: whether it holds `key`.
    pub(super) fn set_resident(&mut self, key: usize, resident: bool) {
        if self.entries[key].resident == resident {
            return;
        }
        let rests = self.wake(key);
        self.entries[key].resident = resident;
        if rests {
            self.rest(key);
        }
    }

    /// Pins as many of `keys`, from the first on, as there is room for at once, and queues reads of those that are not there.
    /// With `stream`, a number of bytes, they may be fewer than all: half of the free room is theirs, and the rest of it for reads of
    /// those that follow; residents are lent only up to `stream`. Without, it is all or none. Returns how many.
    pub(super) fn reserve(&mut self, keys: &[usize], stream: Option<usize>) -> usize {
        let (mut need, mut more, mut more_free, mut count, mut used) = (0, 0, 0, 0, 0);
        let all = stream.map_or(self.budget, |bytes| bytes.max(self.free()));
        let most = if stream.is_some() { all / 2 } else { all };
        for &key in keys {
            let entry = &self.entries[key];
            match entry.state {
                State::Absent if entry.is_absent() => need += entry.bytes,
                State::Present(_) if entry.pins == 0 => {
                    more += entry.bytes;
                    more_free += if self.is_resting(entry) { 0 } else { entry.bytes };
                }
                _ => {}
            }
            let fits = self.locked + more + need <= self.budget && (count == 0 || more_free + need <= most);
            if !fits {
                break;
            }
            (count, used) = (count + 1, more_free + need);
        }
        if stream.is_none() && count < keys.len() {
            return 0;
        }
        let (keys, following) = keys.split_at(count);
        // What is there first, so that nothing of it has to make room.
        for &key in keys {
            self.pin(key);
        }
        for &key in keys {
            if self.entries[key].is_absent() {
                self.start(key, true);
            }
        }
        let mut left = if count > 0 { all.saturating_sub(used) } else { 0 };
        for &key in following {
            let Entry { bytes, .. } = self.entries[key];
            if self.entries[key].is_absent() {
                if bytes > left || self.locked + bytes > self.budget {
                    break;
                }
                left -= bytes;
                self.start(key, true);
            }
        }
        count
    }

    fn is_resting(&self, entry: &Entry) -> bool {
        entry.resident && !entry.ahead
    }

    fn pin(&mut self, key: usize) {
        if self.wake(key) {
            self.locked += self.entries[key].bytes;
        }
        let entry = &mut self.entries[key];
        entry.pins += 1;
        entry.cancelled = false;
        self.prefetch.used += u64::from(std::mem::take(&mut entry.ahead));
        let was_urgent = std::mem::replace(&mut entry.urgent, true);
        if let (State::Loading(loading), false) = (&entry.state, was_urgent) {
            self.urgent_reads += loading.reading();
            if loading.is_waiting() {
                self.lists.push_back(URGENT, key);
            }
        }
    }

    /// A request lets go of an expert.
    pub(super) fn unpin(&mut self, key: usize) {
        let entry = &mut self.entries[key];
        entry.pins -= 1;
        if entry.pins > 0 {
            return;
        }
        // Whoever comes now reads again.
        entry.failure = None;
        if matches!(entry.state, State::Present(_)) {
            self.locked -= entry.bytes;
            self.rest(key);
        }
    }

    /// Takes a present, unpinned expert out of its list; false for any other.
    fn wake(&mut self, key: usize) -> bool {
        let entry = &self.entries[key];
        let rests = matches!(entry.state, State::Present(_)) && entry.pins == 0;
        if rests {
            self.resting -= if self.is_resting(entry) { entry.bytes } else { 0 };
            self.lists.remove(key);
        }
        rests
    }

    /// Puts a present, unpinned expert at the end of its list.
    fn rest(&mut self, key: usize) {
        let entry = &self.entries[key];
        let list = match (entry.ahead, entry.resident) {
            (true, _) => READ_AHEAD,
            (false, true) => RESIDENT,
            (false, false) => STALE,
        };
        self.resting += if self.is_resting(entry) { entry.bytes } else { 0 };
        self.lists.push_back(list, key);
    }

    /// Queues the read of an absent expert that there is room for.
    fn start(&mut self, key: usize, urgent: bool) {
        let size = self.entries[key].size;
        let slabs = self.take(size);
        let entry = &mut self.entries[key];
        self.locked += entry.bytes;
        entry.state = State::Loading(Box::new(Loading::new(slabs, self.sizes[size].slabs.len())));
        (entry.urgent, entry.cancelled) = (urgent, false);
        self.lists.push_back(if urgent { URGENT } else { AHEAD }, key);
    }

    /// Makes room for an expert's slabs, of which there must be as much that is not locked; slabs that were there already come back.
    fn take(&mut self, size: usize) -> Option<Vec<Slab>> {
        let bytes = self.sizes[size].bytes();
        loop {
            if let Some(slabs) = self.sizes[size].spare.pop() {
                return Some(slabs);
            }
            if self.held + bytes <= self.budget {
                self.held += bytes;
                self.peak = self.peak.max(self.held);
                return None;
            }
            // Of another size: the slabs go before their bytes are counted as gone.
            if let Some(other) = self.sizes.iter_mut().find(|other| !other.spare.is_empty()) {
                other.spare.pop();
                self.held -= other.bytes();
            } else if !self.evict() {
                return None;
            }
        }
    }

    /// The expert that goes first makes room; false when there is none.
    fn evict(&mut self) -> bool {
        let first = self.lists.first(STALE).or_else(|| self.lists.first(READ_AHEAD));
        let Some(key) = first.or_else(|| self.lists.last(RESIDENT)) else { return false };
        self.wake(key);
        let entry = &mut self.entries[key];
        self.lent += u64::from(entry.resident && !entry.ahead);
        self.prefetch.wasted += u64::from(std::mem::take(&mut entry.ahead));
        let size = entry.size;
        if let State::Present(slabs) = std::mem::replace(&mut entry.state, State::Absent) {
            // Nobody else has them: it was not pinned.
            self.give_back(size, Arc::into_inner(slabs));
        }
        true
    }

    /// The slabs of an expert that is gone, or the promise of them.
    fn give_back(&mut self, size: usize, slabs: Option<Vec<Slab>>) {
        let size = &mut self.sizes[size];
        match slabs {
            Some(slabs) => size.spare.push(slabs),
            None => self.held -= size.bytes(),
        }
    }

    /// What a request that has pinned `key` finds.
    pub(super) fn find(&self, key: usize) -> Found {
        let entry = &self.entries[key];
        match (&entry.state, &entry.failure) {
            (State::Present(slab), _) => Found::Here(slab.clone()),
            (State::Absent, Some(failure)) => Found::Failed(failure.clone()),
            _ => Found::NotYet,
        }
    }

    /// Queues a read ahead; false when there is no room that nobody needs. What is there already is put last among those that go.
    pub(super) fn read_ahead(&mut self, key: usize) -> bool {
        let entry = &self.entries[key];
        match entry.state {
            State::Absent if entry.pins > 0 => {}
            State::Absent if entry.bytes > self.free() => return false,
            State::Absent => {
                self.start(key, false);
                self.entries[key].ahead = true;
                self.prefetch.issued += 1;
            }
            State::Present(_) if entry.pins == 0 && !entry.resident => {
                self.wake(key);
                self.rest(key);
            }
            _ => self.go_on(key),
        }
        true
    }

    /// Whatever a load was to become, it goes on.
    fn go_on(&mut self, key: usize) {
        let entry = &mut self.entries[key];
        if let (State::Loading(loading), true) = (&entry.state, std::mem::take(&mut entry.cancelled))
            && loading.is_waiting()
        {
            self.lists.push_back(AHEAD, key);
        }
    }

    /// Gives up the read ahead of `key` if nobody waits for it: at once, or after the chunks that are being read.
    pub(super) fn cancel(&mut self, key: usize) {
        let entry = &mut self.entries[key];
        if !entry.urgent && matches!(entry.state, State::Loading(_)) {
            entry.cancelled = true;
            self.lists.remove(key);
            self.settle(key);
        }
    }

    /// Gives up all reads ahead that nobody waits for.
    pub(super) fn cancel_all(&mut self) {
        while let Some(key) = self.lists.first(AHEAD) {
            self.cancel(key);
        }
        for at in 0..self.reading.len() {
            self.cancel(self.reading[at]);
        }
    }

    /// Whether a load waits for a reader.
    pub(super) fn is_work_queued(&self) -> bool {
        self.first_waiting().is_some()
    }

    fn first_waiting(&self) -> Option<usize> {
        let ahead = || self.lists.first(AHEAD).filter(|_| self.urgent_reads == 0);
        self.lists.first(URGENT).or_else(ahead)
    }

    /// The same if a request waits for it.
    pub(super) fn next_urgent(&mut self) -> Option<(usize, Job)> {
        self.lists.first(URGENT).and_then(|_| self.next())
    }

    /// The load to go on with: urgent ones first, each kind in its order.
    pub(super) fn next(&mut self) -> Option<(usize, Job)> {
        let key = self.first_waiting()?;
        let entry = &mut self.entries[key];
        let State::Loading(loading) = &mut entry.state else { return None };
        let job = loading.take()?;
        self.urgent_reads += usize::from(entry.urgent);
        if !loading.is_waiting() {
            self.lists.remove(key);
        }
        if !self.reading.contains(&key) {
            self.reading.push(key);
        }
        Some((key, job))
    }

    /// A chunk has been read and is not the last: the load to go on with, `None` where it was put back or given up.
    pub(super) fn after_chunk(&mut self, key: usize, job: Job) -> Option<Job> {
        let entry = &mut self.entries[key];
        let State::Loading(loading) = &mut entry.state else { return None };
        let stops = entry.cancelled || loading.has_failed();
        let gives_way = !entry.urgent && (self.urgent_reads > 0 || self.lists.first(URGENT).is_some());
        if !stops && !gives_way {
            return Some(job);
        }
        loading.put_back(job);
        self.urgent_reads -= usize::from(entry.urgent);
        if !stops {
            self.lists.push_front(AHEAD, key);
        }
        self.settle(key);
        None
    }

    /// A slab is there, or could not be read; true when the expert's load is over.
    pub(super) fn finish(&mut self, key: usize, job: Job, result: Result<(), ExpertFault>) -> bool {
        let entry = &mut self.entries[key];
        let State::Loading(loading) = &mut entry.state else { return false };
        loading.finish(job, result);
        self.urgent_reads -= usize::from(entry.urgent);
        if loading.has_failed() {
            self.lists.remove(key);
        }
        self.settle(key);
        !matches!(self.entries[key].state, State::Loading(_))
    }

    /// A load that nobody reads any more is over if it is complete, failed or given up.
    fn settle(&mut self, key: usize) {
        let entry = &mut self.entries[key];
        let State::Loading(loading) = &mut entry.state else { return };
        if loading.reading() > 0 {
            return;
        }
        self.reading.retain(|&reading| reading != key);
        if let Some(slabs) = loading.complete() {
            entry.state = State::Present(Arc::new(slabs));
            entry.cancelled = false;
            if entry.pins == 0 {
                self.locked -= entry.bytes;
                self.rest(key);
            }
            return;
        }
        if !entry.cancelled && !loading.has_failed() {
            return;
        }
        let State::Loading(loading) = std::mem::replace(&mut entry.state, State::Absent) else { return };
        let (slabs, fault) = loading.give_up();
        let ahead = std::mem::take(&mut entry.ahead);
        match &fault {
            Some(_) => self.prefetch.wasted += u64::from(ahead),
            None => self.prefetch.cancelled += u64::from(ahead),
        }
        entry.failure = fault.filter(|_| entry.pins > 0);
        entry.cancelled = false;
        self.locked -= entry.bytes;
        let size = entry.size;
        self.give_back(size, slabs);
    }
}
