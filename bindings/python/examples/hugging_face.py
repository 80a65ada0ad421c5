"""Perplexity of a Hugging Face MoE model on texts: as it is, and with this package's routers per device. The batches are those of ``phase-moe compare``: sequences of 256
tokens without context, two a batch, both of one text.

    pip install torch 'transformers>=5.20,<6'
    python examples/hugging_face.py ../../models/tiny-moe ../../models/tiny-moe/eval/*.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

from phase_moe.transformers import attach

LENGTH, SEQUENCES = 256, 2


def batches(tokenizer: transformers.PreTrainedTokenizerFast, texts: list[Path], most: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and which of them are tokens, both ``[sequences, length]``; the last batch of a text may be short."""
    made = []
    for text in texts:
        ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
        ids = ids if most is None else ids[: most // len(texts)]
        sequences = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
        sequences = [sequence for sequence in sequences if len(sequence) > 1]
        for start in range(0, len(sequences), SEQUENCES):
            part = sequences[start : start + SEQUENCES]
            longest = max(map(len, part))
            rows = [sequence + [0] * (longest - len(sequence)) for sequence in part]
            mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in part]
            made.append((torch.tensor(rows), torch.tensor(mask)))
    return made


@torch.no_grad()
def perplexity(model: torch.nn.Module, made: list[tuple[torch.Tensor, torch.Tensor]], router: str | None, settings: dict[str, object]) -> tuple[float, str]:
    """And what the router did, as text."""
    routing = None if router is None else attach(model, router, **settings)
    total, count = 0.0, 0
    for ids, mask in made:
        if routing is not None:
            routing.padding = None if bool(mask.all()) else ~mask.bool().numpy()
        logits = model(ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        counts = mask[:, 1:].flatten().bool()
        total, count = total + float(losses[counts].double().sum()), count + int(counts.sum())
    if routing is None:
        return float(np.exp(total / count)), "–"
    routing.close()
    return float(np.exp(total / count)), f"survival {100 * routing.survival:.2f} %, gate mass {100 * routing.gate_mass:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a Hugging Face MoE model with this package's routers.")
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--capacity-factor", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, help="of all texts together [default: all]")
    options = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(options.model / "tokenizer.json"))
    made = batches(tokenizer, options.texts, options.tokens)
    limits: dict[str, object] = {"capacity_factor": options.capacity_factor, "devices": options.devices}
    plain, _ = perplexity(model, made, None, {})
    print(f"{'the model itself':24} {plain:.6f}")
    for name, router, settings in [
        ("top-k, no limit", "top-k", {}),
        *((f"{router}, {options.devices} devices", router, limits) for router in ("top-k-arrival", "top-k-rank", "top-k-score", "phase")),
    ]:
        value, figures = perplexity(model, made, router, settings)
        print(f"{name:24} {value:.6f}  {100 * (value / plain - 1):+8.3f} %  {figures}")


if __name__ == "__main__":
    main()
