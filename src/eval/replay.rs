//! Captured gate logits against a logical expert cache: what a router's choice costs in reads and in gate mass.
//!
//! Each batch of each layer of a [`GateTrace`] is one step: `scores → router (reads the resident set) → assignment → requests →
//! resident set`. `hits + misses = requests`, a request being a distinct expert of a layer and step. Layers are independent;
//! every one has room for the same number of experts, empty at first.
//!
//! Knows nothing of bytes, disks or time.

use serde::Serialize;

use super::offline::BatchCapacity;
use super::trace::{GateTrace, LayerTrace};
use crate::decoder::memory::ExpertMemory;
use crate::error::{Error, Result};
use crate::expert::ExpertSet;
use crate::offload::admission::Admission;
use crate::offload::belady::RequestLog;
use crate::offload::residency::Policy;
use crate::routing::assignment::Assignment;
use crate::routing::check::check_assignment;
use crate::routing::logits::Logits;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router, Scratch};
use crate::routing::topk::TopK;

/// How a trace is replayed.
#[derive(Clone, Copy)]
pub struct Replay<'a> {
    /// The router.
    pub router: &'a dyn Router,
    /// Experts per token.
    pub top_k: usize,
    /// Where the capacity of each batch comes from.
    pub capacity: &'a BatchCapacity,
    /// Tokens per step; 1 is decode.
    pub batch_tokens: usize,
    /// Experts of a layer that fit into fast memory.
    pub cached_experts: usize,
    /// Which expert leaves it.
    pub policy: Policy,
    /// Which misses enter it.
    pub admission: Admission,
}

/// What a replay did, all layers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ReplayFigures {
    /// Distinct experts per layer and step.
    pub requests: u64,
    /// Requests whose expert was in fast memory.
    pub hits: u64,
    /// Requests whose expert was not.
    pub misses: u64,
    /// Hits / requests; `None` without any.
    pub hit_rate: Option<f64>,
    /// The same for the best policy there could be on these requests.
    pub belady_hit_rate: Option<f64>,
    /// Kept gate mass / gate mass of plain top-k; `None` where that has none.
    pub gate_mass_kept: Option<f64>,
    /// Share of plain top-k's slots that the router chose too; `None` without any.
    pub agreement: Option<f64>,
    /// Mean bonus over the layers at the end, in score ranges, where a controller steers it.
    #[serde(skip)]
    pub bonus: Option<f64>,
}

/// Sums over steps and layers.
#[derive(Default)]
struct Sums {
    requests: u64,
    hits: u64,
    belady: u64,
    mass: f64,
    top_k_mass: f64,
    slots: u64,
    agreeing: u64,
    bonuses: Vec<f64>,
}

