//! `inspect`: what a checkpoint holds, from its headers alone.

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use crate::global::Global;
use crate::options::{ModelSource, print_json};
use crate::report::table::{Cell, Column, Table};

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
    /// Of tensors that are not read: for pictures, for guessing further tokens.
    unread_bytes: u64,
    /// What generation keeps of each token of a text, in `f32`: keys and values.
    kept_bytes_per_token: u64,
    /// What it keeps of a text however long it is: states of blocks without attention.
    state_bytes: u64,
    parameters: usize,
    active_parameters: usize,
}

impl Inspect {
    pub fn run(self, global: &Global) -> Result<()> {
        let reading = global.waiting("reading headers");
        let files = self.model.files()?;
        let spec = files.spec()?;
        let experts = files.expert_sizes()?;
        let unread_bytes = files.unread_bytes()?;
        let floats = |numbers: usize| (numbers as u64).saturating_mul(4);
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
            other_bytes: all_bytes.saturating_sub(experts.all).saturating_sub(unread_bytes),
            unread_bytes,
            kept_bytes_per_token: floats(spec.kept_numbers_per_token()),
            state_bytes: floats(spec.state_numbers()),
            parameters: spec.parameters(),
            active_parameters: spec.active_parameters(),
        };
        drop(reading);
        if self.json {
            return print_json(&output);
        }
        let terminal = global.terminal();
        let mut sizes = vec![
            format!("{}: {}, stored in {}", files.name(), output.family, output.dtype),
            format!(
                "  {} layers of {} experts, top {}, hidden {}, expert width {}",
                output.moe_layers, output.experts, output.top_k, output.hidden, output.expert_width
            ),
            format!("  {} parameters, {} active per token", count(output.parameters), count(output.active_parameters)),
            format!(
                "  {} an expert, {} all experts, {} the rest",
                bytes(output.bytes_per_expert),
                bytes(output.expert_bytes),
                bytes(output.other_bytes)
            ),
        ];
        let kept = format!("  a text keeps {} for each token", bytes(output.kept_bytes_per_token));
        sizes.push(match output.state_bytes {
            0 => format!("{kept} in f32: keys and values"),
            state => format!("{kept} in f32: keys and values, and {} whatever its length: states", bytes(state)),
        });
        if output.unread_bytes > 0 {
            sizes.push(format!(
                "  {} are not read: what is for pictures or for guessing further tokens",
                bytes(output.unread_bytes)
            ));
        }
        let mut text: String = sizes.iter().map(|line| terminal.wrapped(line, 4) + "\n").collect();
        text += &format!("\n{}", output.memory().text(&terminal));
        terminal.print(&text)
    }
}

impl Output {
    /// What the weights need with all experts in memory, or some of them.
    fn memory(&self) -> Table {
        let mut table = Table::new(vec![
            Column::figures("experts in\nmemory").legend("the others are read when they are needed: --expert-cache"),
            Column::figures("per layer"),
            Column::figures("experts").legend("what these take: about what --expert-cache needs"),
            Column::figures("memory").legend(format!("these and the rest of the weights, in {}", self.dtype)),
        ]);
        for percent in [100, 50, 25] {
            let resident = self.experts * percent / 100;
            let experts = (resident as u64).saturating_mul(self.moe_layers as u64);
            let experts = self.bytes_per_expert.saturating_mul(experts);
            table.row(vec![
                Cell::name(format!("{percent} %")),
                Cell::name(resident.to_string()),
                Cell::name(bytes(experts)),
                Cell::name(bytes(self.other_bytes.saturating_add(experts))),
            ]);
        }
        table
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
