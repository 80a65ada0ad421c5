"""Models that say a known text, and what their tokenizers make of it.

    python cli/tests/situations/text/make.py

Made with transformers 5.23.0, tokenizers 0.23.2, gguf 0.19.0, torch 2.15.0, numpy 2.4.6. Writes, beside this file,

- `says/`: a Mixtral checkpoint of 32 tokens in transformers' layout, `says.gguf`: the same as GGUF. Every weight of attention and experts is 0,
  the embedding of a token is a unit vector, and the head maps it to the next token of a chain, so what the model says is known
  without running it: the text below is what `tokenizers` makes of the chain.
- prints what transformers makes of the bundled model with a token before each sequence: the values in `../text.json`.
"""

import json
import math
import pathlib
import tempfile

import gguf
import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
BYTES = ["<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "<0xF0>", "<0x9F>"]
PIECES = ["▁", "h", "e", "l", "o", "w", "r", "d", "!", "▁h", "▁he", "▁hel", "▁hell", "▁hello", "▁w", "▁wo", "▁wor", "▁worl", "▁world", "g", "▁g", "▁go", "x"]
TOKENS = ["<unk>", "<s>", "</s>"] + BYTES + PIECES
SIZE = 32
assert len(TOKENS) == SIZE
ID = {token: id for id, token in enumerate(TOKENS)}
# After "hello" a word, a letter of three bytes, two spaces in a row and a line; after "go" a byte that is no letter; after "wo" one that
# might have become one; after "x" it for ever.
CHAINS = {
    "hello": ["▁hello", "▁world", "!", "<0xE2>", "<0x82>", "<0xAC>", "▁", "▁w", "r", "<0x0A>", "▁he", "</s>"],
    "go": ["▁go", "o", "<0xF0>", "d", "l", "</s>"],
    "wo": ["▁wo", "<0x9F>", "</s>"],
    "x": ["x", "x"],
}
FOLLOWING = {first: second for chain in CHAINS.values() for first, second in zip(chain, chain[1:])}


def weights():
    embedding = np.eye(SIZE, dtype=np.float32)
    head = np.zeros((SIZE, SIZE), dtype=np.float32)
    for token in TOKENS:
        head[ID[FOLLOWING.get(token, "</s>")], ID[token]] = 1
    return embedding, head


MERGES = [["▁", "h"], ["▁h", "e"], ["▁he", "l"], ["▁hel", "l"], ["▁hell", "o"], ["▁", "w"], ["▁w", "o"], ["▁wo", "r"], ["▁wor", "l"], ["▁worl", "d"], ["▁", "g"], ["▁g", "o"]]


def tokenizer():
    special = lambda id: {"id": id, "content": TOKENS[id], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    replace = lambda a, b: {"type": "Replace", "pattern": {"String": a}, "content": b}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": ID, "merges": MERGES},
    }


def checkpoint():
    directory = HERE / "says"
    directory.mkdir(exist_ok=True)
    embedding, head = weights()
    zeros = np.zeros((SIZE, SIZE), dtype=np.float16)
    ones = np.ones(SIZE, dtype=np.float16)
    experts, width = 2, 8
    tensors = {"model.embed_tokens.weight": embedding.astype(np.float16), "lm_head.weight": head.astype(np.float16), "model.norm.weight": ones}
    block = "model.layers.0."
    tensors |= {f"{block}self_attn.{part}_proj.weight": zeros for part in "qkvo"}
    tensors |= {f"{block}{norm}_layernorm.weight": ones for norm in ("input", "post_attention")}
    tensors[f"{block}block_sparse_moe.gate.weight"] = np.zeros((experts, SIZE), dtype=np.float16)
    for expert in range(experts):
        name = f"{block}block_sparse_moe.experts.{expert}."
        for part, shape in (("w1", (width, SIZE)), ("w2", (SIZE, width)), ("w3", (width, SIZE))):
            tensors[f"{name}{part}.weight"] = np.zeros(shape, dtype=np.float16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": width,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": SIZE, "num_local_experts": experts, "num_experts_per_tok": 1,
        "max_position_embeddings": 100000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False) + "\n")


