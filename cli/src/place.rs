//! `place`: which expert should be on which device, from a gate trace.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use phase_moe::Placement;
use phase_moe::eval::{GateTrace, Placing};

use crate::global::Global;
use crate::mistake::UserMistake;
use crate::options::{TextOptions, print_json};
use crate::output::{Destination, Inputs};
use crate::placement::PlacementFile;
use crate::report::place::PlaceReport;

/// Chooses which experts share a device, from captured gate logits: those that tokens use together, on devices as full as they are fast
/// with every kind of text. Prints what that comes to beside contiguous groups, random ones and packing by load.
///
/// What is printed was chosen on the first half of the tokens of each kind of text and measured on the second; what --out writes, for
/// --placement of other commands, is chosen from all of them.
///
/// Example: phase-moe place --trace trace.safetensors --devices 4 --out placement.json
#[derive(Args)]
pub struct Place {
    /// Gate logits, as `trace` writes them
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// How many devices
    #[arg(long, value_name = "N", required_unless_present = "device_speeds")]
    devices: Option<usize>,
    /// Relative speeds of the devices: one twice as fast has twice the experts [default: all alike]
    #[arg(long, value_name = "A,B,..", value_delimiter = ',', allow_hyphen_values = true)]
    device_speeds: Vec<f64>,
    /// Experts per token [default: the trace's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Tokens per batch [default: the trace's, or 512]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<usize>,
    /// Seed of the random placements
    #[arg(long, value_name = "S", default_value_t = 42)]
    seed: u64,
    /// Where the placement goes
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

impl Place {
    pub fn run(self, global: &Global) -> Result<()> {
        if self.batch_tokens == Some(0) {
            return Err(UserMistake("--batch-tokens is 0: expected at least 1".into()).into());
        }
        let given = self.device_speeds.len();
        if let Some(devices) = self.devices.filter(|&devices| given > 0 && devices != given) {
            let message = format!("--device-speeds: expected --devices {devices} values, got {given}");
            return Err(UserMistake(message).into());
        }
        if let Some(bad) = self.device_speeds.iter().find(|speed| !(speed.is_finite() && **speed > 0.0)) {
            let message = format!("--device-speeds: expected positive finite numbers, got {bad}");
            return Err(UserMistake(message).into());
        }
        let out = self.out.as_ref().map(|out| Destination::open("--out", out)).transpose()?;
        let inputs = Inputs::default().file("--trace", &self.trace);
        let out = out.map(|out| out.apart_from(&inputs)).transpose()?;
        let reading = global.waiting("reading the trace");
        let trace = GateTrace::read(&self.trace)?;
        drop(reading);
        let devices = self.devices.unwrap_or(given);
        // Before as many numbers are made: no model has so many experts.
        if !(1..=trace.experts).contains(&devices) {
            let message = format!("--devices is {devices}: expected 1 to experts {}", trace.experts);
            return Err(UserMistake(message).into());
        }
        let speeds = if given > 0 { self.device_speeds.clone() } else { vec![1.0; devices] };
        let batch_tokens = self.batch_tokens.or(trace.batch_tokens).unwrap_or(TextOptions::BATCH_TOKENS);
        let placing = Placing { speeds, top_k: self.top_k, batch_tokens, seed: self.seed };
        let bar = global.progress(trace.layers.len() as u64);
        bar.set_message("placing");
        let rows = placing.held_out(&trace, || bar.inc(1))?;
        drop(bar);
        if let Some(out) = out {
            let placing_all = global.waiting("placing by all of it");
            let chosen = placing.choose(&trace)?;
            drop(placing_all);
            let layers = chosen.iter().map(Placement::device_of).map(<[u16]>::to_vec).collect();
            let file = serde_json::to_string(&PlacementFile { devices, layers }).context("--out")?;
            out.write((file + "\n").as_bytes())?;
        }
        let kinds = trace.kinds.as_ref().map(|kinds| {
            let distinct: std::collections::BTreeSet<u32> = kinds.iter().copied().collect();
            distinct.len()
        });
        let report = PlaceReport {
            source: self.trace.display().to_string(),
            devices,
            device_speeds: self.device_speeds,
            layers: trace.layers.len(),
            experts: trace.experts,
            tokens: trace.tokens(),
            batch_tokens,
            kinds,
            rows,
        };
        match self.json {
            true => print_json(&report),
            false => {
                let terminal = global.terminal();
                terminal.print(&report.text(&terminal))
            }
        }
    }
}
