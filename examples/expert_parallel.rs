//! Experts over the ranks of an MPI job, the last of which may be slower: the time of the MoE layers under dropless top-k, dropping by arrival
//! and `phase`, with experts placed equally and in proportion to speed, over the time that it could be.
//!
//! ```text
//! cargo build --release --features mpi --example expert_parallel
//! mpirun -n 2 -x RAYON_NUM_THREADS=1 target/release/examples/expert_parallel --slow 3
//! ```
//!
//! The slow rank computes its experts so many times over. Ideal is `work / Σ speed`: the time that all ranks took in experts, each once, shared out by
//! speed; what the layers take beyond it is waiting for the slowest, messages, gates, routing and what every token gets beside its experts.
//! `in messages` is the ranks' share of the layers' time in messages, where they wait for each other too.
//!
//! Without `--model` it reads `models/tiny-moe` and its text, which a checkout of the repository has and the published package has not.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use phase_moe::eval::Perplexity;
use phase_moe::parallel::{ExpertParallel, Mpi, Ranks};
use phase_moe::routing::Shares;
use phase_moe::{Batch, CapacityRule, Decoder, LoadOptions, Model, RouterKind, Weights};

#[derive(Parser)]
struct Options {
    /// A model; its text is random tokens then, and its perplexity means nothing [default: the repository's]
    #[arg(long)]
    model: Option<PathBuf>,
    /// How many times over the last rank computes its experts
    #[arg(long, default_value_t = 3)]
    slow: usize,
    /// Tokens of a batch, of two sequences for each rank
    #[arg(long, default_value_t = 512)]
    batch_tokens: usize,
    /// Batches that are measured, after one that is not
    #[arg(long, default_value_t = 8)]
    batches: usize,
}

/// One way to place and to route.
struct Way {
    placement: &'static str,
    router: RouterKind,
    factor: Option<f64>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let ranks = Arc::new(Ranks::new(Mpi::start()?)?);
    let done = run(&options, &ranks);
    if let Err(error) = done {
        eprintln!("rank {}: {error:#}", ranks.rank());
        Mpi::abort(1);
    }
    Mpi::finish();
    Ok(())
}

fn run(options: &Options, ranks: &Arc<Ranks>) -> Result<()> {
    let count = ranks.count();
    let is_slow = ranks.rank() + 1 == count && count > 1;
    let repeats = if is_slow { options.slow } else { 1 };
    let speeds: Vec<f64> =
        (1..=count).map(|rank| if rank == count && count > 1 { 1.0 / options.slow as f64 } else { 1.0 }).collect();
    let default = PathBuf::from("models/tiny-moe");
    let path = options.model.as_ref().unwrap_or(&default);
    let weights = Weights::open(path)?;
    let batches = batches(options, &weights, count)?;
    if ranks.rank() == 0 {
        let tokens = batches[0].live_tokens();
        println!("{} ranks of speeds {speeds:?}, batches of {tokens} tokens; times of MoE layers, ms a batch", count);
        println!("placement  router         factor  layers  ideal  over ideal  straggler  in messages  perplexity");
    }
    let ways = [
        ("equal", RouterKind::TopK, None),
        ("equal", RouterKind::Phase, Some(1.0)),
        ("speed", RouterKind::TopK, None),
        ("speed", RouterKind::TopKArrival, Some(1.0)),
        ("speed", RouterKind::Phase, Some(1.0)),
    ];
    let mut loaded: Option<(&str, Decoder, ExpertParallel)> = None;
    for (placement, router, factor) in ways {
        let way = Way { placement, router, factor };
        let shares = match placement {
            "equal" => Shares::EqualGroups { speeds: speeds.clone() },
            _ => Shares::PerDevice { speeds: speeds.clone() },
        };
        if loaded.as_ref().is_none_or(|(before, ..)| *before != placement) {
            drop(loaded.take());
            let parallel = ExpertParallel::new(ranks.clone(), shares.clone())?.with_repeats(repeats);
            let decoder = Decoder::load(&weights, &LoadOptions::default().with_parallel(parallel.clone()))?;
            loaded = Some((placement, decoder, parallel));
        }
        let (_, decoder, parallel) = loaded.as_mut().context("a model")?;
        decoder.set_router(Arc::from(router.build(42)));
        decoder.set_capacity(factor.map(|factor| CapacityRule::new(factor, shares)));
        measure(&way, decoder, parallel, &batches, repeats, &speeds)?;
    }
    Ok(())
}

