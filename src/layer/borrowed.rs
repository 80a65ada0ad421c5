//! Candle's tensors as the slices that the expert engine reads, and a forward pass over them: nothing is copied but biases.
//!
//! Knows nothing of gradients: a layer comes here only where nothing has to be differentiated.

use std::borrow::Cow;

use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, DType, Layout, Storage, StorageRef, Tensor};

use super::ROUTING_DTYPE;
use super::cached::CachedExperts;
use super::expert::Expert;
use super::packed::Packed;
use super::projection::{Projection, Weight};
use super::shared::Shared;
use crate::error::{Error, Result};
use crate::experts::engine::{self, Engine, ExpertWeights, Work};
use crate::experts::matrix::{Dtype, Matrix};
use crate::routing::plan::DispatchPlan;
use crate::spec::MoeSpec;

/// A matrix of Candle's, held while its memory is read.
pub(super) enum Borrowed<'a> {
    Dense(StorageRef<'a>, &'a Layout),
    Quantized { dtype: Dtype, shape: [usize; 2], bytes: Cow<'a, [u8]> },
    Packed(&'a Packed),
}

impl<'a> Borrowed<'a> {
    /// A matrix of floats.
    pub(super) fn tensor(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        Ok(Self::Dense(storage, layout))
    }

    fn weight(weight: &'a Weight) -> Result<Self> {
        match weight {
            Weight::Dense(tensor) => Self::tensor(tensor),
            Weight::Quantized(tensor) => {
                let dtype = dtype(tensor.dtype()).ok_or_else(|| refused(format!("{:?}", tensor.dtype())))?;
                Ok(Self::Quantized { dtype, shape: tensor.shape().dims2()?.into(), bytes: tensor.data()? })
            }
            Weight::Packed(packed) => Ok(Self::Packed(packed)),
        }
    }

    /// The matrix as the engine takes it.
    pub(super) fn matrix(&self) -> Result<Matrix<'_>> {
        match self {
            Self::Dense(storage, layout) => {
                let (rows, columns) = layout.shape().dims2()?;
                let Some((start, end)) = layout.contiguous_offsets() else {
                    return Err(refused("a tensor whose rows do not follow each other"));
                };
                match &**storage {
                    Storage::Cpu(CpuStorage::F32(values)) => Matrix::from_f32(rows, columns, &values[start..end]),
                    Storage::Cpu(CpuStorage::F16(values)) => Matrix::from_f16(rows, columns, &values[start..end]),
                    Storage::Cpu(CpuStorage::BF16(values)) => Matrix::from_bf16(rows, columns, &values[start..end]),
                    _ => Err(refused("another dtype or device")),
                }
            }
            Self::Quantized { dtype, shape: [rows, columns], bytes } => Matrix::new(*dtype, *rows, *columns, bytes),
            Self::Packed(packed) => packed.matrix(),
        }
    }
}

fn refused(got: impl ToString) -> Error {
    Error::shape("weight", "one that the expert engine reads", got)
}

/// The engine's dtype of a quantised tensor.
fn dtype(dtype: GgmlDType) -> Option<Dtype> {
    match dtype {
        GgmlDType::F32 => Some(Dtype::F32),
        GgmlDType::F16 => Some(Dtype::F16),
        GgmlDType::BF16 => Some(Dtype::Bf16),
        GgmlDType::Q8_0 => Some(Dtype::Q8_0),
        GgmlDType::Q4K => Some(Dtype::Q4K),
        GgmlDType::Q6K => Some(Dtype::Q6K),
        _ => None,
    }
}

/// Whether the engine can read a tensor, and nobody wants its gradient.
pub(super) fn fits(tensor: &Tensor) -> bool {
    let is_float = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
    is_float && tensor.is_contiguous() && tensor.device().is_cpu() && !tensor.track_op()
}

/// The same of a projection.
pub(super) fn projection_fits(projection: &Projection) -> bool {
    let weight = match projection.weight() {
        Weight::Dense(tensor) => fits(tensor),
        Weight::Quantized(tensor) => tensor.device().is_cpu() && dtype(tensor.dtype()).is_some(),
        Weight::Packed(_) => true,
    };
    weight && projection.bias().is_none_or(|bias| !bias.track_op())
}

