//! The phase quota: gate-blind and exact. Every slot there is room for gets an expert, and no load exceeds its limit.
//!
//! 1. *Shares.* Each expert gets an integer share S_j ∝ C_j with `S_j ≤ min(C_j, N)` and
//!    `Σ S = min(N·k, Σ min(C_j, N))`; per device, the device gets a share `≤ min(C_d, N·experts of d)` that its experts split
//!    equally. Without limits all shares are equal.
//! 2. *Ring.* The shares lie end to end as arcs; slot `s = round·N + token` takes the expert whose arc holds position s.
//!    An arc is at most N long, so it cannot hold both s and s + N: **a token's experts are distinct**. Every position
//!    belongs to a slot: **nothing is dropped that there is room for**. Arc j is S_j long: **no load exceeds its limit**.
//! 3. *Blocks.* On one ring a token only ever meets experts that lie N apart. So the places of the ring are dealt into B blocks
//!    of about 64 tokens (place i into block `i mod B`), and each block lays a ring of its own from what falls to it, with
//!    the experts in a fresh order. That loses nothing: let block b have n_b tokens and the first ring give it s_bj slots of
//!    expert j. The first ring gave each token at most one slot of j, so `s_bj ≤ n_b`, which is all that step 2 asks of an
//!    arc on a ring of rounds of n_b; and the s_bj sum to S_j over the blocks, so loads stay.
//!
//! Which token lies where on the first ring is free, so block b is the b-th run of n_b tokens in the batch, and each token is
//! written once, as its gate scores pass by. The first ring itself is never written: below position `p = round·N + B·q + v`,
//! with v < B, block b has `round·n_b + q + [v > b]` slots, and s_bj is the difference of that over the arc of j.
//!
//! Where there is less room than slots the last round is the one cut short: every token has ⌊Σ S / N⌋ or one more, and which
//! ones have one more is spread over the batch by the dealing, and random within a block.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, top_k]`. O(N·k + E) time (and a sort of the limits), O(E) memory
//! beside the result: blocks are larger than 64 where E is more than 64·k. Arithmetic is in integers, so shares do not depend
//! on rounding modes.
//!
//! Masks: the ring does not see them, and the blocks are the dealt ones, tokens from all over the batch. A slot that falls on
//! a masked expert is exchanged with another slot of its block where both tokens may have what they get, else given to an
//! expert with room, else exchanged with a slot whose token may have one. What that bounded search leaves goes the phase
//! router's way, along augmenting paths: **with masks, too, the result is the maximum flow**, in O(N) memory and with
//! allocations.
//!
//! Knows nothing of gate scores (they only make combine weights) but for those last leftovers: for quality see the phase
//! router.

use crate::error::Result;
use crate::routing::assignment::{Assignment, weigh};
use crate::routing::capacity::Capacity;
use crate::routing::phase::place_claims;
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::EMPTY;
use crate::routing::stream::{Stream, layer_seed};
use crate::simd::Isa;

/// Tokens in a block, about, where there are no more experts than slots in it. Run by `examples/router_table`.
const BLOCK: usize = 64;

/// Exact quotas on a ring, blind to the gate.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PhaseQuota {
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
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let isa = scratch.isa();
        let Buffers { shares, rings, exchange } = scratch.of();
        let top_k = request.top_k();
        rings.reset(shares.split(request.capacity(), request.live_tokens(), top_k), request.live_tokens(), top_k);
        let seed = layer_seed(self.seed, request.context().layer);
        let (chosen, weights) = assignment.refill(request.scores(), top_k);
        if request.scores().has_masks() {
            exchange.fill(request, rings, seed, chosen);
            place_rest(request, isa, chosen);
            let slots = chosen.chunks_exact(top_k).zip(weights.chunks_exact_mut(top_k));
            for (token, (chosen, weights)) in slots.enumerate() {
                weigh(request.scores(), request.scores().gate(token), chosen, weights);
            }
        } else {
            // A width known to the compiler needs no loops over slots.
            match top_k {
                8 => fill(request, rings, seed, (chosen, weights), 8),
                4 => fill(request, rings, seed, (chosen, weights), 4),
                2 => fill(request, rings, seed, (chosen, weights), 2),
                _ => fill(request, rings, seed, (chosen, weights), top_k),
            }
        }
        Ok(())
    }
}

