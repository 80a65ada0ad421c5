"""Balance figures of loads against shares, by their definitions, for src/routing/tests/balance.rs.

numpy 2.4.6:    python tests/balance/make_table.py

An expert without a share is the limit of a share that goes to 0: of those with a load the figures are taken at a share of
1e-13; those without a load are left out.
"""

import json
from pathlib import Path

import numpy as np

CASES = [
    ("one to two, as it should be", [20, 40], [1, 2]),
    ("one to two, the wrong way round", [40, 20], [1, 2]),
    ("one to two, equal loads", [30, 30], [1, 2]),
    ("three devices, in proportion", [7, 13, 40], [7, 13, 40]),
    ("three devices, in proportion to shares that are no whole numbers", [10, 20, 30], [0.1, 0.2, 0.3]),
    ("three devices, half of each share", [5, 10, 15], [10, 20, 30]),
    ("thirds and sevenths", [21, 9, 14], [1 / 3, 1 / 7, 2 / 9]),
    ("one has all of it", [60, 0, 0], [1, 2, 3]),
    ("the small one has all of it", [0, 0, 60], [3, 2, 1]),
    ("two of eight are fast", [40, 9, 11, 8, 42, 12, 10, 13], [4, 1, 1, 1, 4, 1, 1, 1]),
    ("dropped slots", [10, 15, 5, 0], [20, 20, 10, 10]),
    ("no share and no load", [0, 10, 20], [0, 1, 2]),
    ("no share and a load", [5, 10, 20], [0, 1, 2]),
    ("no share and a load, another without either", [5, 10, 20, 0], [0, 1, 2, 0]),
    ("two without a share", [5, 15, 20], [0, 0, 2]),
    ("equal shares", [12, 7, 9, 30, 2], [3, 3, 3, 3, 3]),
    ("equal shares, equal loads", [9, 9, 9], [0.1, 0.1, 0.1]),
    ("large numbers", [4_000_000_000, 2_000_000_001, 1], [4e9, 2e9, 1.0]),
]


def figures(loads, shares):
    loads, shares = np.array(loads, dtype=np.float64), np.array(shares, dtype=np.float64)
    counted = (loads > 0) | (shares > 0)
    loads, shares = loads[counted], shares[counted] / shares.max()
    r = loads / np.where(shares > 0, shares, 1e-13)
    pairs = np.abs(r[:, None] - r[None, :]).sum()
    return {
        "cv": float(np.std(r) / np.mean(r)),
        "gini": float(pairs / (2 * len(r) ** 2 * np.mean(r))),
        "jain": float(r.sum() ** 2 / (len(r) * (r**2).sum())),
    }


def main():
    rows = []
    for name, loads, shares in CASES:
        demand = sum(loads)
        fair = np.array(shares) / np.sum(shares) * demand
        over = [load / due - 1 if due > 0 else None for load, due in zip(loads, fair) if due > 0 or load > 0]
        violation = None if None in over else float(max(over))
        rows.append({"name": name, "loads": loads, "shares": shares, "max_violation": violation, **figures(loads, shares)})
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("table.json").write_text(f"[\n{lines}\n]\n")


main()
