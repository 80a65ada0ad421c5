//! Measuring a model on real text: batches of it, perplexity, and routers side by side.

pub(crate) mod compare;
pub(crate) mod decode;
pub(crate) mod offline;
pub(crate) mod perplexity;
pub(crate) mod replay;
pub(crate) mod text;
pub(crate) mod trace;
pub(crate) mod tune;

pub use self::compare::{Dropless, RouterFigures, Setting, compare, dropless};
pub use self::decode::{DecodeFigures, Decoding};
pub use self::offline::{LayerFigures, OfflineRouter, Room, RoutedLayer};
pub use self::perplexity::Perplexity;
pub use self::replay::{Replay, ReplayFigures};
pub use self::text::{Batching, EvalText, Mixing, SEQUENCE_TOKENS};
pub use self::trace::{GateTrace, LayerTrace};
pub use self::tune::{FastMemory, Sweep, TuneRow, plain_perplexity, recommended};
