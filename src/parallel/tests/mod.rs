//! Ranks as threads of one process: what MPI does, without it, and with faults where a test wants some.

mod faults;

use std::sync::{Arc, Barrier, Mutex};

use super::World;
use crate::error::Result;

/// What one rank gave to each: `[to]`.
type Given = Vec<Vec<u8>>;

/// A rank that is a thread.
#[derive(Clone, Debug)]
pub(crate) struct Thread {
    rank: usize,
    ranks: usize,
    given: Arc<Mutex<Vec<Given>>>,
    all: Arc<Barrier>,
}

impl Thread {
    /// As many ranks.
    pub(crate) fn ranks(ranks: usize) -> Vec<Self> {
        let (given, all) = (Arc::new(Mutex::new(vec![Vec::new(); ranks])), Arc::new(Barrier::new(ranks)));
        (0..ranks).map(|rank| Self { rank, ranks, given: given.clone(), all: all.clone() }).collect()
    }

    fn swap(&self, given: Given, received: &mut [u8]) {
        self.given.lock().unwrap()[self.rank] = given;
        self.all.wait();
        let mut rest = received;
        for from in 0..self.ranks {
            let part = self.given.lock().unwrap()[from][self.rank].clone();
            let (mine, after) = rest.split_at_mut(part.len());
            mine.copy_from_slice(&part);
            rest = after;
        }
        assert!(rest.is_empty(), "rank {} got less than it expected", self.rank);
        self.all.wait();
    }
}

impl World for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn gather(&self, own: &[u8], sizes: &[usize], all: &mut [u8]) -> Result<()> {
        assert_eq!((sizes.len(), sizes[self.rank]), (self.ranks, own.len()));
        self.swap(vec![own.to_vec(); self.ranks], all);
        Ok(())
    }

    fn exchange(
        &self,
        send: &[u8],
        sizes: &[usize],
        received: &mut [u8],
        received_sizes: &[usize],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()> {
        assert_eq!(received_sizes.iter().sum::<usize>(), received.len());
        let mut rest = send;
        let parts = sizes.iter().map(|&size| {
            let (part, after) = rest.split_at(size);
            rest = after;
            part.to_vec()
        });
        let parts = parts.collect();
        meanwhile();
        self.swap(parts, received);
        Ok(())
    }
}

/// What each rank of `worlds` gives, one thread a rank.
pub(crate) fn each<W: World + 'static, T: Send>(worlds: Vec<W>, run: impl Fn(W) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = worlds.into_iter().map(|world| scope.spawn(|| run(world))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
