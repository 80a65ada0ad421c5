//! What a routed batch asks of the expert cache: which experts it uses and which of those are not in fast memory.
//!
//! A **request** is one distinct expert of one layer in one step; `hits + misses = requests`. Shape: two sets of experts.
//!
//! ```
//! use phase_moe::{Assignment, ExpertId, ExpertSet};
//! use phase_moe::offload::Requests;
//!
//! let assignment = Assignment::from_parts(8, 2, &[3, 5, 5, 1], &[0.6, 0.4, 0.9, 0.1])?;
//! let mut resident = ExpertSet::new(8)?;
//! resident.insert(ExpertId::new(3, 8)?);
//! let requests = Requests::new(&assignment, Some(&resident))?;
//! assert_eq!((requests.len(), requests.hits(), requests.misses()), (3, 1, 2));
//! let urgent = requests.urgent(&assignment).into_iter().map(ExpertId::index).collect::<Vec<_>>();
//! assert_eq!(urgent, [5, 1]);
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of who keeps the experts or where they come from.

use crate::error::Result;
use crate::expert::{ExpertId, ExpertSet};
use crate::routing::assignment::{Assignment, EMPTY};

/// The experts that one step of one layer uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    wanted: ExpertSet,
    missing: ExpertSet,
}

impl Requests {
    /// The experts of the kept slots, against those `resident`; without a resident set all are missing.
    ///
    /// # Errors
    /// [`crate::error::Error::ExpertCount`] for an assignment that was never filled.
    pub fn new(assignment: &Assignment, resident: Option<&ExpertSet>) -> Result<Self> {
        let mut requests = Self::default();
        requests.refill(assignment, resident)?;
        Ok(requests)
    }

    /// The same in place of what it held before; nothing is allocated once it has held as many experts.
    ///
    /// # Errors
    /// Those of [`Requests::new`].
    pub fn refill(&mut self, assignment: &Assignment, resident: Option<&ExpertSet>) -> Result<()> {
        self.wanted.reset(assignment.experts())?;
        self.missing.reset(assignment.experts())?;
        for &expert in assignment.raw().iter().filter(|&&expert| expert != EMPTY) {
            self.wanted.insert(ExpertId::from_raw(expert));
        }
        self.missing.insert_missing(&self.wanted, resident);
        Ok(())
    }

    /// Every expert that some token uses.
    pub fn wanted(&self) -> &ExpertSet {
        &self.wanted
    }

    /// Those of them that are not resident.
    pub fn missing(&self) -> &ExpertSet {
        &self.missing
    }

    /// Requests: distinct experts used.
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    /// True when no expert is used.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Requests whose expert is resident.
    pub fn hits(&self) -> usize {
        self.len() - self.misses()
    }

    /// Requests whose expert is not.
    pub fn misses(&self) -> usize {
        self.missing.len()
    }

    /// The missing experts in the order in which they are worth reading: most combine weight in `assignment` first (ties: lowest
    /// id).
    pub fn urgent(&self, assignment: &Assignment) -> Vec<ExpertId> {
        let mut weight = vec![0f64; self.wanted.experts()];
        for (expert, part) in (0..assignment.tokens()).flat_map(|token| assignment.slots(token)) {
            if let Some(sum) = weight.get_mut(expert.index()) {
                *sum += f64::from(part.abs());
            }
        }
        let mut urgent: Vec<ExpertId> = self.missing.iter().collect();
        urgent.sort_by(|a, b| weight[b.index()].total_cmp(&weight[a.index()]).then(a.cmp(b)));
        urgent
    }
}
