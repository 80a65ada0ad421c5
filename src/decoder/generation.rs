//! Text generation, one token of each text at a time, with keys and values kept.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use phase_moe::{GenerateOptions, LoadOptions, Model, Sampler, generate};
//!
//! let model = Model::load("models/tiny-moe".as_ref(), &LoadOptions::default())?;
//! let prompt = model.encode_sequence("And God said")?;
//! let (mut state, mut sampler) = (model.decoder().generation_state(), Sampler::new(0.0, 1.0, 42)?);
//! let done = generate(&model, &prompt, GenerateOptions::new(50), &mut state, &mut sampler, |_| ControlFlow::Continue(()))?;
//! println!("{}", model.decode_after(&prompt, &done.texts[0])?);
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of routers or of how text becomes tokens.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::model::Model;
use super::sampling::Sampler;
use super::{Batch, DecoderState, Slots};
use crate::error::{Error, Result};

/// How far texts go on, and how prompts go in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateOptions {
    /// Tokens added to each text at most.
    pub new_tokens: usize,
    /// Tokens of the prompts in one forward pass at most: what bounds memory, and what a capacity is of (see
    /// [`Decoder::prefill`](super::Decoder::prefill)).
    pub chunk_tokens: usize,
}

impl GenerateOptions {
    /// At most `new_tokens`, prompts in chunks of 512.
    pub fn new(new_tokens: usize) -> Self {
        Self { new_tokens, chunk_tokens: 512 }
    }
}

/// What a generation did.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Generation {
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
    /// Slots of all its forward passes.
    pub slots: Slots,
}

/// Continues `prompt` after what `state` has seen, by at most `options.new_tokens`, fewer where the text ends or the model's positions
/// do. `on_token` sees each new token as it comes, and may stop.
///
/// # Errors
/// As [`generate_batch`].
pub fn generate(
    model: &Model,
    prompt: &[u32],
    options: GenerateOptions,
    state: &mut DecoderState,
    sampler: &mut Sampler,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    generate_batch(model, &[prompt], options, state, std::slice::from_mut(sampler), |_, id, _| on_token(id))
}

/// Continues several prompts side by side, each as [`generate`] does and with a sampler of its own; `on_token` sees the number of the text,
/// the token, and the state as it is then. Without a limit and a router that looks at the batch, texts are those that each prompt gives alone, but for what rounding turns.
///
/// # Errors
/// [`Error::Shape`] for no prompt or an empty one, for samplers that are not as many, and for a state that keeps no keys and values
/// or those of other sequences; whatever the forward pass reports.
pub fn generate_batch(
    model: &Model,
    prompts: &[&[u32]],
    options: GenerateOptions,
    state: &mut DecoderState,
    samplers: &mut [Sampler],
    mut on_token: impl FnMut(usize, u32, &DecoderState) -> ControlFlow<()>,
) -> Result<Generation> {
    if !state.keeps_text() {
        return Err(Error::shape("decoder state", "one that keeps keys and values", "one that keeps none"));
    }
    if samplers.len() != prompts.len() {
        return Err(Error::shape("samplers", format!("one for each of {} prompts", prompts.len()), samplers.len()));
    }
    let (decoder, batch) = (model.decoder(), Batch::new(prompts)?);
    let mut done = Generation {
        texts: vec![Vec::new(); prompts.len()],
        prompt_tokens: batch.lengths().to_vec(),
        ..Generation::default()
    };
    let (started, slots) = (Instant::now(), state.slots);
    let mut logits = decoder.prefill(&batch, options.chunk_tokens, state)?;
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
            stopped |= on_token(text, id, state).is_break();
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
        logits = decoder.forward_last(&Batch::step(&next)?, state)?;
    }
    done.decode_time = started.elapsed() - done.prefill_time;
    done.slots = state.slots.since(slots);
    Ok(done)
}
