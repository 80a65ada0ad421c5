//! What a step would take on 2 to 512 ranks, from a gate trace, speeds of ranks and figures of links, under four ways to keep ranks level:
//! dropless; dropping by arrival past a rank's room; replicas of hot experts (EPLB's: loads of the first half of the trace say which); and
//! `phase`, which fills ranks exactly. What routers do is done by the library's routers on the tokens of the trace; times are a formula.
//!
//! ```text
//! cargo run --release --example scale_plan                                  # the bundled model's trace, up to as many ranks as experts
//! cargo run --release --example scale_plan -- --trace t.safetensors --rank-speeds 1,1,1,0.5 --latency-micros 20 --gigabytes-per-second 3
//! cargo run --release --example scale_plan -- --trace t.safetensors --hidden 128 --expert-width 64 --measured compare.json
//! ```
//!
//! With `--measured` predictions stand beside a real run: the JSON of `mpirun .. phase-moe compare --expert-parallel --router
//! top-k,top-k-arrival,phase --capacity-factor 1.0 --json` over the text of the trace.
//!
//! The time of a MoE layer, from one batch of `N` tokens that are on ranks in equal parts; `s` is a rank's speed, the largest `max` of all ranks:
//!
//! ```text
//! layer     = gather + route + exchange + max(slots / s) · time of a slot + exchange + max(tokens / s) · other
//! gather    = max(latency · (R − 1) + max(bytes out, bytes in) / bandwidth)     gate logits of every rank to every other: N · experts · 4 · (R − 1)
//! exchange  = max(latency · peers + max(bytes out, bytes in) / bandwidth)       a row of a token once to each other rank that has experts of it
//! time of a slot = 6 · hidden · expert width / flops
//! ```
//!
//! `route` is the router's time for all `N` tokens, as measured here: every rank does it. To every message that is not empty come 32 bytes of head.
//! `straggler` is the sum of the slowest ranks' slots per unit of speed over that of all slots over all speed.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use phase_moe::eval::{Batching, EvalText, GateTrace, LayerTrace, Mixing};
use phase_moe::{
    Assignment, Capacity, CapacityRule, LoadOptions, Logits, Model, Placement, RouteContext, RouteMetrics,
    RouteRequest, RouteState, RouterKind,
};

#[derive(Parser)]
struct Options {
    /// Gate logits, as `phase-moe trace` writes them [default: the bundled model's over its text]
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Ranks to plan for
    #[arg(long, value_delimiter = ',', default_value = "2,4,8,16,32,64,128,256,512")]
    ranks: Vec<usize>,
    /// Relative speeds of ranks, over again where there are more ranks
    #[arg(long, value_delimiter = ',', default_value = "1")]
    rank_speeds: Vec<f64>,
    /// Tokens of a step for each rank, as far as the trace goes
    #[arg(long, default_value_t = 256)]
    tokens_per_rank: usize,
    /// Time that a message takes however short, microseconds: 5 is a fast network's between machines, 0.5 shared memory's, 30 TCP's
    #[arg(long, default_value_t = 5.0)]
    latency_micros: f64,
    /// Bytes that a rank sends and, at the same time, receives: 12.5 is a network of 100 gigabits
    #[arg(long, default_value_t = 12.5)]
    gigabytes_per_second: f64,
    /// Floating point operations of a rank of speed 1 in products of a few hundred rows, 10^9 a second: 500 is a server CPU's
    #[arg(long, default_value_t = 500.0)]
    gigaflops: f64,
    /// Width of a row, which a trace does not say: 2048 is Qwen3-30B-A3B's
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Width of an expert: 768 is Qwen3-30B-A3B's
    #[arg(long, default_value_t = 768)]
    expert_width: usize,
    /// Bytes of a number in a row
    #[arg(long, default_value_t = 4)]
    bytes: usize,
    /// Time for everything but experts, microseconds a token and layer on a rank of speed 1
    #[arg(long, default_value_t = 0.0)]
    other_micros: f64,
    /// A real run over the text of the trace
    #[arg(long, requires = "trace")]
    measured: Option<PathBuf>,
    /// Few tokens and ranks
    #[arg(long)]
    smoke: bool,
}

/// How ranks are kept level.
#[derive(Clone, Copy, PartialEq)]
enum Policy {
    Dropless,
    Arrival,
    Replicas,
    Priced,
}

impl Policy {
    const ALL: [Self; 4] = [Self::Dropless, Self::Arrival, Self::Replicas, Self::Priced];

