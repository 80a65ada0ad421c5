//! Which misses enter fast memory, before any policy says which expert leaves it.
//!
//! One that is used once and not again would only drive out a better one, so it is streamed: used and not kept. That is what
//! makes a memory smaller than one token's experts useful at all, and why the policy behind it matters little. The idea is
//! TinyLFU's (Einziger et al., arXiv 1512.00727).
//!
//! Knows nothing of bytes, reads or scores.

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};
use crate::routing::affinity::{Affinity, Decay};

/// Which misses may take the room of others; the others are streamed: used and not kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Admission {
    /// All of them: the policy alone decides.
    All,
    /// Those that belong to the most used of the residents and the step's experts, as many as fit, by their affinity with this
    /// decay (ties: residents, then the lowest id).
    Affinity(Decay),
}

impl Default for Admission {
    /// By an affinity of which half is forgotten after 34 steps.
    fn default() -> Self {
        Self::Affinity(Decay::SLOW)
    }
}

impl Admission {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Affinity(_) => "affinity",
            Self::All => "all",
        }
    }
}

/// Its name on the command line.
impl std::fmt::Display for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Admission {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Error::by_name("admission", &[Self::default(), Self::All], Self::name, name)
    }
}

/// What an admission remembers of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Admitted {
    /// Use by steps; `None` where all misses are admitted.
    use_by_step: Option<Affinity>,
    step: u64,
    /// What the policy gets to see of the last step.
    admitted: ExpertSet,
}

impl Admitted {
    /// Nothing used yet.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts.
    pub(crate) fn new(experts: usize, admission: Admission) -> Result<Self> {
        let use_by_step = match admission {
            Admission::All => None,
            Admission::Affinity(decay) => Some(Affinity::new(experts, decay)?),
        };
        Ok(Self { use_by_step, step: 0, admitted: ExpertSet::new(experts)? })
    }

    /// Runs one step: those of the experts `wanted` that the policy is to see, where `resident` are in memory and `capacity` fit.
    ///
    /// # Errors
    /// [`Error::Shape`] for sets of other experts; nothing has changed then.
    pub(crate) fn admit<'a>(
        &'a mut self,
        wanted: &'a ExpertSet,
        resident: &ExpertSet,
        capacity: usize,
    ) -> Result<&'a ExpertSet> {
        let experts = self.admitted.experts();
        if let Some(other) = [wanted, resident].into_iter().find(|set| set.experts() != experts) {
            let got = format!("one of {}", other.experts());
            return Err(Error::shape("used experts", format!("a set of {experts} experts"), got));
        }
        let Some(affinity) = &mut self.use_by_step else { return Ok(wanted) };
        self.step = self.step.saturating_add(1);
        wanted.iter().for_each(|expert| affinity.use_expert(expert, self.step));
        self.admitted.clear();
        for expert in wanted.iter() {
            if is_admitted(expert, wanted, resident, capacity, affinity, self.step) {
                self.admitted.insert(expert);
            }
        }
        Ok(&self.admitted)
    }
}

/// Whether fewer than fit of the residents and the step's other misses are used more.
fn is_admitted(
    expert: ExpertId,
    wanted: &ExpertSet,
    resident: &ExpertSet,
    capacity: usize,
    affinity: &Affinity,
    step: u64,
) -> bool {
    if resident.contains(expert) {
        return true;
    }
    let own = affinity.at(expert, step);
    let better = resident.iter().filter(|&other| affinity.at(other, step) >= own).count();
    let rivals = wanted.iter().filter(|&other| {
        let its = affinity.at(other, step);
        !resident.contains(other) && (its > own || its == own && other < expert)
    });
    better + rivals.count() < capacity
}
