"""The published package's surface, its kernel bit for bit against an implementation of its own (`tests/goldens/phase_kernel_digests.py`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

import phase_moe
from phase_moe import _phase_moe
from phase_moe.compat import phase_router, phase_router_rs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digests", ROOT / "tests/goldens/phase_kernel_digests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def degrees(n: int, factor: int, plus: int) -> np.ndarray:
    return np.array([(row * factor + plus) % (n + 1) for row in range(n)])


@pytest.mark.parametrize(("n", "k", "seed"), [(8, 2, 42), (64, 4, 7), (65, 3, 0), (300, 2, 42), (200, 5, 2**64 - 3)])
def test_the_kernel_is_the_published_one(reference: ModuleType, n: int, k: int, seed: int) -> None:
    of_sources, of_targets = degrees(n, 7, 3), degrees(n, 5, 1)
    bits = [phase_router.build_bits(ones, n) for ones in (of_sources, of_targets)]
    orders = reference.permutations(n, 11)
    expected = reference.kernel(of_sources.tolist(), of_targets.tolist(), *orders, n, k, seed)
    permutations = [np.array(order, dtype=np.uint64) for order in orders]
    got = phase_router_rs.phase_router(*bits, n, -(-n // 64), k, *permutations, seed)
    assert got.dtype == np.int32 and got.tolist() == expected
    # Its own permutations are those of the same seed.
    drawn = reference.kernel(of_sources.tolist(), of_targets.tolist(), *reference.permutations(n, seed), n, k, seed)
    assert phase_router_rs.phase_router_auto(*bits, n, k, seed).tolist() == drawn


@pytest.mark.parametrize(("tokens", "experts", "k", "seed"), [(16, 4, 2, 1), (100, 8, 2, 42), (1, 8, 2, 42), (64, 16, 4, 5)])
def test_many_tokens_and_few_experts(reference: ModuleType, tokens: int, experts: int, k: int, seed: int) -> None:
    got = phase_router_rs.phase_router_uniform_dispatch(tokens, experts, k, 0.3, seed)
    assert got.tolist() == reference.dispatch(tokens, experts, k, seed)
    more = phase_router_rs.phase_router_uniform_dispatch(tokens, experts, k, 0.5, seed, oversample=2)
    assert more.tolist() == reference.dispatch(tokens, experts, k, seed, density=0.5, oversample=2)


def test_bits_are_the_first_ones() -> None:
    for n in (1, 63, 64, 65, 130):
        ones = [0, 1, 63, 64, 65, n, n + 5]
        words = phase_router.build_bits(ones, n).reshape(len(ones), -1)
        assert words.dtype == np.uint64 and words.shape[1] == -(-n // 64)
        for row, count in zip(words, ones):
            assert sum(int(word) << (64 * at) for at, word in enumerate(row)) == (1 << min(count, n)) - 1


def test_hash_route_is_numpys() -> None:
    assert (phase_router.hash_route(50, 3, 9) == np.random.default_rng(9).integers(0, 50, size=(50, 3))).all()
    assert phase_router.hash_route(7, 2).dtype == np.int32


def test_limits_are_applied_in_row_major_order() -> None:
    rng = np.random.default_rng(3)
    routes = rng.integers(-1, 11, size=(40, 3)).astype(np.int32)
    caps = rng.integers(0, 8, size=10)
    expected, used = routes.copy(), [0] * 10
    for place, target in np.ndenumerate(routes):
        if 0 <= target < 10:
            used[target] += 1
            if used[target] > caps[target]:
                expected[place] = -1
    before = routes.copy()
    assert (phase_router.enforce_capacity(routes, caps) == expected).all() and (routes == before).all()


def test_figures() -> None:
    routes = np.array([[0, 1], [1, -1], [5, 1]], dtype=np.int32)
    loads = phase_router.compute_loads(routes, 4)
    assert loads.tolist() == [1, 3, 0, 0]
    stats = phase_router.load_stats(loads)
    assert stats["mean"] == 1 and stats["max"] == 3 and stats["min"] == 0 and stats["max_over_mean"] == 3
    assert stats["std"] == stats["cv"] == pytest.approx(np.std([1, 3, 0, 0]))
    assert phase_router.load_stats([0, 0])["cv"] == 0
    assert phase_router.survival_rate(routes, 4) == pytest.approx(4 / 6)


def test_route_is_the_kernel_over_rounded_degrees(reference: ModuleType) -> None:
    n, k = 96, 3
    caps = phase_router.strong_hetero_capacities(n, seed=2)
    got = phase_router.route(target_capacities=caps, k=k, seed=5)
    ones = np.clip(np.rint(caps / caps.mean() * 0.3 * n), 1, n).astype(int)
    expected = reference.kernel([round(0.3 * n)] * n, ones.tolist(), *reference.permutations(n, 5), n, k, 5)
    assert got.tolist() == expected and phase_router.route(n=32).shape == (32, 4)


def test_capacities() -> None:
    strong = phase_router.strong_hetero_capacities(100)
    assert sorted(strong)[-10:] == [8.0] * 10 and (strong == 2.0).sum() == 20
    extreme = phase_router.extreme_hetero_capacities(10)
    assert (extreme == 16.0).sum() == 1 and phase_router.uniform_capacities(3).tolist() == [1, 1, 1]
    assert phase_router.make_hard_caps([3.0, 1.0, 0.0], 4, 2, headroom=1.0).tolist() == [6, 2, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: phase_router_rs.phase_router_auto(np.zeros(3, dtype=np.uint64), np.zeros(2, dtype=np.uint64), 2, 1, 0),
        lambda: phase_router_rs.phase_router_auto(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.uint64), 2, 1, 0),
        lambda: phase_router_rs.phase_router_auto(np.full(2, 8, dtype=np.uint64), np.zeros(2, dtype=np.uint64), 2, 1, 0),
        lambda: phase_router_rs.phase_router_auto(np.zeros(2, dtype=np.uint64), np.zeros(2, dtype=np.uint64), 2, 0, 0),
        lambda: phase_router_rs.phase_router_auto(np.zeros(2, dtype=np.uint64), np.zeros(2, dtype=np.uint64), 2**40, 1, 0),
        lambda: phase_router_rs.phase_router(*[np.zeros(2, dtype=np.uint64)] * 2, 2, 2, 1, *[np.arange(2, dtype=np.uint64)] * 2, 0),
        lambda: phase_router_rs.phase_router(*[np.zeros(2, dtype=np.uint64)] * 2, 2, 1, 1, *[np.zeros(2, dtype=np.uint64)] * 2, 0),
        lambda: phase_router_rs.phase_router_uniform_dispatch(0, 8, 2, 0.3, 0),
        lambda: phase_router_rs.phase_router_uniform_dispatch(8, 8, 2, 0.0, 0),
        lambda: phase_router_rs.phase_router_uniform_dispatch(8, 8, 9, 0.3, 0),
        lambda: phase_router_rs.phase_router_uniform_dispatch(8, 8, 2, 0.3, -1),
        lambda: phase_router.build_bits([-1], 4),
        lambda: phase_router.route(source_weights=[1.0, 2.0], target_capacities=[1.0]),
        lambda: phase_router.route(source_weights=[0.0, 0.0]),
        lambda: phase_router.make_hard_caps([float("nan")], 1, 1),
    ],
)
def test_what_makes_no_sense_is_a_value_error(call: object) -> None:
    with pytest.raises(ValueError):
        call()


#: Means over 20 seeds, survival in percent after limits, published setting: 1024 tokens and targets, density 0.3.
PUBLISHED = [
    ("strong", 2, 1.0, 89.4, 78.8),
    ("strong", 2, 1.2, 90.9, 78.8),
    ("strong", 2, 2.0, 98.3, 92.2),
    ("strong", 1, 1.2, 85.6, 72.1),
    ("uniform", 2, 1.0, 73.1, 72.7),
    ("extreme", 2, 1.0, 84.2, 74.2),
]


@pytest.mark.parametrize(("profile", "k", "headroom", "kernel", "hashed"), PUBLISHED)
def test_survival_is_the_published_one(profile: str, k: int, headroom: float, kernel: float, hashed: float) -> None:
    n, seeds = 1024, 20
    make = {
        "uniform": lambda seed: phase_router.uniform_capacities(n),
        "strong": lambda seed: phase_router.strong_hetero_capacities(n, seed),
        "extreme": lambda seed: phase_router.extreme_hetero_capacities(n, seed),
    }[profile]
    survived: dict[str, list[float]] = {"kernel": [], "hash": []}
    for seed in range(seeds):
        capacities = make(seed)
        caps = phase_router.make_hard_caps(capacities, n, k, headroom)
        of_kernel = phase_router.route(target_capacities=capacities, k=k, seed=seed)
        for name, routes in (("kernel", of_kernel), ("hash", phase_router.hash_route(n, k, seed))):
            survived[name].append(100 * phase_router.survival_rate(phase_router.enforce_capacity(routes, caps), n))
    # Other shuffles of the profile than there: means agree within four of their standard errors, not seed by seed.
    for name, mean in (("kernel", kernel), ("hash", hashed)):
        error = np.std(survived[name], ddof=1) / seeds**0.5
        assert abs(np.mean(survived[name]) - mean) < 4 * error * 2**0.5 + 0.05, (name, np.mean(survived[name]), mean)


def siphash13(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SipHash-1-3 with keys 0 of rows of 64-bit words, what Rust's standard hasher gives for a tuple of them (Aumasson and Bernstein 2012)."""
    rows, length = words.shape
    state = [np.full(rows, word, dtype=np.uint64) for word in (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)]

    def turned(value: npt.NDArray[np.uint64], by: int) -> npt.NDArray[np.uint64]:
        return (value << np.uint64(by)) | (value >> np.uint64(64 - by))

    def mix() -> None:
        state[0] += state[1]
        state[2] += state[3]
        state[1], state[3] = turned(state[1], 13) ^ state[0], turned(state[3], 16) ^ state[2]
        state[0] = turned(state[0], 32)
        state[2] += state[1]
        state[0] += state[3]
        state[1], state[3] = turned(state[1], 17) ^ state[2], turned(state[3], 21) ^ state[0]
        state[2] = turned(state[2], 32)

    for word in [*words.T, np.full(rows, length * 8 << 56, dtype=np.uint64)]:
        state[3] = state[3] ^ word
        mix()
        state[0] = state[0] ^ word
    state[2] = state[2] ^ np.uint64(0xFF)
    for _ in range(3):
        mix()
    return state[0] ^ state[1] ^ state[2] ^ state[3]


