//! What holds for every command: threads, whether progress is shown, and in which colours.

use std::process::Command;
#[cfg(feature = "hub")]
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ColorChoice};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::mistake::UserMistake;
use crate::ranks;
use crate::terminal::Terminal;

/// What `--quiet` says, for downloads, which begin where the model is opened; nothing else is told by it, so any order will do.
#[cfg(feature = "hub")]
pub static QUIET: AtomicBool = AtomicBool::new(false);

/// More than this is a typing error.
const MAX_THREADS: usize = 1024;

#[derive(Args)]
pub struct Global {
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// No progress bars
    #[arg(long, global = true)]
    quiet: bool,
    /// Colour in tables: auto is where standard output is a terminal and NO_COLOR is not set
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value = "auto")]
    color: ColorChoice,
}

impl Global {
    /// Sets how many threads compute.
    ///
    /// Candle takes its numbers of threads from the environment alone: matrix products from one variable, its spinning pool
    /// for everything else from another. That pool stays off: on tensors of this size waiting costs more than it gains.
    /// Setting variables of a running process is unsafe, so the process starts over with them set.
    pub fn apply(&self) -> Result<()> {
        #[cfg(feature = "hub")]
        QUIET.store(self.quiet, Ordering::Relaxed);
        if let Some(threads) = self.threads.filter(|threads| !(1..=MAX_THREADS).contains(threads)) {
            let message = format!("--threads is {threads}: expected at least 1 and at most {MAX_THREADS}");
            return Err(UserMistake(message).into());
        }
        let (products, rest) = ("RAYON_NUM_THREADS", "CANDLE_NUM_THREADS");
        let wanted = self.threads.map(|threads| threads.to_string());
        let set = std::env::var(products).ok();
        if set.is_some() && (wanted.is_none() || wanted == set) {
            return Ok(());
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from).to_string();
        let mut again = Command::new(std::env::current_exe().context("own executable")?);
        again.args(std::env::args_os().skip(1)).env(products, wanted.unwrap_or_else(cores)).env(rest, "1");
        #[cfg(unix)]
        return Err(std::os::unix::process::CommandExt::exec(&mut again)).context("starting over");
        #[cfg(not(unix))]
        std::process::exit(again.status().context("starting over")?.code().unwrap_or(1));
    }

    /// What standard output can show.
    pub fn terminal(&self) -> Terminal {
        Terminal::of_stdout(self.color)
    }

    /// The time that something takes of which nobody knows how long it will, on standard error; gone as a bar is.
    pub fn waiting(&self, message: impl Into<String>) -> Progress {
        self.shown(None, "{msg} {spinner} {elapsed}").saying(message)
    }

    /// True where progress is not to be shown.
    pub fn quiet(&self) -> bool {
        self.quiet || !ranks::speaks()
    }

    /// A bar on standard error that vanishes at the end; none where standard error is no terminal.
    pub fn progress(&self, length: u64) -> Progress {
        self.shown(Some(length), "{msg:32} {wide_bar} {percent:>3} %, {eta} left")
    }

    fn shown(&self, length: Option<u64>, template: &str) -> Progress {
        let target = if self.quiet() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(length, target);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress(bar)
    }
}

/// A progress bar that is gone when it is dropped, so also before an error is printed.
pub struct Progress(ProgressBar);

impl Progress {
    fn saying(self, message: impl Into<String>) -> Self {
        self.0.set_message(message.into());
        self
    }
}

impl std::ops::Deref for Progress {
    type Target = ProgressBar;

    fn deref(&self) -> &ProgressBar {
        &self.0
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
