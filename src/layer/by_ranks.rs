//! A layer's forward pass with its experts over ranks: gate logits of all rows, the same routing on every rank, and this rank's experts on the
//! engine for whoever wants them.
//!
//! Knows nothing of messages.

use std::time::Instant;

use super::MoeLayer;
use super::by_engine::{Source, add_shared, forward};
use super::routed::Seen;
use crate::error::{Error, Result};
use crate::experts::matrix::Matrix;
use crate::parallel::share::Share;
use crate::parallel::spread::{Rows, RunExperts, Spread};
use crate::routing::layer::Buffers;
use crate::routing::plan::DispatchPlan;
use crate::routing::router::{RouteContext, RouteState};

/// A layer's experts of this rank.
struct Own<'a> {
    layer: &'a MoeLayer,
    spread: &'a Spread,
}

impl RunExperts for Own<'_> {
    fn experts(&mut self, rows: &[f32], plan: &DispatchPlan, sums: &mut [f32], own: usize) -> Result<()> {
        let MoeLayer { spec, experts, shared, engine, .. } = self.layer;
        let input = Matrix::from_f32(rows.len() / spec.hidden, spec.hidden, rows)?;
        let shared = shared.as_ref().filter(|_| own > 0).map(|shared| (shared, own));
        forward(engine, input, Source { spec, experts, spread: Some(self.spread) }, shared, plan, sums)
    }

    fn shared(&mut self, rows: &[f32], sums: &mut [f32]) -> Result<()> {
        let MoeLayer { spec, shared, engine, .. } = self.layer;
        let Some(shared) = shared else { return Ok(()) };
        add_shared(engine, Matrix::from_f32(rows.len() / spec.hidden, spec.hidden, rows)?, shared, sums)
    }
}

impl MoeLayer {
    /// One forward pass over this rank's own rows `[own rows, hidden]` of a batch that is shared out as `share` says, whole on every rank where
    /// nobody does. `context` is of the whole batch, and so are the logits in `buffers` afterwards.
    pub(super) fn pass_over_ranks(
        &self,
        spread: &Spread,
        input: &[f32],
        share: Option<&Share>,
        context: RouteContext<'_>,
        top_k: usize,
        state: &mut RouteState,
        buffers: &mut Buffers,
        output: &mut [f32],
    ) -> Result<Seen> {
        let started = Instant::now();
        if self.norms.is_some() {
            return Err(Error::shape("output norms", "none beside experts over ranks", "some"));
        }
        let (hidden, scoring) = (self.spec.hidden, self.spec.scoring);
        let rows = input.len() / hidden;
        let whole = spread.whole(rows);
        let share = share.unwrap_or(&whole);
        let mut logits = std::mem::take(&mut buffers.logits);
        self.gate.logits_of_rows(&self.engine, Matrix::from_f32(rows, hidden, input)?, &mut logits)?;
        // What an account of fast memory says is the same everywhere; what is in a cache, each rank knows of its own experts.
        let mut resident = std::mem::take(&mut buffers.counted);
        let cached = self.cached().filter(|_| context.resident.is_none());
        if let Some(cached) = cached {
            cached.counted_into(&mut resident)?;
        }
        spread.gather_logits(share, &mut logits, cached.is_some().then_some(&mut resident))?;
        let resident_anywhere = context.resident.or(cached.map(|_| &resident));
        let context = RouteContext { resident: resident_anywhere, ..context };
        let selection_bias = self.gate.selection_bias()?;
        let gated = self.gated(&logits, top_k, selection_bias.as_deref());
        let capacity = self.routing.capacity(&gated, context.padding)?;
        let route_time = self.decide(&gated, None, &capacity, context, state, buffers);
        buffers.logits = logits;
        buffers.counted = resident;
        let route_time = route_time?;
        let overlaps = share.rows() * top_k / self.spec.experts >= spread.overlap_rows() && self.cached().is_none();
        let rows = Rows { share, input, hidden, at_once: !overlaps };
        spread.forward(&rows, &buffers.assignment, output, &mut Own { layer: self, spread })?;
        spread.count(&buffers.assignment, capacity.limits().is_some(), started);
        Ok(Seen { capacity, route_time, scoring, selection_bias })
    }
}
