//! What carries bytes between ranks: [`World`], the seam below which MPI stands and another transport may.
//!
//! Knows nothing of what the bytes mean.

use std::fmt::Debug;

use crate::error::Result;

/// The processes of one job, each with a rank from 0 on. All of them make the same calls in the same order, and each call returns when
/// this rank has its part of the result. [`Ranks`](super::Ranks) checks every message, so a world only has to carry it.
pub trait World: Debug + Send + Sync {
    /// The number of this process.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Gives `own` to all ranks: `all` is what each of them gave, in order of rank, of as many bytes as `sizes` says.
    ///
    /// # Errors
    /// [`Error::Rank`](crate::error::Error::Rank) where the transport fails.
    fn gather(&self, own: &[u8], sizes: &[usize], all: &mut [u8]) -> Result<()>;

    /// Gives a part of `send` to each rank, in order of rank and of as many bytes as `sizes` says; `received` is what each of them
    /// gave to this one, of `received_sizes`. `meanwhile` runs while bytes are on their way, once.
    ///
    /// # Errors
    /// As [`World::gather`].
    fn exchange(
        &self,
        send: &[u8],
        sizes: &[usize],
        received: &mut [u8],
        received_sizes: &[usize],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()>;
}
