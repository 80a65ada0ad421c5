//! One token in decode: its best experts, their combine weights, which of them are not resident, and the note of their use, in
//! one call: [`TokenRouter`].
//!
//! `ids = the top_k largest of softmax(logits)`, best first, ties to the lowest id; `weights = softmax(logits)[ids] · scale`, or
//! divided by their sum where the model normalises; `missing = ids \ resident`. Shapes: logits `[experts]`, ids and weights
//! `[top_k]`, or shorter where fewer experts are not masked.
//!
//! All of it is bit-equal to scoring, [`TopK`](crate::routing::topk::TopK) and [`Requests`](crate::offload::requests::Requests),
//! only faster, because nothing waits for the scores: softmax keeps the order of the logits, so the experts are selected by logit
//! while the exponentials are summed, and scores are made for the selected alone. Rounding may turn two logits that hardly differ
//! into equal scores; such tokens, like those with too many equals or too few experts that are not masked, take the general way.
//!
//! ```
//! use phase_moe::expert::{ExpertId, ExpertSet};
//! use phase_moe::routing::affinity::{Affinity, Decay};
//! use phase_moe::routing::{scores::Scoring, token::TokenRouter};
//!
//! let mut router = TokenRouter::new(Scoring::softmax(), 4, 2)?;
//! let mut affinity = Affinity::new(4, Decay::default())?;
//! let mut resident = ExpertSet::new(4)?;
//! resident.insert(ExpertId::new(0, 4)?);
//! let token = router.route(&[2.0, 1.0, 0.9, f32::NEG_INFINITY], 7, &mut affinity, Some(&resident))?;
//! assert_eq!(token.experts().iter().map(|id| id.index()).collect::<Vec<_>>(), [0, 1]);
//! assert_eq!(token.missing().iter().map(ExpertId::index).collect::<Vec<_>>(), [1]);
//! assert!(token.weights()[0] > token.weights()[1]);
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Source: top-k routing (Shazeer et al. 2017, arXiv 1701.06538). Knows nothing of batches, capacities, selection biases or
//! groups.

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet};
use crate::routing::affinity::Affinity;
use crate::routing::assignment::{EMPTY, check_top_k, scale_weights};
use crate::routing::capacity::Capacity;
use crate::routing::logits::Logits;
use crate::routing::router::{RouteContext, RouteRequest};
use crate::routing::scores::{ScoreFunction, Scores, Scoring};
use crate::routing::select::Selector;
use crate::routing::topk::choose;
use crate::simd::score::exp;
use crate::simd::select::{Guess, leading};
use crate::simd::{Isa, Kernel, LANES, Lanes};

/// Logits (less the largest one) that differ by this or more have scores in the same order: the exponentials then differ by
/// sixty times their error.
const APART: f32 = 1.0 / 65_536.0;

/// At least this far from the largest logit a score is a normal number, whatever the number of experts: `e^−75 / 65535 > 2^−126`.
const NORMAL: f32 = -75.0;

/// Routes one token after another of one layer; holds the buffers, so that nothing is allocated per token.
#[derive(Clone, Debug)]
pub struct TokenRouter {
    scoring: Scoring,
    experts: usize,
    top_k: usize,
    /// Rank among the lanes' largest at which enough experts are found; `None` where only the general way can go.
    guess: Option<usize>,
    isa: Isa,
    /// Room for a vector at least; the first `count` count.
    ids: Vec<ExpertId>,
    weights: Vec<f32>,
    count: usize,
    missing: ExpertSet,
    general: General,
}

/// The general way: scores of all experts, then the choice among them.
#[derive(Clone, Debug)]
struct General {
    scores: Scores,
    capacity: Capacity,
    selector: Selector,
    chosen: Vec<u16>,
}

/// What a token got, best expert first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoutedToken<'a> {
    experts: &'a [ExpertId],
    weights: &'a [f32],
    missing: &'a ExpertSet,
}

impl<'a> RoutedToken<'a> {
    pub(super) fn new(experts: &'a [ExpertId], weights: &'a [f32], missing: &'a ExpertSet) -> Self {
        Self { experts, weights, missing }
    }

    /// The experts, `[top_k]`; fewer where the others are masked.
    pub fn experts(&self) -> &'a [ExpertId] {
        self.experts
    }

    /// Their combine weights.
    pub fn weights(&self) -> &'a [f32] {
        self.weights
    }

    /// Those that are not resident.
    pub fn missing(&self) -> &'a ExpertSet {
        self.missing
    }
}

