//! The speed of the routing core on this machine: nanoseconds per token of selection, quotas, the phase router and plans,
//! beside the same code without vector instructions.
//!
//! Everything is timed after a warm-up, into buffers that exist. `nanos_per_token` is the median of repeated calls; where
//! one token is routed at a time, `p50` and `p99` are those of batches of 16 calls. Peers and thread counts are timed in
//! turns, so that a busy neighbour meets all of them.
//!
//! ```text
//! cargo run --release --no-default-features --example router_table            # a table
//! cargo run --release --no-default-features --example router_table -- --json  # one JSON document
//! cargo run --release --no-default-features --example router_table -- plan    # one kind of cell
//! cargo run --release --no-default-features --example router_table -- --isa avx2  # as on a CPU without what is wider
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use phase_moe::Isa;
use phase_moe::{
    Assignment, CacheRouter, Capacity, CapacityRule, DispatchPlan, ExpertId, ExpertSet, Logits, PhaseRouter,
    RouteContext, RouteRequest, RouteState, Router, RouterKind, Scores, Scoring, Scratch, TokenRequest, TopK,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Failure = Box<dyn std::error::Error>;

/// What is timed, at which size.
struct Cell {
    what: &'static str,
    experts: usize,
    top_k: usize,
    tokens: usize,
    threads: usize,
}

/// Nanoseconds per token.
struct Times {
    median: f64,
    p50: Option<f64>,
    p99: Option<f64>,
    scalar: f64,
}

/// Logits `[tokens, experts]` of a gate that likes some experts more: the busiest gets 4 to 7 times the mean.
fn skewed(tokens: usize, experts: usize, seed: u64) -> Vec<f32> {
    let mut offsets = ChaCha8Rng::seed_from_u64(7);
    let popularity: Vec<f32> = (0..experts).map(|_| offsets.random_range(-1.7..1.7)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..tokens * experts).map(|at| popularity[at % experts] + rng.random_range(-2.0..2.0)).collect()
}

/// Inputs that take turns, so that no branch can be learnt by heart.
const TURNS: usize = 64;

/// Everything a cell works on, on one instruction set.
struct Bed {
    isa: Isa,
    inputs: Vec<Vec<f32>>,
    turn: usize,
    step: u64,
    scores: Scores,
    capacity: Capacity,
    resident: ExpertSet,
    router: Box<dyn Router>,
    /// State that every call starts from; `None` where calls go on from the last one's.
    start: Option<RouteState>,
    state: RouteState,
    scratch: Scratch,
    assignment: Assignment,
    asked: ExpertSet,
    plan: DispatchPlan,
}

impl Bed {
    /// On the instruction set that `isa` names.
    fn new(cell: &Cell, isa: Isa) -> Result<Self, Failure> {
        let Cell { what, experts, top_k, tokens, .. } = *cell;
        let capacity = match what {
            "phase-cold" | "phase-warm" | "quota" => CapacityRule::per_expert(1.0).capacity(tokens, experts, top_k)?,
            "cache+phase" => CapacityRule::per_device(1.0, 4).capacity(tokens, experts, top_k)?,
            _ => Capacity::unlimited(experts)?,
        };
        let router: Box<dyn Router> = match what {
            "quota" => RouterKind::PhaseQuota.build(1),
            "phase-cold" | "phase-warm" => Box::new(PhaseRouter::default()),
            "cache" | "cache-one" => Box::new(CacheRouter::default()),
            "cache+phase" => Box::new(CacheRouter::default().with_phase(PhaseRouter::default())),
            _ => Box::new(TopK { drop: None }),
        };
        let mut resident = ExpertSet::new(experts)?;
        for expert in (0..experts).step_by(2) {
            resident.insert(ExpertId::new(expert, experts)?);
        }
        let turns = if tokens == 1 { TURNS } else { 2 };
        isa.limit();
        let mut bed = Self {
            isa,
            inputs: (0..turns).map(|turn| skewed(tokens, experts, turn as u64)).collect(),
            turn: 0,
            step: 0,
            scores: Scores::default(),
            capacity,
            resident,
            router,
            start: (what == "phase-cold").then(RouteState::default),
            state: RouteState::default(),
            scratch: Scratch::default(),
            assignment: Assignment::default(),
            asked: ExpertSet::default(),
            plan: DispatchPlan::default(),
        };
        for _ in 0..turns {
            bed.score(cell)?;
            bed.route(cell)?;
        }
        Ok(bed)
    }

    /// Scores the next input.
    fn score(&mut self, cell: &Cell) -> Result<(), Failure> {
        self.turn = (self.turn + 1) % self.inputs.len();
        let logits = Logits::new(black_box(&self.inputs[self.turn]), cell.tokens, cell.experts)?;
        Ok(Scoring::softmax().scores_into(&logits, None, &mut self.scores)?)
    }

    fn route(&mut self, cell: &Cell) -> Result<(), Failure> {
        if let Some(start) = &self.start {
            self.state.clone_from(start);
        }
        self.step += 1;
        let context = RouteContext { step: self.step, resident: Some(&self.resident), ..RouteContext::default() };
        let request = RouteRequest::new(&self.scores, cell.top_k, &self.capacity, context)?;
        let (state, scratch) = (&mut self.state, &mut self.scratch);
        Ok(self.router.route_into(black_box(&request), state, scratch, &mut self.assignment)?)
    }

    /// Routes the next input, one token straight from its logits, and the general way where there is no short one.
    fn route_token(&mut self, cell: &Cell) -> Result<(), Failure> {
        self.turn = (self.turn + 1) % self.inputs.len();
        self.step += 1;
        let logits = black_box(self.inputs[self.turn].as_slice());
        let context = RouteContext { step: self.step, resident: Some(&self.resident), ..RouteContext::default() };
        let request = TokenRequest::new(logits, Scoring::softmax(), cell.top_k, context)?;
        let (state, scratch) = (&mut self.state, &mut self.scratch);
        if !self.router.route_token(&request, state, scratch, &mut self.assignment)? {
            Scoring::softmax().scores_into(&Logits::new(logits, 1, cell.experts)?, None, &mut self.scores)?;
            let request = RouteRequest::new(&self.scores, cell.top_k, &self.capacity, context)?;
            self.router.route_into(&request, state, scratch, &mut self.assignment)?;
        }
        black_box(&self.assignment);
        Ok(())
    }

    /// Nanoseconds of `calls` calls of what the cell times, each on the next input.
    fn time(&mut self, cell: &Cell, calls: usize) -> Result<f64, Failure> {
        // What is scored on the way looks for the set anew.
        self.isa.limit();
        let whole = matches!(cell.what, "select-batch" | "cache");
        if !whole && !matches!(cell.what, "plan" | "select-one" | "cache-one") {
            // From scores on; prices that are warm come from the other batch.
            self.score(cell)?;
        }
        let start = Instant::now();
        for _ in 0..calls {
            match cell.what {
                "select-one" | "cache-one" => self.route_token(cell)?,
                "plan" => self.plan.refill(black_box(&self.assignment)),
                _ if whole => {
                    self.score(cell)?;
                    self.route(cell)?;
                    if cell.what != "select-batch" {
                        black_box(&self.assignment).used_experts(&mut self.asked)?;
                    }
                }
                _ => self.route(cell)?,
            }
        }
        Ok(start.elapsed().as_nanos() as f64)
    }
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// Wall nanoseconds per token of threads that route one token after another side by side, each a layer of its own.
fn side_by_side(cell: &Cell, isa: Isa, budget: Duration) -> Result<f64, String> {
    let calls = 4096;
    let run = || -> Result<f64, String> {
        let mut bed = Bed::new(cell, isa).map_err(|error| error.to_string())?;
        let (start, mut nanos, mut runs) = (Instant::now(), 0.0, 0.0);
        while start.elapsed() < budget || runs < 5.0 {
            nanos += bed.time(cell, calls).map_err(|error| error.to_string())?;
            runs += 1.0;
        }
        Ok(nanos / (runs * calls as f64))
    };
    let rates = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cell.threads).map(|_| scope.spawn(run)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread ended early")?)
            .collect::<Result<Vec<_>, _>>()
    })?;
    Ok(1.0 / rates.into_iter().map(|nanos: f64| 1.0 / nanos).sum::<f64>())
}

