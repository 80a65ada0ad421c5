//! A whole model from its files: logits, text token by token, gate traces, perplexity with any router, and what its expert cache did.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray2};
use phase_moe::decoder::Continuation;
use phase_moe::eval::{Batching, EvalText, GateTrace, Mixing, Perplexity};
use phase_moe::offload::CacheOptions;
use phase_moe::{Batch, DecoderState, GenerateOptions, LoadOptions, Result, Sampler};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rayon::ThreadPool;

use crate::pool::{pool, run};
use crate::router::Router;
use crate::settings::Room;
use crate::trace::Trace;
use crate::value_error;

/// A tensor's values one after another: the tensor framework is the library's affair, its type is not named here.
macro_rules! values {
    ($tensor:expr) => {
        $tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>())
    };
}

/// Decoder, tokenizer and name. Made by `phase_moe.Model`.
#[pyclass(module = "phase_moe._phase_moe", frozen)]
pub struct Model {
    model: Arc<RwLock<phase_moe::Model>>,
    pool: Option<Arc<ThreadPool>>,
}

fn read(model: &RwLock<phase_moe::Model>) -> RwLockReadGuard<'_, phase_moe::Model> {
    model.read().unwrap_or_else(PoisonError::into_inner)
}

/// Errors of values are `ValueError`, files that cannot be read `OSError`, the rest `RuntimeError`.
fn raised(error: phase_moe::Error) -> PyErr {
    match &error {
        phase_moe::Error::Io { .. } => pyo3::exceptions::PyOSError::new_err(error.to_string()),
        error if error.is_user_error() => PyValueError::new_err(error.to_string()),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

#[pymethods]
impl Model {
    #[new]
    #[pyo3(signature = (path, *, dtype, kv_dtype, expert_cache, policy, admission, threads))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        dtype: &str,
        kv_dtype: Option<&str>,
        expert_cache: Option<usize>,
        policy: &str,
        admission: &str,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let known = |name: &'static str, value: &str| match value {
            "f32" | "f16" | "bf16" => Ok(()),
            other => Err(PyValueError::new_err(format!("{name} is {other}: expected f32, f16 or bf16"))),
        };
        known("dtype", dtype)?;
        kv_dtype.map_or(Ok(()), |kv_dtype| known("kv_dtype", kv_dtype))?;
        let unknown = |_| PyValueError::new_err("dtype: expected f32, f16 or bf16");
        let cache = match expert_cache {
            None => None,
            Some(bytes) => {
                let (policy, admission) =
                    (policy.parse().map_err(value_error)?, admission.parse().map_err(value_error)?);
                Some(CacheOptions { policy, admission, ..CacheOptions::new(bytes) })
            }
        };
        let mut options = LoadOptions::default().with_dtype(dtype.parse().map_err(unknown)?).with_expert_cache(cache);
        options.kv_dtype = kv_dtype.map(str::parse).transpose().map_err(unknown)?;
        let pool = pool(threads)?;
        let model = py.detach(|| run(pool.as_deref(), || phase_moe::Model::load(&path, &options))).map_err(raised)?;
        Ok(Self { model: Arc::new(RwLock::new(model)), pool })
    }

    #[getter]
    fn name(&self) -> String {
        read(&self.model).name().to_owned()
    }

    /// What it is made of.
    #[getter]
    fn sizes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (model, sizes) = (read(&self.model), PyDict::new(py));
        let spec = model.decoder().spec();
        sizes.set_item("family", spec.family)?;
        sizes.set_item("layers", spec.layers)?;
        sizes.set_item("moe_layers", spec.moe_blocks().count())?;
        sizes.set_item("hidden", spec.moe.hidden)?;
        sizes.set_item("experts", spec.moe.experts)?;
        sizes.set_item("top_k", spec.moe.top_k)?;
        sizes.set_item("expert_width", spec.moe.expert_width)?;
        sizes.set_item("vocab", spec.vocab)?;
        sizes.set_item("max_positions", spec.max_positions)?;
        sizes.set_item("parameters", spec.parameters())?;
        sizes.set_item("active_parameters", spec.active_parameters())?;
        Ok(sizes)
    }

    /// Puts a router, its limits and its top_k into every MoE layer.
    fn set_router(&self, py: Python<'_>, router: &Router) -> PyResult<()> {
        let rule = match &router.room {
            Room::Unlimited => None,
            Room::Rule(rule) => Some(rule.clone()),
            Room::Given(..) => {
                let text = "capacities: expected a capacity_factor, since batches of a model differ in size, got slots";
                return Err(PyValueError::new_err(text));
            }
        };
        let (routing, top_k) = (router.router.clone(), router.top_k);
        // Waits for a pass that is under way, which may want the interpreter.
        py.detach(|| {
            let mut model = self.model.write().unwrap_or_else(PoisonError::into_inner);
            let decoder = model.decoder_mut();
            decoder.set_top_k(&[top_k])?;
            decoder.set_router(routing);
            decoder.set_capacity(rule);
            Ok(())
        })
        .map_err(value_error)
    }

    /// Token ids of a text.
    #[pyo3(signature = (text, *, special))]
    fn encode(&self, text: &str, special: bool) -> PyResult<Vec<u32>> {
        let model = read(&self.model);
        let ids = if special { model.encode_sequence(text) } else { model.encode(text) };
        ids.map_err(raised)
    }

    /// Text of token ids that come after those `before`.
    fn decode(&self, ids: Vec<u32>, before: Vec<u32>) -> PyResult<String> {
        read(&self.model).decode_after(&before, &ids).map_err(raised)
    }

    /// Logits of the next token after each of `ids`, float32 `[tokens, vocab]`.
    fn logits<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let forward = || -> Result<(usize, Vec<f32>)> {
            let model = read(&self.model);
            let decoder = model.decoder();
            let logits = decoder.forward(&Batch::new(&[&ids])?, &mut decoder.batch_state())?;
            Ok((decoder.spec().vocab, values!(logits)?))
        };
        let (vocab, values) = py.detach(|| run(self.pool.as_deref(), forward)).map_err(raised)?;
        let shaped = Array2::from_shape_vec((ids.len(), vocab), values);
        Ok(shaped.map_err(|error| PyValueError::new_err(error.to_string()))?.into_pyarray(py))
    }

    /// The gate logits of every MoE layer over texts.
    fn trace(&self, py: Python<'_>, texts: Vec<String>, tokens: Option<usize>, batch_tokens: usize) -> PyResult<Trace> {
        let capture = || -> Result<GateTrace> {
            let model = read(&self.model);
            let batches = batches(&model, &texts, tokens, batch_tokens)?;
            let trace = GateTrace::capture(model.decoder(), &batches, |_| ())?;
            Ok(GateTrace { model: Some(model.name().to_owned()), batch_tokens: Some(batch_tokens), ..trace })
        };
        let trace = py.detach(|| run(self.pool.as_deref(), capture)).map_err(raised)?;
        Ok(Trace { trace })
    }

    /// Perplexity over texts, survival, and kept gate mass over that of the gate's own choice.
    fn measure(
        &self,
        py: Python<'_>,
        texts: Vec<String>,
        tokens: Option<usize>,
        batch_tokens: usize,
    ) -> PyResult<(f64, f64, f64)> {
        let measure = || -> Result<(f64, f64, f64)> {
            let model = read(&self.model);
            let batches = batches(&model, &texts, tokens, batch_tokens)?;
            let (mut state, mut perplexity) = (model.decoder().batch_state().keeping_routed(), Perplexity::default());
            let (mut kept, mut demand, mut share, mut count) = (0, 0, 0.0, 0.0);
            for batch in &batches {
                perplexity.add(&model.decoder().forward(batch, &mut state)?, batch)?;
                for routed in state.routed() {
                    let metrics = routed.metrics()?;
                    (kept, demand) = (kept + metrics.kept, demand + metrics.demand);
                    (share, count) = (share + metrics.gate_mass_share(), count + 1.0);
                }
            }
            let survival = if demand == 0 { 1.0 } else { kept as f64 / demand as f64 };
            Ok((perplexity.value()?, survival, if count > 0.0 { share / count } else { 1.0 }))
        };
        py.detach(|| run(self.pool.as_deref(), measure)).map_err(raised)
    }

    /// Continues a prompt of token ids; gives an iterator over the new text.
    #[pyo3(signature = (prompt, *, new_tokens, temperature, top_p, seed, chunk_tokens))]
    fn generate(
        &self,
        prompt: Vec<u32>,
        new_tokens: usize,
        temperature: f64,
        top_p: f64,
        seed: u64,
        chunk_tokens: usize,
    ) -> PyResult<Generation> {
        let model = read(&self.model);
        let mistake = |text: String| Err(PyValueError::new_err(text));
        if prompt.is_empty() {
            return mistake("prompt: expected at least one token, got none".into());
        }
        if chunk_tokens == 0 {
            return mistake("chunk_tokens is 0: expected at least 1".into());
        }
        let sampler = Sampler::new(temperature, top_p, seed).map_err(value_error)?;
        let continuation = model.continuation(&prompt).map_err(raised)?;
        let state = model.decoder().generation_state();
        let options = GenerateOptions { new_tokens, chunk_tokens };
        let run = Run {
            state,
            sampler,
            continuation,
            prompt,
            new: Vec::new(),
            options,
            over: new_tokens == 0,
            times: (0.0, 0.0),
        };
        Ok(Generation { model: self.model.clone(), pool: self.pool.clone(), run: Mutex::new(run) })
    }

    /// What the expert cache did so far; `None` without one.
    #[getter]
    fn cache<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let model = read(&self.model);
        let Some(cache) = model.decoder().expert_cache() else { return Ok(None) };
        let (statistics, given) = (cache.statistics(), PyDict::new(py));
        given.set_item("requests", statistics.requests)?;
        given.set_item("hits", statistics.hits)?;
        given.set_item("misses", statistics.misses)?;
        given.set_item("evictions", statistics.evictions)?;
        given.set_item("bytes_read", statistics.bytes_read)?;
        given.set_item("bytes", statistics.bytes)?;
        given.set_item("peak_bytes", statistics.peak_bytes)?;
        given.set_item("prefetched", statistics.prefetch.used)?;
        given.set_item("waiting_seconds", statistics.waiting.as_secs_f64())?;
        Ok(Some(given))
    }
}

