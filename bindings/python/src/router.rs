//! A router with what it is told and what it keeps from batch to batch.

use std::sync::{Mutex, PoisonError};

use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use phase_moe::routing::{GroupLimit, GroupScore, Shares};
use phase_moe::{
    Assignment, Capacity, CapacityRule, ExpertId, ExpertSet, Logits, Placement, Result, RouteContext, RouteMetrics,
    RouteRequest, RouteState, Router as Routing, RouterKind, Scores, Scoring, Scratch, check_assignment,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::pool::{pool, run};
use crate::report::Report;
use crate::value_error;

/// Fewer logits than these are routed on the calling thread.
const SMALL_VALUES: usize = 1 << 13;

/// How much room there is.
enum Room {
    Unlimited,
    /// So much for a batch of its size.
    Rule(CapacityRule),
    /// So much for every batch: per expert, or per device where there are some.
    Given(Vec<u32>, Option<Devices>),
}

/// Which experts are on which device.
enum Devices {
    /// In so many groups of neighbours.
    Contiguous(usize),
    Placed(Placement),
}

/// What goes from batch to batch, and memory that is used again.
#[derive(Default)]
struct Kept {
    state: RouteState,
    scratch: Scratch,
    scores: Scores,
    assignment: Assignment,
    steps: u64,
}

/// A router, its settings, and what it has learnt. Made by `phase_moe.Router`.
#[pyclass(module = "phase_moe._phase_moe", frozen)]
pub struct Router {
    router: Box<dyn Routing>,
    top_k: usize,
    scoring: Scoring,
    room: Room,
    layer: usize,
    threads: Option<usize>,
    kept: Mutex<Kept>,
}

/// What a batch is answered with.
struct Answer {
    ids: Vec<i32>,
    weights: Vec<f32>,
    width: usize,
    report: Report,
}

/// The same as Python has it.
type Routed<'py> = (Bound<'py, PyArray2<i32>>, Bound<'py, PyArray2<f32>>, Report);

#[pymethods]
impl Router {
    #[new]
    #[pyo3(signature = (router, top_k, *, capacity_factor, capacities, devices, placement, speeds, minimum_mean, scoring, normalize, scale, groups, layer, seed, threads))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments")]
    fn new(
        router: &str,
        top_k: usize,
        capacity_factor: Option<f64>,
        capacities: Option<Vec<u32>>,
        devices: Option<usize>,
        placement: Option<Vec<u16>>,
        speeds: Option<Vec<f64>>,
        minimum_mean: f64,
        scoring: &str,
        normalize: bool,
        scale: f32,
        groups: Option<(usize, usize, String)>,
        layer: usize,
        seed: u64,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let kind: RouterKind = router.parse().map_err(value_error)?;
        let scoring = match scoring {
            "softmax" => Scoring::softmax(),
            "sigmoid" => Scoring::sigmoid(),
            other => {
                return Err(PyValueError::new_err(format!("unknown scoring `{other}`: expected softmax or sigmoid")));
            }
        };
        let groups = match groups {
            None => None,
            Some((groups, top_groups, score)) => Some(GroupLimit { groups, top_groups, score: group_score(&score)? }),
        };
        let scoring = Scoring { normalize, scale, groups, ..scoring };
        let count = devices.unwrap_or_default();
        let devices = match (placement, devices) {
            (Some(device_of), Some(devices)) => {
                Some(Devices::Placed(Placement::new(device_of, devices).map_err(value_error)?))
            }
            (None, Some(devices)) => Some(Devices::Contiguous(devices)),
            (_, None) => None,
        };
        let room = match (capacity_factor, capacities, devices) {
            (Some(_), Some(_), _) => {
                return Err(PyValueError::new_err("capacity_factor and capacities: expected one of them, got both"));
            }
            (Some(factor), None, devices) => {
                let rule = match (devices, speeds) {
                    (None, None) => CapacityRule::per_expert(factor),
                    (None, Some(_)) => {
                        return Err(PyValueError::new_err("speeds: expected devices that have them, got none"));
                    }
                    (Some(Devices::Contiguous(devices)), None) => CapacityRule::per_device(factor, devices),
                    (Some(Devices::Contiguous(devices)), Some(speeds)) => {
                        if speeds.len() != devices {
                            let got = speeds.len();
                            return Err(PyValueError::new_err(format!(
                                "speeds: expected one for each of {devices} devices, got {got}"
                            )));
                        }
                        CapacityRule::new(factor, Shares::PerDevice { speeds })
                    }
                    (Some(Devices::Placed(placement)), speeds) => {
                        let speeds = speeds.unwrap_or_else(|| vec![1.0; count]);
                        CapacityRule::placed(factor, placement, speeds)
                    }
                };
                Room::Rule(rule.with_minimum_mean(minimum_mean))
            }
            (None, Some(_), _) if speeds.is_some() => {
                return Err(PyValueError::new_err(
                    "speeds: expected a capacity_factor that they share out, got capacities",
                ));
            }
            (None, Some(given), devices) => Room::Given(given, devices),
            (None, None, None) if speeds.is_none() => Room::Unlimited,
            // Said and without effect, they would be a mistake that nobody sees.
            (None, None, _) => {
                let expected = "expected a capacity_factor or capacities beside them, got neither";
                return Err(PyValueError::new_err(format!("devices and speeds: {expected}")));
            }
        };
        let router = kind.build(seed);
        if !matches!(room, Room::Unlimited) && !router.respects_capacity() {
            return Err(value_error(phase_moe::Error::CapacityIgnored { router: router.name() }));
        }
        pool(threads)?;
        Ok(Self { router, top_k, scoring, room, layer, threads, kept: Mutex::default() })
    }

    /// Routes a batch: int32 ids `[tokens, width]`, float32 weights of the same shape, and figures.
    #[pyo3(signature = (logits, *, selection_bias, resident, padding, token_ids))]
    fn route<'py>(
        &self,
        py: Python<'py>,
        logits: PyReadonlyArray2<'py, f32>,
        selection_bias: Option<PyReadonlyArray1<'py, f32>>,
        resident: Option<Vec<usize>>,
        padding: Option<PyReadonlyArray1<'py, bool>>,
        token_ids: Option<PyReadonlyArray1<'py, u32>>,
    ) -> PyResult<Routed<'py>> {
        let (tokens, experts) = (logits.shape()[0], logits.shape()[1]);
        let values = logits.as_slice()?;
        let bias = selection_bias.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
        let padding = padding.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
        let token_ids = token_ids.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
        // A small batch is done before another thread has begun it; results are the same on any.
        let pool = if tokens * experts < SMALL_VALUES { None } else { pool(self.threads)? };
        let answer = py.detach(|| {
            run(pool.as_deref(), || {
                self.answer(
                    &Logits::new(values, tokens, experts)?,
                    [tokens, experts],
                    bias,
                    resident,
                    padding,
                    token_ids,
                )
            })
        });
        let Answer { ids, weights, width, report } = answer.map_err(value_error)?;
        let shaped = |error: numpy::ndarray::ShapeError| PyValueError::new_err(error.to_string());
        Ok((
            Array2::from_shape_vec((tokens, width), ids).map_err(shaped)?.into_pyarray(py),
            Array2::from_shape_vec((tokens, width), weights).map_err(shaped)?.into_pyarray(py),
            report,
        ))
    }

    /// Forgets prices, affinity and the number of batches.
    fn reset(&self) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Kept::default();
    }

    /// Price per expert or device that the last batch ended with; empty before the first.
    #[getter]
    fn prices(&self) -> Vec<f32> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).state.prices().to_vec()
    }

    /// Its name.
    #[getter]
    fn name(&self) -> &'static str {
        self.router.name()
    }
}