fn measure(cell: &Cell, [widest, scalar]: [Isa; 2], budget: Duration) -> Result<Times, Failure> {
    if cell.tokens == 1 && cell.threads > 1 {
        let median = side_by_side(cell, widest, budget)?;
        return Ok(Times { median, p50: None, p99: None, scalar: side_by_side(cell, scalar, budget)? });
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cell.threads).build()?;
    let (mut ours, mut scalar) = (Bed::new(cell, widest)?, Bed::new(cell, scalar)?);
    let single = cell.tokens == 1;
    let calls = if single { 16 } else { 1 };
    let (mut times, mut twins) = (Vec::new(), Vec::new());
    let mut run = |times: &mut Vec<f64>, twins: &mut Vec<f64>| -> Result<(), String> {
        let start = Instant::now();
        while start.elapsed() < budget || times.len() < 5 {
            let time = |bed: &mut Bed| {
                let nanos = bed.time(cell, calls).map_err(|error| error.to_string())?;
                Ok::<f64, String>(nanos / (calls * cell.tokens) as f64)
            };
            // Short calls run in runs, so that what the twin leaves in the caches is not what is timed.
            for _ in 0..if single { 64 } else { 3 } {
                times.push(time(&mut ours)?);
            }
            for _ in 0..if single { 16 } else { 1 } {
                twins.push(time(&mut scalar)?);
            }
        }
        Ok(())
    };
    // One thread is the caller's own: entering a pool costs more than a short call.
    match cell.threads {
        1 if single => run(&mut times, &mut twins)?,
        _ => pool.install(|| run(&mut times, &mut twins))?,
    }
    times.sort_by(f64::total_cmp);
    twins.sort_by(f64::total_cmp);
    Ok(Times {
        median: percentile(&times, 0.5),
        p50: single.then(|| percentile(&times, 0.5)),
        p99: single.then(|| percentile(&times, 0.99)),
        scalar: percentile(&twins, 0.5),
    })
}

