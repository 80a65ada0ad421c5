//! What is in a checkpoint's files, whichever their format: the configuration and the tensors that they stand for.

pub mod gguf;
