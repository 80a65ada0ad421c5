//! Where experts should be, from a gate trace: experts that tokens use together on one device, for then fewer rows go from device to
//! device, and devices as full as they are fast with every kind of text.
//!
//! `trace → top-k of every token → placement of each layer → what it comes to on tokens it was not chosen on`.
//!
//! Beside the placement that is [searched for](Placing::choose) stand contiguous groups, random ones, and the packing by load of DeepSeek's EPLB
//! (github.com/deepseek-ai/EPLB, `balanced_packing`; without its replicas): the heaviest expert first, to the device with the least load that has
//! room. All of them hold as many experts a device as [`Placement::by_speed`].
//!
//! Knows nothing of links and times.

mod search;

use rayon::prelude::*;
use serde::Serialize;

use super::trace::{GateTrace, LayerTrace};
use crate::error::{Error, Result};
use crate::routing::capacity::{Capacity, CapacityRule, Placement};
use crate::routing::logits::Logits;
use crate::routing::metrics::RouteMetrics;
use crate::routing::phase::PhaseRouter;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router};
use crate::routing::scores::Scores;
use crate::routing::stream::{Stream, layer_seed};
use crate::routing::topk::gate_choice;
use search::Uses;

/// For which devices experts are placed.
#[derive(Clone, Debug, PartialEq)]
pub struct Placing {
    /// Relative speed of each device.
    pub speeds: Vec<f64>,
    /// Experts per token; `None` for the trace's.
    pub top_k: Option<usize>,
    /// Tokens per batch.
    pub batch_tokens: usize,
    /// Of random placements.
    pub seed: u64,
}

/// What a way to place experts comes to, means over layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PlacedFigures {
    /// `chosen`, `contiguous`, `random` or `packed`.
    pub placement: &'static str,
    /// Devices that a token's experts are on.
    pub devices_per_token: f64,
    /// Rows that go from device to device for a token, there and back, where every device begins with as many tokens.
    pub rows_exchanged_per_token: f64,
    /// Slots of plain top-k per unit of speed, of the slowest device over all together, mean over batches.
    pub straggler_ratio: f64,
    /// The same of the kind of text that has the largest; in a trace without kinds, of such a batch.
    pub worst_kind_straggler_ratio: f64,
    /// Gate mass that `phase` keeps of plain top-k's with exactly as much room as there are slots.
    pub gate_mass: f64,
}

/// Random placements whose mean is shown.
const RANDOM: u64 = 4;

/// Tokens that go through together, all of one kind.
struct Part {
    kind: usize,
    tokens: Vec<usize>,
}

/// Which tokens of each kind.
#[derive(Clone, Copy)]
enum Tokens {
    All,
    FirstHalf,
    SecondHalf,
}

/// Sums over the batches of a layer.
#[derive(Clone, Default)]
struct Sums {
    tokens: f64,
    pairs: f64,
    /// Of each kind the slowest device's slots per unit of speed, and those of all together.
    slowest: Vec<(f64, f64)>,
    kept: f64,
    top_k: f64,
}

impl Placing {
    /// A placement of each layer, chosen from the whole of `trace`: the better outcome of exchanges from contiguous groups and from packed
    /// ones. Exchanges lower the devices per token times how far devices are over their share, with every kind of text; in a trace without
    /// kinds, in every batch.
    ///
    /// # Errors
    /// [`Error::Parameter`] for batches of no tokens and as [`Placement::by_speed`], [`Error::TopKZero`], [`Error::TopKExceedsExperts`].
    pub fn choose(&self, trace: &GateTrace) -> Result<Vec<Placement>> {
        let parts = self.parts(trace, Tokens::All)?;
        let chosen = |(at, layer)| Ok(self.of_layer(trace, layer, at, &parts)?.0);
        trace.layers.par_iter().enumerate().map(chosen).collect()
    }

    /// What placements come to that are chosen from the first half of the tokens (of each kind, where there are kinds), on the second half.
    /// `progress` is called after each layer.
    ///
    /// # Errors
    /// As [`Placing::choose`], [`Error::Parameter`] for a trace with fewer than two tokens, and whatever the router reports.
    pub fn held_out(&self, trace: &GateTrace, progress: impl Fn() + Sync) -> Result<Vec<PlacedFigures>> {
        let (first, second) = (self.parts(trace, Tokens::FirstHalf)?, self.parts(trace, Tokens::SecondHalf)?);
        if first.is_empty() {
            return Err(Error::parameter("tokens of the trace", trace.tokens(), "at least 2, one to choose by"));
        }
        let layer = |(at, layer): (usize, &LayerTrace)| -> Result<Vec<Sums>> {
            let (chosen, packed) = self.of_layer(trace, layer, at, &first)?;
            let contiguous = Placement::by_speed(trace.experts, &self.speeds)?;
            let random = (0..RANDOM).map(|draw| self.random(trace.experts, layer.layer, draw));
            let random = random.collect::<Result<Vec<_>>>()?;
            let sums =
                self.measure(trace, layer, at, &second, &[&[chosen, contiguous, packed], &random[..]].concat())?;
            progress();
            Ok(sums)
        };
        let layers: Vec<Vec<Sums>> = trace.layers.par_iter().enumerate().map(layer).collect::<Result<_>>()?;
        let figures = |placement, method: usize| {
            let of_method: Vec<&Sums> = layers.iter().map(|sums| &sums[method]).collect();
            figures(placement, &of_method, self.speeds.len())
        };
        let random: Vec<PlacedFigures> = (3..3 + RANDOM as usize).map(|method| figures("random", method)).collect();
        Ok(vec![figures("chosen", 0), figures("contiguous", 1), mean(&random), figures("packed", 2)])
    }

