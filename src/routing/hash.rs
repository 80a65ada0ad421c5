//! Hash routing: the token's vocabulary id decides, [`struct@Hash`] uniformly and [`WeightedHash`] in proportion to capacity.
//!
//! Hash Layers (Roller et al. 2021, arXiv 2106.04426) with a seed per layer: k distinct experts are drawn one after the
//! other, without replacement, from a stream that depends on (seed, layer, token id) alone. Draw i takes expert e with
//! probability `w_e / (Σ w − Σ w of the experts drawn before)`, where w is 1, or the expert's share of the capacity.
//! Same id, same experts; a batch without ids uses positions. Slots past a limit are dropped in order of arrival.
//!
//! Shapes: scores `[tokens, experts]` → assignment `[tokens, top_k]`. The gate scores only make combine weights.
//!
//! Knows nothing of what the gate wants, nor of what other tokens took: that is what makes it a baseline.

use crate::error::Result;
use crate::routing::assignment::Assignment;
use crate::routing::capacity::Capacity;
use crate::routing::drop::{DropRule, keep_within};
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::EMPTY;
use crate::routing::stream::{Stream, layer_seed};

/// Experts with integer weights, ready to be drawn from: `ends[i]` is the sum of the weights up to and with entry i.
#[derive(Default)]
struct Urn {
    experts: Vec<u16>,
    ends: Vec<u64>,
}

impl Urn {
    /// Holds the experts of `weights` that `allowed` admits and that weigh anything.
    fn fill(&mut self, weights: &[u64], allowed: impl Fn(usize) -> bool) {
        self.experts.clear();
        self.ends.clear();
        let mut end = 0;
        for (expert, &weight) in weights.iter().enumerate().filter(|&(expert, &weight)| weight > 0 && allowed(expert)) {
            end += weight;
            self.experts.push(expert as u16);
            self.ends.push(end);
        }
    }

    /// Draws `chosen.len()` distinct experts, or all there are; `drawn` is scratch.
    fn draw(&self, stream: &mut Stream, chosen: &mut [u16], drawn: &mut Vec<usize>) {
        drawn.clear();
        chosen.fill(EMPTY);
        let mut total = self.ends.last().copied().unwrap_or(0);
        let start = |entry: usize| if entry == 0 { 0 } else { self.ends[entry - 1] };
        for slot in chosen.iter_mut().take(self.experts.len()) {
            // A point on the line of what is left; stepping over the gaps that drawn entries left, lowest first, puts it
            // on the line of everything.
            let mut point = stream.below(total);
            for &entry in drawn.iter() {
                if point < start(entry) {
                    break;
                }
                point += self.ends[entry] - start(entry);
            }
            let entry = self.ends.partition_point(|&end| end <= point);
            *slot = self.experts[entry];
            total -= self.ends[entry] - start(entry);
            drawn.insert(drawn.partition_point(|&other| other < entry), entry);
        }
    }
}

/// Draws for every token of the request from experts weighted by `weights`, `[tokens, top_k]`.
fn hash_choice(request: &RouteRequest<'_>, weights: &[u64], seed: u64) -> Vec<u16> {
    let (scores, context) = (request.scores(), request.context());
    let seed = layer_seed(seed, context.layer);
    let masked = scores.has_masks();
    let (mut urn, mut drawn) = (Urn::default(), Vec::new());
    urn.fill(weights, |_| true);
    let mut chosen = vec![EMPTY; scores.tokens() * request.top_k()];
    for (token, chosen) in chosen.chunks_exact_mut(request.top_k()).enumerate() {
        if request.is_padding(token) {
            continue;
        }
        if masked {
            let selection = scores.selection(token);
            urn.fill(weights, |expert| selection[expert] > f32::NEG_INFINITY);
        }
        let key = context.token_ids.map_or(token as u64, |ids| u64::from(ids[token]));
        urn.draw(&mut Stream::new(seed, key), chosen, &mut drawn);
    }
    chosen
}

/// Drops what the capacity has no room for, first come first served.
fn within_capacity(request: &RouteRequest<'_>, chosen: Vec<u16>) -> Assignment {
    let kept = keep_within(DropRule::Arrival, &chosen, request);
    Assignment::from_chosen(request.scores(), request.top_k(), chosen, Some(&kept))
}

/// Each expert's share of the capacity as an integer: its limit, or its part of its device's, times 2¹⁶.
///
/// A share of a device that has any room is at least 1 (a device holds fewer than 2¹⁶ experts), and all of them together
/// fit in 64 bits (fewer than 2¹⁶ limits below 2³²).
fn capacity_weights(capacity: &Capacity) -> Vec<u64> {
    let Some(limits) = capacity.limits() else { return vec![1; capacity.experts()] };
    let sizes = capacity.pool_sizes();
    (0..capacity.experts())
        .map(|expert| capacity.pool_of(expert as u16))
        .map(|pool| (u64::from(limits[pool]) << 16) / sizes[pool] as u64)
        .collect()
}

/// Uniform hash of the token id to k distinct experts, blind to capacity until it drops.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hash {
    /// Which of the possible hashes; each layer derives its own.
    pub seed: u64,
}

impl Router for Hash {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let chosen = hash_choice(request, &vec![1; request.scores().experts()], self.seed);
        *assignment = within_capacity(request, chosen);
        Ok(())
    }
}

/// Hash of the token id to k distinct experts drawn in proportion to capacity: the honest stateless baseline.
///
/// Experts without room are never drawn. Where all shares are equal it chooses exactly what [`struct@Hash`] chooses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WeightedHash {
    /// Which of the possible hashes; each layer derives its own.
    pub seed: u64,
}

impl Router for WeightedHash {
    fn name(&self) -> &'static str {
        "weighted-hash"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let chosen = hash_choice(request, &capacity_weights(request.capacity()), self.seed);
        *assignment = within_capacity(request, chosen);
        Ok(())
    }
}
