//! Capacity: how many slots each expert, or each device, has room for in one batch.
//!
//! A [`Capacity`] holds integers; a [`CapacityRule`] makes one for a batch from a capacity factor. Limits belong to
//! **pools**: a pool is one expert, or one device with all the experts [`Placement`] puts on it.
//!
//! ```
//! use phase_moe::routing::capacity::{CapacityRule, Rounding};
//!
//! // 100 tokens, 8 experts, top 2: 200 slots, 25 an expert at factor 1.0.
//! let capacity = CapacityRule::per_expert(1.0).capacity(100, 8, 2)?;
//! assert_eq!(capacity.limits(), Some(&[25; 8][..]));
//!
//! // 200 slots over 3 devices cannot be equal: exact shares sum to 200, published systems round each up.
//! let exact = CapacityRule::per_device(1.0, 3).capacity(100, 9, 2)?;
//! assert_eq!(exact.limits(), Some(&[67, 67, 66][..]));
//! let ceil = CapacityRule { rounding: Rounding::Ceil, ..CapacityRule::per_device(1.0, 3) }.capacity(100, 9, 2)?;
//! assert_eq!(ceil.limits(), Some(&[67, 67, 67][..]));
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of scores or routers.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::expert::check_expert_count;

/// Which device each expert lives on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    device_of: Vec<u16>,
    devices: usize,
}

impl Placement {
    /// Any placement: `device_of[expert]` is below `devices`. A device may hold no expert.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts, [`Error::Parameter`] for no devices, more than 65,535, or a
    /// device out of range.
    pub fn new(device_of: Vec<u16>, devices: usize) -> Result<Self> {
        check_expert_count(device_of.len())?;
        if devices == 0 || devices > usize::from(u16::MAX) {
            return Err(Error::parameter("devices", devices, "1 to 65535"));
        }
        if let Some(device) = device_of.iter().find(|&&device| usize::from(device) >= devices) {
            return Err(Error::parameter("device of an expert", device, format!("below devices {devices}")));
        }
        Ok(Self { device_of, devices })
    }

    /// Experts in `devices` contiguous groups, the first ones one expert larger where they do not divide.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts, [`Error::Parameter`] for no devices or more than experts.
    pub fn contiguous(experts: usize, devices: usize) -> Result<Self> {
        check_expert_count(experts)?;
        if devices == 0 || devices > experts {
            return Err(Error::parameter("devices", devices, format!("1 to experts {experts}")));
        }
        let (share, larger) = (experts / devices, experts % devices);
        let sizes = (0..devices).map(|device| share + usize::from(device < larger));
        let device_of = sizes.enumerate().flat_map(|(device, size)| std::iter::repeat_n(device as u16, size)).collect();
        Self::new(device_of, devices)
    }

    /// Experts placed.
    pub fn experts(&self) -> usize {
        self.device_of.len()
    }

    /// Devices there are.
    pub fn devices(&self) -> usize {
        self.devices
    }

    /// Experts on each device, `[devices]`.
    pub fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.devices];
        self.device_of.iter().for_each(|&device| sizes[usize::from(device)] += 1);
        sizes
    }

    /// Device of each expert, `[experts]`.
    pub fn device_of(&self) -> &[u16] {
        &self.device_of
    }
}

/// Room for slots in one batch: per expert, per device, or without limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity(Room);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Room {
    Unlimited { experts: usize },
    PerExpert { limits: Vec<u32> },
    PerDevice { placement: Placement, limits: Vec<u32> },
}

impl Capacity {
    /// Room for everything.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts.
    pub fn unlimited(experts: usize) -> Result<Self> {
        check_expert_count(experts)?;
        Ok(Self(Room::Unlimited { experts }))
    }

    /// `limits[expert]` slots per expert; 0 is allowed.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts.
    pub fn per_expert(limits: Vec<u32>) -> Result<Self> {
        check_expert_count(limits.len())?;
        Ok(Self(Room::PerExpert { limits }))
    }

    /// `limits[device]` slots for all experts of a device together; 0 is allowed.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not one limit per device.
    pub fn per_device(placement: Placement, limits: Vec<u32>) -> Result<Self> {
        if limits.len() != placement.devices() {
            return Err(Error::shape(
                "device capacities",
                format!("{} devices", placement.devices()),
                format!("{} values", limits.len()),
            ));
        }
        Ok(Self(Room::PerDevice { placement, limits }))
    }

    /// Experts of the layer it is for.
    pub fn experts(&self) -> usize {
        match &self.0 {
            Room::Unlimited { experts } => *experts,
            Room::PerExpert { limits } => limits.len(),
            Room::PerDevice { placement, .. } => placement.experts(),
        }
    }

    /// Slots per pool (expert or device); `None` without limit.
    pub fn limits(&self) -> Option<&[u32]> {
        match &self.0 {
            Room::Unlimited { .. } => None,
            Room::PerExpert { limits } | Room::PerDevice { limits, .. } => Some(limits),
        }
    }

