//! `tune`: which bonus, how many experts per token and how many of them in fast memory.

use std::io::Write;

use anyhow::Result;
use clap::Args;
use phase_moe::decoder::model::{LoadOptions, Model};
use phase_moe::eval::tune::{Sweep, plain_perplexity, recommended};
use phase_moe::report::tune::TuneReport;
use phase_moe::routing::registry::RouterKind;

use crate::inspect::Experts;
use crate::options::{CacheOptions, Global, MemoryOptions, ModelSource, TextOptions, UserMistake, print_json};

/// Sweeps cache bonus, experts per token and experts in fast memory over decode of real text; prints the front and one to take.
///
/// Perplexity and hits are those of decoding the text, each token a step. Tokens per second are measured with all experts in
/// memory; what a miss reads is counted beside.
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
        let cache = CacheOptions::of(self.max_mass_loss, self.keep_top).settings(RouterKind::Cache)?;
        for &bonus in &self.cache_bonus {
            cache.clone().with_bonus(bonus)?;
        }
        let files = self.model.files()?;
        let model = Model::from_files(&files, &LoadOptions::default())?;
        let (name, decoder) = (model.name(), model.decoder());
        let (moe, bytes) = (&decoder.spec().moe, Experts::new(&files.checkpoint, decoder.spec())?.bytes_per_expert);
        let sweep = Sweep {
            top_k: if self.top_k.is_empty() { vec![moe.top_k] } else { self.top_k },
            bonus: self.cache_bonus,
            cached_experts: match self.cached_experts.is_empty() {
                true => [1, 2, 3].into_iter().map(|quarters| (moe.experts * quarters / 4).max(1)).collect(),
                false => self.cached_experts,
            },
            cache,
            policy: self.memory.policy,
            admission: self.memory.admission,
            timed_sequences: TIMED_SEQUENCES,
        };
        let (_, batches) = self.text.batches(&model)?;
        let tokens: u64 = batches.iter().map(|batch| batch.live_tokens()).sum();
        let bar = global.progress(tokens * sweep.settings() as u64);
        bar.set_message("tuning");
        let rows = sweep.run(decoder, &batches, bytes, |tokens| bar.inc(tokens))?;
        let plain_perplexity = plain_perplexity(decoder, &batches)?;
        drop(bar);
        let most = plain_perplexity * (1.0 + self.max_perplexity_increase);
        let report = TuneReport {
            source: format!(
                "{name}: {} layers of {} experts, top {}; {tokens} tokens, one a step; policy {}, admission {}",
                decoder.spec().layers,
                moe.experts,
                moe.top_k,
                self.memory.policy.name(),
                self.memory.admission.name()
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
