//! One token in decode through the memory-aware router at once: selection, swaps, combine weights, misses and the books, without
//! an allocation.
//!
//! Bit-equal to [`CacheRouter`] on the token's softmax, state included, only faster: the experts are selected by logit while the
//! exponentials are summed, the residents' logits are looked through in sixteen lanes, and scores are made for those alone that
//! matter. Tokens whose order by logit might not be that by score, and those with masks, take the general way. Shapes: logits
//! `[experts]`, ids and weights `[top_k]`.
//!
//! ```
//! use phase_moe::expert::{ExpertId, ExpertSet};
//! use phase_moe::routing::cache_aware::{CacheRouter, token::CacheTokenRouter};
//! use phase_moe::routing::{router::RouteState, scores::Scoring};
//!
//! let mut router = CacheTokenRouter::new(CacheRouter::default(), Scoring::softmax(), 4, 2)?;
//! let (mut state, mut resident) = (RouteState::default(), ExpertSet::new(4)?);
//! resident.insert(ExpertId::new(2, 4)?);
//! let token = router.route(&[2.0, 1.0, 0.9, -3.0], 7, &mut state, Some(&resident))?;
//! assert_eq!(token.experts().iter().map(|id| id.index()).collect::<Vec<_>>(), [0, 2]);
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of batches, capacities, selection biases or groups.

use super::swap::{Terms, how_many, is_in};
use super::{CacheRouter, MOST_BONUS, running};
use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};
use crate::routing::assignment::{Assignment, check_top_k, scale_weights};
use crate::routing::capacity::Capacity;
use crate::routing::logits::Logits;
use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router, Scratch};
use crate::routing::scores::{ScoreFunction, Scores, Scoring};
use crate::routing::token::{RoutedToken, best_of, is_settled};
use crate::simd::score::exp;
use crate::simd::select::{Guess, at_least_of, leading, sixteen};
use crate::simd::{Isa, Kernel, LANES, Lanes};

/// Routes one token after another of one layer; holds the buffers.
#[derive(Debug)]
pub struct CacheTokenRouter {
    router: CacheRouter,
    scoring: Scoring,
    experts: usize,
    top_k: usize,
    isa: Isa,
    /// Ranks among the lanes' largest at which the best and, by how many are wanted, the stand-ins are found; `None` where only
    /// the general way can go.
    guesses: Option<(usize, [usize; LANES])>,
    /// Room for a vector at least; the first `count` count.
    ids: Vec<ExpertId>,
    weights: Vec<f32>,
    count: usize,
    missing: ExpertSet,
    near: Near,
    general: General,
}

/// The residents that a token does not hold: bits, and their logits.
#[derive(Debug, Default)]
struct Near {
    free: Vec<u64>,
    logits: Vec<[f32; LANES]>,
}

#[derive(Debug)]
struct General {
    scores: Scores,
    capacity: Capacity,
    scratch: Scratch,
    assignment: Assignment,
}

