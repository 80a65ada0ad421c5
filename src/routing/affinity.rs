//! Affinity: how much each expert of a layer was used of late.
//!
//! `affinity(step) = affinity(last) · decay^(step − last)`, plus `1 − decay` at each step that uses the expert: a moving average
//! of use in `[0, 1]`, `[experts]`. It is decayed lazily from the step of the last use, so a token costs O(top_k), not O(experts).
//!
//! Knows nothing of scores, residency or clocks: time is the step that the caller counts.

use crate::error::{Error, Result};
use crate::expert::{ExpertId, ExpertSet, check_expert_count};

/// Below this, use is forgotten: far above the denormal numbers, far below anything that could rank an expert.
const FORGOTTEN: f32 = 1e-20;

/// Entries of each of the two tables; the decay of fewer than their product of steps is looked up.
const TABLE: usize = 64;

/// What is left of an affinity after a step without use, above 0 and below 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decay(f32);

impl Decay {
    /// 0.98: half of it is forgotten after 34 steps. Which experts should stay in memory is better told by long use than by the last few.
    pub(crate) const SLOW: Self = Self(0.98);

    /// A decay per step.
    ///
    /// # Errors
    /// [`Error::Parameter`] for NaN and for what is not above 0 and below 1 in 32 bits.
    pub fn new(decay: f64) -> Result<Self> {
        let value = decay as f32;
        if !(f32::MIN_POSITIVE..1.0).contains(&value) {
            return Err(Error::parameter("affinity decay", decay, "above 0 and below 1"));
        }
        Ok(Self(value))
    }

    /// The decay per step.
    pub fn value(self) -> f32 {
        self.0
    }

    /// `decay^steps` by squaring: the same on every machine, and exactly 0 when nothing is left.
    fn power(self, mut steps: u64) -> f64 {
        let (mut power, mut left) = (f64::from(self.0), 1.0);
        while steps > 0 {
            if steps & 1 == 1 {
                left *= power;
            }
            if left < f64::from(FORGOTTEN) {
                return 0.0;
            }
            power *= power;
            if power < f64::from(FORGOTTEN) && steps > 1 {
                return 0.0;
            }
            steps >>= 1;
        }
        left
    }
}

impl Default for Decay {
    /// 0.95: half of it is forgotten after 14 steps.
    fn default() -> Self {
        Self(0.95)
    }
}

/// Use of one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Use {
    /// Affinity at the last use; 0 only before the first.
    value: f32,
    last: u64,
    count: u64,
}

/// Powers of a decay.
#[derive(Clone, Debug, PartialEq)]
struct Powers {
    /// `decay^0, decay^1, ..`
    ones: [f32; TABLE],
    /// `decay^0, decay^TABLE, decay^(2 TABLE), ..`
    tables: [f32; TABLE],
}

/// Moving average of use, and activations, per expert of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Affinity {
    decay: Decay,
    powers: Powers,
    uses: Vec<Use>,
}

impl Affinity {
    /// No use yet, in a layer of `experts`.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] when `experts` is 0 or too many.
    pub(crate) fn new(experts: usize, decay: Decay) -> Result<Self> {
        check_expert_count(experts)?;
        let powers = Powers {
            ones: std::array::from_fn(|steps| decay.power(steps as u64) as f32),
            tables: std::array::from_fn(|tables| decay.power((tables * TABLE) as u64) as f32),
        };
        Ok(Self { decay, powers, uses: vec![Use::default(); experts] })
    }

    /// Experts of the layer.
    pub(crate) fn experts(&self) -> usize {
        self.uses.len()
    }

    /// What is left after a step without use.
    pub(crate) fn decay(&self) -> Decay {
        self.decay
    }

    /// Notes that a token used `expert` in `step`. In one step an expert's affinity rises once, however many tokens use it, so
    /// the order of tokens does not matter; a step before the last one only counts. An expert of another layer is ignored.
    #[inline]
    pub(crate) fn use_expert(&mut self, expert: ExpertId, step: u64) {
        let Some(entry) = self.uses.get_mut(expert.index()) else { return };
        entry.count = entry.count.saturating_add(1);
        if entry.value > 0.0 && step <= entry.last {
            return;
        }
        let left = fall(entry.value, step - entry.last.min(step), self.decay, &self.powers);
        entry.value = (left + (1.0 - self.decay.0)).min(1.0);
        entry.last = step;
    }

    /// Affinity of an expert at `step`, in `[0, 1]`; 0 for an expert of another layer.
    pub(crate) fn at(&self, expert: ExpertId, step: u64) -> f32 {
        self.uses.get(expert.index()).map_or(0.0, |entry| self.now(entry, step))
    }

    /// How often tokens used an expert.
    pub fn activations(&self, expert: ExpertId) -> u64 {
        self.uses.get(expert.index()).map_or(0, |entry| entry.count)
    }