    /// Experts per token of the trace's layer number `at`.
    fn top_k(&self, trace: &GateTrace, at: usize) -> usize {
        self.top_k.or_else(|| trace.layer_top_k.get(at).copied()).unwrap_or(trace.top_k)
    }

    /// The tokens of a trace in batches of one kind each, in order.
    fn parts(&self, trace: &GateTrace, which: Tokens) -> Result<Vec<Part>> {
        if self.batch_tokens == 0 {
            return Err(Error::parameter("batch tokens", 0, "at least 1"));
        }
        let mut of_kind: std::collections::BTreeMap<u32, Vec<usize>> = std::collections::BTreeMap::new();
        for token in 0..trace.tokens() {
            let kind = trace.kinds.as_ref().map_or(0, |kinds| kinds[token]);
            of_kind.entry(kind).or_default().push(token);
        }
        let mut parts = Vec::new();
        for (kind, tokens) in of_kind.into_values().enumerate() {
            let half = tokens.len() / 2;
            let tokens = match which {
                Tokens::All => &tokens[..],
                Tokens::FirstHalf => &tokens[..half],
                Tokens::SecondHalf => &tokens[half..],
            };
            parts.extend(tokens.chunks(self.batch_tokens).map(|tokens| Part { kind, tokens: tokens.to_vec() }));
        }
        if trace.kinds.is_none() {
            parts.iter_mut().enumerate().for_each(|(batch, part)| part.kind = batch);
        }
        Ok(parts)
    }

    /// The chosen placement of a layer, and the packed one.
    fn of_layer(
        &self,
        trace: &GateTrace,
        layer: &LayerTrace,
        at: usize,
        parts: &[Part],
    ) -> Result<(Placement, Placement)> {
        let (experts, top_k) = (trace.experts, self.top_k(trace, at));
        let (contiguous, unlimited) = (Placement::by_speed(experts, &self.speeds)?, Capacity::unlimited(experts)?);
        let (mut chosen, mut kinds) = (Vec::new(), Vec::new());
        for part in parts {
            let scores = scores(trace, layer, part)?;
            let context = RouteContext { layer: layer.layer, ..RouteContext::default() };
            chosen.extend(gate_choice(&RouteRequest::new(&scores, top_k, &unlimited, context)?));
            kinds.resize(kinds.len() + part.tokens.len(), part.kind);
        }
        let fastest = self.speeds.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let speeds: Vec<f64> = self.speeds.iter().map(|speed| speed / fastest).collect();
        let uses = Uses { experts, chosen: &chosen, top_k, kinds: &kinds, speeds: &speeds };
        let packed = packed(&uses.slots(), &contiguous.sizes(), &speeds);
        let best = uses.best([contiguous.device_of().to_vec(), packed.clone()]);
        Ok((Placement::new(best, speeds.len())?, Placement::new(packed, speeds.len())?))
    }

    /// Groups of the same sizes, filled at random.
    fn random(&self, experts: usize, layer: usize, draw: u64) -> Result<Placement> {
        let mut device_of = Placement::by_speed(experts, &self.speeds)?.device_of().to_vec();
        Stream::new(layer_seed(self.seed, layer), draw).shuffle(&mut device_of);
        Placement::new(device_of, self.speeds.len())
    }

