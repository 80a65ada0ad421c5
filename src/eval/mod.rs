//! Measuring a model on real text: batches of it, perplexity, routers side by side, gate traces routed offline, experts placed by them, decode with little memory.

mod compare;
mod decode;
mod offline;
mod perplexity;
mod place;
mod replay;
#[cfg(test)]
mod tests;
mod text;
mod trace;
mod tune;

pub use self::compare::{Dropless, RouterFigures, Setting, compare, dropless};
pub use self::decode::{DecodeFigures, Decoding};
pub use self::offline::{BatchCapacity, LayerFigures, OfflineRouter, RoutedLayer};
pub use self::perplexity::Perplexity;
pub use self::place::{PlacedFigures, Placing};
pub use self::replay::{Replay, ReplayFigures};
pub use self::text::{Batching, EvalText, Mixing};
pub use self::trace::{GateTrace, LayerTrace};
pub use self::tune::{FastMemory, Sweep, TuneRow};