    /// Where experts live, if the limits are per device.
    pub fn placement(&self) -> Option<&Placement> {
        match &self.0 {
            Room::PerDevice { placement, .. } => Some(placement),
            _ => None,
        }
    }

    /// Pool of an expert: its device, or itself.
    ///
    /// # Panics
    /// When the limits are per device and `expert` is not below [`Capacity::experts`].
    pub fn pool_of(&self, expert: u16) -> usize {
        match &self.0 {
            Room::PerDevice { placement, .. } => usize::from(placement.device_of[usize::from(expert)]),
            _ => usize::from(expert),
        }
    }

    /// Experts in each pool, `[pools]`.
    pub fn pool_sizes(&self) -> Vec<usize> {
        match &self.0 {
            Room::PerDevice { placement, .. } => placement.sizes(),
            _ => vec![1; self.experts()],
        }
    }

    /// Sum of the limits; `None` without limit.
    pub fn total(&self) -> Option<u64> {
        Some(self.limits()?.iter().map(|&limit| u64::from(limit)).sum())
    }

    /// Slots that can be kept when no expert is masked: `min(N·k, Σ_p min(C_p, N·experts of p))`, the maximum flow.
    pub fn feasible_slots(&self, tokens: usize, top_k: usize) -> u64 {
        let demand = tokens as u64 * top_k as u64;
        let Some(limits) = self.limits() else { return demand };
        let room = limits
            .iter()
            .zip(self.pool_sizes())
            .map(|(&limit, size)| u64::from(limit).min(tokens as u64 * size as u64));
        demand.min(room.sum())
    }
}

/// How shares of the slots become integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Largest remainder: the limits sum to `⌊factor·N·k⌋`, so a factor of 1.0 means 1.0.
    Exact,
    /// `⌈share⌉`, at least 1, as published systems do: hides slack when shares are small.
    Ceil,
}

/// Relative capacities of the experts (the published benchmark's four profiles).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    pub const ALL: [Self; 4] = [Self::Uniform, Self::Mild, Self::Strong, Self::Extreme];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
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

