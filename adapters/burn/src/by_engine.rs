//! A layer's forward pass by the expert engine, over tensors of Burn's CPU backend Flex: weights and activations are read where they lie.
//!
//! Knows nothing of gradients: a layer comes here only where nothing has to be differentiated.

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::{DType, Tensor, TensorData, bf16, f16};
use burn_flex::FlexTensor;
use phase_moe::experts::ProjectionWeights;
use phase_moe::{DispatchPlan, Dtype, Engine, ExpertWeights, Matrix, MoeSpec, Result, Work};

use crate::expert::{Expert, Projection};
use crate::gate::{Gate, numbers};
use crate::layer::Moe;

/// A tensor `[rows, columns]` of Flex, held: row by row, in a type that the engine reads.
pub(crate) struct Memory {
    tensor: FlexTensor,
    dtype: Dtype,
    shape: [usize; 2],
    bytes: Range<usize>,
}

impl Memory {
    /// `None` for a tensor elsewhere, under autodiff or of another type. One that does not lie row by row is copied; no weight of a layer
    /// that was made or loaded here is.
    pub(crate) fn of(tensor: Tensor<2>) -> Option<Self> {
        let dtype = match tensor.dtype() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            _ => return None,
        };
        let shape = tensor.dims();
        let tensor = tensor.try_into_primitive::<Flex>().ok()?;
        let tensor = if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() };
        let size = dtype.row_bytes(1)?;
        let start = tensor.layout().start_offset() * size;
        Some(Self { tensor, dtype, shape, bytes: start..start + shape[0] * shape[1] * size })
    }

    fn matrix(&self) -> Result<Matrix<'_>> {
        let [rows, columns] = self.shape;
        let bytes = self.tensor.bytes().get(self.bytes.clone()).unwrap_or_default();
        Matrix::new(self.dtype, rows, columns, bytes)
    }
}

/// Logits `[tokens, experts]`, row-major; rounded to the tokens' type before the bias, as Burn's product gives them. `None` where the gate's weight
/// is elsewhere.
pub(crate) fn logits(engine: &Engine, tokens: &Memory, gate: &Gate, spec: &MoeSpec) -> Result<Option<Vec<f32>>> {
    let Some(weight) = Memory::of(gate.weight.val()) else { return Ok(None) };
    let mut logits = vec![0.0; tokens.shape[0] * spec.experts];
    engine.product(tokens.matrix()?, weight.matrix()?, &mut logits)?;
    match tokens.dtype {
        Dtype::Bf16 => logits.iter_mut().for_each(|logit| *logit = bf16::from_f32(*logit).to_f32()),
        Dtype::F16 => logits.iter_mut().for_each(|logit| *logit = f16::from_f32(*logit).to_f32()),
        _ => {}
    }
    if let Some(bias) = gate.bias() {
        for logits in logits.chunks_exact_mut(spec.experts) {
            logits.iter_mut().zip(&bias).for_each(|(logit, bias)| *logit += bias);
        }
    }
    Ok(Some(logits))
}

/// An expert's matrices, held.
struct Held {
    gate: Option<HeldProjection>,
    up: HeldProjection,
    down: HeldProjection,
}

struct HeldProjection {
    weight: Memory,
    bias: Option<Vec<f32>>,
}

impl HeldProjection {
    fn new(projection: &Projection) -> Option<Self> {
        let bias = projection.bias.as_ref().map(|bias| numbers(bias.val()));
        Some(Self { weight: Memory::of(projection.weight.val())?, bias })
    }

    fn view(&self) -> Result<ProjectionWeights<'_>> {
        Ok(ProjectionWeights { weight: self.weight.matrix()?, bias: self.bias.as_deref() })
    }
}

impl Held {
    /// `None` where a weight is elsewhere.
    fn new(expert: &Expert) -> Option<Self> {
        let gate = match &expert.gate_proj {
            Some(gate) => Some(HeldProjection::new(gate)?),
            None => None,
        };
        Some(Self { gate, up: HeldProjection::new(&expert.up_proj)?, down: HeldProjection::new(&expert.down_proj)? })
    }

