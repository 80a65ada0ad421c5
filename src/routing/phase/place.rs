//! Placement of what is left: augmenting paths, until as many slots are kept as the maximum flow.
//!
//! A dropped slot enters a pool, one of whose rows moves on to the next pool, and so on to a pool with room: Dinic's
//! algorithm with pools as nodes. Rows that end up with nothing take, along the same kind of path, from one that has two:
//! no row ever loses its last slot, so the number of slots stays the maximum and the number of served rows becomes it.
//!
//! Knows nothing of prices beyond preferring the better of two experts.

use super::claim::Holding;
use super::problem::Problem;
use crate::routing::router::RouteRequest;
use crate::routing::slots::EMPTY;
use crate::simd::Isa;

/// Where a path may end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// In a pool with room.
    Room,
    /// At a row with two slots or more, which gives one up.
    Spare,
}

/// Not reached.
const NEVER: u32 = u32::MAX;

/// Places dropped slots wherever any chain of moves makes room, then serves rows that have nothing.
pub(super) fn place(holding: &mut Holding<'_>) {
    let problem = holding.problem;
    if holding.left.iter().any(|&left| left > 0) {
        augment(holding, End::Room, |holding, row| {
            holding.slots(row).any(|slot| !holding.kept[slot] && holding.chosen[slot] != EMPTY)
        });
    }
    if problem.top_k > 1 {
        augment(holding, End::Spare, |holding, row| {
            holding.kept_of(row) == 0 && holding.slots(row).any(|slot| holding.chosen[slot] != EMPTY)
        });
    }
}

/// Finds paths for the rows that `wants`, best row first, until there are no more.
fn augment(holding: &mut Holding<'_>, end: End, wants: impl Fn(&Holding<'_>, usize) -> bool) {
    let problem = holding.problem;
    let mut waiting: Vec<usize> = (0..problem.rows()).filter(|&row| wants(holding, row)).collect();
    if waiting.is_empty() {
        return;
    }
    let order = problem.order();
    waiting.sort_unstable_by_key(|&row| std::cmp::Reverse(order[row]));
    let mut experts = vec![Vec::new(); problem.room.len()];
    for (expert, &pool) in problem.pool_of.iter().enumerate() {
        experts[usize::from(pool)].push(expert as u16);
    }
    while !waiting.is_empty() {
        let mut phase = Phase::new(holding, &experts, end);
        let before = waiting.len();
        let mut found = 0;
        let mut still = Vec::with_capacity(waiting.len());
        for row in waiting {
            // A row may want several slots: serve it until it has enough or there is no way.
            let mut wanting = true;
            while wanting && phase.serve(holding, row) {
                found += 1;
                wanting = wants(holding, row);
            }
            if wanting {
                still.push(row);
            }
        }
        waiting = still;
        if found == 0 {
            debug_assert_eq!(before, waiting.len());
            break;
        }
    }
}

/// One round: pools layered by their distance from an end, and how far each has been searched.
struct Phase<'e> {
    experts: &'e [Vec<u16>],
    end: End,
    level: Vec<u32>,
    /// Slots of each pool at the start of the round.
    members: Vec<Vec<usize>>,
    next: Vec<usize>,
}

impl<'e> Phase<'e> {
    fn new(holding: &Holding<'_>, experts: &'e [Vec<u16>], end: End) -> Self {
        let problem = holding.problem;
        let pools = problem.room.len();
        let mut members = vec![Vec::new(); pools];
        for slot in (0..holding.chosen.len()).filter(|&slot| holding.kept[slot]) {
            members[problem.pool(holding.chosen[slot])].push(slot);
        }
        let order = problem.order();
        for members in &mut members {
            // The row worth least there goes first.
            members.sort_by(|&a, &b| {
                let value = |slot: usize| holding.value(slot / problem.top_k, holding.chosen[slot]);
                let rank = |slot: usize| (order[slot / problem.top_k], holding.chosen[slot]);
                value(a).total_cmp(&value(b)).then_with(|| rank(a).cmp(&rank(b)))
            });
        }
        let mut phase = Self { experts, end, level: vec![NEVER; pools], members, next: vec![0; pools] };
        phase.layer(holding);
        phase
    }

    /// Breadth first from the ends backwards.
    fn layer(&mut self, holding: &Holding<'_>) {
        let top_k = holding.problem.top_k;
        let mut frontier: Vec<usize> = (0..self.level.len())
            .filter(|&pool| match self.end {
                End::Room => holding.left[pool] > 0,
                End::Spare => self.members[pool].iter().any(|&slot| holding.kept_of(slot / top_k) > 1),
            })
            .collect();
        let mut depth = 0;
        let mut reach: Vec<u16> = Vec::new();
        while !frontier.is_empty() {
            reach.clear();
            for &pool in &frontier {
                self.level[pool] = depth;
                reach.extend(&self.experts[pool]);
            }
            depth += 1;
            frontier = (0..self.level.len())
                .filter(|&pool| self.level[pool] == NEVER)
                .filter(|&pool| self.members[pool].iter().any(|&slot| can_take(holding, slot / top_k, &reach)))
                .collect();
        }
    }

