//! Source mass: how much each token asks for, the share of its gate scores that its own top-k hold, in `[0, 1]`.
//!
//! `mass = Σ top-k gate scores / Σ all gate scores`. Where capacity falls short, the mass decides which tokens lose.
//!
//! Knows nothing of capacities or routers.

use crate::routing::scores::Scores;

/// Source mass of every token, `[tokens]`.
#[derive(Clone, Debug)]
pub(crate) struct Mass(Vec<f32>);

impl Mass {
    /// The share of each token's gate scores that its `top_k` best selection scores hold; 0 where all are masked.
    pub(crate) fn new(scores: &Scores, top_k: usize) -> Self {
        Self((0..scores.tokens()).map(|token| row_mass(scores.gate(token), scores.selection(token), top_k)).collect())
    }

    /// Mass per token.
    pub(crate) fn values(&self) -> &[f32] {
        &self.0
    }
}

/// Source mass of one row. Among equal selection scores the larger gate score counts, and values are summed from the best
/// down, so that the sum does not depend on the order of the experts.
pub(crate) fn row_mass(gate: &[f32], selection: &[f32], top_k: usize) -> f32 {
    let mut best: Vec<(f32, f32)> = selection.iter().copied().zip(gate.iter().copied()).collect();
    let falling = |a: &(f32, f32), b: &(f32, f32)| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1));
    if (1..best.len()).contains(&top_k) {
        best.select_nth_unstable_by(top_k - 1, falling);
        best.truncate(top_k);
        best.sort_unstable_by(falling);
    }
    let all: f32 = gate.iter().sum();
    let top: f32 = best.iter().map(|&(_, gate)| gate).sum();
    if all > 0.0 { (top / all).min(1.0) } else { 0.0 }
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
