"""Routers: one batch, or batch after batch with what is learnt on the way; and traces of gate logits against a memory for some of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _phase_moe
from ._phase_moe import Replay, Report, Trace

__all__ = ["Route", "Router", "replay", "route"]

Scoring = Literal["softmax", "sigmoid"]


def array_of(values: Any, dtype: npt.DTypeLike, name: str, dimensions: int) -> npt.NDArray[Any]:
    """A contiguous array; one that is so already, of numpy or behind ``__dlpack__`` on the CPU, is not copied."""
    if not isinstance(values, np.ndarray) and hasattr(values, "__dlpack__"):
        values = np.from_dlpack(values)
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.ndim != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {list(array.shape)}")
    return array


class Route(NamedTuple):
    """What was done with one batch, to be done again: see :meth:`Router.forced`."""

    #: Experts, int32 ``[tokens, top_k]``, -1 where dropped.
    experts: npt.NDArray[np.int32]
    #: The same before slots were dropped (``Report.selection``): what combine weights are made of.
    selection: npt.NDArray[np.int32]


class Router:
    """A router that keeps what it learns, prices and recent use, from batch to batch.

    ``router`` is one of ``ROUTERS``. At most one of ``capacity_factor`` and ``capacities`` limits it: the factor times the demand, shared out evenly or,
    with ``devices``, per device; or slots per expert (per device with ``devices``). ``devices`` is a number of groups of neighbouring experts, or the
    device of each expert; ``speeds`` are their relative capacities, and groups hold experts in proportion to them. Below ``minimum_mean`` slots per pool on average a factor does not limit:
    ``Report.capacities`` says. ``cache`` and ``cache+phase`` prefer resident experts by ``cache_bonus`` score ranges (0.1 unless said, or steered towards
    ``target_hit_rate``), at the cost of at most ``max_mass_loss`` of a token's gate mass (0.1), and never swap its ``keep_top`` best (1). ``groups`` are how many groups experts are in and how many of them a token may use (DeepSeek). ``seed`` is for routers that draw, ``threads`` how many threads of its own it works on; results do not depend on it.

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
        cache_bonus: float | None = None,
        max_mass_loss: float | None = None,
        keep_top: int | None = None,
        target_hit_rate: float | None = None,
        layer: int = 0,
        seed: int = 0,
        threads: int | None = None,
        _routes: tuple[int, list[tuple[Any, Any]]] | None = None,
    ) -> None:
        number, placement = None, None
        if devices is not None:
            if isinstance(devices, (int, np.integer)):
                number = int(devices)
            else:
                placement = whole(devices, "devices", 2**16)
                number = max(placement, default=-1) + 1
        self._router = _phase_moe.Router(
            router,
            count(top_k, "top_k"),
            capacity_factor=capacity_factor,
            capacities=None if capacities is None else whole(capacities, "capacities", 2**32),
            devices=number,
            placement=placement,
            speeds=None if speeds is None else array_of(speeds, np.float64, "speeds", 1).tolist(),
            minimum_mean=minimum_mean,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            groups=None if groups is None else (count(groups[0], "groups"), count(groups[1], "groups"), group_score),
            cache_bonus=cache_bonus,
            max_mass_loss=max_mass_loss,
            keep_top=None if keep_top is None else count(keep_top, "keep_top"),
            target_hit_rate=target_hit_rate,
            routes=_routes,
            layer=count(layer, "layer"),
            seed=count(seed, "seed"),
            threads=None if threads is None else count(threads, "threads"),
        )

    @classmethod
    def forced(
        cls,
        routes: Sequence[Route | npt.ArrayLike],
        *,
        experts: int,
        scoring: Scoring = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        layer: int = 0,
        threads: int | None = None,
    ) -> Router:
        """A router that gives recorded routes again, one a batch in their order (after :meth:`reset` from the first), whatever the gate says: for training with the routes of
        rollouts. Ids ``[tokens, top_k]`` with -1 where dropped, or a :class:`Route`, which knows what was dropped too. Combine weights are of the batch's own logits.
        """
        pairs = [route if isinstance(route, Route) else Route(np.asarray(route), np.asarray(route)) for route in routes]
        if not pairs:
            raise ValueError("routes: expected those of at least one batch, got none")
        recorded = [(_ids(pair.experts), _ids(pair.selection)) for pair in pairs]
        top_k = recorded[0][0].shape[1]
        settings: dict[str, Any] = {"scoring": scoring, "normalize": normalize, "scale": scale, "layer": layer, "threads": threads}
        return cls("top-k", top_k, _routes=(count(experts, "experts"), recorded), **settings)

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
        values = array_of(logits, np.float32, "logits", 2)
        if resident is not None:
            resident = np.asarray(resident)
            if resident.dtype == np.bool_:
                if resident.shape != (values.shape[1],):
                    raise ValueError(f"resident: expected a mask of {values.shape[1]} experts, got shape {list(resident.shape)}")
                resident = np.flatnonzero(resident)
        return self._router.route(
            values,
            selection_bias=None if selection_bias is None else array_of(selection_bias, np.float32, "selection_bias", 1),
            resident=None if resident is None else whole(resident, "resident", 2**32),
            padding=None if padding is None else array_of(padding, np.bool_, "padding", 1),
            token_ids=None if token_ids is None else np.array(whole(token_ids, "token_ids", 2**32), dtype=np.uint32),
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


def replay(
    trace: Trace,
    router: str = "cache",
    top_k: int | None = None,
    *,
    cached_experts: int | None = None,
    policy: str = "lru",
    admission: str = "affinity",
    batch_tokens: int = 1,
    threads: int | None = None,
    **settings: Any,
) -> Replay:
    """Routes a trace batch by batch beside a memory with room for ``cached_experts`` experts of each layer (half of them unless said), and counts hits, misses and lost gate mass;
    ``belady_hit_rate`` is what the best policy there could be would reach on the same requests. A batch is one token (decode) unless ``batch_tokens`` says otherwise.

    ``policy`` says who leaves (``lru``, ``lfu``, ``lfru``, ``affinity``), ``admission`` which misses enter (``affinity``, ``all``); ``settings`` are those of :class:`Router`, but for
    what the trace says (how logits become scores). Raises ``ValueError`` for what does not fit.
    """
    refuse(settings, ("scoring", "normalize", "scale", "groups", "group_score", "layer"), "those of the trace")
    if top_k is None and trace.layer_top_k:
        raise ValueError(f"top_k: expected one number, the trace was taken with {trace.layer_top_k} in its layers, got none")
    made = Router(router, trace.top_k if top_k is None else top_k, **settings)
    return _phase_moe.replay(
        trace,
        made._router,
        cached_experts=trace.experts // 2 if cached_experts is None else count(cached_experts, "cached_experts"),
        policy=policy,
        admission=admission,
        batch_tokens=count(batch_tokens, "batch_tokens"),
        threads=None if threads is None else count(threads, "threads"),
    )


def refuse(settings: dict[str, Any], names: Sequence[str], instead: str) -> None:
    """Settings that something else decides would be a mistake that nobody sees."""
    for name in names:
        if name in settings:
            raise ValueError(f"{name}: expected none, {instead} count, got {settings[name]!r}")


def _ids(values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Expert ids, `[tokens, top_k]`."""
    array = np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"routes: expected whole numbers [tokens, top_k], got {array.dtype} {list(array.shape)}")
    if array.size and not (-(2**31) <= array.min() and array.max() < 2**31):
        raise ValueError(f"routes: expected expert ids, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int32)


def whole(values: npt.ArrayLike, name: str, end: int) -> list[int]:
    """Whole numbers from 0 to below ``end``."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected whole numbers, got {array.dtype}")
    if array.size and not (0 <= array.min() and array.max() < end):
        raise ValueError(f"{name}: expected numbers from 0 to below {end}, got {array.min()} to {array.max()}")
    return [int(value) for value in array]


def count(value: int, name: str) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if not 0 <= int(value) < 2**64:
        raise ValueError(f"{name}: expected a number from 0 to below 2^64, got {value}")
    return int(value)
