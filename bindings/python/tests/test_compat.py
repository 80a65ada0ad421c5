"""The published package's surface, its kernel bit for bit against an implementation of its own (`tests/goldens/phase_kernel_digests.py`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

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
