//! `compare`: every router over the same text, at every capacity, in one table.

use crate::output::{Inputs, Output};
use crate::ranks::{self, ParallelOptions, Ranks, digest};
use crate::report::compare::{CompareReport, Measured, ModelSummary, TextSummary};
use crate::report::option::{Document, ReportOption};
use crate::report::seen::{Begun, Gathered};
use anyhow::Result;
use clap::Args;
use phase_moe::decoder::ExpertMemory;
use phase_moe::eval::{Dropless, EvalText, Setting, compare};
use phase_moe::routing::{Knowledge, Shares};
use phase_moe::{Batch, CacheRouter, CapacityRule, Model, RouterKind, Weights};

use crate::global::Global;
use crate::options::{
    CacheOptions, CapacityOptions, MemoryOptions, ModelOptions, TextOptions, TopKOptions, fewest_experts, parse,
    print_json, refuse_unheard, warn_streamed, warn_unlimited,
};

/// Runs the model over text with each router at each capacity; prints one table, and in two sentences what it means.
///
/// Without options: dropless; limits per expert at factors 1.0, 1.25 and 2.0; limits per 4 devices at 1.0.
/// With --devices rows without a limit have the loads of these devices too.
///
/// Example: phase-moe compare --devices 4 --capacity-factor 1.0 --router phase,top-k-arrival
#[derive(Args)]
pub struct Compare {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    text: TextOptions,
    /// Routers to compare [default: all but cache and cache+phase, which are run where they are named]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = parse::<RouterKind>)]
    router: Vec<RouterKind>,
    #[command(flatten)]
    top_k: TopKOptions,
    /// Room over demand; routers that know no limit run once, without [default: 1.0, 1.25, 2.0 per expert and 1.0 per 4 devices]
    #[arg(long, value_name = "F,..", value_delimiter = ',', allow_hyphen_values = true)]
    capacity_factor: Vec<f64>,
    #[command(flatten)]
    capacity: CapacityOptions,
    /// Keep account of a memory with room for this many experts of a layer, for cache and cache+phase, which else see only what
    /// the batch itself loads [default: none]
    #[arg(long, value_name = "N")]
    cached_experts: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Print the load of every expert in every layer, for each row [default: for a single router alone, where there are few lines of it]
    #[arg(long)]
    loads: bool,
    #[command(flatten)]
    parallel: ParallelOptions,
    #[command(flatten)]
    report: ReportOption,
    /// One JSON document instead of the table
    #[arg(long)]
    json: bool,
}

/// What is there before the model is loaded.
struct Opened {
    routers: Vec<RouterKind>,
    cache: CacheRouter,
    files: Weights,
    page: Option<Output>,
}

/// What is run.
struct Run {
    opened: Opened,
    model: Model,
    rules: Vec<CapacityRule>,
    texts: Vec<EvalText>,
    batches: Vec<Batch>,
}

impl Compare {
    pub fn run(mut self, global: &Global) -> Result<()> {
        let ranks = self.parallel.start()?;
        ranks.together(self.capacity.over(&ranks))?;
        let loading = global.waiting("loading the model");
        let (opened, facts) = ranks.together(self.open())?;
        ranks.agree(&facts)?;
        let run = ranks.together(self.load(&ranks, opened))?;
        let ids = run.batches.iter().flat_map(|batch| batch.ids().iter().copied());
        ranks.agree(&[("text", digest(ids))])?;
        drop(loading);
        self.measure(global, run)
    }

