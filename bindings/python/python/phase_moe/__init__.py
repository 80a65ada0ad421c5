"""Mixture-of-Experts routing that drops nothing it has room for, and proves how close to the optimum it is.

>>> import numpy as np, phase_moe
>>> logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
>>> experts, weights, report = phase_moe.route(logits, "phase", top_k=2, capacity_factor=1.0)
>>> experts.shape, report.survival
((64, 2), 1.0)

``routing`` has routers and replays of traces, ``model`` whole models; ``phase_moe.compat`` is the published package, ``phase_moe.transformers`` goes into Hugging Face models.
"""

from ._phase_moe import ROUTERS, Balance, Generation, Replay, Report, Trace, __version__
from .model import CacheStatistics, Measurement, Model, ModelSizes
from .routing import Route, Router, replay, route

__all__ = [
    "ROUTERS",
    "Balance",
    "CacheStatistics",
    "Generation",
    "Measurement",
    "Model",
    "ModelSizes",
    "Replay",
    "Report",
    "Route",
    "Router",
    "Trace",
    "__version__",
    "replay",
    "route",
]
