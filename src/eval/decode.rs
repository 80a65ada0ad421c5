//! Decode over known text: each token is a step of every layer's memory of experts, as if the model wrote the text itself.
//!
//! `perplexity, hits, misses, gate mass` of a router whose choices depend on what its earlier ones left in memory. Two ways to
//! the same decode:
//!
//! - [`Decoding::run`] reads whole sequences in one forward pass. What a layer routes to depends on the tokens before and on its
//!   own memory alone, so routing the rows of a batch one after another is decode, only faster by an order of magnitude.
//! - `Decoding::clock` makes a forward pass a token with kept keys and values, and is timed. Products of one row round
//!   differently from those of many, so figures would differ in their last digits.
//!
//! Memory and router states last from sequence to sequence, as in a server. Knows nothing of bytes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::perplexity::{Perplexity, losses};
use crate::decoder::memory::ExpertMemory;
use crate::decoder::{Batch, Decoder};
use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::offload::admission::Admission;
use crate::offload::belady::RequestLog;
use crate::offload::residency::Policy;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::Capacity;
use crate::routing::check::check_assignment;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router, Scratch};
use crate::routing::scores::Scores;
use crate::routing::topk::TopK;

/// A router, and what fits into fast memory.
#[derive(Clone)]
pub struct Decoding {
    /// The router; its capacity is unlimited, as always in decode.
    pub router: Arc<dyn Router>,
    /// Experts of a layer that fit.
    pub cached_experts: usize,
    /// Which expert leaves.
    pub policy: Policy,
    /// Which misses enter.
    pub admission: Admission,
}

/// What decode over a text came to, all layers together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeFigures {
    /// Tokens that went through.
    pub tokens: u64,
    /// Perplexity of the text.
    pub perplexity: f64,
    /// Distinct experts per layer and token.
    pub requests: u64,
    /// Requests whose expert was in fast memory.
    pub hits: u64,
    /// Requests whose expert was not.
    pub misses: u64,
    /// Hits of the best policy there could be on these requests; `None` where they were not kept.
    pub belady_hits: Option<u64>,
    /// Kept gate mass / gate mass of plain top-k; `None` where that has none, or it was not counted.
    pub gate_mass_kept: Option<f64>,
    /// Time of all forward passes.
    pub time: Duration,
}

impl DecodeFigures {
    /// Hits / requests; `None` without any.
    pub(super) fn hit_rate(&self) -> Option<f64> {
        share(self.hits as f64, self.requests as f64)
    }

    /// The same of the best policy there could be; `None` without requests, or where they were not kept.
    pub(super) fn belady_hit_rate(&self) -> Option<f64> {
        share(self.belady_hits? as f64, self.requests as f64)
    }
}

fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

impl Decoding {
    /// Decodes `batches`, a sequence after the other, in whole forward passes. `each` sees every batch with its logits.
    ///
    /// # Errors
    /// [`Error::Parameter`] for more cached experts than there are, [`Error::Shape`] for a router that gives a token more
    /// experts than it asks for; whatever the forward pass or `each` reports.
    pub fn run(
        &self,
        decoder: &Decoder,
        batches: &[Batch],
        mut each: impl FnMut(&Batch, &Tensor) -> Result<()>,
    ) -> Result<DecodeFigures> {
        self.run_in(decoder, batches, |_| self.cached_experts, |batch, logits, _| each(batch, logits))
    }

    /// The same where layers have room for different numbers of experts, as in an expert cache; `each` sees the losses too.
    pub(super) fn run_in(
        &self,
        decoder: &Decoder,
        batches: &[Batch],
        capacity: impl Fn(usize) -> usize,
        mut each: impl FnMut(&Batch, &Tensor, &[Option<f64>]) -> Result<()>,
    ) -> Result<DecodeFigures> {
        let mut decoder = decoder.clone();
        let books = decoder
            .moe_layers()
            .enumerate()
            .map(|(layer, moe)| Ok(Mutex::new(Books::new(self, moe.spec().experts, capacity(layer))?)));
        let rows = Arc::new(RowByRow { router: self.router.clone(), layers: books.collect::<Result<_>>()? });
        decoder.set_router(rows.clone());
        decoder.set_capacity(None);
        let (mut figures, mut perplexity) = (DecodeFigures::default(), Perplexity::default());
        for batch in batches {
            let started = Instant::now();
            let logits = decoder.forward(batch, &mut decoder.batch_state())?;
            figures.time += started.elapsed();
            figures.tokens += batch.live_tokens();
            let losses = losses(&logits, batch)?;
            perplexity.add_losses(&losses);
            each(batch, &logits, &losses)?;
        }
        figures.perplexity = perplexity.value()?;
        let (mut mass, mut top_k_mass, mut belady) = (0.0, 0.0, 0);
        for (layer, books) in rows.layers.iter().enumerate() {
            let books = books.lock().unwrap_or_else(PoisonError::into_inner);
            figures.requests += books.memory.requests();
            figures.hits += books.memory.hits();
            belady += books.log.most_hits(capacity(layer)) as u64;
            (mass, top_k_mass) = (mass + books.mass, top_k_mass + books.top_k_mass);
        }
        figures.misses = figures.requests - figures.hits;
        figures.belady_hits = Some(belady);
        figures.gate_mass_kept = share(mass, top_k_mass);
        Ok(figures)
    }

