//! The best experts of one row at given prices: `rank (score − price), best first`.
//!
//! Up to sixteen wanted experts are ranked by the vector kernel of [`crate::simd::select`]. More, or rows with so many
//! equal values that no threshold leaves a few, are split and sorted here. The result does not depend on which. Ties go
//! to the lowest expert id; −∞ is never selected.
//!
//! Knows nothing of pools or limits.

use crate::simd::select::{Best, Guess, best};
use crate::simd::{Isa, Kernel, LANES, Lanes};

/// How many ranks past the last wanted one a guess from the row before aims: towards the middle of what is enough. Run by `benches/phase`.
const AHEAD: f32 = 1.5;

/// Thresholds tried before a row is sorted as it is.
const TRIES: usize = 12;

/// Where the last wanted value of a row may be, and how far off that is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hint {
    at: f32,
    step: f32,
}

impl Hint {
    /// Nothing is known.
    pub(crate) const NONE: Self = Self { at: f32::NAN, step: 0.05 };
}

/// Ranks rows of one width; holds the buffers, so that nothing is allocated per row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    experts: usize,
    width: usize,
    cold: Option<Guess>,
    adjusted: Vec<[f32; LANES]>,
    best: Best,
    survivors: Vec<u16>,
    ids: Vec<u16>,
    values: Vec<f32>,
    count: usize,
    /// Whether the row was sorted, rather than ranked by the kernel.
    sorted: bool,
}

impl Selector {
    /// For rows of `experts` values, of which the best `width` are wanted.
    pub(crate) fn new(experts: usize, width: usize) -> Self {
        let mut selector = Self::default();
        selector.prepare(experts, width);
        selector
    }

    /// Makes it one for rows of `experts` values, of which the best `width` are wanted.
    pub(crate) fn prepare(&mut self, experts: usize, width: usize) {
        if (self.experts, self.width) == (experts, width) {
            return;
        }
        (self.experts, self.width) = (experts, width);
        self.cold = (width <= LANES).then(|| Guess::cold(experts, width));
        self.adjusted.clear();
        self.adjusted.resize(experts.div_ceil(LANES), [f32::NEG_INFINITY; LANES]);
        self.survivors.resize(experts, 0);
        self.ids.resize(width, 0);
        self.values.resize(width, 0.0);
        self.count = 0;
    }

    /// Ranks `row − price` on the instructions of the CPU.
    pub(crate) fn select(&mut self, row: &[f32], price: Option<&[f32]>, hint: Hint) {
        Isa::detect().run(Select { selector: self, row, price, hint });
    }

    /// The same inside a kernel.
    #[inline(always)]
    pub(crate) fn select_on<L: Lanes>(&mut self, lanes: L, row: &[f32], price: Option<&[f32]>, hint: Hint) {
        let start = match self.cold {
            Some(cold) if hint.at.is_nan() => Some(cold),
            Some(_) => Some(Guess::About(hint.at, hint.step)),
            None => None,
        };
        match start {
            Some(start) if best(lanes, (row, price), self.width, start, &mut self.adjusted, &mut self.best) => {
                (self.count, self.sorted) = (self.best.count, false);
            }
            _ => self.sort(row, price, hint),
        }
    }

    /// A hint for a row that is much like this one.
    #[inline(always)]
    pub(crate) fn hint(&self) -> Hint {
        if self.count < 2 {
            return Hint::NONE;
        }
        let (half, last) = (self.count / 2, self.count - 1);
        let (middle, least) = (self.values()[half], self.values()[last]);
        Hint { at: least, step: (AHEAD * (middle - least) / (self.count - half) as f32).max(1e-6) }
    }

    /// The best sixteen values, of which [`Selector::count`] count; `None` where more were wanted.
    #[inline(always)]
    pub(crate) fn sixteen(&self) -> Option<[f32; LANES]> {
        match self.sorted {
            false => Some(self.best.values),
            true if self.width <= LANES => {
                let mut values = [f32::NEG_INFINITY; LANES];
                values[..self.count].copy_from_slice(&self.values[..self.count]);
                Some(values)
            }
            true => None,
        }
    }

