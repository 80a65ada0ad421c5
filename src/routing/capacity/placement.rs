//! Which device each expert lives on: [`Placement`].
//!
//! Knows nothing of how fast devices are.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::expert::check_expert_count;

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
