//! What an expert cache did, and what its user should be told.

use std::fmt;
use std::time::Duration;

/// What a cache did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Distinct experts of every step: hits + misses.
    pub requests: u64,
    /// Requests whose expert was logically resident.
    pub hits: u64,
    /// Requests whose expert was not.
    pub misses: u64,
    /// Experts that left the logical set.
    pub evictions: u64,
    /// Bytes read, whole pages, reads that were given up or failed later included.
    pub bytes_read: u64,
    /// Reads ahead.
    pub prefetch: PrefetchStatistics,
    /// Time that steps waited for reads or for room, all threads together.
    pub waiting: Duration,
    /// Bytes of slabs now.
    pub bytes: usize,
    /// The most there have been.
    pub peak_bytes: usize,
    /// Steps that used more experts than stay.
    pub streamed_steps: u64,
    /// Groups of experts those steps ran in.
    pub streamed_rounds: u64,
    /// Residents whose room a step took for others, to be read again.
    pub lent: u64,
}

/// A step used more experts than its room holds, so that it had to stream them: right, but slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamWarning {
    /// The step's layer.
    pub layer: usize,
    /// Experts it used.
    pub experts: usize,
    /// Experts that its room holds.
    pub capacity: usize,
}

impl fmt::Display for StreamWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, experts, capacity } = self;
        write!(f, "a step of layer {layer} uses {experts} experts and the cache has room for {capacity}: ")?;
        write!(f, "the rest are read for every such step")
    }
}

/// What happened to reads ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefetchStatistics {
    /// Reads begun ahead of use.
    pub issued: u64,
    /// Those whose expert was used while it was there or on its way.
    pub used: u64,
    /// Those whose expert left unused, or whose read failed.
    pub wasted: u64,
    /// Those given up before they were done.
    pub cancelled: u64,
}
