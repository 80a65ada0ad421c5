//! Options that several commands share, and what they stand for in the library.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
#[cfg(feature = "hub")]
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use candle_core::DType;
use clap::{Args, ValueEnum};
use phase_moe::checkpoint::text;
use phase_moe::eval::{Batching, EvalText, GateTrace, Mixing};
use phase_moe::parallel::ExpertParallel;
use phase_moe::routing::{Knowledge, Profile, Rounding, Shares};
use phase_moe::{
    Admission, Batch, CacheRouter, CapacityRule, Decoder, Error, LoadOptions, Model, Placement, Policy, Router,
    RouterKind, Weights, offload,
};

#[cfg(feature = "hub")]
use crate::global::QUIET;
use crate::mistake::UserMistake;
use crate::notice::notice;
use crate::placement::{PlacementChoice, PlacementFile};
use crate::ranks::Ranks;
use crate::{bundled, hub};

#[derive(Clone, Copy, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

/// When experts are read ahead.
#[derive(Clone, Copy, ValueEnum)]
pub enum Prefetch {
    Auto,
    Off,
    Always,
}

#[derive(Args)]
pub struct ModelSource {
    /// Checkpoint directory in Hugging Face layout, GGUF file, or a model on the hub as org/name [default: the bundled tiny-moe]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

impl ModelSource {
    /// Opens the files; nothing is loaded yet.
    pub fn files(&self) -> Result<Weights> {
        Ok(match &self.model {
            Some(name) if hub::is_name(name) => from_hub(name)?,
            Some(directory) => Weights::open(directory).with_context(|| format!("--model {}", directory.display()))?,
            None => bundled::files()?,
        })
    }

    /// What was given, to be said again.
    pub fn given(&self) -> Option<&Path> {
        self.model.as_deref()
    }
}

/// A number of bytes, with the words it was given in.
#[derive(Clone)]
pub struct Bytes {
    pub typed: String,
    pub bytes: u64,
}

impl std::str::FromStr for Bytes {
    type Err = <ByteSize as std::str::FromStr>::Err;

