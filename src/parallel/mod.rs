//! Experts over several machines: each rank of a job holds some experts of every layer and runs them for the tokens of all ranks.
//!
//! ```text
//! gate of own rows --gather--> logits of all rows --router--> the same assignment on every rank
//! own rows --exchange--> rows that want this rank's experts --engine--> weighted sums --exchange--> added up in order of rank
//! ```
//!
//! Attention and everything else but the experts is on every rank. A batch with as many sequences as ranks or more is split: each rank runs some
//! sequences (data parallel). Fewer sequences, as in the decode of one text, are run whole by every rank, and only the experts are shared out.
//! Nobody coordinates: gate logits go to all ranks, a few hundredths of the hidden states' bytes, and each derives the same
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

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

pub use self::message::Ranks;
#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use self::world::World;
use crate::error::{Error, Result};
use crate::parallel::message::{Kind, Traffic};
use crate::parallel::share::Share;
use crate::routing::capacity::{Placement, Shares};

/// Experts of a model over the ranks of a job: which rank has which. Clones are the same job.
#[derive(Clone, Debug)]
pub struct ExpertParallel {
    ranks: Arc<Ranks>,
    shares: Arc<Shares>,
    /// Of each rank, relative.
    speeds: Arc<[f64]>,
    repeats: usize,
    overlap_rows: usize,
    totals: Arc<Mutex<RankTotals>>,
}

/// See [`ExpertParallel::with_overlap`].
const OVERLAP_ROWS: usize = 512;

/// What happened so far: messages of all ranks, loads of all, and the time of this one.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct RankTotals {
    /// Bytes that went from one rank to another, of all ranks together.
    pub bytes: u64,
    /// Time of this rank in messages, also where it waited for others.
    pub exchange: Duration,
    /// Its time in MoE layers, messages and all.
    pub stage: Duration,
    /// Its time in experts.
    pub experts: Duration,
    /// Kept slots of each rank's experts, all layers together.
    pub loads: Vec<u64>,
    /// Of layers and batches with a limit, and of all others.
    balance: [Balance; 2],
}

/// Slots per unit of speed, of the rank with the most of them and the mean, summed over layers and batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Balance {
    slowest: f64,
    mean: f64,
}

/// What the ranks of a job did with some batches, the same on every rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RankShares {
    /// How many there are.
    pub ranks: usize,
    /// Kept slots of each rank's experts, all layers and batches together.
    pub rank_loads: Vec<u64>,
    /// Slots of the rank with the most per unit of speed, over the mean: what the time of the layers is over what it could be. Of the layers and
    /// batches that had a limit, or of all where none had.
    pub straggler_ratio: f64,
    /// Bytes from one rank to another, all layers and both ways, over the tokens.
    pub bytes_exchanged_per_token: f64,
    /// Time in messages, where ranks wait for each other too, over the time of the forward passes; the mean of the ranks.
    pub exchange_share_of_time: f64,
}

impl ExpertParallel {
    /// Experts where `shares` put them: device `d` is rank `d`, and its speed is that rank's.
    ///
    /// # Errors
    /// [`Error::Shape`] for shares of experts by themselves or of another number of devices than there are ranks, [`Error::Parameter`] for a speed
    /// that is not positive and finite.
    pub fn new(ranks: Arc<Ranks>, shares: Shares) -> Result<Self> {
        let Some(speeds) = shares.speeds() else {
            return Err(Error::shape("shares of the ranks", "those of devices", "those of experts"));
        };
        if speeds.len() != ranks.count() {
            let (expected, got) = (format!("{} ranks", ranks.count()), format!("{} devices", speeds.len()));
            return Err(Error::shape("shares of the ranks", expected, got));
        }
        if let Some(bad) = speeds.iter().find(|speed| !(speed.is_finite() && **speed > 0.0)) {
            return Err(Error::parameter("rank speed", bad, "a positive finite number"));
        }
        let speeds = speeds.into();
        Ok(Self {
            ranks,
            shares: Arc::new(shares),
            speeds,
            repeats: 1,
            overlap_rows: OVERLAP_ROWS,
            totals: Arc::default(),
        })
    }