    /// Everything that can be found wrong before the model is loaded.
    fn open(&self) -> Result<(Opened, [(&'static str, String); 3])> {
        let routers = if self.router.is_empty() { default_routers() } else { distinct(&self.router) };
        let cache = self.cache.settings(&routers)?;
        refuse_unheard(&routers, Knowledge::Memory, &[("--cached-experts", self.cached_experts.is_some())])?;
        // Options that contradict each other are found before the model is loaded.
        self.capacity.rule(1.0)?;
        self.capacity_factor.iter().try_for_each(|&factor| self.capacity.rule(factor).map(drop))?;
        self.model.check_memory(self.cached_experts, &self.memory)?;
        let files = self.model.files()?;
        let page = self.report.open(&Inputs::default().texts(&self.text.text).model(&files))?;
        let facts = ranks::facts(&files)?;
        Ok((Opened { routers, cache, files, page }, facts))
    }

    fn load(&self, ranks: &Ranks, opened: Opened) -> Result<Run> {
        let parallel = ranks.spread(&self.capacity.rule(1.0)?)?;
        let mut model = self.model.load_from(&opened.files, &self.memory, parallel)?;
        self.top_k.set(model.decoder_mut())?;
        let (moe, layers) = (&model.decoder().spec().moe, model.decoder().spec().moe_blocks().count());
        let rules = self.rules(moe.experts)?;
        for rule in &rules {
            rule.of_layer(0, layers)?.capacity(self.text.batch_tokens, moe.experts, moe.top_k)?;
        }
        let (texts, batches) = self.text.batches(&model)?;
        Ok(Run { opened, model, rules, texts, batches })
    }

    fn measure(self, global: &Global, run: Run) -> Result<()> {
        let Run { opened: Opened { routers, cache, page, .. }, model, rules, texts, batches } = run;
        let (moe, fewest) = (&model.decoder().spec().moe, fewest_experts(model.decoder()));
        let layers = model.decoder().spec().moe_blocks().count();
        let tokens: u64 = batches.iter().map(|batch| batch.live_tokens()).sum();
        // What is said of a limit matters to those that know one.
        let is_limited = routers.iter().any(|router| router.understands(Knowledge::Limits));
        let mut never_applied = Vec::new();
        for rule in rules.iter().filter(|_| is_limited) {
            let (of_first, mut unlimited) = (rule.of_layer(0, layers)?, 0);
            for batch in &batches {
                let capacity = of_first.capacity(batch.live_tokens() as usize, moe.experts, fewest)?;
                unlimited += usize::from(capacity.limits().is_none());
            }
            warn_unlimited(rule, unlimited, batches.len());
            if unlimited == batches.len() {
                never_applied.push(rule);
            }
        }
        let memory = self.cached_experts.map(|cached| {
            let (policy, admission) = (self.memory.policy(), self.memory.admission());
            model.decoder().expert_memory(cached, policy, admission)
        });
        let settings = self.settings(&routers, &rules, &cache, memory.transpose()?);
        let own_choice = Setting {
            router: RouterKind::TopK,
            capacity: None,
            seed: self.capacity.seed,
            cache,
            memory: None,
            devices: devices(&rules),
        };
        let own_row = settings.iter().position(|setting| setting.router == RouterKind::TopK);
        let runs = settings.len() + usize::from(own_row.is_none());
        // The page shows the gate's own choice beside everything.
        let gather = || Gathered::new(&model, &texts, &batches, runs);
        let mut gathered = page.as_ref().map(|_| gather()).transpose()?;
        let bar = global.progress(tokens * runs as u64);
        let mut measure = |setting: &Setting, row: Option<usize>, dropless: Option<&Dropless>| {
            if let Some(gathered) = &mut gathered {
                gathered.begin(begun(setting, row));
            }
            compare(model.decoder(), &batches, setting, dropless, |batch, state, bounds| {
                bar.inc(batch.live_tokens());
                gathered.as_mut().map_or(Ok(()), |gathered| gathered.batch(state, bounds))
            })
        };

        bar.set_message("dropless");
        let own_choice = measure(&own_choice, own_row, None)?;
        let (perplexity, tokens_per_second) = (own_choice.perplexity, own_choice.tokens_per_second);
        let dropless = Dropless { perplexity, tokens_per_second };
        let mut rows = Vec::with_capacity(settings.len());
        for (index, setting) in settings.iter().enumerate() {
            bar.set_message(format!("{} of {}: {}", index + 1, settings.len(), setting.router.name()));
            rows.push(match own_row {
                // What others are measured against is that row.
                Some(own_row) if own_row == index => own_choice.clone(),
                _ => measure(setting, Some(index), Some(&dropless))?,
            });
        }
        drop(bar);
        warn_streamed(model.decoder());

        let is_applied =
            |setting: &Setting| setting.capacity.as_ref().is_none_or(|rule| !never_applied.contains(&rule));
        let spec = model.decoder().spec();
        let measured = Measured {
            model: ModelSummary::new(model.name(), spec),
            text: TextSummary {
                files: texts.into_iter().map(|text| text.name).collect(),
                tokens,
                batch_tokens: self.text.batch_tokens,
                shuffle: self.text.shuffle,
            },
            applied: settings.iter().map(is_applied).collect(),
            moe_layers: spec.moe_blocks().collect(),
            placement: self.capacity.placement(),
            device_speeds: self.capacity.device_speeds,
            own_choice,
            rows,
        };
        let report = CompareReport::new(measured, self.loads);
        if let Some(page) = page {
            let document = Document::new("compare", Some(report.model.clone()), &report)?;
            let mut document = document.with_layers(report.moe_layers.clone(), spec.moe.experts, spec.moe.top_k);
            gathered.map(|gathered| gathered.fill(&mut document)).transpose()?;
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

    fn rules(&self, experts: usize) -> Result<Vec<CapacityRule>> {
        let factors = match self.capacity_factor.as_slice() {
            [] if self.capacity.is_per_device() => vec![1.0],
            [] => vec![1.0, 1.25, 2.0],
            factors => distinct(factors),
        };
        let rules: Vec<CapacityRule> =
            factors.into_iter().map(|factor| self.capacity.rule(factor)).collect::<Result<_>>()?;
        if !self.capacity_factor.is_empty() || self.capacity.is_per_device() || experts < DEFAULT_DEVICES {
            return Ok(rules);
        }
        let rounding = self.capacity.rule(1.0)?.rounding;
        let per_device = CapacityRule::per_device(1.0, DEFAULT_DEVICES).with_rounding(rounding);
        Ok(std::iter::once(per_device).chain(rules).collect())
    }

    /// Unlimited top-k once, then every other router at every capacity.
    fn settings(
        &self,
        routers: &[RouterKind],
        rules: &[CapacityRule],
        cache: &CacheRouter,
        memory: Option<ExpertMemory>,
    ) -> Vec<Setting> {
        let seed = self.capacity.seed;
        let limited = |kind: &&RouterKind| kind.understands(Knowledge::Limits);
        let unlimited = routers.iter().filter(|kind| !limited(kind));
        let setting = |router: RouterKind, capacity: Option<CapacityRule>| {
            let memory = memory.clone().filter(|_| router.understands(Knowledge::Memory));
            let devices = devices(rules).filter(|_| capacity.is_none());
            Setting { router, capacity, seed, cache: cache.clone(), memory, devices }
        };
        let mut settings: Vec<Setting> = unlimited.map(|&router| setting(router, None)).collect();
        for rule in rules {
            let limited = routers.iter().filter(limited);
            settings.extend(limited.map(|&router| setting(router, Some(rule.clone()))));
        }
        settings
    }
}

/// What a run is called on the page.
fn begun(setting: &Setting, row: Option<usize>) -> Begun {
    let rule = setting.capacity.as_ref();
    let devices = rule.and_then(|rule| match &rule.shares {
        Shares::PerExpert { .. } => None,
        Shares::PerDevice { speeds } | Shares::EqualGroups { speeds } | Shares::Placed { speeds, .. } => {
            Some(speeds.len())
        }
    });
    let router = setting.router.name();
    let name = match (rule.map(|rule| rule.factor), devices) {
        (None, _) => format!("{router}, no limit"),
        (Some(factor), None) => format!("{router}, {factor:?} per expert"),
        (Some(factor), Some(devices)) => format!("{router}, {factor:?} per {devices} devices"),
    };
    Begun { name, router, capacity_factor: rule.map(|rule| rule.factor), devices, row }
}

/// Devices of the one rule per device that is run without options.
const DEFAULT_DEVICES: usize = 4;

/// The devices of the first rule that has some: loads without a limit are counted on these.
fn devices(rules: &[CapacityRule]) -> Option<Shares> {
    rules.iter().map(|rule| &rule.shares).find(|shares| !matches!(shares, Shares::PerExpert { .. })).cloned()
}

/// Each value once, in order of first appearance.
fn distinct<T: Copy + PartialEq>(values: &[T]) -> Vec<T> {
    let mut distinct = Vec::with_capacity(values.len());
    for &value in values {
        if !distinct.contains(&value) {
            distinct.push(value);
        }
    }
    distinct
}

/// Every router but the memory-aware ones: without an expert cache they have little to go by.
fn default_routers() -> Vec<RouterKind> {
    RouterKind::ALL.into_iter().filter(|kind| !kind.understands(Knowledge::Memory)).collect()
}
