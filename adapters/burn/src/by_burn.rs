//! A layer's forward pass by Burn's operations: rows to their experts, experts' rows back, weighted and summed.
//!
//! Every operation here has a backward pass: this is the way that trains and that runs on any device. Knows nothing of how slots were assigned.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use phase_moe::routing::ScoreFunction;
use phase_moe::{Assignment, DispatchPlan, Error, Result, Scoring};

use crate::layer::Moe;

/// Combine weight of each sorted slot of `plan`, `[kept, 1]` f32: as the assignment has them or, under autodiff, computed from the logits once
/// more with operations that gradients pass through.
pub(crate) fn slot_weights(
    logits: &Tensor<2>,
    assignment: &Assignment,
    plan: &DispatchPlan,
    scoring: Scoring,
) -> Result<Tensor<2>> {
    let (kept, device) = (plan.tokens().len(), logits.device());
    if !logits.is_autodiff() || kept == 0 {
        return Ok(Tensor::from_data(TensorData::new(plan.weights().to_vec(), [kept, 1]), &device));
    }
    let (tokens, width) = (assignment.tokens(), assignment.width());
    let selection: Vec<i32> = assignment.selection().collect();
    let filled: Vec<f32> = selection.iter().map(|&expert| if expert < 0 { 0.0 } else { 1.0 }).collect();
    let ids: Vec<i32> = selection.iter().map(|&expert| expert.max(0)).collect();
    let scores = match scoring.function {
        ScoreFunction::Softmax => softmax(logits.clone(), 1),
        ScoreFunction::Sigmoid => sigmoid(logits.clone()),
        function @ ScoreFunction::SparseMixer { .. } => {
            // In training its picks are drawn and its gradient is an estimate of its own.
            let (name, got) = ("score function under autodiff", format!("{function:?}"));
            return Err(Error::Parameter { name, got, expected: "softmax or sigmoid".into() });
        }
    };
    let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [tokens, width]), &device);
    let filled: Tensor<2> = Tensor::from_data(TensorData::new(filled, [tokens, width]), &device);
    let chosen = scores.gather(1, ids) * filled;
    let weights = match scoring.normalize {
        // A token without any slot has sum 0 and no slot that would read its weight.
        true => chosen.clone() / chosen.sum_dim(1).clamp_min(f32::MIN_POSITIVE),
        false => chosen,
    };
    let slots = indices(plan.slots(), &device);
    Ok((weights * scoring.scale).reshape([tokens * width, 1]).select(0, slots))
}

/// The weighted sum over slots and what the shared expert adds, `[tokens, hidden]` in `f32`.
pub(crate) fn forward(input: Tensor<2>, layer: &Moe, plan: &DispatchPlan, weights: Tensor<2>) -> Tensor<2> {
    let (activation, device) = (layer.spec().activation, input.device());
    let mut sum = Tensor::<2>::zeros(input.dims(), (&device, DType::F32));
    let run = |(expert, range): (usize, std::ops::Range<usize>)| {
        let rows = input.clone().select(0, indices(&plan.tokens()[range], &device));
        layer.experts[expert].forward(activation, rows).cast(DType::F32)
    };
    let outputs: Vec<Tensor<2>> = plan.busy_experts().map(run).collect();
    if !outputs.is_empty() {
        let outputs = Tensor::cat(outputs, 0) * weights;
        sum = sum.select_assign(0, indices(plan.tokens(), &device), outputs, IndexingUpdateOp::Add);
    }
    let Some(shared) = &layer.shared_expert else { return sum };
    let output = shared.forward(activation, input.clone()).cast(DType::F32);
    sum + match &layer.shared_expert_gate {
        Some(gate) => output * sigmoid(gate.forward(input).cast(DType::F32)),
        None => output,
    }
}

fn indices(values: &[u32], device: &burn::tensor::Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
