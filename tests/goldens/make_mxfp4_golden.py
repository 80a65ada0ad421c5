"""A GGUF file of a tiny random OLMoE whose experts are in MXFP4, and what transformers computes with the numbers of its blocks.

Run by hand, as make_gguf_goldens.py and with its packages:

    venv/bin/python make_mxfp4_golden.py gguf_mxfp4

Written: olmoe.gguf, experts quantised by the gguf package, and goldens.safetensors as in make_zoo_goldens.py.
"""

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import make_gguf_goldens as gguf_goldens
import make_zoo_goldens as zoo_goldens
import torch
from safetensors.torch import load_file, save_file

MXFP4 = gguf.GGMLQuantizationType.MXFP4


class Writer(gguf.GGUFWriter):
    """One that quantises experts."""

    def add_tensor(self, name, tensor, **others):
        if "_exps" in name:
            return super().add_tensor(name, gguf.quants.quantize(tensor, MXFP4), raw_dtype=MXFP4, **others)
        return super().add_tensor(name, tensor, **others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where the files go")
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    # Rows of whole blocks.
    zoo_goldens.FAMILIES["olmoe"] = {**gguf_goldens.OLMOE, "intermediate_size": 64, "num_experts": 4}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        zoo_goldens.random_model("olmoe", seed=1).save_pretrained(directory)
        tensors = load_file(directory / "model.safetensors")
        for name in [name for name in tensors if ".experts." in name]:
            blocks = gguf.quants.quantize(tensors[name].numpy(), MXFP4)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(blocks, MXFP4)).reshape(tensors[name].shape)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        made, made_from = zoo_goldens.goldens(directory)
        save_file(made, out / "goldens.safetensors", {"made_from": json.dumps(made_from)})
        gguf.GGUFWriter = Writer
        gguf_goldens.write(out / "olmoe.gguf", directory, "olmoe")
    for path in sorted(out.iterdir()):
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
