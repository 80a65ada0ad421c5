//! Sinkhorn routing: scores balanced by entropy-regularised transport, then top-k (S-BASE, Clark et al. 2022, arXiv
//! 2202.01169).
//!
//! `plan(i, e) = u_i · gate(i, e) · v_pool(e)`, with `Σ_e plan(i, e) = 1` for every token and
//! `Σ_i Σ_{e in p} plan(i, e) ∝ limit_p` for every pool p. Rows and columns are scaled in turn until the columns are
//! within a tolerance; each token takes the top-k of its row of the plan; what still exceeds a limit is dropped, the
//! lowest gate scores first. Combine weights are the unadjusted gate scores.
//!
//! - The paper scales `exp(logit)`. For softmax that is the gate score up to a factor per row, which the row's own
//!   scale swallows: the plan is the paper's. For sigmoid there is no such identity, and the gate score itself is
//!   scaled.
//! - Column marginals are the limits, so experts may be unequal, and devices: all experts of a device share one
//!   scale. A limit above what the batch could use counts as what it could use.
//! - The plan is balanced, the top-k of its rows is only nearly so: that is why slots are dropped even where all
//!   have room.
//! - Without limits there is nothing to balance: the gate's own choice.
//! - A model's selection bias is left out (it is another balancing of the same scores); its groups are masks as ever.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, top_k]`. A sweep is O(tokens · experts). Columns are
//! summed in integers, so neither threads nor the order of the batch change anything.
//!
//! Knows nothing of prices of other batches: every batch is balanced from the start.

use rayon::prelude::*;

use crate::error::Result;
use crate::routing::admission::{Precedence, keep_best};
use crate::routing::assignment::Assignment;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::EMPTY;
use crate::routing::topk::gate_choice;

/// Shares of rows are summed in this fraction of 1: 2^32 rows fit in 64 bits.
const UNIT: f64 = (1u64 << 30) as f64;

/// The least scale of a column relative to the largest: no product with a score underflows.
const LEAST_SCALE: f64 = 1e-200;

/// Rows that one thread sums at a time.
const CHUNK: usize = 128;

/// Top-k of the balanced scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sinkhorn {
    /// It sweeps until every column is within this share of its marginal,
    tolerance: f64,
    /// or so often.
    max_sweeps: usize,
}

impl Default for Sinkhorn {
    /// A tolerance of 1e-3, at most 200 sweeps.
    fn default() -> Self {
        Self { tolerance: 1e-3, max_sweeps: 200 }
    }
}

impl Router for Sinkhorn {
    fn name(&self) -> &'static str {
        "sinkhorn"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let Some(limits) = request.capacity().limits() else {
            *assignment = Assignment::from_chosen(scores, top_k, gate_choice(request), None);
            return Ok(());
        };
        let matrix = Matrix::new(request, limits);
        let scale = self.balance(&matrix);
        let mut chosen = vec![EMPTY; scores.tokens() * top_k];
        let mut row: Vec<(f64, u16)> = Vec::new();
        for &token in &matrix.rows {
            row.clear();
            row.extend(matrix.entries(token, &scale).map(|(expert, value)| (value, expert as u16)));
            let falling = |a: &(f64, u16), b: &(f64, u16)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if top_k < row.len() {
                row.select_nth_unstable_by(top_k, falling);
            }
            let slots = chosen[token * top_k..].iter_mut().take(top_k);
            slots.zip(&row).for_each(|(slot, &(_, expert))| *slot = expert);
        }
        let kept = keep_best(&Precedence::new(request), &chosen, &mut limits.to_vec());
        *assignment = super::assignment(request, chosen, kept);
        Ok(())
    }
}

/// What is balanced: rows that have something to choose, columns with room.
struct Matrix<'a> {
    request: &'a RouteRequest<'a>,
    rows: Vec<usize>,
    pool_of: Vec<usize>,
    /// What each pool's column should sum to when every row sums to 1.
    marginals: Vec<f64>,
}

impl<'a> Matrix<'a> {
    fn new(request: &'a RouteRequest<'a>, limits: &[u32]) -> Self {
        let (scores, capacity) = (request.scores(), request.capacity());
        let pool_of: Vec<usize> = (0..scores.experts()).map(|expert| capacity.pool_of(expert as u16)).collect();
        let may_choose = |token: usize| {
            let selection = scores.selection(token).iter().zip(&pool_of);
            selection.into_iter().any(|(&score, &pool)| score > f32::NEG_INFINITY && limits[pool] > 0)
        };
        let rows: Vec<usize> =
            (0..scores.tokens()).filter(|&token| !request.is_padding(token) && may_choose(token)).collect();
        let most = |size: usize| rows.len() as u64 * size as u64;
        let room = limits.iter().zip(capacity.pool_sizes());
        let room: Vec<u64> = room.map(|(&limit, size)| u64::from(limit).min(most(size))).collect();
        let total = room.iter().sum::<u64>().max(1) as f64;
        let marginals = room.iter().map(|&room| room as f64 / total * rows.len() as f64).collect();
        Self { request, rows, pool_of, marginals }
    }

    /// The entries of a row that are not 0, each times its column's scale. A score that underflowed counts as the
    /// least there is: allowed is allowed.
    fn entries(&self, token: usize, scale: &'a [f64]) -> impl Iterator<Item = (usize, f64)> {
        let (gate, selection) = (self.request.scores().gate(token), self.request.scores().selection(token));
        let columns = gate.iter().zip(selection).zip(scale).enumerate();
        columns
            .filter(|(_, ((_, selection), scale))| **selection > f32::NEG_INFINITY && **scale > 0.0)
            .map(|(expert, ((&gate, _), scale))| (expert, f64::from(gate.max(f32::MIN_POSITIVE)) * scale))
    }