/// Takes the blocks one after the other from the batch, so that every token is written once, while its gate scores are read.
#[inline(always)]
fn fill(
    request: &RouteRequest<'_>,
    rings: &mut Rings,
    seed: u64,
    (chosen, weights): (&mut [u16], &mut [f32]),
    top_k: usize,
) {
    if request.context().padding.is_some() {
        chosen.fill(EMPTY);
        weights.fill(0.0);
    }
    let slots = chosen.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k)).enumerate();
    let mut live = slots.filter(|(token, _)| !request.is_padding(*token));
    for block in 0..rings.blocks {
        rings.lay(block, seed);
        let tokens = rings.places.len();
        for (&place, (token, (chosen, weights))) in rings.places.iter().zip(live.by_ref()) {
            let experts = rings.ring[usize::from(place)..].iter().step_by(tokens);
            chosen.iter_mut().zip(experts).for_each(|(chosen, &expert)| *chosen = expert);
            weigh(request.scores(), request.scores().gate(token), chosen, weights);
        }
    }
}

/// What is reused from call to call.
#[derive(Default)]
struct Buffers {
    shares: Shares,
    rings: Rings,
    exchange: Exchange,
}

/// An expert or a device on its way to its share.
#[derive(Clone, Copy, Default)]
struct Pool {
    /// What it is shared in proportion to: its limit, or 1.
    weight: u64,
    experts: u64,
    /// Slots it can take.
    most: u64,
    share: u64,
    remainder: u64,
    /// Experts of it that have got theirs.
    served: u64,
}

/// Step 1.
#[derive(Default)]
struct Shares {
    pools: Vec<Pool>,
    order: Vec<u16>,
    experts: Vec<u32>,
}

impl Shares {
    /// Slots of every expert when `tokens` take `top_k` each, `[experts]`; they sum to [`Capacity::feasible_slots`].
    fn split(&mut self, capacity: &Capacity, tokens: usize, top_k: usize) -> &[u32] {
        let pools = capacity.limits().map_or(capacity.experts(), <[u32]>::len);
        let single = Pool { weight: 1, experts: u64::from(capacity.placement().is_none()), ..Pool::default() };
        self.pools.clear();
        self.pools.resize(pools, single);
        for &device in capacity.placement().into_iter().flat_map(|placement| placement.device_of()) {
            self.pools[usize::from(device)].experts += 1;
        }
        for (pool, &limit) in self.pools.iter_mut().zip(capacity.limits().unwrap_or_default()) {
            pool.weight = limit.into();
        }
        for pool in &mut self.pools {
            pool.most = tokens as u64 * pool.experts;
            if capacity.limits().is_some() {
                pool.most = pool.most.min(pool.weight);
            }
        }
        let most: u64 = self.pools.iter().map(|pool| pool.most).sum();
        self.proportional(most.min(tokens as u64 * top_k as u64));
        self.experts.clear();
        for expert in 0..capacity.experts() {
            let pool = &mut self.pools[capacity.pool_of(expert as u16)];
            // The first ones get what does not divide.
            let larger = pool.served < pool.share % pool.experts;
            pool.served += 1;
            self.experts.push((pool.share / pool.experts) as u32 + u32::from(larger));
        }
        &self.experts
    }

    /// Splits `total` in proportion to the weights into integers, none above its most. Largest remainder, ties to the lower
    /// index; what would exceed its most is cut there and the others share the rest.
    ///
    /// `total` is at most the sum of the mosts, and below 2^32 as all slots are: its products with weights fit in 64 bits.
    fn proportional(&mut self, total: u64) {
        let Self { pools, order, .. } = self;
        // Those with the smallest most per weight fill first, so one pass in that order finds all that are cut.
        order.clear();
        order.extend((0..pools.len()).filter(|&pool| pools[pool].weight > 0).map(|pool| pool as u16));
        let pool = |index: u16| pools[usize::from(index)];
        let scaled = |a: u16, b: u16| u128::from(pool(a).most) * u128::from(pool(b).weight);
        order.sort_unstable_by(|&a, &b| scaled(a, b).cmp(&scaled(b, a)).then(a.cmp(&b)));
        let mut weight: u64 = order.iter().map(|&index| pool(index).weight).sum();
        let (mut left, mut cut) = (total, 0);
        for &index in order.iter() {
            let pool = &mut pools[usize::from(index)];
            if u128::from(left * pool.weight) < u128::from(pool.most) * u128::from(weight) {
                break;
            }
            pool.share = pool.most;
            (left, weight, cut) = (left - pool.most, weight - pool.weight, cut + 1);
        }
        let open = &mut order[cut..];
        let mut missing = left;
        for &index in open.iter() {
            let pool = &mut pools[usize::from(index)];
            let product = left * pool.weight;
            (pool.share, pool.remainder) = (product / weight, product % weight);
            missing -= pool.share;
        }
        let remainder = |index: u16| pools[usize::from(index)].remainder;
        open.sort_unstable_by(|&a, &b| remainder(b).cmp(&remainder(a)).then(a.cmp(&b)));
        open[..missing as usize].iter().for_each(|&index| pools[usize::from(index)].share += 1);
    }
}

