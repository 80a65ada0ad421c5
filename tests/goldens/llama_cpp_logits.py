"""llama.cpp's logits of a GGUF file, in f32 throughout, through the bindings of llama-cpp-python."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def quiet(level, text, data):
    pass


llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def logits(path: Path, texts: list[list[int]]) -> list[np.ndarray]:
    """Of every token of each text: [tokens, vocabulary]. Raises ValueError where llama.cpp does not read the file."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise ValueError(f"{path}: not read by llama.cpp")
    tokens = max(map(len, texts))
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(tokens, 32)
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise ValueError(f"{path}: no context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = []
    for text in texts:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(len(text), 0, 1)
        batch.n_tokens = len(text)
        for at, token in enumerate(text):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        if llama_cpp.llama_decode(context, batch) != 0:
            raise ValueError(f"{path}: not decoded")
        values = llama_cpp.llama_get_logits(context)
        found.append(np.ctypeslib.as_array(values, (len(text), vocabulary)).copy())
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found
