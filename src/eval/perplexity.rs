//! Perplexity: `exp(mean −log p(token | tokens before it in its sequence))`, the judge of routing.
//!
//! The first token of a sequence has nothing before it and is not scored, nor is padding. Sums are in `f64` and in token
//! order, so the figure does not depend on threads.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::decoder::Batch;
use crate::error::Result;

/// A running sum of negative log likelihoods.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    nats: f64,
    tokens: u64,
}

impl Perplexity {
    /// Adds the predictions of one forward pass: `logits` are `[sequences, positions, vocab]` for `batch`.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::error::Error::Candle) when the logits are not of this batch.
    pub fn add(&mut self, logits: &Tensor, batch: &Batch) -> Result<()> {
        let (_, positions, vocab) = logits.dims3()?;
        let values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let padded = |at: usize| batch.padding().is_some_and(|padding| padding[at]);
        let losses: Vec<Option<f64>> = values
            .par_chunks_exact(vocab)
            .enumerate()
            .map(|(at, row)| {
                let scored = (at + 1) % positions != 0 && !padded(at + 1);
                scored.then(|| loss(row, batch.ids()[at + 1] as usize))
            })
            .collect();
        for loss in losses.into_iter().flatten() {
            self.nats += loss;
            self.tokens += 1;
        }
        Ok(())
    }

    /// Tokens scored.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The perplexity; NaN before any token.
    pub fn value(&self) -> f64 {
        (self.nats / self.tokens as f64).exp()
    }
}

/// `log Σ exp(logit) − logit of the target`.
fn loss(row: &[f32], target: usize) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = row.iter().map(|&logit| (logit - max).exp()).sum();
    f64::from(max) + f64::from(sum).ln() - f64::from(row[target])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn equal_logits_give_the_size_of_the_vocabulary() {
        let batch = Batch::new(&[&[1, 2, 3], &[4, 0]]).unwrap();
        let mut perplexity = Perplexity::default();
        perplexity.add(&Tensor::zeros((2, 3, 5), DType::F32, &Device::Cpu).unwrap(), &batch).unwrap();
        assert_eq!(perplexity.tokens(), 3);
        assert!((perplexity.value() - 5.0).abs() < 1e-5);
    }

    #[test]
    fn the_target_is_the_next_token() {
        let batch = Batch::new(&[&[0, 1]]).unwrap();
        let logits = Tensor::new(&[[[0f32, 20.0], [20.0, 0.0]]], &Device::Cpu).unwrap();
        let mut perplexity = Perplexity::default();
        perplexity.add(&logits, &batch).unwrap();
        assert!((perplexity.value() - 1.0).abs() < 1e-6);
    }
}
