//! Experts that do not fit in memory: tokens per second against the budget, beside memory-mapping held to the same memory.
//!
//! What is timed are the MoE layers of a model in decode: gate scores, routing, experts, token after token, each layer with the
//! hidden states and logits that it had in one forward pass over the text. Modes: *mapped*, weights in mapped files, of which the
//! step's experts are asked for at once and the least recently used ones' pages are dropped after it; *lru*, an expert cache
//! without anything else; *cache*, the same with admission by affinity and the memory-aware router (bonus 0.15 of the score
//! range, at most 10 % of a token's gate mass). A run begins with nothing in memory. What its first half of tokens needs is
//! mostly read for the first time; rates, hits and bytes are those of the second half, and the first half's tokens per second
//! stand beside them. Memory is touched before every run.
//! Perplexity is that of decode over the bundled text with as many experts in memory; random weights have none.
//!
//! ```text
//! cargo run --release --example offload_table                     # the bundled model, then one of OLMoE's shape (writes 3.2 GB)
//! cargo run --release --example offload_table -- --models tiny --shares 0.25,0.5 --json
//! ```
//!
//! Reads `models/tiny-moe`, which a checkout of the repository has and the published package has not.
//! Linux only: mapped pages are asked for and dropped by its calls, and `/proc` says what was read.

mod mapped;
mod model;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use mapped::{Mapped, Piece};
use phase_moe::eval::{Batching, Decoding, EvalText};
use phase_moe::experts::ProjectionWeights;
use phase_moe::offload::{LoadedExpert, Part, RequestLog};
use phase_moe::{
    Activation, Admission, Assignment, Batch, CacheOptions, CacheRouter, Capacity, Checkpoint, Decoder, DispatchPlan,
    Engine, Error, ExpertCache, ExpertSet, ExpertWeights, LoadOptions, Logits, Matrix, Model, ModelSpec, Policy,
    RouteContext, RouteRequest, RouteState, Router, Scratch, TopK, Weights, Work,
};
use serde::Serialize;

#[derive(Parser)]
struct Options {
    /// Which models
    #[arg(long, value_delimiter = ',', default_value = "tiny,olmoe")]
    models: Vec<Which>,
    /// Budgets as shares of all experts' bytes
    #[arg(long, value_delimiter = ',', default_value = "0.05,0.1,0.25,0.5,0.75,1")]
    shares: Vec<f64>,
    /// Tokens that are decoded, in two halves [default: 1024 of the bundled model, 96 of the other]
    #[arg(long)]
    tokens: Option<usize>,
    /// Tokens of text for perplexity
    #[arg(long, default_value_t = 8192)]
    perplexity_tokens: usize,
    /// Where the model of OLMoE's shape is written
    #[arg(long, default_value = "target/offload-olmoe")]
    directory: PathBuf,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Which {
    Tiny,
    Olmoe,
}

#[derive(Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Mapped,
    Lru,
    Cache,
}

#[derive(Serialize)]
struct Row {
    model: &'static str,
    mode: Mode,
    budget_share: f64,
    tokens_per_second: f64,
    /// Of the first half, from nothing in memory.
    cold_tokens_per_second: f64,
    hit_rate: Option<f64>,
    belady_hit_rate: Option<f64>,
    bytes_read_per_token: f64,
    /// (0.01 = +1 % over all experts in memory)
    perplexity_vs_dropless: Option<f64>,
    /// Bytes read over the time that steps waited for them; mapped reads have no such time.
    waiting_gb_per_second: Option<f64>,
}

#[derive(Serialize)]
struct Table {
    disk_gb_per_second: f64,
    rows: Vec<Row>,
}

/// A model and what its MoE layers saw in one forward pass.
struct Subject {
    which: Which,
    files: Weights,
    spec: ModelSpec,
    /// Of every layer, `[tokens, experts]` and `[tokens, hidden]`.
    logits: Vec<Vec<f32>>,
    inputs: Vec<Vec<f32>>,
    tokens: usize,
    text: Option<(Decoder, Vec<Batch>, f64)>,
}

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe")
}

