//! One token in decode through the memory-aware router at once, straight from its logits: selection, swaps, combine weights and the
//! state, without an allocation.
//!
//! Bit-equal to scoring and [`CacheRouter`], state included, only faster: the experts are selected by logit while the
//! exponentials are summed, the residents' logits are looked through in sixteen lanes, and scores are made for those alone that
//! matter. Shapes: logits `[experts]`, ids and weights `[top_k]`.
//!
//! There is no short way where there is none for top-k (see `routing/token`), on top of `phase`, and with a state that this router
//! has not seen yet.
//!
//! Knows nothing of batches, capacities, selection biases or groups.

use super::swap::{Terms, how_many, is_in};
use super::{CacheRouter, running};
use crate::expert::{ExpertId, ExpertSet};
use crate::routing::assignment::{Assignment, scale_weights};
use crate::routing::router::{RouteState, Scratch, TokenRequest};
use crate::routing::scores::Scoring;
use crate::routing::slots::sort_few;
use crate::routing::token::{best_of, is_plain, is_same_by_score, rank_for};
use crate::simd::score::exp;
use crate::simd::select::{at_least_of, leading, sixteen};
use crate::simd::{Kernel, LANES, Lanes};

/// What tokens of layers of one shape need; made again for another.
#[derive(Default)]
struct Buffers {
    experts: usize,
    top_k: usize,
    /// Ranks among the lanes' largest at which the best and, by how many are wanted, the stand-ins are found.
    rank: usize,
    stand_in_ranks: [usize; LANES],
    /// The residents that a token does not hold: bits, and their logits.
    free: Vec<u64>,
    logits: Vec<[f32; LANES]>,
}

impl Buffers {
    #[cold]
    fn prepare(&mut self, experts: usize, top_k: usize) {
        let stand_ins = |wanted| rank_for((experts / 2).max(LANES + 1), wanted + 1);
        (self.experts, self.top_k) = (experts, top_k);
        (self.rank, self.stand_in_ranks) = (rank_for(experts, top_k + 1), std::array::from_fn(stand_ins));
        self.free.resize(experts.div_ceil(64), 0);
        self.logits.resize(experts.div_ceil(LANES), [f32::NEG_INFINITY; LANES]);
    }
}

impl CacheRouter {
    /// Routes one token; false where there is no short way, and nothing has changed.
    #[inline]
    pub(super) fn route_one(
        &self,
        request: &TokenRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> bool {
        let (logits, top_k, context) = (request.logits(), request.top_k(), request.context());
        let known = self.is_known(logits.len(), state) && (self.target_hit_rate.is_some() || state.bonus.is_none());
        if self.phase.is_some() || !is_plain(request) || !known {
            return false;
        }
        let isa = scratch.isa();
        let buffers: &mut Buffers = scratch.of();
        if (buffers.experts, buffers.top_k) != (logits.len(), top_k) {
            buffers.prepare(logits.len(), top_k);
        }
        let (mut ids, mut weights) = ([0; LANES], [0.0; LANES]);
        let token = SwapOne {
            logits,
            scoring: request.scoring(),
            top_k,
            router: self,
            bonus: self.bonus_in(state),
            range: state.score_range,
            resident: context.resident.map_or(&[][..], ExpertSet::words),
            buffers,
            ids: &mut ids,
            weights: &mut weights,
        };
        let Some(range) = isa.run(token) else { return false };
        state.score_range = Some(range);
        let (chosen, weights) = (&ids[..top_k], &weights[..top_k]);
        if let Some(affinity) = &mut state.affinity {
            chosen.iter().for_each(|&expert| affinity.use_expert(ExpertId::from_raw(expert), context.step));
        }
        if self.target_hit_rate.is_some() {
            self.bonus_now(state);
            if let Some(resident) = context.resident {
                let hits = chosen.iter().filter(|&&expert| is_in(resident.words(), expert)).count();
                self.steer(hits as u32, top_k as u32, state);
            }
        }
        assignment.refill_token(logits.len(), chosen, weights);
        true
    }
}

/// One token: its best experts, swaps for residents, weights. Gives the new running score range; `None` where the order of
/// logits may not be that of scores.
struct SwapOne<'a> {
    logits: &'a [f32],
    scoring: &'a Scoring,
    top_k: usize,
    router: &'a CacheRouter,
    bonus: f64,
    range: Option<f64>,
    resident: &'a [u64],
    buffers: &'a mut Buffers,
    ids: &'a mut [u16; LANES],
    weights: &'a mut [f32; LANES],
}

