"""What llama.cpp computes where a GGUF file says little: the models, and the logits that ../llama_cpp.json names.

Run by hand; the results are committed and the tests need no Python. The bindings build llama.cpp from the sources that they come with.

    python -m venv venv
    venv/bin/pip install numpy==2.4.6 gguf==0.19.0 safetensors==0.8.0
    venv/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    venv/bin/python make.py

Writes one tiny random model for each architecture whose fixture in ../../goldens/gguf llama.cpp does not run (olmoe there has fewer
keys than queries, qwen2moe and qwen3moe blocks without experts, deepseek2 no low rank of queries), and then, for every row of
../llama_cpp.json with a tensor, the logits that llama.cpp gives for the row's file and token ids. llama.cpp reads the file with two
more keys, which say that it has no tokenizer. Not asked: deepseek2 with linear scaling, where llama.cpp multiplies attention scores by
YaRN's factor too, which no file means.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
sys.path.insert(0, str(ROOT / "tests/goldens"))
from llama_cpp_logits import logits  # noqa: E402

HIDDEN, HEADS, BLOCKS, EXPERTS, WIDTH, VOCABULARY, CONTEXT = 16, 2, 2, 4, 8, 61, 64
HEAD = HIDDEN // HEADS
# DeepSeek's: of low-rank queries and of keys and values, of heads without rotation, rotated, and of values.
Q_RANK, RANK, PLAIN, ROTATED, VALUE = 12, 8, 6, 8, 6


def model(arch: str, path: Path) -> None:
    """A random model: weights large enough that positions and experts matter."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)

    def tensor(name: str, *shape: int) -> None:
        scale = 1.5 / np.sqrt(shape[-1])
        values = random.normal(1.0, 0.2, shape) if name.endswith("norm.weight") else random.normal(0.0, scale, shape)
        writer.add_tensor(name, values.astype(np.float32))

    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * WIDTH if arch == "deepseek2" else WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1 if arch == "deepseek2" else HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_eos_token_id(0)
    if arch != "olmoe":
        writer.add_expert_feed_forward_length(WIDTH)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(WIDTH)
    if arch == "deepseek2":
        writer.add_leading_dense_block_count(1)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.5)
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_q_lora_rank(Q_RANK)
        writer.add_kv_lora_rank(RANK)
        writer.add_key_length(RANK + ROTATED)
        writer.add_value_length(RANK)
        writer.add_key_length_mla(PLAIN + ROTATED)
        writer.add_value_length_mla(VALUE)
        writer.add_rope_dimension_count(ROTATED)

    tensor("token_embd.weight", VOCABULARY, HIDDEN)
    for block in (f"blk.{block}." for block in range(BLOCKS)):
        tensor(f"{block}attn_norm.weight", HIDDEN)
        if arch == "deepseek2":
            tensor(f"{block}attn_q_a.weight", Q_RANK, HIDDEN)
            tensor(f"{block}attn_q_a_norm.weight", Q_RANK)
            tensor(f"{block}attn_q_b.weight", HEADS * (PLAIN + ROTATED), Q_RANK)
            tensor(f"{block}attn_kv_a_mqa.weight", RANK + ROTATED, HIDDEN)
            tensor(f"{block}attn_kv_a_norm.weight", RANK)
            tensor(f"{block}attn_k_b.weight", HEADS, RANK, PLAIN)
            tensor(f"{block}attn_v_b.weight", HEADS, VALUE, RANK)
            tensor(f"{block}attn_output.weight", HIDDEN, HEADS * VALUE)
        else:
            for part in ("q", "k", "v"):
                tensor(f"{block}attn_{part}.weight", HIDDEN, HIDDEN)
                if arch == "qwen2moe":
                    tensor(f"{block}attn_{part}.bias", HIDDEN)
            tensor(f"{block}attn_output.weight", HIDDEN, HIDDEN)
            for part in ("q", "k") if arch in ("olmoe", "qwen3moe") else ():
                tensor(f"{block}attn_{part}_norm.weight", HIDDEN if arch == "olmoe" else HEAD)
        tensor(f"{block}ffn_norm.weight", HIDDEN)
        if arch == "deepseek2" and block == "blk.0.":
            for part, shape in (("gate", (2 * WIDTH, HIDDEN)), ("up", (2 * WIDTH, HIDDEN)), ("down", (HIDDEN, 2 * WIDTH))):
                tensor(f"{block}ffn_{part}.weight", *shape)
            continue
        tensor(f"{block}ffn_gate_inp.weight", EXPERTS, HIDDEN)
        if arch == "deepseek2":
            tensor(f"{block}exp_probs_b.bias", EXPERTS)
        if arch == "qwen2moe":
            tensor(f"{block}ffn_gate_inp_shexp.weight", HIDDEN)
        for part, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            tensor(f"{block}ffn_{part}_exps.weight", EXPERTS, *shape)
            if arch in ("qwen2moe", "deepseek2"):
                tensor(f"{block}ffn_{part}_shexp.weight", *shape)
    tensor("output_norm.weight", HIDDEN)
    tensor("output.weight", VOCABULARY, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Names of types in ../llama_cpp.json: GGUF's numbers and how values are packed.
TYPES = {"u8": (0, "<B"), "u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def encoded(value: dict) -> bytes:
    ((kind, value),) = value.items()
    if kind == "string":
        return struct.pack("<I", 8) + text(value)
    number, packed = TYPES[kind]
    return struct.pack("<I", number) + struct.pack(packed, value)


def length(data: bytes, at: int, kind: int) -> int:
    """Bytes of the value of type `kind` at `at`."""
    if kind == 8:
        return 8 + struct.unpack_from("<Q", data, at)[0]
    if kind != 9:
        return {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4}.get(kind, 8)
    inner, count = struct.unpack_from("<IQ", data, at)
    total = 12
    for _ in range(count):
        total += length(data, at + total, inner)
    return total


def changed(data: bytes, changes: dict, removed: list[str]) -> bytes:
    """A GGUF file with other metadata; tensors stay as they are."""
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    at, values = 24, {}
    for _ in range(keys):
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
        key, kind = data[at + 8 : end].decode(), struct.unpack_from("<I", data, end)[0]
        at = end + 4 + length(data, end + 4, kind)
        values[key] = data[end:at]
    first = at
    for _ in range(tensors):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        at += 4 + 8 * struct.unpack_from("<I", data, at)[0] + 12
    values = {key: value for key, value in values.items() if key not in removed}
    values |= {key: encoded(value) for key, value in changes.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values))
    head += b"".join(text(key) + value for key, value in values.items()) + data[first:at]
    return head + bytes(-len(head) % 32) + data[(at + 31) // 32 * 32 :]


def main() -> None:
    for arch in ("olmoe", "qwen2moe", "qwen3moe", "deepseek2"):
        model(arch, HERE / f"{arch}.gguf")
    found = {}
    for row in json.loads((HERE.parent / "llama_cpp.json").read_text()):
        if "tensor" not in row:
            continue
        (file,) = row["files"].values()
        arch = Path(file["gguf"]).stem.split("_")[0]
        extra = {"tokenizer.ggml.model": {"string": "none"}, f"{arch}.vocab_size": {"u32": VOCABULARY}}
        with tempfile.NamedTemporaryFile(suffix=".gguf") as temporary:
            data = (ROOT / file["gguf"]).read_bytes()
            temporary.write(changed(data, file.get("set", {}) | extra, file.get("remove", [])))
            temporary.flush()
            ids = [int(id) for id in row["run"][row["run"].index("--ids") + 1].split(",")]
            (found[row["tensor"]["as"]],) = logits(Path(temporary.name), [ids])
    save_file(found, HERE / "goldens.safetensors", {"made_from": "llama-cpp-python 0.3.36"})
    for path in sorted(HERE.iterdir()):
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
