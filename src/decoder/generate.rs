//! Text generation, one token of each text at a time, with keys and values kept.
//!
//! ```no_run
//! use phase_moe::decoder::generate::{Options, generate_batch};
//! use phase_moe::decoder::model::{LoadOptions, Model};
//! use phase_moe::decoder::sampling::Sampler;
//!
//! let model = Model::load("models/tiny-moe".as_ref(), &LoadOptions::default())?;
//! let prompts = [model.encode_sequence("And God said")?, model.encode_sequence("fn main() {")?];
//! let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
//! let mut samplers = vec![Sampler::new(0.0, 1.0, 42)?; 2];
//! let mut state = model.decoder().generation_state();
//! let done = generate_batch(&model, &prompts, Options::new(50), &mut state, &mut samplers, |_, _| ())?;
//! let said = model.decode_after(prompts[0], &done.texts[0])?;
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of routers or of how text becomes tokens.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::model::Model;
use super::sampling::Sampler;
use super::{Batch, DecoderState};
use crate::error::{Error, Result};
use crate::layer::Routing;

/// How far texts go on, and how prompts go in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Tokens added to each text at most.
    pub new_tokens: usize,
    /// Tokens of the prompts in one forward pass at most: what bounds memory, and what a capacity is of (see
    /// [`Decoder::prefill`](super::Decoder::prefill)).
    pub chunk_tokens: usize,
}

impl Options {
    /// Tokens of the prompts in one forward pass where nobody says otherwise.
    pub const CHUNK_TOKENS: usize = 512;

    /// At most `new_tokens`, prompts in chunks of [`Options::CHUNK_TOKENS`].
    pub fn new(new_tokens: usize) -> Self {
        Self { new_tokens, chunk_tokens: Self::CHUNK_TOKENS }
    }
}

/// What a generation did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// New tokens, the end of the text not among them.
    pub ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time for the prompt.
    pub prefill_time: Duration,
    /// Time for the new tokens after the first.
    pub decode_time: Duration,
    /// Forward passes after the prompt's.
    pub decode_steps: usize,
    /// Slots asked for, all layers and steps.
    pub slots: u64,
    /// Slots that got an expert.
    pub kept_slots: u64,
}

impl Generation {
    /// Kept slots / slots.
    pub fn survival(&self) -> f64 {
        survival(self.slots, self.kept_slots)
    }

    /// Tokens of the prompt per second.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill_time.as_secs_f64()
    }

    /// New tokens per second after the first; `None` when there was no second.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        per_second(self.decode_steps, self.decode_time)
    }
}

/// What the generation of several texts did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchGeneration {
    /// New tokens of each text, its end not among them.
    pub texts: Vec<Vec<u32>>,
    /// Tokens of each prompt.
    pub prompt_tokens: Vec<usize>,
    /// Time for the prompts.
    pub prefill_time: Duration,
    /// Time for the new tokens after the first of each text.
    pub decode_time: Duration,
    /// Forward passes after the prompts'.
    pub decode_steps: usize,
    /// Tokens that went through those, padding not counted.
    pub decode_tokens: usize,
    /// Slots asked for, all layers and steps, padding not counted.
    pub slots: u64,
    /// Slots that got an expert.
    pub kept_slots: u64,
}

impl BatchGeneration {
    /// Kept slots / slots.
    pub fn survival(&self) -> f64 {
        survival(self.slots, self.kept_slots)
    }

    /// Tokens of all prompts per second.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens.iter().sum::<usize>() as f64 / self.prefill_time.as_secs_f64()
    }

    /// New tokens of all texts per second after the first of each; `None` when there was no second.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        per_second(self.decode_tokens, self.decode_time)
    }

    fn count(&mut self, routing: &Routing) {
        let pads = routing.padding.iter().flatten().filter(|&&pad| pad).count();
        self.slots += ((routing.assignment.tokens() - pads) * routing.assignment.top_k()) as u64;
        self.kept_slots += routing.assignment.kept() as u64;
    }
}

fn survival(slots: u64, kept: u64) -> f64 {
    if slots == 0 { 1.0 } else { kept as f64 / slots as f64 }
}

fn per_second(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0).then(|| tokens as f64 / time.as_secs_f64())
}

/// Continues `prompt` by at most `new_tokens`, fewer where the text ends or the model's positions do; `on_token` sees each
/// new token as it comes.
///
/// # Errors
/// [`Error::Shape`] for an empty prompt; whatever the forward pass reports.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    new_tokens: usize,
    sampler: &mut Sampler,
    on_token: impl FnMut(u32),
) -> Result<Generation> {
    generate_in(model, prompt, new_tokens, &mut model.decoder().generation_state(), sampler, on_token)
}

