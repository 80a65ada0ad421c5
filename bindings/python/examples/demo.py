"""The published demo, with this package's routers beside it: loads before limits, survival after them, and how much headroom 90 % takes.

    python examples/demo.py                        # tables
    python examples/demo.py --plots demo.png       # and the published drawings; wants matplotlib

512 tokens and as many targets, four slots a token, a strong profile of capacities, headroom 1.2, seed 42. The phase kernel and the hash are blind to the gate: they
are the published package's own (``phase_moe.compat``). ``quota`` and ``phase`` are this package's: both place every slot that there is room for; ``phase`` also reads the gate,
here random logits, and says how much of its mass was kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import phase_moe
from phase_moe.compat import phase_router as published

Routes = npt.NDArray[np.int32]
Capacities = npt.NDArray[np.float64]


def routed(router: str, logits: npt.NDArray[np.float32], k: int, caps: npt.NDArray[np.int64]) -> tuple[Routes, phase_moe.Report]:
    """One of this package's routers within these limits."""
    experts, _, report = phase_moe.route(logits, router, top_k=k, capacities=caps)
    return experts, report


def before_limits(name: str, routes: Routes, capacities: Capacities) -> None:
    n = len(capacities)
    loads = published.compute_loads(routes, n)
    stats = published.load_stats(loads)
    correlation = np.corrcoef(loads, capacities)[0, 1] if loads.std() and capacities.std() else float("nan")
    figures = " ".join(f"{stats[key]:8.3f}" for key in ("mean", "std", "max", "min", "cv", "max_over_mean"))
    print(f"  {name:13} {figures} {correlation:8.3f}")


def after_limits(name: str, routes: Routes, caps: npt.NDArray[np.int64]) -> None:
    n, loads = len(caps), published.compute_loads(routes, len(caps))
    stats, used = published.load_stats(loads), loads / caps
    kept = int((routes >= 0).sum())
    print(
        f"  {name:13} {100 * published.survival_rate(routes, n):8.2f} % {kept:8} {routes.size - kept:8} {stats['cv']:8.3f} "
        f"{stats['max_over_mean']:8.3f} {int((loads >= caps).sum()):8} {100 * used.mean():8.1f} %"
    )


def headroom_for(share: float, survive: Callable[[float], float]) -> float | None:
    """The least headroom, in steps of 0.05 from 1.0 to 4.0, at which so many slots survive."""
    return next((step / 20 for step in range(20, 81) if survive(step / 20) >= share), None)


def plot(file: str, routes: dict[str, Routes], capacities: Capacities) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for at, (name, ids) in enumerate(routes.items()):
        loads = published.compute_loads(ids, len(capacities))
        jitter = np.random.default_rng(at).uniform(-0.15, 0.15, len(capacities))
        left.scatter(capacities + jitter, loads, s=8, label=name)
        right.scatter(capacities + jitter, loads / capacities, s=8, label=name)
    left.set(xlabel="relative capacity", ylabel="load", title="load against capacity")
    right.set(xlabel="relative capacity", ylabel="load / capacity", title="load over capacity")
    left.legend()
    figure.savefig(file, dpi=120)
    print(f"\nwrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The published demo, with this package's routers beside it.")
    parser.add_argument("--n", type=int, default=512, help="tokens, and targets")
    parser.add_argument("--k", type=int, default=4, help="slots of a token")
    parser.add_argument("--headroom", type=float, default=1.2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--plots", metavar="FILE", help="draws loads against capacities")
    options = parser.parse_args()
    n, k, seed = options.n, options.k, options.seed

    capacities = published.strong_hetero_capacities(n, seed)
    caps = published.make_hard_caps(capacities, n, k, options.headroom)
    logits = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    kernel = published.route(target_capacities=capacities, k=k, seed=seed)
    hashed = published.hash_route(n, k, seed)
    quota, _ = routed("quota", logits, k, caps)
    phase, report = routed("phase", logits, k, caps)

    print(f"n {n}, k {k}, headroom {options.headroom}, strong profile, seed {seed}; room for {caps.sum() / (n * k):.2f} of the demand\n")
    print("Before limits     mean      std      max      min       cv max/mean  corr(load, capacity)")
    for name, routes in (("phase kernel", kernel), ("hash", hashed)):
        before_limits(name, routes, capacities)

    order = np.argsort(-capacities, kind="stable")
    for title, targets in (("most", order[:10]), ("least", order[-10:])):
        print(f"\nLoads of the ten targets of {title} capacity ({capacities[targets[0]]:.0f} to {capacities[targets[-1]]:.0f})")
        for name, routes in (("phase kernel", kernel), ("hash", hashed)):
            print(f"  {name:13} {' '.join(f'{load:4}' for load in published.compute_loads(routes, n)[targets])}")

    print("\nAfter limits     survival     kept  dropped       cv max/mean  at limit mean use")
    within = {name: published.enforce_capacity(routes, caps) for name, routes in (("phase kernel", kernel), ("hash", hashed))}
    within |= {"quota": quota, "phase": phase}
    for name, routes in within.items():
        after_limits(name, routes, caps)
    bound = "" if report.bound is None else f", {100 * report.bound:.3f} % of the most that any router could within these limits"
    print(f"\nphase keeps {100 * report.gate_mass:.2f} % of the gate mass that top-k without limits has{bound}")

    def survival(routes: Routes, headroom: float) -> float:
        limits = published.make_hard_caps(capacities, n, k, headroom)
        return published.survival_rate(published.enforce_capacity(routes, limits), n)

    def of_phase(headroom: float) -> float:
        return routed("phase", logits, k, published.make_hard_caps(capacities, n, k, headroom))[1].survival

    print("\nHeadroom at which 90 % of the slots survive")
    for name, survive in (
        ("phase kernel", lambda headroom: survival(kernel, headroom)),
        ("hash", lambda headroom: survival(hashed, headroom)),
        ("phase", of_phase),
    ):
        needed = headroom_for(0.9, survive)
        print(f"  {name:13} {'more than 4.00' if needed is None else f'{needed:.2f}'}")
    if options.plots:
        plot(options.plots, {"phase kernel": kernel, "hash": hashed, "phase": phase}, capacities)


if __name__ == "__main__":
    main()
