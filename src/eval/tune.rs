//! What to set: cache bonus, experts per token and experts in fast memory, swept over decode of real text.
//!
//! Quality figures come from whole forward passes over all of the text; the error of a perplexity is that of the **paired**
//! difference to plain top-k, sequence by sequence of the same text: `√(s/(s−1) · Σ (dᵢ − d·nᵢ)²) / n` over `s` sequences, `dᵢ` being
//! what a sequence of `nᵢ` tokens lost and `d` the mean loss of a token.
//!
//! Tokens per second are the median of short runs, all settings **in turns** (1, 2, .., n, 1, 2, ..), so that a busy neighbour or a
//! machine that warms up meets all alike. A run starts from an empty memory, decodes the same text as the others of its turn, and only
//! the last third of it is on the clock, when the memory is warm from that setting's own choices. So nothing is kept from turn to turn,
//! and with [`FastMemory::Cache`] there is one expert cache at a time: never more bytes than one budget.
//!
//! With [`FastMemory::Counted`] all experts are in memory and `bytes per token = misses · bytes per expert / tokens` is what a memory
//! of that size would read; with [`FastMemory::Cache`] bytes are those read while the clock ran. Which row to take is for others to say.

use std::sync::Arc;

use serde::Serialize;

use super::decode::Decoding;
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
    /// Runs of each setting for the clock.
    pub runs: usize,
}

/// One setting and what it came to. Rates and shares are fractions of 1; what does not apply is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuneRow {
    /// Whether it is plain top-k, as many experts a token as the decoder had and no bonus: what others are measured against.
    pub baseline: bool,
    /// Experts per token.
    pub top_k: usize,
    /// Bonus of a resident expert, in score ranges.
    pub cache_bonus: f64,
    /// Experts of a layer in fast memory; of the layer with the fewest.
    pub cached_experts: usize,
    /// The same of every layer.
    pub cached_experts_by_layer: Vec<usize>,
    /// Budget of the expert cache; `None` where account was kept of a memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_cache_bytes: Option<u64>,
    /// Hits / requests.
    pub hit_rate: Option<f64>,
    /// The same for the best policy there could be on these requests.
    pub belady_hit_rate: Option<f64>,
    /// Perplexity of the text.
    pub perplexity: f64,
    /// What that is above plain top-k's, as a share of it.
    pub perplexity_increase: f64,
    /// Standard error of the increase, see above; `None` for fewer than two sequences.
    pub perplexity_error: Option<f64>,
    /// Kept gate mass / gate mass of plain top-k with as many experts per token.
    pub gate_mass_kept: Option<f64>,
    /// Tokens per second in decode: the median of the runs.
    pub tokens_per_second: f64,
    /// Half the distance between the quartiles of the runs' tokens per second, as a share of their median.
    pub spread: f64,
    /// Misses times the bytes of an expert, over tokens; with an expert cache what it read.
    pub bytes_read_per_token: f64,
}

/// Tokens of a run, the text being long enough.
const RUN_TOKENS: usize = 192;

/// One of the sweep's memories, with a decoder whose experts are in it.
struct Held {
    decoder: Decoder,
    capacities: Vec<usize>,
    policy: Policy,
    admission: Admission,
    budget: Option<u64>,
}

/// Of each sequence its summed losses and how many there are.
type Losses = Vec<(f64, u64)>;

impl Sweep {
    /// Measures every setting on `batches`: memory by memory, plain top-k first where it is not among the settings. `progress` is told
    /// how many tokens went through so far, and of how many.
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
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Vec<TuneRow>> {
        self.check(decoder)?;
        let texts = self.timed(batches);
        let plain = (decoder.spec().moe.top_k, 0.0);
        let mut settings: Vec<(usize, f64)> =
            self.top_k.iter().flat_map(|&top_k| self.bonus.iter().map(move |&bonus| (top_k, bonus))).collect();
        if !settings.contains(&plain) {
            settings.insert(0, plain);
        }
        let tokens: u64 = batches.iter().map(Batch::live_tokens).sum();
        let run_tokens: u64 = texts.iter().map(|text| text.len() as u64).sum();
        let (mut done, all) = (0, (tokens + run_tokens) * (settings.len() * self.memories.len()) as u64);
        let mut went = |tokens| {
            done += tokens;
            progress(done, all);
        };

        let (mut rows, mut losses) = (Vec::new(), Vec::new());
        for &memory in &self.memories {
            let held = Held::new(decoder, memory)?;
            for &(top_k, bonus) in &settings {
                let (row, lost) = self.quality(&held, (top_k, bonus), batches, bytes_per_expert)?;
                rows.push(TuneRow { baseline: (top_k, bonus) == plain, ..row });
                losses.push(lost);
                went(tokens);
            }
        }
        if let Some(plain) = rows.iter().position(|row| row.baseline) {
            let perplexity = rows[plain].perplexity;
            for (row, lost) in rows.iter_mut().zip(&losses) {
                row.perplexity_increase = row.perplexity / perplexity - 1.0;
                row.perplexity_error = paired_error(lost, &losses[plain]);
            }
        }

        let (mut rates, mut read) = (vec![Vec::with_capacity(texts.len()); rows.len()], vec![(0, 0); rows.len()]);
        // One memory is held from turn to turn; of several, one goes before the next one comes.
        let mut held = None;
        for text in &texts {
            for (at, &memory) in self.memories.iter().enumerate() {
                if self.memories.len() > 1 {
                    held = None;
                }
                let held = match &held {
                    Some(held) => held,
                    None => &*held.insert(Held::new(decoder, memory)?),
                };
                for (setting, row) in settings.iter().zip(at * settings.len()..) {
                    let (decoder, decoding) = self.setting(held, *setting)?;
                    let untimed = text.len() - (text.len() / 3).max(1);
                    let clocked = decoding.clock(&decoder, text, untimed)?;
                    rates[row].push(clocked.tokens_per_second());
                    read[row] = (read[row].0 + clocked.bytes_read, read[row].1 + clocked.tokens);
                    went(text.len() as u64);
                }
            }
        }
        for ((row, rates), (bytes, tokens)) in rows.iter_mut().zip(&mut rates).zip(read) {
            (row.tokens_per_second, row.spread) = median_and_spread(rates);
            if row.expert_cache_bytes.is_some() {
                row.bytes_read_per_token = bytes as f64 / tokens.max(1) as f64;
            }
        }
        Ok(rows)
    }

