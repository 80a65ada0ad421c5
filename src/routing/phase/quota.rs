//! The phase quota: gate-blind and exact. Every slot there is room for gets an expert, and no load exceeds its limit.
//!
//! 1. *Shares.* Each expert gets an integer share S_j ∝ C_j with `S_j ≤ min(C_j, N)` and
//!    `Σ S = min(N·k, Σ min(C_j, N))`; per device, the device gets a share `≤ min(C_d, N·experts of d)` that its experts split
//!    equally. Without limits all shares are equal.
//! 2. *Ring.* The shares lie end to end as arcs; slot `s = round·N + token` takes the expert whose arc holds position s.
//!    An arc is at most N long, so it cannot hold both s and s + N: **a token's experts are distinct**. Every position
//!    belongs to a slot: **nothing is dropped that there is room for**. Arc j is S_j long: **no load exceeds its limit**.
//! 3. *Blocks.* On one ring a token only ever meets experts that lie N apart. So tokens are dealt into B blocks of about
//!    64 (token t into block `t mod B`), and each block lays a ring of its own from what the first ring gave its tokens,
//!    with the experts in a fresh order. That loses nothing: let block b have n_b tokens and the first ring give it s_bj
//!    slots of expert j. The first ring gave each token at most one slot of j, so `s_bj ≤ n_b`, which is all that step 2 asks
//!    of an arc on a ring of rounds of n_b; and the s_bj sum to S_j over the blocks, so loads stay.
//!
//! Where there is less room than slots the last round is the one cut short: every token has ⌊Σ S / N⌋ or one more, and who
//! has one more is spread over the batch by the dealing, and random within a block.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, top_k]`. O(N·k + E) time (and a sort of the limits),
//! O(N + E) memory beside the result. Arithmetic is in integers, so shares do not depend on rounding modes.
//!
//! Masks: the ring does not see them. A slot that falls on a masked expert is exchanged with another slot of its block where
//! both tokens may have what they get, else given to an expert with room, else exchanged with a slot whose token may have
//! one. That is a bounded search: what is still left is dropped, so with masks the result is not always the maximum flow.
//!
//! Knows nothing of gate scores (they only make combine weights): for quality see the phase router.

use crate::error::Result;
use crate::routing::assignment::{Assignment, EMPTY};
use crate::routing::capacity::Capacity;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::stream::{Stream, layer_seed};

/// Tokens in a block, about.
const BLOCK: usize = 64;

/// Exact quotas on a ring, blind to the gate.
#[derive(Clone, Copy, Debug, Default)]
pub struct PhaseQuota {
    /// Order of experts and tokens in the blocks; each layer derives its own.
    pub seed: u64,
}

impl Router for PhaseQuota {
    fn name(&self) -> &'static str {
        "quota"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let mut chosen = vec![EMPTY; scores.tokens() * top_k];
        let live: Vec<usize> = (0..scores.tokens()).filter(|&token| !request.is_padding(token)).collect();
        let shares = expert_quotas(request.capacity(), live.len(), top_k);
        lay_ring(&shares, &live, top_k, &mut chosen);

        let masked = scores.has_masks();
        let mut stream = Stream::new(layer_seed(self.seed, request.context().layer), 0);
        let blocks = live.len().div_ceil(BLOCK);
        let mut block = Block { top_k, tokens: Vec::new(), slots: Vec::new(), runs: Vec::new() };
        for first in 0..blocks {
            block.gather(live.iter().copied().skip(first).step_by(blocks), &chosen);
            block.lay_ring(&mut stream, &mut chosen);
            if masked {
                block.exchange_masked(request, &mut chosen);
            }
        }
        if masked {
            give_room(request, &mut chosen);
        }
        *assignment = Assignment::from_selection(scores, top_k, chosen, None);
        Ok(())
    }
}

/// Slots of every expert when `tokens` take `top_k` each, `[experts]`; they sum to [`Capacity::feasible_slots`].
pub(crate) fn expert_quotas(capacity: &Capacity, tokens: usize, top_k: usize) -> Vec<u64> {
    let sizes = capacity.pool_sizes();
    let pools: Vec<(u64, u64)> = sizes
        .iter()
        .enumerate()
        .map(|(pool, &size)| {
            let most = tokens as u64 * size as u64;
            capacity.limits().map_or((1, most), |limits| (u64::from(limits[pool]), most.min(u64::from(limits[pool]))))
        })
        .collect();
    let quotas = proportional(&pools, capacity.feasible_slots(tokens, top_k));
    let mut rank = vec![0; quotas.len()];
    (0..capacity.experts())
        .map(|expert| {
            let pool = capacity.pool_of(expert as u16);
            let (quota, size) = (quotas[pool], sizes[pool] as u64);
            rank[pool] += 1;
            quota / size + u64::from(rank[pool] <= quota % size)
        })
        .collect()
}

