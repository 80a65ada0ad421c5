//! The swaps of one token where nothing limits an expert: most misses gone for the least gate mass.
//!
//! The j lowest misses give way to the j best resident experts that the token does not hold, for the largest j at which each
//! newcomer can beat one that leaves and the gate mass stays within the bound. O(experts / 16 + top_k²) with few misses.
//!
//! Knows nothing of other tokens, limits or prices.

use crate::routing::slots::{EMPTY, comes_before, sort_few};

/// Scores compared side by side.
const LANES: usize = 16;

/// What a swap must keep to.
pub(super) struct Terms {
    /// Bonus times score range: what a resident expert's score is lifted by.
    pub(super) lift: f64,
    pub(super) max_mass_loss: f64,
    pub(super) keep_top: usize,
}

impl Terms {
    /// Whether `kept` of the gate mass `base` is within the bound, whichever way a caller sums the `top_k` scores in `f32`: both
    /// sums and the product with `1 − max_mass_loss` may be off by a rounding for each step.
    pub(super) fn allow(&self, kept: f64, base: f64, top_k: usize) -> bool {
        let slack = (top_k + 4) as f64 * f64::from(f32::EPSILON / 2.0);
        let denormal = f64::from(f32::from_bits(2));
        kept * (1.0 - slack) >= (1.0 - self.max_mass_loss) * base * (1.0 + slack) + denormal
    }
}

pub(super) fn is_in(bits: &[u64], expert: u16) -> bool {
    bits[usize::from(expert / 64)] >> (expert % 64) & 1 == 1
}

pub(super) fn set_bit(bits: &mut [u64], expert: u16) {
    bits[usize::from(expert / 64)] |= 1 << (expert % 64);
}

/// Buffers for one token.
#[derive(Default)]
pub(super) struct Swaps {
    /// Slots whose expert may go, lowest score first.
    misses: Vec<usize>,
    /// Resident experts that the token does not hold, best first, as many as there are misses.
    stand_ins: Vec<u16>,
}

impl Swaps {
    /// Makes room for tokens of `top_k` slots, so that no later one allocates.
    pub(super) fn reserve(&mut self, top_k: usize) {
        self.misses.reserve(top_k);
        self.stand_ins.reserve(top_k);
    }

    /// Swaps misses of `chosen` (best first, [`EMPTY`] at the end) for experts in `near`; true when some were.
    pub(super) fn swap_misses(
        &mut self,
        chosen: &mut [u16],
        gate: &[f32],
        selection: &[f32],
        near: &[u64],
        terms: &Terms,
    ) -> bool {
        let filled = chosen.iter().position(|&expert| expert == EMPTY).unwrap_or(chosen.len());
        self.misses.clear();
        let may_go = (terms.keep_top.min(filled)..filled).rev();
        self.misses.extend(may_go.filter(|&slot| !is_in(near, chosen[slot])));
        let Some(&lowest) = self.misses.first() else { return false };
        let score = |expert: u16| f64::from(selection[usize::from(expert)]);
        self.find_stand_ins(chosen, selection, near, score(chosen[lowest]) - terms.lift);

        let pair = |&expert: &u16| (selection[usize::from(expert)], gate[usize::from(expert)]);
        let count = how_many(
            terms,
            filled,
            &self.misses,
            |slot| pair(&chosen[slot]),
            self.stand_ins.len(),
            |stand_in| pair(&self.stand_ins[stand_in]),
        );
        let (going, coming) = (&self.misses[..count], &self.stand_ins[..count]);
        going.iter().zip(coming).for_each(|(&slot, &expert)| chosen[slot] = expert);
        if count > 0 {
            let before = |chosen: &&mut [u16], a: usize, b: usize| comes_before(chosen[a], chosen[b], selection);
            sort_few(&mut &mut *chosen, filled, before, |chosen, a, b| chosen.swap(a, b));
        }
        count > 0
    }

    /// The best experts in `near` with a score above `threshold` that are not in `chosen`, as many as there are misses.
    fn find_stand_ins(&mut self, chosen: &[u16], selection: &[f32], near: &[u64], threshold: f64) {
        // A little lower, so that rounding loses none; −∞ stays out in any case.
        let threshold = (threshold as f32).next_down();
        let (stand_ins, most) = (&mut self.stand_ins, self.misses.len());
        stand_ins.clear();
        for (at, scores) in selection.chunks(LANES).enumerate() {
            let mut bits = near[at * LANES / 64] >> (at * LANES % 64) & ((1 << LANES) - 1);
            if bits == 0 || !scores.iter().fold(false, |any, &score| any | (score > threshold)) {
                continue;
            }
            while bits != 0 {
                let lane = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let (score, expert) = (scores[lane], (at * LANES + lane) as u16);
                let full = stand_ins.len() == most;
                let beaten = full && stand_ins.last().is_some_and(|&last| score <= selection[usize::from(last)]);
                if score <= threshold || beaten || chosen.contains(&expert) {
                    continue;
                }
                if full {
                    stand_ins.pop();
                }
                let better = |&other: &u16| selection[usize::from(other)] >= score;
                let place = stand_ins.iter().position(|other| !better(other)).unwrap_or(stand_ins.len());
                stand_ins.insert(place, expert);
            }
        }
    }
}

/// How many swaps a token with `filled` slots makes: of the slots `misses`, lowest score first, against so many `stand_ins`, best
/// first; `of_slot` and `of_stand_in` give selection and gate score.
pub(super) fn how_many(
    terms: &Terms,
    filled: usize,
    misses: &[usize],
    of_slot: impl Fn(usize) -> (f32, f32),
    stand_ins: usize,
    of_stand_in: impl Fn(usize) -> (f32, f32),
) -> usize {
    let most = misses.len().min(stand_ins);
    let (mut base, mut stays, mut left) = (0.0, 0.0, most);
    for slot in 0..filled {
        let mass = f64::from(of_slot(slot).1);
        base += mass;
        // Misses come by falling slot.
        if left > 0 && misses[left - 1] == slot {
            left -= 1;
        } else {
            stays += mass;
        }
    }
    for count in (1..=most).rev() {
        // If any pairing wins every comparison, best against best does.
        let wins = (0..count).all(|at| {
            let (going, coming) = (of_slot(misses[count - 1 - at]).0, of_stand_in(at).0);
            f64::from(coming) + terms.lift > f64::from(going)
        });
        if wins && terms.allow(stays + (0..count).map(|at| f64::from(of_stand_in(at).1)).sum::<f64>(), base, filled) {
            return count;
        }
        stays += f64::from(of_slot(misses[count - 1]).1);
    }
    0
}
