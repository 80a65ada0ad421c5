//! Names for experts: [`ExpertId`], one expert of a layer, and [`ExpertSet`], some of them.
//!
//! Knows nothing of weights, scores or routers.

use crate::error::{Error, Result};

/// Index of one expert within its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId(u16);

impl ExpertId {
    /// The most experts a layer can have; the id after the last one marks an empty slot in compact tables.
    pub(crate) const MAX_EXPERTS: usize = u16::MAX as usize;

    /// The id of expert `index` in a layer of `experts`.
    ///
    /// # Errors
    /// [`Error::ExpertOutOfRange`] when `index` is not below `experts`, [`Error::ExpertCount`] when `experts` is.
    pub fn new(index: usize, experts: usize) -> Result<Self> {
        check_expert_count(experts)?;
        if index >= experts {
            return Err(Error::ExpertOutOfRange {
                operand: "expert id".into(),
                id: i64::try_from(index).unwrap_or(i64::MAX),
                expected: format!("0 to {}", experts - 1),
            });
        }
        Ok(Self(index as u16))
    }

    /// The id for a raw value that a router produced and knows to be in range.
    pub(crate) const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// Position of the expert in its layer.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Checks that a layer can have this many experts.
///
/// # Errors
/// [`Error::ExpertCount`] when there are none, or more than [`ExpertId::MAX_EXPERTS`].
pub(crate) fn check_expert_count(experts: usize) -> Result<()> {
    if experts == 0 || experts > ExpertId::MAX_EXPERTS {
        return Err(Error::ExpertCount { experts });
    }
    Ok(())
}

/// A set of experts of one layer, one bit each.
///
/// ```
/// use phase_moe::{ExpertId, ExpertSet};
///
/// let mut resident = ExpertSet::new(64)?;
/// resident.insert(ExpertId::new(7, 64)?);
/// assert!(resident.contains(ExpertId::new(7, 64)?));
/// assert_eq!(resident.len(), 1);
/// # Ok::<(), phase_moe::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertSet {
    words: Vec<u64>,
    experts: usize,
}

impl ExpertSet {
    /// The empty set in a layer of `experts`.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] when `experts` is 0 or too many.
    pub fn new(experts: usize) -> Result<Self> {
        check_expert_count(experts)?;
        Ok(Self { words: vec![0; experts.div_ceil(64)], experts })
    }

    /// Makes it the empty set in a layer of `experts`, in the same memory.
    ///
    /// # Errors
    /// Those of [`ExpertSet::new`]; the set is then as it was.
    pub(crate) fn reset(&mut self, experts: usize) -> Result<()> {
        check_expert_count(experts)?;
        self.words.clear();
        self.words.resize(experts.div_ceil(64), 0);
        self.experts = experts;
        Ok(())
    }

    /// Adds the experts of `all` that are not in `without`; those of another, larger layer are ignored.
    pub(crate) fn insert_missing(&mut self, all: &Self, without: Option<&Self>) {
        let spare = self.words.len() * 64 - self.experts;
        for (at, (word, all)) in self.words.iter_mut().zip(&all.words).enumerate() {
            *word |= all & !without.and_then(|set| set.words.get(at)).copied().unwrap_or(0);
        }
        if let Some(last) = self.words.last_mut() {
            *last &= u64::MAX >> spare;
        }
    }

    /// Adds all experts of the layer.
    pub(crate) fn fill(&mut self) {
        let spare = self.words.len() * 64 - self.experts;
        self.words.fill(u64::MAX);
        if let Some(last) = self.words.last_mut() {
            *last >>= spare;
        }
    }

    /// Experts in the layer, in the set or not.
    pub(crate) fn experts(&self) -> usize {
        self.experts
    }

    /// Adds an expert; true when it was not there. An id of another, larger layer is ignored.
    pub fn insert(&mut self, expert: ExpertId) -> bool {
        let (word, bit) = (expert.index() / 64, 1u64 << (expert.index() % 64));
        if expert.index() >= self.experts || self.words[word] & bit != 0 {
            return false;
        }
        self.words[word] |= bit;
        true
    }

    /// Removes an expert; true when it was there.
    pub(crate) fn remove(&mut self, expert: ExpertId) -> bool {
        let was = self.contains(expert);
        if was {
            self.words[expert.index() / 64] &= !(1u64 << (expert.index() % 64));
        }
        was
    }

    /// True when the expert is in the set.
    pub fn contains(&self, expert: ExpertId) -> bool {
        self.words.get(expert.index() / 64).is_some_and(|word| word >> (expert.index() % 64) & 1 == 1)
    }

    /// Experts in the set.
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// True when no expert is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The set as bits: expert `e` is bit `e % 64` of word `e / 64`; bits past the last expert are 0.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Removes all experts.
    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The experts of the set, lowest id first.
    pub fn iter(&self) -> impl Iterator<Item = ExpertId> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            std::iter::successors(Some(word), |rest| Some(rest & rest.wrapping_sub(1)))
                .take_while(|&rest| rest != 0)
                .map(move |rest| ExpertId((index * 64 + rest.trailing_zeros() as usize) as u16))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside_the_layer_are_errors() {
        assert!(ExpertId::new(3, 4).is_ok());
        assert_eq!(
            ExpertId::new(4, 4).unwrap_err().to_string(),
            "expert id: expert 4 is out of range, expected 0 to 3"
        );
        assert_eq!(ExpertId::new(0, 70_000).unwrap_err().to_string(), "experts is 70000: expected 1 to 65535");
        assert!(ExpertSet::new(0).is_err());
    }

    #[test]
    fn a_set_behaves_like_a_sorted_set() {
        let mut set = ExpertSet::new(130).unwrap();
        for index in [129, 0, 64, 63, 64] {
            set.insert(ExpertId::new(index, 130).unwrap());
        }
        assert_eq!(set.iter().map(ExpertId::index).collect::<Vec<_>>(), [0, 63, 64, 129]);
        assert!(set.remove(ExpertId::new(64, 130).unwrap()));
        assert!(!set.remove(ExpertId::new(64, 130).unwrap()));
        assert_eq!(set.len(), 3);
        assert!(!set.insert(ExpertId::new(150, 200).unwrap()));
        assert_eq!(set.words(), [1 | 1 << 63, 0, 2]);
        set.clear();
        assert!(set.is_empty());
    }
}
