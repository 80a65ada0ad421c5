//! Selection of the k best of a row, and the router that does just that: [`TopK`].
//!
//! Knows nothing of prices or devices; ties go to the lowest expert id.

use crate::error::Result;
use crate::routing::assignment::{Assignment, EMPTY};
use crate::routing::drop::{DropRule, keep_within};
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};

/// Writes the ids of the `chosen.len()` largest values of `row` into `chosen`, largest first, and returns how many there
/// were: −∞ is never chosen. Unused places get [`EMPTY`].
///
/// Insertion into a short sorted list: O(experts · k) at worst, close to O(experts) on rows where few values rise late.
pub(crate) fn select_top_k(row: &[f32], chosen: &mut [u16]) -> usize {
    let k = chosen.len();
    let mut count = 0;
    for (expert, &value) in row.iter().enumerate() {
        if value == f32::NEG_INFINITY || (count == k && value <= row[usize::from(chosen[k - 1])]) {
            continue;
        }
        let mut at = if count < k { count } else { k - 1 };
        while at > 0 && row[usize::from(chosen[at - 1])] < value {
            chosen[at] = chosen[at - 1];
            at -= 1;
        }
        chosen[at] = expert as u16;
        count = (count + 1).min(k);
    }
    chosen[count..].fill(EMPTY);
    count
}

/// The gate's own choice of every token, `[tokens, top_k]`; padding tokens choose nothing.
pub(crate) fn gate_choice(request: &RouteRequest<'_>) -> Vec<u16> {
    let top_k = request.top_k();
    let mut chosen = vec![EMPTY; request.scores().tokens() * top_k];
    for (token, chosen) in chosen.chunks_exact_mut(top_k).enumerate() {
        if !request.is_padding(token) {
            select_top_k(request.scores().selection(token), chosen);
        }
    }
    chosen
}

/// Top-k routing (Shazeer et al. 2017, arXiv 1701.06538): each token takes its k best experts. Dropless without a
/// [`DropRule`]; with one, slots past the capacity are dropped as GShard (2006.16668) and Switch (2101.03961) do.
#[derive(Clone, Copy, Debug, Default)]
pub struct TopK {
    /// What happens past the capacity; `None` ignores capacity altogether.
    pub drop: Option<DropRule>,
}

impl Router for TopK {
    fn name(&self) -> &'static str {
        match self.drop {
            None => "top-k",
            Some(DropRule::Arrival) => "top-k-arrival",
            Some(DropRule::Rank) => "top-k-rank",
            Some(DropRule::Score) => "top-k-score",
        }
    }

    fn respects_capacity(&self) -> bool {
        self.drop.is_some()
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let chosen = gate_choice(request);
        let kept = self.drop.map(|rule| keep_within(rule, &chosen, request));
        *assignment = Assignment::from_selection(request.scores(), request.top_k(), chosen, kept.as_deref());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The oracle: sort everything.
    fn naive(row: &[f32], k: usize) -> Vec<u16> {
        let mut order: Vec<u16> = (0..row.len() as u16).filter(|&e| row[usize::from(e)] > f32::NEG_INFINITY).collect();
        order.sort_by(|&a, &b| row[usize::from(b)].partial_cmp(&row[usize::from(a)]).unwrap().then(a.cmp(&b)));
        order.truncate(k);
        order.resize(k, EMPTY);
        order
    }

    proptest! {
        #[test]
        fn selection_matches_a_full_sort(
            row in prop::collection::vec(prop_oneof![Just(f32::NEG_INFINITY), Just(0.0f32), Just(-0.0f32), Just(1.0f32), -2.0f32..2.0], 1..40),
            k in 1usize..12,
        ) {
            let k = k.min(row.len());
            let mut chosen = vec![0; k];
            let count = select_top_k(&row, &mut chosen);
            prop_assert_eq!(&chosen, &naive(&row, k));
            prop_assert_eq!(count, chosen.iter().filter(|&&e| e != EMPTY).count());
        }
    }
}
