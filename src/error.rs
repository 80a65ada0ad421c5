//! The one error type of the crate: every variant names the operand, what was expected and what came.
//!
//! Knows nothing of routing or tensors beyond the words in its messages.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

/// `std::result::Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the operands.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand has the wrong number of values, rank, dimensions, dtype or device.
    #[error("{operand}: expected {expected}, got {got}")]
    Shape {
        /// The operand, as the caller knows it.
        operand: String,
        /// The shape, length, dtype or device that would have been right.
        expected: String,
        /// The one that came.
        got: String,
    },
    /// A gate logit is NaN or +∞ (−∞ is a mask and allowed).
    #[error("logit of token {token}, expert {expert} is {value}: expected a finite number or -inf (masked)")]
    NonFiniteLogit {
        /// Row of the logit.
        token: usize,
        /// Column of the logit.
        expert: usize,
        /// The offending value.
        value: f32,
    },
    /// A model computed what is no number: a weight is none, or something overflowed.
    #[error("{place}: expected finite numbers, got {value}{cause}")]
    NonFinite {
        /// Where it was seen first: a block of the model and what of it, its logits, a figure.
        place: String,
        /// NaN or an infinity.
        value: f64,
        /// What is known of how that came, to be read on after the value; empty where nothing is.
        cause: String,
    },
    /// `top_k` was 0.
    #[error("top_k is 0: expected at least 1")]
    TopKZero,
    /// More experts asked for per token than there are.
    #[error("top_k {top_k} exceeds experts {experts}")]
    TopKExceedsExperts {
        /// Experts asked for per token.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// No experts, or more than an `ExpertId` can name.
    #[error("experts is {experts}: expected 1 to 65535")]
    ExpertCount {
        /// The count that came.
        experts: usize,
    },
    /// An expert id outside the layer's experts.
    #[error("{operand}: expert {id} is out of range, expected {expected}")]
    ExpertOutOfRange {
        /// Where the id came from.
        operand: String,
        /// The id as it came.
        id: i64,
        /// The ids that would have been right.
        expected: String,
    },
    /// A parameter outside its domain (NaN, negative, zero, contradictory).
    #[error("{name} is {got}: expected {expected}")]
    Parameter {
        /// Name of the parameter.
        name: &'static str,
        /// The value as it came.
        got: String,
        /// The values that would have been right.
        expected: String,
    },
    /// A name that is not in a fixed list (a router, a profile, a dtype, a model family).
    #[error("unknown {kind} `{got}`: expected one of {expected}")]
    UnknownName {
        /// What the name should have been a name of.
        kind: &'static str,
        /// The name as it came.
        got: String,
        /// The names there are.
        expected: String,
    },
    /// A model configuration that is missing a key, or contradicts itself.
    #[error("{file}: {detail}")]
    Config {
        /// The configuration file.
        file: String,
        /// Key, what was expected, what came.
        detail: String,
    },
    /// A checkpoint file that is not what its header or index says.
    #[error("{file}: {detail}")]
    Checkpoint {
        /// The checkpoint file.
        file: String,
        /// Tensor or offset, what was expected, what came.
        detail: String,
    },
    /// An expert could not be read, or is not what it was.
    #[error(transparent)]
    Expert(ExpertFault),
    /// A router answered with an assignment that is none to its request.
    #[error(transparent)]
    Answer(AnswerFault),
    /// A layer has a limit and a router that keeps within none.
    #[error("capacity: expected a router that keeps within it, got {router}")]
    CapacityIgnored {
        /// Name of the router.
        router: &'static str,
    },
    /// Another process of the job is not where this one is, or a message from it is not what it should be.
    #[error("rank {rank}: {detail}")]
    Rank {
        /// The process.
        rank: usize,
        /// What was expected of it, and what came.
        detail: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {reason}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: std::io::Error,
    },
    /// The tokenizer file is unusable or the text cannot be encoded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Candle refused a tensor operation.
    #[cfg(feature = "layer")]
    #[error(transparent)]
    Candle(candle_core::Error),
}

