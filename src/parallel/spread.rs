//! One MoE layer whose experts are over ranks, as this rank sees it: [`Spread`].
//!
//! Knows nothing of what experts compute.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use half::{bf16, f16};
use twox_hash::XxHash3_64;

use super::ExpertParallel;
use super::message::{HEAD, Kind};
use super::share::{Routes, Share};
use crate::error::Result;
use crate::expert::{ExpertId, ExpertSet};
use crate::experts::matrix::Dtype;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::Placement;
use crate::routing::plan::DispatchPlan;

/// A layer's experts over ranks.
#[derive(Debug)]
pub(crate) struct Spread {
    parallel: ExpertParallel,
    placement: Placement,
    /// Those of this rank.
    own: ExpertSet,
    /// Which of this rank's experts each is, by id; meaningless for the others.
    position: Vec<usize>,
    /// Rows on their way are in it.
    dtype: Dtype,
    work: Mutex<Buffers>,
}

/// Memory of a pass that the next one uses again.
#[derive(Debug, Default)]
struct Buffers {
    routes: Routes,
    plan: DispatchPlan,
    local: DispatchPlan,
    index_of: Vec<u32>,
    rows: Vec<f32>,
    sums: Vec<f32>,
    /// Time in experts.
    experts: Duration,
}

/// Marks a row that is not here.
const ELSEWHERE: u32 = u32::MAX;

/// What computes.
pub(crate) trait RunExperts {
    /// The weighted sums over this rank's experts in `plan` for rows `[rows, hidden]`, into as many rows, in place of what these held; what every
    /// token gets is added to the first `own` of them.
    fn experts(&mut self, rows: &[f32], plan: &DispatchPlan, sums: &mut [f32], own: usize) -> Result<()>;

    /// Adds what every token gets.
    fn shared(&mut self, rows: &[f32], sums: &mut [f32]) -> Result<()>;
}

/// One pass of a batch through the layer.
pub(crate) struct Rows<'a> {
    /// How the batch is shared out.
    pub(crate) share: &'a Share,
    /// This rank's own rows, `[own rows, hidden]`.
    pub(crate) input: &'a [f32],
    /// Numbers of a row.
    pub(crate) hidden: usize,
    /// Own rows and those of other ranks go through the experts together, not own ones while the others are on their way.
    pub(crate) at_once: bool,
}

impl Spread {
    /// Layer `layer` of `layers`, with `experts` of which `parallel` says where they are; rows go in `dtype`, a float.
    ///
    /// # Errors
    /// [`Error::Shape`] for placements of other layers or experts.
    pub(crate) fn new(
        parallel: &ExpertParallel,
        [layer, layers]: [usize; 2],
        experts: usize,
        dtype: Dtype,
    ) -> Result<Self> {
        let placement = parallel.placement(layer, layers, experts)?;
        let (mut own, mut position) = (ExpertSet::new(experts)?, Vec::with_capacity(experts));
        for (expert, &rank) in placement.device_of().iter().enumerate() {
            position.push(own.len());
            if usize::from(rank) == parallel.ranks.rank() {
                own.insert(ExpertId::new(expert, experts)?);
            }
        }
        Ok(Self { parallel: parallel.clone(), placement, own, position, dtype, work: Mutex::default() })
    }

    /// This rank's experts.
    pub(crate) fn own(&self) -> &ExpertSet {
        &self.own
    }

    /// From how many rows for each expert on own rows go first.
    pub(crate) fn overlap_rows(&self) -> usize {
        self.parallel.overlap_rows
    }

    /// Whether an expert is on this rank.
    pub(crate) fn has(&self, expert: usize) -> bool {
        usize::from(self.placement.device_of()[expert]) == self.parallel.ranks.rank()
    }

    /// Which of this rank's experts an expert of it is.
    pub(crate) fn position(&self, expert: usize) -> usize {
        self.position[expert]
    }

    /// How a batch of `rows` is shared out of which nobody says more: every rank has it whole.
    pub(crate) fn whole(&self, rows: usize) -> Share {
        Share::whole(self.parallel.ranks.count(), rows)
    }

