"""What crossing the boundary costs, and top-k here beside numpy's (and torch's, where it is installed): medians in microseconds, in one run.

    python bench.py
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable

import numpy as np

import phase_moe


def median(call: Callable[[], object], repeat: int = 15) -> float:
    """Microseconds of a call, in the median of ``repeat`` rounds of at least 20 ms."""
    timer = timeit.Timer(call)
    number = max(1, int(0.02 / max(timer.timeit(3) / 3, 1e-7)))
    return statistics.median(timer.repeat(repeat, number)) / number * 1e6


def main() -> None:
    try:
        import torch
    except ImportError:
        torch = None
    print("| tokens | experts | top k | phase_moe top-k | phase | numpy | torch |\n|---|---|---|---|---|---|---|")
    for tokens, experts, top_k in ((1, 64, 8), (64, 64, 8), (4096, 64, 8), (4096, 128, 8)):
        logits = np.random.default_rng(0).normal(size=(tokens, experts)).astype(np.float32)
        choice = phase_moe.Router("top-k", top_k, threads=1)
        phase = phase_moe.Router("phase", top_k, capacity_factor=1.0, threads=1)

        def by_numpy() -> np.ndarray:
            """Softmax, the best k in order, their scores: what a router gives, without a report."""
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
            best = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
            picked = np.take_along_axis(scores, best, axis=1)
            order = np.argsort(-picked, axis=1)
            return np.take_along_axis(best, order, axis=1), np.take_along_axis(picked, order, axis=1)

        cells = [median(lambda: choice.route(logits)), median(lambda: phase.route(logits)), median(by_numpy)]
        if torch is not None:
            torch.set_num_threads(1)
            tensor = torch.from_numpy(logits)
            cells.append(median(lambda: torch.topk(torch.softmax(tensor, -1), top_k)))
        shown = [f"{cell:.1f} ({cell / cells[0]:.2f})" for cell in cells] + ["–"] * (4 - len(cells))
        print(f"| {tokens} | {experts} | {top_k} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
