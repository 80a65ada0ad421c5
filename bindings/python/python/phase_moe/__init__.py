"""Mixture-of-Experts routing that drops nothing it has room for, and proves how close to the optimum it is.

>>> import numpy as np, phase_moe
>>> logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
>>> experts, weights, report = phase_moe.route(logits, "phase", top_k=2, capacity_factor=1.0)
>>> experts.shape, report.survival
((64, 2), 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import _phase_moe
from ._phase_moe import ROUTERS, Balance, Report, __version__

__all__ = ["ROUTERS", "Balance", "Report", "Router", "__version__", "route"]

Scoring = Literal["softmax", "sigmoid"]


def _array(values: Any, dtype: npt.DTypeLike, name: str, dimensions: int) -> npt.NDArray[Any]:
    """A contiguous array; one that is so already, of numpy or behind ``__dlpack__`` on the CPU, is not copied."""
    if not isinstance(values, np.ndarray) and hasattr(values, "__dlpack__"):
        values = np.from_dlpack(values)
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.ndim != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {list(array.shape)}")
    return array


class Router:
    """A router that keeps what it learns, prices and recent use, from batch to batch.

    ``router`` is one of ``ROUTERS``. At most one of ``capacity_factor`` and ``capacities`` limits it: the factor times the demand, shared out evenly or,
    with ``devices``, per device; or slots per expert (per device with ``devices``). ``devices`` is a number of groups of neighbouring experts, or the
    device of each expert; ``speeds`` are their relative capacities. Below ``minimum_mean`` slots per pool on average a factor does not limit:
    ``Report.capacities`` says. ``groups`` are how many groups experts are in and how many of them a token may use (DeepSeek). ``seed`` is for routers that draw, ``threads`` how many threads of its own it works on; results do not depend on it.

    Raises ``ValueError`` for what makes no sense.
    """

    def __init__(
        self,
        router: str = "phase",
        top_k: int = 8,
        *,
        capacity_factor: float | None = None,
        capacities: npt.ArrayLike | None = None,
        devices: int | Sequence[int] | npt.NDArray[Any] | None = None,
        speeds: npt.ArrayLike | None = None,
        minimum_mean: float = 4.0,
        scoring: Scoring = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        groups: tuple[int, int] | None = None,
        group_score: Literal["top-two", "max"] = "top-two",
        layer: int = 0,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        count, placement = None, None
        if devices is not None:
            if isinstance(devices, (int, np.integer)):
                count = int(devices)
            else:
                placement = _whole(devices, "devices", 2**16)
                count = max(placement, default=-1) + 1
        self._router = _phase_moe.Router(
            router,
            _count(top_k, "top_k"),
            capacity_factor=capacity_factor,
            capacities=None if capacities is None else _whole(capacities, "capacities", 2**32),
            devices=count,
            placement=placement,
            speeds=None if speeds is None else _array(speeds, np.float64, "speeds", 1).tolist(),
            minimum_mean=minimum_mean,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            groups=None if groups is None else (_count(groups[0], "groups"), _count(groups[1], "groups"), group_score),
            layer=_count(layer, "layer"),
            seed=_count(seed, "seed"),
            threads=None if threads is None else _count(threads, "threads"),
        )

    def route(
        self,
        logits: Any,
        *,
        selection_bias: npt.ArrayLike | None = None,
        resident: npt.ArrayLike | None = None,
        padding: npt.ArrayLike | None = None,
        token_ids: npt.ArrayLike | None = None,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], Report]:
        """Experts (int32 ``[tokens, top_k]``, -1 where dropped), combine weights (float32) and a report for gate ``logits`` ``[tokens, experts]``.

        ``selection_bias`` ``[experts]`` counts for selection only. ``resident`` are the ids of experts in fast memory, or a mask of them; ``padding`` is
        true for tokens that are none; ``token_ids`` are what routers that hash look at. Raises ``ValueError`` for what does not fit.
        """
        values = _array(logits, np.float32, "logits", 2)
        if resident is not None:
            resident = np.asarray(resident)
            if resident.dtype == np.bool_:
                if resident.shape != (values.shape[1],):
                    raise ValueError(f"resident: expected a mask of {values.shape[1]} experts, got shape {list(resident.shape)}")
                resident = np.flatnonzero(resident)
        return self._router.route(
            values,
            selection_bias=None if selection_bias is None else _array(selection_bias, np.float32, "selection_bias", 1),
            resident=None if resident is None else _whole(resident, "resident", 2**32),
            padding=None if padding is None else _array(padding, np.bool_, "padding", 1),
            token_ids=None if token_ids is None else np.array(_whole(token_ids, "token_ids", 2**32), dtype=np.uint32),
        )

    @property
    def prices(self) -> npt.NDArray[np.float32]:
        """What a slot of each expert or device cost at the end of the last batch; empty before the first."""
        return np.array(self._router.prices, dtype=np.float32)

    @property
    def name(self) -> str:
        """Which router it is."""
        return self._router.name

    def reset(self) -> None:
        """Forgets what it has learnt."""
        self._router.reset()

    def __repr__(self) -> str:
        return f"Router({self.name!r})"


def route(
    logits: Any,
    router: str = "phase",
    top_k: int = 8,
    *,
    selection_bias: npt.ArrayLike | None = None,
    resident: npt.ArrayLike | None = None,
    padding: npt.ArrayLike | None = None,
    token_ids: npt.ArrayLike | None = None,
    **settings: Any,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], Report]:
    """Routes one batch with a router that has learnt nothing: ``Router(router, top_k, **settings).route(logits, ..)``."""
    return Router(router, top_k, **settings).route(
        logits, selection_bias=selection_bias, resident=resident, padding=padding, token_ids=token_ids
    )


def _whole(values: npt.ArrayLike, name: str, end: int) -> list[int]:
    """Whole numbers from 0 to below ``end``."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected whole numbers, got {array.dtype}")
    if array.size and not (0 <= array.min() and array.max() < end):
        raise ValueError(f"{name}: expected numbers from 0 to below {end}, got {array.min()} to {array.max()}")
    return [int(value) for value in array]


def _count(value: int, name: str) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if not 0 <= int(value) < 2**64:
        raise ValueError(f"{name}: expected a number from 0 to below 2^64, got {value}")
    return int(value)