impl CacheTokenRouter {
    /// For tokens of a layer of `experts` of which each takes `top_k`.
    ///
    /// # Errors
    /// [`Error::ExpertCount`], [`Error::TopKZero`], [`Error::TopKExceedsExperts`]; [`Error::Parameter`] for a router on top of
    /// `phase`, a scoring other than softmax without groups, and a scale that is not finite.
    pub fn new(router: CacheRouter, scoring: Scoring, experts: usize, top_k: usize) -> Result<Self> {
        let missing = ExpertSet::new(experts)?;
        check_top_k(top_k, experts)?;
        if router.phase.is_some() {
            return Err(Error::parameter("router of a token", "cache+phase", "cache: one token has no limits"));
        }
        if scoring.function != ScoreFunction::Softmax || scoring.groups.is_some() {
            return Err(Error::parameter("scoring of a token", format!("{scoring:?}"), "softmax without groups"));
        }
        if !scoring.scale.is_finite() {
            return Err(Error::parameter("scale", scoring.scale, "a finite number"));
        }
        let rank = |experts: usize, wanted: usize| match Guess::cold(experts, wanted.min(LANES)) {
            Guess::Lanes(rank) => rank,
            Guess::About(..) => 0,
        };
        let stand_ins = std::array::from_fn(|wanted| rank((experts / 2).max(LANES + 1), wanted + 1));
        let guesses = (top_k < LANES).then(|| (rank(experts, top_k + 1), stand_ins));
        let room = top_k.max(LANES);
        let rows = experts.div_ceil(LANES);
        let general = General {
            scores: Scores::default(),
            capacity: Capacity::unlimited(experts)?,
            scratch: Scratch::default(),
            assignment: Assignment::default(),
        };
        let most_swaps = CacheRouter { keep_top: 0, ..CacheRouter::new(MOST_BONUS, 1.0)? };
        let mut made = Self {
            router: most_swaps,
            scoring,
            experts,
            top_k,
            isa: Isa::detect(),
            guesses,
            ids: vec![ExpertId::from_raw(0); room],
            weights: vec![0.0; room],
            count: 0,
            missing: missing.clone(),
            near: Near { free: vec![0; experts.div_ceil(64)], logits: vec![[f32::NEG_INFINITY; LANES]; rows] },
            general,
        };
        // The buffers of the general way as large as they get: with a mask, and with as many swaps as there can be.
        let (mut logits, mut resident) =
            ((0..experts).map(|at| at as f32 / experts as f32).collect::<Vec<_>>(), missing);
        (0..experts - top_k).for_each(|expert| {
            resident.insert(ExpertId::from_raw(expert as u16));
        });
        for first in [0.0, f32::NEG_INFINITY] {
            logits[0] = first;
            made.route_generally(&logits, 0, &mut RouteState::default(), Some(&resident))?;
        }
        made.router = router;
        Ok(made)
    }

    /// The same on `isa` rather than on the widest instructions there are.
    pub fn on(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self.general.scores.set_isa(isa);
        self.general.scratch = Scratch::on(isa);
        self
    }

    /// Routes the token with these `logits` in `step`; `state` is the layer's, as of any router. Without a resident set nothing
    /// is swapped and all are missing. What comes back is lent until the next call.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits or a resident set of another number of experts, [`Error::NonFiniteLogit`] for NaN or +∞;
    /// nothing has changed then.
    #[inline]
    pub fn route(
        &mut self,
        logits: &[f32],
        step: u64,
        state: &mut RouteState,
        resident: Option<&ExpertSet>,
    ) -> Result<RoutedToken<'_>> {
        if let Some(got) = resident.map(ExpertSet::experts).filter(|&experts| experts != self.experts) {
            let experts = |count: usize| format!("{count} experts");
            return Err(Error::shape("resident experts", experts(self.experts), experts(got)));
        }
        if !(logits.len() == self.experts && self.route_shortly(logits, step, state, resident)) {
            self.route_generally(logits, step, state, resident)?;
        }
        let Self { ids, weights, count, missing, .. } = self;
        missing.refill_missing(&ids[..*count], resident);
        Ok(RoutedToken::new(&ids[..*count], &weights[..*count], missing))
    }

    /// The short way; false where it does not lead there, and nothing has changed.
    #[inline]
    fn route_shortly(
        &mut self,
        logits: &[f32],
        step: u64,
        state: &mut RouteState,
        resident: Option<&ExpertSet>,
    ) -> bool {
        let Self { router, scoring, top_k, isa, guesses, ids, weights, near, .. } = self;
        let (Some(guesses), Some(ids), Some(weights)) = (guesses, ids.first_chunk_mut(), weights.first_chunk_mut())
        else {
            return false;
        };
        if !router.is_known(logits.len(), state) || router.target_hit_rate.is_none() && state.bonus.is_some() {
            return false;
        }
        let bonus = router.bonus_in(state);
        let resident_bits = resident.map_or(&[][..], ExpertSet::words);
        let token = Token {
            logits,
            scoring,
            top_k: *top_k,
            guesses,
            router,
            bonus,
            range: state.score_range,
            resident: resident_bits,
            near,
            ids,
            weights,
        };
        let Some(range) = isa.run(token) else { return false };
        state.score_range = Some(range);
        self.count = *top_k;
        let chosen = &ids[..*top_k];
        if let Some(affinity) = &mut state.affinity {
            chosen.iter().for_each(|&expert| affinity.use_expert(expert, step));
        }
        if router.target_hit_rate.is_some() {
            router.bonus_now(state);
            if let Some(resident) = resident {
                let hits = chosen.iter().filter(|&&expert| resident.contains(expert)).count();
                router.steer(hits as u32, *top_k as u32, state);
            }
        }
        true
    }

    #[cold]
    #[inline(never)]
    fn route_generally(
        &mut self,
        logits: &[f32],
        step: u64,
        state: &mut RouteState,
        resident: Option<&ExpertSet>,
    ) -> Result<()> {
        let General { scores, capacity, scratch, assignment } = &mut self.general;
        self.scoring.scores_into(&Logits::new(logits, 1, self.experts)?, None, scores)?;
        let context = RouteContext { step, resident, ..RouteContext::default() };
        let request = RouteRequest::new(scores, self.top_k, capacity, context)?;
        self.router.route_into(&request, state, scratch, assignment)?;
        self.count = 0;
        for (expert, weight) in assignment.slots(0) {
            (self.ids[self.count], self.weights[self.count]) = (expert, weight);
            self.count += 1;
        }
        Ok(())
    }
}