/// An expert's matrices, held.
struct BorrowedExpert<'a> {
    expert: &'a Expert,
    gate: Option<BorrowedProjection<'a>>,
    up: BorrowedProjection<'a>,
    down: BorrowedProjection<'a>,
}

struct BorrowedProjection<'a> {
    weight: Borrowed<'a>,
    bias: Option<Vec<f32>>,
}

impl<'a> BorrowedProjection<'a> {
    fn new(projection: &'a Projection) -> Result<Self> {
        let bias = projection.bias().map(|bias| bias.to_dtype(ROUTING_DTYPE)?.to_vec1()).transpose()?;
        Ok(Self { weight: Borrowed::weight(projection.weight())?, bias })
    }

    fn view(&self) -> Result<engine::Projection<'_>> {
        Ok(engine::Projection { weight: self.weight.matrix()?, bias: self.bias.as_deref() })
    }
}

impl<'a> BorrowedExpert<'a> {
    fn new(expert: &'a Expert) -> Result<Self> {
        Ok(Self {
            expert,
            gate: expert.gate_proj().map(BorrowedProjection::new).transpose()?,
            up: BorrowedProjection::new(expert.up_proj())?,
            down: BorrowedProjection::new(expert.down_proj())?,
        })
    }

    fn view(&self) -> Result<ExpertWeights<'_>> {
        let gate = self.gate.as_ref().map(BorrowedProjection::view).transpose()?;
        ExpertWeights::new(self.expert.activation(), gate, self.up.view()?, self.down.view()?)
    }
}

/// The experts of a layer, wherever they are.
pub(super) enum Source<'a> {
    Held(&'a [Expert]),
    Cached(&'a CachedExperts, &'a MoeSpec),
}

/// The weighted sum over slots and what the shared expert adds, `[tokens, hidden]` in `f32`.
pub(super) fn forward(
    engine: &Engine,
    tokens: &Tensor,
    experts: Source<'_>,
    shared: Option<&Shared>,
    plan: &DispatchPlan,
) -> Result<Tensor> {
    let (rows, hidden) = tokens.dims2()?;
    let tokens = tokens.contiguous()?;
    let shared_expert = shared.map(|shared| BorrowedExpert::new(shared.expert())).transpose()?;
    let (everyone, shares): (Vec<u32>, Vec<f32>) = match shared {
        Some(shared) => ((0..rows as u32).collect(), shared.weights(&tokens)?),
        None => Default::default(),
    };
    let shared = shared_expert.as_ref().map(BorrowedExpert::view).transpose()?;
    let shared = shared.map(|expert| Work { expert, tokens: &everyone, weights: &shares });
    let borrowed = Borrowed::tensor(&tokens)?;
    let input = borrowed.matrix()?;
    let mut output = vec![0.0; rows * hidden];
    match experts {
        Source::Held(experts) => {
            let busy: Vec<_> = plan.busy_experts().collect();
            let held: Vec<_> =
                busy.iter().map(|(expert, _)| BorrowedExpert::new(&experts[*expert])).collect::<Result<_>>()?;
            let mut work = Vec::with_capacity(held.len() + 1);
            for (held, (_, range)) in held.iter().zip(busy) {
                let (tokens, weights) = (&plan.tokens()[range.clone()], &plan.weights()[range]);
                work.push(Work { expert: held.view()?, tokens, weights });
            }
            work.extend(shared);
            engine.forward(input, &work, &mut output)?;
        }
        Source::Cached(experts, spec) => {
            let mut busy = plan.busy_experts().peekable();
            if busy.peek().is_none() {
                engine.add(input, shared.as_slice(), &mut output)?;
            }
            experts.run(spec, plan, |group| {
                let mut work: Vec<_> = group
                    .iter()
                    .zip(busy.by_ref())
                    .map(|(&(_, expert), (_, range))| Work {
                        expert,
                        tokens: &plan.tokens()[range.clone()],
                        weights: &plan.weights()[range],
                    })
                    .collect();
                // After all others, as where they are held.
                work.extend(shared.filter(|_| busy.peek().is_none()));
                engine.add(input, &work, &mut output)
            })?;
        }
    }
    Ok(Tensor::from_vec(output, (rows, hidden), tokens.device())?)
}
