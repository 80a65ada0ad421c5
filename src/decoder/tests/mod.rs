//! Whole models: families against their goldens, files in GGUF, experts in a cache against experts held.

mod batches;
mod cached_model;
mod gguf_files;
mod gguf_mxfp4;
mod gguf_tokenizer;
mod kept;
mod over_ranks;
mod recurrent;
mod zoo;