impl Kernel for SwapOne<'_> {
    type Output = Option<f64>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Option<f64> {
        let Self { logits, scoring, top_k, router, bonus, range, resident, buffers, ids, weights } = self;
        let top = best_of::<L, true>(lanes, logits, top_k, buffers.rank)?;
        let range = running(range, f64::from(top.extremes.1) - f64::from(top.extremes.0));
        let (mut scores, mut numbers) = ([0.0; LANES], [0.0; LANES]);
        lanes.store(top.scores, &mut scores);
        lanes.store(top.ids, &mut numbers);
        let mut chosen = numbers.map(|number: f32| number.to_bits() as u16);

        let lift = bonus * range;
        let terms = Terms { lift, max_mass_loss: router.max_mass_loss, keep_top: router.keep_top };
        // Bits of the slots whose expert may go.
        let mut missing = 0u32;
        if lift > 0.0 && !resident.is_empty() {
            for (slot, &expert) in chosen[..top_k].iter().enumerate().skip(terms.keep_top) {
                missing |= u32::from(!is_in(resident, expert)) << slot;
            }
        }
        if missing != 0 {
            let (lowest, count) = (missing.ilog2() as usize, missing.count_ones() as usize);
            let threshold = ((f64::from(scores[lowest]) - lift) as f32).next_down();
            let mut few = [0; 2];
            let free = free_of(resident, &chosen[..top_k], &mut buffers.free, &mut few);
            // None below the threshold comes in, so usually few have to be looked at; a little lower, so that rounding loses none.
            let (largest, share) = (lanes.fold_max(top.largest), lanes.fold_max(top.share));
            let floor = threshold / share;
            let split = if floor >= f32::MIN_POSITIVE { largest + ln_below(floor) - 1e-3 } else { f32::MIN };
            let mut found = at_least_of(lanes, logits, Some(free), lanes.splat(split.max(f32::MIN)));
            let (mut wanted, mut all) = (count.min(found.count), true);
            if found.count > LANES {
                let most = gather(lanes, logits, free, &mut buffers.logits);
                (wanted, all) = (count.min(free.iter().map(|word| word.count_ones() as usize).sum()), false);
                found =
                    leading(lanes, buffers.logits.as_flattened(), most, wanted + 1, buffers.stand_in_ranks[wanted])?;
            }
            if wanted > 0 {
                let order = lanes.argsort(found.values, found.count);
                if !is_same_by_score(lanes, (found.values, found.count), order, top.largest, wanted, all) {
                    return None;
                }
                let values = lanes.mul(exp(lanes, lanes.sub(found.values, top.largest)), top.share);
                let (mut coming, mut numbers) = ([0.0; LANES], [0.0; LANES]);
                lanes.store(lanes.permute(values, order), &mut coming);
                lanes.store(lanes.permute(found.ids, order), &mut numbers);
                let (mut misses, mut at) = ([0; LANES], 0);
                for slot in (0..top_k).rev() {
                    misses[at] = slot;
                    at += (missing >> slot & 1) as usize;
                }
                let misses = &misses[..count];
                let stand_ins = coming[..wanted].iter().take_while(|&&score| score > threshold).count();
                // Selection scores are gate scores here.
                let of_slot = |slot: usize| (scores[slot], scores[slot]);
                let swaps = how_many(&terms, top_k, misses, of_slot, stand_ins, |at| (coming[at], coming[at]));
                for (at, &slot) in misses[..swaps].iter().enumerate() {
                    (scores[slot], chosen[slot]) = (coming[at], numbers[at].to_bits() as u16);
                }
                if swaps > 0 {
                    sort_lanes(lanes, top_k, &mut scores, &mut chosen);
                }
            }
        }
        *weights = scores;
        weights[top_k..].fill(0.0);
        scale_weights(&mut weights[..top_k], scoring.normalize, scoring.scale);
        *ids = chosen;
        Some(range)
    }
}

/// Bits of the residents that are not `chosen`. Those of a usual layer stay in registers, because to change one bit after another of
/// a word in memory takes long.
#[inline(always)]
fn free_of<'a>(resident: &[u64], chosen: &[u16], many: &'a mut [u64], few: &'a mut [u64; 2]) -> &'a [u64] {
    if let [low, rest @ ..] = resident
        && rest.len() < 2
    {
        let mut taken = [0u64; 2];
        for &expert in chosen {
            let bit = 1 << (expert % 64);
            taken[0] |= if expert < 64 { bit } else { 0 };
            taken[1] |= if expert < 64 { 0 } else { bit };
        }
        *few = [low & !taken[0], rest.first().unwrap_or(&0) & !taken[1]];
        return few;
    }
    many.copy_from_slice(resident);
    for &expert in chosen {
        many[usize::from(expert / 64)] &= !(1 << (expert % 64));
    }
    many
}

