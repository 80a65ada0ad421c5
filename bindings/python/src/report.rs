//! What a router did with one batch, as an object whose arrays are made when they are asked for.

use numpy::{PyArray1, PyArray2, PyArrayMethods, ToPyArray};
use phase_moe::RouteMetrics;
use pyo3::prelude::*;

/// Spread of loads, each against its share of the room.
#[pyclass(module = "phase_moe", frozen, get_all)]
#[derive(Clone, Copy)]
pub struct Balance {
    /// Largest load over its fair share of the demand, minus 1 (MaxVio, arXiv 2408.15664).
    max_violation: f64,
    /// Standard deviation over mean.
    cv: f64,
    /// Gini coefficient: 0 is equal.
    gini: f64,
    /// Jain's fairness index: 1 is equal.
    jain: f64,
}

#[pymethods]
impl Balance {
    fn __repr__(&self) -> String {
        let Self { max_violation, cv, gini, jain } = self;
        format!("Balance(max_violation={max_violation:.4}, cv={cv:.4}, gini={gini:.4}, jain={jain:.4})")
    }
}

impl From<phase_moe::routing::Balance> for Balance {
    fn from(balance: phase_moe::routing::Balance) -> Self {
        let phase_moe::routing::Balance { max_violation, cv, gini, jain, .. } = balance;
        Self { max_violation, cv, gini, jain }
    }
}

/// What a router did with one batch.
#[pyclass(module = "phase_moe", frozen)]
pub struct Report {
    pub metrics: RouteMetrics,
    pub bound: Option<f64>,
    pub selection: Vec<i32>,
    pub width: usize,
    pub loads: Vec<u32>,
    pub limits: Option<Vec<u32>>,
    pub prices: Vec<f32>,
}

#[pymethods]
impl Report {
    /// Slots that got an expert, of those asked for.
    #[getter]
    fn survival(&self) -> f64 {
        self.metrics.survival()
    }

    /// Gate scores of kept slots, of those of the gate's own choice without a limit.
    #[getter]
    fn gate_mass(&self) -> f64 {
        self.metrics.gate_mass_share()
    }

    /// The same of the most that any router could have kept within these limits; `None` where no bound is known.
    #[getter]
    fn bound(&self) -> Option<f64> {
        self.bound.map(|bound| self.metrics.gate_mass / bound)
    }

    /// Slots with an expert.
    #[getter]
    fn kept(&self) -> u64 {
        self.metrics.kept
    }

    /// Slots asked for.
    #[getter]
    fn demand(&self) -> u64 {
        self.metrics.demand
    }

    /// Tokens that got no expert at all.
    #[getter]
    fn tokens_without_expert(&self) -> u64 {
        self.metrics.tokens_without_expert
    }

    /// Sums of gate scores: of kept slots, and of the gate's own choice without a limit.
    #[getter]
    fn masses(&self) -> (f64, f64) {
        (self.metrics.gate_mass, self.metrics.top_k_gate_mass)
    }

    /// What the router selected before slots were dropped, int32 `[tokens, width]`: weights are made of it. -1 where there is none.
    #[getter]
    fn selection<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i32>>> {
        let rows = self.selection.len().checked_div(self.width).unwrap_or(0);
        self.selection.to_pyarray(py).reshape([rows, self.width])
    }

    /// Kept slots per expert, uint32.
    #[getter]
    fn loads<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        self.loads.to_pyarray(py)
    }

    /// Room per expert or device in this batch, uint32; `None` where there was no limit.
    #[getter]
    fn capacities<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyArray1<u32>>> {
        self.limits.as_ref().map(|limits| limits.to_pyarray(py))
    }

    /// What a slot of a crowded expert or device costs, float32; empty where the router has no prices.
    #[getter]
    fn prices<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.prices.to_pyarray(py)
    }

    /// Spread of kept slots over experts.
    #[getter]
    fn balance(&self) -> Balance {
        self.metrics.experts.into()
    }

    /// The same over devices; `None` where limits are per expert.
    #[getter]
    fn device_balance(&self) -> Option<Balance> {
        self.metrics.devices.map(Balance::from)
    }

    fn __repr__(&self) -> String {
        let bound = self.bound().map_or("None".into(), |bound| format!("{bound:.6}"));
        let (survival, mass) = (self.survival(), self.gate_mass());
        format!(
            "Report(survival={survival:.6}, gate_mass={mass:.6}, bound={bound}, kept={} of {})",
            self.metrics.kept, self.metrics.demand
        )
    }
}
