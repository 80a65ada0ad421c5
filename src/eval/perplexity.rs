//! Perplexity: `exp(mean −log p(token | tokens before it in its sequence))`, the judge of routing.
//!
//! The first token of a sequence has nothing before it and is not scored, nor is padding. Sums are in `f64` and in token
//! order, so the figure does not depend on threads.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::decoder::{Batch, Decoder};
use crate::error::{Error, Result};

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
    /// [`Error::Shape`] when the logits are not of this batch, [`Error::Parameter`] for a token id they do not cover,
    /// [`Error::NonFinite`] for logits that give a token no probability; nothing of the batch is counted then.
    pub fn add(&mut self, logits: &Tensor, batch: &Batch) -> Result<()> {
        self.add_losses(&losses(logits, batch)?);
        Ok(())
    }

    /// Adds the predictions of a pass of `decoder` for its own sequences of `batch`; with experts over ranks all of them add those of all.
    ///
    /// # Errors
    /// As [`Perplexity::add`], and [`Error::Rank`] where messages fail.
    pub(super) fn add_pass(&mut self, decoder: &Decoder, logits: &Tensor, batch: &Batch) -> Result<()> {
        self.add_losses(&pass_losses(decoder, logits, batch)?);
        Ok(())
    }

    /// Adds what [`losses`] returned.
    pub(super) fn add_losses(&mut self, losses: &[Option<f64>]) {
        for loss in losses.iter().flatten() {
            self.nats += loss;
            self.tokens += 1;
        }
    }

    /// What came after `before`: nats, and the tokens that they are of.
    pub(super) fn since(&self, before: &Self) -> (f64, u64) {
        (self.nats - before.nats, self.tokens - before.tokens)
    }

    /// The perplexity.
    ///
    /// # Errors
    /// [`Error::NonFinite`] before any token, and for a mean loss so high that its exponential is no number any more.
    pub fn value(&self) -> Result<f64> {
        let nats = self.nats / self.tokens as f64;
        match nats.exp() {
            value if value.is_finite() => Ok(value),
            value => {
                let cause = format!("; the mean loss of {} tokens is {nats} nats", self.tokens);
                Err(Error::NonFinite { place: "perplexity".into(), value, cause })
            }
        }
    }
}

/// For each place of `batch` the negative log likelihood of the token that follows it; `None` where none that is scored does.
///
/// # Errors
/// As [`Perplexity::add`].
pub(super) fn losses(logits: &Tensor, batch: &Batch) -> Result<Vec<Option<f64>>> {
    let (sequences, positions, vocab) = logits.dims3()?;
    if (sequences, positions) != (batch.sequences(), batch.positions()) {
        let expected = format!("[{}, {}, vocab]", batch.sequences(), batch.positions());
        return Err(Error::shape("logits", expected, format!("{:?}", logits.dims())));
    }
    if let Some(id) = batch.ids().iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::parameter("token id", id, format!("below the logits' {vocab}")));
    }
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
    if let Some(at) = losses.iter().position(|loss| loss.is_some_and(|loss| !loss.is_finite())) {
        let place = format!("loss of token {} of the batch", at + 1);
        return Err(Error::NonFinite { place, value: losses[at].unwrap_or(f64::NAN), cause: String::new() });
    }
    Ok(losses)
}

/// The same of a pass of `decoder`, whose logits are of its own sequences; on every rank those of all.
pub(super) fn pass_losses(decoder: &Decoder, logits: &Tensor, batch: &Batch) -> Result<Vec<Option<f64>>> {
    let Some(parallel) = decoder.parallel() else { return losses(logits, batch) };
    let own = losses(logits, &batch.part(decoder.own_sequences(batch)))?;
    let share = parallel.share(batch.sequences(), batch.positions());
    let ranks = parallel.ranks();
    let counts: Vec<usize> = (0..ranks.count()).map(|rank| share.given_by(rank).len()).collect();
    // No loss is NaN, so one is none.
    let own: Vec<f64> = own.iter().take(counts[ranks.rank()]).map(|loss| loss.unwrap_or(f64::NAN)).collect();
    let all = ranks.numbers(&own, &counts)?;
    Ok(all.into_iter().map(|loss| (!loss.is_nan()).then_some(loss)).collect())
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
        assert_eq!(perplexity.tokens, 3);
        assert!((perplexity.value().unwrap() - 5.0).abs() < 1e-5);
    }

    #[test]
    fn logits_of_another_batch_are_refused() {
        let batch = Batch::new(&[&[1, 2, 3]]).unwrap();
        for shape in [(1, 2, 5), (2, 3, 5), (1, 3, 3)] {
            let logits = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
            assert!(Perplexity::default().add(&logits, &batch).is_err(), "{shape:?}");
        }
    }

    #[test]
    fn the_target_is_the_next_token() {
        let batch = Batch::new(&[&[0, 1]]).unwrap();
        let logits = Tensor::new(&[[[0f32, 20.0], [20.0, 0.0]]], &Device::Cpu).unwrap();
        let mut perplexity = Perplexity::default();
        perplexity.add(&logits, &batch).unwrap();
        assert!((perplexity.value().unwrap() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let batch = Batch::new(&[&[0, 1]]).unwrap();
        let mut perplexity = Perplexity::default();
        assert_eq!(
            perplexity.value().unwrap_err().to_string(),
            "perplexity: expected finite numbers, got NaN; the mean loss of 0 tokens is NaN nats"
        );
        let mut add = |of_one: f32, of_two: f32| {
            perplexity.add(&Tensor::new(&[[[of_one, of_two], [0.0, 0.0]]], &Device::Cpu).unwrap(), &batch)
        };
        for (of_one, of_two) in [(f32::NAN, 0.0), (0.0, f32::NEG_INFINITY), (f32::INFINITY, 0.0)] {
            let error = add(of_one, of_two).unwrap_err();
            assert!(error.to_string().starts_with("loss of token 1 of the batch: expected finite numbers"), "{error}");
        }
        add(1000.0, 0.0).unwrap();
        let error = perplexity.value().unwrap_err();
        assert!(error.to_string().ends_with("got inf; the mean loss of 1 tokens is 1000 nats"), "{error}");
        assert!(!error.is_user_error());
    }
}