impl Subject {
    fn new(which: Which, options: &Options) -> Result<Self> {
        let directory = match which {
            Which::Tiny => bundled(),
            Which::Olmoe => model::write(&options.directory)?,
        };
        let files = Weights::open(&directory)?;
        let spec = files.spec()?.clone();
        let (decoder, ids, text) = match which {
            Which::Tiny => {
                let model = Model::new(&files, &LoadOptions::default())?;
                let mut texts = Vec::new();
                for name in ["scripture", "code", "reference"] {
                    let text = std::fs::read_to_string(directory.join("eval").join(name).with_extension("txt"))?;
                    texts.push(EvalText { name: name.into(), ids: model.encode(&text)? });
                }
                let ids = texts[0].ids.clone();
                let batching = Batching { tokens: Some(options.perplexity_tokens), ..Batching::default() };
                let batches = batching.batches(&[], &texts)?;
                let decoder = model.decoder().clone();
                let plain = phase_moe::eval::dropless(&decoder, &batches, |_| ())?.perplexity;
                (decoder.clone(), ids, Some((decoder, batches, plain)))
            }
            Which::Olmoe => {
                let store = files.expert_store()?;
                let all: usize = (0..spec.layers).map(|layer| spec.moe.experts * store.slab_bytes(layer)).sum();
                let options = LoadOptions::default().with_expert_cache(CacheOptions::new(all));
                let ids = (0..4096u32).map(|at| at.wrapping_mul(2_654_435_761) >> 22).collect();
                (Decoder::load(&files, &options)?, ids, None)
            }
        };
        let tokens = options.tokens.unwrap_or(if which == Which::Tiny { 1024 } else { 96 });
        let ids = ids.get(..tokens).context("as many tokens of text")?;
        let (mut logits, mut inputs) = (Vec::new(), Vec::new());
        let mut state = decoder.batch_state().keeping_routed();
        decoder.forward(&Batch::new(&[ids])?, &mut state)?;
        for routed in state.routed() {
            logits.push(routed.logits.flatten_all()?.to_vec1()?);
            inputs.push(routed.input.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1()?);
        }
        Ok(Self { which, files, spec, logits, inputs, tokens, text })
    }

    /// Gate, up and down projection of every layer's experts, in files of both models.
    fn pieces(&self) -> Result<Vec<Vec<[Piece; 3]>>> {
        let piece = |layer: usize, id: usize, projection: &str| {
            let name = format!("model.layers.{layer}.mlp.experts.{id}.{projection}.weight");
            Piece::new(self.files.checkpoint().entry(&name)?)
        };
        let expert = |layer, id| {
            Ok([piece(layer, id, "gate_proj")?, piece(layer, id, "up_proj")?, piece(layer, id, "down_proj")?])
        };
        let layer = |layer| (0..self.spec.moe.experts).map(|id| expert(layer, id)).collect();
        (0..self.spec.layers).map(layer).collect()
    }