impl Replay<'_> {
    /// Replays every layer of `trace`. `progress` is called after each step with its tokens.
    ///
    /// # Errors
    /// [`Error::Parameter`] for no tokens a batch or more cached experts than there are, and whatever scoring, the capacity rule
    /// or the router reports.
    pub fn run(&self, trace: &GateTrace, mut progress: impl FnMut(u64)) -> Result<ReplayFigures> {
        if self.batch_tokens == 0 {
            return Err(Error::parameter("batch tokens", 0, "at least 1"));
        }
        let mut sums = Sums::default();
        for layer in &trace.layers {
            self.replay_layer(trace, layer, &mut sums, &mut progress)?;
        }
        let share = |part: f64, whole: f64| (whole > 0.0).then(|| part / whole);
        let rate = |hits: u64| share(hits as f64, sums.requests as f64);
        Ok(ReplayFigures {
            requests: sums.requests,
            hits: sums.hits,
            misses: sums.requests - sums.hits,
            hit_rate: rate(sums.hits),
            belady_hit_rate: rate(sums.belady),
            gate_mass_kept: share(sums.mass, sums.top_k_mass),
            agreement: share(sums.agreeing as f64, sums.slots as f64),
            bonus: share(sums.bonuses.iter().sum(), sums.bonuses.len() as f64),
        })
    }

    fn replay_layer(
        &self,
        trace: &GateTrace,
        layer: &LayerTrace,
        sums: &mut Sums,
        progress: &mut impl FnMut(u64),
    ) -> Result<()> {
        let experts = trace.experts;
        let room = self.capacity.of_layer(trace, layer)?;
        let mut memory = ExpertMemory::new(1, experts, self.cached_experts, self.policy, self.admission)?;
        let (mut state, mut plain_state, mut scratch) =
            (RouteState::default(), RouteState::default(), Scratch::default());
        let (mut assignment, mut plain) = (Assignment::default(), Assignment::default());
        let (mut log, mut asked) = (RequestLog::default(), ExpertSet::default());
        // No step is larger than the trace, whatever was asked for.
        let step_tokens = self.batch_tokens.min(trace.tokens().max(1));
        for (step, rows) in layer.logits.chunks(step_tokens * experts).enumerate() {
            let (tokens, start) = (rows.len() / experts, step * step_tokens);
            let scores = trace.scoring.scores(&Logits::new(rows, tokens, experts)?, layer.selection_bias.as_deref())?;
            let capacity = room.capacity(tokens, experts, self.top_k)?;
            let context = RouteContext {
                layer: layer.layer,
                token_ids: trace.token_ids.as_ref().map(|ids| &ids[start..start + tokens]),
                step: step as u64,
                resident: memory.counted(0),
                ..RouteContext::default()
            };
            let request = RouteRequest::new(&scores, self.top_k, &capacity, context)?;
            self.router.route_into(&request, &mut state, &mut scratch, &mut assignment)?;
            check_assignment(self.router, &request, &assignment)?;
            TopK { drop: None }.route_into(&request, &mut plain_state, &mut scratch, &mut plain)?;
            for token in 0..tokens {
                let gate = scores.gate(token);
                let mass = |assignment: &Assignment| -> f64 {
                    assignment.slots(token).map(|(expert, _)| f64::from(gate[expert.index()])).sum()
                };
                sums.mass += mass(&assignment);
                sums.top_k_mass += mass(&plain);
                let has = |expert| assignment.slots(token).any(|(chosen, _)| chosen == expert);
                sums.slots += plain.slots(token).count() as u64;
                sums.agreeing += plain.slots(token).filter(|&(expert, _)| has(expert)).count() as u64;
            }
            assignment.used_experts(&mut asked)?;
            log.push(&asked);
            memory.advance(0, &assignment)?;
            progress(tokens as u64);
        }
        sums.requests += memory.requests();
        sums.hits += memory.hits();
        sums.belady += log.most_hits(self.cached_experts) as u64;
        sums.bonuses.extend(state.bonus());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::cache_aware::CacheRouter;
    use crate::routing::scores::Scoring;

    /// Two layers of logits without any pattern, 4 of 16 experts a token.
    fn trace(tokens: usize) -> GateTrace {
        let mut seed = 7u64;
        let mut draw = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f32 / (1 << 23) as f32
        };
        let mut layer = |layer| LayerTrace {
            layer,
            logits: (0..tokens * 16).map(|_| 2.0 * draw()).collect(),
            selection_bias: None,
        };
        GateTrace {
            model: None,
            experts: 16,
            top_k: 4,
            layer_top_k: Vec::new(),
            scoring: Scoring::softmax(),
            batch_tokens: None,
            token_ids: None,
            layers: vec![layer(0), layer(1)],
        }
    }

    fn replay(router: &dyn Router, cached_experts: usize, batch_tokens: usize) -> ReplayFigures {
        let (capacity, policy, admission) = (&BatchCapacity::Unlimited, Policy::Lru, Admission::All);
        let replay = Replay { router, top_k: 4, capacity, batch_tokens, cached_experts, policy, admission };
        replay.run(&trace(500), |_| ()).unwrap()
    }

    #[test]
    fn the_bonus_saves_misses_within_its_bound() {
        let plain = replay(&TopK { drop: None }, 8, 1);
        assert_eq!((plain.requests, plain.gate_mass_kept, plain.agreement), (2 * 500 * 4, Some(1.0), Some(1.0)));
        let cache = replay(&CacheRouter::default(), 8, 1);
        assert_eq!(cache.hits + cache.misses, cache.requests);
        assert!(cache.misses < plain.misses, "{cache:?} {plain:?}");
        assert!(cache.gate_mass_kept >= Some(0.9) && cache.gate_mass_kept < Some(1.0));
        for figures in [plain, cache] {
            assert!(figures.hit_rate < figures.belady_hit_rate, "{figures:?}");
        }
        assert_eq!(replay(&CacheRouter::new(0.0, 0.1).unwrap(), 8, 1), plain);
    }

    #[test]
    fn what_holds_everything_misses_each_expert_once_and_what_holds_nothing_always() {
        let all = replay(&TopK { drop: None }, 16, 1);
        assert_eq!((all.misses, all.hit_rate), (32, all.belady_hit_rate));
        let none = replay(&CacheRouter::default(), 0, 1);
        assert_eq!((none.hits, none.belady_hit_rate, none.gate_mass_kept), (0, Some(0.0), Some(1.0)));
        let batches = replay(&CacheRouter::default(), 16, 100);
        assert!(batches.requests <= 2 * 5 * 16, "{batches:?}");
        assert_eq!(replay(&CacheRouter::default(), 8, usize::MAX), replay(&CacheRouter::default(), 8, 500));
    }

    #[test]
    fn mistakes_are_named() {
        let (capacity, router) = (BatchCapacity::Unlimited, TopK { drop: None });
        let replay = |cached_experts, batch_tokens| {
            let (policy, admission) = (Policy::Lru, Admission::default());
            let replay = Replay {
                router: &router,
                top_k: 4,
                capacity: &capacity,
                batch_tokens,
                cached_experts,
                policy,
                admission,
            };
            replay.run(&trace(2), |_| ()).unwrap_err().to_string()
        };
        assert_eq!(replay(17, 1), "cached experts is 17: expected 0 to experts 16");
        assert_eq!(replay(8, 0), "batch tokens is 0: expected at least 1");
    }
}