    /// Decodes `text` in a forward pass a token, with keys and values kept, from an empty memory; the clock starts after `untimed`
    /// tokens, when the memory is warm. Where the experts are in an expert cache, that one says what is in fast memory, in place of the
    /// number, policy and admission here.
    ///
    /// # Errors
    /// As [`Decoding::run`].
    pub(super) fn clock(&self, decoder: &Decoder, text: &[u32], untimed: usize) -> Result<Clocked> {
        let mut decoder = decoder.clone();
        decoder.set_router(self.router.clone());
        decoder.set_capacity(None);
        let mut state = decoder.generation_state();
        match decoder.expert_cache() {
            Some(cache) => cache.forget()?,
            None => {
                state = state.with_memory(decoder.expert_memory(self.cached_experts, self.policy, self.admission)?)
            }
        }
        let mut step = |id: &u32| decoder.forward(&Batch::new(&[&[*id]])?, &mut state).map(drop);
        let read = || decoder.expert_cache().map_or(0, |cache| cache.statistics().bytes_read);
        let (warming, timed) = text.split_at(untimed);
        warming.iter().try_for_each(&mut step)?;
        let (before, started) = (read(), Instant::now());
        timed.iter().try_for_each(&mut step)?;
        let time = started.elapsed();
        Ok(Clocked { tokens: timed.len() as u64, time, bytes_read: read() - before })
    }
}

/// What the clock saw of a text.
pub(super) struct Clocked {
    pub(super) tokens: u64,
    pub(super) time: Duration,
    /// By an expert cache; 0 without one.
    pub(super) bytes_read: u64,
}

impl Clocked {
    pub(super) fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// One layer's memory, and what is learnt and counted on the way.
struct Books {
    memory: ExpertMemory,
    state: RouteState,
    scratch: Scratch,
    scores: Scores,
    capacity: Capacity,
    routed: Assignment,
    plain: Assignment,
    asked: ExpertSet,
    log: RequestLog,
    step: u64,
    mass: f64,
    top_k_mass: f64,
}

impl Books {
    fn new(decoding: &Decoding, experts: usize, cached: usize) -> Result<Self> {
        Ok(Self {
            memory: ExpertMemory::new(1, experts, cached, decoding.policy, decoding.admission)?,
            state: RouteState::default(),
            scratch: Scratch::default(),
            scores: Scores::default(),
            capacity: Capacity::unlimited(experts)?,
            routed: Assignment::default(),
            plain: Assignment::default(),
            asked: ExpertSet::default(),
            log: RequestLog::default(),
            step: 0,
            mass: 0.0,
            top_k_mass: 0.0,
        })
    }

    /// Routes one token of a batch, a step of the memory, and lends its slots.
    fn route(&mut self, router: &dyn Router, all: &RouteRequest<'_>, token: usize) -> Result<&[u16]> {
        let Self { memory, state, scratch, scores, capacity, routed, plain, asked, log, step, mass, top_k_mass } = self;
        scores.refill_from(all.scores(), token)?;
        let token_ids = all.context().token_ids.map(|ids| &ids[token..=token]);
        let context = RouteContext {
            layer: all.context().layer,
            token_ids,
            padding: None,
            step: *step,
            resident: memory.counted(0),
        };
        let request = RouteRequest::new(scores, all.top_k(), capacity, context)?;
        router.route_into(&request, state, scratch, routed)?;
        check_assignment(router, &request, routed)?;
        if routed.width() != all.top_k() {
            return Err(Error::shape("experts of a token", all.top_k(), routed.width()));
        }
        TopK { drop: None }.route_into(&request, &mut RouteState::default(), scratch, plain)?;
        let gate = scores.gate(0);
        let sum = |assignment: &Assignment| -> f64 {
            assignment.slots(0).map(|(expert, _)| f64::from(gate[expert.index()])).sum()
        };
        (*mass, *top_k_mass) = (*mass + sum(routed), *top_k_mass + sum(plain));
        routed.used_experts(asked)?;
        log.push(asked);
        memory.advance(0, routed)?;
        *step += 1;
        Ok(routed.raw())
    }
}

/// A router for a whole batch that asks another one row by row, each row a step of the layer's memory. It keeps that memory
/// itself, so it serves one pass over one text: nothing but measuring should.
struct RowByRow {
    router: Arc<dyn Router>,
    layers: Vec<Mutex<Books>>,
}

impl Router for RowByRow {
    fn name(&self) -> &'static str {
        self.router.name()
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let layer = request.context().layer;
        let Some(books) = self.layers.get(layer) else {
            return Err(Error::shape("layer", format!("one of {}", self.layers.len()), layer));
        };
        let mut books = books.lock().unwrap_or_else(PoisonError::into_inner);
        let (scores, top_k) = (request.scores(), request.top_k());
        let mut outcome = Ok(());
        assignment.refill_with(scores, top_k, |chosen| {
            for (token, chosen) in chosen.chunks_exact_mut(top_k).enumerate() {
                if request.is_padding(token) || outcome.is_err() {
                    continue;
                }
                match books.route(self.router.as_ref(), request, token) {
                    Ok(slots) => chosen.copy_from_slice(slots),
                    Err(error) => outcome = Err(error),
                }
            }
        });
        outcome
    }
}
