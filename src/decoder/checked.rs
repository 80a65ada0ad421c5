//! What a decoder computes held against NaN and infinity, pass by pass: [`finite`](super::finite) says which tensor was to blame.

use candle_core::{DType, Device, Tensor};

use super::finite::{Place, Suspects, first_non_finite, first_of_rows};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::layer::MoeLayer;
use crate::spec::ModelSpec;

/// What an error about a decoder is made of.
#[derive(Clone, Copy)]
pub(super) struct Checks<'a> {
    pub(super) spec: &'a ModelSpec,
    /// Where the weights came from, for errors that name one.
    pub(super) checkpoint: Option<&'a Checkpoint>,
    /// Of activations.
    pub(super) dtype: DType,
}

impl Checks<'_> {
    /// Checks that what a part gave is finite, `[rows, hidden]` in `f32`.
    pub(super) fn check_rows(self, place: Place, hidden: &[f32]) -> Result<()> {
        let Some((at, value)) = first_of_rows(hidden) else { return Ok(()) };
        let detail = match place {
            Place::Output => format!(" of vocabulary id {}", at % self.spec.vocab),
            _ => format!(", token {} of the batch", at / self.spec.moe.hidden),
        };
        Err(self.suspects().error(place, &detail, value))
    }

    /// Checks gate logits of an MoE layer, `[tokens, experts]`.
    pub(super) fn check_gate_rows(self, block: usize, moe: &MoeLayer, logits: &[f32]) -> Result<()> {
        if first_of_rows(logits).is_none() {
            return Ok(());
        }
        let experts = self.spec.moe.experts;
        let logits = Tensor::from_slice(logits, (logits.len() / experts, experts), &Device::Cpu)?;
        self.check_gate(block, moe, &logits)
    }

    /// Checks logits, `[.., vocab]`.
    pub(super) fn check_logits(self, logits: &Tensor) -> Result<()> {
        match first_non_finite(logits, true)? {
            None => Ok(()),
            Some((at, value)) => {
                let detail = format!(" of vocabulary id {}", at % self.spec.vocab);
                Err(self.suspects().error(Place::Output, &detail, value))
            }
        }
    }

    /// Checks that what a part gave is finite, `[.., hidden]`.
    pub(super) fn check_finite(self, place: Place, hidden: &Tensor) -> Result<()> {
        match first_non_finite(hidden, false)? {
            None => Ok(()),
            Some((at, value)) => {
                let detail = format!(", token {} of the batch", at / self.spec.moe.hidden);
                Err(self.suspects().error(place, &detail, value))
            }
        }
    }

    /// Checks gate logits of an MoE layer, `[tokens, experts]`: −∞ masks an expert only where the gate's bias says so.
    pub(super) fn check_gate(self, block: usize, moe: &MoeLayer, logits: &Tensor) -> Result<()> {
        let Some((at, value)) = first_non_finite(logits, false)? else { return Ok(()) };
        let experts = self.spec.moe.experts;
        if let Some(bias) = moe.gate().bias() {
            let bias = bias.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            let masked = |(at, value): (usize, &f32)| value.is_finite() || bias[at % experts] == f32::NEG_INFINITY;
            if logits.flatten_all()?.to_vec1::<f32>()?.iter().enumerate().all(masked) {
                return Ok(());
            }
        }
        let detail = format!(", gate logit of token {}, expert {}", at / experts, at % experts);
        Err(self.suspects().error(Place::Ffn(block), &detail, value))
    }

    fn suspects(&self) -> Suspects<'_> {
        Suspects { checkpoint: self.checkpoint, spec: self.spec, dtype: self.dtype }
    }

    /// An error of a block's MoE layer, with the block and what is to blame where its gate gave what is no number.
    pub(super) fn named(self, error: Error, block: usize) -> Error {
        match error {
            Error::NonFiniteLogit { token, expert, value } => {
                let detail = format!(", gate logit of token {token}, expert {expert}");
                self.suspects().error(Place::Ffn(block), &detail, f64::from(value))
            }
            other => other,
        }
    }
}
