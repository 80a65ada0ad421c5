//! Experts that stay in their files and come into memory through an [`ExpertCache`], a layer's part of it.
//!
//! Their weights are used in the dtype that they are stored in. Their biases, where they have any, are a few numbers for each row of weights
//! and always in memory, beside the cache's budget. Knows nothing of files, budgets or which experts stay in memory.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};
use crate::experts::matrix::Matrix;
use crate::experts::work::{ExpertWeights, ProjectionWeights};
use crate::offload::cache::ExpertCache;
use crate::offload::store::{LoadedExpert, Part};
use crate::routing::plan::DispatchPlan;
use crate::spec::MoeSpec;

/// One layer of an expert cache, as [`Weights::cached_experts`](crate::Weights::cached_experts) gives it.
#[derive(Clone, Debug)]
pub struct CachedExperts {
    cache: Arc<ExpertCache>,
    layer: usize,
    biases: Option<Arc<[ExpertBiases]>>,
}

/// Biases of one expert's projections.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ExpertBiases {
    /// Of the gate projection, `[width]`; none where the activation has no gate.
    pub(crate) gate: Vec<f32>,
    /// Of the up projection, `[width]`.
    pub(crate) up: Vec<f32>,
    /// Of the down projection, `[hidden]`.
    pub(crate) down: Vec<f32>,
}

impl CachedExperts {
    /// Layer `layer` of `cache`, without biases.
    pub(crate) fn new(cache: Arc<ExpertCache>, layer: usize) -> Self {
        Self { cache, layer, biases: None }
    }

    /// The same with biases, of each expert by id; without any where there are none.
    pub(crate) fn with_biases(self, biases: Vec<ExpertBiases>) -> Self {
        Self { biases: (!biases.is_empty()).then(|| biases.into()), ..self }
    }

    /// Whether it has biases.
    pub(crate) fn has_biases(&self) -> bool {
        self.biases.is_some()
    }

    /// The same with the biases of others, if it has none.
    pub(crate) fn or_biases(self, others: &Self) -> Self {
        let biases = self.biases.or_else(|| others.biases.clone());
        Self { biases, ..self }
    }

    /// The cache.
    pub(crate) fn cache(&self) -> &Arc<ExpertCache> {
        &self.cache
    }

    /// Which of its layers.
    pub(crate) fn layer(&self) -> usize {
        self.layer
    }

    /// Checks that the stored experts, and their biases, are those of `spec`.
    pub(crate) fn check(&self, spec: &MoeSpec) -> Result<()> {
        let store = self.cache.store();
        let experts = store.experts(self.layer);
        if experts != spec.experts {
            return Err(Error::shape(format!("stored experts of layer {}", self.layer), spec.experts, experts));
        }
        self.check_biases(spec)?;
        let [narrow, wide] = [[spec.expert_width, spec.hidden], [spec.hidden, spec.expert_width]];
        for expert in 0..experts {
            let both = store.piece(self.layer, expert, Part::GateUp).is_some() && spec.activation.gated;
            let parts = match both {
                true => vec![(Part::GateUp, [2 * spec.expert_width, spec.hidden]), (Part::Down, wide)],
                false => vec![(Part::Gate, narrow), (Part::Up, narrow), (Part::Down, wide)],
            };
            for (part, shape) in parts.into_iter().filter(|(part, _)| spec.activation.gated || *part != Part::Gate) {
                let got = store.piece(self.layer, expert, part);
                if got.is_none_or(|(_, got)| got != shape) {
                    let operand = format!("stored expert {expert} of layer {}, {part:?}", self.layer);
                    let got = got.map_or("none".into(), |(dtype, shape)| format!("{dtype} {shape:?}"));
                    return Err(Error::shape(operand, format!("{shape:?}"), got));
                }
            }
        }
        Ok(())
    }

