//! How many slots each pool has room for in one batch: [`Capacity`], integers.
//!
//! Knows nothing of where the numbers come from.

use crate::error::{Error, Result};
use crate::expert::check_expert_count;
use crate::routing::capacity::placement::Placement;

/// Room for slots in one batch: per expert, per device, or without limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity(Limits);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Limits {
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
        Ok(Self(Limits::Unlimited { experts }))
    }

    /// `limits[expert]` slots per expert; 0 is allowed.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for no or too many experts.
    pub fn per_expert(limits: Vec<u32>) -> Result<Self> {
        check_expert_count(limits.len())?;
        Ok(Self(Limits::PerExpert { limits }))
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
        Ok(Self(Limits::PerDevice { placement, limits }))
    }

    /// Experts of the layer it is for.
    pub(crate) fn experts(&self) -> usize {
        match &self.0 {
            Limits::Unlimited { experts } => *experts,
            Limits::PerExpert { limits } => limits.len(),
            Limits::PerDevice { placement, .. } => placement.experts(),
        }
    }

    /// Slots per pool (expert or device); `None` without limit.
    pub fn limits(&self) -> Option<&[u32]> {
        match &self.0 {
            Limits::Unlimited { .. } => None,
            Limits::PerExpert { limits } | Limits::PerDevice { limits, .. } => Some(limits),
        }
    }

    /// Where experts live, if the limits are per device.
    pub(crate) fn placement(&self) -> Option<&Placement> {
        match &self.0 {
            Limits::PerDevice { placement, .. } => Some(placement),
            _ => None,
        }
    }

    /// Pool of an expert: its device, or itself.
    ///
    /// # Panics
    /// When the limits are per device and `expert` is not an expert of the layer.
    pub fn pool_of(&self, expert: u16) -> usize {
        match &self.0 {
            Limits::PerDevice { placement, .. } => usize::from(placement.device_of()[usize::from(expert)]),
            _ => usize::from(expert),
        }
    }

    /// Experts in each pool, `[pools]`.
    pub(crate) fn pool_sizes(&self) -> Vec<usize> {
        match &self.0 {
            Limits::PerDevice { placement, .. } => placement.sizes(),
            _ => vec![1; self.experts()],
        }
    }

    /// Sum of the limits; `None` without limit.
    #[cfg(test)]
    pub(crate) fn total(&self) -> Option<u64> {
        Some(self.limits()?.iter().map(|&limit| u64::from(limit)).sum())
    }

    /// Slots that can be kept when no expert is masked: `min(N·k, Σ_p min(C_p, N·experts of p))`, the maximum flow.
    pub(crate) fn feasible_slots(&self, tokens: usize, top_k: usize) -> u64 {
        let demand = tokens as u64 * top_k as u64;
        let Some(limits) = self.limits() else { return demand };
        let room = limits
            .iter()
            .zip(self.pool_sizes())
            .map(|(&limit, size)| u64::from(limit).min(tokens as u64 * size as u64));
        demand.min(room.sum())
    }
}