    /// The gate logits of all rows, in place of this rank's own, `[rows, experts]`; and the experts in fast memory anywhere, where `resident`, those
    /// of this rank, are given.
    ///
    /// # Errors
    /// [`Error::Rank`] where messages fail.
    pub(crate) fn gather_logits(
        &self,
        share: &Share,
        logits: &mut Vec<f32>,
        resident: Option<&mut ExpertSet>,
    ) -> Result<()> {
        let (ranks, rank) = (&self.parallel.ranks, self.parallel.ranks.rank());
        let experts = self.placement.experts();
        let of_set = if resident.is_some() { experts.div_ceil(8) } else { 0 };
        let of_logits = |rank: usize| share.given_by(rank).len() * experts * size_of::<f32>();
        let sizes: Vec<usize> = (0..ranks.count()).map(|rank| of_logits(rank) + of_set).collect();
        let own = &logits[..of_logits(rank) / size_of::<f32>()];
        let set = resident.as_deref();
        let write = |bytes: &mut [u8]| {
            let (numbers, bits) = bytes.split_at_mut(of_logits(rank));
            numbers.copy_from_slice(bytemuck::cast_slice(own));
            bits.fill(0);
            // Only what is here: of the others their own ranks know.
            for expert in set.into_iter().flat_map(ExpertSet::iter).filter(|&expert| self.own.contains(expert)) {
                bits[expert.index() / 8] |= 1 << (expert.index() % 8);
            }
        };
        let (mut all, mut anywhere) = (vec![0.0; share.rows() * experts], vec![0u8; of_set]);
        ranks.gather((Kind::Logits, 0), &sizes, write, |from, bytes| {
            let (numbers, bits) = bytes.split_at(of_logits(from));
            let into = &mut all[share.given_by(from).start * experts..][..numbers.len() / size_of::<f32>()];
            into.iter_mut().zip(numbers.chunks_exact(4)).for_each(|(into, number)| {
                *into = f32::from_le_bytes([number[0], number[1], number[2], number[3]]);
            });
            anywhere.iter_mut().zip(bits).for_each(|(all, bits)| *all |= bits);
        })?;
        *logits = all;
        if let Some(resident) = resident {
            resident.reset(experts)?;
            for expert in (0..experts).filter(|expert| anywhere[expert / 8] >> (expert % 8) & 1 == 1) {
                resident.insert(ExpertId::new(expert, experts)?);
            }
        }
        Ok(())
    }

    /// The layer's output for this rank's own rows, `[own rows, hidden]`, by an assignment of all rows of the batch.
    ///
    /// # Errors
    /// [`Error::Rank`] where messages fail, and what `run` reports.
    pub(crate) fn forward(
        &self,
        rows: &Rows<'_>,
        assignment: &Assignment,
        output: &mut [f32],
        run: &mut dyn RunExperts,
    ) -> Result<()> {
        let mut buffers = self.lock();
        buffers.routes.refill(assignment, &self.placement, rows.share, self.parallel.ranks.rank());
        buffers.plan.refill(assignment);
        let digest = XxHash3_64::oneshot(bytemuck::cast_slice(assignment.raw()));
        match rows.share.is_whole() {
            true => self.whole_batch(&mut buffers, digest, rows, output, run),
            false => self.own_rows(&mut buffers, digest, rows, output, run),
        }
    }

    /// Runs this rank's experts, as often as it is to repeat itself, and adds the time.
    fn repeat(&self, time: &mut Duration, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        let started = Instant::now();
        (0..self.parallel.repeats).try_for_each(|_| run())?;
        *time += started.elapsed();
        Ok(())
    }

    /// Counts a pass through the layer that began at `started`.
    pub(crate) fn count(&self, assignment: &Assignment, is_limited: bool, started: Instant) {
        let experts = std::mem::take(&mut self.lock().experts);
        self.parallel.count(&assignment.load(), &self.placement, is_limited, [started.elapsed(), experts]);
    }

    /// Every rank has all rows and runs its experts on them; sums go to everybody, and every rank adds up the same numbers in the same order.
    fn whole_batch(
        &self,
        buffers: &mut Buffers,
        digest: u64,
        &Rows { input, hidden, .. }: &Rows<'_>,
        output: &mut [f32],
        run: &mut dyn RunExperts,
    ) -> Result<()> {
        let Buffers { routes, plan, local, index_of, sums, experts, .. } = buffers;
        index_of.clear();
        index_of.extend(0..(input.len() / hidden.max(1)) as u32);
        plan.here(&self.own, index_of, local);
        sums.resize(input.len(), 0.0);
        self.repeat(experts, || run.experts(input, local, sums, 0))?;
        let row_bytes = hidden * self.row_size();
        let sizes: Vec<usize> = routes.to.iter().map(|rows| rows.len() * row_bytes).collect();
        let (ranks, rank) = (&self.parallel.ranks, self.parallel.ranks.rank());
        let write = |bytes: &mut [u8]| {
            for (&row, bytes) in routes.to[rank].iter().zip(bytes.chunks_exact_mut(row_bytes)) {
                self.pack(&sums[row as usize * hidden..][..hidden], bytes);
            }
        };
        output.fill(0.0);
        ranks.gather((Kind::Sums, digest), &sizes, write, |from, bytes| {
            for (&row, bytes) in routes.to[from].iter().zip(bytes.chunks_exact(row_bytes)) {
                self.add(bytes, &mut output[row as usize * hidden..][..hidden]);
            }
        })?;
        run.shared(input, output)
    }