    /// What each of some placements of a layer comes to.
    fn measure(
        &self,
        trace: &GateTrace,
        layer: &LayerTrace,
        at: usize,
        parts: &[Part],
        placements: &[Placement],
    ) -> Result<Vec<Sums>> {
        let (top_k, kinds) = (self.top_k(trace, at), parts.iter().map(|part| part.kind + 1).max().unwrap_or(0));
        let unlimited = Capacity::unlimited(trace.experts)?;
        let mut sums = vec![Sums { slowest: vec![(0.0, 0.0); kinds], ..Sums::default() }; placements.len()];
        let mut states = vec![RouteState::default(); placements.len()];
        let rules = placements.iter().map(|placed| CapacityRule::placed(1.0, placed.clone(), self.speeds.clone()));
        let rules: Vec<CapacityRule> = rules.collect();
        let all: f64 = self.speeds.iter().sum();
        for part in parts {
            let (scores, tokens) = (scores(trace, layer, part)?, part.tokens.len());
            let context = RouteContext { layer: layer.layer, ..RouteContext::default() };
            let chosen = gate_choice(&RouteRequest::new(&scores, top_k, &unlimited, context)?);
            for (((placement, rule), state), sums) in placements.iter().zip(&rules).zip(&mut states).zip(&mut sums) {
                let (mut loads, mut on) = (vec![0.0; placement.devices()], vec![usize::MAX; placement.devices()]);
                for (token, slots) in chosen.chunks_exact(top_k).enumerate() {
                    for device in slots.iter().filter_map(|&expert| placement.device_of().get(usize::from(expert))) {
                        let device = usize::from(*device);
                        loads[device] += 1.0;
                        sums.pairs += f64::from(u8::from(on[device] != token));
                        on[device] = token;
                    }
                }
                let slowest = loads.iter().zip(&self.speeds).map(|(load, speed)| load / speed).fold(0.0, f64::max);
                sums.slowest[part.kind].0 += slowest;
                sums.slowest[part.kind].1 += loads.iter().sum::<f64>() / all;
                sums.tokens += tokens as f64;
                let capacity = rule.capacity(tokens, trace.experts, top_k)?;
                let request = RouteRequest::new(&scores, top_k, &capacity, context)?;
                let assignment = PhaseRouter::default().route(&request, state)?;
                let metrics = RouteMetrics::new(&request, &assignment);
                sums.kept += metrics.gate_mass;
                sums.top_k += metrics.top_k_gate_mass;
            }
        }
        Ok(sums)
    }
}

/// The scores of some tokens of a layer.
fn scores(trace: &GateTrace, layer: &LayerTrace, part: &Part) -> Result<Scores> {
    let row = |&token: &usize| &layer.logits[token * trace.experts..][..trace.experts];
    let logits: Vec<f32> = part.tokens.iter().flat_map(row).copied().collect();
    let logits = Logits::new(&logits, part.tokens.len(), trace.experts)?;
    trace.scoring.scores(&logits, layer.selection_bias.as_deref())
}

/// EPLB's packing: the heaviest expert first, to the device with the least load for its speed that has room; ties to the lower number.
fn packed(weights: &[f64], sizes: &[usize], speeds: &[f64]) -> Vec<u16> {
    let mut heaviest: Vec<usize> = (0..weights.len()).collect();
    heaviest.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    let (mut loads, mut room) = (vec![0.0; sizes.len()], sizes.to_vec());
    let mut device_of = vec![0; weights.len()];
    for expert in heaviest {
        let free = (0..sizes.len()).filter(|&device| room[device] > 0);
        let fullness = |&device: &usize| (loads[device] + weights[expert]) / speeds[device];
        let Some(device) = free.min_by(|a, b| fullness(a).total_cmp(&fullness(b))) else { break };
        loads[device] += weights[expert];
        room[device] -= 1;
        device_of[expert] = device as u16;
    }
    device_of
}

/// Means over layers.
fn figures(placement: &'static str, layers: &[&Sums], devices: usize) -> PlacedFigures {
    let mean = |of: &dyn Fn(&Sums) -> f64| layers.iter().map(|sums| of(sums)).sum::<f64>() / layers.len().max(1) as f64;
    let ratio = |slowest: f64, all: f64| if all > 0.0 { slowest / all } else { 1.0 };
    let devices_per_token = mean(&|sums| sums.pairs / sums.tokens.max(1.0));
    let of_kind = |kind: usize| mean(&|sums| ratio(sums.slowest[kind].0, sums.slowest[kind].1));
    let kinds = layers.first().map_or(0, |sums| sums.slowest.len());
    PlacedFigures {
        placement,
        devices_per_token,
        rows_exchanged_per_token: 2.0 * devices_per_token * (1.0 - 1.0 / devices.max(1) as f64),
        straggler_ratio: mean(&|sums| {
            let (slowest, all) = sums.slowest.iter().fold((0.0, 0.0), |sum, kind| (sum.0 + kind.0, sum.1 + kind.1));
            ratio(slowest, all)
        }),
        worst_kind_straggler_ratio: (0..kinds).map(of_kind).fold(1.0, f64::max),
        gate_mass: mean(&|sums| ratio(sums.kept, sums.top_k)),
    }
}

/// The mean of several, under the name of the first.
fn mean(several: &[PlacedFigures]) -> PlacedFigures {
    let mean = |of: fn(&PlacedFigures) -> f64| several.iter().map(of).sum::<f64>() / several.len().max(1) as f64;
    PlacedFigures {
        placement: several.first().map_or("", |first| first.placement),
        devices_per_token: mean(|figures| figures.devices_per_token),
        rows_exchanged_per_token: mean(|figures| figures.rows_exchanged_per_token),
        straggler_ratio: mean(|figures| figures.straggler_ratio),
        worst_kind_straggler_ratio: mean(|figures| figures.worst_kind_straggler_ratio),
        gate_mass: mean(|figures| figures.gate_mass),
    }
}
