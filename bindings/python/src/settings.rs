//! What a router is told, as Python says it: which router, how much room, how logits become scores.

use std::sync::Arc;

use numpy::{PyReadonlyArray2, PyUntypedArrayMethods};
use phase_moe::eval::BatchCapacity;
use phase_moe::routing::{Forced, GroupLimit, GroupScore, Knowledge, Shares};
use phase_moe::{
    Assignment, CacheRouter, Capacity, CapacityRule, Error, Logits, Placement, Result, RouteContext, RouteRequest,
    Router, RouterKind, Scoring,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::value_error;

/// How much room there is.
pub enum Room {
    Unlimited,
    /// So much for a batch of its size.
    Rule(CapacityRule),
    /// So much for every batch: per expert, or per device where there are some.
    Given(Vec<u32>, Option<Devices>),
}

/// Which experts are on which device.
pub enum Devices {
    /// In so many groups of neighbours.
    Contiguous(usize),
    Placed(Placement),
}

impl Room {
    pub fn new(
        capacity_factor: Option<f64>,
        capacities: Option<Vec<u32>>,
        devices: Option<usize>,
        placement: Option<Vec<u16>>,
        speeds: Option<Vec<f64>>,
        minimum_mean: f64,
    ) -> PyResult<Self> {
        let count = devices.unwrap_or_default();
        let devices = match (placement, devices) {
            (Some(device_of), Some(devices)) => {
                Some(Devices::Placed(Placement::new(device_of, devices).map_err(value_error)?))
            }
            (None, Some(devices)) => Some(Devices::Contiguous(devices)),
            (_, None) => None,
        };
        let mistake = |text: &str| Err(PyValueError::new_err(text.to_owned()));
        match (capacity_factor, capacities, devices) {
            (Some(_), Some(_), _) => mistake("capacity_factor and capacities: expected one of them, got both"),
            (Some(factor), None, devices) => {
                let rule = match (devices, speeds) {
                    (None, None) => CapacityRule::per_expert(factor),
                    (None, Some(_)) => return mistake("speeds: expected devices that have them, got none"),
                    (Some(Devices::Contiguous(devices)), None) => CapacityRule::per_device(factor, devices),
                    (Some(Devices::Contiguous(devices)), Some(speeds)) => {
                        if speeds.len() != devices {
                            let got = speeds.len();
                            return mistake(&format!("speeds: expected one for each of {devices} devices, got {got}"));
                        }
                        CapacityRule::new(factor, Shares::PerDevice { speeds })
                    }
                    (Some(Devices::Placed(placement)), speeds) => {
                        let speeds = speeds.unwrap_or_else(|| vec![1.0; count]);
                        CapacityRule::placed(factor, placement, speeds)
                    }
                };
                Ok(Self::Rule(rule.with_minimum_mean(minimum_mean)))
            }
            (None, Some(_), _) if speeds.is_some() => {
                mistake("speeds: expected a capacity_factor that they share out, got capacities")
            }
            (None, Some(given), devices) => Ok(Self::Given(given, devices)),
            (None, None, None) if speeds.is_none() => Ok(Self::Unlimited),
            // Said and without effect, they would be a mistake that nobody sees.
            (None, None, _) => {
                mistake("devices and speeds: expected a capacity_factor or capacities beside them, got neither")
            }
        }
    }

    /// The room for a batch of so many tokens, padding not among them.
    pub fn capacity(&self, tokens: usize, experts: usize, top_k: usize) -> Result<Capacity> {
        match self {
            Self::Unlimited => Capacity::unlimited(experts),
            Self::Rule(rule) => rule.capacity(tokens, experts, top_k),
            Self::Given(limits, None) => Capacity::per_expert(limits.clone()),
            Self::Given(limits, Some(Devices::Placed(placement))) => {
                Capacity::per_device(placement.clone(), limits.clone())
            }
            Self::Given(limits, Some(Devices::Contiguous(devices))) => {
                Capacity::per_device(Placement::contiguous(experts, *devices)?, limits.clone())
            }
        }
    }

    /// The same for batches of a trace.
    pub fn of_batches(&self, experts: usize, top_k: usize) -> Result<BatchCapacity> {
        Ok(match self {
            Self::Unlimited => BatchCapacity::Unlimited,
            Self::Rule(rule) => BatchCapacity::Rule(rule.clone()),
            Self::Given(..) => BatchCapacity::Given(self.capacity(0, experts, top_k)?),
        })
    }
}

/// What memory-aware routers are told: bonus, most mass lost, experts that stay, hits to steer for.
pub type Memory = (Option<f64>, Option<f64>, Option<usize>, Option<f64>);

/// A router by its name.
pub fn router(name: &str, seed: u64, (bonus, loss, keep_top, target): Memory) -> PyResult<Arc<dyn Router>> {
    let kind: RouterKind = name.parse().map_err(value_error)?;
    let told = bonus.is_some() || loss.is_some() || keep_top.is_some() || target.is_some();
    if told && !kind.understands(Knowledge::Memory) {
        let text = format!(
            "cache_bonus, max_mass_loss, keep_top and target_hit_rate: expected router cache or cache+phase, got {name}"
        );
        return Err(PyValueError::new_err(text));
    }
    let default = CacheRouter::default();
    let settings = CacheRouter::new(bonus.unwrap_or(default.bonus()), loss.unwrap_or(default.max_mass_loss()));
    let mut settings = settings.map_err(value_error)?.with_keep_top(keep_top.unwrap_or(default.keep_top()));
    if let Some(target) = target {
        settings = settings.with_target_hit_rate(target).map_err(value_error)?;
    }
    Ok(Arc::from(kind.build_with(seed, &settings)))
}

/// A recorded batch: ids after drops and, where they say more, before, int32 `[tokens, top_k]`.
pub type Recorded<'py> = (PyReadonlyArray2<'py, i32>, Option<PyReadonlyArray2<'py, i32>>);

/// A router that gives these routes of one layer, batch after batch.
pub fn forced(layer: usize, experts: usize, top_k: usize, routes: &[Recorded<'_>]) -> PyResult<Arc<dyn Router>> {
    let batch = |(number, (ids, selection)): (usize, &Recorded<'_>)| -> PyResult<Assignment> {
        let shape = [ids.shape()[0], ids.shape()[1]];
        let other = selection.as_ref().filter(|selection| selection.shape() != shape);
        if shape[1] != top_k || other.is_some() {
            let got = other.map_or_else(|| ids.shape().to_vec(), |selection| selection.shape().to_vec());
            let text = format!("routes of batch {number}: expected [tokens, {top_k}] ids, got shape {got:?}");
            return Err(PyValueError::new_err(text));
        }
        let (ids, selection) = (ids.as_slice()?, selection.as_ref().map(|ids| ids.as_slice()).transpose()?);
        recorded(shape[0], experts, top_k, ids, selection.unwrap_or(ids)).map_err(value_error)
    };
    let batches = routes.iter().enumerate().map(batch).collect::<PyResult<Vec<_>>>()?;
    let mut layers = vec![Vec::new(); layer];
    layers.push(batches);
    Ok(Arc::new(Forced { layers }))
}

fn recorded(tokens: usize, experts: usize, top_k: usize, ids: &[i32], selection: &[i32]) -> Result<Assignment> {
    // Of no particular weights: those come with the batch that the route is given to.
    let plain = Assignment::from_parts(experts, top_k, selection, &vec![0.0; selection.len()])?;
    if ids == selection {
        return Ok(plain);
    }
    if let Some(slot) = ids.iter().zip(selection).position(|(&id, &selected)| id != selected && id != -1) {
        let expected = format!("expert {} or -1 (token {})", selection[slot], slot / top_k);
        return Err(Error::shape("ids beside their selection", expected, format!("expert {}", ids[slot])));
    }
    let logits = vec![0.0; tokens * experts];
    let scores = Scoring::softmax().scores(&Logits::new(&logits, tokens, experts)?, None)?;
    let free = Capacity::unlimited(experts)?;
    let request = RouteRequest::new(&scores, top_k, &free, RouteContext::default())?;
    let kept: Vec<bool> = ids.iter().map(|&id| id >= 0).collect();
    Assignment::from_selection(&request, selection, Some(&kept))
}

/// How many groups, how many of them a token may use, and how a group is scored.
pub type Groups = Option<(usize, usize, String)>;

/// How logits become scores.
pub fn scoring(name: &str, normalize: bool, scale: f32, groups: Groups) -> PyResult<Scoring> {
    let scoring = match name {
        "softmax" => Scoring::softmax(),
        "sigmoid" => Scoring::sigmoid(),
        other => return Err(PyValueError::new_err(format!("unknown scoring `{other}`: expected softmax or sigmoid"))),
    };
    let group_score = |name: &str| match name {
        "max" => Ok(GroupScore::Max),
        "top-two" => Ok(GroupScore::TopTwo),
        other => Err(PyValueError::new_err(format!("unknown score of groups `{other}`: expected max or top-two"))),
    };
    let groups = match groups {
        None => None,
        Some((groups, top_groups, score)) => Some(GroupLimit { groups, top_groups, score: group_score(&score)? }),
    };
    Ok(Scoring { normalize, scale, groups, ..scoring })
}