    fn name(self) -> &'static str {
        match self {
            Self::Dropless => "dropless",
            Self::Arrival => "drop by arrival",
            Self::Replicas => "replicas",
            Self::Priced => "phase",
        }
    }

    fn router(self) -> RouterKind {
        match self {
            Self::Dropless | Self::Replicas => RouterKind::TopK,
            Self::Arrival => RouterKind::TopKArrival,
            Self::Priced => RouterKind::Phase,
        }
    }
}

/// Sums over layers and steps.
#[derive(Default)]
struct Sums {
    tokens: f64,
    /// Of all steps and their layers, in seconds.
    time: f64,
    route: f64,
    /// Seconds of all ranks in which a rank neither computes nor routes.
    messages: f64,
    /// What experts would take on ranks that are exactly level.
    level: f64,
    slowest: f64,
    mean: f64,
    row_bytes: f64,
    logit_bytes: f64,
    kept: f64,
    top_k: f64,
}

/// What is planned.
struct Plan<'a> {
    options: &'a Options,
    trace: &'a GateTrace,
    slot_seconds: f64,
    row_bytes: f64,
}

/// Experts on ranks, each perhaps several times.
struct Copies(Vec<Vec<u16>>);

impl Copies {
    /// Every expert once, contiguous groups in proportion to speed.
    fn single(experts: usize, speeds: &[f64]) -> Result<Self> {
        let placement = Placement::by_speed(experts, speeds)?;
        Ok(Self(placement.device_of().iter().map(|&rank| vec![rank]).collect()))
    }

    /// EPLB's: as many copies more as there are ranks, each of the expert with the most load a copy; then the heaviest copy first, to the rank with
    /// the least load for its speed that has room.
    fn replicated(loads: &[f64], speeds: &[f64]) -> Result<Self> {
        let mut copies = vec![1.0; loads.len()];
        for _ in 0..speeds.len() {
            let load = |expert: usize| loads[expert] / copies[expert];
            if let Some(hottest) = (0..loads.len()).rev().max_by(|&a, &b| load(a).total_cmp(&load(b))) {
                copies[hottest] += 1.0;
            }
        }
        let all: Vec<usize> = (0..loads.len()).flat_map(|expert| vec![expert; copies[expert] as usize]).collect();
        let weight = |expert: usize| loads[expert] / copies[expert];
        let mut order = all.clone();
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        let mut room = vec![0usize; speeds.len()];
        Placement::by_speed(all.len(), speeds)?.device_of().iter().for_each(|&rank| room[usize::from(rank)] += 1);
        let (mut full, mut ranks) = (vec![0.0; speeds.len()], vec![Vec::new(); loads.len()]);
        for expert in order {
            let time = |rank: &usize| (full[*rank] + weight(expert)) / speeds[*rank];
            let free = (0..speeds.len()).filter(|&rank| room[rank] > 0);
            let rank = free.min_by(|a, b| time(a).total_cmp(&time(b))).context("room for every copy")?;
            (full[rank], room[rank]) = (full[rank] + weight(expert), room[rank] - 1);
            ranks[expert].push(rank as u16);
        }
        Ok(Self(ranks))
    }

    /// The rank of a token's slot: copies take turns.
    fn rank(&self, expert: usize, token: usize) -> usize {
        let copies = &self.0[expert];
        usize::from(copies[token % copies.len()])
    }
}

