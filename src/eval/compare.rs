//! Routers side by side: real forward passes of one model over the same batches, each under the same capacities.
//!
//! The limit works inside every MoE layer of the forward pass, batch by batch, so what a drop does to one layer is what the
//! next one sees. Router states (prices) are carried from batch to batch, as a server would; an expert cache starts each router with
//! nothing resident.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::perplexity::Perplexity;
use crate::decoder::memory::ExpertMemory;
use crate::decoder::{Batch, Decoder, DecoderState};
use crate::error::Result;
use crate::layer::Routed;
use crate::parallel::{ExpertParallel, RankShares};
use crate::routing::cache_aware::CacheRouter;
use crate::routing::capacity::{CapacityRule, Rounding, Shares};
use crate::routing::metrics::{Balance, RouteMetrics};
use crate::routing::phase::PhaseRouter;
use crate::routing::registry::RouterKind;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router};

/// One router under one capacity rule, or without a limit.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The router.
    pub router: RouterKind,
    /// How much room there is.
    pub capacity: Option<CapacityRule>,
    /// For routers that draw.
    pub seed: u64,
    /// For memory-aware routers.
    pub cache: CacheRouter,
    /// Experts in fast memory at the start, for routers that look at them; `None` where no account is kept.
    pub memory: Option<ExpertMemory>,
    /// Devices whose loads are counted where `capacity` has none; `None` counts those of `capacity` alone.
    pub devices: Option<Shares>,
}

/// What one router did with all batches, means over layers and batches unless said otherwise. Rates and shares are
/// fractions of 1; a figure that does not apply is `None`. Violations and spreads are over the batches that had a limit (a
/// short last batch may be below the rule's minimum), or over all where none had.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RouterFigures {
    /// Name of the router.
    pub router: &'static str,
    /// Room over demand; `None` without limit.
    pub capacity_factor: Option<f64>,
    /// Profile of the experts' capacities; `None` per device or without limit.
    pub profile: Option<&'static str>,
    /// `exact` or `ceil`.
    pub capacity_rule: Option<&'static str>,
    /// Devices that share the limit or, without one, on which loads are counted; `None` per expert.
    pub devices: Option<usize>,
    /// Largest load of a device over its share, minus 1; `None` without devices.
    pub device_max_violation: Option<f64>,
    /// Kept slots / slots asked for; above 1 where tokens get more experts than they asked for.
    pub survival: f64,
    /// Dropped slots in all layers and batches together; 0 where more were kept than asked for.
    pub dropped_slots: u64,
    /// Tokens that got no expert in a layer, all layers and batches together.
    pub tokens_without_expert: u64,
    /// Largest load of the gate's own choice over its share, minus 1.
    pub demand_max_violation: f64,
    /// Kept gate mass / gate mass of unconstrained top-k.
    pub gate_mass: f64,
    /// Kept gate mass / certified upper bound under these capacities; `None` where the router knows no limit or gives
    /// tokens more experts than they asked for.
    pub gate_mass_vs_bound: Option<f64>,
    /// Perplexity of the model with this router.
    pub perplexity: f64,
    /// Perplexity over dropless perplexity, minus 1.
    pub perplexity_increase: f64,
    /// Largest load of an expert over its share, minus 1.
    pub max_violation: f64,
    /// Standard deviation of the experts' loads over their mean.
    pub load_cv: f64,
    /// Gini coefficient of the experts' loads.
    pub gini: f64,
    /// Jain's fairness index of the experts' loads.
    pub jain: f64,
    /// Median time in the router, nanoseconds a token and layer, router states warm.
    pub route_nanos_per_token: f64,
    /// Tokens per second of the whole forward pass.
    pub tokens_per_second: f64,
    /// Kept slots of each expert of each MoE layer, all batches together.
    #[serde(skip)]
    pub loads: Vec<Vec<u64>>,
    /// Of each batch the negative log likelihoods' sum, in nats, and of how many tokens: what noise is told by.
    #[serde(skip)]
    pub batch_nats: Vec<(f64, u64)>,
    /// What ranks did, where the model's experts are over several.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RankShares>,
}