/// Texts in sequences of 256 tokens, as the command cuts them, `batch_tokens` of them a pass.
fn batches(
    model: &phase_moe::Model,
    texts: &[String],
    tokens: Option<usize>,
    batch_tokens: usize,
) -> Result<Vec<Batch>> {
    let text = |(number, text): (usize, &String)| -> Result<EvalText> {
        Ok(EvalText { name: format!("text {number}"), ids: model.encode(text)? })
    };
    let texts = texts.iter().enumerate().map(text).collect::<Result<Vec<_>>>()?;
    let batching = Batching { tokens, batch_tokens, mixing: Mixing::OneKind, shuffle: None };
    batching.batches(model.sequence_start(), &texts)
}

/// A text on its way.
struct Run {
    state: DecoderState,
    sampler: Sampler,
    continuation: Continuation,
    prompt: Vec<u32>,
    new: Vec<u32>,
    options: GenerateOptions,
    over: bool,
    /// Seconds for the prompt, and for what came after the first new token.
    times: (f64, f64),
}

impl Run {
    /// The next token's text; `None` at the end. What a token leaves incomplete comes with the one that completes it.
    fn next(&mut self, model: &phase_moe::Model) -> Result<Option<String>> {
        if self.over {
            return Ok(None);
        }
        let (decoder, started) = (model.decoder(), Instant::now());
        let last = self.new.last().copied();
        // The last new token has not been through the model yet.
        let batch = match &last {
            None => Batch::new(&[&self.prompt])?,
            Some(last) => Batch::new(&[std::slice::from_ref(last)])?,
        };
        let logits = decoder.prefill(&batch, self.options.chunk_tokens, &mut self.state)?;
        let id = self.sampler.next(&logits.get(0)?)?;
        let text = match model.end_of_text().contains(&id) {
            true => {
                self.over = true;
                self.continuation.finish()?
            }
            false => {
                self.new.push(id);
                self.over =
                    self.new.len() == self.options.new_tokens || self.state.position() == decoder.spec().max_positions;
                let text = self.continuation.push(id)?;
                if self.over { text + &self.continuation.finish()? } else { text }
            }
        };
        let time = if last.is_none() { &mut self.times.0 } else { &mut self.times.1 };
        *time += started.elapsed().as_secs_f64();
        Ok((!self.over || !text.is_empty()).then_some(text))
    }
}

