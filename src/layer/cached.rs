//! Experts that stay in their files and come into memory through an [`ExpertCache`], a layer's part of it.
//!
//! Their weights are used in the dtype that they are stored in. Knows nothing of files, budgets or who stays in memory.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};
use crate::experts::cache::ExpertCache;
use crate::experts::engine::{ExpertWeights, Projection};
use crate::experts::store::{LoadedExpert, Part};
use crate::routing::plan::DispatchPlan;
use crate::spec::MoeSpec;

/// One layer of an expert cache.
#[derive(Clone, Debug)]
pub struct CachedExperts {
    cache: Arc<ExpertCache>,
    layer: usize,
}

impl CachedExperts {
    /// Layer `layer` of `cache`.
    pub fn new(cache: Arc<ExpertCache>, layer: usize) -> Self {
        Self { cache, layer }
    }

    /// The cache.
    pub fn cache(&self) -> &Arc<ExpertCache> {
        &self.cache
    }

    /// Which of its layers.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Checks that the stored experts are those of `spec`.
    pub(super) fn check(&self, spec: &MoeSpec) -> Result<()> {
        let store = self.cache.store();
        let experts = store.experts(self.layer);
        if experts != spec.experts {
            return Err(Error::shape(format!("stored experts of layer {}", self.layer), spec.experts, experts));
        }
        if spec.expert_bias {
            return Err(Error::shape("stored experts", "none with biases", "a model that has them"));
        }
        let [narrow, wide] = [[spec.expert_width, spec.hidden], [spec.hidden, spec.expert_width]];
        for expert in 0..experts {
            let parts = [(Part::Gate, narrow), (Part::Up, narrow), (Part::Down, wide)];
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

    /// What is in memory, as routers see it.
    pub(super) fn resident(&self) -> Result<ExpertSet> {
        self.cache.resident(self.layer)
    }

    /// One step: runs `work` on all experts of the plan, once or in groups, by ascending id.
    pub(super) fn run(
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
            let weights = loaded.iter().map(|(id, expert)| Ok((*id, weights(spec, expert)?)));
            work(&weights.collect::<Result<Vec<_>>>()?)
        })?;
        Ok(())
    }
}

/// A loaded expert as the engine takes it.
fn weights<'a>(spec: &MoeSpec, expert: &LoadedExpert<'a>) -> Result<ExpertWeights<'a>> {
    let part = |part: Part| -> Result<Projection<'a>> {
        let matrix = expert.matrix(part);
        matrix.map(Projection::from).ok_or_else(|| Error::shape("loaded expert", format!("{part:?}"), "none"))
    };
    let gate = spec.activation.gated.then(|| part(Part::Gate)).transpose()?;
    ExpertWeights::new(spec.activation, gate, part(Part::Up)?, part(Part::Down)?)
}
