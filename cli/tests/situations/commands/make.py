"""Traces as other programs write them, and what routing them has to give.

torch 2.15, safetensors 0.8, numpy 2.4. Run in this directory; writes *.safetensors beside this file.

The logits are multiples of 1/8 below 16, which f16, bf16, f32 and f64 all hold exactly, so all files mean the same trace. The golden
weights are torch's: softmax over all experts in float32, then the two largest.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
TOKENS, EXPERTS, TOP_K = 6, 5, 2

generator = torch.Generator().manual_seed(3)
order = torch.stack([torch.randperm(64, generator=generator)[:EXPERTS] for _ in range(2 * TOKENS)])
logits = ((order - 32).to(torch.float64) / 8).reshape(2, TOKENS, EXPERTS)
ids = torch.tensor([3, 1, 4, 1, 5, 9], dtype=torch.int64)
bias = torch.tensor([0.5, -0.25, 0.0, 0.125, 1.0], dtype=torch.float64)
metadata = {"experts": str(EXPERTS), "top_k": str(TOP_K)}


def trace(name, dtype, tokens=ids, metadata=metadata, **more):
    layers = {f"layer.{layer}": logits[layer].to(dtype).contiguous() for layer in range(2)}
    save_file({**layers, "tokens": tokens, **more}, HERE / f"{name}.safetensors", metadata=metadata)


for name, dtype in [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16), ("f64", torch.float64)]:
    trace(name, dtype)
trace("u32_ids", torch.float32, ids.to(torch.uint32))
trace("i32_ids", torch.float32, ids.to(torch.int32))
trace("negative_id", torch.float32, ids - 4)
trace("large_id", torch.float32, ids + 2**32)
trace("float_ids", torch.float32, ids.to(torch.float32))
trace("ids_of_another_text", torch.float32, ids[:4].contiguous())
sigmoid = {**metadata, "score": "sigmoid"}
trace("bias_f64", torch.float32, metadata=sigmoid, **{"layer.1.bias": bias})
trace("bias_alone", torch.float32, metadata=sigmoid, **{"layer.2.bias": bias})
trace("bias_nan", torch.float32, metadata=sigmoid, **{"layer.1.bias": bias.to(torch.float32) * float("nan")})
trace("twice", torch.float32, **{"layer.01": logits[1].to(torch.float32)})
trace("integers", torch.int32)
trace("not_a_number", torch.float16, **{"layer.2": torch.full((TOKENS, EXPERTS), float("nan"), dtype=torch.float16)})
trace("beyond_f32", torch.float64, **{"layer.2": torch.full((TOKENS, EXPERTS), -1e300, dtype=torch.float64)})
trace("other_tokens", torch.float32, **{"layer.2": torch.zeros(TOKENS - 1, EXPERTS)})
save_file({"layer.0": torch.zeros(0, EXPERTS)}, HERE / "no_tokens.safetensors", metadata=metadata)
routes = {"layer.0.experts": torch.zeros(TOKENS, TOP_K, dtype=torch.int32), "layer.0.weights": torch.zeros(TOKENS, TOP_K)}
save_file(routes, HERE / "routes.safetensors")
save_file({"logits": torch.zeros(2, 8)}, HERE / "logits.safetensors")

goldens = {}
for layer in range(2):
    weights = torch.softmax(logits[layer].to(torch.float32), -1).topk(TOP_K).values
    goldens[f"layer.{layer}.weights"] = weights
scores = torch.sigmoid(logits[1].to(torch.float32))
chosen = (scores + bias.to(torch.float32)).topk(TOP_K).indices
goldens["bias.layer.1.weights"] = scores.gather(1, chosen)
save_file(goldens, HERE / "goldens.safetensors")
for path in HERE.glob("*.safetensors"):
    path.chmod(0o644)
