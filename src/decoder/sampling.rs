//! From the logits of the last position to the next token: greedy, or drawn with temperature and nucleus.

use candle_core::Tensor;
use candle_nn::ops::softmax_last_dim;
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
    /// [`Error::Candle`] for another rank.
    pub fn next(&mut self, logits: &Tensor) -> Result<u32> {
        let logits = logits.to_dtype(candle_core::DType::F32)?;
        if self.temperature == 0.0 {
            return Ok(logits.argmax(0)?.to_scalar()?);
        }
        let shares = softmax_last_dim(&(logits / self.temperature)?)?.to_vec1::<f32>()?;
        let mut ranked: Vec<(f32, u32)> = shares.into_iter().zip(0..).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut held = 0.0;
        let nucleus = ranked.iter().position(|&(share, _)| {
            held += f64::from(share);
            held >= self.top_p
        });
        ranked.truncate(nucleus.map_or(ranked.len(), |last| last + 1));
        let mut draw = self.rng.random::<f64>() * ranked.iter().map(|&(share, _)| f64::from(share)).sum::<f64>();
        let drawn = ranked.iter().find(|&&(share, _)| {
            draw -= f64::from(share);
            draw < 0.0
        });
        Ok(drawn.or(ranked.last()).map_or(0, |&(_, token)| token))
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
    fn parameters_outside_their_domain_are_errors() {
        for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, f64::NAN)] {
            assert!(Sampler::new(temperature, top_p, 0).is_err());
        }
    }
}