/// Perplexity and speed of the model without any limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Dropless {
    /// Perplexity.
    pub perplexity: f64,
    /// Tokens per second of the forward pass.
    pub tokens_per_second: f64,
}

/// Measures the model as it is: dropless top-k. `progress` is called after each batch with its tokens.
///
/// # Errors
/// Whatever the forward pass reports.
pub fn dropless(decoder: &Decoder, batches: &[Batch], mut progress: impl FnMut(u64)) -> Result<Dropless> {
    let mut decoder = decoder.clone();
    decoder.set_router(Arc::from(RouterKind::TopK.build(0)));
    decoder.set_capacity(None);
    let (mut perplexity, mut time, mut tokens) = (Perplexity::default(), Duration::ZERO, 0);
    // Once untimed: the first pass pays for memory and threads.
    if let Some(first) = batches.first() {
        decoder.forward(first, &mut decoder.batch_state())?;
    }
    for batch in batches {
        let started = Instant::now();
        let logits = decoder.forward(batch, &mut decoder.batch_state())?;
        time += started.elapsed();
        perplexity.add_pass(&decoder, &logits, batch)?;
        tokens += batch.live_tokens();
        progress(batch.live_tokens());
    }
    Ok(Dropless { perplexity: perplexity.value()?, tokens_per_second: tokens as f64 / time.as_secs_f64() })
}

/// Runs the model over `batches` with one router. `seen` is called after each batch with what every layer did, [`DecoderState::routed`], and
/// with an upper bound on the gate mass of each, where there is one. Without `dropless` this is the run that others are measured
/// against: the first batch goes through once untimed, and `perplexity_increase` is 0.
///
/// # Errors
/// Whatever the capacity rule, the router, the forward pass or `seen` reports.
pub fn compare(
    decoder: &Decoder,
    batches: &[Batch],
    setting: &Setting,
    dropless: Option<&Dropless>,
    mut seen: impl FnMut(&Batch, &DecoderState, &[Option<f64>]) -> Result<()>,
) -> Result<RouterFigures> {
    let mut decoder = decoder.clone();
    let router: Arc<dyn Router> = Arc::from(setting.router.build_with(setting.seed, &setting.cache));
    decoder.set_router(router.clone());
    decoder.set_capacity(setting.capacity.clone());
    if let Some(first) = batches.first().filter(|_| dropless.is_none()) {
        // The first pass pays for memory and threads.
        decoder.forward(first, &mut decoder.batch_state())?;
    }
    if let Some(cache) = decoder.expert_cache() {
        // A row must not depend on the rows before it.
        cache.forget()?;
    }
    let mut state = decoder.batch_state().keeping_routed();
    if let Some(memory) = &setting.memory {
        state = state.with_memory(memory.clone());
    }
    let layers = decoder.spec().moe_layers();
    let mut bounds = BoundTracker::new(router.as_ref(), layers);
    let mut sums_of_loads = vec![vec![0; decoder.spec().moe.experts]; layers];
    let mut batch_nats = Vec::with_capacity(batches.len());
    let (mut sums, mut perplexity, mut time, mut tokens) = (Sums::default(), Perplexity::default(), Duration::ZERO, 0);
    let mut known = Vec::with_capacity(layers);
    let before = decoder.parallel().map(ExpertParallel::totals);
    let devices = |layer| setting.device_shares().map(|shares| shares.of_layer(layer, layers)).transpose();
    let devices = (0..layers).map(devices).collect::<Result<Vec<_>>>()?;
    for batch in batches {
        let started = Instant::now();
        let logits = decoder.forward(batch, &mut state)?;
        time += started.elapsed();
        known.clear();
        for (layer, routed) in state.routed().iter().enumerate() {
            let bound = bounds.bound(routed, RouteContext { layer, ..batch.context() })?;
            let devices = device_violation(routed, devices[layer].as_ref())?;
            sums.add(routed, bound, devices)?;
            let loads = routed.assignment.load();
            sums_of_loads[layer].iter_mut().zip(loads).for_each(|(sum, load): (&mut u64, _)| *sum += u64::from(load));
            known.push(bound);
        }
        let before = perplexity;
        perplexity.add_pass(&decoder, &logits, batch)?;
        batch_nats.push(perplexity.since(&before));
        tokens += batch.live_tokens();
        seen(batch, &state, &known)?;
    }
    let perplexity = perplexity.value()?;
    let base = dropless.map_or(perplexity, |dropless| dropless.perplexity);
    let figures = sums.figures(setting, layers, perplexity, base, tokens as f64 / time.as_secs_f64());
    let ranks = decoder.parallel().zip(before).map(|(ranks, before)| ranks.shares(&before, tokens, time));
    let ranks = ranks.transpose()?;
    Ok(RouterFigures { loads: sums_of_loads, batch_nats, ranks, ..figures })
}