/// What decides how many slots of an expert fall to a block; those of all blocks are its arc.
#[derive(Clone, Copy)]
struct Arc {
    /// Slots in a block of the fewest tokens. Wraps below 0 where `before` makes up for it.
    least: u32,
    /// Ends of rounds in the arc, 0 or 1: a block of one token more has so many more slots.
    rounds: u32,
    /// Blocks below `before` have one slot more that is not the arc's, blocks below `until` one more that is.
    before: u32,
    until: u32,
}

/// Steps 2 and 3: the ring of the batch, which is never written down, and that of one block.
#[derive(Default)]
struct Rings {
    top_k: usize,
    blocks: usize,
    /// Tokens in a block; the first `larger` blocks have one more.
    tokens: usize,
    larger: usize,
    arcs: Vec<Arc>,
    order: Vec<u16>,
    /// Where on the ring each token of the block lies.
    places: Vec<u16>,
    /// Experts of the block, round by round, [`EMPTY`] where there are no more; `slots` are not.
    ring: Vec<u16>,
    slots: usize,
}

/// Slots written at once: few runs are longer, and a copy of fixed length needs no loop. Run by `examples/router_table`.
const WRITE: usize = 16;

impl Rings {
    /// Lays the shares of the experts around `tokens`.
    fn reset(&mut self, shares: &[u32], tokens: usize, top_k: usize) {
        // A block goes through all experts, so it is to have as many slots.
        let size = BLOCK.max(shares.len().div_ceil(top_k));
        self.top_k = top_k;
        self.blocks = tokens.div_ceil(size);
        self.arcs.clear();
        if self.blocks == 0 {
            return;
        }
        (self.tokens, self.larger) = (tokens / self.blocks, tokens % self.blocks);
        let (mut round, mut at) = (0, 0);
        for &share in shares {
            let before = at;
            at += share as usize;
            let rounds = usize::from(at >= tokens);
            at -= rounds * tokens;
            round += rounds;
            let least = (rounds * self.tokens + at / self.blocks).wrapping_sub(before / self.blocks);
            let [before, until] = [before, at].map(|at| (at % self.blocks) as u32);
            self.arcs.push(Arc { least: least as u32, rounds: rounds as u32, before, until });
        }
        debug_assert!(round <= top_k);
    }

    /// Tokens of a block.
    fn tokens_of(&self, block: usize) -> usize {
        self.tokens + usize::from(block < self.larger)
    }

    /// Lays one block's ring in a fresh order of experts and tokens.
    fn lay(&mut self, block: usize, seed: u64) {
        let mut stream = Stream::new(seed, block as u64);
        let tokens = self.tokens_of(block);
        self.order.clear();
        self.order.extend(0..self.arcs.len() as u16);
        stream.shuffle(&mut self.order);
        self.places.clear();
        self.places.extend(0..tokens as u16);
        stream.shuffle(&mut self.places);

        let whole = tokens * self.top_k;
        self.ring.resize(whole + WRITE, EMPTY);
        let (larger, block) = (u32::from(block < self.larger), block as u32);
        let mut end = 0;
        for &expert in &self.order {
            let Arc { least, rounds, before, until } = self.arcs[usize::from(expert)];
            let slots = least + rounds * larger;
            let slots = slots.wrapping_add(u32::from(block < until)).wrapping_sub(u32::from(block < before));
            let start = end;
            end += slots as usize;
            for run in self.ring[start..end + WRITE].chunks_exact_mut(WRITE) {
                run.fill(expert);
            }
        }
        self.ring[end..].fill(EMPTY);
        self.slots = end;
    }
}

/// Step 3 where experts are masked: blocks of tokens from all over the batch, so that there are more to exchange with.
#[derive(Default)]
struct Exchange {
    live: Vec<u32>,
    /// Where the slots of the block are in the assignment, round by round.
    slots: Vec<u32>,
}

