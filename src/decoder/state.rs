//! What a decoder carries from one forward pass to the next.

use super::by_candle::kept::KeptTensors;
use super::by_engine::kept::{KeptBlocks, Scratch};
use super::lookahead::Lookahead;
use super::memory::ExpertMemory;
use super::seen::Seen;
use crate::error::Result;
use crate::expert::ExpertSet;
use crate::layer::Routed;
use crate::routing::assignment::Assignment;
use crate::routing::layer::Buffers;
use crate::routing::router::RouteState;

/// What a decoder carries from one forward pass to the next: keys and values or the state of a recurrence, router state and experts in fast memory per layer.
#[derive(Debug)]
pub struct DecoderState {
    /// Experts a token gets in the passes of this state, whatever the layers are set to: one number for all of them, or one for each;
    /// empty for the layers' own. So one text of a server may have other numbers than the next; a decoder refuses what it has no experts
    /// for.
    pub top_k: Vec<usize>,
    /// Slots of all forward passes so far.
    pub slots: Slots,
    /// `None` keeps no keys and values: each forward pass is a text of its own.
    pub(super) kv: Option<Kept>,
    /// Whose they are.
    pub(super) seen: Seen,
    /// Where the texts were when recurrent states were marked.
    pub(super) mark: Option<Seen>,
    /// A forward pass began to add to them and did not end.
    pub(super) torn: bool,
    pub(super) routes: Vec<RouteState>,
    /// `None` costs nothing.
    pub(super) memory: Option<ExpertMemory>,
    /// What is in an expert cache, as a layer's router sees it.
    pub(super) resident: ExpertSet,
    pub(super) lookahead: Lookahead,
    /// Forward passes so far.
    pub(super) step: u64,
    /// Of all layers, one after the other.
    pub(super) buffers: Buffers,
    pub(super) scratch: Scratch,
    /// What routers saw and did; `None` keeps none.
    pub(super) routed: Option<Vec<Routed>>,
}

/// What all blocks keep, keys and values or the state of a recurrence, as the way that these run wants it.
#[derive(Debug)]
pub(super) enum Kept {
    Tensors(Vec<KeptTensors>),
    Blocks(KeptBlocks),
}

impl Kept {
    /// How many blocks of a decoder it is for.
    pub(super) fn layers(&self) -> usize {
        match self {
            Self::Tensors(kept) => kept.len(),
            Self::Blocks(kept) => kept.layers(),
        }
    }

    /// Whether a block keeps a state that goes back to its mark alone.
    fn is_recurrent(&self) -> bool {
        match self {
            Self::Tensors(kept) => kept.iter().any(KeptTensors::is_recurrent),
            Self::Blocks(kept) => kept.is_recurrent(),
        }
    }

    /// Remembers the recurrent states as they are.
    fn mark(&mut self) {
        match self {
            Self::Tensors(kept) => kept.iter_mut().for_each(KeptTensors::mark),
            Self::Blocks(kept) => kept.mark(),
        }
    }

    /// Gives recurrent states back what they were when they were marked.
    fn go_back(&mut self) {
        match self {
            Self::Tensors(kept) => kept.iter_mut().for_each(KeptTensors::go_back),
            Self::Blocks(kept) => kept.go_back(),
        }
    }
}

/// Slots of all layers and forward passes, padding not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// Slots asked for.
    pub asked: u64,
    /// Slots that got an expert.
    pub kept: u64,
}

impl Slots {
    pub(super) fn count(&mut self, assignment: &Assignment, live_tokens: u64) {
        self.asked += live_tokens * assignment.top_k() as u64;
        self.kept += assignment.kept() as u64;
    }

    /// Those that came after `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self { asked: self.asked - before.asked, kept: self.kept - before.kept }
    }

    /// Kept slots / slots; 1 without any.
    pub fn survival(self) -> f64 {
        if self.asked == 0 { 1.0 } else { self.kept as f64 / self.asked as f64 }
    }
}

