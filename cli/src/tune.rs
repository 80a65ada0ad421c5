//! `tune`: which bonus, how many experts per token and how many of them in fast memory.

use std::io::Write;

use crate::choice::Prefer;
use crate::notice::notice;
use crate::output::Inputs;
use crate::report::compare::ModelSummary;
use crate::report::option::{Document, ReportOption};
use crate::report::reason::{Memory, Swept};
use crate::shell::quoted;
use anyhow::{Context, Result};
use clap::Args;
use phase_moe::eval::{FastMemory, Sweep, TuneRow};
use phase_moe::{LoadOptions, Model, RouterKind, offload};

use crate::global::Global;
use crate::mistake::UserMistake;
use crate::options::{Bytes, CacheOptions, MemoryOptions, ModelSource, TextOptions, print_json};

/// Sweeps cache bonus, experts per token and experts in fast memory over decode of real text; says which setting to take, and why.
///
/// Say first what memory there is: --expert-cache 64MiB, or --cached-experts 16. Several are swept one by one, each with its own
/// setting to take. With --expert-cache the experts stay in their files, and tokens per second and bytes are those of decoding on caches
/// of these budgets. With --cached-experts they are all in memory and what a miss would read is counted beside, so that tokens per second
/// tell little and misses decide.
///
/// Plain top-k on the same memory is measured with the others: it is what "2.1 ×" is a multiple of.
///
/// Example: phase-moe tune --expert-cache 2MiB --cache-bonus 0,0.1,0.2 --tokens 8192
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
    expert_cache: Vec<Bytes>,
    /// Largest share of a token's gate mass that swaps may cost [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    max_mass_loss: Option<f64>,
    /// Experts of a token that always stay [default: 1]
    #[arg(long, value_name = "N")]
    keep_top: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    /// What the setting to take should be best in, of those whose perplexity is within the tolerance: with a memory given, mostly
    /// speed. Settings that differ by less than their spread count as equal, and the next figure decides, in the order tokens per
    /// second, misses, perplexity, memory
    #[arg(long, value_enum, value_name = "WHAT", default_value = "speed")]
    prefer: Prefer,
    /// How much more perplexity the setting to take may have than the model as it is, as a fraction of 1
    #[arg(long, value_name = "X", default_value_t = 0.01, allow_negative_numbers = true)]
    max_perplexity_increase: f64,
    #[command(flatten)]
    report: ReportOption,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

/// Runs of each setting for the clock: enough for quartiles.
const RUNS: usize = 7;

impl Tune {
    pub fn run(self, global: &Global) -> Result<()> {
        let most = self.max_perplexity_increase;
        if !most.is_finite() {
            return Err(UserMistake(format!("--max-perplexity-increase is {most}: expected a number")).into());
        }
        let router = CacheOptions::of(self.max_mass_loss, self.keep_top).settings(&[RouterKind::Cache])?;
        for &bonus in &self.cache_bonus {
            router.clone().with_bonus(bonus)?;
        }
        let (policy, admission) = (self.memory.policy(), self.memory.admission());
        let budget = |budget: &Bytes| -> Result<offload::CacheOptions> {
            let bytes = usize::try_from(budget.bytes).context("--expert-cache")?;
            Ok(offload::CacheOptions { policy, admission, ..offload::CacheOptions::new(bytes) })
        };
        let budgets = self.expert_cache.iter().map(budget).collect::<Result<Vec<_>>>()?;
        let files = self.model.files()?;
        let page = self.report.open(&Inputs::default().texts(&self.text.text).model(&files))?;
        // The smallest, so that one that no expert fits is found at once. It stays empty.
        let expert_cache = budgets.iter().copied().min_by_key(|options| options.budget_bytes);
        let model = Model::new(&files, &LoadOptions::default().with_expert_cache(expert_cache))?;
        let (moe, bytes) = (&model.decoder().spec().moe, files.expert_sizes()?.first);
        let counted: Vec<usize> = match self.cached_experts.is_empty() {
            _ if !budgets.is_empty() => Vec::new(),
            true => [1, 2, 3].map(|quarters| (moe.experts * quarters / 4).max(1)).to_vec(),
            false => self.cached_experts.clone(),
        };
        let count = |&experts: &usize| FastMemory::Counted { experts, policy, admission };
        let sweep = Sweep {
            top_k: if self.top_k.is_empty() { vec![moe.top_k] } else { self.top_k.clone() },
            bonus: self.cache_bonus.clone(),
            memories: counted.iter().map(count).chain(budgets.into_iter().map(FastMemory::Cache)).collect(),
            cache: router,
            runs: RUNS,
        };
        let (_, batches) = self.text.batches(&model)?;
        let tokens: u64 = batches.iter().map(|batch| batch.live_tokens()).sum();
        let bar = global.progress(0);
        bar.set_message("tuning");
        let rows = sweep.run(model.decoder(), &batches, bytes, |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        })?;
        drop(bar);

        let memory = |option, given: String| Memory { option, given };
        let memories = counted.iter().map(|experts| memory("--cached-experts", experts.to_string()));
        let memories = memories
            .chain(self.expert_cache.iter().map(|budget| memory("--expert-cache", budget.typed.clone())))
            .collect();
        let plain_top_k = moe.top_k;
        let swept = Swept {
            source: format!(
                "{}: {} layers of {} experts, top {plain_top_k}; {tokens} tokens, one a step\npolicy {policy}, admission {admission}",
                model.name(),
                model.decoder().spec().moe_blocks().count(),
                moe.experts,
            ),
            experts: moe.experts,
            plain_top_k,
            tokens,
            runs: RUNS,
            memories,
            rows,
        };
        let report = swept.judged(self.prefer, most, |row, memory| self.command(row, memory, plain_top_k));
        if let Some(warning) = &report.warning {
            notice(format_args!("warning: {warning}"));
        }
        if let Some(page) = page {
            let spec = model.decoder().spec();
            let document = Document::new("tune", Some(ModelSummary::new(model.name(), spec)), &report)?;
            document.with_layers(spec.moe_blocks().collect(), moe.experts, moe.top_k).write(page)?;
        }
        match self.json {
            true => print_json(&report),
            false => Ok(write!(std::io::stdout(), "{report}")?),
        }
    }

    /// What runs a row: the same router on the same memory.
    fn command(&self, row: &TuneRow, memory: &Memory, plain_top_k: usize) -> String {
        let mut words: Vec<String> = ["phase-moe", "generate"].map(String::from).to_vec();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), quoted(&value)]);
        if let Some(model) = self.model.given() {
            add("--model", model.to_string_lossy().into_owned());
        }
        if row.top_k != plain_top_k {
            add("--top-k", row.top_k.to_string());
        }
        // Without a bonus there are no swaps, which is plain top-k; that one takes no options about swaps.
        match row.cache_bonus > 0.0 {
            false => add("--router", "top-k".into()),
            true => {
                add("--router", "cache".into());
                add("--cache-bonus", row.cache_bonus.to_string());
                let swaps = [
                    ("--max-mass-loss", self.max_mass_loss.map(|loss| loss.to_string())),
                    ("--keep-top", self.keep_top.map(|experts| experts.to_string())),
                ];
                swaps.into_iter().for_each(|(option, value)| value.into_iter().for_each(|value| add(option, value)));
            }
        }
        add(memory.option, memory.given.clone());
        self.memory.given().into_iter().for_each(|(option, value)| add(option, value));
        add("--prompt", "Once upon a time".into());
        words.join(" ")
    }
}
