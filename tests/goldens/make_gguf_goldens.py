"""GGUF files of tiny random checkpoints, with llama.cpp's names, keys and permutations, and what transformers computes with them.

Run by hand; the results are committed and the tests need no Python.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6 gguf==0.19.0 sentencepiece==0.2.3
    venv/bin/python make_gguf_goldens.py zoo gguf

Of the families in zoo/ the weights and goldens there are taken as they are. gguf/NAME.goldens.safetensors, as in
make_zoo_goldens.py, is written only where zoo/ has no such model: OLMoE, and DeepSeek-V2 whose `mscale` is its `mscale_all_dim`,
since a GGUF file has room for one of them.

What is done to tensors is what llama.cpp's conversion does: experts of a layer stacked, rows of Mixtral's and Granite's queries and
keys reordered for a rotation of neighbours, DeepSeek's keys and values split and keys transposed. In qwen2moe.gguf and
qwen3moe.gguf some blocks have no experts, which llama.cpp does not run; deepseek2_old.gguf has keys and values joined, as files
from before they were split. mxfp4.gguf has its experts in MXFP4, and the goldens are of the numbers that these stand for.

sentencepiece.gguf has a tokenizer alone, trained on the bundled texts as Llama's was, and sentencepiece.json, for some texts, the
ids that the sentencepiece package gives.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import gguf
import make_zoo_goldens as zoo_goldens
import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

OLMOE = dict(intermediate_size=20, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False, clip_qkv=1.5)


def in_turns(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head's two halves in turns: rotating halves becomes rotating neighbours."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, directory: Path, arch: str, joined: bool = False, experts: gguf.GGMLQuantizationType = None) -> None:
    """A GGUF file of the checkpoint in `directory`, its experts in the type `experts`."""
    config = json.loads((directory / "config.json").read_text())
    tensors = {name: tensor.numpy() for name, tensor in load_file(directory / "model.safetensors").items()}
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    latent = "kv_lora_rank" in config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1 if latent and not joined else config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(
        next(config[key] for key in ("n_routed_experts", "num_local_experts", "num_experts") if key in config)
    )
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_eos_token_id(config["eos_token_id"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config.get("clip_qkv"):
        writer.add_clamp_kqv(config["clip_qkv"])
    if latent:
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        if config["norm_topk_prob"]:
            writer.add_expert_weights_norm(True)
        if config["model_type"] == "deepseek_v3":
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        if config["q_lora_rank"] is not None:
            writer.add_q_lora_rank(config["q_lora_rank"])
        rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
        writer.add_kv_lora_rank(rank)
        widths = config["qk_nope_head_dim"] + rotated, config["v_head_dim"]
        writer.add_key_length(widths[0] if joined else rank + rotated)
        writer.add_value_length(widths[1] if joined else rank)
        if not joined:
            writer.add_key_length_mla(widths[0])
            writer.add_value_length_mla(widths[1])
        writer.add_rope_dimension_count(rotated)
    elif config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch == "glm4moe":
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    if arch == "granitemoe":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if arch in ("llama", "granitemoe"):
        writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    if rope["rope_type"] == "yarn":
        assert rope["mscale"] == rope["mscale_all_dim"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])

    names = gguf.get_tensor_name_map({name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[arch], layers)
    dense = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    stacks = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            layer, expert, part = name.split(".")[2], name.split(".")[-3], name.split(".")[-2]
            part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(part, part)
            stacks.setdefault(f"model.layers.{layer}.mlp.experts.{part}.weight", {})[int(expert)] = tensor
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    tensors |= {name: np.stack([stack[id] for id in range(len(stack))]) for name, stack in stacks.items()}
    for name in [name for name in tensors if "put_linear" in name]:
        parts, tensor = ["down_proj"], tensors.pop(name)
        if "input_linear" in name:
            parts, tensor = ["gate_proj", "up_proj"], np.split(tensor, 2, axis=1)
        for part, tensor in zip(parts, tensor if len(parts) == 2 else [tensor]):
            tensors[f"model.layers.{name.split('.')[2]}.mlp.experts.{part}.weight"] = tensor
    for name, tensor in tensors.items():
        if arch in ("llama", "granitemoe") and ".q_proj." in name:
            tensor = in_turns(tensor, heads)
        if arch in ("llama", "granitemoe") and ".k_proj." in name:
            tensor = in_turns(tensor, config["num_key_value_heads"])
        if "kv_b_proj" in name and not joined:
            split = tensor.reshape(heads, -1, tensor.shape[-1])
            keys, values = np.split(split, [config["qk_nope_head_dim"]], axis=1)
            for part, half in (("k_b", keys.transpose(0, 2, 1)), ("v_b", values)):
                stored = names.get_name(name.replace("kv_b", part), try_suffixes=(".weight",))
                writer.add_tensor(stored, np.ascontiguousarray(half))
            continue
        # As llama.cpp's conversion renames it, so that it has a suffix.
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        stored = names.get_name(known, try_suffixes=(".weight", ".bias"))
        # Blocks without experts, in architectures whose blocks all have them in llama.cpp.
        stored = stored or dense.get_name(known, try_suffixes=(".weight",))
        assert stored is not None, name
        if experts is not None and ".experts." in name:
            writer.add_tensor(stored, gguf.quants.quantize(tensor, experts), raw_dtype=experts)
            continue
        writer.add_tensor(stored, np.ascontiguousarray(tensor.squeeze()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def own_goldens(directory: Path, path: Path) -> None:
    """What transformers computes with the checkpoint in `directory`."""
    tensors, made_from = zoo_goldens.goldens(directory)
    save_file(tensors, path, {"made_from": json.dumps(made_from)})


TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "  two spaces, then one\n\ttab and a line",
    "fn main() { println!(\"{}\", 1234567890); }",
    "naïve café – “quoted” 漢字 🦀",
    "</s> is no token in text; <0x41> neither ▁",
    " ",
    "",
    "aaaaaaaaaaaaaaaa",
]


def sentence_piece(texts: Path, out: Path) -> None:
    """A tokenizer as Llama's, and what it does."""
    with tempfile.TemporaryDirectory() as temporary:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(path) for path in sorted(texts.iterdir())],
            model_prefix=f"{temporary}/model",
            model_type="bpe",
            vocab_size=600,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{temporary}/model.model")
    kinds = [
        gguf.TokenType.UNKNOWN if model.is_unknown(id) else gguf.TokenType.CONTROL if model.is_control(id)
        else gguf.TokenType.BYTE if model.is_byte(id) else gguf.TokenType.NORMAL
        for id in range(model.vocab_size())
    ]
    writer = gguf.GGUFWriter(out / "sentencepiece.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(id) for id in range(model.vocab_size())])
    writer.add_token_scores([model.get_score(id) for id in range(model.vocab_size())])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    samples = [sample for path in sorted(texts.iterdir()) for sample in path.read_text().split("\n\n")[5:8]]
    ids = [{"text": text, "ids": model.encode(text)} for text in TEXTS + samples]
    (out / "sentencepiece.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo", type=Path, help="directory with one directory per family")
    parser.add_argument("gguf", type=Path, help="where the files go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo, out = arguments.zoo, arguments.gguf
    out.mkdir(exist_ok=True)
    families = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe")
    for arch, family in zip(("llama", "qwen2moe", "qwen3moe", "glm4moe", "granitemoe"), families):
        write(out / f"{arch}.gguf", zoo / family, arch)
    write(out / "deepseek2.gguf", zoo / "deepseek_v3", "deepseek2")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        zoo_goldens.FAMILIES["olmoe"] = OLMOE
        zoo_goldens.random_model("olmoe", seed=1).save_pretrained(directory)
        own_goldens(directory, out / "olmoe.goldens.safetensors")
        write(out / "olmoe.gguf", directory, "olmoe")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        shutil.copytree(zoo / "deepseek_v2", directory, dirs_exist_ok=True)
        config = json.loads((directory / "config.json").read_text())
        config["rope_parameters"]["mscale"] = config["rope_parameters"]["mscale_all_dim"]
        (directory / "config.json").write_text(json.dumps(config))
        own_goldens(directory, out / "deepseek2_old.goldens.safetensors")
        write(out / "deepseek2_old.gguf", directory, "deepseek2", joined=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory, mxfp4 = Path(temporary), gguf.GGMLQuantizationType.MXFP4
        zoo_goldens.FAMILIES["olmoe"] = {**OLMOE, "intermediate_size": 32}
        model = zoo_goldens.random_model("olmoe", seed=2)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if ".experts." in name:
                    stored = gguf.quants.quantize(tensor.numpy(), mxfp4)
                    tensor.copy_(torch.from_numpy(gguf.quants.dequantize(stored, mxfp4)))
        model.save_pretrained(directory)
        own_goldens(directory, out / "mxfp4.goldens.safetensors")
        write(out / "mxfp4.gguf", directory, "olmoe", experts=mxfp4)
    sentence_piece(Path(__file__).parents[2] / "models/tiny-moe/eval", out)
    for path in sorted(out.iterdir()):
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
