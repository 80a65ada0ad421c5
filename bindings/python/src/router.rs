//! A router with what it is told and what it keeps from batch to batch.

use std::sync::{Arc, Mutex, PoisonError};

use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use phase_moe::{
    Assignment, ExpertId, ExpertSet, Logits, Result, RouteContext, RouteMetrics, RouteRequest, RouteState,
    Router as Routing, Scores, Scoring, Scratch, check_assignment,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::pool::{pool, run};
use crate::report::Report;
use crate::settings::{Groups, Recorded, Room, forced, router as router_of, scoring as scoring_of};
use crate::value_error;

/// Fewer logits than these are routed on the calling thread.
const SMALL_VALUES: usize = 1 << 13;

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
    pub(crate) router: Arc<dyn Routing>,
    pub(crate) top_k: usize,
    scoring: Scoring,
    pub(crate) room: Room,
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
    #[pyo3(signature = (router, top_k, *, capacity_factor, capacities, devices, placement, speeds, minimum_mean, scoring, normalize, scale, groups, cache_bonus, max_mass_loss, keep_top, target_hit_rate, routes, layer, seed, threads))]
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
        groups: Groups,
        cache_bonus: Option<f64>,
        max_mass_loss: Option<f64>,
        keep_top: Option<usize>,
        target_hit_rate: Option<f64>,
        routes: Option<(usize, Vec<Recorded<'_>>)>,
        layer: usize,
        seed: u64,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let scoring = scoring_of(scoring, normalize, scale, groups)?;
        let room = Room::new(capacity_factor, capacities, devices, placement, speeds, minimum_mean)?;
        let router = match routes {
            None => router_of(router, seed, (cache_bonus, max_mass_loss, keep_top, target_hit_rate))?,
            Some((experts, routes)) => forced(layer, experts, top_k, &routes)?,
        };
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
        let capacity = self.room.capacity(tokens.saturating_sub(pads), experts, self.top_k)?;
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
