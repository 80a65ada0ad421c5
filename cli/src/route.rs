//! `route`: captured gate logits through any router, without the model.

use std::io::Write;
use std::path::PathBuf;

use crate::report::times;
use anyhow::Result;
use clap::Args;
use phase_moe::checkpoint::tensor_bytes;
use phase_moe::eval::{BatchCapacity, GateTrace, LayerFigures, OfflineRouter};
use phase_moe::routing::Knowledge;
use phase_moe::{Capacity, Placement, RouterKind};
use serde::Serialize;

use crate::mistake::UserMistake;
use crate::notice::notice;
use crate::options::{CacheOptions, CapacityOptions, parse, print_json, refuse_unheard, warn_unlimited};
use crate::output::{Destination, Inputs};

/// Routes captured gate logits with any router, offline. The whole file is one batch unless --batch-tokens says otherwise.
///
/// Nothing is in fast memory here: cache and cache+phase go by what the batch has to load in any case. See `replay`.
///
/// Example: phase-moe route --logits trace.safetensors --router phase --capacity-factor 1.0 --out routes.safetensors
#[derive(Args)]
pub struct Route {
    /// Gate logits, as `trace` writes them
    #[arg(long, value_name = "FILE")]
    logits: PathBuf,
    /// Router to use
    #[arg(long, value_name = "NAME", default_value = "phase", value_parser = parse::<RouterKind>)]
    router: RouterKind,
    /// Experts per token [default: the trace's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Room over demand [default: no limit]
    #[arg(long, value_name = "F", allow_negative_numbers = true, conflicts_with = "capacities")]
    capacity_factor: Option<f64>,
    /// Slots per expert, or per device with --devices
    #[arg(long, value_name = "C0,C1,..", value_delimiter = ',', allow_hyphen_values = true,
        conflicts_with_all = ["profile", "capacity", "device_speeds"])]
    capacities: Vec<u32>,
    #[command(flatten)]
    capacity: CapacityOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Tokens per batch [default: all]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<usize>,
    /// Where experts, weights and capacities go
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    router: &'static str,
    top_k: usize,
    layers: Vec<LayerFigures>,
}

impl Route {
    pub fn run(self) -> Result<()> {
        if self.batch_tokens == Some(0) {
            return Err(UserMistake("--batch-tokens is 0: expected at least 1".into()).into());
        }
        let cache = self.cache.settings(&[self.router])?;
        if self.capacities.is_empty() {
            self.capacity.rule_if(self.router, self.capacity_factor, LIMITS)?;
        } else {
            refuse_unheard(&[self.router], Knowledge::Limits, &[("--capacities", true)])?;
        }
        let out = self.out.as_ref().map(|out| Destination::open("--out", out)).transpose()?;
        let inputs = Inputs::default().file("--logits", &self.logits);
        let out = out.map(|out| out.apart_from(&inputs)).transpose()?;
        let trace = GateTrace::read(&self.logits)?;
        let top_k = self.top_k.unwrap_or(trace.top_k);
        let router = OfflineRouter {
            router: self.router,
            seed: self.capacity.seed,
            cache,
            top_k,
            capacity: self.capacity_of_batches(trace.experts)?,
            batch_tokens: self.batch_tokens,
        };
        if trace.token_ids.is_none() && matches!(self.router, RouterKind::Hash | RouterKind::WeightedHash) {
            notice(format_args!(
                "{}: no `tokens`: {} hashes positions instead",
                self.logits.display(),
                self.router.name()
            ));
        }
        let (mut layers, mut tensors, mut unlimited) = (Vec::new(), Vec::new(), 0);
        for layer in &trace.layers {
            let routed = router.route(&trace, layer)?;
            unlimited = unlimited.max(routed.batches_below_minimum);
            tensors.extend(out.iter().flat_map(|_| routed.tensors()));
            layers.push(routed.figures);
        }
        if let BatchCapacity::Rule(rule) = &router.capacity {
            warn_unlimited(
                rule,
                unlimited,
                trace.tokens().div_ceil(self.batch_tokens.unwrap_or(trace.tokens()).max(1)),
            );
        }
        if let Some(out) = out {
            out.write(&tensor_bytes(&tensors, None)?)?;
        }
        let router = self.router;
        let output = Output { router: router.name(), top_k, layers };
        if self.json {
            return print_json(&output);
        }
        let mut out = std::io::stdout();
        writeln!(out, "{} on {}, top {top_k}", output.router, self.logits.display())?;
        writeln!(
            out,
            "{:>6}{:>8}{:>10}{:>10}{:>10}{:>11}{:>10}{:>8}",
            "layer", "tokens", "survival", "feasible", "gate mass", "of bound", "max load", "ns/tok"
        )?;
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        for layer in &output.layers {
            writeln!(
                out,
                "{:>6}{:>8}{:>10}{:>10}{:>10}{:>11}{:>10}{:>8.0}",
                layer.layer,
                layer.tokens,
                percent(layer.survival),
                percent(layer.feasible_survival),
                percent(layer.gate_mass),
                layer.gate_mass_vs_bound.map_or("–".into(), percent),
                times(layer.max_violation + 1.0),
                layer.route_nanos_per_token
            )?;
        }
        Ok(())
    }

    fn capacity_of_batches(&self, experts: usize) -> Result<BatchCapacity> {
        if self.capacities.is_empty() {
            let rule = self.capacity.rule_if(self.router, self.capacity_factor, LIMITS)?;
            return Ok(rule.map_or(BatchCapacity::Unlimited, BatchCapacity::Rule));
        }
        let limits = self.capacities.clone();
        Ok(BatchCapacity::Given(match self.capacity.devices {
            Some(devices) => Capacity::per_device(Placement::contiguous(experts, devices)?, limits)?,
            None if limits.len() != experts => {
                let message = format!("--capacities: expected {experts} values, one per expert, got {}", limits.len());
                return Err(UserMistake(message).into());
            }
            None => Capacity::per_expert(limits)?,
        }))
    }
}

/// What sets a limit here.
const LIMITS: &str = "--capacity-factor or --capacities";
