//! Text from a Mixture-of-Experts checkpoint: load a directory, continue one prompt of each kind.
//!
//! ```text
//! cargo run --release --example toy_inference
//! ```

use std::path::Path;
use std::sync::Arc;

use phase_moe::decoder::LoadOptions;
use phase_moe::decoder::generate::generate;
use phase_moe::decoder::model::Model;
use phase_moe::decoder::sampling::Sampler;
use phase_moe::error::Result;
use phase_moe::routing::capacity::CapacityRule;
use phase_moe::routing::phase::PhaseRouter;

fn main() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let mut model = Model::load(&directory, &LoadOptions::default())?;
    println!("{}: {} parameters", model.name(), model.decoder().spec().parameters());

    // While a prompt is read, four devices share the experts and each takes exactly a quarter of the slots.
    // Decoding one text is below any sensible capacity: there the router leaves the gate's choice alone.
    model.decoder_mut().set_router(Arc::new(PhaseRouter::default()), Some(CapacityRule::per_device(1.0, 4)));

    let prompts = [
        "And the LORD spake unto Moses, saying, ",
        "impl<T: Clone> Iterator for Range<T> {\n    type Item = T;\n\n    fn next(",
        "river (noun): a large natural stream of ",
    ];
    for prompt in prompts {
        let ids = model.encode_sequence(prompt)?;
        let mut sampler = Sampler::new(0.6, 0.9, 1)?;
        let generation = generate(&model, &ids, 60, &mut sampler, |_| ())?;
        println!("\n{prompt}|{}", model.decode_after(&ids, &generation.ids)?);
        println!(
            "  ({} tokens read, {} written, {:.0} % of slots kept)",
            generation.prompt_tokens,
            generation.ids.len(),
            100.0 * generation.survival()
        );
    }
    Ok(())
}
