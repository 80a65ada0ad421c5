//! The capacity of a batch from its size: [`CapacityRule`].
//!
//! `limit of a pool = factor · slots · share of the pool`, made an integer by [`Rounding`].
//!
//! Knows nothing of scores or routers.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::expert::check_expert_count;
use crate::routing::capacity::limits::Capacity;
use crate::routing::capacity::placement::Placement;
use crate::routing::capacity::share::{largest_remainder, relative};

/// How shares of the slots become integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rounding {
    /// Largest remainder: the limits sum to `⌊factor·N·k⌋`, so a factor of 1.0 means 1.0.
    Exact,
    /// `⌈share⌉`, at least 1, as published systems do: hides slack when shares are small.
    Ceil,
}

/// Relative capacities of the experts (the published benchmark's four profiles).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Profile {
    /// All equal.
    Uniform,
    /// 20 % of the experts at three times the others.
    Mild,
    /// 10 % at eight times, 20 % at twice.
    Strong,
    /// 5 % at sixteen times.
    Extreme,
}

impl Profile {
    /// All profiles, in order of rising skew.
    pub(crate) const ALL: [Self; 4] = [Self::Uniform, Self::Mild, Self::Strong, Self::Extreme];

    /// Its name on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Mild => "mild",
            Self::Strong => "strong",
            Self::Extreme => "extreme",
        }
    }

    /// Relative capacity of each expert; which experts are the large ones is shuffled by `seed`.
    pub fn weights(self, experts: usize, seed: u64) -> Vec<f64> {
        let share = |percent: usize| experts * percent / 100;
        let mut weights = vec![1.0; experts];
        match self {
            Self::Uniform => return weights,
            Self::Mild => weights[..share(20)].fill(3.0),
            Self::Strong => {
                weights[..share(10) + share(20)].fill(2.0);
                weights[..share(10)].fill(8.0);
            }
            Self::Extreme => weights[..share(5)].fill(16.0),
        }
        weights.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        weights
    }
}

/// Its name on the command line.
impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Profile {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Error::by_name("profile", &Self::ALL, Self::name, name)
    }
}

/// Which pools are limited, and in which proportion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Shares {
    /// Every expert, in the proportions of a profile shuffled by a seed.
    PerExpert {
        /// Relative capacities.
        profile: Profile,
        /// Which experts are the large ones.
        seed: u64,
    },
    /// Contiguous groups of experts, as large as devices are fast ([`Placement::by_speed`]); `speeds[device]` is the relative capacity
    /// of a device.
    PerDevice {
        /// One positive number per device.
        speeds: Vec<f64>,
    },
    /// The same with groups that are equally large, whatever the speeds ([`Placement::contiguous`]).
    EqualGroups {
        /// One positive number per device.
        speeds: Vec<f64>,
    },
    /// Experts wherever a placement puts them.
    Placed {
        /// The device of each expert: one placement for all layers, or one for each MoE layer.
        placements: Vec<Placement>,
        /// One positive number per device.
        speeds: Vec<f64>,
    },
}

impl Shares {
    /// Relative capacity per device; `None` where limits are per expert.
    pub(crate) fn speeds(&self) -> Option<&[f64]> {
        match self {
            Self::PerExpert { .. } => None,
            Self::PerDevice { speeds } | Self::EqualGroups { speeds } | Self::Placed { speeds, .. } => Some(speeds),
        }
    }

    /// Where the experts of a layer live; `None` where limits are per expert.
    ///
    /// # Errors
    /// [`Error::Shape`] for a placement of another number of experts and for several, [`Error::Parameter`] for no devices or more
    /// contiguous groups than experts and for speeds that are none; [`Error::ExpertCount`].
    pub(crate) fn placement(&self, experts: usize) -> Result<Option<Placement>> {
        match self {
            Self::PerExpert { .. } => Ok(None),
            Self::PerDevice { speeds } => Placement::by_speed(experts, speeds).map(Some),
            Self::EqualGroups { speeds } => Placement::contiguous(experts, speeds.len()).map(Some),
            Self::Placed { placements, .. } => match placements.as_slice() {
                [placement] => placement.check(experts).map(|()| Some(placement.clone())),
                several => Err(Error::shape("placements", "one, or one for each MoE layer", several.len())),
            },
        }
    }

