//! What a decoder carries from one forward pass to the next.

use candle_nn::kv_cache::KvCache;

use super::lookahead::Lookahead;
use super::memory::ExpertMemory;
use super::seen::Seen;
use crate::expert::ExpertSet;
use crate::routing::router::RouteState;

/// What a decoder carries from one forward pass to the next: keys and values, router state and experts in fast memory per layer.
#[derive(Debug)]
pub struct DecoderState {
    /// `None` keeps no keys and values: each forward pass is a text of its own.
    pub(super) kv: Option<Vec<KvCache>>,
    /// Whose they are.
    pub(super) seen: Seen,
    /// A forward pass began to add to them and did not end.
    pub(super) torn: bool,
    pub(super) routes: Vec<RouteState>,
    /// `None` where nobody asks: then it costs nothing.
    pub(super) memory: Option<ExpertMemory>,
    /// What is in an expert cache, as a layer's router sees it.
    pub(super) resident: ExpertSet,
    pub(super) lookahead: Lookahead,
    /// Forward passes so far.
    pub(super) step: u64,
}

impl DecoderState {
    /// Tokens seen so far, of the longest sequence.
    pub fn position(&self) -> usize {
        self.seen.longest()
    }

    /// Tokens seen so far, of each sequence; none before the first.
    pub fn lengths(&self) -> &[usize] {
        self.seen.lengths()
    }

    /// True where keys and values are kept: each forward pass goes on with its sequences' texts.
    pub fn keeps_text(&self) -> bool {
        self.kv.is_some()
    }

    /// The same with experts in fast memory: routers see them, every forward pass advances them. A decoder refuses a memory of
    /// other layers or experts than it has.
    pub fn with_memory(self, memory: ExpertMemory) -> Self {
        Self { memory: Some(memory), ..self }
    }

    /// The experts in fast memory, where somebody keeps account of them.
    pub fn memory(&self) -> Option<&ExpertMemory> {
        self.memory.as_ref()
    }

    /// What each layer's router has learnt.
    pub fn routes(&self) -> &[RouteState] {
        &self.routes
    }

    /// Forward passes so far: the clock of affinities.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Begins another text: keys and values go, router states and the experts in fast memory stay, as in a server.
    pub fn begin_text(&mut self) {
        self.kv.iter_mut().flatten().for_each(KvCache::reset);
        (self.seen, self.torn) = (Seen::default(), false);
    }
}
