//! `route`: captured gate logits through any router, without the model.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use phase_moe::eval::trace::{GateTrace, LayerTrace, write_tensors};
use phase_moe::routing::capacity::{Capacity, CapacityRule, Placement};
use phase_moe::routing::logits::Logits;
use phase_moe::routing::metrics::RouteMetrics;
use phase_moe::routing::phase::PhaseRouter;
use phase_moe::routing::registry::RouterKind;
use phase_moe::routing::router::{RouteContext, RouteRequest, RouteState, Router};
use safetensors::Dtype;
use serde::Serialize;

use crate::options::{CapacityOptions, UserMistake, parse, print_json};

/// Routes captured gate logits with any router, offline. The whole file is one batch unless --batch-tokens says otherwise.
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
    #[arg(long, value_name = "F", conflicts_with = "capacities")]
    capacity_factor: Option<f64>,
    /// Slots per expert, or per device with --devices
    #[arg(long, value_name = "C0,C1,..", value_delimiter = ',')]
    capacities: Vec<u32>,
    #[command(flatten)]
    capacity: CapacityOptions,
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

/// Sums over the batches of a layer; violations and spreads are means over them.
#[derive(Default, Serialize)]
struct LayerFigures {
    layer: usize,
    tokens: usize,
    experts: usize,
    demand: u64,
    capacity_total: Option<u64>,
    kept: u64,
    survival: f64,
    feasible_survival: f64,
    gate_mass: f64,
    gate_mass_vs_bound: Option<f64>,
    max_violation: f64,
    load_cv: f64,
    route_nanos_per_token: f64,
}

/// Name, dtype, shape and bytes of a tensor to write.
type NamedTensor = (String, Dtype, Vec<usize>, Vec<u8>);