    /// Rows go to the ranks of their experts and come back as sums.
    fn own_rows(
        &self,
        buffers: &mut Buffers,
        digest: u64,
        &Rows { share, input, hidden, at_once }: &Rows<'_>,
        output: &mut [f32],
        run: &mut dyn RunExperts,
    ) -> Result<()> {
        let Buffers { routes, plan, local, index_of, rows, sums, experts } = buffers;
        let (ranks, rank) = (&self.parallel.ranks, self.parallel.ranks.rank());
        let (own, row_bytes) = (share.rows_of(rank), hidden * self.row_size());
        let others = |lists: &[Vec<u32>]| -> Vec<usize> {
            let bytes = |(of, rows): (usize, &Vec<u32>)| if of == rank { 0 } else { rows.len() * row_bytes };
            lists.iter().enumerate().map(bytes).collect()
        };
        let (to, from) = (others(&routes.to), others(&routes.from));
        ranks.add_bytes(2 * (routes.sent * row_bytes as u64 + routes.messages * HEAD as u64));
        let own_row = |row: u32| &input[(row as usize - own.start) * hidden..][..hidden];

        // Own rows first, then those of the other ranks in their order.
        let first_other = if at_once { own.len() } else { 0 };
        rows.clear();
        if at_once {
            rows.extend_from_slice(input);
        }
        index_of.clear();
        index_of.resize(share.rows(), ELSEWHERE);
        let mut done = Ok(());
        if !at_once {
            own.clone().zip(0..).for_each(|(row, index)| index_of[row] = index);
            plan.here(&self.own, index_of, local);
            index_of.fill(ELSEWHERE);
        }
        ranks.exchange(
            (Kind::Rows, digest),
            &to,
            &from,
            |to, bytes| {
                for (&row, bytes) in routes.to[to].iter().zip(bytes.chunks_exact_mut(row_bytes)) {
                    self.pack(own_row(row), bytes);
                }
            },
            || {
                if !at_once {
                    done = self.repeat(experts, || run.experts(input, local, output, own.len()));
                }
            },
            |_, bytes| {
                let start = rows.len();
                rows.resize(start + bytes.len() / row_bytes * hidden, 0.0);
                for (row, bytes) in rows[start..].chunks_exact_mut(hidden).zip(bytes.chunks_exact(row_bytes)) {
                    self.add(bytes, row);
                }
            },
        )?;
        done?;
        if at_once {
            own.clone().zip(0..).for_each(|(row, index)| index_of[row] = index);
        }
        let mut next = first_other as u32;
        for &row in routes.from.iter().enumerate().filter(|(of, _)| *of != rank).flat_map(|(_, rows)| rows) {
            index_of[row as usize] = next;
            next += 1;
        }
        plan.here(&self.own, index_of, local);
        sums.resize(rows.len(), 0.0);
        self.repeat(experts, || run.experts(rows, local, sums, first_other))?;
        if at_once {
            output.copy_from_slice(&sums[..own.len() * hidden]);
        }
        let mut sent = sums[first_other * hidden..].chunks_exact(hidden);
        ranks.exchange(
            (Kind::Sums, digest),
            &from,
            &to,
            |_, bytes| {
                bytes.chunks_exact_mut(row_bytes).zip(&mut sent).for_each(|(bytes, sums)| self.pack(sums, bytes))
            },
            || {},
            |of, bytes| {
                for (&row, bytes) in routes.to[of].iter().zip(bytes.chunks_exact(row_bytes)) {
                    self.add(bytes, &mut output[(row as usize - own.start) * hidden..][..hidden]);
                }
            },
        )
    }

    fn row_size(&self) -> usize {
        if self.dtype == Dtype::F32 { 4 } else { 2 }
    }

    /// Numbers as bytes on their way.
    fn pack(&self, numbers: &[f32], bytes: &mut [u8]) {
        match self.dtype {
            Dtype::F32 => bytes.copy_from_slice(bytemuck::cast_slice(numbers)),
            Dtype::F16 => bytes
                .chunks_exact_mut(2)
                .zip(numbers)
                .for_each(|(bytes, &number)| bytes.copy_from_slice(&f16::from_f32(number).to_le_bytes())),
            _ => bytes
                .chunks_exact_mut(2)
                .zip(numbers)
                .for_each(|(bytes, &number)| bytes.copy_from_slice(&bf16::from_f32(number).to_le_bytes())),
        }
    }

    /// Adds numbers that came as bytes.
    fn add(&self, bytes: &[u8], sums: &mut [f32]) {
        let halves = bytes.chunks_exact(2).map(|half| [half[0], half[1]]);
        match self.dtype {
            Dtype::F32 => sums.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(sum, number)| {
                *sum += f32::from_le_bytes([number[0], number[1], number[2], number[3]]);
            }),
            Dtype::F16 => sums.iter_mut().zip(halves).for_each(|(sum, half)| *sum += f16::from_le_bytes(half).to_f32()),
            _ => sums.iter_mut().zip(halves).for_each(|(sum, half)| *sum += bf16::from_le_bytes(half).to_f32()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
