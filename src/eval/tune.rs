//! What to set: cache bonus, experts per token and experts in fast memory, swept over decode of real text.
//!
//! A row is **on the front** where no other row that needs at most as many experts in memory is at least as good in tokens per
//! second, hit rate and perplexity, and better in one of them.
//!
//! Quality figures come from whole forward passes over all of the text, tokens per second are the median of decoding its
//! first sequences token by token. With [`FastMemory::Counted`] all experts are in memory and `bytes per token = misses · bytes per expert /
//! tokens` is what a memory of that size would read; with [`FastMemory::Cache`] the timed sequences run on an expert cache of that
//! budget, one setting after the other, and bytes are those that were read after the first of them.

use std::sync::Arc;

use serde::Serialize;

use super::decode::{DecodeFigures, Decoding};
use crate::decoder::{Batch, Decoder};
use crate::error::{Error, Result};
use crate::offload::admission::Admission;
use crate::offload::cache::{CacheOptions, ExpertCache};
use crate::offload::residency::Policy;
use crate::routing::cache_aware::CacheRouter;

/// What experts have for fast memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FastMemory {
    /// Room for so many experts of a layer, of which account is kept.
    Counted {
        /// How many.
        experts: usize,
        /// Which expert leaves.
        policy: Policy,
        /// Which misses enter.
        admission: Admission,
    },
    /// An expert cache, per layer. The decoder must have its experts in one already: another of this kind takes its place.
    Cache(CacheOptions),
}

/// What is swept, and over what.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// Experts per token.
    pub top_k: Vec<usize>,
    /// Bonuses of resident experts, in score ranges.
    pub bonus: Vec<f64>,
    /// Fast memories.
    pub memories: Vec<FastMemory>,
    /// The router, but for its bonus.
    pub cache: CacheRouter,
    /// Sequences that are decoded token by token for the clock.
    pub timed_sequences: usize,
}

/// One setting and what it came to. Rates and shares are fractions of 1; what does not apply is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuneRow {
    /// Experts per token.
    pub top_k: usize,
    /// Bonus of a resident expert, in score ranges.
    pub cache_bonus: f64,
    /// Experts of a layer in fast memory.
    pub cached_experts: usize,
    /// Budget of the expert cache; `None` where account was kept of a memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_cache_bytes: Option<u64>,
    /// Hits / requests.
    pub hit_rate: Option<f64>,
    /// The same for the best policy there could be on these requests.
    pub belady_hit_rate: Option<f64>,
    /// Perplexity of the text.
    pub perplexity: f64,
    /// Kept gate mass / gate mass of plain top-k with as many experts per token.
    pub gate_mass_kept: Option<f64>,
    /// Tokens per second in decode.
    pub tokens_per_second: f64,
    /// Misses times the bytes of an expert, over tokens; with an expert cache what it read.
    pub bytes_read_per_token: f64,
    /// Whether no other row is better, see above.
    pub pareto: bool,
}

impl TuneRow {
    fn is_beaten_by(&self, other: &Self) -> bool {
        let (own, its) = (self.hit_rate.unwrap_or(0.0), other.hit_rate.unwrap_or(0.0));
        let as_good = other.cached_experts <= self.cached_experts
            && other.tokens_per_second >= self.tokens_per_second
            && its >= own
            && other.perplexity <= self.perplexity;
        let better =
            other.tokens_per_second > self.tokens_per_second || its > own || other.perplexity < self.perplexity;
        as_good && better
    }
}

