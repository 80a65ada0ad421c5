//! What follows attention, whichever way blocks run, and one MoE layer of a forward pass: what is in fast memory, the layer, and what account is kept of it.
//!
//! Knows nothing of how hidden states are held.

use candle_core::Tensor;

use super::batch::Batch;
use super::checked::Checks;
use super::lookahead::Pass;
use super::state::DecoderState;
use crate::error::Result;
use crate::expert::ExpertId;
use crate::layer::MoeLayer;
use crate::layer::expert::Expert;
use crate::layer::routed::Pass as LayerPass;
use crate::routing::layer::Buffers;
use crate::routing::router::{RouteContext, RouteState};

/// What follows attention; clones share weights.
#[derive(Clone)]
pub(super) enum Ffn {
    Dense(Box<Expert>),
    Moe(Box<MoeLayer>),
}

impl Ffn {
    pub(super) fn moe(&self) -> Option<&MoeLayer> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(moe) => Some(moe),
        }
    }

    pub(super) fn moe_mut(&mut self) -> Option<&mut MoeLayer> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(moe) => Some(moe),
        }
    }
}

/// Runs MoE layer `layer` of block `block`: `run` gets what its router is to know, how many experts a token gets, and whether what that saw is kept, and gives it then.
pub(super) fn moe_step<T>(
    checks: Checks<'_>,
    [block, layer]: [usize; 2],
    moe: &MoeLayer,
    batch: &Batch,
    pass: Pass,
    state: &mut DecoderState,
    run: impl FnOnce(RouteContext<'_>, usize, &mut RouteState, &mut Buffers, bool) -> Result<(T, Option<LayerPass>)>,
) -> Result<T> {
    let resident = match (&state.memory, moe.cached()) {
        (Some(memory), _) => memory.counted(layer),
        // Over ranks the layer itself asks all of them.
        (None, Some(experts)) if moe.spread().is_none() => {
            experts.counted_into(&mut state.resident)?;
            Some(&state.resident)
        }
        (None, _) => None,
    };
    let context = RouteContext { step: state.step, resident, ..batch.context() };
    let top_k = state.top_k_of(layer).unwrap_or(moe.spec().top_k);
    let done = run(context, top_k, &mut state.routes[layer], &mut state.buffers, state.routed.is_some());
    let (output, routed) = done.map_err(|error| checks.named(error, block))?;
    if let Some(experts) = moe.cached().filter(|_| pass.ahead) {
        experts.cache().cancel_prefetch(experts.layer());
    }
    if let Some(memory) = &mut state.memory {
        memory.advance(layer, state.buffers.assignment())?;
    }
    state.slots.count(state.buffers.assignment(), batch.live_tokens());
    if let (Some(all), Some(routed)) = (&mut state.routed, routed) {
        all.push(routed.routed(state.buffers.assignment(), batch.padding()));
    }
    Ok(output)
}

/// Has what a layer will use of its cache read, as far as its gate can tell from `normed`, the hidden state before the layer before it.
pub(super) fn guess_ahead(
    moe: &MoeLayer,
    batch: &Batch,
    state: &DecoderState,
    normed: impl FnOnce() -> Result<Tensor>,
) {
    let Some(experts) = moe.cached() else { return };
    let (cache, at) = (experts.cache(), experts.layer());
    let guess = || -> Result<usize> {
        let mut resident = cache.resident(at)?;
        if resident.len() == resident.experts() {
            return Ok(0);
        }
        cache.counted_into(at, &mut resident)?;
        let context = RouteContext { step: state.step, resident: Some(&resident), ..batch.context() };
        let top_k = state.top_k_of(at).unwrap_or(moe.spec().top_k);
        let mut guessed = moe.guess(&normed()?, context, top_k, &state.routes[at])?;
        if let Some(spread) = moe.spread() {
            let others: Vec<ExpertId> = guessed.iter().filter(|expert| !spread.has(expert.index())).collect();
            others.into_iter().for_each(|expert| _ = guessed.remove(expert));
        }
        cache.prefetch(at, &guessed)
    };
    // A hidden state that no gate understands is an error where it is used, not where it is guessed from.
    let _ = guess();
}