/// Writes down the logits of the experts that are `free`, −∞ for the others; gives the largest of each lane.
#[inline(always)]
fn gather<L: Lanes>(lanes: L, logits: &[f32], free: &[u64], row: &mut [[f32; LANES]]) -> L::Vector {
    let least = lanes.splat(f32::NEG_INFINITY);
    let mut most = least;
    let (whole, rest) = logits.as_chunks::<LANES>();
    for (at, logits) in whole.iter().enumerate() {
        let part = lanes.blend(sixteen(Some(free), at), lanes.load(logits), least);
        most = lanes.max(most, part);
        lanes.store(part, &mut row[at]);
    }
    if !rest.is_empty() {
        let part = lanes.blend(sixteen(Some(free), whole.len()), lanes.load_part(rest, f32::NEG_INFINITY), least);
        most = lanes.max(most, part);
        lanes.store(part, &mut row[whole.len()]);
    }
    most
}

/// At most `ln(value)`, but for rounding, and no more than 0.06 below it, for a normal number above 0: `m − 1 ≤ log₂ m` for a mantissa.
#[inline(always)]
fn ln_below(value: f32) -> f32 {
    let bits = value.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    let mantissa = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    (exponent as f32 + (mantissa - 1.0)) * std::f32::consts::LN_2
}