    /// Checks every setting before the first one takes its time.
    fn check(&self, decoder: &Decoder) -> Result<()> {
        self.bonus.iter().try_for_each(|&bonus| self.cache.clone().with_bonus(bonus).map(drop))?;
        self.top_k.iter().try_for_each(|&top_k| decoder.clone().set_top_k(&[top_k]))?;
        self.memories.iter().try_for_each(|memory| match *memory {
            FastMemory::Counted { experts, policy, admission } => {
                decoder.expert_memory(experts, policy, admission).map(drop)
            }
            // Made one after the other, so that there is never more than one.
            FastMemory::Cache(_) => Ok(()),
        })
    }

    /// What one setting runs on.
    fn setting(&self, held: &Held, (top_k, bonus): (usize, f64)) -> Result<(Decoder, Decoding)> {
        let mut decoder = held.decoder.clone();
        decoder.set_top_k(&[top_k])?;
        let router = Arc::new(self.cache.clone().with_bonus(bonus)?);
        let Held { policy, admission, .. } = *held;
        Ok((decoder, Decoding { router, cached_experts: held.fewest(), policy, admission }))
    }

    /// All figures of one setting but for its clock, and what each sequence lost.
    fn quality(
        &self,
        held: &Held,
        setting: (usize, f64),
        batches: &[Batch],
        bytes_per_expert: u64,
    ) -> Result<(TuneRow, Losses)> {
        let (decoder, decoding) = self.setting(held, setting)?;
        let mut lost = Losses::new();
        let capacity = |layer: usize| held.capacities[layer];
        let figures =
            decoding.run_in(&decoder, batches, capacity, |batch, _, losses| {
                lost.extend(losses.chunks_exact(batch.positions()).map(|losses| {
                    losses.iter().flatten().fold((0.0, 0), |(sum, tokens), loss| (sum + loss, tokens + 1))
                }));
                Ok(())
            })?;
        let row = TuneRow {
            baseline: false,
            top_k: setting.0,
            cache_bonus: setting.1,
            cached_experts: held.fewest(),
            cached_experts_by_layer: held.capacities.clone(),
            expert_cache_bytes: held.budget,
            hit_rate: figures.hit_rate(),
            belady_hit_rate: figures.belady_hit_rate(),
            perplexity: figures.perplexity,
            perplexity_increase: 0.0,
            perplexity_error: None,
            gate_mass_kept: figures.gate_mass_kept,
            tokens_per_second: 0.0,
            spread: 0.0,
            bytes_read_per_token: figures.misses as f64 * bytes_per_expert as f64 / figures.tokens as f64,
        };
        Ok((row, lost))
    }

    /// The text of each run: starts of sequences from all over the text.
    fn timed(&self, batches: &[Batch]) -> Vec<Vec<u32>> {
        let sequences = batches.iter().flat_map(|batch| {
            batch.ids().chunks_exact(batch.positions()).enumerate().map(move |(row, ids)| {
                let padded = |at: &usize| batch.padding().is_some_and(|pads| pads[row * batch.positions() + at]);
                &ids[..(0..ids.len().min(RUN_TOKENS)).take_while(|at| !padded(at)).count()]
            })
        });
        let sequences: Vec<&[u32]> = sequences.filter(|ids| !ids.is_empty()).collect();
        // Where there are fewer than runs, each comes more than once.
        let at = |run: usize| run * sequences.len() / self.runs.min(sequences.len()).max(1) % sequences.len();
        (0..if sequences.is_empty() { 0 } else { self.runs }).map(|run| sequences[at(run)].to_vec()).collect()
    }
}

