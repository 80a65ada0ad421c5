//! The transformer around the MoE layer: embedding, blocks of attention and MoE or a dense FFN, final norm, output weights.
//!
//! `[batch, positions]` token ids to `[batch, positions, vocab]` logits. What varies between families is data in
//! [`ModelSpec`]. Knows nothing of `config.json` keys or of how logits are scored.

mod batch;
mod builder;
mod by_candle;
mod by_engine;
mod checked;
mod finite;
pub(crate) mod generation;
mod load;
mod lookahead;
pub(crate) mod memory;
pub(crate) mod model;
mod moe_step;
mod options;
pub(crate) mod sampling;
mod seen;
mod state;
#[cfg(test)]
mod tests;
pub(crate) mod tokenizer;
pub(crate) mod unstacked;

pub use self::generation::{GenerateOptions, Generation, generate, generate_batch};
pub use self::memory::ExpertMemory;
pub use self::model::Model;
pub use self::sampling::Sampler;
pub use self::tokenizer::Continuation;
pub use self::unstacked::unstacked_var_builder;

pub use self::batch::Batch;
pub use self::builder::var_builder;
pub use self::options::LoadOptions;
pub use self::state::{DecoderState, Slots};

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::Checkpoint;
use crate::decoder::by_candle::{ByCandle, last_states};
use crate::decoder::by_engine::kept::Scratch;
use crate::decoder::by_engine::{Block, ByEngine, Part};
use crate::decoder::checked::Checks;
use crate::decoder::finite::Place;
use crate::decoder::lookahead::{Lookahead, Pass};
use crate::decoder::seen::Seen;
use crate::decoder::state::Kept;
use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::experts::threads::awake;
use crate::layer::MoeLayer;
use crate::offload::admission::Admission;
use crate::offload::cache::{ExpertCache, Prefetch};
use crate::offload::cached::CachedExperts;
use crate::offload::residency::Policy;
use crate::parallel::ExpertParallel;
use crate::routing::assignment::check_top_k;
use crate::routing::capacity::CapacityRule;
use crate::routing::layer::Buffers;
use crate::routing::router::{RouteState, Router};
use crate::spec::ModelSpec;

/// A decoder-only transformer with MoE layers; clones share weights.
#[derive(Clone)]
pub struct Decoder {
    spec: ModelSpec,
    body: Body,
    /// Where the weights came from, for errors that name one.
    checkpoint: Option<Arc<Checkpoint>>,
    /// Its experts are over the ranks of a job.
    parallel: Option<ExpertParallel>,
}

/// Which way the blocks run.
#[derive(Clone)]
enum Body {
    /// Candle's operations.
    ByCandle(ByCandle),
    /// The expert engine, on the CPU without gradients.
    ByEngine(Box<ByEngine>),
}

/// Hidden states of a pass; those of the engine are in its scratch.
enum Hidden {
    Tensor(Tensor),
    Rows,
}

impl Decoder {
    /// Sizes and family.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The cache that its experts are in, if they are.
    pub fn expert_cache(&self) -> Option<&Arc<ExpertCache>> {
        self.moe_layers().find_map(MoeLayer::cached).map(CachedExperts::cache)
    }

    /// Has the experts of all layers come from another cache; clones of the decoder keep theirs.
    ///
    /// # Errors
    /// As [`MoeLayer::new`].
    pub(crate) fn set_expert_cache(&mut self, cache: &Arc<ExpertCache>) -> Result<()> {
        let layers = self.moe_layers_mut().enumerate();
        layers.into_iter().try_for_each(|(at, layer)| layer.set_cached(CachedExperts::new(cache.clone(), at)))
    }

    /// Over which ranks its experts are, if they are over several processes.
    pub fn parallel(&self) -> Option<&ExpertParallel> {
        self.parallel.as_ref()
    }

    /// The sequences of a batch that this process runs: all of them unless its experts are over ranks and there are as many sequences.
    pub fn own_sequences(&self, batch: &Batch) -> Range<usize> {
        let Some(parallel) = &self.parallel else { return 0..batch.sequences() };
        let rows = parallel.share(batch.sequences(), batch.positions()).rows_of(parallel.ranks().rank());
        rows.start / batch.positions()..rows.end / batch.positions()
    }

