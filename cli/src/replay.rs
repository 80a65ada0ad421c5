//! `replay`: captured gate logits against an expert cache, without the experts.

use std::path::PathBuf;
use std::sync::Arc;

use crate::output::{Inputs, Output};
use crate::report::compare::ModelSummary;
use crate::report::option::{Document, ReportOption};
use crate::report::replay::{Beside, ReplayReport};
use crate::report::seen::{MOST_TOKENS, Recorder, ShownText};
use anyhow::Result;
use clap::Args;
use phase_moe::decoder::ExpertMemory;
use phase_moe::eval::{BatchCapacity, GateTrace, Replay as Replayer};
use phase_moe::routing::Knowledge;
use phase_moe::{Admission, CapacityRule, Error, LoadOptions, Model, Router, RouterKind};

use crate::global::Global;
use crate::mistake::UserMistake;
use crate::options::{
    Batches, CacheOptions, CapacityOptions, MemoryOptions, ModelSource, TextOptions, parse, print_json, trace_top_k,
    warn_unlimited,
};

/// Replays gate logits against a cache of experts: hits, misses, bytes, lost gate mass, Belady's bound.
///
/// Without --logits the model runs over text first, as `trace` does. A step is one token (decode) unless --batch-tokens says
/// otherwise; a request is a distinct expert of a layer and step. Above the router stand those that see no cache, with the same policy: plain top-k, and phase for cache+phase, with every miss admitted and
/// with the router's own admission, so that what either saves is told apart.
///
/// Example: phase-moe replay --cached-experts 16 --cache-bonus 0.2 --max-mass-loss 0.1
#[derive(Args)]
pub struct Replay {
    /// Gate logits, as `trace` writes them [default: those of the model over text]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "text", "tokens"])]
    logits: Option<PathBuf>,
    #[command(flatten)]
    model: ModelSource,
    /// Text to run over, repeatable [default: the bundled held-out text of three kinds]
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// How many tokens of it, shared evenly over the texts [default: all]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Router to use
    #[arg(long, value_name = "NAME", default_value = "cache", value_parser = parse::<RouterKind>)]
    router: RouterKind,
    /// Experts per token [default: the trace's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Experts of a layer that fit into fast memory [default: half of them]
    #[arg(long, value_name = "N")]
    cached_experts: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Tokens per step
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch_tokens: usize,
    /// Room over demand, for routers that know limits [default: no limit]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    capacity_factor: Option<f64>,
    #[command(flatten)]
    capacity: CapacityOptions,
    #[command(flatten)]
    report: ReportOption,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

/// A trace, what it is of and what an expert of it weighs.
struct Source {
    trace: GateTrace,
    name: String,
    bytes_per_expert: Option<u64>,
    /// `None` for a file of logits.
    model: Option<ModelSummary>,
    /// The layers' indices in the model.
    blocks: Vec<usize>,
    /// Where a page goes.
    page: Option<Output>,
    /// The text of the trace, where a page is to show it.
    text: Option<ShownText>,
}

impl Replay {
    pub fn run(self, global: &Global) -> Result<()> {
        if self.batch_tokens == 0 {
            return Err(UserMistake("--batch-tokens is 0: expected at least 1".into()).into());
        }
        let settings = self.cache.settings(&[self.router])?;
        let rule = self.capacity.rule_if(self.router, self.capacity_factor, "--capacity-factor")?;
        let mut router: Arc<dyn Router> = Arc::from(self.router.build_with(self.capacity.seed, &settings));
        let Source { trace, name, bytes_per_expert, model, blocks, page, text } = self.source(global, rule.as_ref())?;
        let recorder = page.as_ref().map(|_| {
            let layers = trace.layers.iter().map(|layer| layer.layer).collect();
            Recorder::new(router.clone(), self.router.name().into(), layers)
        });
        if let Some(recorder) = &recorder {
            router = recorder.clone();
        }
        let (tokens, layers) = (trace.tokens(), trace.layers.len());
        let top_k = trace_top_k(self.top_k, &trace)?;
        if let Some(rule) = &rule {
            let below = |size: usize| -> Result<bool> {
                let rule = rule.of_layer(0, layers)?;
                Ok(size > 0 && rule.capacity(size, trace.experts, top_k)?.limits().is_none())
            };
            // A step is not larger than the trace.
            let step = self.batch_tokens.min(tokens.max(1));
            let (whole, rest) = (tokens / step, tokens % step);
            let unlimited = usize::from(below(step)?) * whole + usize::from(below(rest)?);
            warn_unlimited(rule, unlimited, tokens.div_ceil(self.batch_tokens));
        }
        let capacity = rule.map_or(BatchCapacity::Unlimited, BatchCapacity::Rule);
        let replay = Replayer {
            router: router.as_ref(),
            top_k,
            capacity: &capacity,
            batch_tokens: self.batch_tokens,
            cached_experts: self.cached_experts.unwrap_or(trace.experts / 2),
            policy: self.memory.policy(),
            admission: self.memory.admission(),
        };
        let beside = self.beside();
        let bar = global.progress((tokens * layers * (1 + beside.len())) as u64);
        bar.set_message("replaying");
        let figures = replay.run(&trace, |tokens| bar.inc(tokens))?;
        let blind = |&(kind, admission): &(RouterKind, Admission)| -> Result<_> {
            let router = kind.build(self.capacity.seed);
            let blind = Replayer { router: router.as_ref(), admission, ..replay };
            let figures = blind.run(&trace, |tokens| bar.inc(tokens))?;
            Ok(Beside { router: kind.name(), admission: admission.to_string(), figures })
        };
        let beside = beside.iter().map(blind).collect::<Result<_>>()?;
        drop(bar);

        let aware = self.router.understands(Knowledge::Memory);
        let step = if self.batch_tokens == 1 { "one a step".into() } else { format!("{} a step", self.batch_tokens) };
        let report = ReplayReport {
            source: format!(
                "{name}: {layers} layers of {} experts, top {top_k}; {tokens} tokens, {step}",
                trace.experts
            ),
            router: self.router.name(),
            policy: self.memory.policy().to_string(),
            admission: self.memory.admission().to_string(),
            cached_experts: replay.cached_experts,
            cache_bonus: aware.then(|| settings.bonus()),
            max_mass_loss: aware.then(|| settings.max_mass_loss()),
            figures,
            bytes_read: bytes_per_expert.map(|bytes| bytes.saturating_mul(figures.misses)),
            beside,
            meaning: String::new(),
            bytes_per_expert,
        };
        let report = report.explained();
        if let (Some(page), Some(recorder)) = (page, recorder) {
            let document = Document::new("replay", model, &report)?;
            let mut document = document.with_layers(blocks, trace.experts, top_k);
            document.runs.push(recorder.run()?);
            let rooms = vec![report.cached_experts; trace.layers.len()];
            document.cache.extend(recorder.cache(report.router, &rooms, bytes_per_expert));
            document.text = text.map(serde_json::to_value).transpose()?;
            document.write(page)?;
        }
        match self.json {
            true => print_json(&report),
            false => {
                let terminal = global.terminal();
                terminal.print(&report.text(&terminal))
            }
        }
    }

