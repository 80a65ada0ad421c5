//! Claims: every row claims its best experts at the final prices, and over-full pools let go of those that lose least.
//!
//! `loss = value held − value of the best expert that is not held and has room`, over all claimants of all over-full pools
//! at once, least loss first: the pool keeps the claimants that lose most by leaving. Where room falls short, as many
//! slots as must be dropped may be, at a value of 0. Equal losses leave in the order of [`Problem::order`].
//!
//! Knows nothing of chains of moves: a slot that finds no room directly is left to [`super::place`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use rayon::prelude::*;

use super::problem::Problem;
use crate::routing::slots::EMPTY;
use crate::simd::select::largest_below;
use crate::simd::{Isa, Kernel, Lanes};

/// Equal losses up to this many are put in order by themselves; more are worth ranking the whole batch for.
const FEW: usize = 16;

/// Rows a thread takes at a time. Run by `benches/phase`.
const CHUNK: usize = 512;

/// Claimants per slot too many that are looked at at a time. Run by `benches/phase`.
const NEAR: usize = 2;

/// Which row holds what, and the room that is left.
pub(super) struct Holding<'a> {
    pub(super) problem: &'a Problem<'a>,
    /// Expert claimed by each slot, `[rows, top_k]`.
    pub(super) chosen: Vec<u16>,
    /// Whether the slot has it.
    pub(super) kept: Vec<bool>,
    /// Room minus load of each pool; below 0 while over-full.
    pub(super) left: Vec<i64>,
    price: Vec<f32>,
}

/// Losses, least first, and the rows they are of.
type Losses = BinaryHeap<Reverse<(u32, usize)>>;

/// Takes all of the least loss off the heap, in the order in which their rows lose; returns the loss.
fn pop_equals(
    problem: &Problem<'_>,
    heap: &mut Losses,
    equals: &mut Vec<usize>,
    row_of: impl Fn(usize) -> usize + Copy,
) -> Option<u32> {
    let Reverse((least, first)) = heap.pop()?;
    equals.clear();
    equals.push(first);
    while heap.peek().is_some_and(|Reverse((other, _))| *other == least) {
        equals.extend(heap.pop().map(|Reverse((_, item))| item));
    }
    if equals.len() > FEW || (equals.len() > 1 && problem.is_ordered()) {
        let order = problem.order();
        equals.sort_unstable_by_key(|&item| (order[row_of(item)], item));
    } else if equals.len() > 1 {
        problem.sort(equals, row_of);
    }
    Some(least)
}

/// Orders finite floats as integers do.
fn key(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// For each row the best expert with room that it does not hold, and its value.
struct Ways<'c> {
    isa: Isa,
    /// Price of experts with room, +∞ of the others.
    price: Vec<f32>,
    open: Vec<u16>,
    /// Value of the best expert that each row did not claim.
    refused: &'c [f32],
    best: Vec<(u16, f32)>,
    /// Rows that no longer hold what they claimed.
    changed: Vec<bool>,
}

/// A row that no expert with room is left for.
const NO_WAY: (u16, f32) = (EMPTY, f32::NEG_INFINITY);

impl<'c> Ways<'c> {
    fn new(holding: &Holding<'_>, isa: Isa, refused: &'c [f32]) -> Self {
        let problem = holding.problem;
        let experts = 0..problem.pool_of.len() as u16;
        let open: Vec<u16> = experts.filter(|&expert| holding.left[problem.pool(expert)] > 0).collect();
        let mut price = vec![f32::INFINITY; problem.pool_of.len()];
        open.iter().for_each(|&expert| price[usize::from(expert)] = holding.price[usize::from(expert)]);
        let (best, changed) = (vec![NO_WAY; refused.len()], vec![false; refused.len()]);
        let mut ways = Self { isa, price, open, refused, best, changed };
        let mut best = std::mem::take(&mut ways.best);
        match problem.is_small() {
            true => isa.run(FindAll { ways: &ways, holding, first: 0, best: &mut best }),
            false => {
                let parts = best.par_chunks_mut(CHUNK).enumerate();
                parts.for_each(|(part, best)| isa.run(FindAll { ways: &ways, holding, first: part * CHUNK, best }));
            }
        }
        ways.best = best;
        ways
    }

