//! On how many threads a call works: `threads` of a pool that is kept, or those of the process.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

static POOLS: LazyLock<Mutex<HashMap<usize, Arc<ThreadPool>>>> = LazyLock::new(Mutex::default);

/// The pool of so many threads, made at its first use; `None` for the process's own.
pub fn pool(threads: Option<usize>) -> PyResult<Option<Arc<ThreadPool>>> {
    let Some(threads) = threads else { return Ok(None) };
    if threads == 0 {
        return Err(PyValueError::new_err("threads is 0: expected at least 1"));
    }
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.get(&threads) {
        return Ok(Some(pool.clone()));
    }
    let made = ThreadPoolBuilder::new().num_threads(threads).build();
    let made = Arc::new(made.map_err(|error| PyRuntimeError::new_err(format!("{threads} threads: {error}")))?);
    pools.insert(threads, made.clone());
    Ok(Some(made))
}

/// Runs `work` on the pool.
pub fn run<T: Send>(pool: Option<&ThreadPool>, work: impl FnOnce() -> T + Send) -> T {
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}
