//! `phase_moe._phase_moe`: the routing core for Python. Arrays are checked and read where they lie, and the interpreter's lock is released while a
//! router works; what makes a call pleasant (defaults, reports, other kinds of arrays) is Python, in `python/phase_moe`.

mod kernel;
mod model;
mod pool;
mod report;
mod router;
mod settings;
mod trace;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Errors of the library are what is wrong with values.
fn value_error(error: phase_moe::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymodule]
fn _phase_moe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("ROUTERS", phase_moe::RouterKind::ALL.map(phase_moe::RouterKind::name).to_vec())?;
    module.add_class::<router::Router>()?;
    module.add_class::<model::Model>()?;
    module.add_class::<model::Generation>()?;
    module.add_class::<trace::Trace>()?;
    module.add_class::<trace::Replay>()?;
    module.add_function(wrap_pyfunction!(trace::replay, module)?)?;
    module.add_function(wrap_pyfunction!(kernel::drawn_permutations, module)?)?;
    module.add_class::<report::Report>()?;
    module.add_class::<report::Balance>()?;
    module.add_function(wrap_pyfunction!(kernel::phase_router, module)?)?;
    module.add_function(wrap_pyfunction!(kernel::phase_router_auto, module)?)?;
    module.add_function(wrap_pyfunction!(kernel::phase_router_uniform_dispatch, module)?)
}
