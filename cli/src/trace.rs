//! `trace`: the model's gate logits over text, to a file.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use phase_moe::eval::GateTrace;

use crate::global::Global;
use crate::options::{ModelOptions, TextOptions, TopKOptions, warn_streamed};
use crate::output::{Destination, Inputs};

/// Runs the model over text, dropless, and writes the gate logits of every MoE layer.
///
/// With several texts it says of each token which one it is of: `place` balances them all.
///
/// Example: phase-moe trace --tokens 4096 --out trace.safetensors
#[derive(Args)]
pub struct Trace {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    text: TextOptions,
    #[command(flatten)]
    top_k: TopKOptions,
    /// Where the trace goes
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Trace {
    pub fn run(self, global: &Global) -> Result<()> {
        let out = Destination::open("--out", &self.out)?;
        let files = self.model.files()?;
        let out = out.apart_from(&Inputs::default().texts(&self.text.text).model(&files))?;
        let loading = global.waiting("loading the model");
        let mut model = self.model.load_plain(&files)?;
        self.top_k.set(model.decoder_mut())?;
        let (texts, batches) = self.text.batches(&model)?;
        let kinds = self.text.kinds(&model, &texts)?;
        drop(loading);
        let bar = global.progress(batches.iter().map(|batch| batch.live_tokens()).sum());
        bar.set_message("tracing");
        let trace = GateTrace {
            model: Some(model.name().to_owned()),
            batch_tokens: Some(self.text.batch_tokens),
            kinds,
            ..GateTrace::capture(model.decoder(), &batches, |tokens| bar.inc(tokens))?
        };
        drop(bar);
        warn_streamed(model.decoder());
        out.write(&trace.to_bytes()?)
    }
}