/// Sorts the first `count` of both: best score first, ties to the lowest id.
#[inline(always)]
fn sort_lanes<L: Lanes>(lanes: L, count: usize, scores: &mut [f32; LANES], chosen: &mut [u16; LANES]) {
    let behind = (0xffff_u32 << count) as u16;
    let values = lanes.blend(behind, lanes.splat(f32::NEG_INFINITY), lanes.load(scores));
    let order = lanes.argsort(values, count);
    let sorted = lanes.permute(values, order);
    let next = lanes.permute(values, order >> 4);
    lanes.store(sorted, scores);
    let from = *chosen;
    for (place, chosen) in chosen[..count].iter_mut().enumerate() {
        *chosen = from[(order >> (4 * place)) as usize % LANES];
    }
    if u32::from(lanes.ge(next, sorted)) & ((1 << (count - 1)) - 1) != 0 {
        sort_few(
            &mut (scores, chosen),
            count,
            |(scores, chosen), a, b| scores[a] > scores[b] || (scores[a] == scores[b] && chosen[a] < chosen[b]),
            |(scores, chosen), a, b| {
                scores.swap(a, b);
                chosen.swap(a, b);
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::Capacity;
    use crate::routing::logits::Logits;
    use crate::routing::phase::PhaseRouter;
    use crate::routing::router::{RouteContext, RouteRequest, Router};
    use crate::simd::Isa;
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};

    fn set(bits: &[bool]) -> ExpertSet {
        let mut set = ExpertSet::new(bits.len()).unwrap();
        for expert in (0..bits.len()).filter(|&expert| bits[expert]) {
            set.insert(ExpertId::from_raw(expert as u16));
        }
        set
    }

    /// Tokens of one layer, of one kind of logits.
    fn tokens() -> impl Strategy<Value = Vec<Vec<f32>>> {
        let experts = prop_oneof![Just(1usize), Just(8), Just(16), Just(17), Just(64), Just(128), 1usize..200];
        let value = prop_oneof![
            4 => Just((-4.0f32..4.0).boxed()),
            4 => Just((-0.5f32..0.5).boxed()),
            2 => Just((-4.0f32..4.0).prop_map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).boxed()),
            1 => Just(prop_oneof![6 => -4.0f32..4.0, 1 => Just(f32::NEG_INFINITY)].boxed()),
            1 => Just((0u8..5).prop_map(f32::from).boxed()),
            1 => Just((0u32..400).prop_map(|ulps| f32::from_bits(1.0f32.to_bits() + ulps)).boxed()),
            1 => Just((-120.0f32..0.0).boxed()),
            1 => Just(prop_oneof![Just(f32::MAX), Just(f32::MIN), Just(0.0f32), -1e38f32..1e38].boxed()),
        ];
        (experts, value).prop_flat_map(|(experts, value)| {
            prop::collection::vec(prop::collection::vec(value, experts..=experts), 2..5)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        /// The definition: scores, the router, its state.
        #[test]
        fn at_once_is_bit_equal_to_the_router(
            tokens in tokens(),
            top_k in prop_oneof![3 => 1usize..=16, 1 => 1usize..=40],
            residents in prop::collection::vec(prop::collection::vec(prop::bool::weighted(0.4), 200), 5),
            (bonus, loss, keep) in (prop_oneof![Just(0.0f64), 0.0f64..0.6, 0.0f64..3.0], prop_oneof![Just(0.0f64), 0.0f64..0.4, Just(1.0)], 0usize..4),
            target in prop::option::of(0.0f64..=1.0),
            normalize: bool,
            scale in prop_oneof![4 => Just(1.0f32), 1 => Just(2.5f32)],
            known in prop::bool::weighted(0.9),
        ) {
            let experts = tokens[0].len();
            let top_k = top_k.min(experts);
            let scoring = Scoring { scale, ..Scoring::softmax().normalized(normalize) };
            let mut router = CacheRouter::new(bonus, loss).unwrap().with_keep_top(keep);
            if let Some(target) = target {
                router = router.with_target_hit_rate(target).unwrap();
            }
            let capacity = Capacity::unlimited(experts).unwrap();
            for isa in Isa::all() {
                let (mut scratch, mut assignment) = (Scratch::on(isa), Assignment::default());
                let (mut state, mut wanted_state) = (RouteState::default(), RouteState::default());
                for (step, (logits, resident)) in tokens.iter().zip(&residents).enumerate() {
                    let resident = set(&resident[..experts]);
                    let context = RouteContext { step: step as u64, resident: known.then_some(&resident), ..RouteContext::default() };
                    let scores = scoring.scores(&Logits::new(logits, 1, experts).unwrap(), None).unwrap();
                    let general = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
                    let wanted = router.route(&general, &mut wanted_state).unwrap();
                    let request = TokenRequest::new(logits, scoring, top_k, context).unwrap();
                    let (before, state_before) = (assignment.clone(), state.clone());
                    if router.route_token(&request, &mut state, &mut scratch, &mut assignment).unwrap() {
                        let bits = |made: &Assignment| made.weights().iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
                        prop_assert_eq!(bits(&assignment), bits(&wanted));
                    } else {
                        prop_assert_eq!(&assignment, &before);
                        prop_assert_eq!(&state, &state_before);
                        router.route_into(&general, &mut state, &mut scratch, &mut assignment).unwrap();
                    }
                    prop_assert_eq!(&assignment, &wanted);
                    prop_assert_eq!(&state, &wanted_state);
                }
            }
        }
    }

    #[test]
    fn ordinary_tokens_take_the_short_way() {
        let (mut rng, router) = (rand_chacha::ChaCha8Rng::seed_from_u64(3), CacheRouter::default());
        for isa in Isa::all() {
            // One scratch for layers of any shape.
            let (mut scratch, mut assignment) = (Scratch::on(isa), Assignment::default());
            for (experts, top_k) in [(8, 2), (32, 4), (64, 8), (128, 8), (256, 8)] {
                for cached in [experts / 4, experts / 2] {
                    let mut state = RouteState::default();
                    router.prepare(experts, &mut state).unwrap();
                    let short = (1..=1000u64).filter(|&step| {
                        let logits: Vec<f32> = (0..experts).map(|_| rng.random_range(-4.0..4.0)).collect();
                        let mut bits = vec![false; experts];
                        (0..cached).for_each(|_| bits[rng.random_range(0..experts)] = true);
                        let context = RouteContext { step, resident: Some(&set(&bits)), ..RouteContext::default() };
                        let request = TokenRequest::new(&logits, Scoring::softmax(), top_k, context).unwrap();
                        router.route_token(&request, &mut state, &mut scratch, &mut assignment).unwrap()
                    });
                    let short = short.count();
                    assert!(short >= 960, "{isa:?} {experts} {top_k}: {short} of 1000");
                }
            }
        }
    }

    #[test]
    fn what_has_no_short_way_changes_nothing() {
        let routers = [CacheRouter::default(), CacheRouter::default().with_phase(PhaseRouter::default())];
        for (router, warm) in routers.iter().flat_map(|router| [(router, false), (router, true)]) {
            let (mut state, mut scratch) = (RouteState::default(), Scratch::default());
            if warm {
                router.prepare(40, &mut state).unwrap();
            }
            let before = state.clone();
            let mut answered = |logits: &[f32], scoring| {
                let mut assignment = Assignment::default();
                let request = TokenRequest::new(logits, scoring, 5, RouteContext::default()).unwrap();
                let answered = router.route_token(&request, &mut state, &mut scratch, &mut assignment).unwrap();
                assert!(answered || (assignment == Assignment::default() && state == before));
                answered
            };
            let mut logits: Vec<f32> = (0..40).map(|expert| expert as f32 * 0.25).collect();
            assert!(!answered(&logits, Scoring::sigmoid()));
            assert!(!answered(&logits[..39], Scoring::softmax()));
            for bad in [f32::NAN, f32::INFINITY] {
                let usual = std::mem::replace(&mut logits[7], bad);
                assert!(!answered(&logits, Scoring::softmax()));
                logits[7] = usual;
            }
            assert_eq!(answered(&logits, Scoring::softmax()), warm && router.phase.is_none());
        }
    }
}