impl Plan<'_> {
    /// Routes the tokens of a step through one layer.
    fn route(
        &self,
        layer: &LayerTrace,
        tokens: &[usize],
        (router, top_k): (RouterKind, usize),
        capacity: &Capacity,
        state: &mut RouteState,
    ) -> Result<(Assignment, RouteMetrics, f64)> {
        let experts = self.trace.experts;
        let row = |&token: &usize| &layer.logits[token * experts..][..experts];
        let logits: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
        let logits = Logits::new(&logits, tokens.len(), experts)?;
        let scores = self.trace.scoring.scores(&logits, layer.selection_bias.as_deref())?;
        let context = RouteContext { layer: layer.layer, ..RouteContext::default() };
        let request = RouteRequest::new(&scores, top_k, capacity, context)?;
        let started = Instant::now();
        let assignment = router.build(0).route(&request, state)?;
        let time = started.elapsed().as_secs_f64();
        let metrics = RouteMetrics::new(&request, &assignment);
        Ok((assignment, metrics, time))
    }

    /// All layers over some steps, on ranks of these speeds. Hot experts are those of the tokens of `history`.
    fn sums(&self, policy: Policy, speeds: &[f64], history: &[usize], steps: &[Vec<usize>]) -> Result<Sums> {
        let (experts, mut sums) = (self.trace.experts, Sums::default());
        for (at, layer) in self.trace.layers.iter().enumerate() {
            let top_k = self.trace.layer_top_k.get(at).copied().unwrap_or(self.trace.top_k);
            let (unlimited, mut state) = (Capacity::unlimited(experts)?, RouteState::default());
            let copies = match policy {
                Policy::Replicas => {
                    let cold = &mut RouteState::default();
                    let (past, ..) = self.route(layer, history, (RouterKind::TopK, top_k), &unlimited, cold)?;
                    let loads: Vec<f64> = past.load().into_iter().map(f64::from).collect();
                    Copies::replicated(&loads, speeds)?
                }
                _ => Copies::single(experts, speeds)?,
            };
            for tokens in steps {
                let capacity = match policy {
                    Policy::Dropless | Policy::Replicas => unlimited.clone(),
                    Policy::Arrival | Policy::Priced => {
                        let placement = Placement::by_speed(experts, speeds)?;
                        CapacityRule::placed(1.0, placement, speeds.to_vec()).capacity(tokens.len(), experts, top_k)?
                    }
                };
                let router = (policy.router(), top_k);
                let (assignment, metrics, route) = self.route(layer, tokens, router, &capacity, &mut state)?;
                sums.kept += metrics.gate_mass;
                sums.top_k += metrics.top_k_gate_mass;
                self.add(&mut sums, &assignment, &copies, speeds, route);
            }
        }
        sums.tokens = steps.iter().map(Vec::len).sum::<usize>() as f64;
        Ok(sums)
    }

    /// Adds one layer of one step.
    fn add(&self, sums: &mut Sums, assignment: &Assignment, copies: &Copies, speeds: &[f64], route: f64) {
        let (tokens, ranks) = (assignment.tokens(), speeds.len());
        let first_of = |rank: usize| (rank * tokens).div_ceil(ranks);
        let (mut slots, mut rows) = (vec![0.0; ranks], vec![0u32; ranks * ranks]);
        let mut last = vec![usize::MAX; ranks];
        for home in 0..ranks {
            for token in first_of(home)..first_of(home + 1) {
                for (expert, _) in assignment.slots(token) {
                    let rank = copies.rank(expert.index(), token);
                    slots[rank] += 1.0;
                    if rank != home && last[rank] != token {
                        rows[home * ranks + rank] += 1;
                    }
                    last[rank] = token;
                }
            }
        }
        let Options { latency_micros, gigabytes_per_second, other_micros, .. } = self.options;
        let link = |peers: f64, out: f64, into: f64| {
            let head = HEAD * peers;
            latency_micros * 1e-6 * peers + (out.max(into) + head) / (gigabytes_per_second * 1e9)
        };
        let most = |of: &dyn Fn(usize) -> f64| (0..ranks).map(of).fold(0.0, f64::max);
        let own = |rank: usize| (first_of(rank + 1) - first_of(rank)) as f64;
        let logits = self.trace.experts as f64 * 4.0;
        let others = (ranks - 1) as f64;
        let gather = most(&|rank| link(others, own(rank) * logits * others, (tokens as f64 - own(rank)) * logits));
        let sum = |numbers: &mut dyn Iterator<Item = u32>| numbers.map(f64::from).sum::<f64>();
        let count = |numbers: &mut dyn Iterator<Item = u32>| numbers.filter(|rows| *rows > 0).count() as f64;
        let exchange = most(&|rank| {
            let out = || (0..ranks).map(move |to| rank * ranks + to);
            let into = || (0..ranks).map(move |from| from * ranks + rank);
            let peers = count(&mut out().map(|at| rows[at])).max(count(&mut into().map(|at| rows[at])));
            let bytes = |rows: f64| rows * self.row_bytes;
            link(peers, bytes(sum(&mut out().map(|at| rows[at]))), bytes(sum(&mut into().map(|at| rows[at]))))
        });
        let busy = |rank: usize| (slots[rank] * self.slot_seconds + own(rank) * other_micros * 1e-6) / speeds[rank];
        let slowest = most(&|rank| slots[rank] / speeds[rank]);
        let mean = slots.iter().sum::<f64>() / speeds.iter().sum::<f64>();
        let other = most(&|rank| own(rank) / speeds[rank]) * other_micros * 1e-6;
        let time = gather + route + 2.0 * exchange + slowest * self.slot_seconds + other;
        sums.time += time;
        sums.route += route;
        sums.messages += (0..ranks).map(|rank| time - route - busy(rank)).sum::<f64>() / ranks as f64;
        sums.level += mean * self.slot_seconds;
        sums.slowest += slowest;
        sums.mean += mean;
        // There and back.
        let (all, pairs) = (sum(&mut rows.iter().copied()), count(&mut rows.iter().copied()));
        sums.row_bytes += 2.0 * (all * self.row_bytes + pairs * HEAD);
        let givers = (0..ranks).filter(|&rank| own(rank) > 0.0).count() as f64;
        sums.logit_bytes += (tokens as f64 * logits + givers * HEAD) * others;
    }
}

