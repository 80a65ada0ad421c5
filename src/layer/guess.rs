//! Which experts a layer will use, guessed from a hidden state that has not reached it yet.
//!
//! `guess = router(gate(hidden))` with a copy of the layer's state, so that guessing leaves no trace. Residual streams change little from
//! layer to layer, so the state before a layer says much of what the next one's gate will see. Shape: hidden `[.., hidden]`, a set of
//! experts.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use phase_moe::layer::MoeLayer;
//! use phase_moe::routing::router::{RouteContext, RouteState};
//! use phase_moe::spec::MoeSpec;
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, candle_core::DType::F32, &Device::Cpu);
//! let layer = MoeLayer::load(&MoeSpec::new(16, 8, 2, 32)?, vb)?;
//! let hidden = Tensor::randn(0f32, 1.0, (1, 16), &Device::Cpu)?;
//! let guess = layer.guess(&hidden, RouteContext::default(), &RouteState::default())?;
//! let (_, assignment) = layer.forward_routed(&hidden)?;
//! assert!(assignment.ids().all(|id| guess.iter().any(|guessed| guessed.index() as i32 == id)));
//! # Ok::<(), phase_moe::error::Error>(())
//! ```
//!
//! Knows nothing of caches or reads, nor of whether a guess is worth a read.

use candle_core::Tensor;

use super::MoeLayer;
use crate::error::Result;
use crate::expert::ExpertSet;
use crate::offload::requests::Requests;
use crate::routing::capacity::Capacity;
use crate::routing::check::check;
use crate::routing::logits::Logits;
use crate::routing::router::{RouteContext, RouteRequest, RouteState};

impl MoeLayer {
    /// The experts that the layer would use for `hidden`, without a limit; nothing runs and `state` stays what it is.
    ///
    /// # Errors
    /// As [`MoeLayer::forward_in`](super::MoeLayer::forward_in).
    pub fn guess(&self, hidden: &Tensor, context: RouteContext<'_>, state: &RouteState) -> Result<ExpertSet> {
        let tokens = self.tokens(hidden)?;
        let values = self.logits_of(&tokens)?.flatten_all()?.to_vec1::<f32>()?;
        let experts = self.spec.experts;
        let logits = Logits::new(&values, tokens.dim(0)?, experts)?;
        let scores = self.spec.scoring.scores(&logits, self.gate.selection_bias()?.as_deref())?;
        let capacity = Capacity::unlimited(experts)?;
        let request = RouteRequest::new(&scores, self.spec.top_k, &capacity, context)?;
        let assignment = self.router.route(&request, &mut state.clone())?;
        check(self.router.as_ref(), &request, &assignment)?;
        Ok(Requests::new(&assignment, None)?.wanted().clone())
    }
}
