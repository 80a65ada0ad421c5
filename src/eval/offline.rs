//! Routing captured gate logits without the model: what a router does with a layer of a [`GateTrace`], batch by batch.
//!
//! `logits [tokens, experts] → scores → router → experts and weights [tokens, width]`, with the slots there was room for and
//! the figures of the whole layer. Router states (prices) are carried from batch to batch, as in the model.
//!
//! Knows nothing of transformers, options or tables.

use std::time::Instant;

use serde::Serialize;

use super::trace::{GateTrace, LayerTrace};
use crate::checkpoint::NamedTensor;
use crate::error::{Error, Result};
use crate::routing::assignment::Assignment;
use crate::routing::cache_aware::CacheRouter;
use crate::routing::capacity::{Capacity, CapacityRule, Placement};
use crate::routing::check::check_assignment;
use crate::routing::logits::Logits;
use crate::routing::metrics::RouteMetrics;
use crate::routing::phase::PhaseRouter;
use crate::routing::registry::RouterKind;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router};

/// Where the capacity of each batch comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum BatchCapacity {
    /// There is room for everything.
    Unlimited,
    /// A rule, from the size of the batch.
    Rule(CapacityRule),
    /// The same slots in every batch.
    Given(Capacity),
}

impl BatchCapacity {
    /// That of one layer of `trace`.
    pub(super) fn of_layer(&self, trace: &GateTrace, layer: &LayerTrace) -> Result<Self> {
        let at = trace.layers.iter().position(|other| other.layer == layer.layer).unwrap_or(usize::MAX);
        Ok(match self {
            Self::Rule(rule) => Self::Rule(rule.of_layer(at, trace.layers.len())?),
            other => other.clone(),
        })
    }

    pub(super) fn capacity(&self, tokens: usize, experts: usize, top_k: usize) -> Result<Capacity> {
        match self {
            Self::Unlimited => Capacity::unlimited(experts),
            Self::Rule(rule) => rule.capacity(tokens, experts, top_k),
            Self::Given(capacity) => Ok(capacity.clone()),
        }
    }

    /// Where experts live, if limits are per device, also in batches that a rule sets no limit for.
    fn placement(&self, experts: usize) -> Result<Option<Placement>> {
        match self {
            Self::Rule(rule) => rule.shares.placement(experts),
            Self::Given(capacity) => Ok(capacity.placement().cloned()),
            _ => Ok(None),
        }
    }
}

/// How captured logits are routed.
#[derive(Clone, Debug, PartialEq)]
pub struct OfflineRouter {
    /// The router.
    pub router: RouterKind,
    /// For routers that draw.
    pub seed: u64,
    /// Settings of the memory-aware routers; offline there is no resident set, so only the batch union counts.
    pub cache: CacheRouter,
    /// Experts per token.
    pub top_k: usize,
    /// Where the capacity of each batch comes from.
    pub capacity: BatchCapacity,
    /// Tokens per batch; `None` takes the whole trace as one.
    pub batch_tokens: Option<usize>,
}

/// One layer, routed.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutedLayer {
    /// Slots in a row: top_k, or more where some token got more experts than it asked for.
    pub width: usize,
    /// Expert ids, `[tokens, width]`; −1 where dropped.
    pub experts: Vec<i32>,
    /// Combine weights, `[tokens, width]`; 0 where dropped.
    pub weights: Vec<f32>,
    /// Slots per expert, or per device, over all batches: limits and, in a batch without one, what could be used at most.
    pub capacities: Vec<u32>,
    /// True when [`RoutedLayer::capacities`] are per device.
    pub per_device: bool,
    /// Batches for which the rule set no limit, because they are below [`CapacityRule::minimum_mean`].
    pub batches_below_minimum: usize,
    /// What the routing did.
    pub figures: LayerFigures,
}

impl RoutedLayer {
    /// `layer.{L}.experts`, `layer.{L}.weights` and `layer.{L}.capacities` or `layer.{L}.device_capacities`, to be written to a file.
    pub fn tensors(&self) -> [NamedTensor; 3] {
        let LayerFigures { layer, tokens, .. } = self.figures;
        let capacities = if self.per_device { "device_capacities" } else { "capacities" };
        [
            NamedTensor::i32(format!("layer.{layer}.experts"), [tokens, self.width], &self.experts),
            NamedTensor::f32(format!("layer.{layer}.weights"), [tokens, self.width], &self.weights),
            NamedTensor::u32(format!("layer.{layer}.{capacities}"), [self.capacities.len()], &self.capacities),
        ]
    }
}