    fn run(&self, mode: Mode, share: f64) -> Result<Row> {
        let (moe, layers) = (&self.spec.moe, self.spec.layers);
        let store = self.files.expert_store()?;
        let budget =
            (share * (0..layers).map(|layer| moe.experts * store.slab_bytes(layer)).sum::<usize>() as f64) as usize;
        let budget = budget.max(store.slab_bytes(0));
        let cached = budget / layers / store.slab_bytes(0);
        let cache = CacheOptions::new(budget);
        let mut experts = match mode {
            Mode::Mapped => Source::Mapped(Mapped::new(self.files.checkpoint(), self.pieces()?, cached)?),
            Mode::Lru => Source::Cached(Arc::new(ExpertCache::new(Arc::new(store), cache)?)),
            Mode::Cache => {
                let cache = CacheOptions { admission: Admission::default(), ..cache }.sparing(&store);
                Source::Cached(Arc::new(ExpertCache::new(Arc::new(store), cache)?))
            }
        };
        let counted = match &experts {
            Source::Cached(cache) => {
                (0..layers).map(|layer| self.files.cached_experts(cache, layer)).collect::<Result<_, _>>()?
            }
            Source::Mapped(_) => Vec::new(),
        };
        let router: Arc<dyn Router> = match mode {
            Mode::Cache => Arc::new(CacheRouter::new(0.15, 0.1)?),
            _ => Arc::new(TopK { drop: None }),
        };
        let (engine, capacity) = (Engine::default(), Capacity::unlimited(moe.experts)?);
        let (mut states, mut scratch) = (vec![RouteState::default(); layers], Scratch::default());
        let mut assignment = Assignment::default();
        let (mut resident, mut wanted) = (ExpertSet::new(moe.experts)?, ExpertSet::default());
        let mut logs = vec![RequestLog::default(); layers];
        let mut cold_logs = logs.clone();
        let mut output = vec![0.0; moe.hidden];
        let (mut hits, mut requests) = (0, 0);
        let half = self.tokens / 2;
        let (mut before, mut cold) = (Reads::of(&experts), f64::NAN);
        let mut started = Instant::now();
        for token in 0..self.tokens {
            if token == half {
                cold = half as f64 / started.elapsed().as_secs_f64();
                (hits, requests) = (0, 0);
                cold_logs = logs.clone();
                (before, started) = (Reads::of(&experts), Instant::now());
            }
            for layer in 0..layers {
                let row = &self.logits[layer][token * moe.experts..][..moe.experts];
                let scores = moe.scoring.scores(&Logits::new(row, 1, moe.experts)?, None)?;
                if let Some(cached) = counted.get(layer) {
                    cached.counted_into(&mut resident)?;
                }
                let context =
                    RouteContext { layer, step: token as u64, resident: Some(&resident), ..RouteContext::default() };
                let request = RouteRequest::new(&scores, moe.top_k, &capacity, context)?;
                router.route_into(&request, &mut states[layer], &mut scratch, &mut assignment)?;
                assignment.used_experts(&mut wanted)?;
                logs[layer].push(&wanted);
                let plan = DispatchPlan::from(&assignment);
                let input = &self.inputs[layer][token * moe.hidden..][..moe.hidden];
                output.fill(0.0);
                let step = experts.step(&engine, layer, input, &wanted, &plan, &mut output)?;
                (hits, requests) = (hits + step.0, requests + step.1);
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let after = Reads::of(&experts);
        let (bytes, waiting) = (
            (after.bytes - before.bytes) as f64,
            after.waiting.zip(before.waiting).map(|(after, before)| after - before),
        );
        let timed = self.tokens - half;
        let kept = match &experts {
            Source::Cached(cache) => cache.capacity(0),
            Source::Mapped(_) => cached,
        };
        // Belady knows all tokens; of the hits it has at most, the second half's are what it gains by it.
        let belady = |logs: &[RequestLog]| logs.iter().map(|log| log.most_hits(kept.min(moe.experts))).sum::<usize>();
        let belady = belady(&logs) - belady(&cold_logs);
        let perplexity = match (&self.text, mode) {
            (None, _) => None,
            (Some(_), Mode::Mapped | Mode::Lru) => Some(0.0),
            (Some((decoder, batches, plain)), Mode::Cache) => {
                let (policy, admission) = (Policy::Lru, Admission::default());
                let decoding = Decoding { router, cached_experts: kept.min(moe.experts), policy, admission };
                Some(decoding.run(decoder, batches, |_, _| Ok(()))?.perplexity / plain - 1.0)
            }
        };
        let rate = |count: usize| (requests > 0).then(|| count as f64 / requests as f64);
        Ok(Row {
            model: if self.which == Which::Tiny { "tiny-moe" } else { "olmoe-shape" },
            mode,
            budget_share: share,
            tokens_per_second: timed as f64 / seconds,
            cold_tokens_per_second: cold,
            hit_rate: rate(hits),
            belady_hit_rate: rate(belady),
            bytes_read_per_token: bytes / timed as f64,
            perplexity_vs_dropless: perplexity,
            waiting_gb_per_second: waiting.filter(|&seconds| seconds > 0.1).map(|seconds| 1e-9 * bytes / seconds),
        })
    }
}

/// What was read so far, and the seconds that steps waited for it.
struct Reads {
    bytes: u64,
    waiting: Option<f64>,
}

impl Reads {
    fn of(experts: &Source) -> Self {
        match experts {
            Source::Cached(cache) => {
                let statistics = cache.statistics();
                Self { bytes: statistics.bytes_read, waiting: Some(statistics.waiting.as_secs_f64()) }
            }
            Source::Mapped(_) => Self { bytes: disk_bytes(), waiting: None },
        }
    }
}

/// Where the experts of a run are.
enum Source {
    Mapped(Mapped),
    Cached(Arc<ExpertCache>),
}

impl Source {
    /// Runs the experts of one step; returns its hits and its requests.
    fn step(
        &mut self,
        engine: &Engine,
        layer: usize,
        input: &[f32],
        wanted: &ExpertSet,
        plan: &DispatchPlan,
        output: &mut [f32],
    ) -> Result<(usize, usize)> {
        let mut busy = plan.busy_experts();
        let mut add = |experts: Vec<ExpertWeights<'_>>| -> phase_moe::Result<()> {
            let work: Vec<Work<'_>> = experts
                .into_iter()
                .zip(busy.by_ref())
                .map(|(expert, (_, range))| Work {
                    expert,
                    tokens: &plan.tokens()[range.clone()],
                    weights: &plan.weights()[range],
                })
                .collect();
            engine.add(Matrix::from_f32(1, input.len(), input)?, &work, output)
        };
        let step = match self {
            Self::Cached(cache) => {
                let step = cache.run(layer, wanted, |loaded| {
                    add(loaded.iter().map(|(_, expert)| weights_of(expert)).collect::<phase_moe::Result<_>>()?)
                })?;
                (step.hits, step.hits + step.misses)
            }
            Self::Mapped(mapped) => {
                mapped.begin(layer, wanted)?;
                add(wanted.iter().map(|expert| mapped.expert(layer, expert.index())).collect::<Result<_>>()?)?;
                mapped.advance(layer, wanted)?
            }
        };
        Ok(step)
    }
}

fn weights_of<'a>(expert: &LoadedExpert<'a>) -> phase_moe::Result<ExpertWeights<'a>> {
    let part = |part: Part| {
        let matrix = expert.matrix(part).ok_or_else(|| Error::shape("expert", format!("{part:?}"), "none"));
        matrix.map(ProjectionWeights::from)
    };
    ExpertWeights::new(Activation::swiglu(), Some(part(Part::Gate)?), part(Part::Up)?, part(Part::Down)?)
}