/// The same after what `state` has seen so far, with the experts that it has in fast memory; it is as the last token left it.
///
/// # Errors
/// Those of [`generate`]; [`Error::Shape`] for a state that keeps no keys and values.
pub fn generate_in(
    model: &Model,
    prompt: &[u32],
    new_tokens: usize,
    state: &mut DecoderState,
    sampler: &mut Sampler,
    mut on_token: impl FnMut(u32),
) -> Result<Generation> {
    let (options, samplers) = (Options::new(new_tokens), std::slice::from_mut(sampler));
    let mut done = generate_batch(model, &[prompt], options, state, samplers, |_, id| on_token(id))?;
    Ok(Generation {
        ids: done.texts.pop().unwrap_or_default(),
        prompt_tokens: prompt.len(),
        prefill_time: done.prefill_time,
        decode_time: done.decode_time,
        decode_steps: done.decode_steps,
        slots: done.slots,
        kept_slots: done.kept_slots,
    })
}

/// Continues several prompts side by side, each by at most `options.new_tokens`, fewer where its text ends or the model's
/// positions do. Each text has a sampler of its own; `on_token` sees each new token with the number of its text. Without a limit and a
/// router that looks at the batch, texts are those that each prompt gives alone, but for what rounding turns.
///
/// # Errors
/// As [`generate_batch_until`].
pub fn generate_batch(
    model: &Model,
    prompts: &[&[u32]],
    options: Options,
    state: &mut DecoderState,
    samplers: &mut [Sampler],
    mut on_token: impl FnMut(usize, u32),
) -> Result<BatchGeneration> {
    generate_batch_until(model, prompts, options, state, samplers, |text, id| {
        on_token(text, id);
        ControlFlow::Continue(())
    })
}

/// The same until `on_token` breaks off: with nobody left who reads, there is nothing to go on for.
///
/// # Errors
/// [`Error::Shape`] for no prompt or an empty one, for samplers that are not as many, and for a state that keeps no keys and values
/// or those of other sequences; whatever the forward pass reports.
pub fn generate_batch_until(
    model: &Model,
    prompts: &[&[u32]],
    options: Options,
    state: &mut DecoderState,
    samplers: &mut [Sampler],
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<BatchGeneration> {
    if !state.keeps_text() {
        return Err(Error::shape("decoder state", "one that keeps keys and values", "one that keeps none"));
    }
    if samplers.len() != prompts.len() {
        return Err(Error::shape("samplers", format!("one for each of {} prompts", prompts.len()), samplers.len()));
    }
    let (decoder, batch) = (model.decoder(), Batch::new(prompts)?);
    let mut done = BatchGeneration {
        texts: vec![Vec::new(); prompts.len()],
        prompt_tokens: batch.lengths().to_vec(),
        ..BatchGeneration::default()
    };
    let started = Instant::now();
    let mut logits = decoder.prefill(&batch, options.chunk_tokens, state, |_, routing| {
        done.count(&routing);
        Ok(())
    })?;
    // The last token of each text that goes on; it has not been through the model.
    let mut next: Vec<Option<u32>> = vec![Some(0); prompts.len()];
    let mut stopped = false;
    loop {
        for (text, (next, sampler)) in next.iter_mut().zip(samplers.iter_mut()).enumerate() {
            if next.is_none() {
                continue;
            }
            let id = sampler.next(&logits.get(text)?)?;
            *next = (done.texts[text].len() < options.new_tokens && !model.end_of_text().contains(&id)).then_some(id);
            if next.is_none() {
                continue;
            }
            done.texts[text].push(id);
            stopped |= on_token(text, id).is_break();
            if done.texts[text].len() == options.new_tokens || state.lengths()[text] == decoder.spec().max_positions {
                *next = None;
            }
        }
        if done.decode_steps == 0 {
            done.prefill_time = started.elapsed();
        }
        if stopped || next.iter().all(Option::is_none) {
            break;
        }
        done.decode_steps += 1;
        done.decode_tokens += next.iter().flatten().count();
        logits = decoder.forward_last(&Batch::step(&next)?, state, |_, routing| {
            done.count(&routing);
            Ok(())
        })?;
    }
    done.decode_time = started.elapsed() - done.prefill_time;
    Ok(done)
}