impl Held {
    fn new(decoder: &Decoder, memory: FastMemory) -> Result<Self> {
        let mut decoder = decoder.clone();
        match memory {
            FastMemory::Counted { experts, policy, admission } => {
                let capacities = vec![experts; decoder.spec().moe_layers()];
                Ok(Self { decoder, capacities, policy, admission, budget: None })
            }
            FastMemory::Cache(options) => {
                let own = decoder.expert_cache();
                let store = own.ok_or_else(|| Error::shape("decoder", "one with an expert cache", "one without"))?;
                let store = store.store().clone();
                let cache = Arc::new(ExpertCache::new(store.clone(), options.sparing(&store))?);
                decoder.set_expert_cache(&cache)?;
                let capacities = (0..store.layers()).map(|layer| cache.capacity(layer)).collect();
                let CacheOptions { policy, admission, budget_bytes, .. } = options;
                Ok(Self { decoder, capacities, policy, admission, budget: Some(budget_bytes as u64) })
            }
        }
    }

    fn fewest(&self) -> usize {
        self.capacities.iter().copied().min().unwrap_or(0)
    }
}

/// The standard error of `exp(mean difference) − 1`; `None` for fewer than two sequences.
fn paired_error(losses: &Losses, plain: &Losses) -> Option<f64> {
    let pairs = losses.iter().zip(plain).filter(|((_, tokens), _)| *tokens > 0);
    let differences: Vec<(f64, f64)> = pairs.map(|((own, tokens), (its, _))| (own - its, *tokens as f64)).collect();
    let sequences = differences.len() as f64;
    if sequences < 2.0 {
        return None;
    }
    let (sum, tokens) = differences.iter().fold((0.0, 0.0), |(sum, all), (lost, tokens)| (sum + lost, all + tokens));
    let mean = sum / tokens;
    let squares: f64 = differences.iter().map(|(lost, tokens)| (lost - mean * tokens).powi(2)).sum();
    Some(mean.exp() * (squares * sequences / (sequences - 1.0)).sqrt() / tokens)
}

/// The median of `rates`, and half the distance between their quartiles as a share of it.
fn median_and_spread(rates: &mut [f64]) -> (f64, f64) {
    rates.sort_by(f64::total_cmp);
    let Some(last) = rates.len().checked_sub(1) else { return (0.0, 0.0) };
    let quantile = |quarters: usize| {
        let (at, rest) = (last * quarters / 4, (last * quarters % 4) as f64 / 4.0);
        rates[at] + rest * (rates[(at + 1).min(last)] - rates[at])
    };
    (quantile(2), (quantile(3) - quantile(1)) / 2.0 / quantile(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_runs() {
        assert_eq!(median_and_spread(&mut [40.0, 10.0, 20.0, 30.0, 50.0]), (30.0, 1.0 / 3.0));
        assert_eq!(median_and_spread(&mut [20.0, 10.0]), (15.0, 1.0 / 6.0));
        assert_eq!(median_and_spread(&mut [7.0]), (7.0, 0.0));
        // One run that was disturbed moves neither.
        assert_eq!(median_and_spread(&mut [10.0, 10.0, 1.0, 10.0, 10.0]), (10.0, 0.0));
    }

    #[test]
    fn the_error_of_a_difference_is_that_of_its_sequences() {
        let plain = vec![(20.0, 10), (90.0, 10), (50.0, 10), (7.0, 10)];
        let shifted = |by: [f64; 4]| plain.iter().zip(by).map(|(&(sum, n), by)| (sum + by, n)).collect::<Losses>();
        // However different sequences are, a loss that all share is certain.
        let error = paired_error(&shifted([1.0; 4]), &plain).unwrap();
        assert!(error < 1e-12, "{error}");
        // The standard error of the mean of 0.1, 0.3, 0.1, 0.3 nats a token, times exp(0.2).
        let error = paired_error(&shifted([1.0, 3.0, 1.0, 3.0]), &plain).unwrap();
        let expected = 0.2f64.exp() * (0.04f64 / 3.0 / 4.0).sqrt();
        assert!((error - expected).abs() < 1e-12, "{error} {expected}");
        assert_eq!(paired_error(&plain[..1].to_vec(), &plain[..1].to_vec()), None);
    }

    #[test]
    fn runs_take_their_text_from_everywhere() {
        let ids: Vec<Vec<u32>> = (0..20).map(|at| vec![at; 300]).collect();
        let rows: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        let runs = |batches: &[Batch]| -> Vec<(u32, usize)> {
            let (top_k, bonus, memories) = (vec![2], vec![0.0], Vec::new());
            let sweep = Sweep { top_k, bonus, memories, cache: CacheRouter::default(), runs: 7 };
            sweep.timed(batches).iter().map(|text| (text[0], text.len())).collect()
        };
        let batches = [Batch::new(&rows[..8]).unwrap(), Batch::new(&rows[8..]).unwrap()];
        assert_eq!(runs(&batches), [0, 2, 5, 8, 11, 14, 17].map(|at| (at, RUN_TOKENS)));
        // Of few sequences each comes again, and padding is no text.
        let few = [Batch::new(&[rows[0], &rows[1][..5]]).unwrap()];
        assert_eq!(runs(&few), [0, 1, 0, 1, 0, 1, 0].map(|at| (at, if at == 0 { RUN_TOKENS } else { 5 })));
    }
}
