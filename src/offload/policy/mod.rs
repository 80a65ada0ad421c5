//! Which experts leave fast memory when room is needed: the policies, and the order in which each of them gives up experts.
//!
//! | policy | leaves first | kept as |
//! |---|---|---|
//! | `lru` | whose last use is longest ago | one list |
//! | `lfu` | whom the fewest steps used | a bucket for each number of uses |
//! | `lfru` | of the unprivileged half: whom the fewest steps used | a list, and the buckets |
//! | `affinity` | whose moving average of use is lowest | a ring of buckets |
//!
//! Every operation takes constant time (halving the numbers of uses is paid for by the uses before it). Ties go by last use,
//! then by lowest id. Decisions are integers: the same uses give the same order on every machine.
//!
//! A moving average falls by the same factor for all, so the order of experts that are not used stays: what stands for an expert is
//! `log2(affinity at its last use) + steps until then · log2(1 / decay)`, which changes only when it is used.
//!
//! Knows nothing of steps' contents, layers or bytes.

mod buckets;
pub(crate) mod lists;

use self::buckets::{BUCKETS, Buckets};
use self::lists::Lists;
use crate::error::{Error, Result};
use crate::expert::ExpertId;
use crate::routing::affinity::{Affinity, Decay};

/// Which expert leaves when a miss needs room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The expert whose last use is longest ago (ties: lowest id).
    Lru,
    /// The expert that the fewest steps have used (ties: longest ago, then lowest id). When one has been used 4,095 times all
    /// numbers are halved, so that old use fades and no counter overflows.
    Lfu,
    /// Two parts of one memory (Bilal & Kang 2017). What a step uses goes into the privileged half, whose least recently used
    /// experts go down into the unprivileged one; there the one that the fewest steps have used leaves, counted as in
    /// [`Policy::Lfu`]. Of the privileged half only those leave that no other room can be made for, least recently used first.
    Lfru,
    /// The expert with the lowest affinity, the moving average of use of [`Affinity`](crate::routing::Affinity) with its default decay,
    /// told apart to a 64th of a doubling (ties: longest ago, then lowest id).
    Affinity,
}

impl Policy {
    /// All policies.
    pub(crate) const ALL: [Self; 4] = [Self::Lru, Self::Lfu, Self::Lfru, Self::Affinity];

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Lfru => "lfru",
            Self::Affinity => "affinity",
        }
    }
}

/// Its name on the command line.
impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Error::by_name("policy", &Self::ALL, Self::name, name)
    }
}

/// The keys that may leave, in the order in which they do, and what that order needs to know of all others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Order {
    Lru(Lists),
    Lfu(Counts),
    Lfru { privileged: Lists, length: usize, limit: usize, counts: Counts },
    Affinity(Box<Averages>),
}

impl Order {
    /// An order of none of `keys`, of which `capacity` will stay.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many keys.
    pub(crate) fn new(policy: Policy, keys: usize, capacity: usize) -> Result<Self> {
        Ok(match policy {
            Policy::Lru => Self::Lru(Lists::new(keys, 1)),
            Policy::Lfu => Self::Lfu(Counts::new(keys)),
            Policy::Lfru => {
                let (privileged, limit) = (Lists::new(keys, 1), capacity.div_ceil(2));
                Self::Lfru { privileged, length: 0, limit, counts: Counts::new(keys) }
            }
            Policy::Affinity => Self::Affinity(Box::new(Averages::new(keys)?)),
        })
    }

    /// Begins a step.
    pub(crate) fn begin(&mut self) {
        match self {
            Self::Lru(_) => {}
            Self::Lfu(counts) | Self::Lfru { counts, .. } => counts.begin(),
            Self::Affinity(averages) => averages.begin(),
        }
    }

    /// Notes that the step uses `key`, which cannot leave until it is kept again.
    pub(crate) fn use_key(&mut self, key: usize) {
        match self {
            Self::Lru(list) => {
                list.remove(key);
            }
            Self::Lfu(counts) => counts.use_key(key),
            Self::Lfru { privileged, length, counts, .. } => {
                *length -= usize::from(privileged.remove(key));
                counts.use_key(key);
            }
            Self::Affinity(averages) => averages.use_key(key),
        }
    }

    /// Puts a key that the step used into the order; keys come by ascending id.
    pub(crate) fn keep(&mut self, key: usize) {
        match self {
            Self::Lru(list) => list.push_back(0, key),
            Self::Lfu(counts) => counts.push(key),
            Self::Lfru { privileged, length, limit, counts } => {
                privileged.push_back(0, key);
                *length += 1;
                if *length > *limit
                    && let Some(demoted) = privileged.first(0)
                {
                    privileged.remove(demoted);
                    *length -= 1;
                    counts.push(demoted);
                }
            }
            Self::Affinity(averages) => averages.push(key),
        }
    }

