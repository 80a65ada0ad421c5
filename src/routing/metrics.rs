//! What a routing did: survival, gate mass, balance, as plain numbers.
//!
//! Knows nothing of files, tables or pages; the words are those of the architecture page.

use crate::routing::assignment::Assignment;
use crate::routing::capacity::Capacity;
use crate::routing::router::RouteRequest;
use crate::routing::slots::EMPTY;
use crate::routing::topk::gate_choice;

/// Spread of loads over experts or devices, each against its share of the room: `r = load / share`, one number for each of `n`.
/// Loads in proportion to the shares are perfectly balanced, whatever the shares.
///
/// What has no share and no load counts nowhere (`n` is without it). What has no share and a load is without end above it:
/// beside it those with a share count as 0. Where nothing has a share, `r` is the load.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Balance {
    /// Largest load over its fair share of the demand, minus 1 (MaxVio, arXiv 2408.15664); 0 is perfect, below 0 means
    /// that slots were dropped, infinite that one without a share has a load.
    pub max_violation: f64,
    /// Standard deviation over mean: `√(Σ(r − r̄)² / n) / r̄`.
    pub cv: f64,
    /// Gini coefficient, `Σᵢ Σⱼ |rᵢ − rⱼ| / (2 n² r̄)`: 0 is equal, towards 1 one expert has all.
    pub gini: f64,
    /// Jain's fairness index, `(Σr)² / (n Σr²)`: 1 is equal, 1/n one expert has all.
    pub jain: f64,
}

/// Shares below this part of the largest, or below this number, count as none: no sum of squares overflows.
const LEAST_SHARE: (f64, f64) = (1e-100, 1e-200);

impl Balance {
    /// The spread of `loads` where each should have had its part of `demand` slots in proportion to `fair` (any scale).
    /// No demand, or no load where none was fair, is balanced.
    pub(crate) fn new(loads: &[u32], fair: &[f64], demand: u64) -> Self {
        let total: f64 = loads.iter().map(|&load| f64::from(load)).sum();
        let fair_total: f64 = fair.iter().sum();
        let violation = |(&load, &fair): (&u32, &f64)| match fair / fair_total * demand as f64 {
            share if share > 0.0 => f64::from(load) / share - 1.0,
            _ if load > 0 => f64::INFINITY,
            _ => -1.0,
        };
        let max_violation = match demand {
            0 => 0.0,
            _ => loads.iter().zip(fair).map(violation).fold(f64::NEG_INFINITY, f64::max),
        };
        if total == 0.0 {
            return Self { max_violation, jain: 1.0, ..Self::default() };
        }
        let mut sorted = relative(loads, fair);
        let (count, total) = (sorted.len() as f64, sorted.iter().sum::<f64>());
        let mean = total / count;
        let squares: f64 = sorted.iter().map(|load| load.powi(2)).sum();
        // Of the loads themselves, whole numbers, this is exact; of others a difference of near equals would be noise.
        let variance = match sorted.iter().copied().eq(loads.iter().map(|&load| f64::from(load))) {
            true => (squares / count - mean * mean).max(0.0),
            false => sorted.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / count,
        };
        sorted.sort_unstable_by(f64::total_cmp);
        let ranked: f64 = sorted.iter().zip(1..).map(|(&load, rank)| load * f64::from(rank)).sum();
        Self {
            max_violation,
            cv: variance.sqrt() / mean,
            gini: (2.0 * ranked / (count * total) - (count + 1.0) / count).max(0.0),
            jain: total * total / (count * squares),
        }
    }
}

/// Loads over shares, up to a factor; the loads themselves where the shares are equal.
fn relative(loads: &[u32], fair: &[f64]) -> Vec<f64> {
    let largest = fair.iter().copied().fold(0.0, f64::max);
    let least = (largest * LEAST_SHARE.0).max(LEAST_SHARE.1);
    let equal = largest < least || fair.iter().all(|&fair| fair == largest);
    let all = || loads.iter().map(|&load| f64::from(load)).zip(fair.iter().copied());
    if equal {
        return all().map(|(load, _)| load).collect();
    }
    let without_share = all().any(|(load, fair)| fair < least && load > 0.0);
    let relative = |(load, fair): (f64, f64)| match fair >= least {
        // In this order: loads in proportion to the shares have the same quotient to the last bit.
        true if !without_share => Some(load / fair * largest),
        true => Some(0.0),
        false => (load > 0.0).then_some(load),
    };
    all().filter_map(relative).collect()
}

/// Figures of one routed batch of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteMetrics {
    /// Slots asked for: tokens that are not padding, times top_k.
    pub demand: u64,
    /// Slots with an expert.
    pub kept: u64,
    /// Tokens that are not padding and got no expert at all.
    pub tokens_without_expert: u64,
    /// Sum of the gate scores of kept slots.
    pub gate_mass: f64,
    /// The same for the gate's own top-k without any capacity.
    pub top_k_gate_mass: f64,
    /// Balance of the kept slots over experts, against each expert's share of the capacity.
    pub experts: Balance,
    /// Balance of the kept slots over devices, where the capacity is per device, against each device's limit.
    pub devices: Option<Balance>,
    /// Largest load of the gate's own top-k, before any capacity, against the same shares.
    pub demand_max_violation: f64,
}