/// Splits `total` in proportion to the weights of `(weight, most)` pairs into integers, none above its most. Largest
/// remainder, ties to the lower index; what would exceed its most is cut there and the others share the rest.
///
/// A most is 0 where a weight is, and `total` is at most their sum.
fn proportional(pools: &[(u64, u64)], total: u64) -> Vec<u64> {
    let mut shares = vec![0; pools.len()];
    // Those with the smallest most per weight fill first, so one pass in that order finds all that are cut.
    let mut order: Vec<usize> = (0..pools.len()).filter(|&pool| pools[pool].0 > 0).collect();
    let scaled = |a: usize, b: usize| u128::from(pools[a].1) * u128::from(pools[b].0);
    order.sort_by(|&a, &b| scaled(a, b).cmp(&scaled(b, a)));
    let mut left = u128::from(total);
    let mut weight: u128 = order.iter().map(|&pool| u128::from(pools[pool].0)).sum();
    let mut open = order.as_slice();
    while let [pool, rest @ ..] = open {
        let (own, most) = (u128::from(pools[*pool].0), u128::from(pools[*pool].1));
        if left * own < most * weight {
            break;
        }
        shares[*pool] = most as u64;
        (left, weight, open) = (left - most, weight - own, rest);
    }
    let mut remainders: Vec<(u128, usize)> = open
        .iter()
        .map(|&pool| {
            let product = left * u128::from(pools[pool].0);
            shares[pool] = (product / weight) as u64;
            (product % weight, pool)
        })
        .collect();
    let missing = left - open.iter().map(|&pool| u128::from(shares[pool])).sum::<u128>();
    remainders.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    for &(_, pool) in &remainders[..missing as usize] {
        shares[pool] += 1;
    }
    shares
}

/// Step 2 over the whole batch: slot `round·N + i` of the i-th live token takes the expert whose arc holds it.
fn lay_ring(shares: &[u64], live: &[usize], top_k: usize, chosen: &mut [u16]) {
    let (mut round, mut at) = (0, 0);
    for (expert, &share) in shares.iter().enumerate() {
        for _ in 0..share {
            chosen[live[at] * top_k + round] = expert as u16;
            at += 1;
            if at == live.len() {
                (round, at) = (round + 1, 0);
            }
        }
    }
}

/// One block's tokens and what the ring of the batch gave them.
struct Block {
    top_k: usize,
    tokens: Vec<usize>,
    /// Positions in the assignment of the block's slots, round by round.
    slots: Vec<usize>,
    /// Experts with their number of slots in the block.
    runs: Vec<(u16, usize)>,
}

impl Block {
    /// Collects the slots of `tokens` that have an expert. Along the ring equal experts follow each other.
    fn gather(&mut self, tokens: impl Iterator<Item = usize>, chosen: &[u16]) {
        self.tokens.clear();
        self.tokens.extend(tokens);
        self.slots.clear();
        self.runs.clear();
        for round in 0..self.top_k {
            for &token in &self.tokens {
                let slot = token * self.top_k + round;
                let expert = chosen[slot];
                if expert == EMPTY {
                    return;
                }
                self.slots.push(slot);
                match self.runs.last_mut() {
                    Some((last, length)) if *last == expert => *length += 1,
                    _ => self.runs.push((expert, 1)),
                }
            }
        }
    }

    /// Step 3: lays the block's runs in a fresh order around its tokens, shuffled too.
    fn lay_ring(&mut self, stream: &mut Stream, chosen: &mut [u16]) {
        for &slot in &self.slots {
            chosen[slot] = EMPTY;
        }
        stream.shuffle(&mut self.runs);
        stream.shuffle(&mut self.tokens);
        self.slots.clear();
        let (mut round, mut at) = (0, 0);
        for &(expert, length) in &self.runs {
            for _ in 0..length {
                let slot = self.tokens[at] * self.top_k + round;
                chosen[slot] = expert;
                self.slots.push(slot);
                at += 1;
                if at == self.tokens.len() {
                    (round, at) = (round + 1, 0);
                }
            }
        }
    }

