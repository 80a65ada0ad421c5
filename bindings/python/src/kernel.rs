//! The published phase kernel under its published names, bit for bit: what `phase_moe.compat.phase_router_rs` gives.

use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1};
use phase_moe::routing::{PhaseKernel, PhaseSide, permutations, phase_ring};
use phase_moe::{Error, Result};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::value_error;

/// A permutation of Python's 64-bit numbers.
fn narrow(name: &str, permutation: &[u64]) -> Result<Vec<u32>> {
    let narrow = |&position: &u64| u32::try_from(position).ok();
    permutation.iter().map(narrow).collect::<Option<_>>().ok_or_else(|| Error::Parameter {
        name: "a position of a permutation",
        got: format!("one past 32 bits in {name}"),
        expected: "below n".into(),
    })
}

fn count(name: &str, got: usize, expected: usize) -> PyResult<()> {
    match got == expected {
        true => Ok(()),
        false => Err(PyValueError::new_err(format!("{name}: expected {expected} values, got {got}"))),
    }
}

fn table<'py>(py: Python<'py>, ids: Vec<i32>, k: usize) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let rows = ids.len().checked_div(k).unwrap_or(0);
    let table = Array2::from_shape_vec((rows, k), ids);
    Ok(table.map_err(|error| PyValueError::new_err(error.to_string()))?.into_pyarray(py))
}

/// The columns that every row of `s_bits` is sent to, int32 `[n, k]`, −1 where there are none left.
///
/// `s_bits` and `t_bits` are uint64 `[n · nb_words]`, row-major, `nb_words = ceil(n / 64)`; the permutations are uint64 `[n]`.
#[pyfunction]
#[pyo3(signature = (s_bits, t_bits, n, nb_words, k, col_perm_s, col_perm_t, seed))]
#[expect(clippy::too_many_arguments, reason = "the published signature")]
pub fn phase_router<'py>(
    py: Python<'py>,
    s_bits: PyReadonlyArray1<'py, u64>,
    t_bits: PyReadonlyArray1<'py, u64>,
    n: usize,
    nb_words: usize,
    k: usize,
    col_perm_s: PyReadonlyArray1<'py, u64>,
    col_perm_t: PyReadonlyArray1<'py, u64>,
    seed: u64,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    count("nb_words", nb_words, n.div_ceil(64))?;
    count("col_perm_s", col_perm_s.len()?, n)?;
    count("col_perm_t", col_perm_t.len()?, n)?;
    let (s_bits, t_bits) = (s_bits.as_slice()?, t_bits.as_slice()?);
    let (col_perm_s, col_perm_t) = (col_perm_s.as_slice()?, col_perm_t.as_slice()?);
    let ids = py.detach(|| {
        let sources = PhaseSide::from_bits(s_bits, narrow("col_perm_s", col_perm_s)?)?;
        phase_ring(sources, PhaseSide::from_bits(t_bits, narrow("col_perm_t", col_perm_t)?)?, k, seed)
    });
    table(py, ids.map_err(value_error)?, k)
}

/// The same with permutations drawn from `seed`.
#[pyfunction]
#[pyo3(signature = (s_bits, t_bits, n, k, seed))]
pub fn phase_router_auto<'py>(
    py: Python<'py>,
    s_bits: PyReadonlyArray1<'py, u64>,
    t_bits: PyReadonlyArray1<'py, u64>,
    n: usize,
    k: usize,
    seed: u64,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let rows =
        u32::try_from(n).map_err(|_| PyValueError::new_err(format!("n is {n}: expected at most {}", u32::MAX)))?;
    let (s_bits, t_bits) = (s_bits.as_slice()?, t_bits.as_slice()?);
    // Before anything of the size of n is made: an n that is not the bits' own is a mistake.
    count("s_bits", s_bits.len(), n.saturating_mul(n.div_ceil(64)))?;
    count("t_bits", t_bits.len(), n.saturating_mul(n.div_ceil(64)))?;
    let ids = py.detach(|| {
        let [of_sources, of_targets] = permutations(rows, seed);
        phase_ring(PhaseSide::from_bits(s_bits, of_sources)?, PhaseSide::from_bits(t_bits, of_targets)?, k, seed)
    });
    table(py, ids.map_err(value_error)?, k)
}

/// The form for many tokens and few experts: the first `k` distinct experts of each token, int32 `[n_tokens, k]`, −1 where there are fewer.
#[pyfunction]
#[pyo3(signature = (n_tokens, n_experts, k, base_density, seed, oversample = 4))]
pub fn phase_router_uniform_dispatch(
    py: Python<'_>,
    n_tokens: usize,
    n_experts: usize,
    k: usize,
    base_density: f64,
    seed: u64,
    oversample: usize,
) -> PyResult<Bound<'_, PyArray2<i32>>> {
    for (name, value) in [("n_tokens", n_tokens), ("n_experts", n_experts), ("k", k), ("oversample", oversample)] {
        if value == 0 {
            return Err(PyValueError::new_err(format!("{name} is 0: expected at least 1")));
        }
    }
    let ids =
        py.detach(|| PhaseKernel::new(base_density, oversample, seed)?.select(n_tokens, &vec![1.0; n_experts], k));
    table(py, ids.map_err(value_error)?, k)
}

/// The two orders that a kernel's call without permutations draws from `seed`: uint32 `[n]` for S, then for T.
#[pyfunction(name = "permutations")]
pub fn drawn_permutations<'py>(py: Python<'py>, n: u32, seed: u64) -> [Bound<'py, PyArray1<u32>>; 2] {
    permutations(n, seed).map(|order| order.into_pyarray(py))
}
