//! What the steps of the phase router share: the batch without padding, pools and their room.
//!
//! A **row** is the position of a token among those that are not padding; everything inside the router counts in rows.
//! Order never matters: rows are compared by source mass, then content, and by position only when they are identical.
//!
//! Knows nothing of prices.

use std::sync::OnceLock;

use crate::routing::admission::row_mass;
use crate::routing::router::RouteRequest;
use crate::routing::scores::Scores;
use crate::simd::Isa;

/// Sums that decide something are kept in integers of this fraction, so that their order does not matter.
pub(super) const UNIT: f64 = (1u64 << 40) as f64;

/// Rows · experts below which all is done on the calling thread. Run by `benches/phase`.
const PARALLEL_VALUES: usize = 1 << 15;

/// A request under limits.
pub(super) struct Problem<'a> {
    pub(super) scores: &'a Scores,
    pub(super) top_k: usize,
    /// Token of each row.
    pub(super) tokens: Vec<u32>,
    /// Pool of each expert.
    pub(super) pool_of: Vec<u16>,
    /// Room of each pool, never more than all rows could use.
    pub(super) room: Vec<u32>,
    /// Whether selection scores are the gate scores wherever nothing is masked.
    pub(super) by_gate: bool,
    /// A price that none needs to exceed: the spread of selection scores, or twice it.
    pub(super) ceiling: f32,
    pub(super) isa: Isa,
    order: OnceLock<Vec<u32>>,
}

impl<'a> Problem<'a> {
    pub(super) fn new(request: &RouteRequest<'a>, limits: &[u32], isa: Isa) -> Self {
        let (scores, capacity) = (request.scores(), request.capacity());
        let tokens: Vec<u32> =
            (0..scores.tokens()).filter(|&token| !request.is_padding(token)).map(|token| token as u32).collect();
        let most = |size: usize| tokens.len() as u64 * size as u64;
        let by_gate = selects_by_gate(scores, &tokens);
        let room = limits.iter().zip(capacity.pool_sizes());
        Self {
            scores,
            top_k: request.top_k(),
            pool_of: (0..scores.experts()).map(|expert| capacity.pool_of(expert as u16) as u16).collect(),
            room: room.map(|(&limit, size)| u64::from(limit).min(most(size)) as u32).collect(),
            by_gate,
            ceiling: if by_gate { 1.0 } else { spread(scores, &tokens) },
            tokens,
            isa,
            order: OnceLock::new(),
        }
    }

    /// Whether the batch stays on the calling thread: waking another costs more.
    pub(super) fn is_small(&self) -> bool {
        self.rows() * self.pool_of.len() < PARALLEL_VALUES || rayon::current_num_threads() == 1
    }

    pub(super) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Selection scores of a row, `[experts]`.
    pub(super) fn selection(&self, row: usize) -> &'a [f32] {
        self.scores.selection(self.tokens[row] as usize)
    }

    /// Gate scores of a row, `[experts]`.
    pub(super) fn gate(&self, row: usize) -> &'a [f32] {
        self.scores.gate(self.tokens[row] as usize)
    }

    pub(super) fn pool(&self, expert: u16) -> usize {
        usize::from(self.pool_of[usize::from(expert)])
    }

    /// Room in all pools.
    pub(super) fn total_room(&self) -> u64 {
        self.room.iter().map(|&room| u64::from(room)).sum()
    }

    /// About one row in `part`, chosen by content so that the place in the batch does not matter.
    pub(super) fn sample(&self, part: usize) -> Vec<u32> {
        let stride = (self.scores.experts() / 16).max(1);
        let hash = |row: usize| {
            let values = self.selection(row).iter().step_by(stride).take(16);
            let mix = values.fold(0u64, |hash, value| {
                (hash ^ u64::from(value.to_bits())).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
            });
            (mix >> 32) as usize
        };
        (0..self.rows() as u32).filter(|&row| hash(row as usize) % part == 0).collect()
    }

    /// Position of each row in the order in which rows lose: least source mass first, then by content, index last.
    pub(super) fn order(&self) -> &[u32] {
        self.order.get_or_init(|| {
            let mut rows: Vec<u32> = (0..self.rows() as u32).collect();
            self.sort(&mut rows, |row| row as usize);
            let mut order = vec![0; rows.len()];
            rows.iter().zip(0..).for_each(|(&row, rank)| order[row as usize] = rank);
            order
        })
    }

    /// Sorts what belongs to rows in the order in which rows lose; a few are compared without ranking the whole batch.
    pub(super) fn sort<T: Copy + Ord>(&self, items: &mut [T], row_of: impl Fn(T) -> usize) {
        let mass: Vec<f32> = items.iter().map(|&item| self.mass(row_of(item))).collect();
        let mut ranked: Vec<(f32, T)> = mass.into_iter().zip(items.iter().copied()).collect();
        ranked.sort_unstable_by(|(mass, item), (other_mass, other)| {
            let (row, other_row) = (row_of(*item), row_of(*other));
            mass.total_cmp(other_mass)
                .then_with(|| self.scores.compare_rows(self.tokens[row] as usize, self.tokens[other_row] as usize))
                .then_with(|| item.cmp(other))
        });
        items.iter_mut().zip(ranked).for_each(|(item, (_, ranked))| *item = ranked);
    }

    /// Whether the whole batch is ranked already.
    pub(super) fn is_ordered(&self) -> bool {
        self.order.get().is_some()
    }

    fn mass(&self, row: usize) -> f32 {
        row_mass(self.gate(row), self.selection(row), self.top_k)
    }
}

fn selects_by_gate(scores: &Scores, tokens: &[u32]) -> bool {
    tokens.iter().map(|&token| token as usize).all(|token| {
        let (selection, gate) = (scores.selection(token), scores.gate(token));
        std::ptr::eq(selection, gate)
            || selection.iter().zip(gate).all(|(&selection, &gate)| selection == gate || selection == f32::NEG_INFINITY)
    })
}

/// Twice the largest finite selection score, by size.
fn spread(scores: &Scores, tokens: &[u32]) -> f32 {
    let rows = tokens.iter().map(|&token| scores.selection(token as usize));
    let largest = |most: f32, &score: &f32| if score > f32::NEG_INFINITY { most.max(score.abs()) } else { most };
    2.0 * rows.fold(0.0, |most, row| row.iter().fold(most, largest)).min(f32::MAX / 4.0)
}