#: The published table of one seed: profile, size, k, headroom, survival in percent of kernel and hash. Its programme (`examples/moe_bench.rs` of
#: phase_router_rs) shuffles the profile by seed 42, draws the kernel's orders from seed 42 + 7777, and measures the last of 20 runs (5 above 512
#: tokens), each with the next seed.
ONE_SEED = [
    ("strong", 1024, 2, 1.0, 87.9, 79.2),
    ("strong", 1024, 2, 1.1, 89.1, 79.2),
    ("strong", 1024, 2, 1.2, 89.8, 79.2),
    ("strong", 1024, 2, 1.5, 92.4, 80.9),
    ("strong", 1024, 2, 2.0, 97.8, 92.5),
    ("strong", 1024, 1, 1.2, 85.4, 70.6),
    ("strong", 1024, 4, 1.2, 91.4, 74.6),
    ("strong", 1024, 8, 1.2, 95.9, 78.9),
    ("strong", 1024, 16, 1.2, 96.6, 77.6),
    ("strong", 256, 2, 1.2, 91.6, 77.7),
    ("strong", 512, 2, 1.2, 92.1, 80.6),
    ("strong", 2048, 2, 1.2, 90.1, 78.7),
    ("strong", 4096, 2, 1.2, 91.1, 79.0),
    ("uniform", 1024, 2, 1.2, 89.4, 89.2),
    ("mild", 1024, 2, 1.2, 87.5, 78.8),
    ("extreme", 1024, 2, 1.2, 83.0, 74.8),
]


