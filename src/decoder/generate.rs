//! Text generation, one token at a time, with keys and values kept.

use std::time::{Duration, Instant};

use super::model::Model;
use super::sampling::Sampler;
use super::{Batch, DecoderState};
use crate::error::{Error, Result};
use crate::layer::Routing;

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
        if self.slots == 0 { 1.0 } else { self.kept_slots as f64 / self.slots as f64 }
    }

    /// Tokens of the prompt per second.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill_time.as_secs_f64()
    }

    /// New tokens per second after the first; `None` when there was no second.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        (self.decode_steps > 0).then(|| self.decode_steps as f64 / self.decode_time.as_secs_f64())
    }

    fn step(&mut self, model: &Model, ids: &[u32], state: &mut DecoderState, sampler: &mut Sampler) -> Result<u32> {
        let logits = model.decoder().forward_last(&Batch::new(&[ids])?, state, |_, routing: Routing| {
            self.slots += (routing.assignment.tokens() * routing.assignment.top_k()) as u64;
            self.kept_slots += routing.assignment.kept() as u64;
            Ok(())
        })?;
        sampler.next(&logits.squeeze(0)?)
    }
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
    if !state.keeps_text() {
        return Err(Error::shape("decoder state", "one that keeps keys and values", "one that keeps none"));
    }
    let spec = model.decoder().spec();
    let mut generation = Generation { prompt_tokens: prompt.len(), ..Generation::default() };
    let started = Instant::now();
    let mut next = generation.step(model, prompt, state, sampler)?;
    generation.prefill_time = started.elapsed();
    let started = Instant::now();
    while generation.ids.len() < new_tokens && !spec.end_of_text.contains(&next) {
        generation.ids.push(next);
        on_token(next);
        if generation.ids.len() == new_tokens || state.position() == spec.max_positions {
            break;
        }
        next = generation.step(model, &[next], state, sampler)?;
        generation.decode_steps += 1;
    }
    generation.decode_time = started.elapsed();
    Ok(generation)
}