impl Router {
    fn answer(
        &self,
        logits: &Logits<'_>,
        [tokens, experts]: [usize; 2],
        bias: Option<&[f32]>,
        resident: Option<Vec<usize>>,
        padding: Option<&[bool]>,
        token_ids: Option<&[u32]>,
    ) -> Result<Answer> {
        let resident = resident.map(|resident| set(&resident, experts)).transpose()?;
        let pads = padding.map_or(0, |padding| padding.iter().filter(|&&pad| pad).count());
        let capacity = match &self.room {
            Room::Unlimited => Capacity::unlimited(experts)?,
            Room::Rule(rule) => rule.capacity(tokens.saturating_sub(pads), experts, self.top_k)?,
            Room::Given(limits, None) => Capacity::per_expert(limits.clone())?,
            Room::Given(limits, Some(Devices::Placed(placement))) => {
                Capacity::per_device(placement.clone(), limits.clone())?
            }
            Room::Given(limits, Some(Devices::Contiguous(devices))) => {
                Capacity::per_device(Placement::contiguous(experts, *devices)?, limits.clone())?
            }
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Kept { state, scratch, scores, assignment, steps } = &mut *kept;
        self.scoring.scores_into(logits, bias, scores)?;
        let context = RouteContext { layer: self.layer, token_ids, padding, step: *steps, resident: resident.as_ref() };
        let request = RouteRequest::new(scores, self.top_k, &capacity, context)?;
        self.router.route_into(&request, state, scratch, assignment)?;
        check_assignment(self.router.as_ref(), &request, assignment)?;
        *steps += 1;
        Ok(Answer {
            ids: assignment.ids().collect(),
            weights: assignment.weights().to_vec(),
            width: assignment.width(),
            report: Report {
                metrics: RouteMetrics::new(&request, assignment),
                bound: assignment.gate_mass_bound(),
                selection: assignment.selection().collect(),
                width: assignment.width(),
                loads: assignment.load(),
                limits: capacity.limits().map(<[u32]>::to_vec),
                prices: state.prices().to_vec(),
            },
        })
    }
}

fn set(resident: &[usize], experts: usize) -> Result<ExpertSet> {
    let mut set = ExpertSet::new(experts)?;
    for &expert in resident {
        set.insert(ExpertId::new(expert, experts)?);
    }
    Ok(set)
}

fn group_score(name: &str) -> PyResult<GroupScore> {
    match name {
        "max" => Ok(GroupScore::Max),
        "top-two" => Ok(GroupScore::TopTwo),
        other => Err(PyValueError::new_err(format!("unknown score of groups `{other}`: expected max or top-two"))),
    }
}