fn main() -> Result<(), Failure> {
    let (mut json, mut budget, mut only, mut isa) = (false, Duration::from_millis(1500), None, Isa::default());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--isa" => isa = arguments.next().unwrap_or_default().parse()?,
            "--json" => json = true,
            "--smoke" => budget = Duration::from_millis(10),
            name if !name.starts_with('-') && only.is_none() => only = Some(name.to_owned()),
            unknown => {
                return Err(format!(
                    "unknown argument {unknown}: expected --json, --smoke, --isa NAME or what to time"
                )
                .into());
            }
        }
    }
    let cell = |what, experts, top_k, tokens, threads| Cell { what, experts, top_k, tokens, threads };
    let mut cells = vec![cell("select-one", 128, 8, 1, 1), cell("select-one", 8, 2, 1, 1)];
    for threads in [1, 2] {
        cells.push(cell("select-batch", 128, 8, 4096, threads));
    }
    cells.push(cell("quota", 64, 8, 4096, 1));
    for threads in [1, 2] {
        cells.push(cell("phase-cold", 64, 8, 4096, threads));
        cells.push(cell("phase-warm", 64, 8, 4096, threads));
    }
    cells.push(cell("plan", 128, 8, 4096, 1));
    cells.push(cell("cache", 128, 8, 1, 1));
    cells.push(cell("cache", 8, 2, 1, 1));
    for threads in [1, 2] {
        cells.push(cell("cache-one", 128, 8, 1, threads));
        cells.push(cell("cache-one", 8, 2, 1, threads));
    }
    cells.push(cell("cache+phase", 64, 8, 4096, 1));
    for tokens in [64, 256, 1024, 16_384, 65_536] {
        cells.push(cell("phase-cold", 64, 8, tokens, 1));
    }
    cells.retain(|cell| only.as_ref().is_none_or(|only| cell.what == only));
    if cells.is_empty() {
        return Err(format!("nothing is called {}", only.unwrap_or_default()).into());
    }

    let sets = [isa, "scalar".parse()?];
    if !json {
        println!("instructions: {}; nanoseconds per token", sets[0]);
        println!("| what | experts | top_k | tokens | threads | median | p50 | p99 | scalar | scalar / median |");
        println!("|---|---|---|---|---|---|---|---|---|---|");
    }
    let mut rows = Vec::new();
    for cell in &cells {
        let times = measure(cell, sets, budget)?;
        let Cell { what, experts, top_k, tokens, threads } = cell;
        let shown = |time: Option<f64>| time.map_or("–".into(), |time| format!("{time:.1}"));
        if !json {
            println!(
                "| {what} | {experts} | {top_k} | {tokens} | {threads} | {:.1} | {} | {} | {:.1} | {:.1} |",
                times.median,
                shown(times.p50),
                shown(times.p99),
                times.scalar,
                times.scalar / times.median
            );
        }
        rows.push(serde_json::json!({
            "what": what, "experts": experts, "top_k": top_k, "tokens": tokens, "threads": threads,
            "nanos_per_token": times.median, "p50_nanos": times.p50, "p99_nanos": times.p99,
            "scalar_nanos_per_token": times.scalar,
        }));
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "cells": rows }))?);
    }
    Ok(())
}