    /// Those of one of so many MoE layers.
    ///
    /// # Errors
    /// [`Error::Shape`] for several placements, and not one for each of them.
    pub(crate) fn of_layer(&self, layer: usize, layers: usize) -> Result<Self> {
        match self {
            Self::Placed { placements, speeds } if placements.len() != 1 => {
                match placements.get(layer).filter(|_| placements.len() == layers) {
                    Some(placement) => Ok(Self::Placed { placements: vec![placement.clone()], speeds: speeds.clone() }),
                    None => {
                        let expected = format!("one, or one for each of {layers} MoE layers");
                        Err(Error::shape("placements", expected, placements.len()))
                    }
                }
            }
            _ => Ok(self.clone()),
        }
    }
}

/// Makes the [`Capacity`] of a batch from its size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CapacityRule {
    /// Total room over demand: 1.0 leaves exactly as much room as there are slots.
    pub factor: f64,
    /// How shares become integers.
    pub rounding: Rounding,
    /// Which pools, in which proportion.
    pub shares: Shares,
    /// Below this many slots per pool on average there is no limit: a share of one slot would throw the gate's choice
    /// away. Decoding one sequence is always below it.
    pub minimum_mean: f64,
}

impl CapacityRule {
    /// Mean slots per pool below which no limit applies, unless a rule says otherwise.
    pub(crate) const DEFAULT_MINIMUM_MEAN: f64 = 4.0;

    /// Limits in these proportions, exact. What makes no sense is an error of [`CapacityRule::capacity`].
    pub fn new(factor: f64, shares: Shares) -> Self {
        Self { factor, rounding: Rounding::Exact, shares, minimum_mean: Self::DEFAULT_MINIMUM_MEAN }
    }

    /// Equal limits per expert, exact.
    pub fn per_expert(factor: f64) -> Self {
        Self::new(factor, Shares::PerExpert { profile: Profile::Uniform, seed: 0 })
    }

    /// Equal limits for `devices` contiguous groups of experts, exact.
    pub fn per_device(factor: f64, devices: usize) -> Self {
        Self::new(factor, Shares::PerDevice { speeds: vec![1.0; devices] })
    }

    /// Limits for devices that hold any experts, in proportion to their `speeds`, exact.
    pub fn placed(factor: f64, placement: Placement, speeds: Vec<f64>) -> Self {
        Self::new(factor, Shares::Placed { placements: vec![placement], speeds })
    }

    /// The same with shares made integers in another way.
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// The same with limits from another mean number of slots per pool on; 0 limits every batch.
    pub fn with_minimum_mean(self, minimum_mean: f64) -> Self {
        Self { minimum_mean, ..self }
    }

    /// The rule for one of a model's MoE layers, `layer` of so many `layers`: where each has its own placement, it has that one.
    ///
    /// # Errors
    /// [`Error::Shape`] for several placements, and not one for each layer.
    pub fn of_layer(&self, layer: usize, layers: usize) -> Result<Self> {
        Ok(Self { shares: self.shares.of_layer(layer, layers)?, ..self.clone() })
    }

    /// The capacity of a batch of `tokens` (padding not counted) in a layer of `experts` with `top_k` slots a token.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a factor or speed that is NaN, infinite or not positive, and for more devices than
    /// experts; [`Error::Shape`] for a placement of another number of experts, for one of each layer (see [`CapacityRule::of_layer`]), and
    /// for another number of speeds than devices; [`Error::ExpertCount`].
    pub fn capacity(&self, tokens: usize, experts: usize, top_k: usize) -> Result<Capacity> {
        check_expert_count(experts)?;
        if !(self.factor.is_finite() && self.factor > 0.0) {
            return Err(Error::parameter("capacity factor", self.factor, "a positive finite number"));
        }
        if self.minimum_mean.is_nan() || self.minimum_mean < 0.0 {
            return Err(Error::parameter("minimum mean of slots per pool", self.minimum_mean, "0 or more"));
        }
        let placement = self.shares.placement(experts)?;
        let weights = match &self.shares {
            Shares::PerExpert { profile, seed } => profile.weights(experts, *seed),
            Shares::PerDevice { speeds } | Shares::EqualGroups { speeds } | Shares::Placed { speeds, .. } => {
                relative(speeds)?
            }
        };
        if let Some(devices) = placement.as_ref().map(Placement::devices).filter(|&devices| devices != weights.len()) {
            return Err(Error::shape(
                "device speeds",
                format!("{devices} devices"),
                format!("{} values", weights.len()),
            ));
        }
        let demand = tokens as f64 * top_k as f64;
        if demand / (weights.len() as f64) < self.minimum_mean {
            return Capacity::unlimited(experts);
        }
        let limits = match self.rounding {
            Rounding::Ceil => {
                let sum: f64 = weights.iter().sum();
                let share =
                    |weight: &f64| (weight / sum * demand * self.factor - ROUNDING_SLACK).ceil().max(1.0) as u32;
                weights.iter().map(share).collect()
            }
            Rounding::Exact => {
                let total = (demand * self.factor + ROUNDING_SLACK).floor().min(f64::MAX);
                if total > f64::from(u32::MAX) {
                    // No batch has this many slots: remainders decide nothing, and a limit above u32 is no limit.
                    let sum: f64 = weights.iter().sum();
                    weights.iter().map(|weight| (weight / sum * total) as u32).collect()
                } else {
                    let shares = largest_remainder(&weights, total as u64).into_iter();
                    shares.map(|share| u32::try_from(share).unwrap_or(u32::MAX)).collect()
                }
            }
        };
        match placement {
            Some(placement) => Capacity::per_device(placement, limits),
            None => Capacity::per_expert(limits),
        }
    }
}