    /// Ranks what a threshold leaves by sorting it.
    #[inline(never)]
    fn sort(&mut self, row: &[f32], price: Option<&[f32]>, hint: Hint) {
        let adjusted = self.adjusted.as_flattened_mut();
        adjusted[..row.len()].copy_from_slice(row);
        for (adjusted, price) in adjusted.iter_mut().zip(price.unwrap_or_default()) {
            *adjusted -= price;
        }
        let adjusted = &adjusted[..row.len()];
        let split = split(adjusted, self.width, hint);
        let mut found = 0;
        for (expert, &value) in adjusted.iter().enumerate() {
            self.survivors[found] = expert as u16;
            found += usize::from(value >= split);
        }
        (self.count, self.sorted) = (found.min(self.width), true);
        let value = |expert: u16| adjusted[usize::from(expert)];
        let falling =
            |a: &u16, b: &u16| value(*b).partial_cmp(&value(*a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b));
        let mut survivors = &mut self.survivors[..found];
        if self.count < found {
            survivors.select_nth_unstable_by(self.count, falling);
            survivors = &mut survivors[..self.count];
        }
        survivors.sort_unstable_by(falling);
        for ((id, ranked), &mut expert) in self.ids.iter_mut().zip(&mut self.values).zip(survivors) {
            (*id, *ranked) = (expert, value(expert));
        }
    }

    /// How many of the wanted there were.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Expert ids, best first.
    #[inline(always)]
    pub(crate) fn ids(&self) -> &[u16] {
        if self.sorted { &self.ids[..self.count] } else { &self.best.ids[..self.count] }
    }

    /// Their values after the price, best first.
    #[inline(always)]
    pub(crate) fn values(&self) -> &[f32] {
        if self.sorted { &self.values[..self.count] } else { &self.best.values[..self.count] }
    }
}

/// Copies a few values to the front of `into`, eight at a time rather than through a call.
#[inline(always)]
pub(crate) fn copy_few<T: Copy>(into: &mut [T], few: &[T]) {
    let into = &mut into[..few.len()];
    let ((whole, rest), (few, few_rest)) = (into.as_chunks_mut::<8>(), few.as_chunks::<8>());
    for (into, few) in whole.iter_mut().zip(few) {
        *into = *few;
    }
    for (into, &value) in rest.iter_mut().zip(few_rest) {
        *into = value;
    }
}

/// A value that at least `width` of the row reach (all that are not masked, where there are fewer), and few more.
fn split(adjusted: &[f32], width: usize, hint: Hint) -> f32 {
    let enough = width + LANES;
    if enough >= adjusted.len() {
        return f32::MIN;
    }
    let (mut low, mut high) = (f32::MIN, f32::MAX);
    let mut step = hint.step;
    let mut at = if hint.at.is_nan() { 0.0 } else { (hint.at - step).clamp(f32::MIN, f32::MAX) };
    for _ in 0..TRIES {
        let reached = adjusted.iter().map(|&value| u32::from(value >= at)).sum::<u32>() as usize;
        if reached >= width {
            low = at;
            if reached <= enough {
                break;
            }
            at = if high < f32::MAX { 0.5 * low + 0.5 * high } else { at + step };
        } else {
            high = at;
            at = if low > f32::MIN { 0.5 * low + 0.5 * high } else { at - step };
        }
        at = at.clamp(f32::MIN, f32::MAX);
        step *= 2.0;
    }
    low
}

struct Select<'a> {
    selector: &'a mut Selector,
    row: &'a [f32],
    price: Option<&'a [f32]>,
    hint: Hint,
}

impl Kernel for Select<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        self.selector.select_on(lanes, self.row, self.price, self.hint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The oracle: sort everything.
    fn naive(row: &[f32], width: usize) -> Vec<u16> {
        let mut order: Vec<u16> = (0..row.len() as u16).filter(|&e| row[usize::from(e)] > f32::NEG_INFINITY).collect();
        order.sort_by(|&a, &b| row[usize::from(b)].partial_cmp(&row[usize::from(a)]).unwrap().then(a.cmp(&b)));
        order.truncate(width);
        order
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn selection_matches_a_full_sort_whatever_the_guess(
            row in prop::collection::vec(
                prop_oneof![Just(f32::NEG_INFINITY), Just(0.0f32), Just(-0.0f32), Just(1.0f32), -2.0f32..2.0, -1e38f32..1e38],
                1..150,
            ),
            width in 1usize..100,
            at in prop_oneof![Just(f32::NAN), Just(f32::MIN), Just(f32::MAX), -3.0f32..3.0],
        ) {
            let width = width.min(row.len());
            let mut selector = Selector::new(row.len(), width);
            let mut hint = Hint { at, step: 0.05 };
            for price in [None, Some(vec![0.0; row.len()])] {
                selector.select(&row, price.as_deref(), hint);
                hint = selector.hint();
                prop_assert_eq!(selector.ids(), &naive(&row, width)[..]);
                prop_assert_eq!(selector.count(), selector.ids().len());
                prop_assert!(selector.ids().iter().zip(selector.values()).all(|(&id, &value)| row[usize::from(id)] == value));
            }
        }
    }
}