@pytest.mark.parametrize(("profile", "n", "k", "headroom", "kernel", "hashed"), ONE_SEED)
def test_the_published_table_of_one_seed(profile: str, n: int, k: int, headroom: float, kernel: float, hashed: float) -> None:
    seed, last = 42, 19 if n <= 512 else 4
    first, second, large = {"uniform": (0, 0, 1), "mild": (n // 5, 0, 3), "strong": (n // 10, n // 5, 8), "extreme": (n // 20, 0, 16)}[profile]
    weights = np.ones(n)
    weights[: first + second] = 2.0
    weights[:first] = large
    weights = weights[_phase_moe.permutations(n, seed)[0]]
    caps = phase_router.make_hard_caps(weights, n, k, headroom)

    def survival(routes: npt.NDArray[np.int32]) -> float:
        return 100 * phase_router.survival_rate(phase_router.enforce_capacity(routes, caps), n)

    # Rounded halves away from zero, as Rust does.
    ones = np.clip(np.floor(weights / weights.mean() * 0.3 * n + 0.5), 1, n).astype(np.int64)
    bits = [phase_router.build_bits(rows, n) for rows in (np.full(n, int(0.3 * n + 0.5)), ones)]
    orders = [order.astype(np.uint64) for order in _phase_moe.permutations(n, seed + 7777)]
    routes = phase_router_rs.phase_router(*bits, n, (n + 63) // 64, k, *orders, seed + last)
    assert survival(routes) == pytest.approx(kernel, abs=0.1)
    slots = np.stack([np.repeat(np.arange(n), k), np.full(n * k, seed + last), np.tile(np.arange(k), n)], axis=1).astype(np.uint64)
    assert survival((siphash13(slots) % np.uint64(n)).astype(np.int32).reshape(n, k)) == pytest.approx(hashed, abs=0.1)
    # What is exact keeps everything there is room for: all of it, in every row of the table.
    blind = np.zeros((n, n), dtype=np.float32)
    assert phase_moe.route(blind, "quota", k, capacities=caps)[2].survival == 1.0
