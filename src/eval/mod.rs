//! Measuring a model on real text: batches of it, perplexity, and routers side by side.

pub mod compare;
pub mod decode;
pub mod offline;
pub mod perplexity;
pub mod replay;
pub mod text;
pub mod trace;
pub mod tune;