/// Touches as much memory as all experts take and gives it back: on a virtual machine memory that nobody has touched comes
/// slowly from the host, and the first mode to want it would pay for all.
fn touch(subject: &Subject) -> Result<()> {
    let store = subject.files.expert_store()?;
    let bytes: usize = (0..subject.spec.layers).map(|layer| subject.spec.moe.experts * store.slab_bytes(layer)).sum();
    std::hint::black_box(vec![1u8; bytes]);
    Ok(())
}

/// Bytes that this process has had read from disks, where the system says.
fn disk_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Gigabytes per second of direct reads of 1 MiB, two in flight: the best of three thirds of up to 1.5 GB.
fn disk_rate(checkpoint: &Checkpoint) -> Result<f64> {
    const CHUNK: usize = 1 << 20;
    let sources = checkpoint.sources();
    let mut chunks = Vec::new();
    for (source, (_, bytes)) in sources.iter().enumerate() {
        let count = bytes.len()? / CHUNK as u64;
        chunks.extend((0..count).map(|at| (source, at * CHUNK as u64)));
    }
    chunks.truncate(1536);
    // Pages of their own, which direct reads fill without a copy.
    let read = |(source, at): (usize, u64), buffer: &mut [u8]| {
        let start = buffer.as_ptr().align_offset(mapped::PAGE);
        sources[source].1.read_exact_at(&mut buffer[start..start + CHUNK], at)
    };
    let mut best = 0f64;
    for third in chunks.chunks(chunks.len().div_ceil(3).max(1)) {
        let started = Instant::now();
        std::thread::scope(|scope| {
            let readers: Vec<_> = [0, 1]
                .map(|reader| {
                    scope.spawn(move || {
                        let mut buffer = vec![0; CHUNK + mapped::PAGE];
                        third.iter().skip(reader).step_by(2).try_for_each(|&chunk| read(chunk, &mut buffer))
                    })
                })
                .into_iter()
                .collect();
            readers.into_iter().try_for_each(|reader| reader.join().expect("a reader that does not panic"))
        })?;
        best = best.max(1e-9 * (third.len() * CHUNK) as f64 / started.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".into(), |value| format!("{value:.digits$}"))
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut table = Table { disk_gb_per_second: 0.0, rows: Vec::new() };
    for &which in &options.models {
        let subject = Subject::new(which, &options)?;
        table.disk_gb_per_second = table.disk_gb_per_second.max(disk_rate(subject.files.checkpoint())?);
        for &share in &options.shares {
            for mode in [Mode::Mapped, Mode::Lru, Mode::Cache] {
                touch(&subject)?;
                let row = subject.run(mode, share)?;
                eprintln!("{}", serde_json::to_string(&row)?);
                table.rows.push(row);
            }
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&table)?);
        return Ok(());
    }
    println!("direct reads {:.2} GB/s", table.disk_gb_per_second);
    println!(
        "| model | budget | mode | tokens/s | cold | hits | Belady | MB read a token | GB/s while waiting | perplexity |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for row in &table.rows {
        let percent = |share: Option<f64>| share.map_or("–".into(), |share| format!("{:.1} %", 100.0 * share));
        println!(
            "| {} | {:.0} % | {} | {:.1} | {:.1} | {} | {} | {:.2} | {} | {} |",
            row.model,
            100.0 * row.budget_share,
            serde_json::to_value(row.mode)?.as_str().unwrap_or_default(),
            row.tokens_per_second,
            row.cold_tokens_per_second,
            percent(row.hit_rate),
            percent(row.belady_hit_rate),
            1e-6 * row.bytes_read_per_token,
            shown(row.waiting_gb_per_second, 2),
            row.perplexity_vs_dropless.map_or("–".into(), |more| format!("{:+.2} %", 100.0 * more)),
        );
    }
    Ok(())
}
