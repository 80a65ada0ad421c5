//! Threads that stay awake between the short stages of a decode step: each would fall asleep after the one and be woken for the next, which on
//! a virtual machine takes as long as a stage.
//!
//! Whoever waits looks for work and otherwise yields to the system, so that a busy neighbour loses nothing but the looking.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Runs `work` on a thread of the pool while its others look for what that one shares out. A thread from outside waits meanwhile: beside it
/// one more would be awake than there are cores.
pub(crate) fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        let (owner, others) = (thread::current().id(), rayon::current_num_threads() - 1);
        // Set when `work` panics, too.
        let _end = End(&done);
        for _ in 0..others {
            let done = &done;
            scope.spawn(move |_| {
                // Where this thread waits for others it may come to this itself, and would then wait for its own end.
                let is_other = thread::current().id() != owner;
                while is_other && !done.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(rayon::Yield::Executed) {
                        thread::yield_now();
                    }
                }
            });
        }
        work()
    })
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
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
        let caught = std::panic::catch_unwind(|| pool.install(|| awake(|| panic!("on purpose"))));
        assert!(caught.is_err());
        assert_eq!(pool.install(stages), stages());
    }
}
