//! The routing core as properties: thousands of drawn batches against oracles written plainly.
//!
//! `PHASE_MOE_CASES=10` runs ten times the cases, `PHASE_MOE_SEED=7` other ones. A failure prints the smallest [`Case`]
//! that fails; it comes again with the same seed.
//!
//! [`Case`]: case::Case

mod case;
mod flow;
mod hostile;
mod input;
mod invariants;
mod optimum;
mod phase;
mod runner;
mod spread;
mod universal;
mod weights;

use crate::{Assignment, RouteRequest, Router};

/// Everything that holds for the answer of any router.
fn check(request: &RouteRequest<'_>, assignment: &Assignment, router: &dyn Router) {
    invariants::check(request, assignment, router);
    weights::check(request, assignment);
}
