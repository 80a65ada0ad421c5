//! The best experts of one row at given prices: `rank (score − price), best first`.
//!
//! A threshold carried over from the sweep before splits a row into a dozen survivors and the rest by counting, which a
//! compiler turns into vector code; only the survivors are ranked. The result does not depend on the threshold, only the
//! time does. Ties go to the lowest expert id; −∞ is never selected.
//!
//! Knows nothing of pools or limits.

/// Survivors past this many are sorted rather than counted against each other.
const COUNTED: usize = 64;

/// Values compared at a time.
const BLOCK: usize = 16;

/// How many ranks past the last wanted one a first guess aims: towards the middle of what is enough.
const AHEAD: f32 = 1.5;

/// Thresholds tried before the row is taken as it is.
const TRIES: usize = 12;

/// Ranks rows of one width; holds the buffers, so that nothing is allocated per row.
pub(super) struct Selector {
    adjusted: Vec<f32>,
    survivors: Vec<u16>,
    values: Vec<f32>,
    ids: Vec<u16>,
    ranked: Vec<f32>,
    count: usize,
    step: f32,
}

impl Selector {
    /// For rows of `experts` values, of which the best `width` are wanted.
    pub(super) fn new(experts: usize, width: usize) -> Self {
        Self {
            adjusted: vec![0.0; experts],
            survivors: vec![0; experts],
            values: vec![0.0; COUNTED],
            ids: vec![0; width],
            ranked: vec![0.0; width],
            count: 0,
            step: 0.05,
        }
    }

    /// Ranks `row − price`; `threshold` is a guess of the last wanted value on entry and the value itself on return.
    pub(super) fn select(&mut self, row: &[f32], price: &[f32], threshold: &mut f32) {
        for ((adjusted, &score), &price) in self.adjusted.iter_mut().zip(row).zip(price) {
            *adjusted = score - price;
        }
        let width = self.ids.len();
        let split = self.split(width, *threshold);
        let mut found = 0;
        for (expert, &value) in self.adjusted.iter().enumerate() {
            self.survivors[found] = expert as u16;
            found += usize::from(value >= split);
        }
        self.count = found.min(width);
        if found > COUNTED {
            self.sort(found);
        } else {
            self.count_ranks(found);
        }
        if self.count > 1 {
            *threshold = self.ranked[self.count - 1];
            let half = self.count / 2;
            self.step = (AHEAD * (self.ranked[half] - *threshold) / (self.count - half) as f32).max(1e-6);
        }
    }

    /// Ranks the survivors by sorting them.
    fn sort(&mut self, found: usize) {
        let adjusted = &self.adjusted;
        let survivors = &mut self.survivors[..found];
        let value = |expert: u16| adjusted[usize::from(expert)];
        survivors.sort_unstable_by(|&a, &b| {
            value(b).partial_cmp(&value(a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
        });
        for (rank, &expert) in survivors[..self.count].iter().enumerate() {
            (self.ids[rank], self.ranked[rank]) = (expert, value(expert));
        }
    }

    /// Ranks the survivors by counting, for each, those that are larger: no branch depends on a value.
    fn count_ranks(&mut self, found: usize) {
        let values = &mut self.values[..found.next_multiple_of(BLOCK)];
        values[found..].fill(f32::NEG_INFINITY);
        for (value, &expert) in values.iter_mut().zip(&self.survivors[..found]) {
            *value = self.adjusted[usize::from(expert)];
        }
        let mut taken = 0u64;
        for (from, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let mut ranks = [0u32; BLOCK];
            for &other in &values[..found] {
                for (rank, &value) in ranks.iter_mut().zip(block) {
                    *rank += u32::from(other > value);
                }
            }
            let survivors = &self.survivors[from * BLOCK..found.min((from + 1) * BLOCK)];
            for ((&expert, &value), &rank) in survivors.iter().zip(block).zip(&ranks) {
                // Equals have one rank between them; they come lowest id first and take the next free one.
                let rank = rank + (!(taken >> rank)).trailing_zeros();
                taken |= 1 << rank;
                if let Some(id) = self.ids.get_mut(rank as usize) {
                    *id = expert;
                    self.ranked[rank as usize] = value;
                }
            }
        }
    }

    /// A value that at least `width` of the row reach (all that are not masked, where there are fewer), and few more.
    fn split(&self, width: usize, guess: f32) -> f32 {
        let enough = (width + 4).next_multiple_of(BLOCK);
        if enough >= self.adjusted.len() {
            return f32::MIN;
        }
        let (mut low, mut high) = (f32::MIN, f32::MAX);
        let mut step = self.step;
        let mut at = (guess - step).clamp(f32::MIN, f32::MAX);
        for _ in 0..TRIES {
            let reached = self.adjusted.iter().map(|&value| u32::from(value >= at)).sum::<u32>() as usize;
            if reached >= width {
                low = at;
                if reached <= enough {
                    break;
                }
                at = if high < f32::MAX { 0.5 * (low + high) } else { at + step };
            } else {
                high = at;
                at = if low > f32::MIN { 0.5 * (low + high) } else { at - step };
            }
            at = at.clamp(f32::MIN, f32::MAX);
            step *= 2.0;
        }
        low
    }

    /// How many of the wanted there were.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Expert ids, best first.
    pub(super) fn ids(&self) -> &[u16] {
        &self.ids[..self.count]
    }

    /// Their values after the price, best first.
    pub(super) fn values(&self) -> &[f32] {
        &self.ranked[..self.count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::topk::select_top_k;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn selection_does_not_depend_on_the_guess(
            row in prop::collection::vec(
                prop_oneof![Just(f32::NEG_INFINITY), Just(0.0f32), Just(-0.0f32), Just(1.0f32), -2.0f32..2.0, -1e38f32..1e38],
                1..150,
            ),
            width in 1usize..100,
            guess in prop_oneof![Just(f32::MIN), Just(f32::MAX), -3.0f32..3.0],
        ) {
            let width = width.min(row.len());
            let mut expected = vec![0; width];
            let count = select_top_k(&row, &mut expected);
            let mut selector = Selector::new(row.len(), width);
            let mut threshold = guess;
            for _ in 0..2 {
                selector.select(&row, &vec![0.0; row.len()], &mut threshold);
                prop_assert_eq!(selector.ids(), &expected[..count]);
                prop_assert!(selector.ids().iter().zip(selector.values()).all(|(&id, &value)| row[usize::from(id)] == value));
            }
        }
    }
}
