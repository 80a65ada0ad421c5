"""Whole models: a checkpoint in Hugging Face layout or a GGUF file, with any router in its MoE layers.

>>> model = phase_moe.Model("models/tiny-moe")                                      # doctest: +SKIP
>>> "".join(model.generate("And God said", new_tokens=20))                          # doctest: +SKIP
>>> model.set_router("phase", capacity_factor=1.0, devices=4)                       # doctest: +SKIP
>>> model.measure(open("text.txt").read()).perplexity                               # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from . import _phase_moe
from ._phase_moe import Generation, Trace
from .routing import Router, count, refuse, whole

__all__ = ["CacheStatistics", "Measurement", "Model", "ModelSizes"]

Dtype = Literal["f32", "f16", "bf16"]


class ModelSizes(TypedDict):
    """What a model is made of."""

    family: str
    layers: int
    moe_layers: int
    hidden: int
    experts: int
    top_k: int
    expert_width: int
    vocab: int
    max_positions: int
    parameters: int
    active_parameters: int


class CacheStatistics(TypedDict):
    """What an expert cache did since the model was loaded; a request is a distinct expert of a layer and step."""

    requests: int
    hits: int
    misses: int
    evictions: int
    bytes_read: int
    bytes: int
    peak_bytes: int
    prefetched: int
    waiting_seconds: float


class Measurement(NamedTuple):
    """What real forward passes over a text gave."""

    perplexity: float
    #: Slots that got an expert, of those asked for.
    survival: float
    #: Kept gate mass over that of the gate's own choice, mean over layers and batches.
    gate_mass: float


class Model:
    """Decoder and tokenizer of a checkpoint (a directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``) or of a GGUF file.

    ``dtype`` is of activations, weights stay as they are stored; ``kv_dtype`` of keys and values. With ``expert_cache``, a number of bytes, experts stay in their files and as many
    as fit are kept, by ``policy`` (``lru``, ``lfu``, ``lfru``, ``affinity``) and ``admission`` (``affinity``, ``all``). ``threads`` works on a pool of its own; results do not depend on it.

    Raises ``ValueError`` for what is wrong with the model or the settings, ``OSError`` for files that cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: Dtype = "f32",
        kv_dtype: Dtype | None = None,
        expert_cache: int | None = None,
        policy: str = "lru",
        admission: str = "affinity",
        threads: int | None = None,
    ) -> None:
        self._model = _phase_moe.Model(
            os.fspath(path),
            dtype=dtype,
            kv_dtype=kv_dtype,
            expert_cache=None if expert_cache is None else count(expert_cache, "expert_cache"),
            policy=policy,
            admission=admission,
            threads=None if threads is None else count(threads, "threads"),
        )
        self._top_k = self.sizes["top_k"]

    @property
    def name(self) -> str:
        """What it is called."""
        return self._model.name

    @property
    def sizes(self) -> ModelSizes:
        """What it is made of."""
        return self._model.sizes

    @property
    def cache(self) -> CacheStatistics | None:
        """What its expert cache did so far; ``None`` without one."""
        return self._model.cache

    def set_router(self, router: str = "top-k", top_k: int | None = None, **settings: Any) -> None:
        """Puts a router into every MoE layer, with the checkpoint's own ``top_k`` unless said. ``settings`` are those of :class:`phase_moe.Router`, but for what the model itself
        says (how logits become scores)."""
        refuse(settings, ("scoring", "normalize", "scale", "groups", "group_score", "layer", "threads"), "those of the model")
        self._model.set_router(Router(router, self._top_k if top_k is None else top_k, **settings)._router)

    def encode(self, text: str, *, special: bool = True) -> npt.NDArray[np.uint32]:
        """Token ids of a text; ``special`` puts around it what the tokenizer puts around a sequence."""
        return np.array(self._model.encode(text, special=special), dtype=np.uint32)

    def decode(self, ids: npt.ArrayLike, before: npt.ArrayLike = ()) -> str:
        """Text of token ids that come after those ``before``, without the special tokens that begin or end a text."""
        return self._model.decode(whole(ids, "ids", 2**32), whole(before, "before", 2**32))

    def logits(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits of the token that follows each of ``ids``, float32 ``[tokens, vocab]``."""
        return self._model.logits(whole(ids, "ids", 2**32))

    def generate(
        self,
        prompt: str | npt.ArrayLike,
        *,
        new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 42,
        chunk_tokens: int = 512,
    ) -> Generation:
        """Continues a text or token ids: an iterator over the new text, piece by piece. A temperature of 0 always takes the most likely token."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self._model.generate(
            whole(ids, "prompt", 2**32),
            new_tokens=count(new_tokens, "new_tokens"),
            temperature=temperature,
            top_p=top_p,
            seed=count(seed, "seed"),
            chunk_tokens=count(chunk_tokens, "chunk_tokens"),
        )

    def trace(self, texts: str | Sequence[str], *, tokens: int | None = None, batch_tokens: int = 512) -> Trace:
        """Gate logits of every MoE layer over texts, in sequences of 256 tokens as ``phase-moe trace`` cuts them; at most ``tokens`` of them."""
        return self._model.trace(_texts(texts), None if tokens is None else count(tokens, "tokens"), count(batch_tokens, "batch_tokens"))

    def measure(self, texts: str | Sequence[str], *, tokens: int | None = None, batch_tokens: int = 512) -> Measurement:
        """Perplexity, survival and gate mass over texts, with the router that is set; batches are those of ``phase-moe compare``."""
        return Measurement(*self._model.measure(_texts(texts), None if tokens is None else count(tokens, "tokens"), count(batch_tokens, "batch_tokens")))

    def __repr__(self) -> str:
        return f"Model({self.name!r})"


def _texts(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