impl DecoderState {
    /// Tokens seen so far, of the longest sequence.
    pub fn position(&self) -> usize {
        self.seen.longest()
    }

    /// Tokens seen so far, of each sequence; none before the first.
    pub(crate) fn lengths(&self) -> &[usize] {
        self.seen.lengths()
    }

    /// Experts a token gets in MoE layer `layer`, where this state says so.
    pub(super) fn top_k_of(&self, layer: usize) -> Option<usize> {
        match self.top_k.as_slice() {
            [all] => Some(*all),
            each => each.get(layer).copied(),
        }
    }

    /// True where keys and values are kept: each forward pass goes on with its sequences' texts.
    pub(crate) fn keeps_text(&self) -> bool {
        self.kv.is_some()
    }

    /// The same with experts in fast memory: routers see them, every forward pass advances them. A decoder refuses a memory of
    /// other layers or experts than it has.
    pub fn with_memory(self, memory: ExpertMemory) -> Self {
        Self { memory: Some(memory), ..self }
    }

    /// The same, which from now on keeps what the routers of each forward pass saw and did, for [`DecoderState::routed`].
    pub fn keeping_routed(self) -> Self {
        Self { routed: Some(Vec::new()), ..self }
    }

    /// What the router of each MoE layer saw and did in the last forward pass, first layer first; of a prompt in chunks, chunk after
    /// chunk. Empty unless the state [keeps it](DecoderState::keeping_routed).
    pub fn routed(&self) -> &[Routed] {
        self.routed.as_deref().unwrap_or_default()
    }

    /// Another forward pass begins.
    pub(super) fn begin_pass(&mut self) {
        self.routed.iter_mut().for_each(Vec::clear);
    }

    /// The experts in fast memory, where account is kept of them.
    pub fn memory(&self) -> Option<&ExpertMemory> {
        self.memory.as_ref()
    }

    /// What each layer's router has learnt.
    pub fn routes(&self) -> &[RouteState] {
        &self.routes
    }

    /// Remembers where the texts are now, in place of an earlier mark, so that [`truncate`](DecoderState::truncate) can come back to it: a
    /// copy of the recurrent states ([`ModelSpec::state_numbers`](crate::ModelSpec::state_numbers) in `f32`, for each sequence). Without any,
    /// and after a pass that failed, nothing is done: keys and values go back anywhere.
    pub fn mark(&mut self) {
        if self.torn || self.seen.columns() == 0 {
            return;
        }
        if let Some(kept) = self.kv.as_mut().filter(|kept| kept.is_recurrent()) {
            kept.mark();
            self.mark = Some(self.seen.clone());
        }
    }

    /// Keeps the first `tokens` tokens of each sequence, to go on from there, and says how many of the longest one are kept; with 0 another
    /// text begins. Keys and values of what came after go; router states and the experts in fast memory stay, as in a server. A forward pass
    /// that failed on its way is forgotten with what it had added.
    ///
    /// Where blocks keep a recurrent state (Qwen3.5, LFM2) texts go back to their last [mark](DecoderState::mark), or to their beginning: if
    /// tokens have to go, or a pass failed, every sequence is as it was at the mark, or empty where the mark is of more tokens than are to
    /// be kept.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) where keys and values are Candle's and it refuses to cut them.
    pub fn truncate(&mut self, tokens: usize) -> Result<usize> {
        let goes_back = self.torn || self.seen.longest() > tokens;
        self.mark.take_if(|mark| mark.longest() > tokens);
        match (&mut self.kv, &self.mark) {
            (Some(kept), Some(mark)) if goes_back => {
                kept.go_back();
                self.seen.clone_from(mark);
            }
            (Some(kept), None) if goes_back && kept.is_recurrent() => self.seen.truncate(0),
            _ => self.seen.truncate(tokens),
        }
        if let Some(Kept::Tensors(kept)) = &mut self.kv {
            kept.iter_mut().try_for_each(|kept| kept.cut(self.seen.columns()))?;
        }
        self.torn = false;
        Ok(self.seen.longest())
    }
}
