//! `route`: captured gate logits through any router, without the model.

use std::path::PathBuf;

use crate::report::route::{Limits, RouteReport, Routed};
use anyhow::Result;
use clap::Args;
use phase_moe::checkpoint::tensor_bytes;
use phase_moe::eval::{BatchCapacity, GateTrace, OfflineRouter};
use phase_moe::routing::Knowledge;
use phase_moe::{Capacity, Placement, RouterKind};

use crate::global::Global;
use crate::mistake::UserMistake;
use crate::notice::notice;
use crate::options::{CacheOptions, CapacityOptions, parse, print_json, refuse_unheard, trace_top_k, warn_unlimited};
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
        conflicts_with_all = ["profile", "capacity", "device_speeds", "placement"])]
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
    /// Print the load of every expert in every layer [default: where there are few layers]
    #[arg(long)]
    loads: bool,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

impl Route {
    pub fn run(self, global: &Global) -> Result<()> {
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
        let reading = global.waiting("reading the trace");
        let trace = GateTrace::read(&self.logits)?;
        drop(reading);
        let top_k = trace_top_k(self.top_k, &trace)?;
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
        let bar = global.progress(trace.layers.len() as u64);
        bar.set_message("routing");
        for layer in &trace.layers {
            let routed = router.route(&trace, layer)?;
            unlimited = unlimited.max(routed.batches_below_minimum);
            tensors.extend(out.iter().flat_map(|_| routed.tensors()));
            layers.push(Routed::new(routed));
            bar.inc(1);
        }
        drop(bar);
        let batch_tokens = self.batch_tokens.unwrap_or(trace.tokens()).max(1);
        let batches = trace.tokens().div_ceil(batch_tokens);
        if let BatchCapacity::Rule(rule) = &router.capacity {
            warn_unlimited(rule, unlimited, batches);
        }
        if let Some(out) = out {
            out.write(&tensor_bytes(&tensors, None)?)?;
        }
        let (devices, speeds) = (self.capacity.devices, &self.capacity.device_speeds);
        let limits = Limits::new(&router.capacity, &self.capacities, devices, speeds);
        let limits = limits.with_placement(self.capacity.placement());
        let report = RouteReport {
            source: self.logits.display().to_string(),
            router: self.router.name(),
            top_k,
            limits,
            batch_tokens: batch_tokens.min(trace.tokens()),
            batches,
            batches_below_minimum: unlimited,
            experts: trace.experts,
            tokens: trace.tokens(),
            all_loads: self.loads,
            layers,
        };
        match self.json {
            true => print_json(&report),
            false => {
                let terminal = global.terminal();
                terminal.print(&report.text(&terminal))
            }
        }
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
