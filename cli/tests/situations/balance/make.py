"""Gate logits whose first choice loads the experts 1 : 2 and 1 : 2 : 3, for cli/tests/situations/balance.json.

numpy 2.4.6, safetensors 0.8.0:    python cli/tests/situations/balance/make.py

Each token wants one expert and has a second one that it would take. The figures in balance.json are
    r = load / share;  load_cv = std(r) / mean(r);  max_violation = max(load / (share / sum(shares) * demand)) - 1
with the loads that the run's routes show, computed here.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent


def write(name, wanted):
    logits = np.full((len(wanted), max(wanted) + 1), -2.0, dtype=np.float32)
    for token, expert in enumerate(wanted):
        logits[token, expert] = 2.0
        logits[token, (expert + 1) % logits.shape[1]] = 0.0
    metadata = {"experts": str(logits.shape[1]), "top_k": "1", "score": "softmax"}
    save_file({"layer.0": logits}, HERE / name, metadata)


def figures(loads, shares, demand):
    r = np.array(loads) / np.array(shares)
    due = np.array(shares) / np.sum(shares) * demand
    return np.std(r) / np.mean(r), np.max(np.array(loads) / due) - 1


write("two.safetensors", [0, 1, 1] * 20)
write("three.safetensors", [0, 1, 1, 2, 2, 2] * 10)

for about, loads, shares in [
    ("two, phase, speeds 1:2", [20, 40], [20, 40]),
    ("two, top-k-arrival, speeds 2:1", [20, 20], [40, 20]),
    ("three, top-k-arrival, capacities 30,20,10", [10, 20, 10], [30, 20, 10]),
    ("three, top-k-arrival, capacities 10,20,30", [10, 20, 30], [10, 20, 30]),
    ("three, top-k-arrival, capacities 20,20,20", [10, 20, 20], [20, 20, 20]),
]:
    print(about, figures(loads, shares, 60))
