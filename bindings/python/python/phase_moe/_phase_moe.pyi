import numpy as np
import numpy.typing as npt

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