    /// The same with this rank's experts computed so many times over: what a slower machine would be, to be measured on equal ones.
    pub fn with_repeats(self, repeats: usize) -> Self {
        Self { repeats: repeats.max(1), ..self }
    }

    /// The same with a rank's own rows going through its experts while those of the others are on their way, in batches with at least so many rows for
    /// each expert on average (512 unless told otherwise). Weights are read twice then: within one machine that cost more than it gained at 64 rows and at
    /// 256; over a slow network it may pay with fewer.
    pub fn with_overlap(self, rows: usize) -> Self {
        Self { overlap_rows: rows, ..self }
    }

    /// The ranks.
    pub fn ranks(&self) -> &Arc<Ranks> {
        &self.ranks
    }

    /// What happened so far.
    pub fn totals(&self) -> RankTotals {
        let Traffic { bytes, time } = self.ranks.traffic();
        RankTotals { bytes, exchange: time, ..self.lock().clone() }
    }

    /// What all ranks did since `before` with `tokens` in `time`; all of them call this.
    ///
    /// # Errors
    /// [`Error::Rank`] where messages fail.
    pub fn shares(&self, before: &RankTotals, tokens: u64, time: Duration) -> Result<RankShares> {
        let (now, ranks) = (self.totals(), self.ranks.count());
        let own = (now.exchange - before.exchange).as_secs_f64() / time.as_secs_f64().max(f64::MIN_POSITIVE);
        let exchange = self.ranks.numbers(&[own], &vec![1; ranks])?;
        let loads = (0..ranks).map(|rank| {
            let of = |totals: &RankTotals| totals.loads.get(rank).copied().unwrap_or(0);
            of(&now) - of(before)
        });
        let since = |at: usize| {
            let (now, before) = (now.balance[at], before.balance[at]);
            Balance { slowest: now.slowest - before.slowest, mean: now.mean - before.mean }
        };
        let balance = Some(since(0)).filter(|limited| limited.mean > 0.0).unwrap_or_else(|| since(1));
        Ok(RankShares {
            ranks,
            rank_loads: loads.collect(),
            straggler_ratio: if balance.mean > 0.0 { balance.slowest / balance.mean } else { 1.0 },
            bytes_exchanged_per_token: (now.bytes - before.bytes) as f64 / tokens.max(1) as f64,
            exchange_share_of_time: exchange.iter().sum::<f64>() / ranks as f64,
        })
    }

    /// Counts a pass through a layer: the loads of its experts, and the times of this rank.
    pub(crate) fn count(&self, load: &[u32], placement: &Placement, is_limited: bool, [stage, experts]: [Duration; 2]) {
        let mut of_rank = vec![0u64; self.ranks.count()];
        for (&load, &rank) in load.iter().zip(placement.device_of()) {
            of_rank[usize::from(rank)] += u64::from(load);
        }
        let per_speed = of_rank.iter().zip(self.speeds.iter()).map(|(&load, speed)| load as f64 / speed);
        let slowest = per_speed.fold(0.0, f64::max);
        let mean = of_rank.iter().sum::<u64>() as f64 / self.speeds.iter().sum::<f64>();
        let mut totals = self.lock();
        totals.loads.resize(of_rank.len(), 0);
        totals.loads.iter_mut().zip(of_rank).for_each(|(sum, load)| *sum += load);
        let balance = &mut totals.balance[usize::from(!is_limited)];
        balance.slowest += slowest;
        balance.mean += mean;
        totals.stage += stage;
        totals.experts += experts;
    }

    fn lock(&self) -> MutexGuard<'_, RankTotals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The placement of a MoE layer's `experts`, of `layers` in all.
    ///
    /// # Errors
    /// [`Error::Shape`] for placements of other experts, layers or ranks.
    pub(crate) fn placement(&self, layer: usize, layers: usize, experts: usize) -> Result<Placement> {
        let placement = self.shares.of_layer(layer, layers)?.placement(experts)?;
        let placement = placement.ok_or_else(|| Error::shape("shares of the ranks", "those of devices", "others"))?;
        let (expected, got) = (self.ranks.count(), placement.devices());
        match expected == got {
            true => Ok(placement),
            false => Err(Error::shape("placement", format!("one on {expected} ranks"), format!("{got} devices"))),
        }
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
}