impl TokenRouter {
    /// For tokens of a layer of `experts` of which each takes its `top_k` best.
    ///
    /// # Errors
    /// [`Error::ExpertCount`], [`Error::TopKZero`], [`Error::TopKExceedsExperts`]; [`Error::Parameter`] for a scoring other than
    /// softmax without groups, and for a scale that is not finite.
    pub fn new(scoring: Scoring, experts: usize, top_k: usize) -> Result<Self> {
        let missing = ExpertSet::new(experts)?;
        check_top_k(top_k, experts)?;
        if scoring.function != ScoreFunction::Softmax || scoring.groups.is_some() {
            return Err(Error::parameter("scoring of a token", format!("{scoring:?}"), "softmax without groups"));
        }
        if !scoring.scale.is_finite() {
            return Err(Error::parameter("scale", scoring.scale, "a finite number"));
        }
        // One more is looked at than is taken: whether the last one taken is better than the next has to be seen.
        let guess = match Guess::cold(experts, (top_k + 1).min(LANES)) {
            Guess::Lanes(rank) if top_k < LANES => Some(rank),
            _ => None,
        };
        let room = top_k.max(LANES);
        let general = General {
            scores: Scores::default(),
            capacity: Capacity::unlimited(experts)?,
            selector: Selector::new(experts, top_k),
            chosen: vec![EMPTY; top_k],
        };
        let (ids, weights) = (vec![ExpertId::from_raw(0); room], vec![0.0; room]);
        let router =
            Self { scoring, experts, top_k, guess, isa: Isa::detect(), ids, weights, count: 0, missing, general };
        router.warmed()
    }

    /// The same on `isa` rather than on the widest instructions there are.
    pub fn on(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self.general.scores.set_isa(isa);
        self
    }

    /// Routes the token with these `logits` and notes in `affinity` that `step` uses its experts; without a resident set all of
    /// them are missing. What comes back is lent until the next call.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits, an affinity or a resident set of another number of experts, [`Error::NonFiniteLogit`] for
    /// NaN or +∞; nothing has changed then.
    #[inline]
    pub fn route(
        &mut self,
        logits: &[f32],
        step: u64,
        affinity: &mut Affinity,
        resident: Option<&ExpertSet>,
    ) -> Result<RoutedToken<'_>> {
        let resident_of = resident.map_or(self.experts, ExpertSet::experts);
        if affinity.experts() != self.experts || resident_of != self.experts {
            return Err(self.misfit(affinity.experts(), resident_of));
        }
        if !(logits.len() == self.experts && self.select(logits)) {
            self.route_generally(logits)?;
        }
        let Self { ids, weights, count, missing, .. } = self;
        let (experts, weights) = (&ids[..*count], &weights[..*count]);
        for &expert in experts {
            affinity.use_expert(expert, step);
        }
        missing.refill_missing(experts, resident);
        Ok(RoutedToken { experts, weights, missing })
    }

    /// The short way; false where it does not lead there, or the logits are not right.
    #[inline]
    fn select(&mut self, logits: &[f32]) -> bool {
        let (Some(guess), Some(ids), Some(weights)) =
            (self.guess, self.ids.first_chunk_mut(), self.weights.first_chunk_mut())
        else {
            return false;
        };
        self.count = self.top_k;
        self.isa.run(Select { logits, scoring: &self.scoring, top_k: self.top_k, guess, ids, weights })
    }

    #[cold]
    #[inline(never)]
    fn route_generally(&mut self, logits: &[f32]) -> Result<()> {
        let Self { scoring, experts, top_k, isa, ids, weights, count, general, .. } = self;
        let General { scores, capacity, selector, chosen } = general;
        let logits = Logits::new(logits, 1, *experts)?;
        scoring.scores_into(&logits, None, scores)?;
        let request = RouteRequest::new(scores, *top_k, capacity, RouteContext::default())?;
        choose(&request, *isa, selector, chosen, &mut weights[..*top_k]);
        *count = chosen.iter().position(|&expert| expert == EMPTY).unwrap_or(*top_k);
        for (id, &expert) in ids.iter_mut().zip(&chosen[..*count]) {
            *id = ExpertId::from_raw(expert);
        }
        Ok(())
    }

    /// With the buffers of the general way as large as they get: a token with a mask needs all of them.
    fn warmed(mut self) -> Result<Self> {
        let mut logits = vec![0.0; self.experts];
        logits[0] = f32::NEG_INFINITY;
        self.route_generally(&logits)?;
        Ok(self)
    }

    #[cold]
    fn misfit(&self, affinity: usize, resident: usize) -> Error {
        let (operand, got) =
            if affinity == self.experts { ("resident experts", resident) } else { ("affinity", affinity) };
        Error::shape(operand, format!("{} experts", self.experts), format!("{got} experts"))
    }
}