    /// Gives `row` one more slot if some path allows it.
    fn serve(&mut self, holding: &mut Holding<'_>, row: usize) -> bool {
        loop {
            let way = (0..self.level.len())
                .filter(|&pool| self.level[pool] != NEVER)
                .filter_map(|pool| Some((pool, holding.best_free(row, &self.experts[pool])?)))
                .min_by(|a, b| self.level[a.0].cmp(&self.level[b.0]).then(b.1.1.total_cmp(&a.1.1)).then(a.0.cmp(&b.0)));
            let Some((pool, _)) = way else { return false };
            if !self.enter(holding, pool) {
                continue;
            }
            // The path may have moved the row's other slots, but never into this pool.
            let Some((expert, _)) = holding.best_free(row, &self.experts[pool]) else { return false };
            let dropped = |slot: &usize| !holding.kept[*slot] && holding.chosen[*slot] != EMPTY;
            let claimed = holding.slots(row).filter(dropped).find(|&slot| holding.chosen[slot] == expert);
            let slot = claimed.or_else(|| {
                let value = |slot: &usize| holding.value(row, holding.chosen[*slot]);
                holding.slots(row).filter(dropped).min_by(|a, b| value(a).total_cmp(&value(b)))
            });
            if let Some(slot) = slot {
                holding.take(slot, expert);
            }
            return true;
        }
    }

    /// Makes room for one slot in `start`; a pool from which no end is reached leaves the round.
    fn enter(&mut self, holding: &mut Holding<'_>, start: usize) -> bool {
        let problem = holding.problem;
        let mut path: Vec<(usize, usize)> = Vec::new();
        let mut pool = start;
        loop {
            if self.level[pool] == 0 && self.finish(holding, pool) {
                break;
            }
            match self.step(holding, pool) {
                Some((slot, next)) => {
                    path.push((pool, slot));
                    pool = next;
                }
                None => {
                    self.level[pool] = NEVER;
                    match path.pop() {
                        Some((before, _)) => pool = before,
                        None => return false,
                    }
                }
            }
        }
        for &(_, slot) in path.iter().rev() {
            if let Some((expert, _)) = holding.best_free(slot / problem.top_k, &self.experts[pool]) {
                let from = problem.pool(holding.chosen[slot]);
                holding.take(slot, expert);
                pool = from;
            }
        }
        true
    }

    /// Ends a path in a pool of level 0.
    fn finish(&mut self, holding: &mut Holding<'_>, pool: usize) -> bool {
        match self.end {
            End::Room if holding.left[pool] > 0 => {
                holding.left[pool] -= 1;
                true
            }
            End::Room => false,
            End::Spare => {
                while let Some(&slot) = self.members[pool].get(self.next[pool]) {
                    self.next[pool] += 1;
                    let here = holding.kept[slot] && holding.problem.pool(holding.chosen[slot]) == pool;
                    if here && holding.kept_of(slot / holding.problem.top_k) > 1 {
                        holding.kept[slot] = false;
                        return true;
                    }
                }
                false
            }
        }
    }

    /// The next slot of `pool` that could move one level nearer, and where to.
    fn step(&mut self, holding: &Holding<'_>, pool: usize) -> Option<(usize, usize)> {
        let level = self.level[pool].checked_sub(1)?;
        while let Some(&slot) = self.members[pool].get(self.next[pool]) {
            if holding.kept[slot] && holding.problem.pool(holding.chosen[slot]) == pool {
                let row = slot / holding.problem.top_k;
                let way = (0..self.level.len())
                    .filter(|&next| self.level[next] == level)
                    .find(|&next| can_take(holding, row, &self.experts[next]));
                if let Some(next) = way {
                    return Some((slot, next));
                }
            }
            self.next[pool] += 1;
        }
        None
    }
}

/// True when the row could hold one more of `among`.
fn can_take(holding: &Holding<'_>, row: usize, among: &[u16]) -> bool {
    let selection = holding.problem.selection(row);
    among.iter().any(|&expert| selection[usize::from(expert)] > f32::NEG_INFINITY && !holding.holds(row, expert))
}

/// Step 3 alone, for a router of another kind: places the slots in `claims` (rising positions in `chosen`, `[tokens, top_k]`), each
/// of which holds some expert that its token may have, beside the others, which have room already. Where none can be had: [`EMPTY`].
pub(in crate::routing) fn place_claims(
    request: &RouteRequest<'_>,
    limits: &[u32],
    isa: Isa,
    chosen: &mut [u16],
    claims: Vec<usize>,
) {
    let top_k = request.top_k();
    let problem = Problem::new(request, limits, isa);
    let slots = || problem.tokens.iter().flat_map(|&token| (0..top_k).map(move |slot| token as usize * top_k + slot));
    let mut holding =
        Holding::new(&problem, slots().map(|slot| chosen[slot]).collect(), &vec![0.0; problem.room.len()]);
    let mut claims = claims.into_iter().peekable();
    for (at, slot) in slots().enumerate() {
        if claims.next_if_eq(&slot).is_some() {
            holding.kept[at] = false;
            holding.left[problem.pool(chosen[slot])] += 1;
        }
    }
    place(&mut holding);
    for (at, slot) in slots().enumerate() {
        chosen[slot] = if holding.kept[at] { holding.chosen[at] } else { EMPTY };
    }
}
