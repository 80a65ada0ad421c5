//! The transformer around the MoE layer: embedding, blocks of attention and MoE or a dense FFN, final norm, output weights.
//!
//! `[batch, positions]` token ids to `[batch, positions, vocab]` logits. What varies between families is data in
//! [`ModelSpec`]. Knows nothing of `config.json` keys or of how logits are scored.

mod attention;
mod batch;
mod block;
mod builder;
mod checked;
mod finite;
pub(crate) mod generation;
mod latent;
mod linear;
mod load;
mod lookahead;
pub(crate) mod memory;
pub(crate) mod model;
mod norm;
mod options;
mod rotary;
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

use std::sync::Arc;

use candle_core::{Module, Tensor};
use candle_nn::Embedding;
use candle_nn::kv_cache::KvCache;

use crate::checkpoint::Checkpoint;
use crate::decoder::block::{Block, Ffn};
use crate::decoder::finite::Place;
use crate::decoder::linear::Linear;
use crate::decoder::lookahead::{Lookahead, Pass};
use crate::decoder::norm::Norm;
use crate::decoder::rotary::Rotary;
use crate::decoder::seen::Seen;
use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::layer::cached::CachedExperts;
use crate::layer::{Buffers, MoeLayer};
use crate::offload::admission::Admission;
use crate::offload::cache::{ExpertCache, Prefetch};
use crate::offload::residency::Policy;
use crate::routing::capacity::CapacityRule;
use crate::routing::router::{RouteContext, RouteState, Router};
use crate::spec::{ModelSpec, Multipliers};

/// A decoder-only transformer with MoE layers; clones share weights.
#[derive(Clone)]
pub struct Decoder {
    spec: ModelSpec,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Norm,
    output: Linear,
    /// Where the weights came from, for errors that name one.
    checkpoint: Option<Arc<Checkpoint>>,
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

    /// The MoE layers, of all blocks that have one.
    pub fn moe_layers(&self) -> impl Iterator<Item = &MoeLayer> {
        self.blocks.iter().filter_map(Block::moe)
    }

    /// The MoE layers, to be changed.
    pub fn moe_layers_mut(&mut self) -> impl Iterator<Item = &mut MoeLayer> {
        self.blocks.iter_mut().filter_map(Block::moe_mut)
    }

    /// Sets the router of every layer.
    pub fn set_router(&mut self, router: Arc<dyn Router>) {
        self.moe_layers_mut().for_each(|layer| layer.set_router(router.clone()));
    }

    /// Sets the rule that limits the router in every layer; `None` for no limit. A router that keeps within none gives an error when
    /// the model runs.
    pub fn set_capacity(&mut self, rule: Option<CapacityRule>) {
        self.moe_layers_mut().for_each(|layer| layer.set_capacity(rule.clone()));
    }