/// Figures of a routed layer: sums and shares over its batches; violation and spread are means over them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerFigures {
    /// Index of the layer in the model.
    pub layer: usize,
    /// Tokens routed.
    pub tokens: usize,
    /// Experts of the layer.
    pub experts: usize,
    /// Slots asked for.
    pub demand: u64,
    /// Sum of [`RoutedLayer::capacities`]; `None` without any limit.
    pub capacity_total: Option<u64>,
    /// Slots with an expert.
    pub kept: u64,
    /// Kept slots / slots asked for; above 1 where tokens get more experts than they asked for.
    pub survival: f64,
    /// The largest survival possible under these capacities.
    pub feasible_survival: f64,
    /// Kept gate mass / gate mass of unconstrained top-k.
    pub gate_mass: f64,
    /// Kept gate mass / certified upper bound under these capacities; `None` where the router knows no limit or gives
    /// tokens more experts than they asked for.
    pub gate_mass_vs_bound: Option<f64>,
    /// Largest load, of a device where limits are per device and else of an expert, over its share, minus 1.
    pub max_violation: f64,
    /// Standard deviation of the experts' loads over their mean.
    pub load_cv: f64,
    /// Median time in the router, nanoseconds a token, of calls that follow one on the same batch.
    pub route_nanos_per_token: f64,
}

/// Calls per batch that are timed, after the one that counts.
const TIMED_CALLS: usize = 5;

impl OfflineRouter {
    /// Routes one layer of a trace.
    ///
    /// # Errors
    /// [`Error::Parameter`] for `batch_tokens` 0 and whatever scoring, the capacity rule or the router reports.
    pub fn route(&self, trace: &GateTrace, layer: &LayerTrace) -> Result<RoutedLayer> {
        let (tokens, experts, top_k) = (layer.logits.len() / trace.experts.max(1), trace.experts, self.top_k);
        let batch_tokens = match self.batch_tokens {
            Some(0) => return Err(Error::parameter("batch tokens", 0, "at least 1")),
            Some(batch_tokens) => batch_tokens,
            None => tokens.max(1),
        };
        let router = self.router.build_with(self.seed, &self.cache);
        let bounded = router.respects_capacity() && router.keeps_top_k();
        let room = self.capacity.of_layer(trace, layer)?;
        let mut slots = SlotSums::new(experts, room.placement(experts)?);
        let (mut state, mut certifier) = (RouteState::default(), RouteState::default());
        let (mut assignments, mut nanos) = (Vec::new(), Vec::new());
        let (mut sums, mut bound_sum, mut batches) = (MassSums::default(), Some(0.0), 0usize);
        let mut figures = LayerFigures { layer: layer.layer, tokens, experts, ..LayerFigures::default() };
        for start in (0..tokens).step_by(batch_tokens) {
            let rows = batch_tokens.min(tokens - start);
            let logits = Logits::new(&layer.logits[start * experts..(start + rows) * experts], rows, experts)?;
            let scores = trace.scoring.scores(&logits, layer.selection_bias.as_deref())?;
            let capacity = room.capacity(rows, experts, top_k)?;
            let token_ids = trace.token_ids.as_ref().map(|ids| &ids[start..start + rows]);
            let step = (start / batch_tokens) as u64;
            let context = RouteContext { layer: layer.layer, token_ids, step, ..RouteContext::default() };
            let request = RouteRequest::new(&scores, top_k, &capacity, context)?;

            let before = state.clone();
            let assignment = router.route(&request, &mut state)?;
            check_assignment(router.as_ref(), &request, &assignment)?;
            for _ in 0..TIMED_CALLS {
                let mut again = before.clone();
                let started = Instant::now();
                std::hint::black_box(router.route(&request, &mut again)?);
                nanos.push(started.elapsed().as_nanos() as f64 / rows as f64);
            }

            // The phase router fills all the room there is and proves its bound: it is its own certificate.
            let (feasible, bound) = match self.router {
                RouterKind::Phase | RouterKind::CachePhase => (assignment.kept(), assignment.gate_mass_bound()),
                _ => {
                    let certified = PhaseRouter::default().route(&request, &mut certifier)?;
                    (certified.kept(), certified.gate_mass_bound())
                }
            };
            let metrics = RouteMetrics::new(&request, &assignment);
            bound_sum = bound_sum.zip(bound.filter(|_| bounded)).map(|(sum, bound)| sum + bound);
            (figures.demand, figures.kept) = (figures.demand + metrics.demand, figures.kept + metrics.kept);
            sums.feasible += feasible as u64;
            sums.top_k += metrics.top_k_gate_mass;
            sums.kept += metrics.gate_mass;
            figures.max_violation += metrics.devices.unwrap_or(metrics.experts).max_violation;
            figures.load_cv += metrics.experts.cv;
            batches += 1;
            assignments.push(assignment);
            slots.add(&capacity, rows, top_k);
        }
        nanos.sort_by(f64::total_cmp);
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 1.0 };
        figures.capacity_total = (self.capacity != BatchCapacity::Unlimited).then_some(slots.total);
        figures.survival = share(figures.kept as f64, figures.demand as f64);
        figures.feasible_survival = share(sums.feasible as f64, figures.demand as f64);
        figures.gate_mass = share(sums.kept, sums.top_k);
        figures.gate_mass_vs_bound = bound_sum.map(|bound| share(sums.kept, bound));
        figures.max_violation /= batches.max(1) as f64;
        figures.load_cv /= batches.max(1) as f64;
        figures.route_nanos_per_token = nanos.get(nanos.len() / 2).copied().unwrap_or(0.0);
        let width = assignments.iter().map(Assignment::width).max().unwrap_or(top_k);
        let (experts, weights) = in_rows(&assignments, width);
        Ok(RoutedLayer {
            width,
            experts,
            weights,
            per_device: slots.placement.is_some(),
            capacities: slots.pools,
            batches_below_minimum: if self.capacity == BatchCapacity::Unlimited { 0 } else { slots.unlimited_batches },
            figures,
        })
    }
}

