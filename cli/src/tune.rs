//! `tune`: which bonus, how many experts per token and how many of them in fast memory.

use std::io::Write;

use crate::report::tune::TuneReport;
use anyhow::{Context, Result};
use bytesize::ByteSize;
use clap::Args;
use phase_moe::eval::{FastMemory, Sweep, TuneRow, dropless};
use phase_moe::{LoadOptions, Model, RouterKind, offload};

use crate::global::Global;
use crate::mistake::UserMistake;
use crate::options::{CacheOptions, MemoryOptions, ModelSource, TextOptions, print_json};

/// Sweeps cache bonus, experts per token and experts in fast memory over decode of real text; prints the front and one to take.
///
/// Perplexity and hits are those of decoding the text, each token a step. With --expert-cache the experts stay in their files, and
/// tokens per second and bytes are those of decoding on caches of these budgets; without, tokens per second are measured with all
/// experts in memory, and what a miss would read is counted beside.
///
/// Example: phase-moe tune --cached-experts 8,16 --cache-bonus 0,0.1,0.2 --tokens 8192
#[derive(Args)]
pub struct Tune {
    #[command(flatten)]
    model: ModelSource,
    #[command(flatten)]
    text: TextOptions,
    /// Experts per token [default: the model's]
    #[arg(long, value_name = "K,..", value_delimiter = ',')]
    top_k: Vec<usize>,
    /// Bonuses of an expert in fast memory, in score ranges
    #[arg(
        long,
        value_name = "X,..",
        value_delimiter = ',',
        allow_negative_numbers = true,
        default_value = "0,0.05,0.1,0.2"
    )]
    cache_bonus: Vec<f64>,
    /// Experts of a layer that fit into fast memory [default: a quarter, a half and three quarters of them]
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    cached_experts: Vec<usize>,
    /// Budgets of an expert cache, for example 64MiB,128MiB, in place of --cached-experts
    #[arg(long, value_name = "BYTES,..", value_delimiter = ',', conflicts_with = "cached_experts")]
    expert_cache: Vec<ByteSize>,
    /// Largest share of a token's gate mass that swaps may cost [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    max_mass_loss: Option<f64>,
    /// Experts of a token that always stay [default: 1]
    #[arg(long, value_name = "N")]
    keep_top: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    /// How much more perplexity the recommended setting may have than the model as it is, as a fraction of 1
    #[arg(long, value_name = "X", default_value_t = 0.01, allow_negative_numbers = true)]
    max_perplexity_increase: f64,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

/// Sequences that are decoded token by token for the clock.
const TIMED_SEQUENCES: usize = 5;

impl Tune {
    pub fn run(self, global: &Global) -> Result<()> {
        if !self.max_perplexity_increase.is_finite() {
            let message = format!("--max-perplexity-increase is {}: expected a number", self.max_perplexity_increase);
            return Err(UserMistake(message).into());
        }
        let router = CacheOptions::of(self.max_mass_loss, self.keep_top).settings(&[RouterKind::Cache])?;
        for &bonus in &self.cache_bonus {
            router.clone().with_bonus(bonus)?;
        }
        let (policy, admission) = (self.memory.policy(), self.memory.admission());
        let budget = |bytes: &ByteSize| -> Result<offload::CacheOptions> {
            let budget = usize::try_from(bytes.as_u64()).context("--expert-cache")?;
            Ok(offload::CacheOptions { policy, admission, ..offload::CacheOptions::new(budget) })
        };
        let budgets = self.expert_cache.iter().map(budget).collect::<Result<Vec<_>>>()?;
        let files = self.model.files()?;
        // The smallest, so that one that no expert fits is found at once.
        let expert_cache = budgets.iter().copied().min_by_key(|options| options.budget_bytes);
        let model = Model::new(&files, &LoadOptions::default().with_expert_cache(expert_cache))?;
        let (name, decoder) = (model.name(), model.decoder());
        let (moe, bytes) = (&decoder.spec().moe, files.expert_sizes()?.first);
        let counted = |experts| FastMemory::Counted { experts, policy, admission };
        let sweep = Sweep {
            top_k: if self.top_k.is_empty() { vec![moe.top_k] } else { self.top_k },
            bonus: self.cache_bonus,
            memories: match self.cached_experts.is_empty() {
                _ if !budgets.is_empty() => budgets.into_iter().map(FastMemory::Cache).collect(),
                true => [1, 2, 3].map(|quarters| counted((moe.experts * quarters / 4).max(1))).to_vec(),
                false => self.cached_experts.into_iter().map(counted).collect(),
            },
            cache: router,
            timed_sequences: TIMED_SEQUENCES,
        };
        let (_, batches) = self.text.batches(&model)?;
        let tokens: u64 = batches.iter().map(|batch| batch.live_tokens()).sum();
        let settings = sweep.top_k.len() * sweep.bonus.len() * sweep.memories.len();
        let bar = global.progress(tokens * settings as u64);
        bar.set_message("tuning");
        let rows = sweep.run(decoder, &batches, bytes, |tokens| bar.inc(tokens))?;
        let plain_perplexity = dropless(decoder, &batches, |_| ())?.perplexity;
        drop(bar);
        let most = plain_perplexity * (1.0 + self.max_perplexity_increase);
        let report = TuneReport {
            source: format!(
                "{name}: {} layers of {} experts, top {}; {tokens} tokens, one a step; policy {policy}, admission {admission}",
                decoder.spec().moe_blocks().count(),
                moe.experts,
                moe.top_k
            ),
            plain_perplexity,
            recommended: recommended(&rows, most).cloned(),
            rows,
        };
        match self.json {
            true => print_json(&report),
            false => Ok(write!(std::io::stdout(), "{report}")?),
        }
    }
}

/// The row that reads the fewest bytes per token of those whose perplexity is at most `most` (ties: fewer experts in memory, then lower
/// perplexity); `None` where no row is within it.
fn recommended(rows: &[TuneRow], most: f64) -> Option<&TuneRow> {
    let within = rows.iter().filter(|row| row.perplexity <= most);
    within.min_by(|a, b| {
        let bytes = a.bytes_read_per_token.total_cmp(&b.bytes_read_per_token);
        bytes.then(a.cached_experts.cmp(&b.cached_experts)).then(a.perplexity.total_cmp(&b.perplexity))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cached_experts: usize, hit_rate: f64, perplexity: f64) -> TuneRow {
        TuneRow {
            top_k: 2,
            cache_bonus: 0.0,
            cached_experts,
            expert_cache_bytes: None,
            hit_rate: Some(hit_rate),
            belady_hit_rate: None,
            perplexity,
            gate_mass_kept: None,
            tokens_per_second: 1.0,
            bytes_read_per_token: 1.0 - hit_rate,
            pareto: false,
        }
    }

    #[test]
    fn the_fewest_bytes_within_the_tolerance_are_recommended() {
        let rows = [row(8, 0.5, 10.0), row(8, 0.9, 10.2), row(4, 0.8, 10.05), row(8, 0.8, 10.0)];
        assert_eq!(recommended(&rows, 10.1), Some(&rows[2]));
        assert_eq!(recommended(&rows, 11.0), Some(&rows[1]));
        assert_eq!(recommended(&rows, 9.0), None);
    }
}
