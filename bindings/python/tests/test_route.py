"""Routing through Python: what comes back, what is refused, that nothing is copied and the lock is free."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import phase_moe


def logits(tokens: int, experts: int, seed: int = 0, skew: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, experts)) + skew * rng.normal(size=experts)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=1, keepdims=True).astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def test_top_k_is_numpys() -> None:
    values = logits(200, 16)
    experts, weights, report = phase_moe.route(values, "top-k", top_k=3)
    order = np.argsort(-values, axis=1, kind="stable")[:, :3]
    assert experts.dtype == np.int32 and weights.dtype == np.float32
    assert (experts == order).all()
    np.testing.assert_allclose(weights, np.take_along_axis(softmax(values), order, axis=1), rtol=1e-5)
    assert (report.survival, report.kept, report.demand, report.capacities) == (1.0, 600, 600, None)
    assert (report.loads == np.bincount(order.reshape(-1), minlength=16)).all()


def test_phase_drops_nothing_it_has_room_for() -> None:
    values = logits(256, 16, skew=2.0)
    experts, weights, report = phase_moe.route(values, top_k=2, capacity_factor=1.0)
    assert report.survival == 1.0 and (report.loads == 32).all()
    assert (report.capacities == 32).all() and report.bound is not None and 0.99 < report.bound <= 1.0
    assert all(len(set(row)) == 2 for row in experts.tolist())
    dropped = phase_moe.route(values, "top-k-arrival", top_k=2, capacity_factor=1.0)
    assert (dropped[0] == -1).any() and (dropped[1][dropped[0] == -1] == 0).all()
    assert dropped[2].survival < 0.9 and dropped[2].gate_mass < report.gate_mass


def test_devices_fill_evenly_by_number_or_by_place() -> None:
    values = logits(128, 8, skew=2.0)
    _, _, report = phase_moe.route(values, top_k=2, capacity_factor=1.0, devices=4)
    assert (report.loads.reshape(4, 2).sum(axis=1) == 64).all() and report.device_balance.max_violation == 0
    place = np.array([0, 1, 0, 1, 1, 0, 1, 0])
    _, _, report = phase_moe.route(values, top_k=2, capacity_factor=1.0, devices=place, speeds=[1.0, 3.0])
    assert [report.loads[place == device].sum() for device in (0, 1)] == [64, 192]
    _, _, report = phase_moe.route(values, top_k=2, capacities=[100, 200], devices=2)
    assert report.loads[:4].sum() <= 100 and report.survival == 1.0


def test_own_capacities_hold() -> None:
    caps = np.arange(10, 18)
    _, _, report = phase_moe.route(logits(40, 8, skew=3.0), top_k=2, capacities=caps)
    assert (report.loads <= caps).all() and report.survival == 1.0 and (report.capacities == caps).all()


def test_a_router_keeps_its_prices() -> None:
    router = phase_moe.Router("phase", top_k=2, capacity_factor=1.0)
    assert router.prices.size == 0 and repr(router) == "Router('phase')"
    values = logits(256, 16, skew=2.0)
    first = router.route(values)[2]
    assert router.prices.shape == (16,) and (router.prices == first.prices).all() and first.prices.max() > 0
    router.reset()
    assert router.prices.size == 0


def test_resident_experts_are_preferred() -> None:
    values = logits(1, 16)
    plain = phase_moe.route(values, "top-k", top_k=4)[0]
    resident = sorted(set(range(16)) - set(plain[0].tolist()))
    router = phase_moe.Router("cache", top_k=4)
    chosen = [router.route(logits(1, 16, seed), resident=resident)[0] for seed in range(20)]
    by_mask = phase_moe.Router("cache", top_k=4)
    mask = np.isin(np.arange(16), resident)
    again = [by_mask.route(logits(1, 16, seed), resident=mask)[0] for seed in range(20)]
    assert (np.array(chosen) == np.array(again)).all()
    hits = np.isin(np.array(chosen), resident).mean()
    without = np.isin([phase_moe.route(logits(1, 16, seed), "top-k", top_k=4)[0] for seed in range(20)], resident).mean()
    assert hits > without


def test_padding_bias_and_token_ids() -> None:
    values = logits(6, 8)
    padding = [False, True] * 3
    experts, _, report = phase_moe.route(values, "top-k", top_k=2, padding=padding)
    assert (experts[1::2] == -1).all() and report.demand == 6
    bias = np.zeros(8, dtype=np.float32)
    bias[5] = 100.0
    assert (phase_moe.route(values, "top-k", top_k=1, selection_bias=bias)[0] == 5).all()
    experts = phase_moe.route(values, "hash", top_k=2, token_ids=[3, 4, 3, 4, 3, 4], seed=9)[0]
    assert (experts[0] == experts[2]).all() and (experts[1] == experts[5]).all()


def test_results_do_not_depend_on_threads() -> None:
    values = logits(2048, 64, skew=2.0)
    answers = [phase_moe.route(values, top_k=8, capacity_factor=1.0, threads=threads) for threads in (1, 2, 4)]
    for experts, weights, _ in answers[1:]:
        assert (experts == answers[0][0]).all() and (weights == answers[0][1]).all()


def test_the_lock_is_free_while_a_router_works() -> None:
    """Another thread counts on while one routes: with the lock held it would stand still."""
    values, done, counted = logits(8192, 128, skew=2.0), threading.Event(), 0

    def work() -> None:
        for _ in range(5):
            phase_moe.route(values, top_k=8, capacity_factor=1.0, threads=1)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.0005)
    worker.join()
    assert counted > 20


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((logits(4, 4), "round-robin", 1), {}, "unknown router `round-robin`"),
        ((logits(4, 4), "phase", 5), {}, "top_k"),
        ((logits(4, 4), "phase", 0), {}, "top_k"),
        ((logits(4, 4), "phase", -1), {}, "top_k"),
        ((logits(4, 4)[0], "phase", 1), {}, "logits: expected 2 dimensions"),
        ((np.full((2, 4), np.nan, dtype=np.float32), "phase", 1), {}, "NaN"),
        ((logits(4, 4), "top-k", 1), {"capacity_factor": 1.0}, "top-k"),
        ((logits(4, 4), "phase", 1), {"capacity_factor": 1.0, "capacities": [1, 1, 1, 1]}, "expected one of them"),
        ((logits(4, 4), "phase", 1), {"capacities": [1, 1]}, "expected 4 experts, got 2 experts"),
        ((logits(4, 4), "phase", 1), {"capacities": [1.5, 1, 1, 1]}, "whole numbers"),
        ((logits(4, 4), "phase", 1), {"capacities": [-1, 1, 1, 1]}, "from 0"),
        ((logits(99, 4), "phase", 1), {"capacity_factor": float("nan")}, "factor"),
        ((logits(99, 4), "phase", 1), {"capacity_factor": 1.0, "devices": 5}, "devices"),
        ((logits(99, 4), "phase", 1), {"capacity_factor": 1.0, "devices": 2, "speeds": [1.0]}, "speeds"),
        ((logits(99, 4), "phase", 1), {"capacity_factor": 1.0, "speeds": [1.0]}, "speeds"),
        ((logits(99, 4), "phase", 1), {"devices": 2}, "beside them, got neither"),
        ((logits(99, 4), "phase", 1), {"speeds": [1.0]}, "beside them, got neither"),
        ((logits(99, 4), "phase", 1), {"capacities": [1, 1], "devices": 2, "speeds": [1.0, 1.0]}, "speeds"),
        ((logits(99, 4), "phase", 1), {"capacity_factor": 1.0, "devices": [0, 1]}, "4 experts"),
        ((logits(4, 4), "cache", 1), {"resident": [4]}, "4"),
        ((logits(4, 4), "cache", 1), {"resident": [True, False]}, "mask of 4 experts"),
        ((logits(4, 4), "phase", 1), {"padding": [True]}, "padding"),
        ((logits(4, 4), "phase", 1), {"selection_bias": np.zeros(3, dtype=np.float32)}, "selection bias"),
        ((logits(4, 4), "phase", 1), {"threads": 0}, "threads is 0"),
        ((logits(4, 4), "phase", 1), {"scoring": "relu"}, "unknown scoring"),
        ((logits(4, 4), "phase", 1.5), {}, "whole number"),
    ],
)
def test_what_makes_no_sense_is_a_value_error(arguments: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phase_moe.route(*arguments, **settings)


def test_other_arrays_are_taken() -> None:
    values = logits(32, 8)
    expected = phase_moe.route(values, top_k=2)[0]
    assert (phase_moe.route(values.astype(np.float64), top_k=2)[0] == expected).all()
    assert (phase_moe.route(np.asfortranarray(values), top_k=2)[0] == expected).all()
    assert (phase_moe.route(values.tolist(), top_k=2)[0] == expected).all()

    class Elsewhere:
        """Has `__dlpack__` alone, as tensors of other frameworks."""

        def __dlpack__(self, **settings: object) -> object:
            return values.__dlpack__(**settings)

        def __dlpack_device__(self) -> tuple[int, int]:
            return values.__dlpack_device__()

    assert (phase_moe.route(Elsewhere(), top_k=2)[0] == expected).all()
    assert phase_moe.route(values[:0], top_k=2)[0].shape == (0, 2)
