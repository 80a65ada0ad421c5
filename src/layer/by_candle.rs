//! A layer's forward pass by Candle's operations: rows to their experts, experts' rows back, weighted and summed.
//!
//! Every operation here has a backward pass, and none takes a view of a stacked variable: this is the path that trains,
//! that runs on any device, and the oracle for faster ones. Knows nothing of how slots were assigned.

use std::ops::Range;

use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};
use rayon::prelude::*;

use super::check::ROUTING_DTYPE;
use super::expert::Expert;
use super::shared::Shared;
use crate::error::{Error, Result};
use crate::routing::assignment::{Assignment, EMPTY};
use crate::routing::plan::DispatchPlan;
use crate::routing::scores::{ScoreFunction, Scoring};

/// Combine weight of each sorted slot of `plan`, `[kept, 1]` f32: as the assignment has them or, where `logits` are part of
/// a graph, computed from the logits once more with operations that gradients pass through.
pub(super) fn slot_weights(
    logits: &Tensor,
    assignment: &Assignment,
    plan: &DispatchPlan,
    scoring: Scoring,
) -> Result<Tensor> {
    let (kept, device) = (plan.tokens().len(), logits.device());
    // Nor is there anything to differentiate where no slot is, and Candle has no softmax of no rows.
    if !logits.track_op() || kept == 0 {
        return Ok(Tensor::from_slice(plan.weights(), (kept, 1), device)?);
    }
    let (tokens, width) = (assignment.tokens(), assignment.width());
    let selection = assignment.raw_selection();
    let ids: Vec<u32> = selection.iter().map(|&expert| if expert == EMPTY { 0 } else { expert.into() }).collect();
    let filled: Vec<f32> = selection.iter().map(|&expert| if expert == EMPTY { 0.0 } else { 1.0 }).collect();
    let scores = match scoring.function {
        ScoreFunction::Softmax => softmax(logits, D::Minus1)?,
        ScoreFunction::Sigmoid => sigmoid(logits)?,
        function @ ScoreFunction::SparseMixer { .. } => {
            // In training its picks are drawn and its gradient is an estimate of its own.
            return Err(Error::parameter("score function under `Var`s", format!("{function:?}"), "softmax or sigmoid"));
        }
    };
    let chosen = scores.gather(&Tensor::from_vec(ids, (tokens, width), device)?, 1)?;
    let chosen = (chosen * Tensor::from_vec(filled, (tokens, width), device)?)?;
    let weights = match scoring.normalize {
        // A token without any slot has sum 0 and no slot that would read its weight, and one whose scores are all 0 has weights of 0. What they are
        // divided by has a square that is a number, by which its gradient is divided.
        true => chosen.broadcast_div(&chosen.sum_keepdim(1)?.maximum(LEAST_SUM)?)?,
        false => chosen,
    };
    let weights = (weights * f64::from(scoring.scale))?.reshape((tokens * width, 1))?;
    Ok(weights.index_select(&Tensor::from_slice(plan.slots(), kept, device)?, 0)?)
}

/// Scores of a token that sum to less are taken for this together: the square of a smaller number is none in `f32`.
const LEAST_SUM: f64 = 1e-18;

/// The weighted sum over slots and what the shared expert adds, `[tokens, hidden]` in `f32`.
pub(super) fn forward(
    tokens: &Tensor,
    experts: &[Expert],
    shared: Option<&Shared>,
    plan: &DispatchPlan,
    weights: &Tensor,
) -> Result<Tensor> {
    let routed = routed(tokens, experts, plan, weights)?;
    match shared {
        Some(shared) => Ok((routed + shared.forward(tokens)?)?),
        None => Ok(routed),
    }
}

/// The weighted sum over slots; tokens without slots get 0.
fn routed(tokens: &Tensor, experts: &[Expert], plan: &DispatchPlan, weights: &Tensor) -> Result<Tensor> {
    let (device, sum) = (tokens.device(), Tensor::zeros(tokens.shape(), ROUTING_DTYPE, tokens.device())?);
    let run = |(expert, range): (usize, Range<usize>)| -> Result<Tensor> {
        let rows = Tensor::from_slice(&plan.tokens()[range.clone()], range.len(), device)?;
        Ok(experts[expert].run(&tokens.index_select(&rows, 0)?)?.to_dtype(ROUTING_DTYPE)?)
    };
    // On the CPU a thread per expert beats threads within products this small. Other devices order their own work, and
    // training brings its own threads, one per part of a batch.
    let busy: Vec<_> = plan.busy_experts().collect();
    let outputs: Vec<Tensor> = match device.is_cpu() && !tokens.track_op() {
        true => busy.into_par_iter().map(run).collect::<Result<_>>()?,
        false => busy.into_iter().map(run).collect::<Result<_>>()?,
    };
    if outputs.is_empty() {
        return Ok(sum);
    }
    let outputs = Tensor::cat(&outputs, 0)?.broadcast_mul(weights)?;
    Ok(sum.index_add(&Tensor::from_slice(plan.tokens(), plan.tokens().len(), device)?, &outputs, 0)?)
}