impl std::str::FromStr for Profile {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|profile| profile.name() == name).ok_or_else(|| Error::UnknownName {
            kind: "profile",
            got: name.into(),
            expected: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// Whose room is limited, and in which proportion.
#[derive(Clone, Debug, PartialEq)]
pub enum Shares {
    /// Every expert, in the proportions of a profile shuffled by a seed.
    PerExpert {
        /// Relative capacities.
        profile: Profile,
        /// Which experts are the large ones.
        seed: u64,
    },
    /// Contiguous groups of experts; `speeds[device]` is the relative capacity of a device.
    PerDevice {
        /// One positive number per device.
        speeds: Vec<f64>,
    },
}

/// Makes the [`Capacity`] of a batch from its size.
#[derive(Clone, Debug, PartialEq)]
pub struct CapacityRule {
    /// Total room over demand: 1.0 leaves exactly as much room as there are slots.
    pub factor: f64,
    /// How shares become integers.
    pub rounding: Rounding,
    /// Whose room, in which proportion.
    pub shares: Shares,
    /// Below this many slots per pool on average there is no limit: a share of one slot would throw the gate's choice
    /// away. Decoding one sequence is always below it.
    pub minimum_mean: f64,
}

impl CapacityRule {
    /// Mean slots per pool below which no limit applies, unless a rule says otherwise.
    pub const DEFAULT_MINIMUM_MEAN: f64 = 4.0;

    /// Equal limits per expert, exact.
    pub fn per_expert(factor: f64) -> Self {
        Self {
            factor,
            rounding: Rounding::Exact,
            shares: Shares::PerExpert { profile: Profile::Uniform, seed: 0 },
            minimum_mean: Self::DEFAULT_MINIMUM_MEAN,
        }
    }

    /// Equal limits for `devices` contiguous groups of experts, exact.
    pub fn per_device(factor: f64, devices: usize) -> Self {
        Self { shares: Shares::PerDevice { speeds: vec![1.0; devices] }, ..Self::per_expert(factor) }
    }

    /// The capacity of a batch of `tokens` (padding not counted) in a layer of `experts` with `top_k` slots a token.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a factor or speed that is NaN, infinite or not positive, and for more devices than
    /// experts; [`Error::ExpertCount`].
    pub fn capacity(&self, tokens: usize, experts: usize, top_k: usize) -> Result<Capacity> {
        check_expert_count(experts)?;
        if !(self.factor.is_finite() && self.factor > 0.0) {
            return Err(Error::parameter("capacity factor", self.factor, "a positive finite number"));
        }
        if self.minimum_mean.is_nan() || self.minimum_mean < 0.0 {
            return Err(Error::parameter("minimum mean of slots per pool", self.minimum_mean, "0 or more"));
        }
        let (weights, placement): (Vec<f64>, _) = match &self.shares {
            Shares::PerExpert { profile, seed } => (profile.weights(experts, *seed), None),
            Shares::PerDevice { speeds } => {
                if let Some(bad) = speeds.iter().find(|speed| !(speed.is_finite() && **speed > 0.0)) {
                    return Err(Error::parameter("device speed", bad, "a positive finite number"));
                }
                // Divided by the fastest, so that no sum of them overflows.
                let fastest = speeds.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
                let relative = speeds.iter().map(|speed| speed / fastest).collect();
                (relative, Some(Placement::contiguous(experts, speeds.len())?))
            }
        };
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

/// Splits `total` in proportion to `weights` into integers that sum to it (Hamilton's method; ties to the lower index).
pub(crate) fn largest_remainder(weights: &[f64], total: u64) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    if weights.is_empty() || sum <= 0.0 {
        return vec![0; weights.len()];
    }
    let quotas: Vec<f64> = weights.iter().map(|weight| weight / sum * total as f64).collect();
    let mut shares: Vec<u64> = quotas.iter().map(|quota| quota.floor() as u64).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let remainder = |index: usize| quotas[index] - quotas[index].floor();
    // Equal weights may differ in the last bit of their remainders: compare with slack so that ties go by index.
    order.sort_by(|&a, &b| ((remainder(b) * 1e9).round().total_cmp(&(remainder(a) * 1e9).round())).then(a.cmp(&b)));
    let left = total.saturating_sub(shares.iter().sum());
    for &index in order.iter().cycle().take(left as usize) {
        shares[index] += 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_factor_of_one_means_one() {
        for (tokens, experts, top_k) in [(1024, 64, 8), (100, 7, 3), (513, 32, 4), (97, 5, 5)] {
            for profile in Profile::ALL {
                let shares = Shares::PerExpert { profile, seed: 3 };
                let rule = CapacityRule { shares, ..CapacityRule::per_expert(1.0) };
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
            let rule = CapacityRule {
                rounding: Rounding::Ceil,
                shares: Shares::PerExpert { profile, seed: 42 },
                minimum_mean: 0.0,
                ..CapacityRule::per_expert(1.0)
            };
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
        let capacity = CapacityRule { shares, ..CapacityRule::per_expert(1.0) }.capacity(100, 8, 2).unwrap();
        assert_eq!(capacity.limits(), Some(&[50, 100, 50][..]));
        assert_eq!(capacity.pool_sizes(), [3, 3, 2]);
        assert_eq!(capacity.pool_of(7), 2);
    }

    #[test]
    fn room_without_end_is_room_for_all() {
        for rounding in [Rounding::Exact, Rounding::Ceil] {
            for factor in [4e18, 1e300] {
                let rule = CapacityRule { rounding, ..CapacityRule::per_expert(factor) };
                assert_eq!(rule.capacity(100, 8, 2).unwrap().limits(), Some(&[u32::MAX; 8][..]), "{factor}");
            }
        }
        let shares = Shares::PerDevice { speeds: vec![1e9, 1.0] };
        let capacity = CapacityRule { shares, ..CapacityRule::per_expert(1e12) }.capacity(100, 8, 2).unwrap();
        assert_eq!(capacity.limits(), Some(&[u32::MAX, 199_999][..]));
        let shares = Shares::PerDevice { speeds: vec![1e308, 1e308, 1e308, 1.0] };
        let capacity = CapacityRule { shares, ..CapacityRule::per_expert(1.0) }.capacity(100, 8, 3).unwrap();
        assert_eq!(capacity.limits(), Some(&[100, 100, 100, 0][..]));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let message = |rule: CapacityRule| rule.capacity(100, 4, 2).unwrap_err().to_string();
        for bad in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            assert!(message(CapacityRule::per_expert(bad)).starts_with("capacity factor is "), "{bad}");
        }
        let rule = CapacityRule { minimum_mean: f64::NAN, ..CapacityRule::per_expert(1.0) };
        assert_eq!(message(rule), "minimum mean of slots per pool is NaN: expected 0 or more");
        assert_eq!(message(CapacityRule::per_device(1.0, 5)), "devices is 5: expected 1 to experts 4");
        assert_eq!(message(CapacityRule::per_device(1.0, 0)), "devices is 0: expected 1 to experts 4");
        let placement = Placement::contiguous(4, 2).unwrap();
        let error = Capacity::per_device(placement, vec![1; 3]).unwrap_err();
        assert_eq!(error.to_string(), "device capacities: expected 2 devices, got 3 values");
        assert!(Placement::new(vec![0, 2], 2).is_err());
        assert_eq!(
            "steep".parse::<Profile>().unwrap_err().to_string(),
            "unknown profile `steep`: expected one of uniform, mild, strong, extreme"
        );
    }

    proptest! {
        #[test]
        fn shares_sum_to_the_total(weights in prop::collection::vec(0.01f64..10.0, 1..50), total in 0u64..100_000) {
            let shares = largest_remainder(&weights, total);
            prop_assert_eq!(shares.iter().sum::<u64>(), total);
            let sum: f64 = weights.iter().sum();
            for (share, weight) in shares.iter().zip(&weights) {
                prop_assert!((*share as f64 - weight / sum * total as f64).abs() < 1.0 + 1e-6);
            }
        }
    }
}
