"""GGUF files of tiny random checkpoints by llama.cpp's own converter, for families whose files are made by it alone.

Run by hand; the results are committed and the tests need no Python. Of llama.cpp its folders `conversion` and `gguf-py` are needed, as a
checkout has them, or the source distribution of llama-cpp-python under `vendor`; nothing of them is committed.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6 sentencepiece==0.2.3
    venv/bin/pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    venv/bin/python make_converter_goldens.py llama_cpp_python-0.3.36/vendor/llama.cpp zoo gguf

Checkpoint and goldens are those in zoo/, but for positions that the one in zoo/ has not: then the goldens are written beside the file. Two
things are not as in a published model: a tiny checkpoint has no tokenizer, so that part is left out, and configurations that transformers 5
writes lack keys that the published ones have and the converter looks for; they are put in, below.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

from make_zoo_goldens import goldens
from safetensors.torch import save_file

# Phi-3.5-MoE's, with as many factors as the tiny one has pairs. Its magnitudes are not in a GGUF file: the one there follows from the
# positions, so that they are this here.
STRETCHED = math.sqrt(1 + math.log(64 / 32) / math.log(32))
LONG_ROPE = {
    "architectures": ["PhiMoEForCausalLM"],
    # Not in a GGUF file either, so that it is the published model's.
    "router_jitter_noise": 0.01,
    "rope_parameters": None,
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 32,
    "rope_scaling": {
        "type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.25, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "short_mscale": STRETCHED,
        "long_mscale": STRETCHED,
    },
}

# What is written, of which family, and the keys of its published `config.json` that transformers does not write; None takes one away.
FILES = {
    "deepseek2_glm4_moe_lite": ("glm4_moe_lite", {"first_k_dense_replace": 1, "scoring_func": "sigmoid"}),
    "minimax-m2": ("minimax_m2", {"rotary_dim": 6, "scoring_func": "sigmoid"}),
    "gpt-oss": ("gpt_oss", {}),
    "gpt-oss_mxfp4": ("gpt_oss_mxfp4", {}),
    "lfm2moe": ("lfm2_moe", {}),
    "qwen3next": ("qwen3_next", {}),
    # With the block that guesses the token after the next.
    "qwen35moe": ("qwen3_5_moe", {}),
    "phimoe": ("phimoe", LONG_ROPE),
}

# Files as converters wrote them before they took a delta net's projections apart and knew of lists of blocks: of which file.
OLD = {"qwen3next_old": "qwen3next"}

# Those whose goldens in zoo/ are not of the same positions.
OTHER_POSITIONS = ("phimoe",)

# Those that come without tensors for further tokens, which the converter wants to be told.
ONE_TOKEN = ("qwen3next", "qwen3next_old")


def as_once(base, gguf) -> dict:
    """What a model's class did in OLD."""

    def modify_tensors(self, tensor, name, block):
        if "in_proj_qkvz.weight" in name:
            yield self.format_tensor_name(gguf.MODEL_TENSOR.SSM_IN, block, ".weight"), tensor
        else:
            yield from base.modify_tensors(self, tensor, name, block)

    def set_gguf_parameters(self):
        kinds = self.hparams.pop("layer_types")
        self.hparams["full_attention_interval"] = kinds.index("full_attention") + 1
        base.set_gguf_parameters(self)

    return {"modify_tensors": modify_tensors, "set_gguf_parameters": set_gguf_parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="where llama.cpp's converter is")
    parser.add_argument("zoo", type=Path, help="directory with one directory per family")
    parser.add_argument("gguf", type=Path, help="where the files go")
    parser.add_argument("names", nargs="*", help="default: all")
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.llama_cpp), str(arguments.llama_cpp / "gguf-py")]
    import gguf
    from conversion import ModelBase, get_model_class

    for name in arguments.names or [*FILES, *OLD]:
        family, keys = FILES[OLD.get(name, name)]
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / family
            shutil.copytree(arguments.zoo / family, directory)
            (directory / "goldens.safetensors").unlink()
            config = json.loads((directory / "config.json").read_text()) | keys
            config = {key: value for key, value in config.items() if key not in keys or value is not None}
            (directory / "config.json").write_text(json.dumps(config))
            base = get_model_class(config["architectures"][0])
            own = {"model_arch": base.model_arch, "set_vocab": lambda self: None, "no_mtp": name in ONE_TOKEN}
            if name in OLD:
                own |= as_once(base, gguf)
            path = arguments.gguf / f"{name}.gguf"
            type("WithoutTokenizer", (base,), own)(directory, gguf.LlamaFileType.ALL_F32, path).write()
            print(path.name, path.stat().st_size, "bytes")
            if name in OTHER_POSITIONS:
                tensors, made_from = goldens(family, directory)
                save_file(tensors, arguments.gguf / f"{name}.goldens.safetensors", {"made_from": json.dumps(made_from)})


if __name__ == "__main__":
    main()
