"""The published extension module: the phase kernel over bit matrices, and its form for many tokens and few experts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _phase_moe
from ..routing import count

__all__ = ["phase_router", "phase_router_auto", "phase_router_uniform_dispatch"]


def _words(values: npt.ArrayLike, name: str) -> npt.NDArray[np.uint64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != np.uint64:
        raise ValueError(f"{name}: expected a flat array of uint64, got {array.dtype} of shape {list(array.shape)}")
    return np.ascontiguousarray(array)


def phase_router(
    s_bits: npt.ArrayLike,
    t_bits: npt.ArrayLike,
    n: int,
    nb_words: int,
    k: int,
    col_perm_s: npt.ArrayLike,
    col_perm_t: npt.ArrayLike,
    seed: int,
) -> npt.NDArray[np.int32]:
    """The columns that every row is sent to, int32 ``[n, k]``, -1 where there are none left.

    Bits are uint64 ``[n * nb_words]``, row-major, ``nb_words = ceil(n / 64)``; permutations are uint64 ``[n]``.
    """
    return _phase_moe.phase_router(
        _words(s_bits, "s_bits"),
        _words(t_bits, "t_bits"),
        count(n, "n"),
        count(nb_words, "nb_words"),
        count(k, "k"),
        _words(col_perm_s, "col_perm_s"),
        _words(col_perm_t, "col_perm_t"),
        count(seed, "seed"),
    )


def phase_router_auto(
    s_bits: npt.ArrayLike, t_bits: npt.ArrayLike, n: int, k: int, seed: int
) -> npt.NDArray[np.int32]:
    """The same with permutations drawn from ``seed``."""
    return _phase_moe.phase_router_auto(
        _words(s_bits, "s_bits"), _words(t_bits, "t_bits"), count(n, "n"), count(k, "k"), count(seed, "seed")
    )


def phase_router_uniform_dispatch(
    n_tokens: int, n_experts: int, k: int, base_density: float, seed: int, oversample: int = 4
) -> npt.NDArray[np.int32]:
    """Expert ids, int32 ``[n_tokens, k]``: the first ``k`` distinct experts of the kernel's ``k * oversample`` columns, all degrees of ``base_density``."""
    return _phase_moe.phase_router_uniform_dispatch(
        count(n_tokens, "n_tokens"),
        count(n_experts, "n_experts"),
        count(k, "k"),
        float(base_density),
        count(seed, "seed"),
        count(oversample, "oversample"),
    )
