//! Margins: the price at which one pool alone would be exactly full, all other prices as they are.
//!
//! `margin of a row and expert = score − best value the row would have instead`; a pool with room for C is full at the
//! (C + 1)-th largest margin. Exact, but it needs every margin of the batch, where a sweep needs a dozen per row: it serves
//! where the counts of the sweeps mislead (many equal rows, values in steps).
//!
//! Knows nothing of what other pools do meanwhile: going there with all prices at once overshoots.

use super::problem::Problem;
use crate::routing::select::{Hint, Selector};

/// The price at which each pool alone would fill its `room`, `[pools]`; 0 where it does not fill.
pub(super) fn margins(problem: &Problem<'_>, rows: &[u32], prices: &[f32], room: &[f64], drops: bool) -> Vec<f32> {
    let price: Vec<f32> = problem.pool_of.iter().map(|&pool| prices[usize::from(pool)]).collect();
    let top_k = problem.top_k;
    let mut margins: Vec<Vec<f32>> = vec![Vec::new(); prices.len()];
    let mut selector = Selector::new(price.len(), (top_k + 1).min(price.len()));
    let mut hint = Hint::NONE;
    let floor = if drops { 0.0 } else { f32::NEG_INFINITY };
    for &row in rows {
        let selection = problem.selection(row as usize);
        selector.select(selection, Some(&price), hint);
        hint = selector.hint();
        let values = selector.values();
        let held = values.get(top_k - 1).copied().unwrap_or(floor).max(floor);
        let refused = values.get(top_k).copied().unwrap_or(floor).max(floor);
        for ((&score, &price), &pool) in selection.iter().zip(&price).zip(&problem.pool_of) {
            if score > f32::NEG_INFINITY {
                let instead = if score - price >= held { refused } else { held };
                margins[usize::from(pool)].push((score - instead).min(problem.ceiling));
            }
        }
    }
    let parts = margins.iter_mut().zip(room);
    parts
        .map(|(margins, &room)| {
            let room = room as usize;
            if room >= margins.len() {
                return 0.0;
            }
            let (_, first, _) = margins.select_nth_unstable_by(room, |a, b| b.total_cmp(a));
            first.max(0.0)
        })
        .collect()
}
