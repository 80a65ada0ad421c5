//! The expert cache: some experts of an [`ExpertStore`] in memory, within a budget of bytes that is never exceeded.
//!
//! A layer's step asks for the experts it uses, [`ExpertCache::run`]: the logical resident set advances, what is missing is read by
//! background threads, and the step's work runs on experts that stay where they are until it returns. Where a step uses more
//! experts than its room holds they are streamed: the work runs several times, on one group after another, in ascending order.
//!
//! ```text
//! run(layer, experts) -> Residency::page -> Room::reserve -> readers -> work(group) .. -> Room::unpin
//! ```
//!
//! The logical set decides what routers see and advances in the order of requests, never by the arrival of a read: same requests,
//! same decisions. Bytes follow it. They may differ for a while: an expert that left may still be in memory, and then nothing is read
//! at its next miss; one whose room a stream has lent is read again at its next hit.
//!
//! Requests of several threads get room whole and in their order, so none waits for a part that another one has. A failed read is
//! an error for those who need that expert, and for nobody else; the next request reads again.
//!
//! ```
//! # use phase_moe::Result;
//! # fn run(weights: &phase_moe::Weights) -> Result<()> {
//! use std::sync::Arc;
//! use phase_moe::{CacheOptions, ExpertCache, ExpertId, ExpertSet};
//! use phase_moe::offload::Part;
//!
//! let experts = weights.spec()?.moe.experts;
//! let cache = ExpertCache::new(Arc::new(weights.expert_store()?), CacheOptions::new(1 << 30))?;
//! let mut wanted = ExpertSet::new(experts)?;
//! wanted.insert(ExpertId::new(3, experts)?);
//! cache.run(0, &wanted, |loaded| {
//!     for (id, expert) in loaded {
//!         println!("{}: {:?}", id.index(), expert.matrix(Part::Up));
//!     }
//!     Ok(())
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! Knows nothing of what experts compute, nor of which ones will be used next.

mod loading;
mod logical;
mod options;
mod reader;
mod room;
mod shared;
mod statistics;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::logical::Logical;
pub use self::options::{CacheOptions, Prefetch, Scope};
use self::room::{Found, Room};
use self::shared::{CacheState, Shared};
pub use self::statistics::{PrefetchStatistics, Statistics, StreamWarning};
use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};
use crate::offload::residency::{Paging, Step};
use crate::offload::slab::Slab;
use crate::offload::store::{ExpertStore, LoadedExpert};

/// Experts in memory, within a budget.
pub struct ExpertCache {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
    options: CacheOptions,
}

impl ExpertCache {
    /// An empty cache over a store.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a budget below the largest expert and what is set aside, and for no readers; [`Error::ExpertCount`] for more
    /// experts than a global scope can count; [`Error::Io`] when no thread can be had.
    pub fn new(store: Arc<ExpertStore>, options: CacheOptions) -> Result<Self> {
        let CacheOptions { budget_bytes, spare_bytes, readers, .. } = options;
        let largest = (0..store.layers()).map(|layer| store.slab_bytes(layer)).max().unwrap_or(0);
        let room = budget_bytes.checked_sub(spare_bytes).filter(|&room| room >= largest);
        let Some(room) = room else {
            let expected = format!("at least {largest} bytes, the largest expert, and {spare_bytes} to spare");
            return Err(Error::parameter("expert cache budget", format!("{budget_bytes} bytes"), expected));
        };
        if readers == 0 {
            return Err(Error::parameter("expert readers", readers, "at least 1"));
        }
        let logical = Logical::new(&store, room, options)?;
        let keys = (0..store.layers()).flat_map(|layer| store.keys(layer));
        let state = CacheState {
            logical,
            room: Room::new(budget_bytes, keys.map(|key| store.slab_bytes_of(key))),
            paging: Paging::default(),
            statistics: Statistics::default(),
            warning: None,
            tickets: 0,
            served: 0,
            stop: false,
        };
        let [work, done, space] = [(); 3].map(|()| Condvar::new());
        let shared = Arc::new(Shared { store, state: Mutex::new(state), work, done, space });
        let mut cache = Self { shared, readers: Vec::with_capacity(readers), options };
        for _ in 0..readers {
            let shared = cache.shared.clone();
            let thread = std::thread::Builder::new().name("expert-reader".into());
            let thread = thread.spawn(move || reader::run(&shared));
            cache.readers.push(thread.map_err(|error| Error::io("a thread to read experts", error))?);
        }
        Ok(cache)
    }

    /// Where the experts come from.
    pub(crate) fn store(&self) -> &Arc<ExpertStore> {
        &self.shared.store
    }