/// Ids and weights of all batches, `[tokens, width]`; narrower rows end in empty slots.
fn in_rows(assignments: &[Assignment], width: usize) -> (Vec<i32>, Vec<f32>) {
    let tokens = assignments.iter().map(Assignment::tokens).sum::<usize>();
    let (mut ids, mut weights) = (Vec::with_capacity(tokens * width), Vec::with_capacity(tokens * width));
    for assignment in assignments {
        let of_batch: Vec<i32> = assignment.ids().collect();
        for row in of_batch.chunks_exact(assignment.width()) {
            ids.extend_from_slice(row);
            ids.resize(ids.len() + width - row.len(), -1);
        }
        for row in assignment.weights().chunks_exact(assignment.width()) {
            weights.extend_from_slice(row);
            weights.resize(weights.len() + width - row.len(), 0.0);
        }
    }
    (ids, weights)
}

#[derive(Default)]
struct MassSums {
    feasible: u64,
    top_k: f64,
    kept: f64,
}

/// Slots per pool (expert or device) over batches.
struct SlotSums {
    placement: Option<Placement>,
    /// Experts in each pool.
    sizes: Vec<usize>,
    pools: Vec<u32>,
    total: u64,
    unlimited_batches: usize,
}

impl SlotSums {
    fn new(experts: usize, placement: Option<Placement>) -> Self {
        let sizes = placement.as_ref().map_or_else(|| vec![1; experts], Placement::sizes);
        Self { placement, pools: vec![0; sizes.len()], sizes, total: 0, unlimited_batches: 0 }
    }