impl RouteMetrics {
    /// Measures `assignment` against the request it answers.
    ///
    /// # Panics
    /// May do so where `assignment` is none to `request`: see [`check_assignment`](crate::routing::check::check_assignment).
    pub fn new(request: &RouteRequest<'_>, assignment: &Assignment) -> Self {
        let (scores, capacity, top_k) = (request.scores(), request.capacity(), request.top_k());
        let choice = gate_choice(request);
        let mut demand_load = vec![0u32; scores.experts()];
        choice.iter().filter(|&&expert| expert != EMPTY).for_each(|&expert| demand_load[usize::from(expert)] += 1);
        let load = assignment.load();

        let demand = request.live_tokens() as u64 * top_k as u64;
        let expert_shares = expert_shares(capacity);
        let (devices, demand_max_violation) = match (capacity.placement(), capacity.limits()) {
            (Some(placement), Some(limits)) => {
                let fair: Vec<f64> = limits.iter().map(|&limit| f64::from(limit)).collect();
                let balance = |load: &[u32]| {
                    let mut devices = vec![0; placement.devices()];
                    let device_of = placement.device_of().iter();
                    load.iter().zip(device_of).for_each(|(load, &device)| devices[usize::from(device)] += load);
                    Balance::new(&devices, &fair, demand)
                };
                (Some(balance(&load)), balance(&demand_load).max_violation)
            }
            _ => (None, Balance::new(&demand_load, &expert_shares, demand).max_violation),
        };
        let without = |token: &usize| !request.is_padding(*token) && assignment.slots(*token).next().is_none();
        Self {
            demand,
            kept: assignment.kept() as u64,
            tokens_without_expert: (0..scores.tokens()).filter(without).count() as u64,
            gate_mass: gate_mass(request, assignment.raw(), assignment.width()),
            top_k_gate_mass: gate_mass(request, &choice, top_k),
            experts: Balance::new(&load, &expert_shares, demand),
            devices,
            demand_max_violation,
        }
    }

    /// Kept slots over demand; 1 when nothing was asked for. Above 1 where tokens get more experts than they asked for.
    pub fn survival(&self) -> f64 {
        if self.demand == 0 { 1.0 } else { self.kept as f64 / self.demand as f64 }
    }

    /// Kept gate mass over that of unconstrained top-k; 1 when there is none. Above 1 only where a model's selection bias
    /// keeps top-k from its best, or tokens get more experts than they asked for.
    pub fn gate_mass_share(&self) -> f64 {
        if self.top_k_gate_mass == 0.0 { 1.0 } else { self.gate_mass / self.top_k_gate_mass }
    }
}

/// Sum of the gate scores of the slots in `chosen`, `[tokens, width]`.
pub(crate) fn gate_mass(request: &RouteRequest<'_>, chosen: &[u16], width: usize) -> f64 {
    let rows = chosen.chunks_exact(width).enumerate();
    rows.map(|(token, chosen)| {
        let gate = request.scores().gate(token);
        chosen
            .iter()
            .filter(|&&expert| expert != EMPTY)
            .map(|&expert| f64::from(gate[usize::from(expert)]))
            .sum::<f64>()
    })
    .sum()
}

/// Each expert's share of the room: its limit, its part of its device's limit, or equal shares without limits.
pub(crate) fn expert_shares(capacity: &Capacity) -> Vec<f64> {
    let Some(limits) = capacity.limits() else { return vec![1.0; capacity.experts()] };
    let sizes = capacity.pool_sizes();
    (0..capacity.experts())
        .map(|expert| {
            let pool = capacity.pool_of(expert as u16);
            f64::from(limits[pool]) / sizes[pool] as f64
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_loads_are_balanced_and_one_sided_ones_are_not() {
        let equal = Balance::new(&[5; 4], &[1.0; 4], 20);
        assert_eq!(equal, Balance { max_violation: 0.0, cv: 0.0, gini: 0.0, jain: 1.0 });
        let one = Balance::new(&[20, 0, 0, 0], &[1.0; 4], 20);
        assert_eq!((one.max_violation, one.gini, one.jain), (3.0, 0.75, 0.25));
        assert!((one.cv - 3f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn fair_shares_need_not_be_equal_and_are_shares_of_the_demand() {
        assert_eq!(Balance::new(&[30, 10], &[3.0, 1.0], 40).max_violation, 0.0);
        assert_eq!(Balance::new(&[20, 20], &[3.0, 1.0], 40).max_violation, 1.0);
        assert_eq!(Balance::new(&[10, 5], &[1.0, 1.0], 20).max_violation, 0.0);
        assert_eq!(Balance::new(&[1, 1], &[1.0, 0.0], 2).max_violation, f64::INFINITY);
        assert_eq!(Balance::new(&[0, 0], &[1.0, 0.0], 0).max_violation, 0.0);
    }
}