def gguf_file():
    embedding, head = weights()
    experts, width = 2, 8
    out = gguf.GGUFWriter(HERE / "says.gguf", "llama")
    out.add_context_length(100000)
    out.add_embedding_length(SIZE)
    out.add_block_count(1)
    out.add_feed_forward_length(width)
    out.add_head_count(1)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(SIZE)
    out.add_rope_freq_base(10000.0)
    out.add_expert_count(experts)
    out.add_expert_used_count(1)
    out.add_vocab_size(SIZE)
    out.add_tokenizer_model("llama")
    out.add_token_list(TOKENS)
    # A later merge makes a token of a lower score.
    rank = {left + right: at for at, (left, right) in enumerate(MERGES)}
    out.add_token_scores([-float(rank.get(token, 100)) for token in TOKENS])
    kinds = {0: gguf.TokenType.UNKNOWN, 1: gguf.TokenType.CONTROL, 2: gguf.TokenType.CONTROL}
    out.add_token_types([kinds.get(id, gguf.TokenType.BYTE if token in BYTES else gguf.TokenType.NORMAL) for id, token in enumerate(TOKENS)])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    half = lambda *shape: np.zeros(shape, dtype=np.float16)
    ones = np.ones(SIZE, dtype=np.float32)
    out.add_tensor("token_embd.weight", embedding.astype(np.float16))
    out.add_tensor("output.weight", head.astype(np.float16))
    out.add_tensor("output_norm.weight", ones)
    for part in ("q", "k", "v", "output"):
        out.add_tensor(f"blk.0.attn_{part}.weight", half(SIZE, SIZE))
    out.add_tensor("blk.0.attn_norm.weight", ones)
    out.add_tensor("blk.0.ffn_norm.weight", ones)
    out.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((experts, SIZE), dtype=np.float32))
    out.add_tensor("blk.0.ffn_gate_exps.weight", half(experts, width, SIZE))
    out.add_tensor("blk.0.ffn_up_exps.weight", half(experts, width, SIZE))
    out.add_tensor("blk.0.ffn_down_exps.weight", half(experts, SIZE, width))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def perplexity(model, ids, start):
    """Of sequences of 256 tokens that each begin with `start`, none of which is scored."""
    nats, count, sequences = 0.0, 0, []
    room = 256 - len(start)
    for at in range(0, len(ids), room):
        sequences.append(start + ids[at : at + room])
    for sequence in sequences:
        if len(sequence) < 2:
            continue
        tensor = torch.tensor([sequence])
        with torch.no_grad():
            logits = model(tensor).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], tensor[0, 1:], reduction="none")
        nats, count = nats + losses.sum().item(), count + len(losses)
    return math.exp(nats / count), sum(map(len, sequences))


def bundled():
    source = ROOT / "models/tiny-moe"
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    processors = {
        "before": {"type": "TemplateProcessing", "single": [bos, text], "pair": [text], "special_tokens": tokens},
        "around": {"type": "TemplateProcessing", "single": [bos, text, bos], "pair": [text], "special_tokens": tokens},
        "twice, after bytes": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {"type": "TemplateProcessing", "single": [bos, bos, text], "pair": [text], "special_tokens": tokens}]},
        "roberta": {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 0], "cls": ["<|endoftext|>", 0], "trim_offsets": True, "add_prefix_space": False},
        "none": None,
    }
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, processor in processors.items():
        json_text = json.loads((source / "tokenizer.json").read_text())
        json_text["post_processor"] = processor
        with tempfile.TemporaryDirectory() as directory:
            (pathlib.Path(directory) / "tokenizer.json").write_text(json.dumps(json_text))
            # The class for `olmoe` makes a tokenizer of its own and leaves the post-processor out, so the file's own is asked.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        ids = tokenizer("And it came to pass").input_ids
        with torch.no_grad():
            said = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        print(name, {"prompt_tokens": len(ids), "text": tokenizer.decode(said, skip_special_tokens=True)[len("And it came to pass") :]})
    text = (source / "eval/scripture.txt").read_text()[:4000]
    (HERE / "scripture.txt").write_text(text)
    ids = tokenizer(text).input_ids
    for start in ([], [0], [0, 0]):
        print("perplexity and tokens of scripture.txt with", start, "before:", perplexity(model, ids, start))


checkpoint()
gguf_file()
decoder = Tokenizer.from_file(str(HERE / "says/tokenizer.json"))
for prompt, chain in CHAINS.items():
    ids = [ID[token] for token in chain if token != "</s>"]
    said = decoder.decode(ids)[len(decoder.decode(ids[:1])) :]
    print("after", decoder.encode(prompt).tokens, "it says", repr(said), "in", len(ids) - 1, "tokens")
bundled()
