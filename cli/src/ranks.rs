//! `--expert-parallel`: this process as one of those that `mpirun` started, of which the first speaks for all.
//!
//! `start` -> `together` (what is done before the model runs: all ranks go on, or all end) -> the run -> `end`. An error in the run is known to one rank
//! alone, while the others wait for its messages: it ends the job.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use clap::Args;
use phase_moe::parallel::{self, ExpertParallel};
use phase_moe::{CapacityRule, Weights};

/// Whether this process says what all would say; set once, before anything is said that matters.
static SPEAKS: AtomicBool = AtomicBool::new(true);

/// All ranks have come to the same error.
static ALL_FAILED: AtomicBool = AtomicBool::new(false);

#[derive(Args)]
pub struct ParallelOptions {
    /// Spread the experts over the processes that mpirun has started, each with a part of them in its memory
    #[arg(long)]
    expert_parallel: bool,
}

/// This process is one of a job.
static IS_JOB: AtomicBool = AtomicBool::new(false);

/// The job's ranks; of a command by itself none.
#[derive(Clone)]
pub struct Ranks(Option<Arc<parallel::Ranks>>);

impl ParallelOptions {
    /// Starts MPI where it is asked for. From now on only rank 0 writes to standard output.
    pub fn start(&self) -> Result<Ranks> {
        if !self.expert_parallel {
            return Ok(Ranks(None));
        }
        start().map(|ranks| Ranks(Some(ranks)))
    }
}

#[cfg(feature = "mpi")]
fn start() -> Result<Arc<parallel::Ranks>> {
    let ranks = parallel::Ranks::new(parallel::Mpi::start()?)?;
    IS_JOB.store(true, Ordering::Relaxed);
    if ranks.rank() > 0 {
        SPEAKS.store(false, Ordering::Relaxed);
        rustix::stdio::dup2_stdout(std::fs::File::options().write(true).open("/dev/null")?)?;
    }
    Ok(Arc::new(ranks))
}

#[cfg(not(feature = "mpi"))]
fn start() -> Result<Arc<parallel::Ranks>> {
    let message = "--expert-parallel: expected a program built with --features mpi, got one without";
    Err(crate::mistake::UserMistake(message.into()).into())
}

impl Ranks {
    /// How many there are, where experts are over several.
    pub fn count(&self) -> Option<usize> {
        Some(self.0.as_ref()?.count())
    }

    /// Goes on where all ranks can, and ends on all of them with the error of the first one that cannot.
    pub fn together<T>(&self, own: Result<T>) -> Result<T> {
        let Some(ranks) = &self.0 else { return own };
        let all = ranks.together(own);
        ALL_FAILED.store(all.is_err(), Ordering::Relaxed);
        all
    }

    /// Checks that all ranks are of one program and do the same, by (name, value) of what must be alike.
    pub fn agree(&self, facts: &[(&str, String)]) -> Result<()> {
        let Some(ranks) = &self.0 else { return Ok(()) };
        let agreed = ranks.agree(facts);
        ALL_FAILED.store(agreed.is_err(), Ordering::Relaxed);
        Ok(agreed?)
    }

    /// Experts over the ranks, as `rule` has them on devices.
    pub fn spread(&self, rule: &CapacityRule) -> Result<Option<ExpertParallel>> {
        let Some(ranks) = &self.0 else { return Ok(None) };
        Ok(Some(ExpertParallel::new(ranks.clone(), rule.shares.clone())?))
    }
}

/// What must be alike on all ranks before the model is loaded: the program, its command line, the model's files.
pub fn facts(files: &Weights) -> Result<[(&'static str, String); 3]> {
    let words: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    Ok([
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("command line", words.join(" ")),
        ("model", format!("{:016x}", files.digest()?)),
    ])
}

/// A number for tokens that others hardly have (FNV-1a, 64 bits).
pub fn digest(ids: impl Iterator<Item = u32>) -> String {
    let hash = ids.fold(0xcbf2_9ce4_8422_2325, |hash: u64, id| (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// True where this process is to be heard: rank 0, or one by itself.
pub fn speaks() -> bool {
    SPEAKS.load(Ordering::Relaxed)
}

/// True where this process is one of a job.
pub fn is_job() -> bool {
    IS_JOB.load(Ordering::Relaxed)
}

/// True where `error` is for this process to tell: what all ranks have come to, rank 0 tells for all.
pub fn tells_errors() -> bool {
    speaks() || !ALL_FAILED.load(Ordering::Relaxed)
}

/// Waits for the other ranks at the end of a command; `code` is how this one ends. Where they do not know of its error, they end with it.
#[cfg(feature = "mpi")]
pub fn end(code: u8) {
    if code > 0 && !ALL_FAILED.load(Ordering::Relaxed) && parallel::Mpi::is_running() {
        parallel::Mpi::abort(code.into());
    }
    parallel::Mpi::finish();
}

#[cfg(not(feature = "mpi"))]
pub fn end(_: u8) {}

/// The number that the launcher gave this process, before MPI is there to ask: so that mistakes in the command line are told once.
pub fn launched_as() -> usize {
    let names = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"];
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
}
