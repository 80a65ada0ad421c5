//! The built command on all the models of `tests/goldens`: every command on every family, models with a value replaced, options in
//! any mixture.
//!
//! `PHASE_MOE_CASES=30` runs thirty times as many mutations and mixes, every mutation of one value among them,
//! `PHASE_MOE_SEED=7` other ones. A failure prints what was run; the same seed brings it again. A run that takes a minute is taken
//! to hang and ended; no run may hold 4 GiB.
#![cfg(unix)]

mod answer;
mod every_command;
mod fixtures;
#[path = "../situations/gguf.rs"]
mod gguf;
mod mixes;
mod mutations;
mod runner;
