//! Where the bytes of experts are: which slabs exist, who is in them, who may leave, and that they are never more than the budget.
//!
//! ```text
//!            start              reader                 finish
//! Absent ------------> Queued ----------> Reading ---------------> Present
//!    ^                   ^ | cancelled      | | cancelled, failed      | evicted
//!    |                   +-|----------------+ |                        |
//!    +---------------------+---- overtaken ---+------------------------+
//! ```
//!
//! `held` bytes of slabs exist or are promised, `held ≤ budget`. Of them `locked` are being read or used and cannot be had; the rest
//! goes when room is needed, in this order: slabs that nobody is in, experts that are no longer resident, experts read ahead and
//! never used, and at last residents, the most recently used first (what a stream lends; they are read again at their next use).
//!
//! Each operation takes constant time. Knows nothing of threads, files or what the logical resident set is made of.

use std::sync::Arc;

use super::statistics::PrefetchStatistics;
use crate::error::ExpertFault;
use crate::experts::policy::lists::Lists;
use crate::experts::slab::Slab;
use crate::experts::store::Load;

/// Lists of keys; a key is in at most one.
const URGENT: usize = 0;
const AHEAD: usize = 1;
const STALE: usize = 2;
const READ_AHEAD: usize = 3;
const RESIDENT: usize = 4;
const LISTS: usize = 5;

/// An expert's load, wherever it has come to.
pub(super) struct Job {
    /// `None` until a reader has made it: making a slab takes a while.
    pub(super) slab: Option<Slab>,
    pub(super) load: Load,
}

enum State {
    Absent,
    Queued(Box<Job>),
    Reading,
    Present(Arc<Slab>),
}