/// New text, token by token.
#[pyclass(module = "phase_moe", frozen)]
pub struct Generation {
    model: Arc<RwLock<phase_moe::Model>>,
    pool: Option<Arc<ThreadPool>>,
    run: Mutex<Run>,
}

#[pymethods]
impl Generation {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let step = || {
            let mut guard = self.run.lock().unwrap_or_else(PoisonError::into_inner);
            let text = &mut *guard;
            run(self.pool.as_deref(), || text.next(&read(&self.model)))
        };
        py.detach(step).map_err(raised)
    }

    /// Token ids of the new text so far.
    #[getter]
    fn ids(&self) -> Vec<u32> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner).new.clone()
    }

    /// Tokens of the prompt.
    #[getter]
    fn prompt_tokens(&self) -> usize {
        self.run.lock().unwrap_or_else(PoisonError::into_inner).prompt.len()
    }

    /// Tokens of the prompt a second; `None` before the first new token.
    #[getter]
    fn prefill_tokens_per_second(&self) -> Option<f64> {
        let run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        (run.times.0 > 0.0).then(|| run.prompt.len() as f64 / run.times.0)
    }

    /// New tokens after the first a second; `None` before the second.
    #[getter]
    fn decode_tokens_per_second(&self) -> Option<f64> {
        let run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        (run.times.1 > 0.0).then(|| (run.new.len() - 1) as f64 / run.times.1)
    }
}