impl Sweep {
    /// Measures every setting on `batches`. `progress` is called after each with its tokens.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a bonus or more cached experts than there can be and for a budget that no expert fits,
    /// [`Error::TopKZero`], [`Error::TopKExceedsExperts`], [`Error::Shape`] for a budget where the decoder has no expert cache; whatever
    /// the forward pass reports.
    pub fn run(
        &self,
        decoder: &Decoder,
        batches: &[Batch],
        bytes_per_expert: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<Vec<TuneRow>> {
        self.check(decoder)?;
        let timed = self.timed(batches)?;
        let (mut rows, mut counted) = (Vec::new(), Vec::new());
        for &top_k in &self.top_k {
            let mut decoder = decoder.clone();
            decoder.set_top_k(top_k)?;
            for &memory in &self.memories {
                for &bonus in &self.bonus {
                    let router = Arc::new(self.cache.clone().with_bonus(bonus)?);
                    match memory {
                        FastMemory::Counted { experts, policy, admission } => {
                            let decoding = Decoding { router, cached_experts: experts, policy, admission };
                            let figures = decoding.run(&decoder, batches, |_, _| Ok(()))?;
                            counted.push((rows.len(), decoder.clone(), decoding));
                            rows.push(row(top_k, bonus, experts, &figures, bytes_per_expert));
                        }
                        FastMemory::Cache(options) => {
                            // Gone before the next one comes, so that there is never more than one budget.
                            let mut decoder = decoder.clone();
                            let cache = Arc::new(another_cache(&decoder, options)?);
                            decoder.set_expert_cache(&cache)?;
                            let layers = 0..cache.store().layers();
                            let cached_experts = layers.map(|layer| cache.capacity(layer)).min().unwrap_or(0);
                            let CacheOptions { policy, admission, .. } = options;
                            let decoding = Decoding { router, cached_experts, policy, admission };
                            let figures = decoding.run(&decoder, batches, |_, _| Ok(()))?;
                            let mut row = row(top_k, bonus, cached_experts, &figures, bytes_per_expert);
                            row.expert_cache_bytes = Some(options.budget_bytes as u64);
                            time_cached(&mut row, &decoding, &decoder, &timed)?;
                            rows.push(row);
                        }
                    }
                    progress(batches.iter().map(Batch::live_tokens).sum());
                }
            }
        }
        // In turns, so that a busy neighbour meets all of them.
        let mut rates = vec![Vec::with_capacity(timed.len()); counted.len()];
        for batch in &timed {
            for ((_, decoder, decoding), rates) in counted.iter().zip(&mut rates) {
                let clock = decoding.run_by_token(decoder, std::slice::from_ref(batch), |_| ())?;
                rates.push(clock.tokens_per_second());
            }
        }
        for ((row, ..), rates) in counted.iter().zip(rates) {
            rows[*row].tokens_per_second = median(rates);
        }
        for at in 0..rows.len() {
            rows[at].pareto = !rows.iter().any(|other| rows[at].is_beaten_by(other));
        }
        Ok(rows)
    }

    /// Checks every setting before the first one takes its time.
    fn check(&self, decoder: &Decoder) -> Result<()> {
        self.bonus.iter().try_for_each(|&bonus| self.cache.clone().with_bonus(bonus).map(drop))?;
        self.top_k.iter().try_for_each(|&top_k| decoder.clone().set_top_k(top_k))?;
        self.memories.iter().try_for_each(|memory| match *memory {
            FastMemory::Counted { experts, policy, admission } => {
                decoder.expert_memory(experts, policy, admission).map(drop)
            }
            // Made one after the other, so that there is never more than one.
            FastMemory::Cache(_) => Ok(()),
        })
    }

    /// The first sequences, each a batch of its own.
    fn timed(&self, batches: &[Batch]) -> Result<Vec<Batch>> {
        let sequences = batches.iter().flat_map(|batch| {
            batch.ids().chunks_exact(batch.positions()).enumerate().map(move |(row, ids)| {
                let padded = |at: &usize| batch.padding().is_some_and(|pads| pads[row * batch.positions() + at]);
                &ids[..(0..ids.len()).take_while(|at| !padded(at)).count()]
            })
        });
        sequences.take(self.timed_sequences).map(|ids| Batch::new(&[ids])).collect()
    }
}

/// An empty cache over the store of a decoder's own.
fn another_cache(decoder: &Decoder, options: CacheOptions) -> Result<ExpertCache> {
    let own = decoder.expert_cache();
    let store = own.ok_or_else(|| Error::shape("decoder", "one with an expert cache", "one without"))?.store().clone();
    ExpertCache::new(store.clone(), options.sparing(&store))
}

/// Decodes the timed sequences from an empty logical set; the first one's reads do not count where there are more.
fn time_cached(row: &mut TuneRow, decoding: &Decoding, decoder: &Decoder, timed: &[Batch]) -> Result<()> {
    if let Some(cache) = decoder.expert_cache() {
        cache.forget()?;
    }
    let (mut rates, mut tokens, mut bytes) = (Vec::with_capacity(timed.len()), 0, 0);
    for (at, batch) in timed.iter().enumerate() {
        let clock = decoding.run_by_token(decoder, std::slice::from_ref(batch), |_| ())?;
        rates.push(clock.tokens_per_second());
        if at > 0 || timed.len() == 1 {
            (tokens, bytes) = (tokens + clock.tokens, bytes + clock.bytes_read.unwrap_or(0));
        }
    }
    row.tokens_per_second = median(rates);
    row.bytes_read_per_token = bytes as f64 / tokens.max(1) as f64;
    Ok(())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(0.0)
}

fn row(
    top_k: usize,
    cache_bonus: f64,
    cached_experts: usize,
    figures: &DecodeFigures,
    bytes_per_expert: u64,
) -> TuneRow {
    TuneRow {
        top_k,
        cache_bonus,
        cached_experts,
        expert_cache_bytes: None,
        hit_rate: figures.hit_rate(),
        belady_hit_rate: figures.belady_hit_rate(),
        perplexity: figures.perplexity,
        gate_mass_kept: figures.gate_mass_kept,
        tokens_per_second: 0.0,
        bytes_read_per_token: figures.misses as f64 * bytes_per_expert as f64 / figures.tokens as f64,
        pareto: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cached_experts: usize, hit_rate: f64, perplexity: f64, tokens_per_second: f64) -> TuneRow {
        TuneRow {
            top_k: 2,
            cache_bonus: 0.0,
            cached_experts,
            expert_cache_bytes: None,
            hit_rate: Some(hit_rate),
            belady_hit_rate: None,
            perplexity,
            gate_mass_kept: None,
            tokens_per_second,
            bytes_read_per_token: 1.0 - hit_rate,
            pareto: false,
        }
    }

    #[test]
    fn a_row_is_beaten_by_one_that_needs_no_more_memory() {
        let (small, large) = (row(4, 0.5, 10.0, 100.0), row(8, 0.7, 10.0, 100.0));
        assert!(!small.is_beaten_by(&large) && !large.is_beaten_by(&small));
        assert!(row(8, 0.4, 10.0, 100.0).is_beaten_by(&small));
        assert!(!small.is_beaten_by(&small.clone()), "equals stay");
        assert!(!row(4, 0.4, 9.9, 90.0).is_beaten_by(&small));
    }
}
