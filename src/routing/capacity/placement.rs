//! Which device each expert lives on: [`Placement`].
//!
//! Knows nothing of how much room there is.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::expert::check_expert_count;
use crate::routing::capacity::share::{largest_remainder, relative};

/// Which device each expert lives on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Placed", into = "Placed")]
pub struct Placement {
    device_of: Vec<u16>,
    devices: usize,
}

/// A placement as it is written, before it is checked.
#[derive(Serialize, Deserialize)]
struct Placed {
    device_of: Vec<u16>,
    devices: usize,
}

impl From<Placement> for Placed {
    fn from(Placement { device_of, devices }: Placement) -> Self {
        Self { device_of, devices }
    }
}

impl TryFrom<Placed> for Placement {
    type Error = Error;

    fn try_from(Placed { device_of, devices }: Placed) -> Result<Self> {
        Self::new(device_of, devices)
    }
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

    /// Experts in contiguous groups of sizes in proportion to `speeds[device]` (largest remainder, at least one expert each): with
    /// equal speeds those of [`Placement::contiguous`].
    ///
    /// # Errors
    /// As [`Placement::contiguous`], and [`Error::Parameter`] for a speed that is NaN, infinite or not positive.
    pub fn by_speed(experts: usize, speeds: &[f64]) -> Result<Self> {
        let mut placement = Self::contiguous(experts, speeds.len())?;
        let sizes = by_speed(experts, &relative(speeds)?).into_iter().enumerate();
        placement.device_of = sizes.flat_map(|(device, size)| std::iter::repeat_n(device as u16, size)).collect();
        Ok(placement)
    }

    /// Checks that it places `experts`.
    pub(crate) fn check(&self, experts: usize) -> Result<()> {
        match self.experts() == experts {
            true => Ok(()),
            false => {
                Err(Error::shape("placement", format!("{experts} experts"), format!("{} experts", self.experts())))
            }
        }
    }

    /// Experts placed.
    pub(crate) fn experts(&self) -> usize {
        self.device_of.len()
    }

    /// Devices there are.
    pub(crate) fn devices(&self) -> usize {
        self.devices
    }

    /// Experts on each device, `[devices]`.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.devices];
        self.device_of.iter().for_each(|&device| sizes[usize::from(device)] += 1);
        sizes
    }

    /// Device of each expert, `[experts]`.
    pub(crate) fn device_of(&self) -> &[u16] {
        &self.device_of
    }
}

/// How many of `experts` each of at most as many devices holds, in proportion to `speeds` relative to the fastest. A device whose
/// share rounds to none holds one, and the others share the rest.
pub(crate) fn by_speed(experts: usize, speeds: &[f64]) -> Vec<usize> {
    let mut sizes = vec![1; speeds.len()];
    let mut sharing: Vec<usize> = (0..speeds.len()).collect();
    loop {
        let weights: Vec<f64> = sharing.iter().map(|&device| speeds[device]).collect();
        let shares = largest_remainder(&weights, (experts - (speeds.len() - sharing.len())) as u64);
        if !shares.contains(&0) {
            sharing.iter().zip(shares).for_each(|(&device, share)| sizes[device] = share as usize);
            return sizes;
        }
        // The fastest device's share is at least the mean, which is at least one: it stays.
        sharing = sharing.into_iter().zip(shares).filter(|(_, share)| *share > 0).map(|(device, _)| device).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn groups_are_as_large_as_devices_are_fast() {
        let sizes = |experts, speeds: &[f64]| Placement::by_speed(experts, speeds).unwrap().sizes();
        assert_eq!(sizes(32, &[3.0, 1.0]), [24, 8]);
        assert_eq!(sizes(8, &[1.0, 2.0, 1.0]), [2, 4, 2]);
        // 7 · (1, 2, 4) / 7 and 10 · (1, 2, 4) / 7 = (1.43, 2.86, 5.71).
        assert_eq!((sizes(7, &[1.0, 2.0, 4.0]), sizes(10, &[1.0, 2.0, 4.0])), (vec![1, 2, 4], vec![1, 3, 6]));
        // However slow, a device holds an expert.
        assert_eq!(sizes(8, &[1e6, 1.0, 1.0]), [6, 1, 1]);
        assert_eq!(sizes(4, &[1e308, 1e-308, 1.0, 1e308]), [1, 1, 1, 1]);
        assert_eq!(Placement::by_speed(4, &[1.0, 3.0]).unwrap().device_of(), [0, 1, 1, 1]);
        let message = |experts, speeds: &[f64]| Placement::by_speed(experts, speeds).unwrap_err().to_string();
        assert_eq!(message(2, &[1.0; 3]), "devices is 3: expected 1 to experts 2");
        assert_eq!(message(2, &[]), "devices is 0: expected 1 to experts 2");
        assert_eq!(message(2, &[1.0, 0.0]), "device speed is 0: expected a positive finite number");
    }

    proptest! {
        #[test]
        fn equal_speeds_are_equal_groups(experts in 1usize..300, devices in 1usize..40, speed in 1e-3f64..1e3) {
            let devices = devices.min(experts);
            let by_speed = Placement::by_speed(experts, &vec![speed; devices]).unwrap();
            prop_assert_eq!(by_speed, Placement::contiguous(experts, devices).unwrap());
        }

        #[test]
        fn every_device_holds_its_share(experts in 1usize..300, speeds in prop::collection::vec(0.01f64..100.0, 1..40)) {
            let speeds = &speeds[..speeds.len().min(experts)];
            let sizes = Placement::by_speed(experts, speeds).unwrap().sizes();
            prop_assert!(sizes.iter().sum::<usize>() == experts && !sizes.contains(&0));
            let sum: f64 = speeds.iter().sum();
            // Who holds one because there is no less takes it from the others: never above one expert more than its share.
            for (&size, speed) in sizes.iter().zip(speeds) {
                prop_assert!(size == 1 || (size as f64) < speed / sum * experts as f64 + 1.0, "{sizes:?} {speeds:?}");
            }
        }
    }
}
