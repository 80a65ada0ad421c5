//! Exact answers, written plainly: the maximum flow, and the best that any router could do on a small batch.

use std::collections::VecDeque;

use crate::RouteRequest;

/// A network; arc `a` and its reverse `a ^ 1` stand side by side.
#[derive(Default)]
struct Network {
    ends: Vec<usize>,
    room: Vec<i64>,
    cost: Vec<f64>,
    leaving: Vec<Vec<usize>>,
}

const SOURCE: usize = 0;
const SINK: usize = 1;

impl Network {
    fn arc(&mut self, from: usize, to: usize, room: i64, cost: f64) {
        let nodes = self.leaving.len().max(from.max(to) + 1);
        self.leaving.resize(nodes, Vec::new());
        self.leaving[from].push(self.ends.len());
        self.leaving[to].push(self.ends.len() + 1);
        self.ends.extend([to, from]);
        self.room.extend([room, 0]);
        self.cost.extend([cost, -cost]);
    }

    /// Tokens, their allowed experts, and the pools of those. A slot costs what `cost` says, the first of a token `first`.
    fn of(request: &RouteRequest<'_>, first: f64, cost: impl Fn(usize, usize) -> f64) -> Self {
        let (scores, capacity) = (request.scores(), request.capacity());
        let (tokens, experts) = (scores.tokens(), scores.experts());
        let mut network = Self { leaving: vec![Vec::new(); 2], ..Self::default() };
        for token in (0..tokens).filter(|&token| !request.is_padding(token)) {
            network.arc(SOURCE, 2 + token, 1, first);
            network.arc(SOURCE, 2 + token, request.top_k() as i64 - 1, 0.0);
            for expert in (0..experts).filter(|&expert| scores.is_allowed(token, expert)) {
                network.arc(2 + token, 2 + tokens + expert, 1, cost(token, expert));
            }
        }
        for expert in 0..experts {
            let pool = capacity.pool_of(expert as u16);
            network.arc(2 + tokens + expert, 2 + tokens + experts + pool, i64::from(u32::MAX), 0.0);
        }
        let pools = capacity.pool_sizes().len();
        for pool in 0..pools {
            let limit = capacity.limits().map_or(u32::MAX, |limits| limits[pool]);
            network.arc(2 + tokens + experts + pool, SINK, i64::from(limit), 0.0);
        }
        network
    }

    /// Dinic: shortest augmenting paths, layer by layer. Returns the flow.
    fn saturate(&mut self) -> u64 {
        let mut flow = 0;
        loop {
            let mut level = vec![usize::MAX; self.leaving.len()];
            level[SOURCE] = 0;
            let mut queue = VecDeque::from([SOURCE]);
            while let Some(node) = queue.pop_front() {
                for &arc in self.leaving[node].iter().filter(|&&arc| self.room[arc] > 0) {
                    if level[self.ends[arc]] == usize::MAX {
                        level[self.ends[arc]] = level[node] + 1;
                        queue.push_back(self.ends[arc]);
                    }
                }
            }
            if level[SINK] == usize::MAX {
                return flow;
            }
            let mut next = vec![0; self.leaving.len()];
            loop {
                let pushed = self.push(SOURCE, i64::MAX, &level, &mut next);
                if pushed == 0 {
                    break;
                }
                flow += pushed as u64;
            }
        }
    }

    fn push(&mut self, node: usize, most: i64, level: &[usize], next: &mut [usize]) -> i64 {
        if node == SINK {
            return most;
        }
        while let Some(&arc) = self.leaving[node].get(next[node]) {
            let end = self.ends[arc];
            if self.room[arc] > 0 && level[end] == level[node] + 1 {
                let pushed = self.push(end, most.min(self.room[arc]), level, next);
                if pushed > 0 {
                    self.room[arc] -= pushed;
                    self.room[arc ^ 1] += pushed;
                    return pushed;
                }
            }
            next[node] += 1;
        }
        0
    }

