//! Text from a Mixture-of-Experts checkpoint: load a directory, continue one prompt of each kind.
//!
//! ```text
//! cargo run --release --example toy_inference
//! ```
//!
//! Reads `models/tiny-moe`, which a checkout of the repository has and the published package has not.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use phase_moe::{CapacityRule, GenerateOptions, LoadOptions, Model, PhaseRouter, Result, Sampler, generate};

fn main() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let mut model = Model::load(&directory, &LoadOptions::default())?;
    println!("{}: {} parameters", model.name(), model.decoder().spec().parameters());

    // While a prompt is read, four devices share the experts and each takes exactly a quarter of the slots.
    // Decoding one text is below any sensible capacity: there the router leaves the gate's choice alone.
    model.decoder_mut().set_router(Arc::new(PhaseRouter::default()));
    model.decoder_mut().set_capacity(Some(CapacityRule::per_device(1.0, 4)));

    let prompts = [
        "And the LORD spake unto Moses, saying, ",
        "impl<T: Clone> Iterator for Range<T> {\n    type Item = T;\n\n    fn next(",
        "river (noun): a large natural stream of ",
    ];
    for prompt in prompts {
        let ids = model.encode_sequence(prompt)?;
        let (mut state, mut sampler) = (model.decoder().generation_state(), Sampler::new(0.6, 0.9, 1)?);
        let mut continuation = model.continuation(&ids)?;
        print!("\n{prompt}|");
        let done = generate(&model, &ids, GenerateOptions::new(60), &mut state, &mut sampler, |id| match continuation
            .push(id)
        {
            Ok(text) => {
                print!("{text}");
                ControlFlow::Continue(())
            }
            Err(_) => ControlFlow::Break(()),
        })?;
        println!("{}", continuation.finish()?);
        let (read, written, survival) = (ids.len(), done.texts[0].len(), done.slots.survival());
        println!("  ({read} tokens read, {written} written, {:.0} % of slots kept)", 100.0 * survival);
    }
    Ok(())
}