    /// Sets how many experts a token gets in every layer.
    ///
    /// # Errors
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`].
    pub fn set_top_k(&mut self, top_k: usize) -> Result<()> {
        self.moe_layers_mut().try_for_each(|layer| layer.set_top_k(top_k))?;
        self.spec.moe.top_k = top_k;
        Ok(())
    }

    /// A fresh state that keeps keys and values, for generating one text or a batch of them token by token.
    pub fn generation_state(&self) -> DecoderState {
        let caches = self.blocks.iter().map(|_| KvCache::new(POSITION_DIM, KV_POSITIONS)).collect();
        DecoderState { kv: Some(caches), ..self.batch_state() }
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
            kv: None,
            seen: Seen::default(),
            torn: false,
            routes: vec![RouteState::default(); self.spec.moe_layers()],
            memory: None,
            resident: ExpertSet::default(),
            lookahead: Lookahead::new(prefetch),
            step: 0,
            buffers: Buffers::default(),
            slots: Slots::default(),
            routed: None,
        }
    }

    /// Logits `[sequences, positions, vocab]` of `batch`, all finite. A forward pass that failed on its way leaves keys and values of some
    /// blocks alone: the state then refuses to go on. What the routers saw and did is there afterwards
    /// where the state [keeps it](DecoderState::keeping_routed).
    ///
    /// # Errors
    /// [`Error::Parameter`] for a token id outside the vocabulary or a text longer than the model's positions,
    /// [`Error::Shape`] for other sequences than those whose keys and values are kept or for the state of a decoder with other layers,
    /// [`Error::NonFinite`] where weights or an overflow give what is no number, naming the block and, where it is known, the tensor;
    /// whatever a layer reports.
    pub fn forward(&self, batch: &Batch, state: &mut DecoderState) -> Result<Tensor> {
        state.begin_pass();
        self.logits(&self.hidden_states(batch, state)?)
    }

    /// Logits `[sequences, vocab]` of each sequence's last token in `batch` alone: what generation needs. Those of a sequence without a
    /// token in it mean nothing.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub(crate) fn forward_last(&self, batch: &Batch, state: &mut DecoderState) -> Result<Tensor> {
        state.begin_pass();
        let hidden = self.hidden_states(batch, state)?;
        let all = 0..batch.sequences();
        self.logits(&last_states(&hidden, batch, all.map(|row| (row, batch.lengths()[row].max(1))))?)
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
                last[row] = Some(last_states(&hidden, &chunk, [(row, chunk.lengths()[row].max(1))])?);
            }
        }
        let last: Vec<Tensor> = last.into_iter().flatten().collect();
        self.logits(&Tensor::cat(&last, 0)?)
    }

    /// What the output weights make of hidden states.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = scaled(self.output.forward(hidden)?, self.spec.multipliers.logits)?;
        self.check_logits(&logits)?;
        Ok(logits)
    }

    /// The hidden states that the output weights see, `[sequences, positions, hidden]`.
    fn hidden_states(&self, batch: &Batch, state: &mut DecoderState) -> Result<Tensor> {
        if let Some(id) = batch.ids().iter().find(|&&id| id as usize >= self.spec.vocab) {
            return Err(Error::parameter("token id", id, format!("below the vocabulary's {}", self.spec.vocab)));
        }
        let moe_layers = self.spec.moe_layers();
        if state.routes.len() != moe_layers {
            let layers = |count: usize| format!("{count} layers");
            return Err(Error::shape("decoder state", layers(moe_layers), layers(state.routes.len())));
        }
        if let Some(caches) = state.kv.as_ref().filter(|caches| caches.len() != self.blocks.len()) {
            let blocks = |count: usize| format!("keys and values of {count} blocks");
            return Err(Error::shape("decoder state", blocks(self.blocks.len()), blocks(caches.len())));
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
        if state.torn {
            return Err(Error::shape("decoder state", TORN_NEEDS, "one whose last forward pass failed"));
        }
        let starts = state.seen.starts(batch, self.spec.max_positions)?;
        state.torn = state.kv.is_some();
        let device = self.embedding.embeddings().device();
        let ids = Tensor::from_slice(batch.ids(), (batch.sequences(), batch.positions()), device)?;
        let Multipliers { embedding, residual, .. } = self.spec.multipliers;
        let mut hidden = scaled(self.embedding.forward(&ids)?, embedding)?;
        self.check_finite(Place::Embedding, &hidden)?;
        let rotary = Rotary::new(&self.spec, &starts, batch.positions(), hidden.dtype(), device)?;
        let mask = |window: Option<usize>| state.seen.mask(batch, window, hidden.dtype(), device);
        let window = Some(self.spec.window.positions).filter(|_| !self.spec.window.blocks.is_empty());
        let (whole_mask, window_mask) = (mask(None)?, window.map(|_| mask(window)).transpose()?.flatten());
        // A batch uses most experts anyway.
        let is_decode = state.kv.is_some() && batch.ids().len() <= DECODE_TOKENS;
        let pass = if is_decode { state.lookahead.begin() } else { Pass::PLAIN };
        // MoE layers are counted by themselves: blocks without experts have no router.
        let mut moe_layer = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            let cache = state.kv.as_mut().map(|caches| &mut caches[index]);
            let mask = if block.windowed { &window_mask } else { &whole_mask };
            let normed = block.attention_norm.forward(&hidden)?;
            hidden = (hidden + scaled(block.attention.forward(&normed, &rotary, mask.as_ref(), cache)?, residual)?)?;
            self.check_finite(Place::Attention(index), &hidden)?;
            let normed = block.ffn_norm.forward(&hidden)?;
            let moe = match &block.ffn {
                Ffn::Dense(ffn) => {
                    hidden = (hidden + scaled(ffn.forward(&normed)?, residual)?)?;
                    self.check_finite(Place::Ffn(index), &hidden)?;
                    continue;
                }
                Ffn::Moe(moe) => moe,
            };
            let layer = moe_layer;
            moe_layer += 1;
            if pass.ahead {
                self.read_ahead(layer + 1, batch, &hidden, state);
            }
            let resident = match (&state.memory, moe.cached()) {
                (Some(memory), _) => memory.counted(layer),
                (None, Some(experts)) => {
                    experts.counted_into(&mut state.resident)?;
                    Some(&state.resident)
                }
                (None, None) => None,
            };
            let context = RouteContext { step: state.step, resident, ..batch.context() };
            let done = moe.pass(&normed, context, &mut state.routes[layer], &mut state.buffers);
            let (output, routed) = done.map_err(|error| self.named(error, index, normed.dtype()))?;
            self.check_gate(index, moe, &routed.logits, normed.dtype())?;
            if let Some(experts) = moe.cached().filter(|_| pass.ahead) {
                experts.cache().cancel_prefetch(experts.layer());
            }
            if let Some(memory) = &mut state.memory {
                memory.advance(layer, state.buffers.assignment())?;
            }
            state.slots.count(state.buffers.assignment(), batch.live_tokens());
            if let Some(all) = &mut state.routed {
                all.push(routed.routed(state.buffers.assignment(), batch.padding()));
            }
            hidden = (hidden + scaled(output, residual)?)?;
            self.check_finite(Place::Ffn(index), &hidden)?;
        }
        state.step = state.step.saturating_add(1);
        if state.kv.is_some() {
            state.seen.add(batch);
        }
        state.torn = false;
        let hidden = self.norm.forward(&hidden)?;
        self.check_finite(Place::Norm, &hidden)?;
        if is_decode {
            state.lookahead.end(pass);
        }
        Ok(hidden)
    }

    /// Has what `layer` will use of its cache read, as far as its gate can tell from the hidden state before the layer before it.
    fn read_ahead(&self, layer: usize, batch: &Batch, hidden: &Tensor, state: &DecoderState) {
        let mut with_experts = self.blocks.iter().filter_map(|block| Some((block, block.moe()?)));
        let Some((block, moe)) = with_experts.nth(layer) else { return };
        let Some(experts) = moe.cached() else { return };
        let (cache, at) = (experts.cache(), experts.layer());
        let guess = || -> Result<usize> {
            let mut resident = cache.resident(at)?;
            if resident.len() == resident.experts() {
                return Ok(0);
            }
            cache.counted_into(at, &mut resident)?;
            let context = RouteContext { step: state.step, resident: Some(&resident), ..batch.context() };
            let normed = block.ffn_norm.forward(hidden)?;
            cache.prefetch(at, &moe.guess(&normed, context, &state.routes[layer])?)
        };
        // A hidden state that no gate understands is an error where it is used, not where it is guessed from.
        let _ = guess();
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

/// What a state needs to go on with its text.
const TORN_NEEDS: &str = "a text that all blocks have seen (`begin_text` begins another)";

/// `tensor` times a constant that most models do not have.
fn scaled(tensor: Tensor, by: f64) -> Result<Tensor> {
    if by == 1.0 { Ok(tensor) } else { Ok((tensor * by)?) }
}

/// The dimension of keys and values, `[batch, kv_heads, positions, head_dim]`, that grows.
const POSITION_DIM: usize = 2;

/// Positions that a cache of keys and values grows by.
const KV_POSITIONS: usize = 256;

/// The hidden state of token `length` of each of `rows`, `[rows, hidden]`.
fn last_states(hidden: &Tensor, batch: &Batch, rows: impl IntoIterator<Item = (usize, usize)>) -> Result<Tensor> {
    let at: Vec<u32> = rows.into_iter().map(|(row, length)| (row * batch.positions() + length - 1) as u32).collect();
    let at = Tensor::new(at, hidden.device())?;
    Ok(hidden.flatten_to(1)?.index_select(&at, 0)?)
}
