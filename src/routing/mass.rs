//! Source mass: how much each token asks for, the share of its gate scores that its own top-k hold, in `[0, 1]`.
//!
//! `mass = Σ top-k gate scores / Σ all gate scores`. Where capacity falls short, the mass decides who loses.
//!
//! Knows nothing of capacities or routers.

use crate::routing::scores::Scores;
use crate::routing::topk::select_top_k;

/// Source mass of every token, `[tokens]`.
#[derive(Clone, Debug)]
pub struct Mass(Vec<f32>);

impl Mass {
    /// The share of each token's gate scores that its `top_k` best selection scores hold; 0 where all are masked.
    pub fn new(scores: &Scores, top_k: usize) -> Self {
        let mut chosen = vec![0u16; top_k];
        Self(
            (0..scores.tokens())
                .map(|token| {
                    let kept = select_top_k(scores.selection(token), &mut chosen);
                    let gate = scores.gate(token);
                    let all: f32 = gate.iter().sum();
                    let top: f32 = chosen[..kept].iter().map(|&expert| gate[usize::from(expert)]).sum();
                    if all > 0.0 { (top / all).min(1.0) } else { 0.0 }
                })
                .collect(),
        )
    }

    /// Mass per token.
    pub fn values(&self) -> &[f32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::{logits::Logits, scores::Scoring};

    #[test]
    fn mass_is_the_share_of_the_top_k() {
        let values = [0.0, 0.0, 0.0, 0.0, 50.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0];
        let mut values = values;
        values[8..].fill(f32::NEG_INFINITY);
        let scores = Scoring::softmax().scores(&Logits::new(&values, 3, 4).unwrap(), None).unwrap();
        let mass = Mass::new(&scores, 2);
        assert_eq!(mass.values()[0], 0.5);
        assert!((mass.values()[1] - 1.0).abs() < 1e-6);
        assert_eq!(mass.values()[2], 0.0);
    }
}