    /// How it was made.
    pub(crate) fn options(&self) -> CacheOptions {
        self.options
    }

    /// Experts that stay, of a layer or with [`Scope::Global`] of all layers together; 0 for a layer that is not there.
    pub fn capacity(&self, layer: usize) -> usize {
        self.shared.lock().logical.capacity(layer)
    }

    /// The experts of a layer that are logically resident.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that is not there.
    pub(crate) fn resident(&self, layer: usize) -> Result<ExpertSet> {
        Ok(self.shared.lock().logical.resident(layer)?.clone())
    }

    /// The experts of a layer that a router should count as resident, in place of what `set` held: those that are, and all of them
    /// while there is room. For then each that is read stays, and to prefer another one would save nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that there is not.
    pub(crate) fn counted_into(&self, layer: usize, set: &mut ExpertSet) -> Result<()> {
        let state = self.shared.lock();
        let counted = state.logical.counted(layer)?;
        set.reset(counted.experts())?;
        set.insert_missing(counted, None);
        Ok(())
    }

    /// One step of a layer that uses the experts `wanted`: runs `work` once on all of them, in ascending order, or several times on
    /// groups that follow each other in that order and together are all of them, where they are more than there is room for.
    /// Returns what the step did to the logical set, which has advanced even where a read or the work fails.
    ///
    /// `work` must not run another step of the same cache: it holds room that the other one may wait for.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that is not there or a set of another one, [`Error::Expert`] when one of them cannot be read, and what
    /// `work` reports.
    pub fn run(
        &self,
        layer: usize,
        wanted: &ExpertSet,
        mut work: impl FnMut(&[(ExpertId, LoadedExpert<'_>)]) -> Result<()>,
    ) -> Result<Step> {
        let store = &self.shared.store;
        let first = store.keys(layer).start;
        let ids: Vec<ExpertId> = wanted.iter().collect();
        let keys: Vec<usize> = ids.iter().map(|id| first + id.index()).collect();
        let mut state = self.shared.lock();
        let (step, streams) = state.advance(store, layer, wanted)?;
        let stream = streams.then(|| self.options.room_to_read(store, layer));
        let (mut state, mut start) = (Some(state), 0);
        while start < keys.len() {
            let pinned = self.pin(state.take().unwrap_or_else(|| self.shared.lock()), &keys[start..], stream)?;
            let slabs = pinned.keys.iter().zip(&pinned.slabs).map(|(&key, slab)| store.view(key, slab));
            let group: Vec<_> = ids[start..].iter().copied().zip(slabs).collect();
            work(&group)?;
            start += group.len();
        }
        Ok(step)
    }

    /// Reads experts of a layer ahead, in ascending order, as long as there is room that no resident has; urgent reads go first.
    /// Returns how many of them are there or on their way. The logical set does not change until a step uses them.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that is not there or a set of another one.
    pub fn prefetch(&self, layer: usize, experts: &ExpertSet) -> Result<usize> {
        let mut state = self.shared.lock();
        state.logical.check(layer, experts)?;
        // Those who wait for room come first.
        if state.tickets > state.served {
            return Ok(0);
        }
        let first = self.shared.store.keys(layer).start;
        let count = experts.iter().take_while(|id| state.room.read_ahead(first + id.index())).count();
        self.shared.wake_reader(&state);
        Ok(count)
    }

    /// Gives up the reads ahead of a layer that are not done and that nobody waits for.
    pub(crate) fn cancel_prefetch(&self, layer: usize) {
        let mut state = self.shared.lock();
        self.shared.store.keys(layer).for_each(|key| state.room.cancel(key));
        self.shared.space.notify_all();
    }

    /// Makes the logical set what it was at first, empty, so that what is measured next does not depend on what was before. Bytes
    /// stay until their room is needed, and statistics go on.
    ///
    /// # Errors
    /// None that [`ExpertCache::new`] has not reported.
    pub(crate) fn forget(&self) -> Result<()> {
        let (store, CacheOptions { budget_bytes, spare_bytes, .. }) = (&self.shared.store, self.options);
        let logical = Logical::new(store, budget_bytes - spare_bytes, self.options)?;
        let mut state = self.shared.lock();
        state.logical = logical;
        for key in (0..store.layers()).flat_map(|layer| store.keys(layer)) {
            state.room.set_resident(key, false);
        }
        Ok(())
    }

    /// What it did so far.
    pub fn statistics(&self) -> Statistics {
        let state = self.shared.lock();
        let Statistics { hits, misses, .. } = state.statistics;
        Statistics {
            requests: hits + misses,
            prefetch: state.room.prefetch,
            bytes: state.room.held(),
            peak_bytes: state.room.peak(),
            lent: state.room.lent,
            ..state.statistics
        }
    }

    /// The first step that had to be streamed, once: for callers to tell their users.
    pub fn take_warning(&self) -> Option<StreamWarning> {
        self.shared.lock().warning.take()
    }

    /// Waits for room for as many of `keys` as a round can have, and for their reads.
    fn pin<'a>(
        &'a self,
        state: MutexGuard<'a, CacheState>,
        keys: &'a [usize],
        stream: Option<usize>,
    ) -> Result<Pinned<'a>> {
        let shared = &*self.shared;
        let (mut state, count, mut waiting) = self.reserve(state, keys, stream);
        let mut pinned = Pinned { shared, keys: &keys[..count], slabs: Vec::with_capacity(count) };
        let mut result = Ok(());
        while let Some(&key) = pinned.keys.get(pinned.slabs.len()) {
            match state.room.find(key) {
                Found::Here(slab) => pinned.slabs.push(slab),
                Found::Failed(fault) => {
                    result = Err(Error::Expert(fault));
                    break;
                }
                Found::NotYet => {
                    waiting.get_or_insert_with(Instant::now);
                    state = match state.room.next_urgent() {
                        Some((key, job)) => {
                            shared.wake_reader(&state);
                            drop(state);
                            reader::read(shared, key, job)
                        }
                        None => shared.wait(&shared.done, state),
                    };
                }
            }
        }
        state.statistics.waiting += waiting.map_or(Duration::ZERO, |since| since.elapsed());
        // Who waits reads too, but what comes after this group, or after a fault, is for others.
        shared.wake_reader(&state);
        // Letting go of what is pinned takes the lock.
        drop(state);
        result.map(|()| pinned)
    }

    /// Waits for room, behind those who asked before; returns how many of `keys` have got it, and since when it waited.
    fn reserve<'a>(
        &'a self,
        mut state: MutexGuard<'a, CacheState>,
        keys: &[usize],
        stream: Option<usize>,
    ) -> (MutexGuard<'a, CacheState>, usize, Option<Instant>) {
        let (ticket, mut since) = (state.tickets, None);
        state.tickets += 1;
        loop {
            if state.served == ticket {
                let mut count = state.room.reserve(keys, stream);
                if count == 0 {
                    state.room.cancel_all();
                    count = state.room.reserve(keys, stream);
                }
                if count > 0 {
                    state.served += 1;
                    state.statistics.streamed_rounds += u64::from(stream.is_some());
                    self.shared.space.notify_all();
                    return (state, count, since);
                }
            }
            since.get_or_insert_with(Instant::now);
            state = self.shared.wait(&self.shared.space, state);
        }
    }
}