    /// Cheapest augmenting paths, one unit at a time, while `go_on(cost of the next)`. Returns units and cost.
    fn send(&mut self, go_on: impl Fn(f64) -> bool) -> (u64, f64) {
        let (mut units, mut total) = (0, 0.0);
        loop {
            let mut cost = vec![f64::INFINITY; self.leaving.len()];
            let mut by = vec![usize::MAX; self.leaving.len()];
            cost[SOURCE] = 0.0;
            let mut changed = true;
            while changed {
                changed = false;
                for arc in (0..self.ends.len()).filter(|&arc| self.room[arc] > 0) {
                    let (from, to) = (self.ends[arc ^ 1], self.ends[arc]);
                    if cost[from] + self.cost[arc] < cost[to] - 1e-9 {
                        (cost[to], by[to], changed) = (cost[from] + self.cost[arc], arc, true);
                    }
                }
            }
            if cost[SINK] == f64::INFINITY || !go_on(cost[SINK]) {
                return (units, total);
            }
            (units, total) = (units + 1, total + cost[SINK]);
            let mut node = SINK;
            while node != SOURCE {
                self.room[by[node]] -= 1;
                self.room[by[node] ^ 1] += 1;
                node = self.ends[by[node] ^ 1];
            }
        }
    }
}

/// The most slots that can be kept.
pub fn maximum_flow(request: &RouteRequest<'_>) -> u64 {
    Network::of(request, 0.0, |_, _| 0.0).saturate()
}

/// The best that any router could do.
#[derive(Clone, Copy, Debug)]
pub struct Best {
    /// The most slots.
    pub slots: u64,
    /// The most tokens with an expert, among assignments with that many slots.
    pub served: u64,
    /// The most gate mass, among assignments with that many slots and served tokens.
    pub mass: f64,
    /// The most gate mass of any assignment at all.
    pub any_mass: f64,
}

/// More than the gate mass of any small batch.
const SERVED: f64 = 1000.0;

/// Solves a small batch exactly.
pub fn best(request: &RouteRequest<'_>) -> Best {
    let gate = |token: usize, expert: usize| -f64::from(request.scores().gate(token)[expert]);
    let (slots, cost) = Network::of(request, -SERVED, gate).send(|_| true);
    let served = (-cost / SERVED + 1e-9).floor();
    let (_, most) = Network::of(request, 0.0, gate).send(|cost| cost < 0.0);
    Best { slots, served: served as u64, mass: -cost - served * SERVED, any_mass: -most }
}

/// The same by trying every assignment: for batches of a few slots.
pub fn best_by_trying(request: &RouteRequest<'_>) -> Best {
    let (scores, capacity) = (request.scores(), request.capacity());
    let mut room = capacity.limits().map_or_else(|| vec![u32::MAX; scores.experts()], <[u32]>::to_vec);
    let mut found = Best { slots: 0, served: 0, mass: 0.0, any_mass: 0.0 };
    try_from(request, 0, &mut room, Best { ..found }, &mut found);
    found
}

fn try_from(request: &RouteRequest<'_>, token: usize, room: &mut [u32], so_far: Best, found: &mut Best) {
    let scores = request.scores();
    if token == scores.tokens() {
        found.any_mass = found.any_mass.max(so_far.mass);
        let better = (so_far.slots, so_far.served).cmp(&(found.slots, found.served));
        if better.then(so_far.mass.total_cmp(&found.mass)).is_gt() {
            *found = Best { any_mass: found.any_mass, ..so_far };
        }
        return;
    }
    for set in 0u32..1 << scores.experts() {
        let held: Vec<usize> = (0..scores.experts()).filter(|expert| set >> expert & 1 == 1).collect();
        let padding = request.is_padding(token) && !held.is_empty();
        if padding || held.len() > request.top_k() || held.iter().any(|&expert| !scores.is_allowed(token, expert)) {
            continue;
        }
        let pool = |expert: usize| request.capacity().pool_of(expert as u16);
        let before = room.to_vec();
        let fits = held.iter().all(|&expert| match &mut room[pool(expert)] {
            0 => false,
            room => {
                *room -= 1;
                true
            }
        });
        if fits {
            let mass: f64 = held.iter().map(|&expert| f64::from(scores.gate(token)[expert])).sum();
            let next = Best {
                slots: so_far.slots + held.len() as u64,
                served: so_far.served + u64::from(!held.is_empty()),
                mass: so_far.mass + mass,
                any_mass: 0.0,
            };
            try_from(request, token + 1, room, next, found);
        }
        room.copy_from_slice(&before);
    }
}