    /// Takes out the key that leaves first.
    pub(crate) fn evict(&mut self) -> Option<usize> {
        match self {
            Self::Lru(list) => list.first(0).inspect(|&key| {
                list.remove(key);
            }),
            Self::Lfu(counts) => counts.evict(),
            Self::Lfru { privileged, length, counts, .. } => counts.evict().or_else(|| {
                privileged.first(0).inspect(|&key| {
                    privileged.remove(key);
                    *length -= 1;
                })
            }),
            Self::Affinity(averages) => averages.evict(),
        }
    }
}

/// Numbers of uses, and keys in the order of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    buckets: Buckets,
    /// Steps that used each key, below [`BUCKETS`], and the last of them.
    uses: Vec<(u16, u64)>,
    step: u64,
    halve: bool,
}

impl Counts {
    fn new(keys: usize) -> Self {
        Self { buckets: Buckets::new(keys), uses: vec![(0, 0); keys], step: 0, halve: false }
    }

    fn begin(&mut self) {
        self.step = self.step.saturating_add(1);
        if !std::mem::take(&mut self.halve) {
            return;
        }
        let mut keys: Vec<usize> = std::iter::from_fn(|| self.evict()).collect();
        self.uses.iter_mut().for_each(|(count, _)| *count /= 2);
        // Two buckets become one, in order of last use.
        keys.sort_unstable_by_key(|&key| (self.uses[key], key));
        keys.into_iter().for_each(|key| self.push(key));
    }

    fn use_key(&mut self, key: usize) {
        let (count, last) = &mut self.uses[key];
        self.buckets.remove(key, usize::from(*count));
        *count += 1;
        *last = self.step;
        self.halve |= usize::from(*count) == BUCKETS - 1;
    }

    fn push(&mut self, key: usize) {
        self.buckets.push(key, usize::from(self.uses[key].0));
    }

    fn evict(&mut self) -> Option<usize> {
        let key = self.buckets.first_from(0)?;
        self.buckets.remove(key, usize::from(self.uses[key].0));
        Some(key)
    }
}

/// Parts into which a doubling of affinity is told apart.
const PARTS: f64 = 64.0;

/// Moving averages of use, and keys in the order of them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Averages {
    affinity: Affinity,
    /// Where each key stands: see the module. Counted modulo 2^64; all of the ring's lie within [`BUCKETS`] below the present's.
    places: Vec<u64>,
    /// Keys whose places have left the ring, lowest first.
    forgotten: Lists,
    ring: Buckets,
    /// What an unused expert falls by in a step, in 2^-32 parts: an integer, for a sum of floats would drift.
    fall: u64,
    step: u64,
}

impl Averages {
    fn new(keys: usize) -> Result<Self> {
        let (decay, places) = (Decay::default(), vec![0; keys]);
        let fall = (-libm::log2(f64::from(decay.value())) * PARTS * 4_294_967_296.0) as u64;
        let (affinity, forgotten, ring) = (Affinity::new(keys, decay)?, Lists::new(keys, 1), Buckets::new(keys));
        Ok(Self { affinity, places, forgotten, ring, fall, step: 0 })
    }

    /// Where an expert of affinity 1 would stand after `step`.
    fn present(&self, step: u64) -> u64 {
        ((u128::from(step) * u128::from(self.fall)) >> 32) as u64
    }

    fn begin(&mut self) {
        let present = self.present(self.step);
        self.step = self.step.saturating_add(1);
        let moved = self.present(self.step).wrapping_sub(present);
        // Lowest first, from what was the lowest place of the ring on.
        let lowest = present.wrapping_add(1) as usize % BUCKETS;
        while let Some(key) = self.ring.first_from(lowest) {
            let above = (self.places[key].wrapping_sub(present.wrapping_add(1)) as usize) % BUCKETS;
            if above as u64 >= moved {
                break;
            }
            self.ring.remove(key, self.places[key] as usize % BUCKETS);
            self.forgotten.push_back(0, key);
        }
    }

    fn use_key(&mut self, key: usize) {
        if !self.forgotten.remove(key) {
            self.ring.remove(key, self.places[key] as usize % BUCKETS);
        }
        let expert = ExpertId::from_raw(key as u16);
        self.affinity.use_expert(expert, self.step);
        // Of a use just now at least `1 - decay`, which in 32 bits is at least 2^-24: well within the ring.
        let parts = libm::floor(-libm::log2(f64::from(self.affinity.at(expert, self.step))) * PARTS);
        self.places[key] = self.present(self.step).wrapping_sub(parts as u64);
    }

    fn push(&mut self, key: usize) {
        self.ring.push(key, self.places[key] as usize % BUCKETS);
    }

    fn evict(&mut self) -> Option<usize> {
        if let Some(key) = self.forgotten.first(0) {
            self.forgotten.remove(key);
            return Some(key);
        }
        let lowest = self.present(self.step).wrapping_add(1) as usize % BUCKETS;
        let key = self.ring.first_from(lowest)?;
        self.ring.remove(key, self.places[key] as usize % BUCKETS);
        Some(key)
    }
}