impl Exchange {
    fn fill(&mut self, request: &RouteRequest<'_>, rings: &mut Rings, seed: u64, chosen: &mut [u16]) {
        let top_k = request.top_k();
        self.live.clear();
        self.live.extend((0..request.scores().tokens() as u32).filter(|&token| !request.is_padding(token as usize)));
        chosen.fill(EMPTY);
        for block in 0..rings.blocks {
            rings.lay(block, seed);
            let tokens = rings.places.len();
            self.slots.clear();
            self.slots.resize(rings.slots, 0);
            for (&place, &token) in rings.places.iter().zip(self.live.iter().skip(block).step_by(rings.blocks)) {
                for (round, at) in (usize::from(place)..rings.slots).step_by(tokens).enumerate() {
                    let slot = token as usize * top_k + round;
                    self.slots[at] = slot as u32;
                    chosen[slot] = rings.ring[at];
                }
            }
            self.exchange_masked(request, chosen);
        }
        self.slots.clear();
        self.slots.extend(
            self.live.iter().flat_map(|&token| (0..top_k as u32).map(move |round| token * top_k as u32 + round)),
        );
        give_room(request, &self.slots, chosen);
    }

    /// Exchanges every slot on a masked expert with one of the block where both tokens may have what they get; empties it
    /// where there is none.
    fn exchange_masked(&self, request: &RouteRequest<'_>, chosen: &mut [u16]) {
        let slots = || self.slots.iter().map(|&slot| slot as usize);
        for slot in slots() {
            let masked = chosen[slot];
            if request.scores().is_allowed(slot / request.top_k(), usize::from(masked)) {
                continue;
            }
            let partner = slots().find(|&other| {
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

/// Fills those of `slots`, all but padding's, that are empty with experts that have room: directly where the token may have one, else by
/// taking the expert of another slot whose token may have one.
fn give_room(request: &RouteRequest<'_>, slots: &[u32], chosen: &mut [u16]) {
    let (capacity, experts) = (request.capacity(), request.scores().experts());
    let mut room = capacity.limits().map_or_else(|| vec![u32::MAX; experts], <[u32]>::to_vec);
    chosen.iter().filter(|&&expert| expert != EMPTY).for_each(|&expert| room[capacity.pool_of(expert)] -= 1);
    let mut open: Vec<u16> = (0..experts as u16).collect();
    for (at, slot) in slots.iter().map(|&slot| slot as usize).enumerate() {
        if chosen[slot] != EMPTY {
            continue;
        }
        open.retain(|&expert| room[capacity.pool_of(expert)] > 0);
        if open.is_empty() {
            return;
        }
        let mut tried = (0..TRIES.min(slots.len())).map(|step| slots[(at + step) % slots.len()] as usize);
        let giver = tried.find_map(|giver| {
            // The slot itself comes first: it only has to fill itself.
            if giver != slot && !may_have(request, chosen, slot, chosen[giver]) {
                return None;
            }
            // Begins elsewhere for each slot, so that the lowest ids do not take it all.
            let mut turned = (0..open.len()).map(|step| open[(at + step) % open.len()]);
            Some((giver, turned.find(|&expert| may_have(request, chosen, giver, expert))?))
        });
        if let Some((giver, expert)) = giver {
            chosen[slot] = chosen[giver];
            chosen[giver] = expert;
            room[capacity.pool_of(expert)] -= 1;
        }
    }
}

/// Places what is still left as the phase router does: along augmenting paths, which make it the maximum flow and serve as
/// many tokens as can be. The only step that sees scores: where several experts would do, a token gets its best.
fn place_rest(request: &RouteRequest<'_>, isa: Isa, chosen: &mut [u16]) {
    let Some(limits) = request.capacity().limits() else { return };
    let (experts, top_k) = (request.scores().experts() as u16, request.top_k());
    // A slot to be placed claims an expert, any that its token may have.
    let mut claims = Vec::new();
    for slot in 0..chosen.len() {
        if chosen[slot] == EMPTY
            && !request.is_padding(slot / top_k)
            && let Some(expert) = (0..experts).find(|&expert| may_have(request, chosen, slot, expert))
        {
            chosen[slot] = expert;
            claims.push(slot);
        }
    }
    if claims.is_empty() {
        return;
    }
    place_claims(request, limits, isa, chosen, claims);
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
            let mut shares = Shares::default();
            let quotas: Vec<u64> = shares.split(&capacity, tokens, top_k).iter().map(|&share| share.into()).collect();
            prop_assert_eq!(quotas.iter().sum::<u64>(), capacity.feasible_slots(tokens, top_k));
            for (a, (&quota, &limit)) in quotas.iter().zip(&limits).enumerate() {
                let most = u64::from(limit).min(tokens as u64);
                prop_assert!(quota <= most);
                // No pool that could take more has less, by more than rounding, than any other in proportion.
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
        let mut shares = Shares::default();
        assert_eq!(shares.split(&capacity, 10, 4), [10, 3, 10, 3, 2]);
        assert_eq!(shares.split(&Capacity::unlimited(3).unwrap(), 10, 2), [7, 7, 6]);
    }
}