/// Why an expert is not there for those who wait for it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{file}: expert {expert} of layer {layer}: {fault}")]
pub struct ExpertFault {
    /// The file or files it is in.
    pub file: String,
    /// Its layer.
    pub layer: usize,
    /// Its number in the layer.
    pub expert: usize,
    /// What went wrong.
    pub fault: Fault,
}

/// What can go wrong when an expert is loaded.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A read failed, or the file has become shorter.
    #[error("expected {bytes} bytes at {offset}, got {reason}")]
    Read {
        /// Where in the file.
        offset: u64,
        /// How many bytes were to be read.
        bytes: usize,
        /// The system's reason; several may wait for one read.
        reason: Arc<std::io::Error>,
    },
    /// The bytes are others than at the first load.
    #[error("expected checksum {expected:016x} as at its first load, got {got:016x}")]
    Checksum {
        /// Of the first load.
        expected: u64,
        /// Of this one.
        got: u64,
    },
}

/// What a router's answer broke.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("router {router}: {breach}")]
pub struct AnswerFault {
    /// The router's name.
    pub router: &'static str,
    /// What is wrong with its answer.
    pub breach: Breach,
}

/// What can be wrong with a router's answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Breach {
    /// The assignment is for another number of tokens, experts or slots per token than the request.
    #[error("{operand} of the assignment: expected {expected}, got {got}")]
    Size {
        /// Tokens, experts or top_k.
        operand: &'static str,
        /// Those of the request.
        expected: usize,
        /// Those of the assignment.
        got: usize,
    },
    /// A token has more experts than it asked for, from a router that keeps top_k.
    #[error("token {token}: expected at most {most} experts, got {got}")]
    TooMany {
        /// The token.
        token: usize,
        /// Experts that it asked for.
        most: usize,
        /// Experts that it has.
        got: usize,
    },
    /// A token has an expert that the layer does not have.
    #[error("token {token}: expected experts below {experts}, got expert {expert}")]
    OutOfRange {
        /// The token.
        token: usize,
        /// The expert.
        expert: usize,
        /// Experts of the layer.
        experts: usize,
    },
    /// A token has an expert in two of its slots.
    #[error("token {token}: expected distinct experts, got expert {expert} twice")]
    Twice {
        /// The token.
        token: usize,
        /// The expert.
        expert: usize,
    },
    /// A token has an expert that is masked for it.
    #[error("token {token}: expected experts that are not masked, got expert {expert}")]
    Masked {
        /// The token.
        token: usize,
        /// The expert.
        expert: usize,
    },
    /// A padding token has an expert.
    #[error("padding token {token}: expected no expert, got expert {expert}")]
    Padding {
        /// The token.
        token: usize,
        /// The expert.
        expert: usize,
    },
    /// A combine weight is not finite, not 0 in a dropped slot, or not what the gate scores say.
    #[error("combine weight of token {token}, {}: expected {}, got {got}", slot(.expert), wanted(.expected))]
    Weight {
        /// The token.
        token: usize,
        /// The expert; `None` where the slot was dropped.
        expert: Option<usize>,
        /// What the gate scores say; `None` for any finite number.
        expected: Option<f64>,
        /// The weight.
        got: f64,
    },
    /// Normalised combine weights of a token do not sum to the scale, or to more where slots were dropped.
    #[error("combine weights of token {token}: expected a sum of {expected}, less where slots were dropped, got {got}")]
    WeightSum {
        /// The token.
        token: usize,
        /// The scale.
        expected: f64,
        /// The sum.
        got: f64,
    },
    /// An expert or a device has more slots than its limit, from a router that respects capacity.
    #[error("{pool} {id}: expected at most {limit} slots, got {got}")]
    OverLimit {
        /// Expert or device.
        pool: &'static str,
        /// Its number.
        id: usize,
        /// Its limit.
        limit: u32,
        /// Its slots.
        got: u32,
    },
    /// More gate mass was kept than the certified bound allows.
    #[error("gate mass: expected at most its bound {bound}, got {mass}")]
    Bound {
        /// The bound that the router certified.
        bound: f64,
        /// The gate mass that it kept.
        mass: f64,
    },
}