/// Selects by logit, and makes the weights of the selected; false where the order of logits may not be that of scores.
struct Select<'a> {
    logits: &'a [f32],
    scoring: &'a Scoring,
    top_k: usize,
    guess: usize,
    ids: &'a mut [ExpertId; LANES],
    weights: &'a mut [f32; LANES],
}

impl Kernel for Select<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> bool {
        let Self { logits, scoring, top_k, guess, ids, weights } = self;
        let Some(top) = best_of::<L, false>(lanes, logits, top_k, guess) else { return false };
        if scoring.normalize {
            lanes.store(top.scores, weights);
            scale_weights(&mut weights[..top_k], true, scoring.scale);
        } else {
            lanes.store(lanes.mul(top.scores, lanes.splat(scoring.scale)), weights);
        }
        let mut numbers = [0.0; LANES];
        lanes.store(top.ids, &mut numbers);
        for (id, number) in ids.iter_mut().zip(numbers) {
            *id = ExpertId::from_raw(number.to_bits() as u16);
        }
        true
    }
}

/// The best of a row, best first, and what makes scores of its logits.
pub(super) struct Top<L: Lanes> {
    pub(super) scores: L::Vector,
    /// In the lowest bits of each float.
    pub(super) ids: L::Vector,
    /// The largest logit, and one over the sum of exponentials.
    pub(super) largest: L::Vector,
    pub(super) share: L::Vector,
    /// The smallest and the largest score, where they were asked for.
    pub(super) extremes: (f32, f32),
}

/// The best `top_k < 16` of a row of logits; `None` where the order of logits may not be that of scores, or some logit is not
/// allowed. Looks for the extreme scores with `RANGE`; then no logit may be masked.
#[inline(always)]
pub(super) fn best_of<L: Lanes, const RANGE: bool>(
    lanes: L,
    logits: &[f32],
    top_k: usize,
    guess: usize,
) -> Option<Top<L>> {
    let (whole, rest) = logits.as_chunks::<LANES>();
    let (limit, zero) = (lanes.splat(f32::MAX), lanes.splat(0.0));
    let last = lanes.load_part(rest, f32::NEG_INFINITY);
    let (mut most, mut within) = (last, lanes.ge(limit, last));
    for logits in whole {
        let logits = lanes.load(logits);
        most = lanes.max(most, logits);
        within &= lanes.ge(limit, logits);
    }
    let largest = lanes.fold_max(most);
    if within != u16::MAX || largest == f32::NEG_INFINITY {
        return None;
    }
    let largest = lanes.splat(largest);
    let found = leading(lanes, logits, most, top_k + 1, guess)?;

    // The same operations in the same order as in the softmax of a whole row.
    let (mut sum, mut high, mut low) = (zero, zero, lanes.splat(-1e30));
    for logits in whole {
        let power = exp(lanes, lanes.sub(lanes.load(logits), largest));
        sum = lanes.add(sum, power);
        if RANGE {
            high = lanes.max(high, power);
            low = lanes.max(low, lanes.sub(zero, power));
        }
    }
    if !rest.is_empty() {
        let power = exp(lanes, lanes.sub(last, largest));
        sum = lanes.add(sum, power);
        if RANGE {
            high = lanes.max(high, power);
            let behind = (0xffff_u32 << rest.len()) as u16;
            low = lanes.max(low, lanes.blend(behind, lanes.splat(-1e30), lanes.sub(zero, power)));
        }
    }
    let share = 1.0 / lanes.fold_sum(sum);
    let mut extremes = (0.0, 0.0);
    if RANGE {
        let low = -lanes.fold_max(low);
        // An exponential of 0 may be that of a masked logit.
        if low <= 0.0 {
            return None;
        }
        // Rounding keeps order, so the product of the smallest is the smallest product.
        extremes = (low * share, lanes.fold_max(high) * share);
    }
    let share = lanes.splat(share);
    let scores = lanes.mul(exp(lanes, lanes.sub(found.values, largest)), share);
    let order = lanes.falling(found.values, found.count);
    let all = logits.len() <= LANES;
    if !is_settled(lanes, (found.values, found.count), order, largest, top_k, all) {
        return None;
    }
    let (scores, ids) = (lanes.permute(scores, order), lanes.permute(found.ids, order));
    Some(Top { scores, ids, largest, share, extremes })
}

