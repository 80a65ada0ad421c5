"""How far our logits of GGUF files are from llama.cpp's: the mean KL divergence, printed a line a file.

Run by hand, with the Python and the bindings that cli/tests/situations/llama_cpp/make.py names, and a command that is built:

    venv/bin/python llama_cpp_kl.py --command ../../target/release/phase-moe

Of the files beside that llama.cpp reads; it is told that they have no tokenizer. Both sides have keys and values in f32, llama.cpp attention
without its fused kernel. Of gpt-oss's YaRN llama.cpp rounds the ramp to whole rotations, whatever a model says, and takes 32 and 1 rotations
for its ends, whatever the file says; so that model is there a second time, from its safetensors, told to do so too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "cli/tests/situations/llama_cpp"))
from make import VOCABULARY, changed  # noqa: E402
from llama_cpp_logits import logits  # noqa: E402

IDS = [5, 15, 39, 16, 7, 12, 31, 3, 50, 50, 3, 31, 9]
# Files, and the architecture that they are of. phimoe is not the same model in llama.cpp; the other files here have sizes that it refuses.
FILES = {
    "gguf/lfm2moe.gguf": "lfm2moe",
    "gguf/qwen3next.gguf": "qwen3next",
    "gguf/qwen3next_old.gguf": "qwen3next",
    "gguf/qwen35moe.gguf": "qwen35moe",
    "gguf/minimax-m2.gguf": "minimax-m2",
    "gguf/deepseek2_glm4_moe_lite.gguf": "deepseek2",
    "gguf/gpt-oss.gguf": "gpt-oss",
    "gguf/gpt-oss_mxfp4.gguf": "gpt-oss",
    "gguf/mxfp4.gguf": "olmoe",
    "gguf/glm4moe.gguf": "glm4moe",
    "gguf/granitemoe.gguf": "granitemoe",
    "gguf/llama.gguf": "llama",
    "../../cli/tests/situations/llama_cpp/olmoe.gguf": "olmoe",
    "../../cli/tests/situations/llama_cpp/qwen2moe.gguf": "qwen2moe",
    "../../cli/tests/situations/llama_cpp/qwen3moe.gguf": "qwen3moe",
    "../../cli/tests/situations/llama_cpp/deepseek2.gguf": "deepseek2",
}


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def theirs(path: Path, architecture: str, folder: Path) -> np.ndarray:
    extra = {"tokenizer.ggml.model": {"string": "none"}, f"{architecture}.vocab_size": {"u32": VOCABULARY}}
    copy = folder / "model.gguf"
    copy.write_bytes(changed(path.read_bytes(), extra, []))
    return logits(copy, [IDS])[0]


def ours(command: Path, model: Path, folder: Path) -> np.ndarray:
    out = folder / "logits.safetensors"
    ids = ",".join(map(str, IDS))
    arguments = ["logits", "--model", model, "--ids", ids, "--dtype", "f32", "--out", out]
    subprocess.run([command, *arguments], check=True, capture_output=True)
    return load_file(out)["logits"]


def say(name: str, llama: np.ndarray, phase: np.ndarray) -> None:
    p, q = log_softmax(llama), log_softmax(phase)
    rows = (np.exp(p) * (p - q)).sum(-1)
    print(f"{name}: mean {rows.mean():.1e}, largest of {len(rows)} tokens {rows.max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--command", type=Path, required=True)
    command = parser.parse_args().command.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, architecture in FILES.items():
            path = HERE / name
            try:
                say(path.stem, theirs(path, architecture, folder), ours(command, path, folder))
            except ValueError as refused:
                print(f"{path.stem}: {refused}")
        rounded = folder / "gpt_oss"
        rounded.mkdir()
        config = json.loads((HERE / "zoo/gpt_oss/config.json").read_text())
        config["rope_parameters"] |= {"truncate": True, "beta_fast": 32.0, "beta_slow": 1.0}
        (rounded / "config.json").write_text(json.dumps(config))
        (rounded / "model.safetensors").write_bytes((HERE / "zoo/gpt_oss/model.safetensors").read_bytes())
        llama = theirs(HERE / "gguf/gpt-oss.gguf", "gpt-oss", folder)
        say("gpt-oss with llama.cpp's ramp", llama, ours(command, rounded, folder))


if __name__ == "__main__":
    main()
