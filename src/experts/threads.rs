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
