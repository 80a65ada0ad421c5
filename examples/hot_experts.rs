//! Which experts a text keeps busy, and which are worth fetching next: decodes with a memory of 12 experts a layer and asks the
//! router's own books.
//!
//! ```text
//! cargo run --release --example hot_experts
//! ```
//!
//! Reads `models/tiny-moe`, which a checkout of the repository has and the published package has not.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use phase_moe::{
    Admission, CacheRouter, ExpertId, GenerateOptions, LoadOptions, Model, Policy, Result, Sampler, generate,
};

/// Experts of a layer in fast memory.
const CACHED: usize = 12;

fn main() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let mut model = Model::load(&directory, &LoadOptions::default())?;
    let experts = model.decoder().spec().moe.experts;
    model.decoder_mut().set_router(Arc::new(CacheRouter::default()));

    let memory = model.decoder().expert_memory(CACHED, Policy::Lru, Admission::default())?;
    let mut state = model.decoder().generation_state().with_memory(memory);
    let prompt = model.encode("And it came to pass in those days, that ")?;
    let mut sampler = Sampler::new(0.7, 0.9, 1)?;
    let go_on = |_| ControlFlow::Continue(());
    let generation = generate(&model, &prompt, GenerateOptions::new(200), &mut state, &mut sampler, go_on)?;
    println!("{} tokens written", generation.texts[0].len());

    let Some(memory) = state.memory() else { return Ok(()) };
    println!("{} of {} requests were in memory", memory.hits(), memory.requests());
    let ids = |list: &[ExpertId]| list.iter().map(|id| id.index().to_string()).collect::<Vec<_>>().join(" ");
    for (layer, route) in state.routes().iter().enumerate() {
        let Some(affinity) = route.affinity() else { continue };
        let mut busy = (0..experts).map(|id| ExpertId::new(id, experts)).collect::<Result<Vec<_>>>()?;
        busy.sort_by_key(|&id| std::cmp::Reverse(affinity.activations(id)));
        let counts: Vec<u64> = busy[..4].iter().map(|&id| affinity.activations(id)).collect();
        println!("layer {layer}: busiest {} ({counts:?} activations)", ids(&busy[..4]));
        let next = affinity.worth_fetching(memory.resident(layer), 4);
        println!("         worth fetching next, of those not in memory: {}", ids(&next));
    }
    Ok(())
}
