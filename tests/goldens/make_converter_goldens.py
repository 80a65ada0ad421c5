"""GGUF files of tiny random checkpoints by llama.cpp's own converter, for families whose files are made by it alone.

Run by hand; the results are committed and the tests need no Python. Of llama.cpp its folders `conversion` and `gguf-py` are needed, as a
checkout has them, or the source distribution of llama-cpp-python under `vendor`; nothing of them is committed.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6 sentencepiece==0.2.3
    venv/bin/pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    venv/bin/python make_converter_goldens.py llama_cpp_python-0.3.36/vendor/llama.cpp zoo gguf

Checkpoint and goldens are those in zoo/. Two things are not as in a published model: a tiny checkpoint has no tokenizer, so that part is
left out, and configurations that transformers 5 writes lack keys that the published ones have and the converter looks for; they are
put in, below.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

# What is written, of which family, and the keys of its published `config.json` that transformers does not write.
FILES = {
    "deepseek2_glm4_moe_lite": ("glm4_moe_lite", {"first_k_dense_replace": 1, "scoring_func": "sigmoid"}),
    "minimax-m2": ("minimax_m2", {"rotary_dim": 6, "scoring_func": "sigmoid"}),
    "gpt-oss": ("gpt_oss", {}),
    "gpt-oss_mxfp4": ("gpt_oss_mxfp4", {}),
}


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

    for name in arguments.names or FILES:
        family, keys = FILES[name]
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / family
            shutil.copytree(arguments.zoo / family, directory)
            (directory / "goldens.safetensors").unlink()
            config = json.loads((directory / "config.json").read_text()) | keys
            (directory / "config.json").write_text(json.dumps(config))
            base = get_model_class(config["architectures"][0])
            model = type("WithoutTokenizer", (base,), {"model_arch": base.model_arch, "set_vocab": lambda self: None})
            path = arguments.gguf / f"{name}.gguf"
            model(directory, gguf.LlamaFileType.ALL_F32, path).write()
            print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