/// Whether the first `taken` of `values` in falling `order` would be the same by score; `all` says that there are no others.
#[inline(always)]
pub(super) fn is_settled<L: Lanes>(
    lanes: L,
    (values, count): (L::Vector, usize),
    order: u64,
    largest: L::Vector,
    taken: usize,
    all: bool,
) -> bool {
    let (these, next) = (lanes.permute(values, order), lanes.permute(values, order >> 4));
    let below = lanes.sub(these, largest);
    let apart = u32::from(lanes.ge(lanes.sub(below, lanes.sub(next, largest)), lanes.splat(APART)));
    let equal = u32::from(lanes.ge(next, these));
    let normal = u32::from(lanes.ge(below, lanes.splat(NORMAL)));
    // What comes after the last of those found is known only where it is nothing.
    let apart = match all {
        true => apart | 1 << (LANES - 1),
        false => apart & ((1 << (count - 1)) - 1),
    };
    let first = (1u32 << taken) - 1;
    // Equals of the last one taken come after it, until one that is worse beyond doubt.
    let end = taken - 1 + (!(equal >> (taken - 1))).trailing_zeros() as usize;
    normal & first == first && (apart | equal) & (first >> 1) == first >> 1 && apart >> end & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::requests::Requests;
    use crate::routing::affinity::Decay;
    use crate::routing::assignment::Assignment;
    use crate::routing::cache_aware::CacheRouter;
    use crate::routing::router::{RouteState, Router};
    use proptest::prelude::*;

    /// Ids, bits of weights, bits of the missing, affinity.
    type Outcome = (Vec<usize>, Vec<u32>, Vec<u64>, Affinity);

    /// The definition: scores, the choice among them, the requests, each by itself.
    fn generally(scoring: Scoring, tokens: &[Vec<f32>], top_k: usize, resident: &ExpertSet) -> Vec<Outcome> {
        let experts = resident.experts();
        let capacity = Capacity::unlimited(experts).unwrap();
        let (router, mut state) = (CacheRouter::new(0.0, 0.0).unwrap(), RouteState::default());
        let route = |(step, logits): (usize, &Vec<f32>)| {
            let scores = scoring.scores(&Logits::new(logits, 1, experts).unwrap(), None).unwrap();
            let context = RouteContext { step: step as u64, resident: Some(resident), ..RouteContext::default() };
            let request = RouteRequest::new(&scores, top_k, &capacity, context).unwrap();
            let assignment: Assignment = router.route(&request, &mut state).unwrap();
            let missing = Requests::new(&assignment, Some(resident)).unwrap().missing().words().to_vec();
            let (ids, weights) = assignment.slots(0).map(|(id, weight)| (id.index(), weight.to_bits())).unzip();
            (ids, weights, missing, state.affinity().unwrap().clone())
        };
        tokens.iter().enumerate().map(route).collect()
    }

    fn at_once(isa: Isa, scoring: Scoring, tokens: &[Vec<f32>], top_k: usize, resident: &ExpertSet) -> Vec<Outcome> {
        let mut router = TokenRouter::new(scoring, resident.experts(), top_k).unwrap().on(isa);
        let mut affinity = Affinity::new(resident.experts(), Decay::default()).unwrap();
        let route = |(step, logits): (usize, &Vec<f32>)| {
            let token = router.route(logits, step as u64, &mut affinity, Some(resident)).unwrap();
            let ids = token.experts().iter().map(|id| id.index()).collect();
            let weights = token.weights().iter().map(|weight| weight.to_bits()).collect();
            (ids, weights, token.missing().words().to_vec(), affinity.clone())
        };
        tokens.iter().enumerate().map(route).collect()
    }

    /// Tokens of one layer, of one kind of logits.
    fn tokens() -> impl Strategy<Value = Vec<Vec<f32>>> {
        let experts = prop_oneof![Just(1usize), Just(8), Just(16), Just(17), Just(64), Just(128), 1usize..200];
        let value = prop_oneof![
            4 => Just((-4.0f32..4.0).boxed()),
            // As from a gate in 16 bits.
            4 => Just((-4.0f32..4.0).prop_map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).boxed()),
            2 => Just(prop_oneof![3 => -4.0f32..4.0, 1 => Just(f32::NEG_INFINITY)].boxed()),
            1 => Just(prop_oneof![1 => -4.0f32..4.0, 6 => Just(f32::NEG_INFINITY)].boxed()),
            1 => Just((0u8..5).prop_map(f32::from).boxed()),
            // So close that scores are equal where logits are not.
            2 => Just((0u32..400).prop_map(|ulps| f32::from_bits(1.0f32.to_bits() + ulps)).boxed()),
            1 => Just((-120.0f32..0.0).boxed()),
            1 => Just(prop_oneof![
                Just(f32::MAX), Just(f32::MIN), Just(0.0f32), Just(-0.0), Just(1e-40), Just(-1e-42), -1e38f32..1e38,
            ].boxed()),
            1 => Just(Just(f32::NEG_INFINITY).boxed()),
        ];
        (experts, value).prop_flat_map(|(experts, value)| {
            prop::collection::vec(prop::collection::vec(value, experts..=experts), 1..4)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn at_once_is_bit_equal_to_one_after_the_other(
            tokens in tokens(),
            top_k in prop_oneof![3 => 1usize..=16, 1 => 1usize..=200],
            residents in prop::collection::vec(any::<bool>(), 200),
            normalize: bool,
            scale in prop_oneof![4 => Just(1.0f32), 1 => Just(2.5f32), 1 => Just(-1e38f32), 1 => Just(0.0f32)],
        ) {
            let experts = tokens[0].len();
            let mut resident = ExpertSet::new(experts).unwrap();
            (0..experts).filter(|&expert| residents[expert]).for_each(|expert| {
                resident.insert(ExpertId::new(expert, experts).unwrap());
            });
            let top_k = top_k.min(experts);
            let scoring = Scoring { scale, ..Scoring::softmax().normalized(normalize) };
            let wanted = generally(scoring, &tokens, top_k, &resident);
            for isa in Isa::all() {
                prop_assert_eq!(&at_once(isa, scoring, &tokens, top_k, &resident), &wanted, "{:?}", isa);
            }
        }
    }

    #[test]
    fn ordinary_tokens_take_the_short_way() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for (experts, top_k) in [(8, 2), (16, 4), (32, 4), (60, 4), (64, 6), (64, 8), (128, 8), (256, 8)] {
            for isa in Isa::all() {
                let mut router = TokenRouter::new(Scoring::softmax(), experts, top_k).unwrap().on(isa);
                let short = (0..1000)
                    .filter(|_| {
                        let logits: Vec<f32> = (0..experts).map(|_| rng.random_range(-4.0..4.0)).collect();
                        router.select(&logits)
                    })
                    .count();
                assert!(short >= 980, "{isa:?} {experts} {top_k}: {short} of 1000");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_changes_nothing() {
        let message = |scoring, experts, top_k| TokenRouter::new(scoring, experts, top_k).unwrap_err().to_string();
        assert_eq!(message(Scoring::softmax(), 8, 9), "top_k 9 exceeds experts 8");
        assert_eq!(message(Scoring::softmax(), 0, 1), "experts is 0: expected 1 to 65535");
        assert_eq!(
            message(Scoring { scale: f32::NAN, ..Scoring::softmax() }, 8, 2),
            "scale is NaN: expected a finite number"
        );
        assert!(message(Scoring::sigmoid(), 8, 2).ends_with("expected softmax without groups"));

        let wide = ExpertSet::new(9).unwrap();
        for isa in Isa::all() {
            for (experts, top_k) in [(8, 2), (8, 8), (40, 5), (40, 40)] {
                let mut router = TokenRouter::new(Scoring::softmax(), experts, top_k).unwrap().on(isa);
                let mut affinity = Affinity::new(experts, Decay::default()).unwrap();
                let before = affinity.clone();
                for at in 0..experts {
                    for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                        let mut logits = vec![0.5; experts];
                        logits[at] = bad;
                        let error = router.route(&logits, 1, &mut affinity, None).unwrap_err();
                        let wanted = Logits::new(&logits, 1, experts).unwrap_err();
                        assert_eq!(error.to_string(), wanted.to_string());
                    }
                }
                for length in [0, experts - 1, experts + 1] {
                    let error = router.route(&vec![0.0; length], 1, &mut affinity, None).unwrap_err();
                    assert!(matches!(error, Error::Shape { .. }), "{error}");
                }
                let logits = vec![0.0; experts];
                let error = router.route(&logits, 1, &mut affinity, Some(&wide)).unwrap_err().to_string();
                assert_eq!(error, format!("resident experts: expected {experts} experts, got 9 experts"));
                let mut other = Affinity::new(9, Decay::default()).unwrap();
                let error = router.route(&logits, 1, &mut other, None).unwrap_err().to_string();
                assert_eq!(error, format!("affinity: expected {experts} experts, got 9 experts"));
                assert_eq!(affinity, before);
            }
        }
    }
}
