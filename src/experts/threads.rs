//! How the engine's work is shared out over threads, and the memory that each of them works in.
//!
//! Nothing is written by two threads, and no sum depends on which of them does what.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::simd::multiply::Line;
use crate::simd::product::{BLOCK, Workspace};

/// Bytes of weights and products with them, one as dear as the other, below which a second thread comes too late to help:
/// about a tenth of a millisecond.
const WORTH_THREADS: usize = 4 << 20;

/// Memory of one forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) input: Vec<Line>,
    pub(super) between: Vec<Line>,
    pub(super) sums: Vec<f32>,
    pub(super) threads: Vec<ThreadBuffers>,
}

impl Buffers {
    /// How many threads so much work is worth, each with buffers of its own.
    pub(super) fn threads_for(&mut self, products: usize, bytes: usize) -> usize {
        let threads = if products.saturating_add(bytes) < WORTH_THREADS { 1 } else { rayon::current_num_threads() };
        self.threads.resize_with(threads.max(self.threads.len()), ThreadBuffers::default);
        threads
    }
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").finish_non_exhaustive()
    }
}

/// What one thread works in.
#[derive(Default)]
pub(super) struct ThreadBuffers {
    pub(super) workspace: Workspace,
    pub(super) sums: Vec<f32>,
    /// Products with a gate of another dtype.
    pub(super) gates: Vec<f32>,
    pub(super) values: Vec<f32>,
}

/// Makes room for at least `count`.
pub(super) fn grow<T: Clone + Default>(buffer: &mut Vec<T>, count: usize) {
    if buffer.len() < count {
        buffer.resize(count, T::default());
    }
}

/// Does all items, each thread the next one that is left.
pub(super) fn share_out<T: Send>(
    items: impl Iterator<Item = T> + Send,
    threads: &mut [ThreadBuffers],
    run: impl Fn(&mut ThreadBuffers, T) + Sync,
) {
    let Some((mine, others)) = threads.split_first_mut() else { return };
    if others.is_empty() {
        return items.for_each(|item| run(mine, item));
    }
    let items = Mutex::new(items);
    // Held for the time of a step of an iterator.
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = |buffers: &mut ThreadBuffers| {
        while let Some(item) = next() {
            run(buffers, item);
        }
    };
    // This thread works too, while the others wake up.
    rayon::in_place_scope(|scope| {
        for buffers in others {
            scope.spawn(|_| work(buffers));
        }
        work(mine);
    });
}

/// Changes `output`, `[tokens, width]`, in pieces of its columns: `run` gets which they are and `[tokens, columns]`,
/// with what it holds where that is to be kept.
pub(super) fn in_columns(
    tokens: usize,
    width: usize,
    output: &mut [f32],
    keep: bool,
    sums: &mut Vec<f32>,
    threads: &mut [ThreadBuffers],
    run: impl Fn(&mut ThreadBuffers, Range<usize>, &mut [f32]) + Sync,
) {
    if width == 0 {
        return; // No column to cut into pieces.
    }
    let piece = width.div_ceil(8 * threads.len()).next_multiple_of(BLOCK);
    grow(sums, tokens * width);
    let starts = (0..width).step_by(piece);
    for (row, output) in output.chunks_exact(width).enumerate().filter(|_| keep) {
        for (first, output) in starts.clone().zip(output.chunks(piece)) {
            sums[first * tokens + row * output.len()..][..output.len()].copy_from_slice(output);
        }
    }
    let mut left = &mut sums[..tokens * width];
    let pieces = starts.clone().map(|first| {
        let columns = first..width.min(first + piece);
        let (mine, rest) = std::mem::take(&mut left).split_at_mut(tokens * columns.len());
        left = rest;
        (columns, mine)
    });
    share_out(pieces, threads, |buffers, (columns, sums)| run(buffers, columns, sums));
    for (row, output) in output.chunks_exact_mut(width).enumerate() {
        for (first, output) in starts.clone().zip(output.chunks_mut(piece)) {
            output.copy_from_slice(&sums[first * tokens + row * output.len()..][..output.len()]);
        }
    }
}

/// Runs `work`, of many short stages, on a thread of the pool while its others look for what that one shares out: each would fall asleep after a
/// stage and be woken for the next, which on a virtual machine takes as long as a stage. Who finds nothing yields to the system, so that a busy
/// neighbour loses nothing but the looking. A thread from outside waits meanwhile: beside it one more would be awake than there are cores.
#[cfg(feature = "model")]
pub(crate) fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let done = std::sync::atomic::AtomicBool::new(false);
    rayon::scope(|scope| {
        let (owner, others) = (std::thread::current().id(), rayon::current_num_threads() - 1);
        // Set when `work` panics, too.
        let _end = End(&done);
        for _ in 0..others {
            let done = &done;
            scope.spawn(move |_| {
                // Where this thread waits for others it may come to this itself, and would then wait for its own end.
                let is_other = std::thread::current().id() != owner;
                while is_other && !done.load(std::sync::atomic::Ordering::Acquire) {
                    if rayon::yield_now() != Some(rayon::Yield::Executed) {
                        std::thread::yield_now();
                    }
                }
            });
        }
        work()
    })
}

#[cfg(feature = "model")]
struct End<'a>(&'a std::sync::atomic::AtomicBool);

#[cfg(feature = "model")]
impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Release);
    }
}

#[cfg(all(test, feature = "model"))]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// Many short stages, each shared out.
    fn stages() -> usize {
        (0..50).map(|stage| (0..8).into_par_iter().map(|part| stage + part).sum::<usize>()).sum()
    }

    #[test]
    fn work_is_done_from_inside_a_pool_and_outside_alone_and_beside_others() {
        let expected = stages();
        assert_eq!(awake(stages), expected);
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| awake(stages)), expected);
            let all: Vec<usize> = pool.install(|| (0..6).into_par_iter().map(|_| awake(|| awake(stages))).collect());
            assert_eq!(all, [expected; 6]);
        }
    }

    #[test]
    fn a_panic_lets_the_others_go() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let run = std::panic::AssertUnwindSafe(|| pool.install(|| awake(|| panic!("on purpose"))));
        assert!(std::panic::catch_unwind(run).is_err());
        assert_eq!(pool.install(stages), stages());
    }
}