    /// The MoE layers, of all blocks that have one.
    pub fn moe_layers(&self) -> impl Iterator<Item = &MoeLayer> {
        let (tensors, rows) = match &self.body {
            Body::ByCandle(body) => (Some(body.moe_layers()), None),
            Body::ByEngine(body) => (None, Some(body.blocks.iter().filter_map(Block::moe))),
        };
        tensors.into_iter().flatten().chain(rows.into_iter().flatten())
    }

    /// The MoE layers, to be changed.
    pub fn moe_layers_mut(&mut self) -> impl Iterator<Item = &mut MoeLayer> {
        let (tensors, rows) = match &mut self.body {
            Body::ByCandle(body) => (Some(body.moe_layers_mut()), None),
            Body::ByEngine(body) => (None, Some(body.blocks.iter_mut().filter_map(Block::moe_mut))),
        };
        tensors.into_iter().flatten().chain(rows.into_iter().flatten())
    }

    /// Sets the router of every layer.
    pub fn set_router(&mut self, router: Arc<dyn Router>) {
        self.moe_layers_mut().for_each(|layer| layer.set_router(router.clone()));
    }

    /// Sets the rule that limits the router in every layer; `None` for no limit. A router that keeps within none gives an error when
    /// the model runs, and so does one that has placements for another number of layers.
    pub fn set_capacity(&mut self, rule: Option<CapacityRule>) {
        let layers = self.spec.moe_layers();
        // The rule of all layers is none for any of them, and says so when it is asked.
        let of_layer = |layer, rule: &CapacityRule| rule.of_layer(layer, layers).unwrap_or_else(|_| rule.clone());
        let each = self.moe_layers_mut().enumerate();
        each.for_each(|(at, layer)| layer.set_capacity(rule.as_ref().map(|rule| of_layer(at, rule))));
    }

