//! `trace`: the model's gate logits over text, to a file.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use phase_moe::eval::trace::{GateTrace, LayerTrace};

use crate::options::{Global, ModelOptions, TextOptions};

/// Runs the model over text, dropless, and writes the gate logits of every MoE layer.
///
/// Example: phase-moe trace --tokens 4096 --out trace.safetensors
#[derive(Args)]
pub struct Trace {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    text: TextOptions,
    /// Where the trace goes
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Trace {
    pub fn run(self, global: &Global) -> Result<()> {
        let model = self.model.load()?;
        let (_, batches) = self.text.batches(&model)?;
        let (decoder, moe) = (model.decoder(), &model.decoder().spec().moe);
        let bias = |layer: &phase_moe::layer::MoeLayer| layer.gate().selection_bias().map(<[f32]>::to_vec);
        let mut layers: Vec<LayerTrace> = decoder
            .moe_layers()
            .enumerate()
            .map(|(layer, moe)| LayerTrace { layer, logits: Vec::new(), selection_bias: bias(moe) })
            .collect();
        let mut token_ids = Vec::new();
        let bar = global.progress(batches.len() as u64);
        bar.set_message("tracing");
        for batch in &batches {
            let live = |token: &usize| !batch.padding().is_some_and(|padding| padding[*token]);
            token_ids.extend((0..batch.ids().len()).filter(live).map(|token| batch.ids()[token]));
            decoder.forward(batch, &mut decoder.batch_state(), |layer, routing| {
                let values = routing.logits.flatten_all()?.to_vec1::<f32>()?;
                let rows = values.chunks_exact(moe.experts).enumerate().filter(|(token, _)| live(token));
                layers[layer].logits.extend(rows.flat_map(|(_, row)| row));
                Ok(())
            })?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let trace = GateTrace {
            model: Some(model.name().to_owned()),
            experts: moe.experts,
            top_k: moe.top_k,
            scoring: moe.scoring,
            batch_tokens: Some(self.text.batch_tokens),
            token_ids: Some(token_ids),
            layers,
        };
        Ok(trace.write(&self.out)?)
    }
}
