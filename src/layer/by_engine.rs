//! A layer's forward pass by the expert engine, which reads the tensors' memory as it is: nothing is copied but biases.
//!
//! Knows nothing of gradients: a layer comes here only where nothing has to be differentiated.

use super::borrowed::Borrowed;
use super::check::ROUTING_DTYPE;
use super::expert::Expert;
use super::experts::Experts;
use super::projection::Projection;
use super::shared::Shared;
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::experts::matrix::Matrix;
use crate::experts::work::{ExpertWeights, ProjectionWeights, Work};
use crate::parallel::spread::Spread;
use crate::routing::plan::DispatchPlan;
use crate::spec::MoeSpec;

/// An expert's matrices, held.
pub(crate) struct BorrowedExpert<'a> {
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

    fn view(&self) -> Result<ProjectionWeights<'_>> {
        Ok(ProjectionWeights { weight: self.weight.matrix()?, bias: self.bias.as_deref() })
    }
}

impl<'a> BorrowedExpert<'a> {
    pub(crate) fn new(expert: &'a Expert) -> Result<Self> {
        Ok(Self {
            expert,
            gate: expert.gate_proj().map(BorrowedProjection::new).transpose()?,
            up: BorrowedProjection::new(expert.up_proj())?,
            down: BorrowedProjection::new(expert.down_proj())?,
        })
    }

    pub(crate) fn view(&self) -> Result<ExpertWeights<'_>> {
        let gate = self.gate.as_ref().map(BorrowedProjection::view).transpose()?;
        ExpertWeights::new(self.expert.activation(), gate, self.up.view()?, self.down.view()?)
    }
}

/// A layer's experts, and which of those held an expert is by its id, where they are not all.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) spec: &'a MoeSpec,
    pub(super) experts: &'a Experts,
    pub(super) spread: Option<&'a Spread>,
}

/// The weighted sum over slots of rows `[tokens, hidden]` into `output` of the same shape, and what the shared expert adds to the first so many
/// of them.
pub(super) fn forward(
    engine: &Engine,
    input: Matrix<'_>,
    Source { spec, experts, spread }: Source<'_>,
    shared: Option<(&Shared, usize)>,
    plan: &DispatchPlan,
    output: &mut [f32],
) -> Result<()> {
    let shared_expert = shared.map(|(shared, _)| BorrowedExpert::new(shared.expert())).transpose()?;
    let (everyone, shares): (Vec<u32>, Vec<f32>) = match shared {
        Some((shared, rows)) => ((0..rows as u32).collect(), shared.weights(engine, input.rows(0..rows)?)?),
        None => Default::default(),
    };
    let shared = shared_expert.as_ref().map(BorrowedExpert::view).transpose()?;
    let shared = shared.map(|expert| Work { expert, tokens: &everyone, weights: &shares });
    match experts {
        Experts::Held(experts) => {
            let busy: Vec<_> = plan.busy_experts().collect();
            let position = |expert: usize| spread.map_or(expert, |spread| spread.position(expert));
            let held: Vec<_> = busy
                .iter()
                .map(|(expert, _)| BorrowedExpert::new(&experts[position(*expert)]))
                .collect::<Result<_>>()?;
            let mut work = Vec::with_capacity(held.len() + 1);
            for (held, (_, range)) in held.iter().zip(busy) {
                let (tokens, weights) = (&plan.tokens()[range.clone()], &plan.weights()[range]);
                work.push(Work { expert: held.view()?, tokens, weights });
            }
            work.extend(shared);
            engine.forward(input, &work, output)?;
        }
        Experts::Cached(experts) => {
            output.fill(0.0);
            let mut busy = plan.busy_experts().peekable();
            if busy.peek().is_none() {
                engine.add(input, shared.as_slice(), output)?;
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
                engine.add(input, &work, output)
            })?;
        }
    }
    Ok(())
}

/// Adds what the shared expert makes of rows `[tokens, hidden]` to `output` of the same shape.
pub(super) fn add_shared(engine: &Engine, input: Matrix<'_>, shared: &Shared, output: &mut [f32]) -> Result<()> {
    let expert = BorrowedExpert::new(shared.expert())?;
    let (everyone, shares): (Vec<u32>, _) = ((0..input.shape()[0] as u32).collect(), shared.weights(engine, input)?);
    engine.add(input, &[Work { expert: expert.view()?, tokens: &everyone, weights: &shares }], output)
}
