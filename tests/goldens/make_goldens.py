"""Goldens of an OLMoE checkpoint: what Hugging Face transformers computes, stage by stage, in float32.

The Rust decoder is compared with this file tensor by tensor, so a mistake is found at the stage that makes it.
Run by hand; the results are committed and the tests need no Python.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    venv/bin/python make_goldens.py CHECKPOINT_DIR OUT.safetensors --ids 1,2,3      # or --ids @ids.txt
    venv/bin/python make_goldens.py --random DIR --set norm_topk_prob=true          # writes DIR, then its goldens

The two committed random fixtures:

    make_goldens.py --random olmoe_random
    make_goldens.py --random olmoe_random_norm --seed 2 --set norm_topk_prob=true tie_word_embeddings=true \\
        clip_qkv=1.25 num_key_value_heads=6 num_experts=6 num_experts_per_tok=3 rms_norm_eps=1e-3 \\
        'rope_parameters={"rope_type":"default","rope_theta":500.0}'

The bundled model's goldens:

    make_goldens.py ../../models/tiny-moe tiny_moe.safetensors --logit-every 8 --ids 370,397,758,309,891,12,339,199,631,28,52,30,348,363,\\
867,333,431,777,292,314,300,260,1320,312,271,1895,1080

Written, with T tokens at positions 0, 1, ..., hidden size H, E experts, k per token, vocabulary V:

    ids                       i32 [T]
    embeddings                f32 [T, H]  before the first layer
    layer.{i}.attention       f32 [T, H]  after the attention residual
    layer.{i}.router_logits   f32 [T, E]
    layer.{i}.top_k           i32 [T, k]  experts, best first
    layer.{i}.top_k_weights   f32 [T, k]  their combine weights, renormalised if norm_topk_prob
    layer.{i}.hidden          f32 [T, H]  after the MoE residual: the layer's output
    final_norm                f32 [T, H]
    logit_positions           i32 [P]     every --logit-every-th position and the last
    logits                    f32 [P, V]  at these positions

Metadata `made_from`, a JSON object: versions, `sha256` of each weight file, and `router_margin`: the smallest gap
between the probability of the last expert chosen and the best one left out. A test may ask for equal `top_k` where its
own error is well below it.
"""

import argparse
import hashlib
import json
import math
import re
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

# Ends of the vocabulary, and repeats: the same id at two positions differs only by rotary embedding and causal mask.
RANDOM_IDS = "0,96,5,17,5,5,42,88,3,61,17,29,74,1,2,50,90,5,33,12,66,81,96,0"

# Widths that are no multiple of 8, three query heads per key head.
RANDOM_CONFIG = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    norm_topk_prob=False,
    tie_word_embeddings=False,
    clip_qkv=None,
    pad_token_id=None,
    eos_token_id=0,
)


