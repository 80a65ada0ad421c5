//! One token in decode, straight from its logits: what is common to the short ways of [`TopK`](crate::routing::topk::TopK) and
//! [`CacheRouter`](crate::routing::cache_aware::CacheRouter), and the way of the former.
//!
//! `ids = the top_k largest of softmax(logits)`, best first, ties to the lowest id; `weights = softmax(logits)[ids] · scale`, or
//! divided by their sum where the model normalises. Shapes: logits `[experts]`, ids and weights `[top_k]`.
//!
//! All of it is bit-equal to scoring and routing, only faster, because nothing waits for the scores: softmax keeps the order of
//! the logits, so the experts are selected by logit while the exponentials are summed, and scores are made for the selected alone.
//! No short way: scorings other than softmax without groups, sixteen slots or more, masks and padding, and tokens whose order by
//! score may not be that by logit (rounding may turn two logits that hardly differ into equal scores).
//!
//! Knows nothing of batches, capacities or selection biases.

use crate::routing::assignment::{Assignment, scale_weights};
use crate::routing::router::{Scratch, TokenRequest};
use crate::routing::scores::{ScoreFunction, Scoring};
use crate::simd::score::exp;
use crate::simd::select::{Guess, leading};
use crate::simd::{Kernel, LANES, Lanes};

/// Logits (less the largest one) that differ by this or more have scores in the same order: the exponentials then differ by
/// sixty times their error.
const APART: f32 = 1.0 / 65_536.0;

/// At least this far from the largest logit a score is a normal number, whatever the number of experts: `e^−75 / 65535 > 2^−126`.
const NORMAL: f32 = -75.0;

/// Whether there is a short way for such a token at all.
#[inline(always)]
pub(super) fn is_plain(request: &TokenRequest<'_>) -> bool {
    let scoring = request.scoring();
    request.top_k() < LANES
        && scoring.function == ScoreFunction::Softmax
        && scoring.groups.is_none()
        && request.context().padding.is_none()
}

/// Rank among the lanes' largest values at which about `wanted` of a row of `experts` are found, and at least one more than are
/// taken: whether the last one taken is better than the next has to be seen.
pub(super) fn rank_for(experts: usize, wanted: usize) -> usize {
    match Guess::cold(experts, wanted.min(LANES)) {
        Guess::Lanes(rank) => rank,
        Guess::About(..) => 0,
    }
}

/// Where to look first, for tokens of the layers that came last.
#[derive(Default)]
struct Start {
    experts: usize,
    top_k: usize,
    rank: usize,
}

/// The gate's own choice of one token; false where there is no short way, and nothing has changed.
#[inline]
pub(super) fn choose_one(request: &TokenRequest<'_>, scratch: &mut Scratch, assignment: &mut Assignment) -> bool {
    if !is_plain(request) {
        return false;
    }
    let (logits, top_k, isa) = (request.logits(), request.top_k(), scratch.isa());
    let start: &mut Start = scratch.of();
    if (start.experts, start.top_k) != (logits.len(), top_k) {
        *start = Start { experts: logits.len(), top_k, rank: rank_for(logits.len(), top_k + 1) };
    }
    let (mut ids, mut weights) = ([0; LANES], [0.0; LANES]);
    let (scoring, rank) = (request.scoring(), start.rank);
    if !isa.run(ChooseOne { logits, scoring, top_k, rank, ids: &mut ids, weights: &mut weights }) {
        return false;
    }
    assignment.refill_token(logits.len(), &ids[..top_k], &weights[..top_k]);
    true
}

/// Selects by logit, and makes the weights of the selected; false where the order of logits may not be that of scores.
struct ChooseOne<'a> {
    logits: &'a [f32],
    scoring: &'a Scoring,
    top_k: usize,
    rank: usize,
    ids: &'a mut [u16; LANES],
    weights: &'a mut [f32; LANES],
}