impl CacheState {
    /// Advances the logical set, and tells the room; returns what the step did, and whether it has to be streamed.
    fn advance(&mut self, store: &ExpertStore, layer: usize, wanted: &ExpertSet) -> Result<(Step, bool)> {
        let Self { logical, room, paging, statistics, warning, .. } = self;
        let step = logical.page(layer, wanted, paging)?;
        for &(layer, expert) in &paging.out {
            room.set_resident(store.keys(layer).start + expert.index(), false);
        }
        let first = store.keys(layer).start;
        for expert in paging.urgent.iter().filter(|&expert| !paging.streamed.contains(expert)) {
            room.set_resident(first + expert.index(), true);
        }
        statistics.hits += step.hits as u64;
        statistics.misses += step.misses as u64;
        statistics.evictions += step.evictions as u64;
        let streams = !paging.streamed.is_empty();
        if streams {
            let capacity = logical.capacity(layer);
            // What an admission streams is no matter of the budget.
            if wanted.len() > capacity {
                if statistics.streamed_steps == 0 {
                    *warning = Some(StreamWarning { layer, experts: wanted.len(), capacity });
                }
                statistics.streamed_steps += 1;
            }
        }
        Ok((step, streams))
    }
}

/// Experts that a step uses, until it lets go of them.
struct Pinned<'a> {
    shared: &'a Shared,
    keys: &'a [usize],
    slabs: Vec<Arc<Vec<Slab>>>,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        // Before the pins, so that whoever takes the room finds the slabs in no other hands.
        self.slabs.clear();
        let mut state = self.shared.lock();
        self.keys.iter().for_each(|&key| state.room.unpin(key));
        drop(state);
        self.shared.space.notify_all();
    }
}

impl Drop for ExpertCache {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for reader in self.readers.drain(..) {
            // A reader that panicked has nothing more to say.
            let _ = reader.join();
        }
    }
}

impl fmt::Debug for ExpertCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpertCache").field("options", &self.options).field("statistics", &self.statistics()).finish()
    }
}