impl Route {
    pub fn run(self) -> Result<()> {
        let rule = self.capacity_factor.map(|factor| self.capacity.rule(factor)).transpose()?;
        let trace = GateTrace::read(&self.logits)?;
        let top_k = self.top_k.unwrap_or(trace.top_k);
        if self.batch_tokens == Some(0) {
            return Err(UserMistake("--batch-tokens is 0: expected at least 1".into()).into());
        }
        let router = self.router.build(self.capacity.seed);
        let (mut layers, mut tensors) = (Vec::new(), Vec::new());
        for layer in &trace.layers {
            layers.push(self.layer(&trace, layer, top_k, router.as_ref(), rule.as_ref(), &mut tensors)?);
        }
        if let Some(out) = &self.out {
            write_tensors(out, &tensors, None)?;
        }
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
                format!("{:.2} ×", layer.max_violation + 1.0),
                layer.route_nanos_per_token
            )?;
        }
        Ok(())
    }

    /// The room of a batch.
    fn room(&self, rule: Option<&CapacityRule>, tokens: usize, experts: usize, top_k: usize) -> Result<Capacity> {
        if self.capacities.is_empty() {
            return Ok(match rule {
                Some(rule) => rule.capacity(tokens, experts, top_k)?,
                None => Capacity::unlimited(experts)?,
            });
        }
        let limits = self.capacities.clone();
        match self.capacity.devices {
            Some(devices) => Ok(Capacity::per_device(Placement::contiguous(experts, devices)?, limits)?),
            None if limits.len() != experts => {
                let message = format!("--capacities: expected {experts} values, one per expert, got {}", limits.len());
                Err(UserMistake(message).into())
            }
            None => Ok(Capacity::per_expert(limits)?),
        }
    }

    fn layer(
        &self,
        trace: &GateTrace,
        layer: &LayerTrace,
        top_k: usize,
        router: &dyn Router,
        rule: Option<&CapacityRule>,
        tensors: &mut Vec<NamedTensor>,
    ) -> Result<LayerFigures> {
        let (tokens, experts) = (trace.tokens(), trace.experts);
        let batch_tokens = self.batch_tokens.unwrap_or(tokens).max(1);
        let (mut state, mut certifier) = (RouteState::default(), RouteState::default());
        let (mut ids, mut weights, mut nanos) = (Vec::new(), Vec::new(), Vec::new());
        let (mut top_k_mass, mut kept_mass, mut bound_sum, mut feasible, mut batches) = (0.0, 0.0, Some(0.0), 0, 0.0);
        let mut figures = LayerFigures { layer: layer.layer, tokens, experts, ..LayerFigures::default() };
        let (mut total, mut limits, mut device_limits) = (Some(0), vec![0u32; experts], None::<Vec<u32>>);
        for start in (0..tokens).step_by(batch_tokens) {
            let rows = batch_tokens.min(tokens - start);
            let logits = Logits::new(&layer.logits[start * experts..(start + rows) * experts], rows, experts)?;
            let scores = trace.scoring.scores(&logits, layer.selection_bias.as_deref())?;
            let capacity = self.room(rule, rows, experts, top_k)?;
            let token_ids = trace.token_ids.as_ref().map(|ids| &ids[start..start + rows]);
            let context = RouteContext { layer: layer.layer, token_ids, padding: None };
            let request = RouteRequest::new(&scores, top_k, &capacity, context)?;

            let started = Instant::now();
            let assignment = router.route(&request, &mut state)?;
            nanos.push(started.elapsed().as_nanos() as f64 / rows as f64);

            let metrics = RouteMetrics::new(&request, &assignment);
            let certified = PhaseRouter::default().route(&request, &mut certifier)?;
            feasible += certified.kept() as u64;
            let bound = assignment.gate_mass_bound().or(certified.gate_mass_bound());
            bound_sum = bound_sum.zip(bound.filter(|_| router.respects_capacity())).map(|(sum, bound)| sum + bound);
            (figures.demand, figures.kept) = (figures.demand + metrics.demand, figures.kept + metrics.kept);
            (top_k_mass, kept_mass) = (top_k_mass + metrics.top_k_gate_mass, kept_mass + metrics.gate_mass);
            figures.max_violation += metrics.devices.unwrap_or(metrics.experts).max_violation;
            figures.load_cv += metrics.experts.cv;
            batches += 1.0;
            ids.extend(assignment.ids());
            weights.extend_from_slice(assignment.weights());
            total = total.zip(capacity.total()).map(|(sum, total)| sum + total);
            add_limits(&capacity, rows, &mut limits, &mut device_limits);
        }
        nanos.sort_by(f64::total_cmp);
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 1.0 };
        figures.capacity_total = total;
        figures.survival = share(figures.kept as f64, figures.demand as f64);
        figures.feasible_survival = share(feasible as f64, figures.demand as f64);
        figures.gate_mass = share(kept_mass, top_k_mass);
        figures.gate_mass_vs_bound = bound_sum.map(|bound| share(kept_mass, bound));
        figures.max_violation /= f64::max(batches, 1.0);
        figures.load_cv /= f64::max(batches, 1.0);
        figures.route_nanos_per_token = nanos.get(nanos.len() / 2).copied().unwrap_or(0.0);

        let name = |what: &str| format!("layer.{}.{what}", layer.layer);
        let ids: Vec<u8> = ids.into_iter().flat_map(i32::to_le_bytes).collect();
        tensors.push((name("experts"), Dtype::I32, vec![tokens, top_k], ids));
        let weights = weights.into_iter().flat_map(f32::to_le_bytes).collect();
        tensors.push((name("weights"), Dtype::F32, vec![tokens, top_k], weights));
        let (name, limits) = match device_limits {
            Some(limits) => (name("device_capacities"), limits),
            None => (name("capacities"), limits),
        };
        let bytes = limits.iter().flat_map(|limit| limit.to_le_bytes()).collect();
        tensors.push((name, Dtype::U32, vec![limits.len()], bytes));
        Ok(figures)
    }
}

/// Adds the limits of a batch; an expert without limit could take every token of it.
fn add_limits(capacity: &Capacity, rows: usize, experts: &mut [u32], devices: &mut Option<Vec<u32>>) {
    match (capacity.limits(), capacity.placement()) {
        (Some(limits), Some(_)) => {
            let sums = devices.get_or_insert_with(|| vec![0; limits.len()]);
            sums.iter_mut().zip(limits).for_each(|(sum, limit)| *sum = sum.saturating_add(*limit));
        }
        (Some(limits), None) => {
            experts.iter_mut().zip(limits).for_each(|(sum, limit)| *sum = sum.saturating_add(*limit));
        }
        (None, _) => experts.iter_mut().for_each(|sum| *sum = sum.saturating_add(rows as u32)),
    }
}
