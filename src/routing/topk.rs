//! The gate's own choice: the k best experts of every token, and the router that does just that: [`TopK`].
//!
//! Knows nothing of prices or devices; ties go to the lowest expert id.

use rayon::prelude::*;

use crate::error::Result;
use crate::routing::assignment::{Assignment, weigh};
use crate::routing::drop::{DropRule, keep_within};
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch, TokenRequest};
use crate::routing::select::{Hint, Selector, copy_few};
use crate::routing::slots::EMPTY;
use crate::routing::token::choose_one;
use crate::simd::{Isa, Kernel, Lanes};

/// Rows · experts below which a selection stays on the calling thread. Run by `benches/topk`.
const PARALLEL_VALUES: usize = 1 << 16;

/// Rows a thread takes at a time. Run by `benches/topk`.
const CHUNK: usize = 256;

/// The gate's own choice of every token, `[tokens, top_k]`; padding tokens choose nothing.
pub(crate) fn gate_choice(request: &RouteRequest<'_>) -> Vec<u16> {
    let mut chosen = vec![EMPTY; request.scores().tokens() * request.top_k()];
    choose(request, Isa::detect(), &mut Selector::default(), &mut chosen, &mut []);
    chosen
}

/// Writes the gate's own choice of every token and, where `weights` is not empty, its combine weights.
pub(crate) fn choose(
    request: &RouteRequest<'_>,
    isa: Isa,
    selector: &mut Selector,
    chosen: &mut [u16],
    weights: &mut [f32],
) {
    let (top_k, scores) = (request.top_k(), request.scores());
    let few = scores.tokens() * scores.experts() < PARALLEL_VALUES || rayon::current_num_threads() == 1;
    if few || weights.is_empty() {
        return isa.run(Choose { request, selector, first: 0, chosen, weights });
    }
    let chunks = chosen.par_chunks_mut(CHUNK * top_k).zip(weights.par_chunks_mut(CHUNK * top_k)).enumerate();
    chunks.for_each_init(Selector::default, |selector, (chunk, (chosen, weights))| {
        isa.run(Choose { request, selector, first: chunk * CHUNK, chosen, weights });
    });
}

/// The choice of a run of tokens from `first` on.
struct Choose<'a, 'r> {
    request: &'a RouteRequest<'r>,
    selector: &'a mut Selector,
    first: usize,
    chosen: &'a mut [u16],
    weights: &'a mut [f32],
}

impl Kernel for Choose<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { request, selector, first, chosen, weights } = self;
        let (scores, top_k) = (request.scores(), request.top_k());
        selector.prepare(scores.experts(), top_k);
        let mut weights = weights.chunks_exact_mut(top_k);
        for (token, chosen) in (first..).zip(chosen.chunks_exact_mut(top_k)) {
            let count = if request.is_padding(token) {
                0
            } else {
                selector.select_on(lanes, scores.selection(token), None, Hint::NONE);
                copy_few(chosen, selector.ids());
                selector.count()
            };
            chosen[count..].fill(EMPTY);
            if let Some(weights) = weights.next() {
                weigh(scores, scores.gate(token), chosen, weights);
            }
        }
    }
}

/// Top-k routing (Shazeer et al. 2017, arXiv 1701.06538): each token takes its k best experts. Dropless without a
/// [`DropRule`]; with one, slots past the capacity are dropped as GShard (2006.16668) and Switch (2101.03961) do.
#[derive(Clone, Copy, Debug, Default)]
pub struct TopK {
    /// What happens past the capacity; `None` ignores capacity altogether.
    pub drop: Option<DropRule>,
}

impl Router for TopK {
    fn name(&self) -> &'static str {
        match self.drop {
            None => "top-k",
            Some(DropRule::Arrival) => "top-k-arrival",
            Some(DropRule::Rank) => "top-k-rank",
            Some(DropRule::Score) => "top-k-score",
        }
    }

    fn respects_capacity(&self) -> bool {
        self.drop.is_some()
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let Some(rule) = self.drop else {
            let (chosen, weights) = assignment.refill(request.scores(), request.top_k());
            choose(request, scratch.isa(), scratch.of(), chosen, weights);
            return Ok(());
        };
        let chosen = gate_choice(request);
        let kept = keep_within(rule, &chosen, request);
        *assignment = Assignment::from_chosen(request.scores(), request.top_k(), chosen, Some(&kept));
        Ok(())
    }
    #[inline]
    fn route_token(
        &self,
        request: &TokenRequest<'_>,
        _state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<bool> {
        Ok(choose_one(request, scratch, assignment))
    }
}