impl Setting {
    /// The shares of the devices on which loads are counted.
    fn device_shares(&self) -> Option<&Shares> {
        let own = self.capacity.as_ref().map(|rule| &rule.shares);
        own.or(self.devices.as_ref()).filter(|shares| shares.speeds().is_some())
    }
}

/// Largest load of a device over its share, minus 1: its limit's part of the demand or, in a batch without limits, its speed's.
fn device_violation(routed: &Routed, shares: Option<&Shares>) -> Result<Option<f64>> {
    let Some((shares, speeds)) = shares.and_then(|shares| Some((shares, shares.speeds()?))) else { return Ok(None) };
    let load = routed.assignment.load();
    let Some(placement) = shares.placement(load.len())? else { return Ok(None) };
    let mut devices = vec![0; placement.devices()];
    load.iter().zip(placement.device_of()).for_each(|(load, &device)| devices[usize::from(device)] += load);
    let fair: Vec<f64> = match routed.capacity.limits() {
        Some(limits) => limits.iter().map(|&limit| f64::from(limit)).collect(),
        // Divided by the fastest, so that no sum of them overflows.
        None => {
            let fastest = speeds.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
            speeds.iter().map(|speed| speed / fastest).collect()
        }
    };
    let live =
        routed.padding.as_ref().map_or(routed.assignment.tokens(), |pads| pads.iter().filter(|pad| !**pad).count());
    let demand = live as u64 * routed.assignment.top_k() as u64;
    Ok(Some(Balance::new(&devices, &fair, demand).max_violation))
}

/// Certified bounds on gate mass, from the router itself or, for those that know none, from the phase router's prices on
/// the same scores.
struct BoundTracker {
    /// `None` where the router exceeds its capacity or top_k: no bound applies.
    states: Option<Vec<RouteState>>,
}

impl BoundTracker {
    fn new(router: &dyn Router, layers: usize) -> Self {
        let bounded = router.respects_capacity() && router.keeps_top_k();
        Self { states: bounded.then(|| vec![RouteState::default(); layers]) }
    }

    fn bound(&mut self, routed: &Routed, context: RouteContext<'_>) -> Result<Option<f64>> {
        let Some(states) = &mut self.states else { return Ok(None) };
        if let Some(bound) = routed.assignment.gate_mass_bound() {
            return Ok(Some(bound));
        }
        let scores = routed.scores()?;
        let request = RouteRequest::new(&scores, routed.assignment.top_k(), &routed.capacity, context)?;
        let certified = PhaseRouter::default().route(&request, &mut states[context.layer])?;
        Ok(certified.gate_mass_bound())
    }
}

/// Sums over layers and batches.
#[derive(Default)]
struct Sums {
    count: f64,
    /// Batches whose balance is counted, and how many of them had a limit.
    balanced: f64,
    limited: bool,
    demand: u64,
    kept: u64,
    tokens_without_expert: u64,
    demand_max_violation: f64,
    gate_mass: f64,
    gate_mass_vs_bound: Option<f64>,
    device_max_violation: Option<f64>,
    max_violation: f64,
    load_cv: f64,
    gini: f64,
    jain: f64,
    nanos_per_token: Vec<f64>,
}