/// One token: its best experts, swaps for residents, weights. Gives the new running score range; `None` where the order of
/// logits may not be that of scores.
struct Token<'a> {
    logits: &'a [f32],
    scoring: &'a Scoring,
    top_k: usize,
    guesses: &'a (usize, [usize; LANES]),
    router: &'a CacheRouter,
    bonus: f64,
    range: Option<f64>,
    resident: &'a [u64],
    near: &'a mut Near,
    ids: &'a mut [ExpertId; LANES],
    weights: &'a mut [f32; LANES],
}

impl Kernel for Token<'_> {
    type Output = Option<f64>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Option<f64> {
        let Self { logits, scoring, top_k, guesses, router, bonus, range, resident, near, ids, weights } = self;
        let top = best_of::<L, true>(lanes, logits, top_k, guesses.0)?;
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
            let free = free_of(resident, &chosen[..top_k], &mut near.free, &mut few);
            // Nobody below the threshold comes in, so usually few have to be looked at; a little lower, so that rounding loses none.
            let (largest, share) = (lanes.fold_max(top.largest), lanes.fold_max(top.share));
            let floor = threshold / share;
            let split = if floor >= f32::MIN_POSITIVE { largest + ln_below(floor) - 1e-3 } else { f32::MIN };
            let mut found = at_least_of(lanes, logits, Some(free), lanes.splat(split.max(f32::MIN)));
            let (mut wanted, mut all) = (count.min(found.count), true);
            if found.count > LANES {
                let most = gather(lanes, logits, free, &mut near.logits);
                (wanted, all) = (count.min(free.iter().map(|word| word.count_ones() as usize).sum()), false);
                found = leading(lanes, near.logits.as_flattened(), most, wanted + 1, guesses.1[wanted])?;
            }
            if wanted > 0 {
                let order = lanes.falling(found.values, found.count);
                if !is_settled(lanes, (found.values, found.count), order, top.largest, wanted, all) {
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
        for (id, &expert) in ids.iter_mut().zip(&chosen) {
            *id = ExpertId::from_raw(expert);
        }
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

/// Writes down the logits of those who are `free`, −∞ for the others; gives the largest of each lane.
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
    let order = lanes.falling(values, count);
    let sorted = lanes.permute(values, order);
    let next = lanes.permute(values, order >> 4);
    lanes.store(sorted, scores);
    let from = *chosen;
    for (place, chosen) in chosen[..count].iter_mut().enumerate() {
        *chosen = from[(order >> (4 * place)) as usize % LANES];
    }
    if u32::from(lanes.ge(next, sorted)) & ((1 << (count - 1)) - 1) != 0 {
        sort(&mut scores[..count], &mut chosen[..count]);
    }
}

/// The same, whatever the numbers.
#[inline(always)]
fn sort(scores: &mut [f32], chosen: &mut [u16]) {
    for slot in 1..scores.len() {
        let mut place = slot;
        while place > 0
            && (scores[place] > scores[place - 1]
                || scores[place] == scores[place - 1] && chosen[place] < chosen[place - 1])
        {
            scores.swap(place, place - 1);
            chosen.swap(place, place - 1);
            place -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                let mut at_once = CacheTokenRouter::new(router.clone(), scoring, experts, top_k).unwrap().on(isa);
                let (mut state, mut wanted_state) = (RouteState::default(), RouteState::default());
                for (step, (logits, resident)) in tokens.iter().zip(&residents).enumerate() {
                    let resident = set(&resident[..experts]);
                    let context = RouteContext { step: step as u64, resident: known.then_some(&resident), ..RouteContext::default() };
                    let scores = scoring.scores(&Logits::new(logits, 1, experts).unwrap(), None).unwrap();
                    let request = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
                    let wanted = router.route(&request, &mut wanted_state).unwrap();
                    let token = at_once.route(logits, step as u64, &mut state, context.resident).unwrap();
                    let wanted: Vec<(ExpertId, u32)> = wanted.slots(0).map(|(id, weight)| (id, weight.to_bits())).collect();
                    let weights = token.weights().iter().map(|weight| weight.to_bits());
                    prop_assert_eq!(token.experts().iter().copied().zip(weights).collect::<Vec<_>>(), wanted.clone());
                    let missing: Vec<ExpertId> = token.missing().iter().collect();
                    let mut absent: Vec<ExpertId> = wanted.iter().map(|(id, _)| *id).collect();
                    absent.retain(|id| !(known && resident.contains(*id)));
                    absent.sort();
                    prop_assert_eq!(missing, absent);
                    prop_assert_eq!(&state, &wanted_state);
                }
            }
        }
    }

    #[test]
    fn ordinary_tokens_take_the_short_way() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for (experts, top_k) in [(8, 2), (32, 4), (64, 8), (128, 8), (256, 8)] {
            for cached in [experts / 4, experts / 2] {
                for isa in Isa::all() {
                    let router = CacheRouter::default();
                    let mut router = CacheTokenRouter::new(router, Scoring::softmax(), experts, top_k).unwrap().on(isa);
                    let mut state = RouteState::default();
                    router.route(&vec![0.5; experts], 0, &mut state, None).unwrap();
                    let short = (1..=1000u64).filter(|&step| {
                        let logits: Vec<f32> = (0..experts).map(|_| rng.random_range(-4.0..4.0)).collect();
                        let mut bits = vec![false; experts];
                        (0..cached).for_each(|_| bits[rng.random_range(0..experts)] = true);
                        router.route_shortly(&logits, step, &mut state, Some(&set(&bits)))
                    });
                    let short = short.count();
                    assert!(short >= 960, "{isa:?} {experts} {top_k}: {short} of 1000");
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_changes_nothing() {
        let phase = CacheRouter::default().with_phase(crate::routing::phase::PhaseRouter::default());
        let message = CacheTokenRouter::new(phase, Scoring::softmax(), 8, 2).unwrap_err().to_string();
        assert_eq!(message, "router of a token is cache+phase: expected cache: one token has no limits");
        assert!(CacheTokenRouter::new(CacheRouter::default(), Scoring::sigmoid(), 8, 2).is_err());
        let mut router = CacheTokenRouter::new(CacheRouter::default(), Scoring::softmax(), 40, 5).unwrap();
        for warm in [false, true] {
            let mut state = RouteState::default();
            if warm {
                router.route(&[0.5; 40], 1, &mut state, None).unwrap();
            }
            let before = state.clone();
            for bad in [f32::NAN, f32::INFINITY] {
                let mut logits = vec![0.5; 40];
                logits[7] = bad;
                let wanted = Logits::new(&logits, 1, 40).unwrap_err().to_string();
                assert_eq!(router.route(&logits, 2, &mut state, None).unwrap_err().to_string(), wanted);
            }
            assert!(router.route(&[0.5; 39], 2, &mut state, None).is_err());
            let other = ExpertSet::new(9).unwrap();
            let message = router.route(&[0.5; 40], 2, &mut state, Some(&other)).unwrap_err().to_string();
            assert_eq!(message, "resident experts: expected 40 experts, got 9 experts");
            assert_eq!(state, before);
        }
    }
}
