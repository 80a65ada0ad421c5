//! When reading ahead is worth it: a controller that tries it and measures.
//!
//! ```text
//! trial: passes in turn without and with reads ahead --> is the middle pass with them faster by a share? --> hold that --> trial ..
//! ```
//!
//! What helps depends on the disk, on the work there is to hide a read behind, and on how often the guess is right; none of it
//! is known before, and all of it changes. So the controller asks the clock: [`Lookahead::begin`] says whether to read ahead in a
//! pass, [`Lookahead::end`] takes how long the pass was. Passes without reads ahead cost a comparison. A verdict is held four times as
//! long whenever the next trial confirms it, so that trials become rare.
//!
//! Reads ahead change when bytes come, never what a model computes. Knows nothing of caches, layers or guesses.

use std::time::{Duration, Instant};

use crate::offload::cache::Prefetch;

/// Passes of a trial with reads ahead, and as many without.
const TRIED: usize = 32;

/// Passes that the first verdict holds for, and the most that any does.
const HELD: (u64, u64) = (256, 16_384);

/// Reads ahead stay off unless they make the middle pass faster by this share.
const GAIN: f64 = 0.03;

/// Whether to read ahead, pass by pass.
#[derive(Debug)]
pub(super) struct Lookahead {
    prefetch: Prefetch,
    phase: Phase,
    /// Passes that the next verdict holds for.
    hold: u64,
    /// The verdict before.
    verdict: Option<bool>,
}

#[derive(Debug)]
enum Phase {
    Trial { without: Vec<Duration>, with: Vec<Duration> },
    Held { ahead: bool, left: u64 },
}

/// A pass that has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    /// Read ahead in it.
    pub(super) ahead: bool,
    /// Where its time counts.
    started: Option<Instant>,
}

impl Pass {
    /// One that reads nothing ahead and does not count.
    pub(super) const PLAIN: Self = Self { ahead: false, started: None };
}

impl Lookahead {
    /// A controller that has seen nothing.
    pub(super) fn new(prefetch: Prefetch) -> Self {
        let trial = Phase::Trial { without: Vec::new(), with: Vec::new() };
        Self { prefetch, phase: trial, hold: HELD.0, verdict: None }
    }

    /// A pass begins.
    pub(super) fn begin(&self) -> Pass {
        let Some(ahead) = self.next() else { return Pass::PLAIN };
        let is_trial = self.prefetch == Prefetch::Auto && matches!(self.phase, Phase::Trial { .. });
        Pass { ahead, started: is_trial.then(Instant::now) }
    }

    /// It has ended; one that failed is not to be told.
    pub(super) fn end(&mut self, pass: Pass) {
        if self.prefetch == Prefetch::Auto {
            self.note(pass.started.map_or(Duration::ZERO, |started| started.elapsed()));
        }
    }

    /// Whether the next pass reads ahead; `None` where it never does.
    fn next(&self) -> Option<bool> {
        match (self.prefetch, &self.phase) {
            (Prefetch::Off, _) => None,
            (Prefetch::Always, _) => Some(true),
            (Prefetch::Auto, Phase::Held { ahead, .. }) => Some(*ahead),
            // Without, with, with, without: neither is always the one after the other.
            (Prefetch::Auto, Phase::Trial { without, with }) => Some((without.len() + with.len()) % 4 % 3 != 0),
        }
    }

    /// The pass that was next took so long.
    fn note(&mut self, took: Duration) {
        let ahead = self.next() == Some(true);
        match &mut self.phase {
            Phase::Held { left, .. } => {
                *left -= 1;
                if *left == 0 {
                    self.phase = Phase::Trial { without: Vec::new(), with: Vec::new() };
                }
            }
            Phase::Trial { without, with } => {
                let side = if ahead { &mut *with } else { &mut *without };
                side.push(took);
                if without.len() + with.len() < 2 * TRIED {
                    return;
                }
                let ahead = middle(with) < middle(without).mul_f64(1.0 - GAIN);
                self.hold = if self.verdict == Some(ahead) { (4 * self.hold).min(HELD.1) } else { HELD.0 };
                self.verdict = Some(ahead);
                self.phase = Phase::Held { ahead, left: self.hold };
            }
        }
    }
}

/// The median: a pass that was interrupted says nothing.
fn middle(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs passes that take `micros(with reads ahead, number)`; which of them read ahead.
    fn passes(lookahead: &mut Lookahead, count: usize, micros: impl Fn(bool, usize) -> u64) -> Vec<bool> {
        let pass = |number: usize| {
            let ahead = lookahead.next().unwrap();
            lookahead.note(Duration::from_micros(micros(ahead, number)));
            ahead
        };
        (0..count).map(pass).collect()
    }

    fn share(passes: &[bool]) -> f64 {
        passes.iter().filter(|&&ahead| ahead).count() as f64 / passes.len() as f64
    }

    #[test]
    fn it_stays_on_where_it_helps_and_off_where_it_does_not() {
        let uneven = |number: usize| 900 + (number * 7919 % 200) as u64;
        for (with, expected) in [(80, true), (99, false), (100, false), (130, false)] {
            let mut lookahead = Lookahead::new(Prefetch::Auto);
            let took = |ahead: bool, number: usize| uneven(number) * if ahead { with } else { 100 } / 100;
            let trial = passes(&mut lookahead, 2 * TRIED, took);
            assert_eq!(share(&trial), 0.5, "a trial has as many of both");
            let held = passes(&mut lookahead, HELD.0 as usize, took);
            assert_eq!(share(&held), f64::from(u8::from(expected)), "{with} % of the time");
            let later = passes(&mut lookahead, 40_000, took);
            assert!(
                (share(&later) - f64::from(u8::from(expected))).abs() < 0.01,
                "trials become rare: {}",
                share(&later)
            );
        }
    }

    #[test]
    fn interrupted_passes_do_not_count_and_minds_change() {
        let mut lookahead = Lookahead::new(Prefetch::Auto);
        let interrupted = |ahead: bool, number: usize| match (ahead, number % 5) {
            (true, 0) => 1_000_000,
            (true, _) => 800,
            (false, _) => 1000,
        };
        passes(&mut lookahead, 2 * TRIED, interrupted);
        assert_eq!(lookahead.next(), Some(true));
        // The disk has become slow.
        passes(&mut lookahead, HELD.0 as usize, |_, _| 1000);
        passes(&mut lookahead, 2 * TRIED, |ahead, _| if ahead { 1500 } else { 1000 });
        assert_eq!(lookahead.next(), Some(false));
    }

    #[test]
    fn what_is_said_once_and_for_all_is_not_tried() {
        for (prefetch, ahead) in [(Prefetch::Off, false), (Prefetch::Always, true)] {
            let mut lookahead = Lookahead::new(prefetch);
            for _ in 0..500 {
                let pass = lookahead.begin();
                assert_eq!((pass.ahead, pass.started), (ahead, None));
                lookahead.end(pass);
            }
        }
    }
}