    /// Adds the limits of a batch; without one, a pool could take every token as often as it has experts, `top_k` at most.
    fn add(&mut self, capacity: &Capacity, rows: usize, top_k: usize) {
        self.unlimited_batches += usize::from(capacity.limits().is_none());
        for (pool, (sum, size)) in self.pools.iter_mut().zip(&self.sizes).enumerate() {
            let slots = match capacity.limits() {
                Some(limits) => u64::from(limits[pool]),
                None => rows as u64 * top_k.min(*size) as u64,
            };
            self.total += slots;
            *sum = sum.saturating_add(u32::try_from(slots).unwrap_or(u32::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::scores::Scoring;

    /// Tokens that all like low expert ids best.
    fn trace(tokens: usize, experts: usize) -> GateTrace {
        let logits = (0..tokens * experts).map(|at| -((at % experts) as f32) - (at % 7) as f32 * 0.01).collect();
        GateTrace {
            model: None,
            experts,
            top_k: 2,
            layer_top_k: Vec::new(),
            scoring: Scoring::softmax(),
            batch_tokens: None,
            token_ids: None,
            layers: vec![LayerTrace { layer: 3, logits, selection_bias: None }],
        }
    }

    fn route(trace: &GateTrace, router: RouterKind, capacity: BatchCapacity, batch_tokens: usize) -> RoutedLayer {
        let cache = CacheRouter::default();
        let offline = OfflineRouter { router, seed: 1, cache, top_k: 2, capacity, batch_tokens: Some(batch_tokens) };
        offline.route(trace, &trace.layers[0]).unwrap()
    }

    #[test]
    fn a_tail_below_the_minimum_adds_what_its_devices_could_use() {
        // Batches of 16, 16 and 3 tokens; 6 slots on 3 devices of 3, 3 and 2 experts are below 4 a device.
        let (trace, rule) = (trace(35, 8), CapacityRule::per_device(1.0, 3));
        let routed = route(&trace, RouterKind::Phase, BatchCapacity::Rule(rule), 16);
        assert!(routed.per_device);
        assert_eq!(routed.capacities, [11 + 11 + 6, 11 + 11 + 6, 10 + 10 + 6]);
        assert_eq!((routed.figures.capacity_total, routed.batches_below_minimum), (Some(82), 1));
        assert_eq!((routed.figures.kept, routed.figures.survival), (70, 1.0));
    }

    #[test]
    fn a_tail_below_the_minimum_adds_its_tokens_to_each_expert() {
        let routed = route(&trace(17, 4), RouterKind::Phase, BatchCapacity::Rule(CapacityRule::per_expert(1.0)), 16);
        assert_eq!((routed.per_device, routed.capacities), (false, vec![8 + 1; 4]));
        assert_eq!(routed.figures.capacity_total, Some(36));
        let free = route(&trace(17, 4), RouterKind::TopK, BatchCapacity::Unlimited, 16);
        assert_eq!((free.figures.capacity_total, free.batches_below_minimum), (None, 0));
        assert_eq!(free.capacities, [17; 4]);
    }

    #[test]
    fn parts_and_figures_tell_the_same() {
        let capacity = || BatchCapacity::Given(Capacity::per_expert(vec![4, 8, 0, 2]).unwrap());
        for router in RouterKind::ALL {
            let routed = route(&trace(32, 4), router, capacity(), 16);
            let kept = routed.experts.iter().filter(|&&expert| expert >= 0).count() as u64;
            assert_eq!(kept, routed.figures.kept, "{router:?}");
            assert!(routed.experts.iter().zip(&routed.weights).all(|(&expert, &weight)| expert >= 0 || weight == 0.0));
            // Both batches: min(16, 4) + min(16, 8) + 0 + min(16, 2) of 32 slots.
            assert_eq!((routed.figures.feasible_survival, routed.figures.capacity_total), (28.0 / 64.0, Some(28)));
            let built = router.build(0);
            let bounded = built.respects_capacity() && built.keeps_top_k();
            assert_eq!(routed.figures.gate_mass_vs_bound.is_some(), bounded, "{router:?}");
            assert_eq!(routed.experts.len(), 32 * routed.width, "{router:?}");
            if router == RouterKind::Cache {
                continue; // Like top-k it ignores room.
            }
            assert!(routed.figures.route_nanos_per_token > 0.0);
        }
    }

    #[test]
    fn batches_of_no_tokens_are_an_error() {
        let trace = trace(4, 4);
        let (cache, batch_tokens) = (CacheRouter::default(), Some(0));
        let offline = OfflineRouter {
            router: RouterKind::Phase,
            seed: 0,
            cache,
            top_k: 2,
            capacity: BatchCapacity::Unlimited,
            batch_tokens,
        };
        let error = offline.route(&trace, &trace.layers[0]).unwrap_err();
        assert_eq!(error.to_string(), "batch tokens is 0: expected at least 1");
    }
}