/// Bytes before what a message says.
const HEAD: f64 = 32.0;

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.tokens_per_rank > 0, "--tokens-per-rank is 0: expected at least 1");
    let positive = |number: f64| number.is_finite() && number > 0.0;
    ensure!(options.rank_speeds.iter().all(|&speed| positive(speed)), "--rank-speeds: expected positive numbers");
    let rates = [options.gigabytes_per_second, options.gigaflops];
    ensure!(rates.into_iter().all(positive), "--gigabytes-per-second, --gigaflops: expected positive numbers");
    let trace = match &options.trace {
        Some(path) => GateTrace::read(path)?,
        None => bundled(options.smoke)?,
    };
    let (hidden, width) = (options.hidden, options.expert_width);
    let slot_seconds = 6.0 * hidden as f64 * width as f64 / (options.gigaflops * 1e9);
    let plan = Plan { options: &options, trace: &trace, slot_seconds, row_bytes: (hidden * options.bytes) as f64 };
    println!(
        "{} tokens, {} layers of {} experts, top {}; rows of {hidden}, experts {width} wide: {:.2} µs a slot at {} gigaflops",
        trace.tokens(),
        trace.layers.len(),
        trace.experts,
        trace.top_k,
        slot_seconds * 1e6,
        options.gigaflops
    );
    println!(
        "messages of {} µs, {} GB/s in and out of a rank; other work {} µs a token and layer",
        options.latency_micros, options.gigabytes_per_second, options.other_micros
    );
    match &options.measured {
        Some(path) => beside(&plan, path)?,
        None => table(&plan)?,
    }
    println!(
        "\nLeft out: computing while exchanging; that small products are slower a slot, and weights that come from memory for few rows; links that are"
    );
    println!(
        "shared or unlike; time to pack and sum rows; the memory of copies and the moves that keep them up to date; changes of the gate's choice in"
    );
    println!(
        "later layers; other work where --other-micros is 0. Dropless, dropping and copies could do without gathered logits: they pay for them here."
    );
    Ok(())
}

fn speeds(options: &Options, ranks: usize) -> Vec<f64> {
    options.rank_speeds.iter().copied().cycle().take(ranks).collect()
}

fn table(plan: &Plan<'_>) -> Result<()> {
    let (options, trace) = (plan.options, plan.trace);
    let ranks: Vec<usize> = if options.smoke { vec![2, 8, 64] } else { options.ranks.clone() };
    let half = trace.tokens() / 2;
    ensure!(half > 0, "trace: expected at least 2 tokens, got {}", trace.tokens());
    let (history, later): (Vec<usize>, Vec<usize>) = ((0..half).collect(), (half..trace.tokens()).collect());
    println!("hot experts are those of the first half of the trace, all figures are of the second\n");
    println!(
        "ranks  tokens each  policy            ms a step  × level  straggler  KB rows  KB logits  messages  routing  gate mass"
    );
    for ranks in ranks.into_iter().filter(|&ranks| ranks > 0) {
        let step = (ranks * options.tokens_per_rank).min(later.len());
        let steps: Vec<Vec<usize>> = later.chunks_exact(step).take(STEPS).map(<[usize]>::to_vec).collect();
        for policy in Policy::ALL {
            if ranks > trace.experts && policy != Policy::Replicas {
                println!("{ranks:>5}  {:>11}  {:<16}  more ranks than experts", "", policy.name());
                continue;
            }
            let sums = plan.sums(policy, &speeds(options, ranks), &history, &steps)?;
            println!(
                "{ranks:>5}  {:>11.1}  {:<16} {:>10.3} {:>7.2}× {:>9.3}× {:>8.2} {:>10.2} {:>8.1}% {:>7.1}% {:>9.2}%",
                step as f64 / ranks as f64,
                policy.name(),
                1e3 * sums.time / steps.len() as f64,
                sums.time / sums.level,
                sums.slowest / sums.mean,
                1e-3 * sums.row_bytes / sums.tokens,
                1e-3 * sums.logit_bytes / sums.tokens,
                100.0 * sums.messages / sums.time,
                100.0 * sums.route / sums.time,
                100.0 * sums.kept / sums.top_k,
            );
        }
    }
    println!(
        "\n× level: the step over what its experts alone would take on ranks that are exactly level; KB are of all layers, a token; messages: exchanging"
    );
    println!("or waiting for the slowest rank, and routing, as shares of the step; gate mass: kept, of plain top-k's.");
    Ok(())
}