    fn check_biases(&self, spec: &MoeSpec) -> Result<()> {
        let Some(biases) = self.biases.as_deref().filter(|_| spec.expert_bias) else {
            let word = |is_there: bool| if is_there { "some" } else { "none" };
            let (expected, got) = (spec.expert_bias, self.biases.is_some());
            return if expected == got {
                Ok(())
            } else {
                Err(Error::shape("biases of stored experts", word(expected), word(got)))
            };
        };
        if biases.len() != spec.experts {
            return Err(Error::shape("biases of stored experts", format!("{} experts", spec.experts), biases.len()));
        }
        let gate = if spec.activation.gated { spec.expert_width } else { 0 };
        for (expert, ExpertBiases { gate: of_gate, up, down }) in biases.iter().enumerate() {
            let sizes = [("gate", of_gate, gate), ("up", up, spec.expert_width), ("down", down, spec.hidden)];
            if let Some((name, bias, size)) = sizes.into_iter().find(|(_, bias, size)| bias.len() != *size) {
                let operand = format!("{name} biases of stored expert {expert}");
                return Err(Error::shape(operand, format!("{size} values"), bias.len()));
            }
        }
        Ok(())
    }

    /// What is in memory, as routers see it ([`RouteContext::resident`](crate::routing::router::RouteContext)), in place of what `set` held.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that the cache does not have.
    pub fn counted_into(&self, set: &mut ExpertSet) -> Result<()> {
        self.cache.counted_into(self.layer, set)
    }

    /// One step: runs `work` on all experts of the plan, once or in groups, by ascending id; `spec` says what the
    /// layer is.
    ///
    /// # Errors
    /// As [`ExpertCache::run`], and what `work` gives.
    pub fn run(
        &self,
        spec: &MoeSpec,
        plan: &DispatchPlan,
        mut work: impl FnMut(&[(ExpertId, ExpertWeights<'_>)]) -> Result<()>,
    ) -> Result<()> {
        let mut wanted = ExpertSet::new(spec.experts)?;
        for (expert, _) in plan.busy_experts() {
            wanted.insert(ExpertId::new(expert, spec.experts)?);
        }
        self.cache.run(self.layer, &wanted, |loaded| {
            let biases = |id: ExpertId| self.biases.as_deref().and_then(|biases| biases.get(id.index()));
            let weights = loaded.iter().map(|(id, expert)| Ok((*id, weights(spec, expert, biases(*id))?)));
            work(&weights.collect::<Result<Vec<_>>>()?)
        })?;
        Ok(())
    }
}

/// A loaded expert as the engine takes it.
///
/// # Errors
/// [`Error::Shape`] for one that is not of `spec`.
pub(crate) fn weights<'a>(
    spec: &MoeSpec,
    expert: &LoadedExpert<'a>,
    biases: Option<&'a ExpertBiases>,
) -> Result<ExpertWeights<'a>> {
    let part =
        |part: Part| expert.matrix(part).ok_or_else(|| Error::shape("loaded expert", format!("{part:?}"), "none"));
    let (gate, up) = match (spec.activation.gated, expert.matrix(Part::GateUp)) {
        (false, _) => (None, part(Part::Up)?),
        (true, None) => (Some(part(Part::Gate)?), part(Part::Up)?),
        (true, Some(both)) if spec.names.stacked_in_turns => (Some(both.interleaved(0)?), both.interleaved(1)?),
        (true, Some(both)) => {
            let width = spec.expert_width;
            (Some(both.rows(0..width)?), both.rows(width..2 * width)?)
        }
    };
    let with =
        |weight: Matrix<'a>, bias: fn(&ExpertBiases) -> &[f32]| ProjectionWeights { weight, bias: biases.map(bias) };
    let gate = gate.map(|gate| with(gate, |biases| &biases.gate));
    let (up, down) = (with(up, |biases| &biases.up), with(part(Part::Down)?, |biases| &biases.down));
    ExpertWeights::new(spec.activation, gate, up, down)
}