def write_random_checkpoint(directory: Path, overrides: dict, seed: int) -> None:
    """A model in which every stage matters. The usual initialisation (std 0.02, norms of 1) hides most mistakes."""
    model = OlmoeForCausalLM(OlmoeConfig(**{**RANDOM_CONFIG, **overrides})).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.25 * noise
            elif "embed_tokens" in name:
                noise *= 0.1  # small enough for the norm's epsilon to show
            else:
                # Router logits of std 2: a clear choice, and probabilities that renormalising changes.
                noise *= (2 if "mlp.gate." in name else 1) / math.sqrt(parameter.shape[-1])
            parameter.copy_(noise)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    with safe_open(directory / "model.safetensors", "pt") as file:
        # transformers 5 keeps experts stacked in memory; on disk they must have the names of published checkpoints.
        experts = [name for name in file.keys() if ".experts." in name]
    config = model.config
    assert len(experts) == 3 * config.num_hidden_layers * config.num_experts, experts
    assert all(re.search(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$", name) for name in experts), experts


def goldens(directory: Path, ids: list[int], logit_every: int) -> tuple[dict, dict]:
    """One forward pass; returns the tensors and what they were made from."""
    model, loading = OlmoeForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    # A key that does not match is otherwise a warning and a random weight.
    assert not any(loading.values()), loading
    assert max(ids) < model.config.vocab_size, f"id {max(ids)} is not below vocab_size {model.config.vocab_size}"
    model.eval()

    seen = {"ids": torch.tensor(ids, dtype=torch.int32)}

    def keep(name, tensor):
        # Off batch 1 (the router has none); a copy, since transformers is free to go on in place.
        seen[name] = tensor.detach().reshape(len(ids), -1).clone().contiguous()

    def keep_output(module, name):
        module.register_forward_hook(lambda _module, _inputs, output: keep(name, output))

    def keep_router(module, name):
        def hook(_module, _inputs, output):
            logits, weights, experts = output
            keep(f"{name}.router_logits", logits)
            keep(f"{name}.top_k", experts.to(torch.int32))
            keep(f"{name}.top_k_weights", weights)

        module.register_forward_hook(hook)

    def keep_input(module, name):
        module.register_forward_pre_hook(lambda _module, inputs: keep(name, inputs[0]))

    keep_output(model.model.embed_tokens, "embeddings")
    for i, layer in enumerate(model.model.layers):
        keep_input(layer.post_attention_layernorm, f"layer.{i}.attention")
        keep_router(layer.mlp.gate, f"layer.{i}")
        keep_output(layer, f"layer.{i}.hidden")
    keep_output(model.model.norm, "final_norm")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]

    positions = sorted({*range(0, len(ids), logit_every), len(ids) - 1})
    seen["logit_positions"] = torch.tensor(positions, dtype=torch.int32)
    seen["logits"] = logits[positions].contiguous()
    assert all(tensor.isfinite().all() for tensor in seen.values())

    top_k = model.config.num_experts_per_tok
    margins = [
        (ranked[:, top_k - 1] - ranked[:, top_k]).min().item()
        for name, tensor in seen.items()
        if name.endswith("router_logits")
        and (ranked := tensor.softmax(-1).sort(descending=True).values).shape[1] > top_k
    ]
    made_from = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "sha256": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(directory.glob("model*.safetensors"))
        },
        "router_margin": float(f"{min(margins, default=1.0):.3e}"),
    }
    return seen, made_from


def token_ids(argument: str) -> list[int]:
    text = Path(argument[1:]).read_text() if argument.startswith("@") else argument
    return [int(word) for word in re.split(r"[\s,]+", text.strip())]


def override(argument: str) -> tuple[str, object]:
    key, value = argument.split("=", 1)
    return key, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and *.safetensors")
    parser.add_argument("out", type=Path, nargs="?", help="default: CHECKPOINT/goldens.safetensors")
    parser.add_argument("--ids", type=token_ids, help="1,2,3 or @FILE; some 32 keep the file small")
    parser.add_argument("--logit-every", type=int, default=1, metavar="N", help="keep every Nth position's logits")
    parser.add_argument("--random", action="store_true", help="first write a random checkpoint to CHECKPOINT")
    parser.add_argument("--set", type=override, nargs="+", default=[], metavar="KEY=JSON", help="config of --random")
    parser.add_argument("--seed", type=int, default=1, help="weights of --random")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    if arguments.random:
        if (arguments.checkpoint / "config.json").exists():
            parser.error(f"{arguments.checkpoint} holds a checkpoint; remove it to make another")
        write_random_checkpoint(arguments.checkpoint, dict(arguments.set), arguments.seed)
    elif arguments.ids is None:
        parser.error("--ids is required unless --random is given")
    tensors, made_from = goldens(arguments.checkpoint, arguments.ids or token_ids(RANDOM_IDS), arguments.logit_every)

    out = arguments.out or arguments.checkpoint / "goldens.safetensors"
    # One key: safetensors writes several in an order that changes from run to run.
    save_file(tensors, out, {"made_from": json.dumps(made_from)})
    print(f"{out}: {out.stat().st_size} bytes, {json.dumps(made_from)}")


if __name__ == "__main__":
    main()
