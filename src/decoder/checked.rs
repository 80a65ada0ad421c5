//! What a decoder computes held against NaN and infinity, pass by pass: [`finite`](super::finite) says which tensor was to blame.

use candle_core::{DType, Tensor};

use super::Decoder;
use super::finite::{Place, Suspects, first_non_finite};
use crate::error::{Error, Result};
use crate::layer::MoeLayer;

impl Decoder {
    /// Checks logits, `[.., vocab]`.
    pub(super) fn check_logits(&self, logits: &Tensor) -> Result<()> {
        match first_non_finite(logits, true)? {
            None => Ok(()),
            Some((at, value)) => {
                let detail = format!(" of vocabulary id {}", at % self.spec.vocab);
                Err(self.suspects(logits.dtype()).error(Place::Output, &detail, value))
            }
        }
    }

    /// Checks that what a part gave is finite, `[.., hidden]`.
    pub(super) fn check_finite(&self, place: Place, hidden: &Tensor) -> Result<()> {
        match first_non_finite(hidden, false)? {
            None => Ok(()),
            Some((at, value)) => {
                let detail = format!(", token {} of the batch", at / self.spec.moe.hidden);
                Err(self.suspects(hidden.dtype()).error(place, &detail, value))
            }
        }
    }

    /// Checks gate logits of an MoE layer, `[tokens, experts]`: −∞ masks an expert only where the gate's bias says so.
    pub(super) fn check_gate(&self, block: usize, moe: &MoeLayer, logits: &Tensor, dtype: DType) -> Result<()> {
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
        Err(self.suspects(dtype).error(Place::Ffn(block), &detail, value))
    }

    fn suspects(&self, dtype: DType) -> Suspects<'_> {
        let (checkpoint, tied) = (self.checkpoint.as_deref(), self.spec.tied_embeddings);
        Suspects { checkpoint, ffn: &self.spec.ffn, tied, dtype }
    }

    /// An error of a block's MoE layer, with the block and what is to blame where its gate gave what is no number.
    pub(super) fn named(&self, error: Error, block: usize, dtype: DType) -> Error {
        match error {
            Error::NonFiniteLogit { token, expert, value } => {
                let detail = format!(", gate logit of token {token}, expert {expert}");
                self.suspects(dtype).error(Place::Ffn(block), &detail, f64::from(value))
            }
            other => other,
        }
    }
}