struct Entry {
    state: State,
    bytes: usize,
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

/// What becomes of a load after a chunk.
pub(super) enum Next {
    Continue(Box<Job>),
    /// Put back or given up.
    Stop,
}

/// What a request finds.
pub(super) enum Found {
    Here(Arc<Slab>),
    Failed(ExpertFault),
    NotYet,
}

/// Slabs, and who is in them.
pub(super) struct Room {
    budget: usize,
    held: usize,
    peak: usize,
    /// Bytes being read or pinned.
    locked: usize,
    /// Bytes of residents that are not pinned.
    resting: usize,
    /// Slabs that nobody is in, by size.
    spare: Vec<(usize, Vec<Slab>)>,
    entries: Vec<Entry>,
    lists: Lists,
    /// Keys being read, at most as many as there are readers.
    reading: Vec<usize>,
    /// Residents whose room was lent.
    pub(super) lent: u64,
    pub(super) prefetch: PrefetchStatistics,
}

impl Room {
    /// Room for `budget` bytes; an expert, by its key, takes a slab of so many.
    pub(super) fn new(budget: usize, bytes: impl Iterator<Item = usize>) -> Self {
        let absent = |bytes| Entry {
            state: State::Absent,
            bytes,
            pins: 0,
            resident: false,
            ahead: false,
            urgent: false,
            cancelled: false,
            failure: None,
        };
        let entries: Vec<Entry> = bytes.map(absent).collect();
        let lists = Lists::new(entries.len(), LISTS);
        let (spare, reading, prefetch) = (Vec::new(), Vec::new(), PrefetchStatistics::default());
        Self { budget, held: 0, peak: 0, locked: 0, resting: 0, spare, entries, lists, reading, lent: 0, prefetch }
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
    /// With `stream`, a number of bytes, they may be fewer than all, and residents are lent only up to that; without, it is all or
    /// none. Returns how many.
    pub(super) fn reserve(&mut self, keys: &[usize], stream: Option<usize>) -> usize {
        let (mut need, mut more, mut more_free, mut count) = (0, 0, 0, 0);
        let most = stream.map_or(self.budget, |bytes| bytes.max(self.free()));
        for &key in keys {
            let entry = &self.entries[key];
            match entry.state {
                State::Absent if entry.failure.is_none() => need += entry.bytes,
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
            count += 1;
        }
        if stream.is_none() && count < keys.len() {
            return 0;
        }
        let keys = &keys[..count];
        // What is there first, so that nothing of it has to make room.
        for &key in keys {
            self.pin(key);
        }
        for &key in keys {
            let entry = &self.entries[key];
            if matches!(entry.state, State::Absent) && entry.failure.is_none() {
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
        if !std::mem::replace(&mut entry.urgent, true) && matches!(entry.state, State::Queued(_)) {
            self.lists.push_back(URGENT, key);
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
        let slab = self.take(self.entries[key].bytes);
        let entry = &mut self.entries[key];
        self.locked += entry.bytes;
        entry.state = State::Queued(Box::new(Job { slab, load: Load::default() }));
        (entry.urgent, entry.cancelled) = (urgent, false);
        self.lists.push_back(if urgent { URGENT } else { AHEAD }, key);
    }

    /// Makes room for a slab, of which there must be as much that is not locked; a slab that was there already comes back.
    fn take(&mut self, bytes: usize) -> Option<Slab> {
        loop {
            if let Some((_, slabs)) = self.spare.iter_mut().find(|(size, _)| *size == bytes)
                && let Some(slab) = slabs.pop()
            {
                return Some(slab);
            }
            if self.held + bytes <= self.budget {
                self.held += bytes;
                self.peak = self.peak.max(self.held);
                return None;
            }
            // Of another size: the slab goes before its bytes are counted as gone.
            if let Some((size, slabs)) = self.spare.iter_mut().find(|(_, slabs)| !slabs.is_empty()) {
                slabs.pop();
                self.held -= *size;
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
        if let State::Present(slab) = std::mem::replace(&mut entry.state, State::Absent) {
            // Nobody else has it: it was not pinned.
            let bytes = entry.bytes;
            self.give_back(bytes, Arc::into_inner(slab));
        }
        true
    }

    /// The slab of an expert that is gone, or the promise of one.
    fn give_back(&mut self, bytes: usize, slab: Option<Slab>) {
        let Some(slab) = slab else {
            self.held -= bytes;
            return;
        };
        match self.spare.iter_mut().find(|(size, _)| *size == bytes) {
            Some((_, slabs)) => slabs.push(slab),
            None => self.spare.push((bytes, vec![slab])),
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
            _ => self.entries[key].cancelled = false,
        }
        true
    }

    /// Gives up the read ahead of `key` if nobody waits for it: at once, or after its chunk.
    pub(super) fn cancel(&mut self, key: usize) {
        let entry = &mut self.entries[key];
        if entry.urgent {
            return;
        }
        match std::mem::replace(&mut entry.state, State::Absent) {
            State::Queued(job) => self.give_up(key, job),
            state => {
                entry.cancelled = matches!(state, State::Reading);
                entry.state = state;
            }
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

    fn give_up(&mut self, key: usize, job: Box<Job>) {
        self.lists.remove(key);
        let entry = &mut self.entries[key];
        entry.state = State::Absent;
        entry.cancelled = false;
        self.prefetch.cancelled += u64::from(std::mem::take(&mut entry.ahead));
        let bytes = entry.bytes;
        self.locked -= bytes;
        self.give_back(bytes, job.slab);
    }

    /// Whether a load waits for a reader.
    pub(super) fn is_work_queued(&self) -> bool {
        self.lists.first(URGENT).or(self.lists.first(AHEAD)).is_some()
    }

    /// The load to go on with: urgent ones first, each kind in its order.
    pub(super) fn next(&mut self) -> Option<(usize, Box<Job>)> {
        let key = self.lists.first(URGENT).or_else(|| self.lists.first(AHEAD))?;
        self.lists.remove(key);
        let entry = &mut self.entries[key];
        match std::mem::replace(&mut entry.state, State::Reading) {
            State::Queued(job) => {
                self.reading.push(key);
                Some((key, job))
            }
            state => {
                entry.state = state;
                None
            }
        }
    }

    /// No reader reads `key` any more.
    fn stopped(&mut self, key: usize) {
        self.reading.retain(|&reading| reading != key);
    }

    /// A chunk has been read and is not the last: whether to go on.
    pub(super) fn after_chunk(&mut self, key: usize, job: Box<Job>) -> Next {
        let entry = &mut self.entries[key];
        if !entry.cancelled && (entry.urgent || self.lists.first(URGENT).is_none()) {
            return Next::Continue(job);
        }
        self.stopped(key);
        let entry = &mut self.entries[key];
        if entry.cancelled {
            self.give_up(key, job);
            return Next::Stop;
        }
        entry.state = State::Queued(job);
        self.lists.push_front(AHEAD, key);
        Next::Stop
    }

    /// A load is done.
    pub(super) fn finish(&mut self, key: usize, job: Box<Job>, result: Result<(), ExpertFault>) {
        self.stopped(key);
        let entry = &mut self.entries[key];
        entry.cancelled = false;
        let bytes = entry.bytes;
        match (result, job.slab) {
            (Ok(()), Some(slab)) => {
                entry.state = State::Present(Arc::new(slab));
                if entry.pins == 0 {
                    self.locked -= bytes;
                    self.rest(key);
                }
            }
            (result, slab) => {
                entry.state = State::Absent;
                entry.failure = result.err().filter(|_| entry.pins > 0);
                self.prefetch.wasted += u64::from(std::mem::take(&mut entry.ahead));
                self.locked -= bytes;
                self.give_back(bytes, slab);
            }
        }
    }
}
