//! `inspect`: what a checkpoint holds, from its headers alone.

use std::io::Write;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use crate::options::{ModelSource, print_json};

/// Tells what a checkpoint holds and what would fit in how much memory; reads headers only.
///
/// Example: phase-moe inspect --model path/to/OLMoE-1B-7B
#[derive(Args)]
pub struct Inspect {
    #[command(flatten)]
    model: ModelSource,
    /// One JSON document instead of the list
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    family: &'static str,
    layers: usize,
    moe_layers: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
    expert_width: usize,
    /// Dtype of the experts as stored.
    dtype: String,
    bytes_per_expert: u64,
    expert_bytes: u64,
    other_bytes: u64,
    parameters: usize,
    active_parameters: usize,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let files = self.model.files()?;
        let spec = files.spec()?;
        let experts = files.expert_sizes()?;
        let all_bytes: u64 = files.checkpoint().tensors().values().map(|entry| entry.bytes as u64).sum();
        let output = Output {
            family: spec.family,
            layers: spec.layers,
            moe_layers: spec.moe_blocks().count(),
            hidden: spec.moe.hidden,
            experts: spec.moe.experts,
            top_k: spec.moe.top_k,
            expert_width: spec.moe.expert_width,
            dtype: experts.dtypes.join(", "),
            bytes_per_expert: experts.first,
            expert_bytes: experts.all,
            other_bytes: all_bytes.saturating_sub(experts.all),
            parameters: spec.parameters(),
            active_parameters: spec.active_parameters(),
        };
        if self.json {
            return print_json(&output);
        }
        let mut out = std::io::stdout();
        writeln!(out, "{}: {}, stored in {}", files.name(), output.family, output.dtype)?;
        writeln!(
            out,
            "  {} layers of {} experts, top {}, hidden {}, expert width {}",
            output.moe_layers, output.experts, output.top_k, output.hidden, output.expert_width
        )?;
        writeln!(
            out,
            "  {} parameters, {} active per token",
            count(output.parameters),
            count(output.active_parameters)
        )?;
        writeln!(
            out,
            "  {} an expert, {} all experts, {} the rest",
            bytes(output.bytes_per_expert),
            bytes(output.expert_bytes),
            bytes(output.other_bytes)
        )?;
        writeln!(out, "  memory for the weights in {}, with this share of the experts resident:", output.dtype)?;
        for percent in [100, 50, 25] {
            let resident = output.experts * percent / 100;
            let experts = (resident as u64).saturating_mul(output.moe_layers as u64);
            let needed = output.other_bytes.saturating_add(output.bytes_per_expert.saturating_mul(experts));
            writeln!(out, "    {percent:>3} % ({resident} per layer)  {}", bytes(needed))?;
        }
        Ok(())
    }
}

fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

fn count(parameters: usize) -> String {
    match parameters {
        0..1_000_000 => format!("{:.1} k", parameters as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", parameters as f64 / 1e6),
        _ => format!("{:.2} G", parameters as f64 / 1e9),
    }
}
