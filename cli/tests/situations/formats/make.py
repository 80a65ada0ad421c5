"""Tiny checkpoints whose gate and up projections are of different dtypes, and what transformers computes with their numbers.

    pip install torch==2.15.0 transformers==5.23 safetensors==0.8.0 numpy==2.4.6 gguf==0.19.0
    python cli/tests/situations/formats/make.py

Written beside this file: `floats/` (Hugging Face layout: bf16 gates, f32 ups, f16 downs, and the other way round in layer 1),
`blocks.gguf` (q8_0 gates, f32 ups, f16 downs, and others in layer 1), and `goldens.safetensors` with the logits `floats` and `blocks`,
both in float32 from the widened numbers, for ids 3,60,5,17,5.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
IDS = [3, 60, 5, 17, 5]
HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 32, 32, 3, 2, 61


def config():
    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )


def tensors(seed):
    """By the names of the files, all float32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5
    found = {"model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN), "lm_head.weight": drawn(VOCABULARY, HIDDEN)}
    found["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for norm, size in [("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)]:
            found[f"{block}.{norm}.weight"] = torch.ones(size)
        for name, rows in [("q", 32), ("k", 16), ("v", 16)]:
            found[f"{block}.self_attn.{name}_proj.weight"] = drawn(rows, HIDDEN)
        found[f"{block}.self_attn.o_proj.weight"] = drawn(HIDDEN, 32)
        for name in "qk":
            found[f"{block}.self_attn.{name}_norm.weight"] = torch.ones(16)
        found[f"{block}.mlp.gate.weight"] = drawn(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part, shape in [("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))]:
                found[f"{block}.mlp.experts.{expert}.{part}_proj.weight"] = drawn(*shape)
    return found


def logits(found):
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    state = dict(model.state_dict())
    for name, tensor in found.items():
        if ".experts." not in name:
            state[name] = tensor.float()
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.mlp.experts"
        part = lambda expert, name: found[f"{experts}.{expert}.{name}_proj.weight"].float()
        both = [torch.cat([part(expert, "gate"), part(expert, "up")]) for expert in range(EXPERTS)]
        state[f"{experts}.gate_up_proj"] = torch.stack(both)
        state[f"{experts}.down_proj"] = torch.stack([part(expert, "down") for expert in range(EXPERTS)])
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].contiguous()


def floats():
    kinds = [
        dict(gate=torch.bfloat16, up=torch.float32, down=torch.float16),
        dict(gate=torch.float32, up=torch.float16, down=torch.bfloat16),
    ]
    found = tensors(1)
    for name in found:
        if ".experts." in name:
            part = name.split(".")[-2].removesuffix("_proj")
            found[name] = found[name].to(kinds[int(name.split(".")[2])][part])
    directory = HERE / "floats"
    directory.mkdir(exist_ok=True)
    save_file(found, directory / "model.safetensors")
    written = dict(
        model_type="qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=WIDTH,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=False,
        hidden_act="silu",
    )
    (directory / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    return logits(found)


def blocks():
    types = gguf.GGMLQuantizationType
    kinds = [
        dict(gate=types.Q8_0, up=types.F32, down=types.F16),
        dict(gate=types.BF16, up=types.Q8_0, down=types.Q8_0),
    ]
    found = tensors(2)
    writer = gguf.GGUFWriter(HERE / "blocks.gguf", "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    for layer in range(LAYERS):
        for ours, theirs in [
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("mlp.gate", "ffn_gate_inp"),
        ]:
            names[f"model.layers.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    for ours, theirs in names.items():
        writer.add_tensor(f"{theirs}.weight", found[f"{ours}.weight"].numpy())
    for layer in range(LAYERS):
        for part in ["gate", "up", "down"]:
            ours = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(EXPERTS)]
            kind = kinds[layer][part]
            stored = gguf.quants.quantize(np.stack([found[name].numpy() for name in ours]), kind)
            numbers = gguf.quants.dequantize(stored, kind)
            for name, matrix in zip(ours, numbers):
                found[name] = torch.tensor(np.array(matrix, dtype=np.float32))
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return logits(found)


save_file({"floats": floats(), "blocks": blocks()}, HERE / "goldens.safetensors")