    fn from_str(typed: &str) -> std::result::Result<Self, Self::Err> {
        Ok(Self { typed: typed.trim().into(), bytes: typed.parse::<ByteSize>()?.as_u64() })
    }
}

/// The files of a model on the hub.
#[cfg(feature = "hub")]
fn from_hub(name: &Path) -> Result<Weights> {
    let name = name.to_string_lossy();
    let directory = hub::directory(&name, !QUIET.load(Ordering::Relaxed))?;
    let files = Weights::open(&directory).with_context(|| format!("--model {name}, in {}", directory.display()))?;
    Ok(files)
}

#[cfg(not(feature = "hub"))]
fn from_hub(name: &Path) -> Result<Weights> {
    let message =
        format!("--model {}: no such directory; for models on the hub, build with --features hub", name.display());
    Err(UserMistake(message).into())
}

#[derive(Args)]
pub struct ModelOptions {
    #[command(flatten)]
    source: ModelSource,
    /// Dtype of activations; weights stay as they are stored
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Dtype in which keys and values are kept [default: f32 with --dtype f32, else f16]
    #[arg(long, value_enum)]
    kv_dtype: Option<Dtype>,
    /// Leave experts in their files and hold at most so many bytes of them in memory, for example 64MiB [default: all]
    #[arg(long, value_name = "BYTES")]
    expert_cache: Option<ByteSize>,
    /// Read experts ahead of their use in decode: where trials say that it helps, never or always; results are the same
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto", requires = "expert_cache")]
    prefetch: Prefetch,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl ModelOptions {
    fn load_options(&self, memory: Option<&MemoryOptions>, parallel: Option<ExpertParallel>) -> Result<LoadOptions> {
        let expert_cache = match self.expert_cache {
            None => None,
            Some(bytes) => {
                let budget = usize::try_from(bytes.as_u64()).context("--expert-cache")?;
                let prefetch = match self.prefetch {
                    Prefetch::Auto => offload::Prefetch::Auto,
                    Prefetch::Off => offload::Prefetch::Off,
                    Prefetch::Always => offload::Prefetch::Always,
                };
                let memory = memory.map(|memory| (memory.policy(), memory.admission()));
                let (policy, admission) = memory.unwrap_or((Policy::Lru, Admission::default()));
                Some(offload::CacheOptions { policy, admission, prefetch, ..offload::CacheOptions::new(budget) })
            }
        };
        let mut options = LoadOptions::default().with_dtype(self.dtype.into()).with_expert_cache(expert_cache);
        options.kv_dtype = self.kv_dtype.map(DType::from);
        Ok(options.with_parallel(parallel))
    }

    /// Checks what is said of fast memory: a logical memory and an expert cache would each say what is in it, and without one of them
    /// there is none that a policy could be for.
    pub fn check_memory(&self, cached_experts: Option<usize>, memory: &MemoryOptions) -> Result<()> {
        if self.expert_cache.is_some() && cached_experts.is_some() {
            let message =
                "--cached-experts keeps account of a memory, which --expert-cache has already: give one of them";
            return Err(UserMistake(message.into()).into());
        }
        match memory.first_given().filter(|_| self.expert_cache.is_none() && cached_experts.is_none()) {
            Some(option) => {
                let message = format!("{option} says nothing by itself: add --expert-cache or --cached-experts");
                Err(UserMistake(message).into())
            }
            None => Ok(()),
        }
    }

    /// Loads the model from files that are open.
    pub fn load_plain(&self, files: &Weights) -> Result<Model> {
        Ok(Model::new(files, &self.load_options(None, None)?)?)
    }

    /// Opens the files; nothing is loaded yet.
    pub fn files(&self) -> Result<Weights> {
        self.source.files()
    }

    /// Loads the model from files that are open, with an expert cache, where one is asked for, that goes by `memory`; with its experts over the
    /// ranks of a job, if there are any.
    pub fn load_from(
        &self,
        files: &Weights,
        memory: &MemoryOptions,
        parallel: Option<ExpertParallel>,
    ) -> Result<Model> {
        Ok(Model::new(files, &self.load_options(Some(memory), parallel)?)?)
    }

    /// Loads the transformer alone, which needs no tokenizer, from files that are open.
    pub fn decoder_from(&self, files: &Weights) -> Result<Decoder> {
        Ok(Decoder::load(files, &self.load_options(None, None)?)?)
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Batches {
    OneKind,
    Mixed,
}

#[derive(Args)]
pub struct TextOptions {
    /// Text to run over, repeatable [default: the bundled held-out text of three kinds]
    #[arg(long, value_name = "FILE")]
    pub text: Vec<PathBuf>,
    /// How many tokens of it, shared evenly over the texts [default: all]
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// Tokens per forward pass
    #[arg(long, value_name = "N", default_value_t = Self::BATCH_TOKENS)]
    pub batch_tokens: usize,
    /// Whether a batch holds one text or all of them in turn
    #[arg(long, value_enum, default_value = "one-kind")]
    pub batches: Batches,
    /// Seed that shuffles the sequences of each text, so that others meet in a batch [default: the text's order]
    #[arg(long, value_name = "S")]
    pub shuffle: Option<u64>,
}

impl TextOptions {
    /// Tokens per forward pass where nobody says otherwise.
    pub const BATCH_TOKENS: usize = 512;

    /// The texts and their batches.
    pub fn batches(&self, model: &Model) -> Result<(Vec<EvalText>, Vec<Batch>)> {
        let texts = self.texts(model)?;
        let batches = self.batching().batches(model.sequence_start(), &texts)?;
        Ok((texts, batches))
    }

    /// Of each token of the batches the number of its text, where there are several.
    pub fn kinds(&self, model: &Model, texts: &[EvalText]) -> Result<Option<Vec<u32>>> {
        let kinds = (texts.len() > 1).then(|| self.batching().kinds(model.sequence_start(), texts));
        Ok(kinds.transpose()?)
    }

    fn texts(&self, model: &Model) -> Result<Vec<EvalText>> {
        let read = |path: &PathBuf| -> Result<(String, String)> {
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            Ok((name, read_text(path)?))
        };
        let texts = match self.text.as_slice() {
            [] => bundled::texts(),
            paths => paths.iter().map(read).collect::<Result<_>>()?,
        };
        let encode = |(name, text): (String, String)| Ok(EvalText { name, ids: model.encode(&text)? });
        texts.into_iter().map(encode).collect()
    }

    fn batching(&self) -> Batching {
        let mixing = match self.batches {
            Batches::OneKind => Mixing::OneKind,
            Batches::Mixed => Mixing::Mixed,
        };
        Batching { tokens: self.tokens, batch_tokens: self.batch_tokens, mixing, shuffle: self.shuffle }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoundingName {
    Exact,
    Ceil,
}

#[derive(Args)]
pub struct CapacityOptions {
    /// Relative capacities of the experts: uniform, mild, strong or extreme [default: uniform]
    #[arg(long, value_name = "NAME", value_parser = parse::<Profile>)]
    profile: Option<Profile>,
    /// How shares of the room become whole slots [default: exact]
    #[arg(long, value_enum, value_name = "RULE")]
    capacity: Option<RoundingName>,
    /// Limits per device: experts in N contiguous groups
    #[arg(long, value_name = "N")]
    pub devices: Option<usize>,
    /// Relative speeds of the devices: one twice as fast has twice the experts and twice the room
    #[arg(long, value_name = "A,B,..", value_delimiter = ',', allow_hyphen_values = true)]
    pub device_speeds: Vec<f64>,
    /// The devices are the ranks of a job: they say where experts are, too.
    #[arg(skip)]
    over_ranks: bool,
    /// Experts on devices: contiguous groups in proportion to speed (speed) or equally large (equal), or as a file of `place`
    /// says, with as many devices as it has [default: speed]
    #[arg(long, value_name = "speed|equal|FILE")]
    placement: Option<PlacementChoice>,
    /// The file's placements, read once.
    #[arg(skip)]
    placed: OnceCell<(usize, Vec<Placement>)>,
    /// Seed of routers that draw and of shuffled profiles
    #[arg(long, value_name = "S", default_value_t = 42)]
    pub seed: u64,
}

/// More devices than a layer can have experts.
const MAX_DEVICES: usize = u16::MAX as usize;

impl CapacityOptions {
    /// The rule for `router` and one capacity factor, none without a factor: then no option may ask for a limit. `needed` says what
    /// the command takes to set one. (`compare` has a row for each router: one that knows no limit says there that it had none.)
    pub fn rule_if(&self, router: RouterKind, factor: Option<f64>, needed: &str) -> Result<Option<CapacityRule>> {
        if let Some(factor) = factor {
            let rule = self.rule(factor)?;
            refuse_unheard(&[router], Knowledge::Limits, &[("--capacity-factor", true)])?;
            return Ok(Some(rule));
        }
        match self.given().into_iter().find(|(_, given)| *given && !self.over_ranks) {
            Some((option, _)) => Err(UserMistake(format!("{option} limits nothing by itself: add {needed}")).into()),
            None => Ok(None),
        }
    }

    fn given(&self) -> [(&'static str, bool); 5] {
        [
            ("--devices", self.devices.is_some()),
            ("--device-speeds", !self.device_speeds.is_empty()),
            ("--placement", self.placement.is_some()),
            ("--profile", self.profile.is_some()),
            ("--capacity", self.capacity.is_some()),
        ]
    }

    /// Takes the ranks of a job as devices, where there are some.
    pub fn over(&mut self, ranks: &Ranks) -> Result<()> {
        let Some(count) = ranks.count() else { return Ok(()) };
        let given = self.devices.or(Some(self.device_speeds.len()).filter(|&speeds| speeds > 0));
        if let Some(given) = given.filter(|&given| given != count) {
            let message = format!("--expert-parallel: expected as many devices as ranks, {count}, got {given}");
            return Err(UserMistake(message).into());
        }
        (self.devices, self.over_ranks) = (Some(count), true);
        Ok(())
    }

    /// The rule for one capacity factor.
    pub fn rule(&self, factor: f64) -> Result<CapacityRule> {
        // How many experts there are is not known yet; nobody has more.
        if let Some(devices) = self.devices.filter(|devices| !(1..=MAX_DEVICES).contains(devices)) {
            let message = format!("--devices is {devices}: expected at least 1, and at most the model's experts");
            return Err(UserMistake(message).into());
        }
        let shares = self.shares()?;
        if self.is_per_device() && self.profile.is_some_and(|profile| profile != Profile::Uniform) {
            let message = "--profile is for limits per expert: with --devices, give --device-speeds";
            return Err(UserMistake(message.into()).into());
        }
        let rounding = match self.capacity {
            None | Some(RoundingName::Exact) => Rounding::Exact,
            Some(RoundingName::Ceil) => Rounding::Ceil,
        };
        let rule = CapacityRule::new(factor, shares).with_rounding(rounding);
        // Of no tokens there is no limit, but everything else is checked; but for placements, which were when they were read.
        if !matches!(rule.shares, Shares::Placed { .. }) {
            rule.capacity(0, MAX_DEVICES, 1)?;
        }
        Ok(rule)
    }

    fn shares(&self) -> Result<Shares> {
        let (devices, mut speeds) = (self.devices, self.device_speeds.clone());
        if let Some(devices) = devices.filter(|&devices| !speeds.is_empty() && devices != speeds.len()) {
            let message = format!("--device-speeds: expected --devices {devices} values, got {}", speeds.len());
            return Err(UserMistake(message).into());
        }
        if let Some(PlacementChoice::File(path)) = &self.placement {
            let (of_file, placements) = match self.placed.get() {
                Some(placed) => placed,
                None => {
                    let placed = PlacementFile::read(path)?;
                    self.placed.get_or_init(|| placed)
                }
            };
            let file = path.display();
            if let Some(devices) = devices.filter(|devices| devices != of_file) {
                let message = format!("--placement {file}: expected --devices {devices}, got {of_file} devices");
                return Err(UserMistake(message).into());
            }
            speeds = if speeds.is_empty() { vec![1.0; *of_file] } else { speeds };
            if speeds.len() != *of_file {
                let got = speeds.len();
                let message = format!(
                    "--device-speeds: expected one for each of {of_file} devices of --placement {file}, got {got}"
                );
                return Err(UserMistake(message).into());
            }
            return Ok(Shares::Placed { placements: placements.clone(), speeds });
        }
        speeds = if speeds.is_empty() { vec![1.0; devices.unwrap_or(0)] } else { speeds };
        Ok(match &self.placement {
            Some(_) if !self.is_per_device() => {
                let message = "--placement speed and equal are of devices: add --devices or --device-speeds";
                return Err(UserMistake(message.into()).into());
            }
            None if !self.is_per_device() => {
                Shares::PerExpert { profile: self.profile.unwrap_or(Profile::Uniform), seed: self.seed }
            }
            Some(PlacementChoice::Equal) => Shares::EqualGroups { speeds },
            _ => Shares::PerDevice { speeds },
        })
    }

    /// True when limits are per device.
    pub fn is_per_device(&self) -> bool {
        self.devices.is_some() || !self.device_speeds.is_empty() || self.placement_file().is_some()
    }

    /// Where experts are, if it was said.
    pub fn placement(&self) -> Option<String> {
        Some(match self.placement.as_ref()? {
            PlacementChoice::Speed => "speed".into(),
            PlacementChoice::Equal => "equal".into(),
            PlacementChoice::File(path) => path.display().to_string(),
        })
    }

    /// The file that says where experts are.
    fn placement_file(&self) -> Option<&Path> {
        match &self.placement {
            Some(PlacementChoice::File(path)) => Some(path),
            _ => None,
        }
    }
}

#[derive(Args)]
pub struct CacheOptions {
    /// Bonus of an expert in fast memory, in score ranges [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    cache_bonus: Option<f64>,
    /// Largest share of a token's gate mass that swaps for such experts may cost [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    max_mass_loss: Option<f64>,
    /// Experts of a token that always stay [default: 1]
    #[arg(long, value_name = "N")]
    keep_top: Option<usize>,
    /// Steer the bonus towards this share of hits
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    target_hit_rate: Option<f64>,
}

impl CacheOptions {
    /// Those that a sweep over bonuses takes.
    pub fn of(max_mass_loss: Option<f64>, keep_top: Option<usize>) -> Self {
        Self { cache_bonus: None, max_mass_loss, keep_top, target_hit_rate: None }
    }

    /// The settings of the memory-aware routers, for `routers`; options that say nothing to any of them are a mistake.
    pub fn settings(&self, routers: &[RouterKind]) -> Result<CacheRouter> {
        let given = [
            ("--cache-bonus", self.cache_bonus.is_some()),
            ("--max-mass-loss", self.max_mass_loss.is_some()),
            ("--keep-top", self.keep_top.is_some()),
            ("--target-hit-rate", self.target_hit_rate.is_some()),
        ];
        refuse_unheard(routers, Knowledge::Memory, &given)?;
        let default = CacheRouter::default();
        let settings = CacheRouter::new(
            self.cache_bonus.unwrap_or(default.bonus()),
            self.max_mass_loss.unwrap_or(default.max_mass_loss()),
        )?;
        let settings = settings.with_keep_top(self.keep_top.unwrap_or(default.keep_top()));
        Ok(match self.target_hit_rate {
            Some(target) => settings.with_target_hit_rate(target)?,
            None => settings,
        })
    }
}

/// Refuses options that none of `routers` understands: what a router understands is for the registry to say, and this is the one
/// place where commands ask.
pub fn refuse_unheard(routers: &[RouterKind], told: Knowledge, given: &[(&'static str, bool)]) -> Result<()> {
    let Some((option, _)) = given.iter().find(|(_, given)| *given) else { return Ok(()) };
    if routers.iter().any(|router| router.understands(told)) {
        return Ok(());
    }
    let names = routers.iter().map(|router| router.name()).collect::<Vec<_>>().join(", ");
    let message = match told {
        Knowledge::Limits => {
            let instead = match routers.iter().any(|router| router.understands(Knowledge::Memory)) {
                true => "cache+phase",
                false => "phase or top-k-score",
            };
            format!("{option}: {names} knows no limit: use {instead}")
        }
        Knowledge::Memory if routers.len() == 1 => {
            format!("{option} is for the routers cache and cache+phase, not for {names}")
        }
        Knowledge::Memory => format!("{option} is for the routers cache and cache+phase: name one with --router"),
    };
    Err(UserMistake(message).into())
}

/// What goes in and out of fast memory.
#[derive(Args)]
pub struct MemoryOptions {
    /// Who leaves fast memory: lru, lfu, lfru or affinity [default: lru]
    #[arg(long, value_name = "NAME", value_parser = parse::<Policy>)]
    policy: Option<Policy>,
    /// Which misses enter it: those used enough (affinity) or all [default: affinity]
    #[arg(long, value_name = "NAME", value_parser = parse::<Admission>)]
    admission: Option<Admission>,
}

impl MemoryOptions {
    /// Who leaves.
    pub fn policy(&self) -> Policy {
        self.policy.unwrap_or(Policy::Lru)
    }

    /// Who enters.
    pub fn admission(&self) -> Admission {
        self.admission.unwrap_or_default()
    }

    /// What was given, to be said again.
    pub fn given(&self) -> Vec<(&'static str, String)> {
        let policy = self.policy.map(|policy| ("--policy", policy.to_string()));
        let admission = self.admission.map(|admission| ("--admission", admission.to_string()));
        policy.into_iter().chain(admission).collect()
    }

    fn first_given(&self) -> Option<&'static str> {
        let given = [("--policy", self.policy.is_some()), ("--admission", self.admission.is_some())];
        given.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }
}

/// How many experts a token gets.
#[derive(Args)]
pub struct TopKOptions {
    /// Experts per token [default: the model's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Experts per token of each MoE layer, the first layer's first [default: the model's]
    #[arg(long, value_name = "A,B,..", value_delimiter = ',', conflicts_with = "top_k")]
    layer_top_k: Vec<usize>,
}

impl TopKOptions {
    /// Sets what is given; nothing leaves a model as it is.
    pub fn set(&self, decoder: &mut Decoder) -> Result<()> {
        if let Some(top_k) = self.top_k {
            decoder.set_top_k(&[top_k])?;
        }
        let (layers, given) = (decoder.moe_layers().count(), self.layer_top_k.len());
        match given {
            0 => Ok(()),
            // One number would stand for all.
            _ if given != layers => {
                let message = format!("--layer-top-k: expected {layers} values, one for each MoE layer, got {given}");
                Err(UserMistake(message).into())
            }
            _ => decoder.set_top_k(&self.layer_top_k).context("--layer-top-k"),
        }
    }
}

/// The fewest experts that a token gets in a layer: where these have a limit, all have.
pub fn fewest_experts(decoder: &Decoder) -> usize {
    decoder.moe_layers().map(|layer| layer.spec().top_k).min().unwrap_or(1)
}

/// The one number of experts per token to route a trace with.
pub fn trace_top_k(given: Option<usize>, trace: &GateTrace) -> Result<usize> {
    match (given, trace.layer_top_k.as_slice()) {
        (Some(top_k), _) => Ok(top_k),
        (None, []) => Ok(trace.top_k),
        (None, each) => {
            let each: Vec<String> = each.iter().map(usize::to_string).collect();
            let message =
                format!("--logits: taken with --layer-top-k {}: give one number with --top-k", each.join(","));
            Err(UserMistake(message).into())
        }
    }
}

/// Sets router and room of every layer.
pub fn set_routing(decoder: &mut Decoder, router: Arc<dyn Router>, rule: Option<CapacityRule>) {
    decoder.set_router(router);
    decoder.set_capacity(rule);
}

/// Reads text from a file, or from whatever else has a path.
pub fn read_text(path: &Path) -> Result<String> {
    Ok(std::fs::read(path).and_then(text).map_err(|error| Error::Io { path: path.into(), reason: error })?)
}

/// A clap parser from `FromStr` with our own error text.
pub fn parse<T: std::str::FromStr<Err = Error>>(text: &str) -> std::result::Result<T, String> {
    text.parse().map_err(|error: Error| error.to_string())
}

/// Prints one JSON document.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(value)?)?;
    Ok(())
}

/// Says on standard error that a limit was asked for and not applied, because batches were too small for it.
pub fn warn_unlimited(rule: &CapacityRule, unlimited: usize, batches: usize) {
    if unlimited > 0 {
        let pool = if matches!(rule.shares, Shares::PerExpert { .. }) { "expert" } else { "device" };
        notice(format_args!(
            "capacity factor {:?} per {pool}: no limit in {unlimited} of {batches} batches, which have fewer than {} slots per \
             {pool} on average",
            rule.factor, rule.minimum_mean
        ));
    }
}

/// Says once that an expert cache is too small for what one layer needs at a time.
pub fn warn_streamed(decoder: &Decoder) {
    if let Some(warning) = decoder.expert_cache().and_then(|cache| cache.take_warning()) {
        notice(format_args!("warning: {warning}"));
    }
}