/// Keeps `0.1 · 30` from counting as more or less than 3.
const ROUNDING_SLACK: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_of_one_means_one() {
        for (tokens, experts, top_k) in [(1024, 64, 8), (100, 7, 3), (513, 32, 4), (97, 5, 5)] {
            for profile in Profile::ALL {
                let shares = Shares::PerExpert { profile, seed: 3 };
                let rule = CapacityRule::new(1.0, shares);
                let capacity = rule.capacity(tokens, experts, top_k).unwrap();
                assert_eq!(capacity.total(), Some((tokens * top_k) as u64), "{profile:?} {tokens} {experts} {top_k}");
            }
        }
        assert_eq!(CapacityRule::per_expert(1.25).capacity(1000, 10, 3).unwrap().total(), Some(3750));
        assert_eq!(CapacityRule::per_expert(1.1).capacity(1000, 10, 3).unwrap().total(), Some(3300));
    }

    #[test]
    fn ceil_hides_the_slack_the_anchors_name() {
        // N = 1024 experts and tokens, k = 2: capacity over demand at a nominal factor of 1.0.
        for (profile, real) in
            [(Profile::Uniform, 1.00), (Profile::Mild, 1.30), (Profile::Strong, 1.45), (Profile::Extreme, 1.42)]
        {
            let rule = CapacityRule::new(1.0, Shares::PerExpert { profile, seed: 42 })
                .with_rounding(Rounding::Ceil)
                .with_minimum_mean(0.0);
            let total = rule.capacity(1024, 1024, 2).unwrap().total().unwrap() as f64;
            assert!((total / 2048.0 - real).abs() < 0.01, "{profile:?}: {}", total / 2048.0);
        }
    }

    #[test]
    fn small_batches_have_no_limit() {
        let rule = CapacityRule::per_expert(1.0);
        assert!(rule.capacity(1, 64, 8).unwrap().limits().is_none());
        assert!(rule.capacity(31, 64, 8).unwrap().limits().is_none());
        assert!(rule.capacity(32, 64, 8).unwrap().limits().is_some());
        assert!(CapacityRule::per_device(1.0, 4).capacity(2, 64, 8).unwrap().limits().is_some());
    }

    #[test]
    fn unequal_devices_share_by_speed() {
        let shares = Shares::PerDevice { speeds: vec![1.0, 2.0, 1.0] };
        let capacity = CapacityRule::new(1.0, shares).capacity(100, 8, 2).unwrap();
        assert_eq!(capacity.limits(), Some(&[50, 100, 50][..]));
        assert_eq!(capacity.pool_sizes(), [2, 4, 2]);
        let equal = Shares::EqualGroups { speeds: vec![1.0, 2.0, 1.0] };
        let equal = CapacityRule::new(1.0, equal).capacity(100, 8, 2).unwrap();
        assert_eq!((equal.limits(), equal.pool_sizes()), (Some(&[50, 100, 50][..]), vec![3, 3, 2]));
        assert_eq!(capacity.pool_of(7), 2);
    }

    #[test]
    fn experts_may_be_anywhere() {
        let scattered = Placement::new(vec![2, 0, 1, 1, 2, 0, 1, 0], 3).unwrap();
        let speeds = vec![1.0, 2.0, 1.0];
        let capacity = CapacityRule::placed(1.0, scattered.clone(), speeds.clone()).capacity(100, 8, 2).unwrap();
        assert_eq!((capacity.limits(), capacity.placement()), (Some(&[50, 100, 50][..]), Some(&scattered)));
        // Contiguous groups are a placement like any other.
        let groups = Placement::contiguous(8, 3).unwrap();
        let shares = Shares::EqualGroups { speeds: speeds.clone() };
        for tokens in [1, 99, 100, 1000] {
            let placed = CapacityRule::placed(0.9, groups.clone(), speeds.clone()).capacity(tokens, 8, 2).unwrap();
            assert_eq!(placed, CapacityRule::new(0.9, shares.clone()).capacity(tokens, 8, 2).unwrap());
        }
    }

    #[test]
    fn each_layer_may_have_its_own_placement() {
        let placements = vec![Placement::contiguous(4, 2).unwrap(), Placement::new(vec![1, 0, 1, 1], 2).unwrap()];
        let rule = CapacityRule::new(1.0, Shares::Placed { placements: placements.clone(), speeds: vec![1.0, 3.0] });
        for (layer, placement) in placements.iter().enumerate() {
            let capacity = rule.of_layer(layer, 2).unwrap().capacity(100, 4, 2).unwrap();
            assert_eq!((capacity.placement(), capacity.limits()), (Some(placement), Some(&[50, 150][..])));
        }
        let message = |error: Result<CapacityRule>| error.unwrap_err().to_string();
        assert_eq!(message(rule.of_layer(0, 3)), "placements: expected one, or one for each of 3 MoE layers, got 2");
        assert_eq!(message(rule.of_layer(2, 2)), "placements: expected one, or one for each of 2 MoE layers, got 2");
        let error = rule.capacity(100, 4, 2).unwrap_err();
        assert_eq!(error.to_string(), "placements: expected one, or one for each MoE layer, got 2");
        // One is for all of them.
        let one = CapacityRule::placed(1.0, placements[1].clone(), vec![1.0, 3.0]);
        assert_eq!(one.of_layer(7, 2).unwrap(), one);
    }

    #[test]
    fn room_without_end_is_room_for_all() {
        for rounding in [Rounding::Exact, Rounding::Ceil] {
            for factor in [4e18, 1e300] {
                let rule = CapacityRule::per_expert(factor).with_rounding(rounding);
                assert_eq!(rule.capacity(100, 8, 2).unwrap().limits(), Some(&[u32::MAX; 8][..]), "{factor}");
            }
        }
        let shares = Shares::PerDevice { speeds: vec![1e9, 1.0] };
        let capacity = CapacityRule::new(1e12, shares).capacity(100, 8, 2).unwrap();
        assert_eq!(capacity.limits(), Some(&[u32::MAX, 199_999][..]));
        let shares = Shares::PerDevice { speeds: vec![1e308, 1e308, 1e308, 1.0] };
        let capacity = CapacityRule::new(1.0, shares).capacity(100, 8, 3).unwrap();
        assert_eq!(capacity.limits(), Some(&[100, 100, 100, 0][..]));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let message = |rule: CapacityRule| rule.capacity(100, 4, 2).unwrap_err().to_string();
        for bad in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            assert!(message(CapacityRule::per_expert(bad)).starts_with("capacity factor is "), "{bad}");
        }
        let rule = CapacityRule::per_expert(1.0).with_minimum_mean(f64::NAN);
        assert_eq!(message(rule), "minimum mean of slots per pool is NaN: expected 0 or more");
        assert_eq!(message(CapacityRule::per_device(1.0, 5)), "devices is 5: expected 1 to experts 4");
        assert_eq!(message(CapacityRule::per_device(1.0, 0)), "devices is 0: expected 1 to experts 4");
        let placement = Placement::contiguous(4, 2).unwrap();
        let placed = |speeds: &[f64]| CapacityRule::placed(1.0, placement.clone(), speeds.to_vec());
        assert_eq!(message(placed(&[1.0; 3])), "device speeds: expected 2 devices, got 3 values");
        assert_eq!(message(placed(&[1.0, 0.0])), "device speed is 0: expected a positive finite number");
        let error = placed(&[1.0; 2]).capacity(100, 5, 2).unwrap_err().to_string();
        assert_eq!(error, "placement: expected 5 experts, got 4 experts");
        let error = Capacity::per_device(placement, vec![1; 3]).unwrap_err();
        assert_eq!(error.to_string(), "device capacities: expected 2 devices, got 3 values");
        assert!(Placement::new(vec![0, 2], 2).is_err());
        assert_eq!(
            "steep".parse::<Profile>().unwrap_err().to_string(),
            "unknown profile `steep`: expected one of uniform, mild, strong, extreme"
        );
    }
}