    fn view(&self, spec: &MoeSpec) -> Result<ExpertWeights<'_>> {
        let gate = self.gate.as_ref().map(HeldProjection::view).transpose()?;
        ExpertWeights::new(spec.activation, gate, self.up.view()?, self.down.view()?)
    }
}

/// What every token meets beside its experts, and what it counts for each.
struct HeldShared {
    expert: Held,
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

/// The weighted sum over slots and what the shared expert adds, `[tokens, hidden]` in `f32`; `None` where a weight that is used is elsewhere or under
/// autodiff.
pub(crate) fn forward(engine: &Engine, tokens: &Memory, layer: &Moe, plan: &DispatchPlan) -> Result<Option<Tensor<2>>> {
    let (spec, [rows, hidden], input) = (layer.spec(), tokens.shape, tokens.matrix()?);
    let mut shared = None;
    if let Some(expert) = &layer.shared_expert {
        let Some(expert) = Held::new(expert) else { return Ok(None) };
        let mut weights = vec![1.0; rows];
        if let Some(gate) = &layer.shared_expert_gate {
            let Some(gate) = Memory::of(gate.weight.val()) else { return Ok(None) };
            engine.product(input, gate.matrix()?, &mut weights)?;
            weights.iter_mut().for_each(|weight| *weight = 1.0 / (1.0 + (-*weight).exp()));
        }
        shared = Some(HeldShared { expert, tokens: (0..rows as u32).collect(), weights });
    }
    let shared = match &shared {
        Some(HeldShared { expert, tokens, weights }) => Some(Work { expert: expert.view(spec)?, tokens, weights }),
        None => None,
    };
    let mut output = vec![0.0; rows * hidden];
    let mut busy = plan.busy_experts().peekable();
    match &layer.settings.cached {
        None => {
            let held = plan.busy_experts().map(|(expert, _)| Held::new(&layer.experts[expert]));
            let Some(held) = held.collect::<Option<Vec<_>>>() else { return Ok(None) };
            let mut work = Vec::with_capacity(held.len() + 1);
            for (held, (_, range)) in held.iter().zip(busy) {
                work.push(work_of(plan, held.view(spec)?, range));
            }
            work.extend(shared);
            engine.forward(input, &work, &mut output)?;
        }
        Some(cached) => {
            if busy.peek().is_none() {
                engine.add(input, shared.as_slice(), &mut output)?;
            }
            cached.run(spec, plan, |group| {
                let mut work: Vec<_> = group
                    .iter()
                    .zip(busy.by_ref())
                    .map(|(&(_, expert), (_, range))| work_of(plan, expert, range))
                    .collect();
                // After all others, as where they are held.
                work.extend(shared.filter(|_| busy.peek().is_none()));
                engine.add(input, &work, &mut output)
            })?;
        }
    }
    Ok(Some(Tensor::from_data(TensorData::new(output, [rows, hidden]), &layer.device())))
}

fn work_of<'a>(plan: &'a DispatchPlan, expert: ExpertWeights<'a>, range: Range<usize>) -> Work<'a> {
    Work { expert, tokens: &plan.tokens()[range.clone()], weights: &plan.weights()[range] }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// Weights are read where Flex has them: the very bytes of the tensor, from the first row on.
    #[test]
    fn nothing_is_copied() {
        let tensor =
            Tensor::<2>::from_data(TensorData::new((0..12).map(|at| at as f32).collect(), [4, 3]), &Device::flex());
        let place = |tensor: &Tensor<2>| tensor.clone().try_into_primitive::<Flex>().unwrap().bytes().as_ptr();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let tensor = tensor.clone().cast(dtype);
            let memory = Memory::of(tensor.clone()).unwrap();
            assert_eq!((memory.tensor.bytes().as_ptr(), memory.bytes.start), (place(&tensor), 0));
            // Some of the rows lie as they are, further on.
            let part = Memory::of(tensor.clone().slice([1..3, 0..3])).unwrap();
            assert_eq!((part.tensor.bytes().as_ptr(), part.shape), (place(&tensor), [2, 3]));
            assert_eq!(part.bytes, memory.bytes.len() / 4..memory.bytes.len() / 4 * 3);
        }
        assert!(Memory::of(tensor.clone().cast(DType::F64)).is_none());
        assert!(Memory::of(tensor.autodiff()).is_none());
    }
}
