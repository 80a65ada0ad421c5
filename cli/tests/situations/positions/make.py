"""Logits of the tiny checkpoints of tests/goldens/zoo under other positions, by transformers.

Run by hand; the result is committed and the tests need no Python.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    venv/bin/python make.py ../../goldens/zoo goldens.safetensors

Each golden is `[positions, vocab]` of the ids 1, 8, 15, ... (modulo the vocabulary). What a GGUF file means is said in
config.json's words: `rope.freq_base` absent is a theta of 10000, `rope.scaling.factor` alone is `linear`, YaRN without original
length has the context length, which is also what transformers takes. CASES says what is changed; None takes a key away.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

POSITIONS = 24
HALF = [1.0, 1.25, 1.5, 2.0]
LONG = [2.0, 3.0, 4.0, 5.0]

CASES = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_theta_700": ("qwen3_moe", {"rope_parameters": None, "rope_theta": 700.0}),
    "qwen3_moe_linear": ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    # `rope_scaling` stands for `rope_parameters` as a whole: theta is the family's.
    "qwen3_moe_linear_10000": ("qwen3_moe", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "qwen3_moe_yarn_context": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 20.0}},
    ),
    "qwen3_moe_yarn_ratio": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "yarn", "factor": "null", "original_max_position_embeddings": 16, "rope_theta": 20.0}},
    ),
    "qwen3_moe_yarn_beside": (
        "qwen3_moe",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 20.0},
            "original_max_position_embeddings": 40,
        },
    ),
    "qwen3_moe_llama3": (
        "qwen3_moe",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "rope_theta": 20.0,
            }
        },
    ),
    "mixtral_theta_10000": ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "mixtral_linear_10000": ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "mixtral_longrope": (
        "mixtral",
        {
            # transformers' check of the factors does not take null for it.
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": HALF, "long_factor": LONG,
                "rope_theta": 5000.0,
            }
        },
    ),
    "phimoe_longrope": (
        "phimoe",
        {
            "rope_parameters": None,
            "rope_theta": 5000.0,
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "longrope", "original_max_position_embeddings": 32, "short_factor": HALF, "long_factor": LONG,
                "short_mscale": 1.25, "long_mscale": 1.5,
            },
        },
    ),
    "glm4_moe_linear_whole": (
        "glm4_moe",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, "partial_rotary_factor": 1.0},
    ),
    "glm4_moe_whole": (
        "glm4_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
    ),
    "deepseek_v3_linear": (
        "deepseek_v3",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    ),
    "deepseek_v3_scale_absent": ("deepseek_v3", {"routed_scaling_factor": None, "n_shared_experts": None}),
    # To Python null is false.
    "deepseek_v3_null": ("deepseek_v3", {"norm_topk_prob": "null", "rope_interleave": "null"}),
    "gpt_oss_linear": ("gpt_oss", {"rope_parameters": None, "rope_theta": 20.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "gpt_oss_plain": ("gpt_oss", {"rope_parameters": "{}"}),
    "gpt_oss_usual": ("gpt_oss", {"rope_parameters": None, "rope_theta": 20.0}),
    "mixtral_window": ("mixtral", {"sliding_window": 5}),
    "phimoe_window": ("phimoe", {"sliding_window": 3}),
    "qwen3_moe_window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    "qwen2_moe_window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}),
    "minimax_m2_rotary_dim": ("minimax_m2", {"rope_parameters": None, "rope_theta": 700.0, "rotary_dim": 4}),
    "glm4_moe_lite_yarn": (
        "glm4_moe_lite",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 20.0,
                "mscale": 0.8, "mscale_all_dim": 0.5,
            }
        },
    ),
    "granitemoe_linear": ("granitemoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
}


def changed(config: dict, patch: dict) -> dict:
    for key, value in patch.items():
        if value is None:
            config.pop(key, None)
        elif value in ("{}", "null"):
            config[key] = json.loads(value)
        else:
            config[key] = {k: None if v == "null" else v for k, v in value.items()} if isinstance(value, dict) else value
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("zoo", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    goldens = {}
    for name, (family, patch) in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            config = changed(json.loads((args.zoo / family / "config.json").read_text()), patch)
            (path / "config.json").write_text(json.dumps(config))
            shutil.copy(args.zoo / family / "model.safetensors", path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
            ids = torch.tensor([[(1 + 7 * at) % config["vocab_size"] for at in range(POSITIONS)]])
            with torch.no_grad():
                goldens[name] = model(ids).logits[0].contiguous()
        print(name, goldens[name][-1, :3].tolist())
    save_file(goldens, args.out)


if __name__ == "__main__":
    main()