    /// Sets how many experts a token gets: one number for all MoE layers, or one for each, the first layer's first. The spec says so
    /// afterwards, which a layer that is set by itself does not see to; a text of its own numbers has them in its
    /// [state](DecoderState::top_k).
    ///
    /// # Errors
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`], [`Error::Shape`] for another count of numbers; nothing has changed then.
    pub fn set_top_k(&mut self, top_k: &[usize]) -> Result<()> {
        self.check_top_k("top_k", top_k)?;
        let (first, each) = (top_k.first().copied().unwrap_or_default(), top_k.iter().cycle());
        self.moe_layers_mut().zip(each).try_for_each(|(layer, &top_k)| layer.set_top_k(top_k))?;
        let is_one = top_k.iter().all(|&top_k| top_k == first);
        self.spec.layer_top_k = if is_one { Vec::new() } else { top_k.to_vec() };
        self.spec.moe.top_k = top_k.iter().copied().max().unwrap_or(first);
        Ok(())
    }

    /// Checks numbers of experts that a token is to get, one or one a layer.
    fn check_top_k(&self, what: &'static str, top_k: &[usize]) -> Result<()> {
        let layers = self.spec.moe_layers();
        if top_k.len() != 1 && top_k.len() != layers {
            let expected = format!("one number, or one for each of {layers} MoE layers");
            return Err(Error::shape(what, expected, format!("{} numbers", top_k.len())));
        }
        top_k.iter().try_for_each(|&top_k| check_top_k(top_k, self.spec.moe.experts))
    }

    /// A fresh state that keeps keys and values, or the state of a recurrence, for generating one text or a batch of them token by token.
    pub fn generation_state(&self) -> DecoderState {
        let kept = match &self.body {
            Body::ByCandle(body) => Kept::Tensors(body.kept()),
            Body::ByEngine(body) => Kept::Blocks(body.kept()),
        };
        DecoderState { kv: Some(kept), ..self.batch_state() }
    }

    /// An empty memory with room for `cached` experts of each MoE layer (blocks without experts have none), for
    /// [`DecoderState::with_memory`].
    ///
    /// # Errors
    /// As [`ExpertMemory::new`].
    pub fn expert_memory(&self, cached: usize, policy: Policy, admission: Admission) -> Result<ExpertMemory> {
        ExpertMemory::new(self.spec.moe_layers(), self.spec.moe.experts, cached, policy, admission)
    }

    /// A fresh state that keeps none, for batches of independent texts.
    pub fn batch_state(&self) -> DecoderState {
        let prefetch = self.expert_cache().map_or(Prefetch::Off, |cache| cache.options().prefetch);
        DecoderState {
            top_k: Vec::new(),
            kv: None,
            seen: Seen::default(),
            mark: None,
            torn: false,
            routes: vec![RouteState::default(); self.spec.moe_layers()],
            memory: None,
            resident: ExpertSet::default(),
            lookahead: Lookahead::new(prefetch),
            step: 0,
            buffers: Buffers::default(),
            scratch: Scratch::default(),
            slots: Slots::default(),
            routed: None,
        }
    }

    /// Logits `[sequences, positions, vocab]` of `batch`, all finite; with experts over ranks those of the [own sequences](Decoder::own_sequences) alone. A forward pass that failed on
    /// its way leaves keys and values, or states, of some blocks alone: the state then refuses to go on. What the routers saw and did is there afterwards
    /// where the state [keeps it](DecoderState::keeping_routed).
    ///
    /// # Errors
    /// [`Error::Parameter`] for a token id outside the vocabulary or a text longer than the model's positions,
    /// [`Error::Shape`] for other sequences than those whose keys and values are kept or for the state of a decoder with other layers,
    /// [`Error::NonFinite`] where weights or an overflow give what is no number, naming the block and, where it is known, the tensor;
    /// whatever a layer reports.
    pub fn forward(&self, batch: &Batch, state: &mut DecoderState) -> Result<Tensor> {
        state.begin_pass();
        let own = self.own_sequences(batch);
        let rows = own.start * batch.positions()..own.end * batch.positions();
        let run = |state: &mut DecoderState| {
            let hidden = self.hidden_states(batch, state)?;
            self.logits(&hidden, batch, rows, &state.scratch)
        };
        let logits = self.run(batch, state, run)?;
        Ok(logits.reshape((own.len(), batch.positions(), self.spec.vocab))?)
    }

    /// Logits `[sequences, vocab]` of each sequence's last token in `batch` alone: what generation needs. Those of a sequence without a
    /// token in it mean nothing.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub(crate) fn forward_last(&self, batch: &Batch, state: &mut DecoderState) -> Result<Tensor> {
        state.begin_pass();
        let last: Vec<usize> = (0..batch.sequences()).map(|row| last_row(batch, row)).collect();
        self.run(batch, state, |state| {
            let hidden = self.hidden_states(batch, state)?;
            self.all_logits(&hidden, batch, &last, &state.scratch)
        })
    }

    /// Runs a pass of `batch`. The stages of a decode step are short, so that threads stay awake between them; messages between ranks want the one
    /// thread that this is.
    fn run(
        &self,
        batch: &Batch,
        state: &mut DecoderState,
        pass: impl FnOnce(&mut DecoderState) -> Result<Tensor> + Send,
    ) -> Result<Tensor> {
        let is_step = state.keeps_text() && batch.ids().len() <= DECODE_TOKENS;
        let is_short = is_step && self.spec.active_parameters() >= WORTH_STAYING_AWAKE;
        match self.body {
            Body::ByEngine(_) if is_short && self.parallel.is_none() => awake(|| pass(state)),
            _ => pass(state),
        }
    }

    /// Logits of some rows of `batch`, `[rows, vocab]`, on every rank those of all.
    fn all_logits(&self, hidden: &Hidden, batch: &Batch, rows: &[usize], scratch: &Scratch) -> Result<Tensor> {
        let Some(parallel) = &self.parallel else {
            return self.logits(hidden, batch, rows.iter().copied(), scratch);
        };
        let (share, vocab) = (parallel.share(batch.sequences(), batch.positions()), self.spec.vocab);
        let of =
            |rank: usize| rows.iter().copied().filter(|row| share.given_by(rank).contains(row)).collect::<Vec<_>>();
        let own = of(parallel.ranks().rank());
        let logits = match own.is_empty() {
            true => Vec::new(),
            false => self.logits(hidden, batch, own.into_iter(), scratch)?.flatten_all()?.to_vec1::<f32>()?,
        };
        let counts: Vec<usize> = (0..parallel.ranks().count()).map(|rank| of(rank).len()).collect();
        Ok(Tensor::from_vec(parallel.gather_rows(&logits, &counts, vocab)?, (rows.len(), vocab), &Device::Cpu)?)
    }

    /// The same for prompts of any length: they go through in chunks of at most `chunk_tokens` tokens (padding counted, at least one
    /// position), so that memory beside weights, keys and values does not grow with their square.
    ///
    /// Without a limit logits are those of one pass. A chunk is a batch: capacities are of its tokens, and it is a
    /// step of a memory of experts.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; [`Error::Shape`] for a state that keeps no keys and values, where there are several chunks.
    pub fn prefill(&self, batch: &Batch, chunk_tokens: usize, state: &mut DecoderState) -> Result<Tensor> {
        let positions = batch.chunk_positions(chunk_tokens);
        if batch.positions() <= positions {
            return self.forward_last(batch, state);
        }
        if !state.keeps_text() {
            return Err(Error::shape("decoder state", "one that keeps keys and values", "one that keeps none"));
        }
        // Before the first chunk changes anything.
        state.seen.starts(batch, self.spec.max_positions)?;
        state.begin_pass();
        let mut last = vec![None; batch.sequences()];
        for (chunk, start) in batch.chunks(chunk_tokens).zip((0..).step_by(positions)) {
            let hidden = self.hidden_states(&chunk, state)?;
            let ends = start + 1..=start + chunk.positions();
            let ended = |row: &usize| ends.contains(&batch.lengths()[*row].max(1));
            for row in (0..batch.sequences()).filter(ended) {
                last[row] = Some(self.all_logits(&hidden, &chunk, &[last_row(&chunk, row)], &state.scratch)?);
            }
        }
        let last: Vec<Tensor> = last.into_iter().flatten().collect();
        Ok(Tensor::cat(&last, 0)?)
    }

    /// What an error is made of.
    fn checks(&self) -> Checks<'_> {
        let dtype = match &self.body {
            Body::ByCandle(body) => body.dtype(),
            Body::ByEngine(_) => DType::F32,
        };
        Checks { spec: &self.spec, checkpoint: self.checkpoint.as_deref(), dtype }
    }

    /// What the output weights make of some rows of hidden states, `[rows, vocab]`; of this rank's own where these are over several.
    fn logits(
        &self,
        hidden: &Hidden,
        batch: &Batch,
        rows: impl ExactSizeIterator<Item = usize>,
        scratch: &Scratch,
    ) -> Result<Tensor> {
        let (scale, vocab, count) = (self.spec.multipliers.logits, self.spec.vocab, rows.len());
        match (&self.body, hidden) {
            (Body::ByEngine(body), Hidden::Rows) => {
                let (width, all) = (self.spec.moe.hidden, scratch.hidden());
                let first = self.own_sequences(batch).start * batch.positions();
                let logits = match count * width == all.len() {
                    true => body.logits(all, scale, vocab)?,
                    false => {
                        let row = |row: usize| &all[(row - first) * width..][..width];
                        let some: Vec<f32> = rows.flat_map(row).copied().collect();
                        body.logits(&some, scale, vocab)?
                    }
                };
                self.checks().check_rows(Place::Output, &logits)?;
                Ok(Tensor::from_vec(logits, (count, vocab), &Device::Cpu)?)
            }
            (Body::ByCandle(body), Hidden::Tensor(hidden)) => {
                let hidden = match count == batch.ids().len() {
                    true => hidden.flatten_to(1)?,
                    false => last_states(hidden, rows)?,
                };
                let logits = body.logits(&hidden, scale)?;
                self.checks().check_logits(&logits)?;
                Ok(logits)
            }
            _ => Err(Error::shape("hidden states", "those of the decoder's own blocks", "others")),
        }
    }

    /// The hidden states that the output weights see.
    fn hidden_states(&self, batch: &Batch, state: &mut DecoderState) -> Result<Hidden> {
        if let Some(id) = batch.ids().iter().find(|&&id| id as usize >= self.spec.vocab) {
            return Err(Error::parameter("token id", id, format!("below the vocabulary's {}", self.spec.vocab)));
        }
        let moe_layers = self.spec.moe_layers();
        if state.routes.len() != moe_layers {
            let layers = |count: usize| format!("{count} layers");
            return Err(Error::shape("decoder state", layers(moe_layers), layers(state.routes.len())));
        }
        if let Some(kept) = &state.kv {
            let blocks = |count: usize| format!("what {count} blocks keep");
            if kept.layers() != self.spec.layers {
                return Err(Error::shape("decoder state", blocks(self.spec.layers), blocks(kept.layers())));
            }
            let is_ours = match (&self.body, kept) {
                (Body::ByEngine(body), Kept::Blocks(kept)) => body.is_of(kept),
                (Body::ByCandle(body), Kept::Tensors(kept)) => body.is_of(kept),
                _ => false,
            };
            if !is_ours {
                let expected = "what such blocks as the model has keep, kept as it keeps them";
                return Err(Error::shape("decoder state", expected, "those of another decoder"));
            }
        }
        if state.memory.is_some() && self.expert_cache().is_some() {
            return Err(Error::shape("expert memory", "none beside an expert cache, which keeps its own", "one"));
        }
        if let Some(memory) = &state.memory {
            let sizes = |layers: usize, experts: usize| format!("{layers} layers of {experts} experts");
            let (got, expected) = ((memory.layers(), memory.experts()), (moe_layers, self.spec.moe.experts));
            if got != expected {
                return Err(Error::shape("expert memory", sizes(expected.0, expected.1), sizes(got.0, got.1)));
            }
        }
        if !state.top_k.is_empty() {
            self.check_top_k("top_k of the decoder state", &state.top_k)?;
        }
        if state.torn {
            return Err(Error::shape("decoder state", TORN_NEEDS, "one whose last forward pass failed"));
        }
        let starts = state.seen.starts(batch, self.spec.max_positions)?;
        state.torn = state.kv.is_some();
        // A batch uses most experts anyway.
        let is_decode = state.kv.is_some() && batch.ids().len() <= DECODE_TOKENS;
        let pass = if is_decode { state.lookahead.begin() } else { Pass::PLAIN };
        let checks = self.checks();
        let hidden = match &self.body {
            Body::ByCandle(body) => Hidden::Tensor(body.hidden_states(checks, batch, &starts, pass, state)?),
            Body::ByEngine(body) => {
                let mut scratch = std::mem::take(&mut state.scratch);
                let share = self.parallel.as_ref().map(|all| all.share(batch.sequences(), batch.positions()));
                let own = self.own_sequences(batch);
                let part = (own.len() < batch.sequences()).then(|| batch.part(own.clone()));
                let own_batch = part.as_ref().unwrap_or(batch);
                let part = Part { batch: own_batch, whole: batch, share: share.as_ref(), starts: &starts[own] };
                let done = body.hidden_states(checks, part, pass, state, &mut scratch);
                state.scratch = scratch;
                done?;
                Hidden::Rows
            }
        };
        state.step = state.step.saturating_add(1);
        if state.kv.is_some() {
            state.seen.add(batch);
        }
        state.torn = false;
        if is_decode {
            state.lookahead.end(pass);
        }
        Ok(hidden)
    }
}

/// What it is and how its layers route, without its weights.
impl std::fmt::Debug for Decoder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut decoder = formatter.debug_struct("Decoder");
        decoder.field("spec", &self.spec).field("first_layer", &self.moe_layers().next()).finish_non_exhaustive()
    }
}

/// Tokens of a forward pass that reads ahead, at most.
const DECODE_TOKENS: usize = 4;

/// Weights of a token's pass from which its stages are worth several threads, and those worth being kept awake.
const WORTH_STAYING_AWAKE: usize = 1 << 25;

/// What a state needs to go on with its text.
const TORN_NEEDS: &str = "a text that all blocks have seen (`truncate(0)` begins another)";

/// The row of a sequence's last token in `batch`.
fn last_row(batch: &Batch, sequence: usize) -> usize {
    sequence * batch.positions() + batch.lengths()[sequence].max(1) - 1
}
