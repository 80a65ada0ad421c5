//! What keeps a gate in training from sending everything to the same experts: two losses to add to the model's own. The update rule that needs
//! no loss is [`LossFreeBias`](phase_moe::routing::LossFreeBias), see [`Moe::set_selection_bias`](crate::Moe::set_selection_bias).

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Int, Tensor, TensorData};
use phase_moe::routing::ScoreFunction;

use crate::routed::Routed;

/// Load-balancing loss of GShard and Switch (arXiv 2101.03961, eq. 4, for k slots):
/// `experts · Σ_e (slots of e / slots) · mean score of e`; 1 when balanced. One number; gradients reach the gate.
/// Slots are those chosen before any drop, as published: a full expert still shows how many wanted it. Padding counts
/// nowhere; without tokens the loss is 0.
pub fn load_balancing_loss(routed: &Routed) -> Tensor<1> {
    let Some(logits) = live_logits(routed) else { return zero(routed) };
    let experts = logits.dims()[1];
    let mut share = vec![0f32; experts];
    routed
        .assignment
        .selection()
        .filter_map(|expert| usize::try_from(expert).ok())
        .for_each(|expert| share[expert] += 1.0);
    let slots = share.iter().sum::<f32>().max(1.0);
    let share = Tensor::<1>::from_data(TensorData::new(share, [experts]), &logits.device()) / slots;
    let scores = match routed.scoring.function {
        ScoreFunction::Softmax | ScoreFunction::SparseMixer { .. } => softmax(logits, 1),
        ScoreFunction::Sigmoid => {
            let scores = sigmoid(logits);
            scores.clone() / scores.sum_dim(1)
        }
    };
    (scores.mean_dim(0).squeeze_dim::<1>(0) * share).sum() * experts as f32
}

/// Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): the mean over tokens of `log(Σ_e exp(logit))²`. Keeps logits small.
/// Padding does not count; without tokens the loss is 0.
pub fn router_z_loss(routed: &Routed) -> Tensor<1> {
    let Some(logits) = live_logits(routed) else { return zero(routed) };
    let largest = logits.clone().detach().max_dim(1);
    let sum = (logits - largest.clone()).exp().sum_dim(1).log() + largest;
    sum.square().mean()
}

/// Logits of the tokens that are not padding; `None` when there are none.
fn live_logits(routed: &Routed) -> Option<Tensor<2>> {
    let Some(padding) = &routed.padding else {
        return (routed.assignment.tokens() > 0).then(|| routed.logits.clone());
    };
    let rows: Vec<i32> = padding.iter().zip(0..).filter(|(pad, _)| !**pad).map(|(_, row)| row).collect();
    let count = rows.len();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &routed.logits.device());
    (count > 0).then(|| routed.logits.clone().select(0, rows))
}

fn zero(routed: &Routed) -> Tensor<1> {
    Tensor::zeros([1], &routed.logits.device())
}
