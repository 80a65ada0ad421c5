"""The published helper module: bits of degrees, hash routing, limits applied afterwards, and what a routing did."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..routing import count
from .phase_router_rs import phase_router_auto

__all__ = [
    "build_bits",
    "compute_loads",
    "enforce_capacity",
    "extreme_hetero_capacities",
    "hash_route",
    "load_stats",
    "make_hard_caps",
    "route",
    "strong_hetero_capacities",
    "survival_rate",
    "uniform_capacities",
]

Floats = npt.NDArray[np.float64]
Routes = npt.NDArray[np.int32]


def build_bits(ones_per_row: npt.ArrayLike, n: int) -> npt.NDArray[np.uint64]:
    """uint64 ``[rows * ceil(n / 64)]``: row i has its first ``min(ones, n)`` bits set, lowest bit first."""
    n = _positive(n, "n")
    ones = np.asarray(ones_per_row)
    if ones.ndim != 1 or not np.issubdtype(ones.dtype, np.integer):
        raise ValueError(f"ones_per_row: expected a flat array of whole numbers, got {ones.dtype} of shape {list(ones.shape)}")
    if ones.size and ones.min() < 0:
        raise ValueError(f"ones_per_row: expected numbers from 0, got {ones.min()}")
    words = -(-n // 64)
    left = np.minimum(ones, n).astype(np.int64)[:, None] - 64 * np.arange(words, dtype=np.int64)[None, :]
    partial = (np.uint64(1) << np.clip(left, 0, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(left >= 64, np.uint64(0xFFFF_FFFF_FFFF_FFFF), partial).reshape(-1)


def hash_route(n: int, k: int, seed: int = 0) -> Routes:
    """int32 ``[n, k]`` of ``numpy.random.default_rng(seed).integers(0, n, ..)``: a token may get a target twice."""
    n, k = _positive(n, "n"), _positive(k, "k")
    return np.random.default_rng(seed).integers(0, n, size=(n, k)).astype(np.int32)


def enforce_capacity(routes: npt.ArrayLike, caps: npt.ArrayLike) -> Routes:
    """A copy in which slots past ``caps[target]``, in row-major order, are -1; ids that are none stay."""
    routes, caps = _routes(routes), np.asarray(caps)
    if caps.ndim != 1:
        raise ValueError(f"caps: expected one number a target, got shape {list(caps.shape)}")
    flat = routes.reshape(-1).copy()
    valid = np.flatnonzero((flat >= 0) & (flat < len(caps)))
    # The rank of a slot among those of its target: places in the order of targets, less where each target's begin.
    order = valid[np.argsort(flat[valid], kind="stable")]
    targets = flat[order]
    starts = np.searchsorted(targets, targets, side="left")
    rank = np.arange(len(order)) - starts
    flat[order[rank >= caps[targets]]] = -1
    return flat.reshape(routes.shape)


def compute_loads(routes: npt.ArrayLike, n: int) -> npt.NDArray[np.int64]:
    """Slots of each of ``n`` targets; ids outside ``0..n`` count nowhere."""
    flat, n = _routes(routes).reshape(-1), _positive(n, "n")
    return np.bincount(flat[(flat >= 0) & (flat < n)], minlength=n).astype(np.int64)


def load_stats(loads: npt.ArrayLike) -> dict[str, float]:
    """``mean, std, max, min, cv, max_over_mean``: the population's deviation; ratios are 0 where the mean is 0."""
    loads = np.asarray(loads, dtype=np.float64)
    if loads.size == 0:
        raise ValueError("loads: expected at least one, got none")
    mean, std, most = float(loads.mean()), float(loads.std()), float(loads.max())
    ratio = (lambda value: value / mean) if mean != 0 else (lambda value: 0.0)
    return {"mean": mean, "std": std, "max": most, "min": float(loads.min()), "cv": ratio(std), "max_over_mean": ratio(most)}


def survival_rate(routes: npt.ArrayLike, n: int) -> float:
    """Share of slots with an id in ``0..n``."""
    routes = _routes(routes)
    return float(((routes >= 0) & (routes < _positive(n, "n"))).mean()) if routes.size else 0.0


def route(
    source_weights: npt.ArrayLike | None = None,
    target_capacities: npt.ArrayLike | None = None,
    n: int = 1024,
    k: int = 4,
    seed: int = 42,
    density: float = 0.3,
) -> Routes:
    """int32 ``[n, k]`` of the phase kernel; degrees are ``round(value / mean * density * n)`` within 1 to n. ``n`` follows the length of what is given."""
    given = [np.asarray(values, dtype=np.float64) for values in (source_weights, target_capacities) if values is not None]
    if given:
        n = len(given[0])
    n = _positive(n, "n")
    if any(values.shape != (n,) for values in given):
        raise ValueError(f"weights and capacities: expected {n} numbers each, got shapes {[list(values.shape) for values in given]}")
    bits = [build_bits(_degrees(values, n, density), n) for values in (source_weights, target_capacities)]
    return phase_router_auto(bits[0], bits[1], n, _positive(k, "k"), seed)


def _degrees(values: npt.ArrayLike | None, n: int, density: float) -> npt.NDArray[np.int64]:
    weights = np.ones(n) if values is None else np.asarray(values, dtype=np.float64)
    mean = weights.mean()
    if not (np.isfinite(weights).all() and (weights >= 0).all() and mean > 0):
        raise ValueError("weights and capacities: expected finite numbers from 0, one of them above, got others")
    rounded: Floats = np.clip(np.rint(weights / mean * density * n), 1, n)
    return rounded.astype(np.int64)


def uniform_capacities(n: int) -> Floats:
    """Ones."""
    return np.ones(_positive(n, "n"))


def strong_hetero_capacities(n: int, seed: int = 0) -> Floats:
    """The first tenth at 8, the next fifth at 2, the others at 1, shuffled by ``numpy.random.default_rng(seed)``."""
    capacities = np.ones(_positive(n, "n"))
    high, middle = int(0.10 * n), int(0.20 * n)
    capacities[:high] = 8.0
    capacities[high : high + middle] = 2.0
    np.random.default_rng(seed).shuffle(capacities)
    return capacities


def extreme_hetero_capacities(n: int, seed: int = 0) -> Floats:
    """The first twentieth, at least one, at 16, the others at 1, shuffled the same."""
    capacities = np.ones(_positive(n, "n"))
    capacities[: max(1, int(0.05 * n))] = 16.0
    np.random.default_rng(seed).shuffle(capacities)
    return capacities


def make_hard_caps(rel_caps: npt.ArrayLike, n: int, k: int, headroom: float = 1.2) -> npt.NDArray[np.int64]:
    """``ceil(rel / sum * n * k * headroom)``, at least 1."""
    shares = np.asarray(rel_caps, dtype=np.float64)
    if not (shares.ndim == 1 and shares.size and np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError("rel_caps: expected finite numbers from 0, one of them above, got others")
    slots = _positive(n, "n") * _positive(k, "k")
    caps: Floats = np.maximum(1, np.ceil(shares / shares.sum() * slots * headroom))
    return caps.astype(np.int64)


def _positive(value: int, name: str) -> int:
    number = count(value, name)
    if number == 0:
        raise ValueError(f"{name} is 0: expected at least 1")
    return number


def _routes(routes: npt.ArrayLike) -> Routes:
    array = np.asarray(routes)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"routes: expected whole numbers, got {array.dtype}")
    return array.astype(np.int32)
