"""What llama.cpp computes with the bundled weights: logits and perplexity of 512 tokens of the bundled evaluation text.

Run by hand; the result is committed and the tests need no Python. The bindings build llama.cpp from the sources that they come with.

    python -m venv venv
    venv/bin/pip install numpy==2.4.6 gguf==0.19.0 safetensors==0.8.0 tokenizers==0.23.2
    venv/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    venv/bin/python make_llama_cpp_goldens.py ../../models/tiny-moe llama_cpp.safetensors

The weights are bf16; the GGUF file that llama.cpp reads has them in f32, which is exact, and keys and values are kept in f32 too.
The text is the first 512 tokens of `eval/scripture.txt`, in one piece. Stored: `ids` i32 [512], `nll` f32 [511] of each next token,
`positions` i32 and the logits there, f32 [positions, vocabulary]; the perplexity as metadata.
"""

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from gguf.constants import MODEL_ARCH
from safetensors import deserialize
from safetensors.numpy import save_file

import llama_cpp
from llama_cpp_logits import logits

TOKENS = 512
POSITIONS = [0, 1, *range(15, TOKENS, 16)]


def tensors(model: Path) -> dict[str, np.ndarray]:
    """The model's tensors in f32, experts of a layer stacked."""
    found, stacks = {}, {}
    for name, entry in deserialize((model / "model.safetensors").read_bytes()):
        # numpy has no bf16: its bits are the upper half of an f32's.
        assert entry["dtype"] == "BF16", name
        tensor = (np.frombuffer(entry["data"], dtype="<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])
        if ".experts." in name:
            layer, expert, part = name.split(".")[2], name.split(".")[-3], name.split(".")[-2]
            stacks.setdefault(f"model.layers.{layer}.mlp.experts.{part}.weight", {})[int(expert)] = tensor
        else:
            found[name] = tensor
    return found | {name: np.stack([stack[id] for id in range(len(stack))]) for name, stack in stacks.items()}


def write(model: Path, path: Path) -> None:
    """A GGUF file of the model, without a tokenizer."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(MODEL_ARCH.OLMOE, config["num_hidden_layers"])
    stored = tensors(model)
    if "lm_head.weight" not in stored:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]  # Tied; llama.cpp's olmoe wants both.
    for name, tensor in stored.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the bundled checkpoint's directory")
    parser.add_argument("out", type=Path, help="where the goldens go")
    parser.add_argument("--gguf", type=Path, help="keep the GGUF file here")
    arguments = parser.parse_args()
    tokenizer = tokenizers.Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    text = (arguments.model / "eval/scripture.txt").read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:TOKENS]
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.gguf or Path(temporary) / "tiny-moe.gguf"
        write(arguments.model, path)
        (found,) = logits(path, [ids])
    wide = found.astype(np.float64)
    most = wide.max(axis=-1, keepdims=True)
    log_sum = (most + np.log(np.exp(wide - most).sum(axis=-1, keepdims=True)))[:-1, 0]
    nll = log_sum - wide[np.arange(TOKENS - 1), ids[1:]]
    perplexity = float(np.exp(nll.mean()))
    stored = {
        "ids": np.array(ids, dtype=np.int32),
        "nll": nll.astype(np.float32),
        "positions": np.array(POSITIONS, dtype=np.int32),
        "logits": np.ascontiguousarray(found[POSITIONS]),
    }
    made_from = {"llama-cpp-python": llama_cpp.__version__, "gguf": "0.19.0", "tokenizers": tokenizers.__version__}
    save_file(stored, arguments.out, {"perplexity": repr(perplexity), "made_from": json.dumps(made_from)})
    print(f"perplexity {perplexity:.4f}, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