    /// Look-ahead: the `most` experts with the most affinity after the last use of any that are not in `resident`, most worth
    /// fetching first (ties: lowest id). Experts whose use was forgotten by then are not listed.
    pub fn worth_fetching(&self, resident: Option<&ExpertSet>, most: usize) -> Vec<ExpertId> {
        let step = self.uses.iter().map(|entry| entry.last).max().unwrap_or(0);
        let mut ranked: Vec<(f32, u16)> =
            self.uses.iter().zip(0u16..).map(|(entry, expert)| (self.now(entry, step), expert)).collect();
        ranked.retain(|&(value, expert)| {
            value > 0.0 && !resident.is_some_and(|resident| resident.contains(ExpertId::from_raw(expert)))
        });
        ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        ranked.into_iter().take(most).map(|(_, expert)| ExpertId::from_raw(expert)).collect()
    }

    fn now(&self, entry: &Use, step: u64) -> f32 {
        fall(entry.value, step.saturating_sub(entry.last), self.decay, &self.powers)
    }
}

/// `value · decay^steps`, never denormal.
#[inline(always)]
fn fall(value: f32, steps: u64, decay: Decay, powers: &Powers) -> f32 {
    let left = if steps < (TABLE * TABLE) as u64 {
        value * (powers.ones[steps as usize % TABLE] * powers.tables[steps as usize / TABLE])
    } else {
        (f64::from(value) * decay.power(steps)) as f32
    };
    if left < FORGOTTEN { 0.0 } else { left }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn expert(index: usize) -> ExpertId {
        ExpertId::new(index, 8).unwrap()
    }

    fn affinity(decay: f64) -> Affinity {
        Affinity::new(8, Decay::new(decay).unwrap()).unwrap()
    }

    #[test]
    fn a_decay_outside_its_range_is_named() {
        for decay in [f64::NAN, f64::INFINITY, -0.5, 0.0, 1e-60, 1.0, 1.0 - 1e-12, 2.0] {
            let message = Decay::new(decay).unwrap_err().to_string();
            assert_eq!(message, format!("affinity decay is {decay}: expected above 0 and below 1"));
        }
        assert!(Affinity::new(0, Decay::default()).is_err());
    }

    #[test]
    fn longer_than_any_counter_nothing_overflows_or_goes_denormal() {
        for decay in [1e-30, 0.5, 0.999_999] {
            let mut affinity = affinity(decay);
            for step in [0, 1, 63, 64, 65, 1 << 40, u64::MAX - 1, u64::MAX, u64::MAX] {
                affinity.use_expert(expert(1), step);
                let value = affinity.at(expert(1), step);
                assert!(value > 0.0 && value <= 1.0, "{value}");
            }
            assert_eq!((affinity.activations(expert(1)), affinity.activations(expert(0))), (9, 0));
            assert_eq!(affinity.at(expert(0), 5), 0.0);
        }
        let mut affinity = affinity(0.5);
        affinity.use_expert(expert(1), 0);
        for step in 0..200 {
            let value = affinity.at(expert(1), step);
            assert!(value == 0.0 || value.is_normal(), "{value}");
        }
        affinity.uses[1].count = u64::MAX;
        affinity.use_expert(expert(1), 1);
        assert_eq!(affinity.activations(expert(1)), u64::MAX);
    }

    #[test]
    fn what_was_used_last_and_most_is_fetched_first() {
        let mut affinity = affinity(0.9);
        for (step, used) in [(1, 3), (2, 5), (3, 5), (3, 2), (3, 5), (1, 2)] {
            affinity.use_expert(expert(used), step);
        }
        let ids = |list: Vec<ExpertId>| list.into_iter().map(ExpertId::index).collect::<Vec<_>>();
        assert_eq!(ids(affinity.worth_fetching(None, 8)), [5, 2, 3]);
        let mut resident = ExpertSet::new(8).unwrap();
        resident.insert(expert(5));
        assert_eq!(ids(affinity.worth_fetching(Some(&resident), 1)), [2]);
        affinity.use_expert(expert(7), 1 << 30);
        assert_eq!(ids(affinity.worth_fetching(None, 8)), [7], "the others are forgotten");
    }

    proptest! {
        /// The oracle decays every expert at every step.
        #[test]
        fn lazy_decay_is_decay_at_every_step(uses in prop::collection::vec((0usize..8, 1u64..150), 1..40), decay in 0.5f64..0.999) {
            let mut affinity = affinity(decay);
            let (mut naive, mut step) = ([0f64; 8], 0);
            for (used, pause) in uses {
                for _ in 0..pause {
                    naive.iter_mut().for_each(|value| *value *= f64::from(decay as f32));
                    let before = affinity.at(expert(used), step);
                    step += 1;
                    prop_assert!(affinity.at(expert(used), step) <= before, "it falls without use");
                }
                affinity.use_expert(expert(used), step);
                naive[used] += 1.0 - f64::from(decay as f32);
                for (index, &value) in naive.iter().enumerate() {
                    prop_assert!((f64::from(affinity.at(expert(index), step)) - value).abs() < 1e-5);
                }
            }
        }
    }
}
