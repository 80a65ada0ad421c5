"""Goldens of the model families: a tiny random checkpoint of each, and what Hugging Face transformers computes with it.

Run by hand; the results are committed and the tests need no Python.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6 accelerate==1.15.0
    venv/bin/python make_zoo_goldens.py zoo                 # every family below that zoo/ does not hold yet
    venv/bin/python make_zoo_goldens.py zoo mixtral         # this one

Written for each to zoo/FAMILY: config.json and model.safetensors as transformers saves them, and goldens.safetensors, with
T_p tokens in prompt p, hidden size H, vocabulary V, E experts, all in float32:

    prompt.{p}.ids            i32 [T_p]
    prompt.{p}.logits         f32 [T_p, V]
    block.layer               i32 [1]      the last layer that has experts
    block.input               f32 [T_0, H] what its MoE block got in prompt 0
    block.output              f32 [T_0, H] what it gave
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# Odd lengths; the ends of the vocabulary, and repeats, which differ by position alone.
PROMPTS = [[0, 60, 5, 17, 5, 5, 42], [31, 3, 60, 17, 29, 44, 1, 2, 50, 2, 2, 33, 12]]

# A key of COMMON that a family does not have.
ABSENT = object()

COMMON = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=0,
)

# Layers without experts come first, in between and by `decoder_sparse_step`; head widths that are not hidden / heads.
FAMILIES = {
    "mixtral": dict(intermediate_size=20, num_local_experts=6, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": dict(
        num_hidden_layers=4,
        head_dim=6,
        intermediate_size=28,
        moe_intermediate_size=12,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[3],
        decoder_sparse_step=2,
    ),
    "qwen2_moe": dict(
        num_hidden_layers=3,
        intermediate_size=20,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=18,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        decoder_sparse_step=1,
        tie_word_embeddings=True,
    ),
    "deepseek_v2": dict(
        num_key_value_heads=4,
        intermediate_size=20,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        # Of four rotations one stays as it is, two are slowed down in part, one by the whole factor.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 20.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
            "beta_fast": 4,
            "beta_slow": 0.5,
        },
        v_head_dim=6,
    ),
    "deepseek_v3": dict(
        num_key_value_heads=4,
        intermediate_size=20,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    "glm4_moe": dict(
        head_dim=8,
        intermediate_size=20,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.8,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
    ),
    "glm4_moe_lite": dict(
        num_hidden_layers=3,
        num_key_value_heads=4,
        intermediate_size=20,
        moe_intermediate_size=12,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.8,
        norm_topk_prob=True,
        mlp_layer_types=["dense", "sparse", "sparse"],
        kv_lora_rank=14,
        q_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "minimax_m2": dict(
        # Heads together are wider than the hidden state; three of their five rotations are made.
        head_dim=10,
        intermediate_size=12,
        num_local_experts=6,
        num_experts_per_tok=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.6},
    ),
    "granitemoe": dict(
        intermediate_size=12,
        num_local_experts=6,
        num_experts_per_tok=3,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "lfm2_moe": dict(
        num_hidden_layers=5,
        layer_types=["conv", "full_attention", "conv", "conv", "full_attention"],
        hidden_size=24,
        intermediate_size=20,
        moe_intermediate_size=8,
        num_dense_layers=1,
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        use_expert_bias=True,
        rms_norm_eps=ABSENT,
        norm_eps=2e-4,
        tie_word_embeddings=True,
    ),
    # What the published models leave as it is: another width of the convolution, its biases, weights as they come, times a constant, a head of
    # its own.
    "lfm2_moe_bias": dict(
        num_hidden_layers=3,
        layer_types=["full_attention", "conv", "conv"],
        hidden_size=24,
        intermediate_size=20,
        moe_intermediate_size=8,
        num_dense_layers=2,
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        use_expert_bias=False,
        routed_scaling_factor=1.5,
        conv_L_cache=4,
        conv_bias=True,
        rms_norm_eps=ABSENT,
        norm_eps=2e-4,
    ),
    # Value heads go by threes to a key head; as published, the configuration says how often attention comes, not where.
    "qwen3_next": dict(
        num_hidden_layers=5,
        hidden_size=20,
        rms_norm_eps=1e-6,
        head_dim=10,
        intermediate_size=18,
        moe_intermediate_size=6,
        shared_expert_intermediate_size=7,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=6,
        linear_value_head_dim=6,
        # Three of five rotations are made.
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.6},
    ),
    # What GGUF files cannot say: keys and values of two widths, a dense block, an epsilon that is not that of keys; attention wherever the list
    # says.
    "qwen3_next_uneven": dict(
        num_hidden_layers=4,
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        hidden_size=20,
        rms_norm_eps=2e-4,
        head_dim=10,
        intermediate_size=18,
        moe_intermediate_size=6,
        shared_expert_intermediate_size=7,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=4,
        linear_value_head_dim=7,
        linear_conv_kernel_dim=3,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.4},
    ),
    # The text model of a multimodal one; `vision_config` is the other part, what is not here the whole has.
    "qwen3_5_moe": dict(
        num_hidden_layers=4,
        hidden_size=20,
        rms_norm_eps=1e-6,
        head_dim=10,
        moe_intermediate_size=6,
        shared_expert_intermediate_size=7,
        num_experts=5,
        num_experts_per_tok=2,
        full_attention_interval=3,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=6,
        linear_value_head_dim=6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.6,
            "mrope_section": [1, 1, 1],
            "mrope_interleaved": True,
        },
        vision_config=dict(
            depth=1,
            hidden_size=4,
            intermediate_size=4,
            num_heads=1,
            patch_size=2,
            temporal_patch_size=1,
            spatial_merge_size=1,
            out_hidden_size=20,
            num_position_embeddings=4,
        ),
    ),
    "gpt_oss": dict(
        num_hidden_layers=3,
        # Heads together are wider than the hidden state; of their five rotations one stays as it is, two are slowed down in part.
        head_dim=10,
        intermediate_size=12,
        num_local_experts=6,
        num_experts_per_tok=2,
        # Shorter than both prompts; layers with a window and without take turns.
        sliding_window=5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 20.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 3,
            "beta_slow": 0.75,
            "truncate": False,
        },
    ),
    "phimoe": dict(
        intermediate_size=12,
        num_local_experts=6,
        num_experts_per_tok=2,
        # Far from the published 0.01, so that some experts are near a pick.
        router_jitter_noise=0.2,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=None,
    ),
    # gpt-oss with weights of experts in MXFP4, which takes 32 columns to a block.
    "gpt_oss_mxfp4": dict(
        hidden_size=96,
        head_dim=6,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    ),
}

# What transformers calls a family, where its directory is called otherwise.
MODEL_TYPES = {"gpt_oss_mxfp4": "gpt_oss", "lfm2_moe_bias": "lfm2_moe", "qwen3_next_uneven": "qwen3_next"}

# Keys of the published configurations that transformers does not write, and those that it writes in their place.
PUBLISHED = {
    "qwen3_next": (
        {"full_attention_interval": 2, "rope_theta": 5000.0, "partial_rotary_factor": 0.6, "rope_scaling": None},
        ["layer_types", "rope_parameters"],
    ),
    "qwen3_5_moe": (
        {
            "text_config": {
                "attn_output_gate": True,
                "full_attention_interval": 3,
                "mamba_ssm_dtype": "float32",
                "mlp_only_layers": [],
                "mtp_num_hidden_layers": 1,
                "mtp_use_dedicated_embeddings": False,
            },
            "vision_config": {"deepstack_visual_indexes": []},
        },
        [],
    ),
}

# Families whose norms, but for the gated ones, add 1 to their weights.
ZERO_CENTRED = ("qwen3_next", "qwen3_next_uneven", "qwen3_5_moe")

ROUTERS = ("mlp.gate.weight", "router.layer.weight", "mlp.router.weight", "feed_forward.gate.weight")


def auto_class(family: str):
    """What loads a family: some are published as a part of a larger model only."""
    return AutoModelForImageTextToText if "vision_config" in FAMILIES[family] else AutoModelForCausalLM


def random_model(family: str, seed: int):
    """A model in which every stage matters. The usual initialisation (std 0.02, norms of 1) hides most mistakes."""
    sizes = {key: value for key, value in {**COMMON, **FAMILIES[family]}.items() if value is not ABSENT}
    sizes.pop("quantization_config", None)
    if "vision_config" in sizes:
        parts = {"vision_config": sizes.pop("vision_config"), "text_config": sizes}
        config = AutoConfig.for_model(family, **parts, tie_word_embeddings=sizes["tie_word_embeddings"])
    else:
        config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **sizes)
    model = auto_class(family).from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    with torch.no_grad():
        # Buffers too: the biases for selection are such.
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                zero_centred = family in ZERO_CENTRED and not name.endswith("linear_attn.norm.weight")
                noise = (0 if zero_centred else 1) + 0.25 * noise
            elif name.endswith("A_log"):
                # States that forget nearly all at each position, and nearly nothing.
                noise = 1.2 * noise - 0.8
            elif name.endswith("dt_bias"):
                pass
            elif "embed_tokens" in name:
                noise *= 0.3
            elif name.endswith("bias"):
                noise *= 0.25
            else:
                # Router logits of std 2: a clear choice, and probabilities that renormalising changes.
                noise *= (2 if name.endswith(ROUTERS) else 1) / math.sqrt(tensor.shape[-1])
            tensor.copy_(noise)
    return model


def pack_experts(family: str, directory: Path, seed: int) -> None:
    """Puts random blocks and scales of MXFP4 in place of the experts' weights of a saved model."""
    file, generator = directory / "model.safetensors", torch.Generator().manual_seed(seed)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        size = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*size, 16), generator=generator, dtype=torch.uint8)
        # The root of a weight's mean square is 2.9 times its scale.
        scale = round(math.log2(1 / (2.9 * math.sqrt(columns))))
        tensors[f"{name}_scales"] = torch.randint(126 + scale, 129 + scale, size, generator=generator).to(torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    config["quantization_config"] = FAMILIES[family]["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def as_published(family: str, directory: Path, seed: int) -> None:
    """Gives a saved model the keys and tensors of the published ones that transformers does not write: experts in two tensors, a head
    for the token after the next."""
    keys, instead = PUBLISHED[family]
    config = json.loads((directory / "config.json").read_text())
    for key, value in keys.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    for key in instead:
        del config[key]
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if family == "qwen3_5_moe":
        add_unread(directory / "model.safetensors", config["text_config"], seed)


def add_unread(file: Path, config: dict, seed: int) -> None:
    """Stacks the experts, and adds the head that guesses the token after the next, a block of attention for which no decoder asks."""
    tensors, generator = load_file(file), torch.Generator().manual_seed(seed)
    for layer in range(config["num_hidden_layers"]):
        experts = f"model.language_model.layers.{layer}.mlp.experts"

        def stacked(projection: str) -> torch.Tensor:
            return torch.stack([tensors.pop(f"{experts}.{i}.{projection}.weight") for i in range(config["num_experts"])])

        tensors[f"{experts}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
        tensors[f"{experts}.down_proj"] = stacked("down_proj")
    attention = f"model.language_model.layers.{config['layer_types'].index('full_attention')}."
    sizes = {name.replace(attention, "mtp.layers.0."): tensors[name].shape for name in tensors if name.startswith(attention)}
    hidden = config["hidden_size"]
    sizes["mtp.fc.weight"] = (hidden, 2 * hidden)
    sizes |= {f"mtp.{norm}.weight": (hidden,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    tensors |= {name: 0.2 * torch.randn(sizes[name], generator=generator) for name in sorted(sizes)}
    save_file(tensors, file, {"format": "pt"})


def goldens(family: str, directory: Path) -> tuple[dict, dict]:
    """One forward pass per prompt; returns the tensors and what they were made from."""
    model, loading = auto_class(family).from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    # A key that does not match is otherwise a warning and a random weight.
    assert not any(loading.values()), loading
    model.eval()
    blocks = {
        index: block
        for index, layer in enumerate(getattr(model.model, "language_model", model.model).layers)
        for name, block in layer.named_children()
        if name in ("mlp", "block_sparse_moe", "feed_forward") and len(list(block.children())) > 1
        and (hasattr(block, "experts") or hasattr(block, "input_linear"))
    }
    last = max(blocks)
    seen = {"block.layer": torch.tensor([last], dtype=torch.int32)}

    def hook(_module, inputs, output):
        if "block.input" not in seen:
            output = output[0] if isinstance(output, tuple) else output
            seen["block.input"] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone()
            seen["block.output"] = output.detach().reshape(-1, output.shape[-1]).clone()

    blocks[last].register_forward_hook(hook)
    for prompt, ids in enumerate(PROMPTS):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        seen[f"prompt.{prompt}.ids"] = torch.tensor(ids, dtype=torch.int32)
        seen[f"prompt.{prompt}.logits"] = logits.contiguous()
    assert all(tensor.isfinite().all() for tensor in seen.values())
    sha256 = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    return seen, {"transformers": transformers.__version__, "torch": torch.__version__, "sha256": sha256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo", type=Path, help="directory with one directory per family")
    parser.add_argument("families", nargs="*", help="default: all that zoo/ does not hold")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families = arguments.families or [name for name in FAMILIES if not (arguments.zoo / name).exists()]
    for family in families:
        directory = arguments.zoo / family
        random_model(family, seed=1).save_pretrained(directory)
        if "quantization_config" in FAMILIES[family]:
            pack_experts(family, directory, seed=2)
        (directory / "generation_config.json").unlink(missing_ok=True)
        if family in PUBLISHED:
            as_published(family, directory, seed=2)
        tensors, made_from = goldens(family, directory)
        # One key: safetensors writes several in an order that changes from run to run.
        save_file(tensors, directory / "goldens.safetensors", {"made_from": json.dumps(made_from)})
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{family}: {size} bytes, {json.dumps(made_from)}")


if __name__ == "__main__":
    main()
