//! What keeps a gate in training from sending everything to the same experts.
//!
//! Two losses to add to the model's own, and one update rule that needs no loss. Knows nothing of optimisers.
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
use crate::error::{Error, Result};
use crate::routing::assignment::EMPTY;
use crate::routing::scores::ScoreFunction;

/// Load-balancing loss of GShard and Switch (arXiv 2101.03961, eq. 4, for k slots):
/// `experts · Σ_e (slots of e / slots) · mean score of e`; 1 when balanced. A scalar; gradients reach the gate.
/// Slots are those chosen before any drop, as published: a full expert still shows how many wanted it. Padding counts
/// nowhere; without tokens the loss is 0.
///
/// # Errors
/// [`Error::Candle`] from the tensor operations.
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
/// [`Error::Candle`] from the tensor operations.
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

/// Loss-free balancing (arXiv 2408.15664): a selection bias per expert that rises while the expert has less than its share
/// and falls while it has more, by a constant rate.
#[derive(Clone, Debug, PartialEq)]
pub struct LossFreeBias {
    bias: Vec<f32>,
    rate: f32,
}

impl LossFreeBias {
    /// Zero bias for `experts`, moved by `rate` at each update (the paper uses 0.001).
    ///
    /// # Errors
    /// [`Error::Parameter`] for a rate that is not positive and finite.
    pub fn new(experts: usize, rate: f32) -> Result<Self> {
        if !(rate.is_finite() && rate > 0.0) {
            return Err(Error::parameter("bias update rate", rate, "a positive finite number"));
        }
        Ok(Self { bias: vec![0.0; experts], rate })
    }

    /// The same from the bias that a layer was loaded with, to go on where its training ended.
    ///
    /// # Errors
    /// As [`LossFreeBias::new`], and for values that are not finite.
    pub fn resume(values: &[f32], rate: f32) -> Result<Self> {
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::parameter("selection bias", bad, "finite numbers"));
        }
        Ok(Self { bias: values.to_vec(), ..Self::new(values.len(), rate)? })
    }

    /// Moves each bias against the load that its expert had in the last batch.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not one load per expert.
    pub fn update(&mut self, load: &[u32]) -> Result<()> {
        if load.len() != self.bias.len() {
            return Err(Error::shape(
                "expert load",
                format!("{} values", self.bias.len()),
                format!("{} values", load.len()),
            ));
        }
        let mean = load.iter().map(|&load| f64::from(load)).sum::<f64>() / load.len().max(1) as f64;
        for (bias, &load) in self.bias.iter_mut().zip(load) {
            let lack = mean - f64::from(load);
            *bias += if lack > 0.0 {
                self.rate
            } else if lack < 0.0 {
                -self.rate
            } else {
                0.0
            };
        }
        Ok(())
    }

    /// The bias, for [`MoeLayer::set_selection_bias`](super::MoeLayer::set_selection_bias).
    pub fn values(&self) -> &[f32] {
        &self.bias
    }
}
