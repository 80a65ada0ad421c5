//! The routing core as properties, through the public API alone: thousands of drawn batches against oracles written plainly.
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