/// Runs the batches and prints a row.
fn measure(
    way: &Way,
    decoder: &Decoder,
    parallel: &ExpertParallel,
    batches: &[Batch],
    repeats: usize,
    speeds: &[f64],
) -> Result<()> {
    let ranks = parallel.ranks();
    let mut state = decoder.batch_state();
    decoder.forward(&batches[0], &mut state)?;
    let before = parallel.totals();
    let (mut perplexity, mut tokens) = (Perplexity::default(), 0);
    let started = std::time::Instant::now();
    for batch in &batches[1..] {
        let logits = decoder.forward(batch, &mut state)?;
        tokens += batch.live_tokens();
        let own = decoder.own_sequences(batch);
        let rows: Vec<&[u32]> = batch.ids().chunks(batch.positions()).skip(own.start).take(own.len()).collect();
        perplexity.add(&logits, &Batch::new(&rows)?)?;
    }
    let shares = parallel.shares(&before, tokens, started.elapsed())?;
    let now = parallel.totals();
    // Each rank's time in experts once, in layers, and the losses of its own sequences.
    let own = [
        (now.experts - before.experts).as_secs_f64() / repeats as f64,
        (now.stage - before.stage).as_secs_f64(),
        (now.exchange - before.exchange).as_secs_f64(),
        perplexity.value()?.ln(),
    ];
    let all = ranks.numbers(&own, &vec![own.len(); ranks.count()])?;
    let of = |at: usize| all.iter().skip(at).step_by(own.len());
    let (work, stage) = (of(0).sum::<f64>(), of(1).copied().fold(0.0, f64::max));
    let ideal = work / speeds.iter().sum::<f64>();
    let (share, loss) = (of(2).sum::<f64>() / of(1).sum::<f64>(), of(3).sum::<f64>() / ranks.count() as f64);
    if ranks.rank() == 0 {
        let each = 1e3 / (batches.len() - 1) as f64;
        println!(
            "{:9}  {:13}  {:>6}  {:6.1}  {:5.1}  {:10.3}  {:9.3}  {:9.1} %  {:10.4}",
            way.placement,
            way.router.name(),
            way.factor.map_or("–".into(), |factor| format!("{factor:.1}")),
            stage * each,
            ideal * each,
            stage / ideal,
            shares.straggler_ratio,
            100.0 * share,
            loss.exp(),
        );
    }
    Ok(())
}

/// Batches of two sequences for each rank.
fn batches(options: &Options, weights: &Weights, ranks: usize) -> Result<Vec<Batch>> {
    let (sequences, count) = (2 * ranks, options.batches + 1);
    let length = options.batch_tokens / sequences;
    let ids: Vec<u32> = match &options.model {
        // Numbers without a period that a text would have.
        Some(_) => {
            let vocab = weights.spec()?.vocab as u64;
            let id = |at: u64| ((at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % vocab) as u32;
            (0..(count * options.batch_tokens) as u64).map(id).collect()
        }
        None => {
            let model = Model::load("models/tiny-moe".as_ref(), &LoadOptions::default())?;
            let mut ids = Vec::new();
            for kind in ["code", "scripture", "reference"] {
                let text = std::fs::read_to_string(format!("models/tiny-moe/eval/{kind}.txt"));
                ids.extend(text.ok().map(|text| model.encode(&text)).transpose()?.unwrap_or_default());
            }
            ids
        }
    };
    let rows: Vec<&[u32]> = ids.chunks_exact(length.max(1)).take(sequences * count).collect();
    Ok(rows.chunks_exact(sequences).map(Batch::new).collect::<Result<_, _>>()?)
}