impl Kernel for ChooseOne<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> bool {
        let Self { logits, scoring, top_k, rank, ids, weights } = self;
        let Some(top) = best_of::<L, false>(lanes, logits, top_k, rank) else { return false };
        if scoring.normalize {
            lanes.store(top.scores, weights);
            scale_weights(&mut weights[..top_k], true, scoring.scale);
        } else {
            lanes.store(lanes.mul(top.scores, lanes.splat(scoring.scale)), weights);
        }
        let mut numbers = [0.0; LANES];
        lanes.store(top.ids, &mut numbers);
        for (id, number) in ids.iter_mut().zip(numbers) {
            *id = number.to_bits() as u16;
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
    let order = lanes.argsort(found.values, found.count);
    let all = logits.len() <= LANES;
    if !is_same_by_score(lanes, (found.values, found.count), order, largest, top_k, all) {
        return None;
    }
    let (scores, ids) = (lanes.permute(scores, order), lanes.permute(found.ids, order));
    Some(Top { scores, ids, largest, share, extremes })
}

/// Whether the first `taken` of `values` in falling `order` would be the same by score; `all` says that there are no others.
#[inline(always)]
pub(super) fn is_same_by_score<L: Lanes>(
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
    use crate::routing::assignment::Assignment;
    use crate::routing::capacity::Capacity;
    use crate::routing::drop::DropRule;
    use crate::routing::logits::Logits;
    use crate::routing::router::{RouteContext, RouteRequest, RouteState, Router, Scratch, TokenRequest};
    use crate::routing::scores::Scoring;
    use crate::routing::topk::TopK;
    use crate::simd::Isa;
    use proptest::prelude::*;

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

        /// The definition: scores, then the choice among them. What is not answered leaves everything as it was.
        #[test]
        fn the_short_way_is_bit_equal_to_the_general_one(
            tokens in tokens(),
            top_k in prop_oneof![3 => 1usize..=16, 1 => 1usize..=200],
            drop in prop_oneof![3 => Just(None), 1 => Just(Some(DropRule::Score))],
            normalize: bool,
            scale in prop_oneof![4 => Just(1.0f32), 1 => Just(2.5f32), 1 => Just(-1e38f32), 1 => Just(0.0f32)],
        ) {
            let experts = tokens[0].len();
            let top_k = top_k.min(experts);
            let scoring = Scoring { scale, ..Scoring::softmax().normalized(normalize) };
            let (router, capacity) = (TopK { drop }, Capacity::unlimited(experts).unwrap());
            for isa in Isa::all() {
                let (mut scratch, mut state, mut assignment) = (Scratch::on(isa), RouteState::default(), Assignment::default());
                for logits in &tokens {
                    let scores = scoring.scores(&Logits::new(logits, 1, experts).unwrap(), None).unwrap();
                    let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
                    let wanted = router.route(&request, &mut state).unwrap();
                    let request = TokenRequest::new(logits, scoring, top_k, RouteContext::default()).unwrap();
                    let before = assignment.clone();
                    let answered = router.route_token(&request, &mut state, &mut scratch, &mut assignment).unwrap();
                    prop_assert_eq!(&assignment, if answered { &wanted } else { &before }, "{:?}", isa);
                    let bits = |made: &Assignment| made.weights().iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
                    prop_assert!(!answered || bits(&assignment) == bits(&wanted), "{:?}", isa);
                }
            }
        }
    }

    #[test]
    fn ordinary_tokens_take_the_short_way() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        // One scratch for layers of any shape.
        for isa in Isa::all() {
            let (mut scratch, mut assignment) = (Scratch::on(isa), Assignment::default());
            for (experts, top_k) in [(8, 2), (16, 4), (32, 4), (60, 4), (64, 6), (64, 8), (128, 8), (256, 8)] {
                let short = (0..1000).filter(|_| {
                    let logits: Vec<f32> = (0..experts).map(|_| rng.random_range(-4.0..4.0)).collect();
                    let request =
                        TokenRequest::new(&logits, Scoring::softmax(), top_k, RouteContext::default()).unwrap();
                    let state = &mut RouteState::default();
                    TopK::default().route_token(&request, state, &mut scratch, &mut assignment).unwrap()
                });
                let short = short.count();
                assert!(short >= 980, "{isa:?} {experts} {top_k}: {short} of 1000");
            }
        }
    }

    #[test]
    fn what_has_no_short_way_changes_nothing() {
        for isa in Isa::all() {
            let (mut scratch, mut state) = (Scratch::on(isa), RouteState::default());
            let untouched = Assignment::default();
            let mut answered = |logits: &[f32], scoring, top_k, context| {
                let mut assignment = Assignment::default();
                let request = TokenRequest::new(logits, scoring, top_k, context).unwrap();
                let answered =
                    TopK::default().route_token(&request, &mut state, &mut scratch, &mut assignment).unwrap();
                assert!(answered || assignment == untouched);
                answered
            };
            for (experts, top_k) in [(8, 2), (8, 8), (40, 5), (40, 40)] {
                let usual: Vec<f32> = (0..experts).map(|expert| expert as f32 * 0.25).collect();
                assert_eq!(answered(&usual, Scoring::softmax(), top_k, RouteContext::default()), top_k < 16);
                for at in 0..experts {
                    for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                        let mut logits = usual.clone();
                        logits[at] = bad;
                        assert!(!answered(&logits, Scoring::softmax(), top_k, RouteContext::default()));
                    }
                }
                assert!(!answered(&usual, Scoring::sigmoid(), top_k, RouteContext::default()));
                let padding = RouteContext { padding: Some(&[true]), ..RouteContext::default() };
                assert!(!answered(&usual, Scoring::softmax(), top_k, padding));
            }
        }
    }
}
