//! From the logits of the last position to the next token: greedy, or drawn with temperature and nucleus.

use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// Draws tokens; the same seed and logits give the same tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// `temperature` 0 always takes the most likely token; `top_p` keeps the fewest tokens that hold this probability
    /// (nucleus sampling, arXiv 1904.09751), 1 keeps all.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a temperature that is negative or not finite, or `top_p` outside (0, 1].
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Result<Self> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::parameter("temperature", temperature, "0 or a positive finite number"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::parameter("top_p", top_p, "above 0, at most 1"));
        }
        Ok(Self { temperature, top_p, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token for `logits` `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Candle`] for another rank, [`Error::Shape`] for no tokens, [`Error::NonFinite`] for NaN, +∞ or nothing but −∞.
    pub fn next(&mut self, logits: &Tensor) -> Result<u32> {
        let logits = logits.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let wrong = |token: usize| Error::NonFinite {
            place: format!("logit of vocabulary id {token}"),
            value: f64::from(logits[token]),
            cause: String::new(),
        };
        // −∞ masks a token.
        if let Some(bad) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
            return Err(wrong(bad));
        }
        let best = (0..logits.len()).reduce(|best, token| if logits[token] > logits[best] { token } else { best });
        let best = best.ok_or_else(|| Error::shape("logits", "at least one token", "none"))?;
        if !logits[best].is_finite() {
            return Err(wrong(best));
        }
        if self.temperature == 0.0 {
            return Ok(best as u32);
        }
        // Differences to the best, so that no temperature overflows.
        let weight = |logit: f32| (f64::from(logit - logits[best]) / self.temperature).exp();
        let mut ranked: Vec<(f64, u32)> = logits.iter().map(|&logit| weight(logit)).zip(0..).collect();
        let mut total: f64 = ranked.iter().map(|&(weight, _)| weight).sum();
        if self.top_p < 1.0 {
            ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let (mut held, enough) = (0.0, self.top_p * total);
            let last = ranked.iter().position(|&(weight, _)| {
                held += weight;
                held >= enough
            });
            ranked.truncate(last.map_or(ranked.len(), |last| last + 1));
            total = ranked.iter().map(|&(weight, _)| weight).sum();
        }
        let mut draw = self.rng.random::<f64>() * total;
        let drawn = ranked.iter().find(|&&(weight, _)| {
            draw -= weight;
            draw < 0.0
        });
        // Rounding can leave the draw a hair past the last token.
        Ok(drawn.map_or(best as u32, |&(_, token)| token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn draw(sampler: &mut Sampler, logits: [f32; 4], times: usize) -> Vec<u32> {
        let logits = Tensor::new(&logits, &Device::Cpu).unwrap();
        (0..times).map(|_| sampler.next(&logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_best_and_seeds_repeat() {
        assert_eq!(draw(&mut Sampler::new(0.0, 1.0, 1).unwrap(), [0.0, 3.0, 1.0, 2.0], 3), [1; 3]);
        let [first, second] = [(); 2].map(|()| draw(&mut Sampler::new(1.0, 1.0, 7).unwrap(), [0.0; 4], 50));
        assert_eq!(first, second);
        assert!((0..4).all(|token| first.contains(&token)));
    }

    #[test]
    fn the_nucleus_leaves_unlikely_tokens_out() {
        let drawn = draw(&mut Sampler::new(1.0, 0.7, 3).unwrap(), [2.0, 2.0, 0.0, -9.0], 200);
        assert!(drawn.contains(&0) && drawn.contains(&1) && !drawn.contains(&2) && !drawn.contains(&3));
    }

    #[test]
    fn the_smallest_temperature_is_greedy() {
        assert_eq!(draw(&mut Sampler::new(1e-300, 1.0, 3).unwrap(), [2.0, 2.5, 0.0, -9.0], 5), [1; 5]);
        assert_eq!(
            draw(&mut Sampler::new(1.0, 0.9, 3).unwrap(), [f32::MAX, f32::MIN, f32::NEG_INFINITY, 0.0], 5),
            [0; 5]
        );
        for bad in [[0.0, f32::NAN], [0.0, f32::INFINITY], [f32::NEG_INFINITY; 2]] {
            let logits = Tensor::new(&bad, &Device::Cpu).unwrap();
            for temperature in [0.0, 1.0] {
                let error = Sampler::new(temperature, 1.0, 0).unwrap().next(&logits).unwrap_err();
                assert!(matches!(error, Error::NonFinite { .. }) && !error.is_user_error(), "{error}");
            }
        }
    }

    #[test]
    fn parameters_outside_their_domain_are_errors() {
        for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, f64::NAN)] {
            assert!(Sampler::new(temperature, top_p, 0).is_err());
        }
    }
}
