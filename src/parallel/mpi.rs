//! Ranks as processes of an MPI job: [`Mpi`], on the crate `mpi`.
//!
//! MPI is called by the thread that started it alone, which is all that `MPI_THREAD_FUNNELED` allows.

use std::cell::RefCell;
use std::mem::ManuallyDrop;

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

use super::world::World;
use crate::error::{Error, Result};

thread_local! {
    /// Of the thread that started MPI. Dropped by [`Mpi::finish`] alone: that waits for all ranks, which one that failed must not.
    static UNIVERSE: RefCell<ManuallyDrop<Option<Universe>>> = const { RefCell::new(ManuallyDrop::new(None)) };
}

/// The processes that `mpirun` started, or this one alone without it.
#[derive(Debug)]
pub struct Mpi {
    rank: usize,
    ranks: usize,
}

impl Mpi {
    /// Starts MPI; the thread that calls this runs the model, too.
    ///
    /// # Errors
    /// [`Error::Rank`] where MPI was started before or does not start.
    pub fn start() -> Result<Self> {
        let universe = mpi::initialize_with_threading(Threading::Funneled);
        let Some((universe, _)) = universe else {
            return Err(Error::Rank {
                rank: 0,
                detail: "MPI: expected that nobody had started it, got a second start".into(),
            });
        };
        let world = universe.world();
        UNIVERSE.set(ManuallyDrop::new(Some(universe)));
        Ok(Self { rank: world.rank() as usize, ranks: world.size() as usize })
    }

    /// Ends the job on all ranks at once: for an error that the others know nothing of, and would wait for.
    pub fn abort(code: i32) -> ! {
        UNIVERSE.with_borrow(|universe| match &**universe {
            Some(universe) => universe.world().abort(code),
            None => std::process::exit(code),
        })
    }

    /// True from its start on this thread to its end.
    pub fn is_running() -> bool {
        UNIVERSE.with_borrow(|universe| universe.is_some())
    }

    /// Ends MPI when all ranks have come here; messages after this are errors.
    pub fn finish() {
        drop(UNIVERSE.with_borrow_mut(|universe| universe.take()));
    }

    /// The name of the machine that this rank is on, as MPI has it.
    pub fn host() -> String {
        mpi::environment::processor_name().unwrap_or_default()
    }

    fn world(&self) -> Result<SimpleCommunicator> {
        let missing = || Error::Rank {
            rank: self.rank,
            detail: "MPI: expected a call by the thread that started it, got another".into(),
        };
        UNIVERSE.with_borrow(|universe| universe.as_ref().map(|universe| universe.world())).ok_or_else(missing)
    }

    /// Counts and starts as MPI takes them.
    fn parts(&self, sizes: &[usize]) -> Result<(Vec<i32>, Vec<i32>)> {
        let mut at = 0usize;
        let mut parts = (Vec::with_capacity(sizes.len()), Vec::with_capacity(sizes.len()));
        for &size in sizes {
            let (Ok(count), Ok(start)) = (i32::try_from(size), i32::try_from(at)) else {
                let detail =
                    format!("message: expected less than 2 GiB at a time, got {} bytes", sizes.iter().sum::<usize>());
                return Err(Error::Rank { rank: self.rank, detail });
            };
            parts.0.push(count);
            parts.1.push(start);
            at += size;
        }
        Ok(parts)
    }
}

impl World for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn gather(&self, own: &[u8], sizes: &[usize], all: &mut [u8]) -> Result<()> {
        let (counts, starts) = self.parts(sizes)?;
        self.world()?.all_gather_varcount_into(own, &mut PartitionMut::new(all, counts, starts));
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
        let (world, (counts, starts), (received_counts, received_starts)) =
            (self.world()?, self.parts(sizes)?, self.parts(received_sizes)?);
        let send = Partition::new(send, counts, starts);
        let mut received = PartitionMut::new(received, received_counts, received_starts);
        mpi::request::scope(|scope| {
            let request = world.immediate_all_to_all_varcount_into(scope, &send, &mut received);
            meanwhile();
            request.wait();
        });
        Ok(())
    }
}
