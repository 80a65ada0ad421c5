//! What keeps a gate in training from sending everything to the same experts.
//!
//! Two losses to add to the model's own; the update rule that needs no loss is [`LossFreeBias`](crate::routing::layer::LossFreeBias). Knows nothing of
//! optimisers.
//!
//! A step of training, and what is saved of it: all parameters are variables of the map, the selection bias too.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
//! use phase_moe::{LayerState, MoeLayer, MoeSpec, Scoring};
//! use phase_moe::layer::{LossFreeBias, load_balancing_loss, router_z_loss};
//!
//! let spec = MoeSpec { scoring: Scoring::sigmoid(), selection_bias: true, ..MoeSpec::new(16, 8, 2, 32)? };
//! let vars = VarMap::new();
//! let mut layer = MoeLayer::load(&spec, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("mlp"))?;
//! let mut optimiser = AdamW::new_lr(vars.all_vars(), 1e-2)?;
//! let mut bias = LossFreeBias::new(spec.experts, 0.001)?;
//! let input = Tensor::randn(0f32, 1.0, (64, 16), &Device::Cpu)?;
//! for _ in 0..3 {
//!     let (output, routed) = layer.route(&input, &mut LayerState::default())?;
//!     let loss = (output - &input)?.sqr()?.mean_all()?;
//!     let balance = (load_balancing_loss(&routed)? * 0.01)?;
//!     optimiser.backward_step(&((loss + balance)? + (router_z_loss(&routed)? * 0.001)?)?)?;
//!     bias.update(&routed.assignment.load())?;
//!     layer.set_selection_bias(bias.values())?;
//! }
//! let saved = vars.data().lock().unwrap()["mlp.gate.e_score_correction_bias"].to_vec1::<f32>()?;
//! assert_eq!(saved, bias.values());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};

use super::routed::Routed;
use crate::error::Result;
use crate::routing::assignment::EMPTY;
use crate::routing::scores::ScoreFunction;

/// Load-balancing loss of GShard and Switch (arXiv 2101.03961, eq. 4, for k slots):
/// `experts · Σ_e (slots of e / slots) · mean score of e`; 1 when balanced. A scalar; gradients reach the gate.
/// Slots are those chosen before any drop, as published: a full expert still shows how many wanted it. Padding counts
/// nowhere; without tokens the loss is 0.
///
/// # Errors
/// [`Error::Candle`](crate::error::Error::Candle) from the tensor operations.
pub fn load_balancing_loss(routed: &Routed) -> Result<Tensor> {
    let Some(logits) = live_logits(routed)? else { return zero(routed) };
    let (experts, selection) = (routed.assignment.experts(), routed.assignment.raw_selection());
    let mut share = vec![0f32; experts];
    selection.iter().filter(|&&expert| expert != EMPTY).for_each(|&expert| share[usize::from(expert)] += 1.0);
    let slots = share.iter().sum::<f32>().max(1.0);
    let share = (Tensor::from_vec(share, experts, logits.device())? / f64::from(slots))?;
    let scores = match routed.scoring.function {
        ScoreFunction::Softmax | ScoreFunction::SparseMixer { .. } => softmax(&logits, D::Minus1)?,
        ScoreFunction::Sigmoid => {
            let scores = sigmoid(&logits)?;
            scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?
        }
    };
    Ok(((scores.mean(0)? * share)?.sum_all()? * experts as f64)?)
}

/// Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): the mean over tokens of `log(Σ_e exp(logit))²`. Keeps logits small.
/// Padding does not count; without tokens the loss is 0.
///
/// # Errors
/// [`Error::Candle`](crate::error::Error::Candle) from the tensor operations.
pub fn router_z_loss(routed: &Routed) -> Result<Tensor> {
    let Some(logits) = live_logits(routed)? else { return zero(routed) };
    Ok(logits.log_sum_exp(D::Minus1)?.sqr()?.mean_all()?)
}

/// Logits of the tokens that are not padding; `None` when there are none.
fn live_logits(routed: &Routed) -> Result<Option<Tensor>> {
    let rows: Vec<u32> = match &routed.padding {
        Some(padding) => padding.iter().zip(0..).filter(|(pad, _)| !**pad).map(|(_, row)| row).collect(),
        None if routed.assignment.tokens() > 0 => return Ok(Some(routed.logits.clone())),
        None => Vec::new(),
    };
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(routed.logits.index_select(&Tensor::new(rows, routed.logits.device())?, 0)?))
}

fn zero(routed: &Routed) -> Result<Tensor> {
    Ok(Tensor::zeros((), routed.logits.dtype(), routed.logits.device())?)
}