    /// Exchanges every slot on a masked expert with one of the block where both tokens may have what they get; empties it
    /// where there is none.
    fn exchange_masked(&self, request: &RouteRequest<'_>, chosen: &mut [u16]) {
        for &slot in &self.slots {
            let masked = chosen[slot];
            if request.scores().is_allowed(slot / self.top_k, usize::from(masked)) {
                continue;
            }
            let partner = self.slots.iter().copied().find(|&other| {
                let offered = chosen[other];
                may_have(request, chosen, slot, offered) && may_have(request, chosen, other, masked)
            });
            match partner {
                Some(partner) => chosen.swap(slot, partner),
                None => chosen[slot] = EMPTY,
            }
        }
    }
}

/// True when `expert` is one that the token of `slot` neither holds nor is forbidden.
fn may_have(request: &RouteRequest<'_>, chosen: &[u16], slot: usize, expert: u16) -> bool {
    let (token, top_k) = (slot / request.top_k(), request.top_k());
    expert != EMPTY
        && request.scores().is_allowed(token, usize::from(expert))
        && !chosen[token * top_k..(token + 1) * top_k].contains(&expert)
}

/// Slots looked at in search of one that would make way for an empty one.
const TRIES: usize = 512;

/// Fills empty slots with experts that have room: directly where the token may have one, else by taking the expert of
/// another slot whose token may have one.
fn give_room(request: &RouteRequest<'_>, chosen: &mut [u16]) {
    let (capacity, top_k, experts) = (request.capacity(), request.top_k(), request.scores().experts());
    let mut room = capacity.limits().map_or_else(|| vec![u32::MAX; experts], <[u32]>::to_vec);
    chosen.iter().filter(|&&expert| expert != EMPTY).for_each(|&expert| room[capacity.pool_of(expert)] -= 1);
    let mut open: Vec<u16> = (0..experts as u16).collect();
    for slot in 0..chosen.len() {
        if chosen[slot] != EMPTY || request.is_padding(slot / top_k) {
            continue;
        }
        open.retain(|&expert| room[capacity.pool_of(expert)] > 0);
        if open.is_empty() {
            return;
        }
        let giver = (0..TRIES.min(chosen.len())).map(|step| (slot + step) % chosen.len()).find_map(|giver| {
            // The slot itself comes first: it only has to fill itself.
            if giver != slot && !may_have(request, chosen, slot, chosen[giver]) {
                return None;
            }
            // Begins elsewhere for each slot, so that the lowest ids do not take it all.
            let mut turned = (0..open.len()).map(|step| open[(slot + step) % open.len()]);
            Some((giver, turned.find(|&expert| may_have(request, chosen, giver, expert))?))
        });
        if let Some((giver, expert)) = giver {
            chosen[slot] = chosen[giver];
            chosen[giver] = expert;
            room[capacity.pool_of(expert)] -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::Placement;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quotas_fill_the_room_and_stay_in_proportion(
            limits in prop::collection::vec(prop_oneof![Just(0u32), 0u32..20, 0u32..400, Just(u32::MAX)], 1..30),
            tokens in 0usize..200,
            top_k in 1usize..9,
        ) {
            let top_k = top_k.min(limits.len());
            let capacity = Capacity::per_expert(limits.clone()).unwrap();
            let quotas = expert_quotas(&capacity, tokens, top_k);
            prop_assert_eq!(quotas.iter().sum::<u64>(), capacity.feasible_slots(tokens, top_k));
            for (a, (&quota, &limit)) in quotas.iter().zip(&limits).enumerate() {
                let most = u64::from(limit).min(tokens as u64);
                prop_assert!(quota <= most);
                // Nobody who could take more has less, by more than rounding, than anybody in proportion.
                for (&other, &other_limit) in quotas.iter().zip(&limits).skip(a + 1) {
                    if quota + 1 < most && other + 1 < u64::from(other_limit).min(tokens as u64) {
                        let gap = quota as f64 * f64::from(other_limit) - other as f64 * f64::from(limit);
                        prop_assert!(gap.abs() <= f64::from(limit.max(other_limit)) * 1.000_001);
                    }
                }
            }
        }
    }

    #[test]
    fn a_device_splits_its_quota_equally() {
        let placement = Placement::new(vec![0, 1, 0, 1, 1], 3).unwrap();
        // Device 0 cannot hold more than two experts times ten tokens, device 2 has no expert at all.
        let capacity = Capacity::per_device(placement, vec![90, 8, 50]).unwrap();
        assert_eq!(expert_quotas(&capacity, 10, 4), [10, 3, 10, 3, 2]);
        assert_eq!(expert_quotas(&Capacity::unlimited(3).unwrap(), 10, 2), [7, 7, 6]);
    }
}
