//! Exchange: cycles of moves between pools that gain score, until there are none, and the prices that prove it.
//!
//! Nodes are the pools, *dropped* and *room*. An arc a → b costs the least `score held − score taken` of any row that can
//! move a slot from a to b; into *dropped* it costs a held score, out of it a score taken is gained; *room* stands for what
//! pools have left. A cycle of negative cost is applied; without one the assignment is the best there is, and the labels
//! that show this, `label_a ≤ label_b + cost_ab`, are exact prices of the dual (Klein 1967; Bellman–Ford, where a cycle of
//! parents is a negative cycle). A cycle enters and leaves a pool once, so a row in it twice is two moves that do not meet.
//!
//! Costs are integers, so that sums are exact and every cycle gains: it ends. Equal costs go by the order in which rows
//! lose, so the place in the batch does not matter. Work is counted, never timed.
//!
//! Knows nothing of how the assignment was found, nor of when it is good enough.

use super::claim::Holding;
use super::cycle::{FAR, NEVER, least, rings};
use super::problem::Problem;
use crate::routing::slots::EMPTY;

/// The largest score in integer units: `f32` scores down to 2^−16 of it are exact.
const LARGEST: f64 = (1u64 << 40) as f64;

/// What a served row is worth: more than all scores along any cycle.
const SERVED: i64 = 1 << 54;

/// In no list.
const NOWHERE: u32 = u32::MAX;

/// Nodes past which a graph is not worth its square.
const NODES: usize = 1 << 11;

/// Which row moves along an arc: `row` leaves `from` for `to`; [`EMPTY`] for none.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mover {
    row: u32,
    from: u16,
    to: u16,
}

/// The arc is room of a pool, and no row moves.
const NOBODY: Mover = Mover { row: u32::MAX, from: EMPTY, to: EMPTY };

/// An assignment, and the cheapest move between any two nodes.
pub(super) struct Exchange<'p, 'a> {
    pub(super) holding: Holding<'a>,
    problem: &'p Problem<'a>,
    order: &'p [u32],
    experts: Vec<Vec<u16>>,
    scale: f64,
    /// Whether only score counts: then a slot may be dropped for it, and a row may lose its last.
    free: bool,
    nodes: usize,
    cost: Vec<i64>,
    movers: Vec<Mover>,
    /// Arcs whose mover has gone: the true cost is no less, and found only where the arc matters.
    stale: Vec<bool>,
    /// Kept slots of each pool, and last the rows with a dropped slot; in no order.
    members: Vec<Vec<u32>>,
    /// Where each slot, or row, stands among those.
    places: Vec<u32>,
    /// Rows that the last cycles moved.
    moved: Vec<bool>,
    label: Vec<i64>,
    pub(super) work: u64,
    /// For one row: which experts it holds, and the best it does not hold in each pool.
    held: Vec<bool>,
    best: Vec<(i64, u16)>,
}

impl<'p, 'a> Exchange<'p, 'a> {
    /// The graph of `holding`, labelled by `prices`, for `work` steps; none where it would take more than that to build.
    pub(super) fn new(problem: &'p Problem<'a>, holding: Holding<'a>, prices: &[f32], work: u64) -> Option<Self> {
        let (pools, experts) = (problem.room.len(), problem.pool_of.len());
        let nodes = pools + 2;
        let build = (problem.rows() * (experts + problem.top_k.min(pools) * pools) + nodes * nodes) as u64;
        if nodes > NODES || build > work {
            return None;
        }
        let mut largest = 0.0f32;
        for row in 0..problem.rows() {
            let finite = problem.selection(row).iter().filter(|score| score.is_finite());
            largest = finite.fold(largest, |most, score| most.max(score.abs()));
        }
        let mut exchange = Self {
            holding,
            problem,
            order: problem.order(),
            experts: vec![Vec::new(); pools],
            scale: if largest > 0.0 { LARGEST / f64::from(largest) } else { 1.0 },
            free: false,
            nodes,
            cost: vec![NEVER; nodes * nodes],
            movers: vec![NOBODY; nodes * nodes],
            stale: vec![false; nodes * nodes],
            members: vec![Vec::new(); pools + 1],
            places: vec![NOWHERE; problem.rows() * (problem.top_k + 1)],
            moved: vec![false; problem.rows()],
            label: Vec::new(),
            work: work - build,
            held: vec![false; experts],
            best: Vec::new(),
        };
        (0..experts as u16).for_each(|expert| exchange.experts[problem.pool(expert)].push(expert));
        let label = prices.iter().map(|&price| (f64::from(price) * exchange.scale) as i64);
        exchange.label = label.chain([0, 0]).map(|label| label.clamp(-FAR, FAR)).collect();
        for row in 0..problem.rows() {
            exchange.rearrange(row);
            for slot in exchange.holding.slots(row) {
                if exchange.holding.kept[slot] {
                    exchange.join(problem.pool(exchange.holding.chosen[slot]), slot);
                }
            }
            exchange.queue(row);
            exchange.offer_all(row);
        }
        (0..pools).for_each(|pool| exchange.open(pool));
        Some(exchange)
    }

