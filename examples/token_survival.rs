//! Token survival in real forward passes: where in the model do slots get lost, and whose are they?
//!
//! ```text
//! cargo run --release --example token_survival
//! ```
//!
//! One batch of each kind of text runs through every layer with room for exactly as many slots as there are, per expert.
//!
//! Reads `models/tiny-moe`, which a checkout of the repository has and the published package has not.

use std::path::Path;
use std::sync::Arc;

use phase_moe::eval::{Batching, EvalText};
use phase_moe::{CapacityRule, LoadOptions, Model, Result, RouterKind};

fn main() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let mut model = Model::load(&directory, &LoadOptions::default())?;
    let mut texts = Vec::new();
    for name in ["scripture", "code", "reference"] {
        let path = directory.join("eval").join(name).with_extension("txt");
        let text = std::fs::read_to_string(path)?;
        texts.push(EvalText { name: name.into(), ids: model.encode(&text)? });
    }
    let batches = Batching { tokens: Some(1536), ..Batching::default() }.batches(&[], &texts)?;

    for name in ["top-k-arrival", "top-k-score", "phase"] {
        let router = Arc::from(name.parse::<RouterKind>()?.build(1));
        model.decoder_mut().set_router(router);
        model.decoder_mut().set_capacity(Some(CapacityRule::per_expert(1.0)));
        println!("\n{name}, per expert, capacity factor 1.0");
        println!(
            "{:>12}{:>7}{:>10}{:>11}{:>10}  survival by quarter of the batch",
            "text", "layer", "survival", "gate mass", "no expert"
        );
        let mut state = model.decoder().batch_state().keeping_routed();
        for (text, batch) in texts.iter().zip(&batches) {
            model.decoder().forward(batch, &mut state)?;
            for (layer, routed) in state.routed().iter().enumerate() {
                let (metrics, assignment) = (routed.metrics()?, &routed.assignment);
                let quarter = assignment.tokens().div_ceil(4);
                let survival = |first: usize| {
                    let tokens = first..(first + quarter).min(assignment.tokens());
                    let kept: usize = tokens.clone().map(|token| assignment.slots(token).count()).sum();
                    100.0 * kept as f64 / (tokens.len() * assignment.top_k()) as f64
                };
                let quarters: Vec<String> = (0..4).map(|at| format!("{:5.1}", survival(at * quarter))).collect();
                println!(
                    "{:>12}{layer:>7}{:>8.1} %{:>9.1} %{:>10}  {}",
                    text.name,
                    100.0 * metrics.survival(),
                    100.0 * metrics.gate_mass_share(),
                    metrics.tokens_without_expert,
                    quarters.join(" ")
                );
            }
        }
    }
    Ok(())
}
