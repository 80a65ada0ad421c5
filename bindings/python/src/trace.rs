//! Gate logits of every MoE layer over a text, and what a router makes of them beside a memory for some of the experts.

use std::path::PathBuf;

use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use phase_moe::eval::{GateTrace, LayerTrace, Replay as Replayer};
use phase_moe::{Admission, Logits, Policy};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::pool::{pool, run};
use crate::router::Router;
use crate::settings::{Groups, scoring};
use crate::value_error;

/// Gate logits, as `phase-moe trace` writes them.
#[pyclass(module = "phase_moe", frozen)]
pub struct Trace {
    pub trace: GateTrace,
}

#[pymethods]
impl Trace {
    /// Of logits `[tokens, experts]` for every layer.
    #[new]
    #[pyo3(signature = (logits, top_k, *, scoring = "softmax", normalize = false, scale = 1.0, groups = None, selection_biases = None, token_ids = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments")]
    fn new(
        logits: Vec<PyReadonlyArray2<'_, f32>>,
        top_k: usize,
        scoring: &str,
        normalize: bool,
        scale: f32,
        groups: Groups,
        selection_biases: Option<Vec<PyReadonlyArray1<'_, f32>>>,
        token_ids: Option<Vec<u32>>,
    ) -> PyResult<Self> {
        let mistake = |text: String| PyValueError::new_err(text);
        let Some(first) = logits.first() else {
            return Err(mistake("logits: expected those of at least one layer, got none".into()));
        };
        let (tokens, experts) = (first.shape()[0], first.shape()[1]);
        if let Some(biases) = selection_biases.as_ref().filter(|biases| biases.len() != logits.len()) {
            let (expected, got) = (logits.len(), biases.len());
            return Err(mistake(format!("selection_biases: expected one for each of {expected} layers, got {got}")));
        }
        if let Some(ids) = token_ids.as_ref().filter(|ids| ids.len() != tokens) {
            return Err(mistake(format!("token_ids: expected {tokens}, got {}", ids.len())));
        }
        if top_k == 0 || top_k > experts {
            return Err(mistake(format!("top_k is {top_k}: expected 1 to experts {experts}")));
        }
        let mut layers = Vec::with_capacity(logits.len());
        for (layer, values) in logits.iter().enumerate() {
            if values.shape() != [tokens, experts] {
                let got = values.shape();
                return Err(mistake(format!("logits of layer {layer}: expected [{tokens}, {experts}], got {got:?}")));
            }
            let values = values.as_slice()?;
            Logits::new(values, tokens, experts).map_err(value_error)?;
            let bias = selection_biases.as_ref().map(|biases| biases[layer].as_slice()).transpose()?;
            if let Some(bias) = bias.filter(|bias| bias.len() != experts) {
                let got = bias.len();
                return Err(mistake(format!("selection bias of layer {layer}: expected {experts} values, got {got}")));
            }
            let selection_bias = bias.map(<[f32]>::to_vec);
            layers.push(LayerTrace { layer, logits: values.to_vec(), selection_bias });
        }
        let scoring = self::scoring(scoring, normalize, scale, groups)?;
        let (model, layer_top_k, batch_tokens, kinds) = (None, Vec::new(), None, None);
        let trace = GateTrace { model, experts, top_k, layer_top_k, scoring, batch_tokens, token_ids, kinds, layers };
        Ok(Self { trace })
    }

    /// From a file that `phase-moe trace` or `Trace.save` wrote.
    #[staticmethod]
    fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let trace = py.detach(|| GateTrace::read(&path)).map_err(value_error)?;
        Ok(Self { trace })
    }

    /// Writes the file that `phase-moe route --logits` and `replay --logits` read.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| std::fs::write(path, self.trace.to_bytes().map_err(value_error)?).map_err(PyErr::from))
    }

    /// Name of the model it is of.
    #[getter]
    fn model(&self) -> Option<&str> {
        self.trace.model.as_deref()
    }

    /// Tokens of the text.
    #[getter]
    fn tokens(&self) -> usize {
        self.trace.tokens()
    }

    /// Experts of a layer.
    #[getter]
    fn experts(&self) -> usize {
        self.trace.experts
    }

    /// Experts a token has.
    #[getter]
    fn top_k(&self) -> usize {
        self.trace.top_k
    }

    /// Experts a token has in each layer where they were not all alike, else empty.
    #[getter]
    fn layer_top_k(&self) -> Vec<usize> {
        self.trace.layer_top_k.clone()
    }

    /// Vocabulary ids of the tokens, uint32.
    #[getter]
    fn token_ids<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyArray1<u32>>> {
        self.trace.token_ids.clone().map(|ids| ids.into_pyarray(py))
    }

    /// The layers' indices in the model.
    #[getter]
    fn layers(&self) -> Vec<usize> {
        self.trace.layers.iter().map(|layer| layer.layer).collect()
    }

    /// Gate logits, float32 `[tokens, experts]` of each layer in turn.
    #[getter]
    fn logits<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyArray2<f32>>>> {
        let shape = (self.trace.tokens(), self.trace.experts);
        let array = |layer: &LayerTrace| {
            let array = Array2::from_shape_vec(shape, layer.logits.clone());
            array.map(|array| array.into_pyarray(py)).map_err(|error| PyValueError::new_err(error.to_string()))
        };
        self.trace.layers.iter().map(array).collect()
    }

    /// Biases that count for selection only, float32 `[experts]` of each layer in turn, where there are some.
    #[getter]
    fn selection_biases<'py>(&self, py: Python<'py>) -> Vec<Option<Bound<'py, PyArray1<f32>>>> {
        let array = |layer: &LayerTrace| layer.selection_bias.clone().map(|bias| bias.into_pyarray(py));
        self.trace.layers.iter().map(array).collect()
    }
}

/// What a replay did, all layers together.
#[pyclass(module = "phase_moe", frozen, get_all)]
pub struct Replay {
    requests: u64,
    hits: u64,
    misses: u64,
    hit_rate: Option<f64>,
    belady_hit_rate: Option<f64>,
    gate_mass_kept: Option<f64>,
    agreement: Option<f64>,
    bonus: Option<f64>,
}

/// Replays every layer of a trace against a memory with room for `cached_experts` of its experts.
#[pyfunction]
#[pyo3(signature = (trace, router, *, cached_experts, policy, admission, batch_tokens, threads))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments")]
pub fn replay(
    py: Python<'_>,
    trace: &Trace,
    router: &Router,
    cached_experts: usize,
    policy: &str,
    admission: &str,
    batch_tokens: usize,
    threads: Option<usize>,
) -> PyResult<Replay> {
    let (policy, admission): (Policy, Admission) =
        (policy.parse().map_err(value_error)?, admission.parse().map_err(value_error)?);
    let (trace, top_k) = (&trace.trace, router.top_k);
    let capacity = router.room.of_batches(trace.experts, top_k).map_err(value_error)?;
    let routing = router.router.as_ref();
    let replay =
        Replayer { router: routing, top_k, capacity: &capacity, batch_tokens, cached_experts, policy, admission };
    let pool = pool(threads)?;
    let figures = py.detach(|| run(pool.as_deref(), || replay.run(trace, |_| ())));
    let figures = figures.map_err(value_error)?;
    Ok(Replay {
        requests: figures.requests,
        hits: figures.hits,
        misses: figures.misses,
        hit_rate: figures.hit_rate,
        belady_hit_rate: figures.belady_hit_rate,
        gate_mass_kept: figures.gate_mass_kept,
        agreement: figures.agreement,
        bonus: figures.bonus,
    })
}