    /// The way of a row, looked for again if its pool has filled up.
    fn of(&mut self, holding: &Holding<'_>, row: usize) -> (u16, f32) {
        let (expert, _) = self.best[row];
        if expert != EMPTY && holding.left[holding.problem.pool(expert)] <= 0 {
            self.best[row] = self.search(holding, row);
        }
        self.best[row]
    }

    fn search(&self, holding: &Holding<'_>, row: usize) -> (u16, f32) {
        match self.changed[row] {
            true => holding.best_free(row, &self.open).unwrap_or(NO_WAY),
            false => self.isa.run(Find { ways: self, holding, row }),
        }
    }

    /// Takes the experts of a pool that is full off the list.
    fn close(&mut self, problem: &Problem<'_>, pool: usize) {
        self.open.retain(|&expert| problem.pool(expert) != pool);
        for (price, &of) in self.price.iter_mut().zip(&problem.pool_of) {
            if usize::from(of) == pool {
                *price = f32::INFINITY;
            }
        }
    }

    /// The way of a row that holds what it claimed: its best, so that what it does not hold is worth less than the last of it.
    #[inline(always)]
    fn find<L: Lanes>(&self, lanes: L, holding: &Holding<'_>, row: usize) -> (u16, f32) {
        let last = match holding.chosen[(row + 1) * holding.problem.top_k - 1] {
            EMPTY => return NO_WAY,
            expert => holding.value(row, expert),
        };
        if self.refused[row] == last {
            return holding.best_free(row, &self.open).unwrap_or(NO_WAY);
        }
        let (expert, value) = largest_below(lanes, holding.problem.selection(row), &self.price, last);
        if value > f32::NEG_INFINITY { (expert as u16, value) } else { NO_WAY }
    }
}

struct FindAll<'w, 'c, 'a> {
    ways: &'w Ways<'c>,
    holding: &'w Holding<'a>,
    first: usize,
    best: &'w mut [(u16, f32)],
}

impl Kernel for FindAll<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (row, best) in (self.first..).zip(self.best) {
            *best = self.ways.find(lanes, self.holding, row);
        }
    }
}

struct Find<'w, 'c, 'a> {
    ways: &'w Ways<'c>,
    holding: &'w Holding<'a>,
    row: usize,
}

impl Kernel for Find<'_, '_, '_> {
    type Output = (u16, f32);

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        self.ways.find(lanes, self.holding, self.row)
    }
}

/// The slots of over-full pools with their losses, pool by pool. Few of them will leave: the rest waits outside the heap,
/// which has an item for the least of it, the pool's number. Losses only grow, as pools fill up.
struct Claimants {
    /// Loss, and slot.
    slots: Vec<(u32, u32)>,
    /// What of `slots` still waits, per pool.
    waiting: Vec<Range<usize>>,
}

impl Claimants {
    fn new(holding: &Holding<'_>, ways: &Ways<'_>, floor: f32) -> Self {
        let (problem, top_k) = (holding.problem, holding.problem.top_k);
        let mut end = 0;
        let mut waiting: Vec<Range<usize>> = (holding.left.iter().zip(&problem.room))
            .map(|(&left, &room)| {
                let from = end;
                end += if left < 0 { (i64::from(room) - left) as usize } else { 0 };
                from..from
            })
            .collect();
        // What is not over-full goes to one place behind the rest, so that no branch depends on the pool.
        let mut slots = vec![(0, 0); end + 1];
        let mut next: Vec<(usize, usize)> = (holding.left.iter().zip(&waiting))
            .map(|(&left, range)| if left < 0 { (range.start, 1) } else { (end, 0) })
            .collect();
        for (row, chosen) in holding.chosen.chunks_exact(top_k).enumerate() {
            let best = ways.best[row].1.max(floor);
            for (slot, &expert) in (row * top_k..).zip(chosen) {
                if expert != EMPTY {
                    let (at, step) = &mut next[problem.pool(expert)];
                    slots[*at] = (key(holding.value(row, expert) - best), slot as u32);
                    *at += *step;
                }
            }
        }
        waiting
            .iter_mut()
            .zip(next)
            .for_each(|(range, (at, step))| range.end = if step > 0 { at } else { range.start });
        Self { slots, waiting }
    }

