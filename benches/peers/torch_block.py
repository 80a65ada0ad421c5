"""Milliseconds of one MoE block of Hugging Face transformers on PyTorch's CPU backend.

Qwen3MoeSparseMoeBlock (which is OlmoeSparseMoeBlock in all but the name) with random weights, on the shapes of
`examples/engine_table`, by every implementation of its experts that this version offers for a CPU. Blocks and inputs take
turns so that no weight is in a cache when it is touched; tokens choose experts nearly evenly. Prints one JSON document: the
ceilings that this machine reaches in PyTorch, and per cell median and minimum.
"""

import argparse
import functools
import json
import statistics
import sys
import time

import torch
import transformers
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

# hidden, expert width, experts, top_k
SHAPES = {"tiny": (128, 64, 32, 4), "B": (2048, 1024, 64, 8), "C": (2048, 768, 128, 8), "mixtral": (4096, 14336, 8, 2)}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
OUT_OF_CACHE = 512e6


def seconds(call, least=7, budget=1.5):
    """Times of a call, after one that does not count: at least so many, at least so long."""
    call()
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < budget:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return times


def read_gb_per_second():
    """Memory read by a sum over 1 GiB: the best of three medians."""
    values = torch.ones(1 << 28)
    return values.nbytes / min(statistics.median(seconds(values.sum, budget=0.3)) for _ in range(3)) / 1e9


def matmul_gflops(dtype):
    """The best product [m, k] · [n, k]ᵀ, as a linear layer has it."""
    best = 0.0
    for m, k, n in [(512, 1024, 2048), (1024, 1024, 1024), (1024, 2048, 2048), (2048, 2048, 2048)]:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        times = seconds(lambda: torch.nn.functional.linear(a, b), budget=0.5)
        best = max(best, 2 * m * k * n / statistics.median(times) / 1e9)
    return best


def block(shape, dtype, implementation):
    """A block with uniform weights of variance 1 / columns."""
    hidden, width, experts, top_k = SHAPES[shape]
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        made = Qwen3MoeSparseMoeBlock(config)
    made = made.to(dtype).to_empty(device="cpu").eval()
    for weight in made.parameters():
        weight.uniform_(-((3 / weight.shape[-1]) ** 0.5), (3 / weight.shape[-1]) ** 0.5)
    return made


def inputs(made, shape, dtype, tokens):
    """Single tokens are dealt their experts like cards; more choose as noise does."""
    hidden, _, experts, top_k = SHAPES[shape]
    if tokens > 1:
        return [torch.randn(1, tokens, hidden).to(dtype) for _ in range(2)]
    cards = made.gate.weight.float().view(experts // top_k, top_k, hidden).sum(1)
    return [(4 * hand + 0.3 * torch.randn(hidden)).to(dtype).view(1, 1, hidden) for hand in cards]


def measure(shape, dtype, tokens_list, implementations):
    """Cells of one shape and dtype, `millis` being the best implementation's median."""
    hidden, width, experts, _ = SHAPES[shape]
    size = 3 * hidden * width * experts * DTYPES[dtype].itemsize
    blocks = [block(shape, DTYPES[dtype], "eager") for _ in range(-int(-OUT_OF_CACHE // size))]
    for tokens in tokens_list:
        turns = [(made, given) for made in blocks for given in inputs(made, shape, DTYPES[dtype], tokens)]
        # All blocks have their turn before one comes again.
        each = len(turns) // len(blocks)
        turns = [turns[which * each + at] for at in range(each) for which in range(len(blocks))]
        results, outputs, turn = {}, {}, 0
        for name in implementations:
            for made in blocks:
                made.experts.config._experts_implementation = name

            def call():
                nonlocal turn
                made, given = turns[turn % len(turns)]
                turn += 1
                return made(given)

            try:
                outputs[name] = turns[0][0](turns[0][1]).float()
                results[name] = seconds(call)
            except Exception as error:  # whatever this version cannot do on a CPU is left out
                print(f"{name}: {error}", file=sys.stderr)
        for name, output in outputs.items():
            difference = (output - outputs["eager"]).abs().max() / outputs["eager"].abs().max()
            assert difference < (1e-4 if dtype == "f32" else 5e-2), f"{name} differs from eager by {difference}"
        millis = {name: round(1e3 * statistics.median(times), 3) for name, times in results.items()}
        cell = {
            "shape": shape,
            "dtype": dtype,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "millis": min(millis.values()),
            "min_millis": round(1e3 * min(map(min, results.values())), 3),
            "millis_by_experts_implementation": millis,
        }
        print(f"{shape} {dtype}, {tokens} tokens: {millis} ms", file=sys.stderr)
        yield cell


def main():
    words = functools.partial(str.split, sep=",")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", type=words, default=["B", "C"], help="of " + ", ".join(SHAPES))
    parser.add_argument("--dtypes", type=words, default=list(DTYPES), help="of " + ", ".join(DTYPES))
    parser.add_argument("--tokens", type=words, default=["1", "8", "64", "512"])
    parser.add_argument("--implementations", type=words, default=["eager", "grouped_mm"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    with torch.inference_mode():
        table = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "read_gb_per_second": read_gb_per_second(),
            "matmul_gflops": {name: matmul_gflops(dtype) for name, dtype in DTYPES.items()},
            "cells": [],
        }
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                table["cells"] += measure(shape, dtype, map(int, arguments.tokens), arguments.implementations)
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
