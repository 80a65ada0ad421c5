//! How fast all threads together read memory: the floor of whatever reads more than its caches hold.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// The best rate seen, since a busy neighbour only takes away.
pub struct Reads {
    /// What is read, larger than any cache.
    buffer: Vec<f32>,
    pub gb_per_second: f64,
}

impl Reads {
    /// Nothing measured yet.
    pub fn new(smoke: bool) -> Self {
        let bytes = if smoke { 1 << 24 } else { 1 << 30 };
        let buffer = (0..bytes / 4).into_par_iter().map(|at| at as f32).collect();
        Self { buffer, gb_per_second: 0.0 }
    }

    /// Measures once more.
    pub fn raise(&mut self) {
        let rate = 4e-9 * self.buffer.len() as f64 / seconds(|| read(&self.buffer));
        self.gb_per_second = self.gb_per_second.max(rate);
    }

    /// Gigabytes per second of reading about so many bytes once, others at every turn.
    #[allow(dead_code)]
    pub fn now(&self, bytes: f64, turn: usize) -> f64 {
        let part = ((bytes / 4.0) as usize).clamp(1 << 20, 1 << 26).min(self.buffer.len());
        let parts = self.buffer.len() / part;
        let from = &self.buffer[turn % parts * part..][..part];
        let start = Instant::now();
        read(from);
        4e-9 * part as f64 / start.elapsed().as_secs_f64()
    }
}

/// Seconds of the best of three medians of five calls: neither a lucky call counts nor a busy neighbour.
pub fn seconds(mut call: impl FnMut()) -> f64 {
    call();
    let mut median = || {
        let mut times = [(); 5].map(|()| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        });
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    (0..3).map(|_| median()).fold(f64::INFINITY, f64::min)
}

/// Reads a buffer with all threads.
fn read(buffer: &[f32]) {
    // Enough sums at once that memory is waited for and not additions, and two streams, which a core reads faster than one.
    let sum = |part: &[f32]| {
        let (left, right) = part.split_at(part.len() / 2);
        let mut sums = [[0f32; 16]; 2];
        for (left, right) in left.as_chunks::<16>().0.iter().zip(right.as_chunks::<16>().0) {
            for lane in 0..16 {
                sums[0][lane] += left[lane];
                sums[1][lane] += right[lane];
            }
        }
        sums.iter().flatten().sum::<f32>()
    };
    let part = buffer.len() / (16 * rayon::current_num_threads());
    black_box(black_box(buffer).par_chunks(part).map(sum).sum::<f32>());
}