    /// Brings the next few of a pool into the heap, if it is still over-full.
    fn pull(&mut self, holding: &Holding<'_>, pool: usize, heap: &mut Losses) {
        let over = (-holding.left[pool]).max(0) as usize;
        let pools = self.waiting.len();
        let waiting = &mut self.waiting[pool];
        if over == 0 {
            return;
        }
        let slots = &mut self.slots[waiting.clone()];
        let count = NEAR * over + FEW;
        if count < slots.len() {
            let (_, &mut (least, _), _) = slots.select_nth_unstable(count);
            heap.push(Reverse((least, pool)));
        }
        let count = count.min(slots.len());
        heap.extend(slots[..count].iter().map(|&(loss, slot)| Reverse((loss, pools + slot as usize))));
        waiting.start += count;
    }
}

impl<'a> Holding<'a> {
    /// Everything claimed is held, however full the pools.
    pub(super) fn new(problem: &'a Problem<'a>, chosen: Vec<u16>, prices: &[f32]) -> Self {
        let mut left: Vec<i64> = problem.room.iter().map(|&room| i64::from(room)).collect();
        let kept: Vec<bool> = chosen.iter().map(|&expert| expert != EMPTY).collect();
        chosen.iter().filter(|&&expert| expert != EMPTY).for_each(|&expert| left[problem.pool(expert)] -= 1);
        let price = problem.pool_of.iter().map(|&pool| prices[usize::from(pool)]).collect();
        Self { problem, chosen, kept, left, price }
    }

    /// Score − price of an expert for a row.
    pub(super) fn value(&self, row: usize, expert: u16) -> f32 {
        self.problem.selection(row)[usize::from(expert)] - self.price[usize::from(expert)]
    }

    /// The slots of a row.
    pub(super) fn slots(&self, row: usize) -> std::ops::Range<usize> {
        row * self.problem.top_k..(row + 1) * self.problem.top_k
    }

    /// True when the row holds the expert.
    pub(super) fn holds(&self, row: usize, expert: u16) -> bool {
        self.slots(row).any(|slot| self.chosen[slot] == expert && self.kept[slot])
    }

    /// The row's best expert of `among` that it does not hold, and its value; the first of equals.
    pub(super) fn best_free(&self, row: usize, among: &[u16]) -> Option<(u16, f32)> {
        let selection = self.problem.selection(row);
        let mut best = None;
        for &expert in among {
            let score = selection[usize::from(expert)];
            let value = score - self.price[usize::from(expert)];
            if score > f32::NEG_INFINITY && best.is_none_or(|(_, most)| value > most) && !self.holds(row, expert) {
                best = Some((expert, value));
            }
        }
        best
    }

    /// Lets over-full pools overflow into those with room, then drops what found none. Afterwards no pool is over-full.
    ///
    /// `refused` is the value of the best expert that each row did not claim.
    pub(super) fn overflow(&mut self, isa: Isa, refused: &[f32]) {
        let (problem, top_k, pools) = (self.problem, self.problem.top_k, self.left.len());
        let mut over: i64 = self.left.iter().map(|&left| (-left).max(0)).sum();
        if over == 0 {
            return;
        }
        let claimed = self.kept.iter().filter(|&&kept| kept).count() as u64;
        let mut drops = claimed.saturating_sub(problem.total_room());
        let floor = |drops: u64| if drops > 0 { 0.0 } else { f32::NEG_INFINITY };
        let mut ways = Ways::new(self, isa, refused);
        let mut claimants = Claimants::new(self, &ways, floor(drops));
        let mut heap = BinaryHeap::new();
        (0..pools).for_each(|pool| claimants.pull(self, pool, &mut heap));
        let mut equals = Vec::new();
        while over > 0 {
            while let Some(&Reverse((_, pool))) = heap.peek()
                && pool < pools
            {
                heap.pop();
                claimants.pull(self, pool, &mut heap);
            }
            let Some(least) = pop_equals(problem, &mut heap, &mut equals, |item| (item - pools) / top_k) else { break };
            for &item in &equals {
                let slot = item - pools;
                let (row, expert) = (slot / top_k, self.chosen[slot]);
                let pool = problem.pool(expert);
                if self.left[pool] >= 0 {
                    continue;
                }
                let way = ways.of(self, row);
                let free = Some(way).filter(|way| way.0 != EMPTY && (way.1 > floor(drops) || drops == 0));
                let best = match free {
                    Some((_, value)) => value,
                    None if drops > 0 => 0.0,
                    None => continue,
                };
                let loss = key(self.value(row, expert) - best);
                if loss > least {
                    heap.push(Reverse((loss, item)));
                    continue;
                }
                self.left[pool] += 1;
                over -= 1;
                match free {
                    Some((expert, _)) => {
                        self.take(slot, expert);
                        let entered = problem.pool(expert);
                        self.left[entered] -= 1;
                        if self.left[entered] == 0 {
                            ways.close(problem, entered);
                        }
                        ways.changed[row] = true;
                        ways.best[row] = ways.search(self, row);
                    }
                    None => {
                        self.kept[slot] = false;
                        drops -= 1;
                    }
                }
            }
        }
        self.cut();
    }