    fn dropped(&self) -> usize {
        self.nodes - 2
    }

    fn room(&self) -> usize {
        self.nodes - 1
    }

    /// Adds a slot to its pool.
    fn join(&mut self, pool: usize, slot: usize) {
        self.places[slot] = self.members[pool].len() as u32;
        self.members[pool].push(slot as u32);
    }

    /// Takes a slot from its pool.
    fn leave(&mut self, pool: usize, slot: usize) {
        let place = std::mem::replace(&mut self.places[slot], NOWHERE) as usize;
        self.members[pool].swap_remove(place);
        if let Some(&other) = self.members[pool].get(place) {
            self.places[other as usize] = place as u32;
        }
    }

    /// Whether a row waits for a slot: numbers past those of the slots stand for rows.
    fn queue(&mut self, row: usize) {
        let number = self.problem.rows() * self.problem.top_k + row;
        match (self.wants(row), self.places[number] == NOWHERE) {
            (true, true) => self.join(self.dropped(), number),
            (false, false) => self.leave(self.dropped(), number),
            _ => {}
        }
    }

    /// From now on only score counts: *dropped* and *room* are one, and nothing is owed to served rows.
    pub(super) fn relax(&mut self) {
        self.free = true;
        let (dropped, room) = (self.dropped(), self.room());
        for pool in 0..dropped {
            self.look(pool, dropped);
            self.look(dropped, pool);
        }
        self.cost[dropped * self.nodes + room] = 0;
        self.cost[room * self.nodes + dropped] = 0;
        (self.label[dropped], self.label[room]) = (0, 0);
    }

    /// Applies cycles until none gains; false when the work ran out before.
    pub(super) fn run(&mut self) -> bool {
        loop {
            match self.cycles() {
                None => return false,
                Some(cycles) if cycles.is_empty() => return true,
                Some(cycles) => self.apply(&cycles),
            }
        }
    }

    /// The labels as prices: exact when [`relax`](Self::relax) came before a [`run`](Self::run) that was not cut short.
    pub(super) fn prices(&self) -> Vec<f32> {
        let level = self.label[self.room()];
        let price = |&label: &i64| ((label - level).max(0) as f64 / self.scale) as f32;
        self.label[..self.dropped()].iter().map(price).collect()
    }

    /// A score in integer units; none where masked.
    fn worth(&self, row: usize, expert: u16) -> Option<i64> {
        let score = self.problem.selection(row)[usize::from(expert)];
        (score > f32::NEG_INFINITY).then(|| (f64::from(score) * self.scale) as i64)
    }

    /// True when the row has a slot that it claimed and lost.
    fn wants(&self, row: usize) -> bool {
        self.holding.slots(row).any(|slot| !self.holding.kept[slot] && self.holding.chosen[slot] != EMPTY)
    }

    /// What a row owes for giving up a slot beside its score, and gains for its first.
    fn owed(&self, last: bool) -> i64 {
        if last && !self.free { SERVED } else { 0 }
    }