impl Sums {
    fn add(&mut self, routed: &Routed, bound: Option<f64>, device_violation: Option<f64>) -> Result<()> {
        let metrics = routed.metrics()?;
        self.count += 1.0;
        self.demand += metrics.demand;
        self.kept += metrics.kept;
        self.tokens_without_expert += metrics.tokens_without_expert;
        self.gate_mass += metrics.gate_mass_share();
        if let Some(bound) = bound {
            let share = if bound > 0.0 { metrics.gate_mass / bound } else { 1.0 };
            *self.gate_mass_vs_bound.get_or_insert(0.0) += share;
        }
        let live = metrics.demand as f64 / routed.assignment.top_k() as f64;
        self.nanos_per_token.push(routed.route_time.as_nanos() as f64 / live.max(1.0));
        self.add_balance(&metrics, device_violation, routed.capacity.limits().is_some());
        Ok(())
    }

    fn add_balance(&mut self, metrics: &RouteMetrics, device_violation: Option<f64>, limited: bool) {
        match (self.limited, limited) {
            (true, false) => return,
            (false, true) => {
                self.limited = true;
                (self.balanced, self.demand_max_violation, self.max_violation) = (0.0, 0.0, 0.0);
                (self.load_cv, self.gini, self.jain) = (0.0, 0.0, 0.0);
                self.device_max_violation = None;
            }
            _ => {}
        }
        self.balanced += 1.0;
        self.demand_max_violation += metrics.demand_max_violation;
        if let Some(violation) = device_violation {
            *self.device_max_violation.get_or_insert(0.0) += violation;
        }
        self.max_violation += metrics.experts.max_violation;
        self.load_cv += metrics.experts.cv;
        self.gini += metrics.experts.gini;
        self.jain += metrics.experts.jain;
    }

    fn figures(
        mut self,
        setting: &Setting,
        moe_layers: usize,
        perplexity: f64,
        dropless_perplexity: f64,
        tokens_per_second: f64,
    ) -> RouterFigures {
        let (count, balanced) = (self.count.max(1.0), self.balanced.max(1.0));
        // The first batch of each layer started cold.
        let cold = moe_layers.min(self.nanos_per_token.len().saturating_sub(1));
        self.nanos_per_token.drain(..cold);
        self.nanos_per_token.sort_by(f64::total_cmp);
        let rule = setting.capacity.as_ref();
        let devices = setting.device_shares().and_then(Shares::speeds).map(<[f64]>::len);
        let profile = match rule.map(|rule| &rule.shares) {
            Some(Shares::PerExpert { profile, .. }) => Some(profile.name()),
            _ => None,
        };
        RouterFigures {
            router: setting.router.name(),
            capacity_factor: rule.map(|rule| rule.factor),
            profile,
            capacity_rule: rule.map(|rule| match rule.rounding {
                Rounding::Exact => "exact",
                Rounding::Ceil => "ceil",
            }),
            devices,
            device_max_violation: self.device_max_violation.map(|sum| sum / balanced),
            survival: if self.demand == 0 { 1.0 } else { self.kept as f64 / self.demand as f64 },
            dropped_slots: self.demand.saturating_sub(self.kept),
            tokens_without_expert: self.tokens_without_expert,
            demand_max_violation: self.demand_max_violation / balanced,
            gate_mass: self.gate_mass / count,
            gate_mass_vs_bound: self.gate_mass_vs_bound.map(|sum| sum / count),
            perplexity,
            perplexity_increase: perplexity / dropless_perplexity - 1.0,
            max_violation: self.max_violation / balanced,
            load_cv: self.load_cv / balanced,
            gini: self.gini / balanced,
            jain: self.jain / balanced,
            route_nanos_per_token: self.nanos_per_token.get(self.nanos_per_token.len() / 2).copied().unwrap_or(0.0),
            tokens_per_second,
            loads: Vec::new(),
            batch_nats: Vec::new(),
            ranks: None,
        }
    }
}
