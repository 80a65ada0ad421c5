from collections.abc import Iterator, Sequence
from os import PathLike

import numpy as np
import numpy.typing as npt

from .model import CacheStatistics, ModelSizes

__version__: str
ROUTERS: list[str]

class Balance:
    """Spread of loads, each against its share of the room."""

    @property
    def max_violation(self) -> float: ...
    @property
    def cv(self) -> float: ...
    @property
    def gini(self) -> float: ...
    @property
    def jain(self) -> float: ...

class Report:
    """What a router did with one batch."""

    @property
    def survival(self) -> float: ...
    @property
    def gate_mass(self) -> float: ...
    @property
    def bound(self) -> float | None: ...
    @property
    def kept(self) -> int: ...
    @property
    def demand(self) -> int: ...
    @property
    def tokens_without_expert(self) -> int: ...
    @property
    def masses(self) -> tuple[float, float]: ...
    @property
    def selection(self) -> npt.NDArray[np.int32]: ...
    @property
    def loads(self) -> npt.NDArray[np.uint32]: ...
    @property
    def capacities(self) -> npt.NDArray[np.uint32] | None: ...
    @property
    def prices(self) -> npt.NDArray[np.float32]: ...
    @property
    def balance(self) -> Balance: ...
    @property
    def device_balance(self) -> Balance | None: ...

class Router:
    def __new__(
        cls,
        router: str,
        top_k: int,
        *,
        capacity_factor: float | None,
        capacities: list[int] | None,
        devices: int | None,
        placement: list[int] | None,
        speeds: list[float] | None,
        minimum_mean: float,
        scoring: str,
        normalize: bool,
        scale: float,
        groups: tuple[int, int, str] | None,
        cache_bonus: float | None,
        max_mass_loss: float | None,
        keep_top: int | None,
        target_hit_rate: float | None,
        routes: tuple[int, list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]] | None,
        layer: int,
        seed: int,
        threads: int | None,
    ) -> Router: ...
    def route(
        self,
        logits: npt.NDArray[np.float32],
        *,
        selection_bias: npt.NDArray[np.float32] | None,
        resident: list[int] | None,
        padding: npt.NDArray[np.bool_] | None,
        token_ids: npt.NDArray[np.uint32] | None,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], Report]: ...
    def reset(self) -> None: ...
    @property
    def prices(self) -> list[float]: ...
    @property
    def name(self) -> str: ...

class Trace:
    """Gate logits of every MoE layer over a text, as ``phase-moe trace`` writes them."""

    def __new__(
        cls,
        logits: Sequence[npt.NDArray[np.float32]],
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        groups: tuple[int, int, str] | None = None,
        selection_biases: Sequence[npt.NDArray[np.float32]] | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> Trace: ...
    @staticmethod
    def read(path: str | PathLike[str]) -> Trace: ...
    def save(self, path: str | PathLike[str]) -> None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def layer_top_k(self) -> list[int]: ...
    @property
    def token_ids(self) -> npt.NDArray[np.uint32] | None: ...
    @property
    def layers(self) -> list[int]: ...
    @property
    def logits(self) -> list[npt.NDArray[np.float32]]: ...
    @property
    def selection_biases(self) -> list[npt.NDArray[np.float32] | None]: ...

class Replay:
    """What a replay did, all layers together; a request is a distinct expert of a layer and batch. Rates are ``None`` where there is nothing they could be of."""

    @property
    def requests(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def hit_rate(self) -> float | None: ...
    @property
    def belady_hit_rate(self) -> float | None: ...
    @property
    def gate_mass_kept(self) -> float | None: ...
    @property
    def agreement(self) -> float | None: ...
    @property
    def bonus(self) -> float | None: ...

def replay(
    trace: Trace,
    router: Router,
    *,
    cached_experts: int,
    policy: str,
    admission: str,
    batch_tokens: int,
    threads: int | None,
) -> Replay: ...

class Generation(Iterator[str]):
    """New text, piece by piece."""

    def __iter__(self) -> Generation: ...
    def __next__(self) -> str: ...
    @property
    def ids(self) -> list[int]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def prefill_tokens_per_second(self) -> float | None: ...
    @property
    def decode_tokens_per_second(self) -> float | None: ...

class Model:
    def __new__(
        cls,
        path: str,
        *,
        dtype: str,
        kv_dtype: str | None,
        expert_cache: int | None,
        policy: str,
        admission: str,
        threads: int | None,
    ) -> Model: ...
    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> ModelSizes: ...
    @property
    def cache(self) -> CacheStatistics | None: ...
    def set_router(self, router: Router) -> None: ...
    def encode(self, text: str, *, special: bool) -> list[int]: ...
    def decode(self, ids: list[int], before: list[int]) -> str: ...
    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]: ...
    def trace(self, texts: list[str], tokens: int | None, batch_tokens: int) -> Trace: ...
    def measure(self, texts: list[str], tokens: int | None, batch_tokens: int) -> tuple[float, float, float]: ...
    def generate(
        self, prompt: list[int], *, new_tokens: int, temperature: float, top_p: float, seed: int, chunk_tokens: int
    ) -> Generation: ...

def permutations(n: int, seed: int) -> list[npt.NDArray[np.uint32]]: ...
def phase_router(
    s_bits: npt.NDArray[np.uint64],
    t_bits: npt.NDArray[np.uint64],
    n: int,
    nb_words: int,
    k: int,
    col_perm_s: npt.NDArray[np.uint64],
    col_perm_t: npt.NDArray[np.uint64],
    seed: int,
) -> npt.NDArray[np.int32]: ...
def phase_router_auto(
    s_bits: npt.NDArray[np.uint64], t_bits: npt.NDArray[np.uint64], n: int, k: int, seed: int
) -> npt.NDArray[np.int32]: ...
def phase_router_uniform_dispatch(
    n_tokens: int, n_experts: int, k: int, base_density: float, seed: int, oversample: int = 4
) -> npt.NDArray[np.int32]: ...
