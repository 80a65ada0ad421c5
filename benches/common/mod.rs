//! What the bench `engine` and the example `engine_table` share: blocks of weights with this crate's layer and Candle's loop
//! over the same experts, inputs for them, and the proof that both compute the same.

pub mod block;
pub mod fill;
pub mod shape;