fn slot(expert: &Option<usize>) -> String {
    expert.map_or("a dropped slot".into(), |expert| format!("expert {expert}"))
}

fn wanted(weight: &Option<f64>) -> String {
    weight.map_or("a finite number".into(), |weight| weight.to_string())
}

impl Error {
    /// A [`Error::Shape`] from anything that prints.
    pub fn shape(operand: impl Into<String>, expected: impl ToString, got: impl ToString) -> Self {
        Self::Shape { operand: operand.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// The one of `all` with the name `got`, or [`Error::UnknownName`] with the names there are.
    pub(crate) fn by_name<T: Copy>(
        kind: &'static str,
        all: &[T],
        name: impl Fn(T) -> &'static str,
        got: &str,
    ) -> Result<T> {
        all.iter().copied().find(|&one| name(one) == got).ok_or_else(|| Self::UnknownName {
            kind,
            got: got.into(),
            expected: all.iter().map(|&one| name(one)).collect::<Vec<_>>().join(", "),
        })
    }

    /// A [`Error::Parameter`] from anything that prints.
    pub(crate) fn parameter(name: &'static str, got: impl ToString, expected: impl ToString) -> Self {
        Self::Parameter { name, got: got.to_string(), expected: expected.to_string() }
    }

    /// An [`Error::Io`] for `path`.
    pub(crate) fn io(path: impl Into<PathBuf>, reason: std::io::Error) -> Self {
        Self::Io { path: path.into(), reason }
    }

    /// True when the input is at fault and not the machine: what a command line answers with exit code 2.
    pub fn is_user_error(&self) -> bool {
        match self {
            #[cfg(feature = "layer")]
            Self::Candle(_) => false,
            Self::Expert(_) | Self::Answer(_) | Self::NonFinite { .. } => false,
            Self::Io { reason, .. } => matches!(
                reason.kind(),
                ErrorKind::NotFound
                    | ErrorKind::PermissionDenied
                    | ErrorKind::IsADirectory
                    | ErrorKind::NotADirectory
                    | ErrorKind::InvalidData
            ),
            _ => true,
        }
    }
}

/// For programs that read and write beside what they do here: an [`Error::Io`] that knows no file.
impl From<std::io::Error> for Error {
    fn from(reason: std::io::Error) -> Self {
        reason.downcast().unwrap_or_else(|reason| Self::io("input or output", reason))
    }
}

/// Lets a layer of this crate stand where Candle wants its own error (`Module::forward`, `VarBuilder` back ends). Converting
/// back gives the same error again.
#[cfg(feature = "layer")]
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            // The one variant of Candle's error that both prints what it holds as it is and gives it back by type.
            error => candle_core::Error::Io(std::io::Error::other(error)),
        }
    }
}

/// Takes an error of this crate that went through Candle out again; anything else is [`Error::Candle`].
#[cfg(feature = "layer")]
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::Io(error) => error.downcast().unwrap_or_else(|error| Self::Candle(error.into())),
            error => Self::Candle(error),
        }
    }
}

#[cfg(all(test, feature = "layer"))]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_its_way_through_candle() {
        let through = |error: Error| Error::from(candle_core::Error::from(error));
        let shown = candle_core::Error::from(Error::shape("hidden state", 8, 9));
        assert_eq!(shown.to_string(), "hidden state: expected 8, got 9");
        assert!(matches!(through(Error::shape("hidden state", 8, 9)), Error::Shape { .. }));
        assert!(matches!(through(Error::io("a", std::io::ErrorKind::NotFound.into())), Error::Io { .. }));
        assert!(matches!(through(candle_core::Error::UnwrapNone.into()), Error::Candle(_)));
        let foreign = Error::from(candle_core::Error::Io(std::io::Error::other("disk")));
        assert!(matches!(&foreign, Error::Candle(_)) && foreign.to_string() == "disk");
    }
}