    /// Sums of the columns, in [`UNIT`]s, when every row sums to 1.
    fn columns(&self, scale: &[f64]) -> Vec<u64> {
        let pools = self.marginals.len();
        let part = |rows: &[usize]| {
            let mut sums = vec![0u64; pools];
            for &token in rows {
                let total: f64 = self.entries(token, scale).map(|(_, value)| value).sum();
                for (expert, value) in self.entries(token, scale) {
                    sums[self.pool_of[expert]] += (value / total * UNIT) as u64;
                }
            }
            sums
        };
        let add = |mut sums: Vec<u64>, other: Vec<u64>| {
            sums.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
            sums
        };
        self.rows.par_chunks(CHUNK).map(part).reduce(|| vec![0; pools], add)
    }
}

impl Sinkhorn {
    /// The scale of every expert's column at which the plan is balanced, as far as it can be.
    fn balance(&self, matrix: &Matrix<'_>) -> Vec<f64> {
        let start = |&marginal: &f64| if marginal > 0.0 { 1.0 } else { 0.0 };
        let mut of_pool: Vec<f64> = matrix.marginals.iter().map(start).collect();
        let spread = |of_pool: &[f64]| matrix.pool_of.iter().map(|&pool| of_pool[pool]).collect::<Vec<f64>>();
        for _ in 0..self.max_sweeps {
            let columns = matrix.columns(&spread(&of_pool));
            let filled = |column: u64| column.max(1) as f64 / UNIT;
            let off = |(&column, &marginal): (&u64, &f64)| (filled(column) / marginal - 1.0).abs();
            let pools = columns.iter().zip(&matrix.marginals).filter(|(_, marginal)| **marginal > 0.0);
            if pools.map(off).fold(0.0, f64::max) <= self.tolerance {
                break;
            }
            for ((scale, &column), &marginal) in of_pool.iter_mut().zip(&columns).zip(&matrix.marginals) {
                *scale *= marginal / filled(column);
            }
            // Only ratios matter. Masks can make the marginals impossible; then some scales would fall for ever.
            let largest = of_pool.iter().copied().fold(0.0, f64::max);
            for scale in of_pool.iter_mut().filter(|scale| **scale > 0.0) {
                *scale = (*scale / largest).max(LEAST_SCALE);
            }
        }
        spread(&of_pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::{Capacity, Placement};
    use crate::routing::logits::Logits;
    use crate::routing::router::RouteContext;
    use crate::routing::scores::Scoring;
    use crate::routing::topk::TopK;
    use proptest::prelude::*;

    /// The oracle: `exp(logit)` scaled by rows and columns in turn, in plain floats, until nothing moves.
    fn naive(logits: &[f32], marginals: &[f64], pool_of: &[usize]) -> Vec<f64> {
        let experts = pool_of.len();
        let mut plan: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
        for _ in 0..5000 {
            for row in plan.chunks_exact_mut(experts) {
                let sum: f64 = row.iter().sum();
                row.iter_mut().for_each(|value| *value /= sum);
            }
            for (pool, marginal) in marginals.iter().enumerate() {
                let in_pool = |at: usize| pool_of[at % experts] == pool;
                let sum: f64 = (0..plan.len()).filter(|&at| in_pool(at)).map(|at| plan[at]).sum();
                (0..plan.len()).filter(|&at| in_pool(at)).for_each(|at| plan[at] *= marginal / sum);
            }
        }
        plan
    }

    proptest! {
        #[test]
        fn the_plan_has_the_marginals_and_is_that_of_plain_scaling(
            values in prop::collection::vec(-3.0f32..3.0, 5 * 16),
            limits in prop::collection::vec(1u32..16, 5), devices: bool,
        ) {
            let scores = Scoring::softmax().scores(&Logits::new(&values, 16, 5).unwrap(), None).unwrap();
            let capacity = match devices {
                true => Capacity::per_device(Placement::contiguous(5, 2).unwrap(), limits[..2].to_vec()).unwrap(),
                false => Capacity::per_expert(limits.clone()).unwrap(),
            };
            let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
            let limits = capacity.limits().unwrap();
            let matrix = Matrix::new(&request, limits);
            let router = Sinkhorn { tolerance: 1e-6, max_sweeps: 5000 };
            let scale = router.balance(&matrix);
            let total: u32 = limits.iter().sum();
            for ((&column, &marginal), &limit) in matrix.columns(&scale).iter().zip(&matrix.marginals).zip(limits) {
                prop_assert!((marginal - f64::from(limit) / f64::from(total) * 16.0).abs() < 1e-9);
                prop_assert!((column as f64 / UNIT / marginal - 1.0).abs() < 1e-5);
            }
            let plan = naive(&values, &matrix.marginals, &matrix.pool_of);
            for token in 0..16 {
                let row: Vec<f64> = matrix.entries(token, &scale).map(|(_, value)| value).collect();
                let sum: f64 = row.iter().sum();
                for (ours, theirs) in row.iter().zip(&plan[token * 5..]) {
                    prop_assert!((ours / sum - theirs).abs() < 1e-4, "{ours} / {sum}, {theirs}");
                }
            }
        }
    }

    #[test]
    fn no_limit_leaves_the_gate_its_choice() {
        let logits: Vec<f32> = (0..40).map(|at| (at * 7 % 11) as f32).collect();
        let scores = Scoring::softmax().scores(&Logits::new(&logits, 8, 5).unwrap(), None).unwrap();
        let capacity = Capacity::unlimited(5).unwrap();
        let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
        let ours = Sinkhorn::default().route(&request, &mut RouteState::default()).unwrap();
        assert_eq!(ours, TopK::default().route(&request, &mut RouteState::default()).unwrap());
    }
}
