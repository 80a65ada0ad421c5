//! Dropping: which slots of a selection stay when an expert or a device is full.
//!
//! The published rules, used by `top-k-arrival`, `top-k-rank`, `top-k-score` and by the routers that are blind to capacity. Knows
//! nothing of how the selection was made.

use crate::routing::router::RouteRequest;
use crate::routing::slots::EMPTY;

/// Which slots go when an expert or a device is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropRule {
    /// The last to come: slots are admitted token by token, as a buffer fills up (Switch, arXiv 2101.03961).
    Arrival,
    /// The last to come within the lowest choices: all first choices by arrival, then all second ones, and so on (GShard,
    /// arXiv 2006.16668, algorithm 1).
    Rank,
    /// The least wanted: slots with the lowest gate score go first (ties: the later token).
    Score,
}

/// For each slot of `chosen` (`[tokens, top_k]`, [`EMPTY`] allowed) whether it stays within the request's capacity.
pub(crate) fn keep_within(rule: DropRule, chosen: &[u16], request: &RouteRequest<'_>) -> Vec<bool> {
    let capacity = request.capacity();
    let Some(limits) = capacity.limits() else {
        return chosen.iter().map(|&expert| expert != EMPTY).collect();
    };
    let mut room = limits.to_vec();
    let mut kept = vec![false; chosen.len()];
    let mut admit = |slot: usize| {
        let room = &mut room[capacity.pool_of(chosen[slot])];
        if *room > 0 {
            *room -= 1;
            kept[slot] = true;
        }
    };
    let (tokens, top_k) = (request.scores().tokens(), request.top_k());
    let filled = |&slot: &usize| chosen[slot] != EMPTY;
    match rule {
        DropRule::Arrival => (0..chosen.len()).filter(filled).for_each(&mut admit),
        DropRule::Rank => (0..top_k)
            .flat_map(|rank| (0..tokens).map(move |token| token * top_k + rank))
            .filter(filled)
            .for_each(&mut admit),
        DropRule::Score => {
            let score = |slot: usize| request.scores().gate(slot / top_k)[usize::from(chosen[slot])];
            let mut ranked: Vec<(f32, usize)> =
                (0..chosen.len()).filter(filled).map(|slot| (score(slot), slot)).collect();
            ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            ranked.into_iter().for_each(|(_, slot)| admit(slot));
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::Capacity;
    use crate::routing::logits::Logits;
    use crate::routing::router::RouteContext;
    use crate::routing::scores::Scoring;

    #[test]
    fn each_rule_drops_what_it_says() {
        // Three tokens choose experts 0 and 1 in both orders; expert 0 has room for one, expert 1 for two.
        let logits = [2.0, 1.0, 3.0, 1.0, 0.0, 1.0];
        let chosen = [0, 1, 0, 1, 1, 0];
        let scores = Scoring::sigmoid().scores(&Logits::new(&logits, 3, 2).unwrap(), None).unwrap();
        let capacity = Capacity::per_expert(vec![1, 2]).unwrap();
        let request = RouteRequest::new(&scores, 2, &capacity, RouteContext::default()).unwrap();
        for (rule, kept) in [
            (DropRule::Arrival, [true, true, false, true, false, false]),
            (DropRule::Rank, [true, true, false, false, true, false]),
            (DropRule::Score, [false, true, true, true, false, false]),
        ] {
            assert_eq!(keep_within(rule, &chosen, &request), kept, "{rule:?}");
        }
    }
}
