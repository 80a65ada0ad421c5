//! An expert on its way into memory: its slabs, each read by one reader at a time, until all are there or nobody reads any more.
//!
//! Knows nothing of why it is read, nor of room.

use crate::error::ExpertFault;
use crate::offload::slab::Slab;
use crate::offload::store::Load;

/// The load of one of an expert's slabs, wherever it has come to.
pub(super) struct Job {
    /// Which of the slabs.
    pub(super) at: usize,
    /// `None` until a reader has made it: making a slab takes a while.
    pub(super) slab: Option<Slab>,
    pub(super) load: Load,
}

/// The loads of an expert's slabs.
pub(super) struct Loading {
    /// Those nobody reads; the last one is next.
    waiting: Vec<Job>,
    /// How many are being read.
    reading: usize,
    /// Slabs that are there; others are `None`.
    done: Vec<Option<Slab>>,
    fault: Option<ExpertFault>,
}

impl Loading {
    /// Nothing read yet; into slabs that exist already, or so many new ones.
    pub(super) fn new(slabs: Option<Vec<Slab>>, count: usize) -> Self {
        let mut slabs = slabs.map(Vec::into_iter);
        let job = |at| Job { at, slab: slabs.as_mut().and_then(Iterator::next), load: Load::default() };
        let mut waiting: Vec<Job> = (0..count).map(job).collect();
        waiting.reverse();
        Self { waiting, reading: 0, done: (0..count).map(|_| None).collect(), fault: None }
    }

    /// How many readers are at it.
    pub(super) fn reading(&self) -> usize {
        self.reading
    }

    /// Whether a reader could do something.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty() && self.fault.is_none()
    }

    /// Whether it is over with an error.
    pub(super) fn has_failed(&self) -> bool {
        self.fault.is_some()
    }

    /// The next slab to read.
    pub(super) fn take(&mut self) -> Option<Job> {
        let job = self.waiting.pop();
        self.reading += usize::from(job.is_some());
        job
    }

    /// A reader stops before its slab is there.
    pub(super) fn put_back(&mut self, job: Job) {
        self.reading -= 1;
        self.waiting.push(job);
    }

    /// A reader is done; the first fault stays.
    pub(super) fn finish(&mut self, job: Job, result: Result<(), ExpertFault>) {
        self.reading -= 1;
        match result {
            Ok(()) => self.done[job.at] = job.slab,
            Err(fault) => {
                self.fault.get_or_insert(fault);
                self.waiting.push(job);
            }
        }
    }

    /// The slabs, once all are there.
    pub(super) fn complete(&mut self) -> Option<Vec<Slab>> {
        if !self.done.iter().all(Option::is_some) {
            return None;
        }
        self.done.drain(..).collect()
    }

    /// What it leaves: its slabs where all have been made, and what went wrong. For a load that nobody reads.
    pub(super) fn give_up(self) -> (Option<Vec<Slab>>, Option<ExpertFault>) {
        let Self { waiting, mut done, fault, .. } = self;
        for Job { at, slab, .. } in waiting {
            done[at] = slab;
        }
        (done.into_iter().collect(), fault)
    }
}