    /// Drops from pools that are still over-full what is worth least.
    fn cut(&mut self) {
        let (problem, top_k) = (self.problem, self.problem.top_k);
        if self.left.iter().all(|&left| left >= 0) {
            return;
        }
        let mut over: Vec<usize> = (0..self.chosen.len())
            .filter(|&slot| self.kept[slot] && self.left[problem.pool(self.chosen[slot])] < 0)
            .collect();
        let order = problem.order();
        over.sort_by_cached_key(|&slot| {
            (key(self.value(slot / top_k, self.chosen[slot])), order[slot / top_k], self.chosen[slot])
        });
        for slot in over {
            let left = &mut self.left[problem.pool(self.chosen[slot])];
            if *left < 0 {
                *left += 1;
                self.kept[slot] = false;
            }
        }
    }

    /// Fills priced pools that have room left from pools that cost nothing, where that gains score: room with a price is
    /// room that someone wants.
    pub(super) fn refill(&mut self) {
        let problem = self.problem;
        let wanted = |holding: &Self, expert: u16| {
            holding.price[usize::from(expert)] > 0.0 && holding.left[problem.pool(expert)] > 0
        };
        let mut open: Vec<u16> = (0..problem.pool_of.len() as u16).filter(|&expert| wanted(self, expert)).collect();
        if open.is_empty() {
            return;
        }
        let mut heap: Losses = (0..problem.rows())
            .filter_map(|row| self.refill_move(row, &open).map(|(loss, ..)| Reverse((loss, row))))
            .collect();
        let mut equals = Vec::new();
        while !open.is_empty()
            && let Some(least) = pop_equals(problem, &mut heap, &mut equals, |row| row)
        {
            for &row in &equals {
                let Some((loss, slot, expert)) = self.refill_move(row, &open) else { continue };
                if loss > least {
                    heap.push(Reverse((loss, row)));
                    continue;
                }
                self.left[problem.pool(self.chosen[slot])] += 1;
                self.take(slot, expert);
                let entered = problem.pool(expert);
                self.left[entered] -= 1;
                if self.left[entered] == 0 {
                    open.retain(|&expert| problem.pool(expert) != entered);
                }
                if let Some((loss, ..)) = self.refill_move(row, &open) {
                    heap.push(Reverse((loss, row)));
                }
            }
        }
    }

    /// The least loss, after prices, at which a row moves a slot that costs nothing to an expert of `open`, with gain.
    fn refill_move(&self, row: usize, open: &[u16]) -> Option<(u32, usize, u16)> {
        let free = |slot: &usize| self.kept[*slot] && self.price[usize::from(self.chosen[*slot])] == 0.0;
        let value = |slot: usize| self.value(row, self.chosen[slot]);
        let slot = self.slots(row).filter(free).min_by(|&a, &b| value(a).total_cmp(&value(b)))?;
        let (expert, best) = self.best_free(row, open)?;
        let gains = self.problem.selection(row)[usize::from(expert)] > value(slot);
        gains.then(|| (key(value(slot) - best), slot, expert))
    }

    /// Gives a slot another expert; a dropped slot of the row that claimed it claims the old one instead.
    pub(super) fn take(&mut self, slot: usize, expert: u16) {
        let row = slot / self.problem.top_k;
        if let Some(other) = self.slots(row).find(|&other| other != slot && self.chosen[other] == expert) {
            self.chosen[other] = self.chosen[slot];
        }
        self.chosen[slot] = expert;
        self.kept[slot] = true;
    }

    /// Slots a row has.
    pub(super) fn kept_of(&self, row: usize) -> usize {
        self.kept[self.slots(row)].iter().filter(|&&kept| kept).count()
    }
}