    /// Routers that see no cache, each with what it admits: every miss, and what the router admits, where that is something else.
    fn beside(&self) -> Vec<(RouterKind, Admission)> {
        let base = if self.router == RouterKind::CachePhase { RouterKind::Phase } else { RouterKind::TopK };
        let all = [(RouterKind::TopK, Admission::All), (base, Admission::All), (base, self.memory.admission())];
        let mut beside = Vec::new();
        for run in all {
            // The router's own row is below them.
            if run != (self.router, self.memory.admission()) && !beside.contains(&run) {
                beside.push(run);
            }
        }
        beside
    }

    /// Checks what was asked for against what there is, before the model runs.
    fn check(&self, layers: usize, experts: usize, top_k: usize, rule: Option<&CapacityRule>) -> Result<()> {
        let top_k = self.top_k.unwrap_or(top_k);
        match top_k {
            0 => return Err(Error::TopKZero.into()),
            _ if top_k > experts => return Err(Error::TopKExceedsExperts { top_k, experts }.into()),
            _ => {}
        }
        let cached = self.cached_experts.unwrap_or(0);
        ExpertMemory::new(1, experts, cached, self.memory.policy(), self.memory.admission())?;
        rule.map(|rule| rule.of_layer(0, layers)?.capacity(0, experts, top_k)).transpose()?;
        Ok(())
    }

    fn source(&self, global: &Global, rule: Option<&CapacityRule>) -> Result<Source> {
        if let Some(path) = &self.logits {
            let page = self.report.open(&Inputs::default().file("--logits", path))?;
            let _reading = global.waiting("reading the trace");
            let trace = GateTrace::read(path)?;
            self.check(trace.layers.len(), trace.experts, trace_top_k(self.top_k, &trace)?, rule)?;
            let (name, blocks) = (path.display().to_string(), (0..trace.layers.len()).collect());
            return Ok(Source { trace, name, bytes_per_expert: None, model: None, blocks, page, text: None });
        }
        let loading = global.waiting("loading the model");
        let files = self.model.files()?;
        let page = self.report.open(&Inputs::default().texts(&self.text).model(&files))?;
        let model = Model::new(&files, &LoadOptions::default())?;
        let spec = model.decoder().spec();
        self.check(spec.moe_blocks().count(), spec.moe.experts, spec.moe.top_k, rule)?;
        let text = TextOptions {
            text: self.text.clone(),
            tokens: self.tokens,
            batch_tokens: TextOptions::BATCH_TOKENS,
            batches: Batches::OneKind,
            shuffle: None,
        };
        let (_, batches) = text.batches(&model)?;
        drop(loading);
        let bar = global.progress(batches.iter().map(|batch| batch.live_tokens()).sum());
        bar.set_message("tracing");
        let trace = GateTrace::capture(model.decoder(), &batches, |tokens| bar.inc(tokens))?;
        let experts = files.expert_sizes()?;
        let (name, blocks) = (model.name().to_owned(), spec.moe_blocks().collect());
        let summary = Some(ModelSummary::new(&name, spec));
        let shown = |ids: &Vec<u32>| ShownText::of_ids(&model, ids, "text", None, MOST_TOKENS);
        let text = trace.token_ids.as_ref().filter(|_| page.is_some()).map(shown).transpose()?;
        Ok(Source { trace, name, bytes_per_expert: Some(experts.first), model: summary, blocks, page, text })
    }
}
