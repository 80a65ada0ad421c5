//! Keys in numbered buckets on a ring, each a list in order of arrival: the first bucket that holds something is found with two
//! looks at bitmaps, however many are empty.
//!
//! Knows nothing of what the numbers mean.

use super::lists::Lists;

/// Buckets of the ring: one bit each in 64 words, and one for each word.
pub(crate) const BUCKETS: usize = 64 * 64;

/// Which bucket holds which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Buckets {
    lists: Lists,
    /// Bit `b % 64` of word `b / 64`: bucket `b` holds something.
    full: Vec<u64>,
    /// Bit `w`: word `w` is not 0.
    words: u64,
}

impl Buckets {
    pub(crate) fn new(keys: usize) -> Self {
        Self { lists: Lists::new(keys, BUCKETS), full: vec![0; BUCKETS / 64], words: 0 }
    }

    /// Puts `key`, which is in no bucket, at the end of one.
    pub(crate) fn push(&mut self, key: usize, bucket: usize) {
        self.lists.push_back(bucket, key);
        self.full[bucket / 64] |= 1 << (bucket % 64);
        self.words |= 1 << (bucket / 64);
    }

    /// Takes `key` out of `bucket`, the one it is in; false when it is in none.
    pub(crate) fn remove(&mut self, key: usize, bucket: usize) -> bool {
        let was = self.lists.remove(key);
        if was && self.lists.first(bucket).is_none() {
            self.full[bucket / 64] &= !(1 << (bucket % 64));
            if self.full[bucket / 64] == 0 {
                self.words &= !(1 << (bucket / 64));
            }
        }
        was
    }

    /// The first key of the first bucket that holds something, from `start` on and around.
    pub(crate) fn first_from(&self, start: usize) -> Option<usize> {
        let (word, bit) = (start / 64, start % 64);
        let here = self.full[word] & (u64::MAX << bit);
        let after = u64::MAX << word << 1;
        let bucket = if here != 0 {
            64 * word + here.trailing_zeros() as usize
        } else {
            // What is left of the start's own word lies before it: last on the way around, and so among the rest.
            let candidates = if self.words & after != 0 { self.words & after } else { self.words };
            if candidates == 0 {
                return None;
            }
            let word = candidates.trailing_zeros() as usize;
            64 * word + self.full[word].trailing_zeros() as usize
        };
        self.lists.first(bucket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_is_found_from_anywhere(
            pushed in prop::collection::vec(prop_oneof![0..BUCKETS, 0usize..70, 4000..BUCKETS], 0..12),
            removed in prop::collection::vec(any::<bool>(), 12),
            start in prop_oneof![0..BUCKETS, 0usize..70, 4000..BUCKETS],
        ) {
            let mut buckets = Buckets::new(12);
            pushed.iter().enumerate().for_each(|(key, &bucket)| buckets.push(key, bucket));
            let gone = |key: &usize| removed[*key];
            for key in (0..pushed.len()).filter(gone) {
                prop_assert!(buckets.remove(key, pushed[key]));
                prop_assert!(!buckets.remove(key, pushed[key]));
            }
            let left = (0..pushed.len()).filter(|key| !gone(key));
            let naive = left.min_by_key(|&key| ((pushed[key] + BUCKETS - start) % BUCKETS, key));
            prop_assert_eq!(buckets.first_from(start), naive);
        }
    }
}