    /// Within a pool a row holds the best it can: then the cheapest moves never meet in one expert.
    fn rearrange(&mut self, row: usize) {
        for slot in self.holding.slots(row) {
            let here = self.holding.chosen[slot];
            if !self.holding.kept[slot] || self.experts[self.problem.pool(here)].len() == 1 {
                continue;
            }
            let free = |expert: &u16| !self.holding.holds(row, *expert);
            let others = self.experts[self.problem.pool(here)].iter().filter(|expert| free(expert));
            let best = others.filter_map(|&expert| Some((self.worth(row, expert)?, expert)));
            if let Some((worth, expert)) = best.max_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)))
                && self.worth(row, here).is_some_and(|held| worth > held)
            {
                self.holding.take(slot, expert);
            }
        }
    }

    /// Offers every move of a row to the arcs.
    fn offer_all(&mut self, row: usize) {
        let (problem, dropped) = (self.problem, self.dropped());
        let slots = self.holding.slots(row).filter(|&slot| self.holding.kept[slot]);
        let held: Vec<u16> = slots.map(|slot| self.holding.chosen[slot]).collect();
        held.iter().for_each(|&expert| self.held[usize::from(expert)] = true);
        let mut best = std::mem::take(&mut self.best);
        best.clear();
        best.resize(self.experts.len(), (-NEVER, EMPTY));
        for expert in 0..problem.pool_of.len() as u16 {
            if !self.held[usize::from(expert)]
                && let Some(worth) = self.worth(row, expert)
                && worth > best[problem.pool(expert)].0
            {
                best[problem.pool(expert)] = (worth, expert);
            }
        }
        for &from in &held {
            self.held[usize::from(from)] = false;
            let (pool, worth) = (problem.pool(from), self.worth(row, from).unwrap_or_default());
            for (to, &(gain, expert)) in best.iter().enumerate() {
                if to != pool && expert != EMPTY {
                    self.offer((pool, to), worth - gain, Mover { row: row as u32, from, to: expert });
                }
            }
            let owed = self.owed(held.len() == 1);
            self.offer((pool, dropped), worth + owed, Mover { row: row as u32, from, to: EMPTY });
        }
        if self.wants(row) {
            let owed = self.owed(held.is_empty());
            for (to, &(gain, expert)) in best.iter().enumerate().filter(|(_, best)| best.1 != EMPTY) {
                self.offer((dropped, to), -gain - owed, Mover { row: row as u32, from: EMPTY, to: expert });
            }
        }
        self.best = best;
    }

    /// Takes a move for its arc where it is cheaper, or as cheap and of a row that loses first.
    #[inline]
    fn offer(&mut self, (from, to): (usize, usize), cost: i64, mover: Mover) {
        let arc = from * self.nodes + to;
        if cost > self.cost[arc] {
            return;
        }
        let rank = |mover: Mover| (self.order.get(mover.row as usize).copied(), mover.from, mover.to);
        if cost < self.cost[arc] || (!self.stale[arc] && rank(mover) < rank(self.movers[arc])) {
            (self.cost[arc], self.movers[arc], self.stale[arc]) = (cost, mover, false);
        }
    }

    /// Finds the cheapest move from a pool or *dropped* to another of them anew.
    fn look(&mut self, from: usize, to: usize) {
        let (dropped, top_k, arc) = (self.dropped(), self.problem.top_k, from * self.nodes + to);
        (self.cost[arc], self.movers[arc], self.stale[arc]) = (NEVER, NOBODY, false);
        // Nothing below looks at the list, so it is taken out to leave the rest free for changes.
        let members = std::mem::take(&mut self.members[from]);
        let experts = self.experts.get_mut(to).map(std::mem::take).unwrap_or_default();
        self.work = self.work.saturating_sub((members.len() * experts.len().max(1)) as u64);
        for &member in &members {
            let (row, left, worth) = if from == dropped {
                let row = member as usize - self.problem.rows() * top_k;
                (row, EMPTY, self.owed(self.holding.kept_of(row) == 0))
            } else {
                let (row, left) = (member as usize / top_k, self.holding.chosen[member as usize]);
                (row, left, self.worth(row, left).unwrap_or_default())
            };
            if to == dropped {
                let owed = self.owed(self.holding.kept_of(row) == 1);
                self.offer((from, to), worth + owed, Mover { row: row as u32, from: left, to: EMPTY });
                continue;
            }
            let worth = if from == dropped { -worth } else { worth };
            for &expert in &experts {
                if let Some(gain) = self.worth(row, expert)
                    && worth - gain <= self.cost[arc]
                    && !self.holding.holds(row, expert)
                {
                    self.offer((from, to), worth - gain, Mover { row: row as u32, from: left, to: expert });
                }
            }
        }
        if to != dropped {
            self.experts[to] = experts;
        }
        self.members[from] = members;
    }

    /// Room: a pool may take one more, or do with one less.
    fn open(&mut self, pool: usize) {
        let room = self.room();
        // Every row holds all of a pool that could never be fuller: its limit does not bind.
        let whole = self.members[pool].len() == self.problem.rows() * self.experts[pool].len();
        let cost = |open: bool| if open { 0 } else { NEVER };
        self.cost[pool * self.nodes + room] = cost(self.holding.left[pool] > 0 || whole);
        self.cost[room * self.nodes + pool] = cost(!self.members[pool].is_empty());
    }

    /// Cycles that gain, each a list of arcs, with no node in common; empty when there is none, none when work ran out.
    fn cycles(&mut self) -> Option<Vec<Vec<usize>>> {
        let nodes = self.nodes;
        let mut next = vec![usize::MAX; nodes];
        loop {
            self.work = self.work.checked_sub((nodes * nodes) as u64)?;
            let mut changed = false;
            for (node, next) in next.iter_mut().enumerate() {
                let Some((least, to)) = self.least(node) else { continue };
                (self.label[node], *next, changed) = (least, to, true);
            }
            if !changed {
                return Some(Vec::new());
            }
            let found = rings(&next);
            if !found.is_empty() {
                return Some(found.into_iter().map(|ring| self.arcs(&ring, &next)).collect());
            }
        }
    }

    /// The lowest label that the arcs of a node allow, where it is below the node's own, and the end of that arc.
    fn least(&mut self, node: usize) -> Option<(i64, usize)> {
        loop {
            let costs = &self.cost[node * self.nodes..(node + 1) * self.nodes];
            let (least, to) = least(costs, &self.label, self.label[node])?;
            if !self.stale[node * self.nodes + to] {
                return Some((least, to));
            }
            self.look(node, to);
        }
    }

    /// The arcs that leave the nodes of a ring.
    fn arcs(&self, ring: &[usize], next: &[usize]) -> Vec<usize> {
        let arcs: Vec<usize> = ring.iter().map(|&node| node * self.nodes + next[node]).collect();
        debug_assert!(arcs.iter().map(|&arc| self.cost[arc]).sum::<i64>() < 0, "a ring of parents gains");
        arcs
    }

    /// Moves along the cycles and finds anew what they changed.
    fn apply(&mut self, cycles: &[Vec<usize>]) {
        let movers: Vec<Mover> = cycles.iter().flatten().map(|&arc| self.movers[arc]).collect();
        let mut rows: Vec<usize> = movers.iter().filter(|mover| **mover != NOBODY).map(|m| m.row as usize).collect();
        rows.sort_unstable();
        rows.dedup();
        movers.iter().filter(|mover| **mover != NOBODY).for_each(|&mover| self.make(mover));
        for &row in &rows {
            self.rearrange(row);
            self.queue(row);
            self.moved[row] = true;
        }
        let (dropped, room) = (self.dropped(), self.room());
        for arc in cycles.iter().flatten() {
            let (from, to) = (arc / self.nodes, arc % self.nodes);
            if from == room && to < dropped {
                self.open(to);
            } else if to == room && from < dropped {
                self.open(from);
            }
        }
        let gone = |mover: &Mover| self.moved.get(mover.row as usize).is_some_and(|&moved| moved);
        self.stale.iter_mut().zip(&self.movers).for_each(|(stale, mover)| *stale |= gone(mover));
        let each = self.problem.pool_of.len() + self.problem.top_k.min(dropped) * dropped;
        self.work = self.work.saturating_sub((self.nodes * self.nodes + rows.len() * each) as u64);
        for &row in &rows {
            self.moved[row] = false;
            self.offer_all(row);
        }
        let level = self.label[room];
        self.label.iter_mut().for_each(|label| *label = (*label - level).clamp(-FAR, FAR));
    }

    /// Makes one move.
    fn make(&mut self, Mover { row, from, to }: Mover) {
        let row = row as usize;
        let holding = &mut self.holding;
        let dropped = |holding: &Holding<'_>, slot: usize| !holding.kept[slot] && holding.chosen[slot] != EMPTY;
        let slot = match from {
            EMPTY => {
                let claimed = |&slot: &usize| dropped(holding, slot) && holding.chosen[slot] == to;
                let value = |slot: usize| holding.value(row, holding.chosen[slot]);
                let least = |a: &usize, b: &usize| value(*a).total_cmp(&value(*b));
                let any = holding.slots(row).filter(|&slot| dropped(holding, slot)).min_by(least);
                holding.slots(row).find(claimed).or(any)
            }
            _ => holding.slots(row).find(|&slot| holding.kept[slot] && holding.chosen[slot] == from),
        };
        debug_assert!(slot.is_some(), "a mover has what it moves");
        let Some(slot) = slot else { return };
        if from != EMPTY {
            let pool = self.problem.pool(from);
            holding.left[pool] += 1;
            self.leave(pool, slot);
        }
        match to {
            EMPTY => self.holding.kept[slot] = false,
            _ => {
                let pool = self.problem.pool(to);
                self.holding.take(slot, to);
                self.holding.left[pool] -= 1;
                self.join(pool, slot);
            }
        }
    }
}
