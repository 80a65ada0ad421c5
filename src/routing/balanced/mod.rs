//! Balanced assignment, as published: [`sinkhorn`] (S-BASE) and [`auction`] (BASE layers), the baselines that see the
//! whole batch.
//!
//! Both look for what the phase router looks for, an assignment of high score within the limits. Neither says how
//! close it came.

use crate::routing::admission::lay_out;
use crate::routing::assignment::Assignment;
use crate::routing::router::RouteRequest;
use crate::routing::slots::EMPTY;

pub(crate) mod auction;
pub(crate) mod sinkhorn;

/// The assignment of `chosen` (`[tokens, top_k]`), of which the slots in `kept` have room.
///
/// A slot that got nothing counts in the combine weights with the best expert its token does not hold, so that what is
/// dropped is not given to its neighbours.
fn assignment(request: &RouteRequest<'_>, mut chosen: Vec<u16>, mut kept: Vec<bool>) -> Assignment {
    let (scores, top_k) = (request.scores(), request.top_k());
    for token in (0..scores.tokens()).filter(|&token| !request.is_padding(token)) {
        let row = token * top_k..(token + 1) * top_k;
        let selection = scores.selection(token);
        for slot in row.clone().filter(|&slot| !kept[slot]) {
            if chosen[slot] == EMPTY {
                let missing = (0..selection.len() as u16).filter(|expert| !chosen[row.clone()].contains(expert));
                let allowed = missing.filter(|&expert| selection[usize::from(expert)] > f32::NEG_INFINITY);
                let better = |&a: &u16, &b: &u16| {
                    selection[usize::from(a)].total_cmp(&selection[usize::from(b)]).then(b.cmp(&a))
                };
                chosen[slot] = allowed.max_by(better).unwrap_or(EMPTY);
            }
        }
    }
    lay_out(request, &mut chosen, &mut kept);
    Assignment::from_chosen(scores, top_k, chosen, Some(&kept))
}
