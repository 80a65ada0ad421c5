//! Experts over several machines: each rank of a job holds some experts of every layer and runs them for the tokens of all ranks.
//!
//! ```text
//! gate of own rows --gather--> logits of all rows --router--> the same assignment on every rank
//! own rows --exchange--> rows that want this rank's experts --engine--> weighted sums --exchange--> added up in order of rank
//! ```
//!
//! Attention and everything else but the experts is on every rank. A batch with as many sequences as ranks or more is split: each rank runs some
//! sequences (data parallel). Fewer sequences, as in the decode of one text, are run whole by every rank, and only the experts are shared out.
//! Nobody coordinates: gate logits go to all ranks, a hundredth of the bytes of the hidden states, and each derives the same
//! assignment from them, prices and limits included, since routers give the same bits on every CPU. The digest of the assignment goes along with the
//! rows, so that ranks which differ find out. A row goes once to each rank that has experts of it, and one row of sums comes back.
//!
//! [`World`] is what carries bytes: MPI with feature `mpi`. GShard (arXiv 2006.16668) has experts over devices and the exchange there and back;
//! the router of every other device's logits is this crate's own.
//!
//! Knows nothing of tensors, layers or models.

mod message;
#[cfg(feature = "mpi")]
mod mpi;
pub(crate) mod share;
pub(crate) mod spread;
#[cfg(test)]
pub(crate) mod tests;
mod world;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

pub use self::message::Ranks;
#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use self::world::World;
use crate::error::{Error, Result};
use crate::parallel::message::{Kind, Traffic};
use crate::parallel::share::Share;
use crate::routing::capacity::Placement;

/// Experts of a model over the ranks of a job: which rank has which. Clones are the same job.
#[derive(Clone, Debug)]
pub struct ExpertParallel {
    ranks: Arc<Ranks>,
    /// One for all layers, or one for each.
    placements: Arc<[Placement]>,
    repeats: usize,
    stage: Arc<Mutex<Stage>>,
}

/// Time of this rank in MoE layers so far, and in their experts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Stage {
    time: Duration,
    experts: Duration,
}

/// What a rank did so far, and what all of them sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RankFigures {
    /// Bytes from one rank to another, of all ranks together.
    pub bytes: u64,
    /// Time of this rank in messages, also where it waited for others.
    pub exchange: Duration,
    /// Its time in MoE layers, messages and all.
    pub stage: Duration,
    /// Its time in experts.
    pub experts: Duration,
}

impl RankFigures {
    /// What came after `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            exchange: self.exchange - before.exchange,
            stage: self.stage - before.stage,
            experts: self.experts - before.experts,
        }
    }
}

impl ExpertParallel {
    /// Experts where `placements` put them, one for all MoE layers or one for each; device `d` of it is rank `d`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a placement on another number of devices than there are ranks, or none.
    pub fn new(ranks: Arc<Ranks>, placements: Vec<Placement>) -> Result<Self> {
        let wrong = placements.iter().find(|placement| placement.devices() != ranks.count());
        if let Some(wrong) = wrong {
            let got = format!("{} devices", wrong.devices());
            return Err(Error::shape("placement", format!("one on {} ranks", ranks.count()), got));
        }
        if placements.is_empty() {
            return Err(Error::shape("placements", "one for all layers or one for each", "none"));
        }
        Ok(Self { ranks, placements: placements.into(), repeats: 1, stage: Arc::default() })
    }

    /// The same with this rank's experts computed so many times over: what a slower machine would be, to be measured on equal ones.
    pub fn with_repeats(self, repeats: usize) -> Self {
        Self { repeats: repeats.max(1), ..self }
    }

    /// The ranks.
    pub fn ranks(&self) -> &Arc<Ranks> {
        &self.ranks
    }

    /// What this rank did so far.
    pub fn figures(&self) -> RankFigures {
        let Traffic { bytes, time } = self.ranks.traffic();
        let stage = *self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        RankFigures { bytes, exchange: time, stage: stage.time, experts: stage.experts }
    }

    /// The placement of a MoE layer's `experts`, of `layers` in all.
    ///
    /// # Errors
    /// [`Error::Shape`] for a placement of other experts, or for placements of other layers.
    pub(crate) fn placement(&self, layer: usize, layers: usize, experts: usize) -> Result<&Placement> {
        let placement = match &*self.placements {
            [all] => all,
            each if each.len() == layers => &each[layer],
            each => {
                return Err(Error::shape(
                    "placements",
                    format!("one, or one for each of {layers} MoE layers"),
                    each.len(),
                ));
            }
        };
        placement.check(experts)?;
        Ok(placement)
    }

    /// How a batch is shared out.
    pub(crate) fn share(&self, sequences: usize, positions: usize) -> Share {
        Share::new(self.ranks.count(), sequences, positions)
    }

    /// Rows of numbers `[rows, width]` that every rank has of its own part of a batch, or rank 0 of all of it, as all of them in order. A rank may
    /// have none of its own: `rows` are how many each gives.
    ///
    /// # Errors
    /// [`Error::Rank`] where messages fail.
    pub(crate) fn gather_rows(&self, own: &[f32], rows: &[usize], width: usize) -> Result<Vec<f32>> {
        let sizes: Vec<usize> = rows.iter().map(|rows| rows * width * size_of::<f32>()).collect();
        let mut all = Vec::with_capacity(rows.iter().sum::<usize>() * width);
        let write = |bytes: &mut [u8]| bytes.copy_from_slice(bytemuck::cast_slice(own));
        self.ranks.gather((Kind::Numbers, 0), &sizes, write, |_, bytes| {
            all.extend(
                bytes.chunks_exact(4).map(|number| f32::from_le_bytes([number[0], number[1], number[2], number[3]])),
            );
        })?;
        Ok(all)
    }

    /// The same of `f64`, of which each rank gives as many as `counts` says.
    ///
    /// # Errors
    /// As [`ExpertParallel::gather_rows`].
    pub(crate) fn gather_numbers(&self, own: &[f64], counts: &[usize]) -> Result<Vec<f64>> {
        let sizes: Vec<usize> = counts.iter().map(|count| count * size_of::<f64>()).collect();
        let mut all = Vec::with_capacity(counts.iter().sum());
        let write = |bytes: &mut [u8]| bytes.copy_from_slice(bytemuck::cast_slice(own));
        self.ranks.gather((Kind::Numbers, 0), &sizes, write, |_, bytes| {
            let numbers = bytes.chunks_exact(8).map(|number| number.try_into().map_or(f64::NAN, f64::from_le_bytes));
            all.extend(numbers);
        })?;
        Ok(all)
    }
}