/// Steps of each number of ranks, at most.
const STEPS: usize = 8;

/// A prediction beside each row of a real run that has one.
fn beside(plan: &Plan<'_>, path: &Path) -> Result<()> {
    let named = || path.display().to_string();
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).with_context(named)?).with_context(named)?;
    let rows =
        report["rows"].as_array().context("rows: expected a list, as `compare --expert-parallel --json` prints")?;
    let batch_tokens = report["text"]["batch_tokens"].as_u64().unwrap_or(512).max(1) as usize;
    // The batches of the run: none has two kinds of text.
    let kind = |token: &usize| plan.trace.kinds.as_ref().map(|kinds| kinds[*token]);
    let all: Vec<usize> = (0..plan.trace.tokens()).collect();
    let steps =
        all.chunk_by(|a, b| kind(a) == kind(b)).flat_map(|text| text.chunks(batch_tokens).map(<[usize]>::to_vec));
    let steps: Vec<Vec<usize>> = steps.collect();
    println!("\n{:<16} {:<34} {:>12} {:>12}", "policy", "figure", "predicted", "measured");
    let mut none = true;
    for row in rows {
        let policy = match (row["router"].as_str(), row["capacity_factor"].as_f64()) {
            (Some("top-k"), None) => Policy::Dropless,
            (Some("top-k-arrival"), Some(1.0)) => Policy::Arrival,
            (Some("phase"), Some(1.0)) => Policy::Priced,
            _ => continue,
        };
        let Some(ranks) = row["ranks"].as_u64().map(|ranks| ranks as usize).filter(|&ranks| ranks > 0) else {
            continue;
        };
        none = false;
        let sums = plan.sums(policy, &speeds(plan.options, ranks), &[], &steps)?;
        let bytes = (sums.row_bytes + sums.logit_bytes) / sums.tokens;
        let figures = [
            ("straggler_ratio", sums.slowest / sums.mean),
            ("bytes_exchanged_per_token", bytes),
            ("exchange_share_of_time", sums.messages / sums.time),
            ("tokens_per_second", sums.tokens / sums.time),
        ];
        for (figure, predicted) in figures {
            let measured = row[figure].as_f64().map_or("–".into(), |measured| format!("{measured:.4}"));
            println!(
                "{:<16} {:<34} {predicted:>12.4} {measured:>12}",
                policy.name(),
                format!("{figure}, {ranks} ranks")
            );
        }
    }
    ensure!(!none, "{}: expected rows of top-k, or of top-k-arrival or phase at 1.0, with `ranks`, got none", named());
    Ok(())
}

/// A trace of the bundled model.
fn bundled(smoke: bool) -> Result<GateTrace> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let model = Model::load(&directory, &LoadOptions::default())?;
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(directory.join("eval"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    let text = |path: &PathBuf| -> Result<EvalText> {
        Ok(EvalText { name: path.display().to_string(), ids: model.encode(&std::fs::read_to_string(path)?)? })
    };
    let texts = files.iter().map(text).collect::<Result<Vec<_>>>()?;
    // All kinds in turn, as a server has them.
    let mixing = Mixing::Mixed;
    let batching = Batching { tokens: smoke.then_some(4096), mixing, ..Batching::default() };
    let batches = batching.batches(model.sequence_start(), &texts)?;
    let kinds = Some(batching.kinds(model.sequence_start(), &texts)?);
    Ok(GateTrace { kinds, ..GateTrace::capture(model.decoder(), &batches, |_| ())? })
}
