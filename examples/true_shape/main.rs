//! A model of a published one's shape, cut to a few layers, on an expert cache: what it holds in memory while it writes.
//!
//! The checkpoint is written first (random weights; of Qwen3-30B-A3B 2.4 GB for two layers and 1.2 GB for the vocabulary), then loaded with
//! its experts left in their files, given a prompt in chunks and continued token by token. The peak of resident memory, as Linux counts it
//! (`VmHWM`), stands beside the sum of the expert budget and all other weights.
//!
//! ```text
//! cargo run --release --example true_shape                           # two layers of Qwen3-30B-A3B, 256 MiB of experts
//! cargo run --release --example true_shape -- --shape qwen3.5-35b --layers 4 --vocab 32000
//! cargo run --release --example true_shape -- --sparse --layers 48 --directory D    # headers alone: for `phase-moe inspect --model D`
//! ```
//!
//! Linux only: `/proc` says what is resident.

mod shape;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use candle_core::DType;
use clap::Parser;
use phase_moe::{Batch, CacheOptions, Decoder, LoadOptions, Sampler, Weights};
use shape::{NAMES, Shape};

#[derive(Parser)]
struct Options {
    /// Of which model
    #[arg(long, default_value = NAMES[0], value_parser = NAMES)]
    shape: String,
    /// Layers, the last ones
    #[arg(long, default_value_t = 2)]
    layers: u64,
    /// Words of the vocabulary [default: all]
    #[arg(long)]
    vocab: Option<u64>,
    /// Bytes of experts in memory
    #[arg(long, default_value = "256MiB")]
    expert_cache: ByteSize,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 700)]
    prompt: usize,
    /// Tokens of the prompt in one forward pass
    #[arg(long, default_value_t = 512)]
    chunk_tokens: usize,
    /// Tokens to add
    #[arg(long, default_value_t = 32)]
    new_tokens: usize,
    /// Where the checkpoint is written; one that is there is used [default: a directory of its own in target/true-shape]
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Writes headers and room alone, and ends
    #[arg(long)]
    sparse: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let whole = Shape::named(&options.shape).map_err(anyhow::Error::msg)?;
    let [layers, words] = whole.size();
    ensure!((1..=layers).contains(&options.layers), "--layers {}: expected 1 to {layers}", options.layers);
    let vocab = options.vocab.unwrap_or(words);
    let own = || Path::new("target/true-shape").join(format!("{}-{}x{vocab}", options.shape, options.layers));
    let directory = options.directory.clone().unwrap_or_else(own);
    let shape = whole.cut(options.layers, vocab);
    match std::fs::read_to_string(directory.join("config.json")) {
        Ok(there) => {
            ensure!(there == shape.config(), "{}: expected {}, got another model", directory.display(), options.shape)
        }
        Err(_) => {
            eprintln!("writing {} layers to {}", options.layers, directory.display());
            shape.write(&directory, !options.sparse).context("writing the checkpoint")?;
        }
    }
    if options.sparse {
        return Ok(());
    }
    let before = peak_bytes()?;
    let files = Weights::open(&directory)?;
    let (spec, experts) = (files.spec()?, files.expert_sizes()?.all);
    let others = files.checkpoint().tensors().values().map(|entry| entry.bytes as u64).sum::<u64>() - experts;
    let budget = options.expert_cache.as_u64();
    let cache = CacheOptions::new(usize::try_from(budget)?);
    let decoder = Decoder::load(&files, &LoadOptions::default().with_dtype(DType::BF16).with_expert_cache(cache))?;
    let loaded = peak_bytes()?;

    let prompt: Vec<u32> = (0..options.prompt as u64).map(|at| (at * at * 7919 % spec.vocab as u64) as u32).collect();
    let (mut state, mut sampler) = (decoder.generation_state(), Sampler::new(0.0, 1.0, 0)?);
    let started = Instant::now();
    let mut logits = decoder.prefill(&Batch::new(&[&prompt])?, options.chunk_tokens, &mut state)?;
    let prefill = started.elapsed();
    let (after_prompt, started) = (peak_bytes()?, Instant::now());
    for _ in 0..options.new_tokens {
        let next = sampler.next(&logits.squeeze(0)?)?;
        logits = decoder.prefill(&Batch::new(&[&[next]])?, 1, &mut state)?;
    }
    let decode = started.elapsed();
    let statistics = decoder.expert_cache().context("an expert cache")?.statistics();
    // Keys and values in f16 beside activations in bf16, states in f32.
    let kept = 2 * (spec.kept_numbers_per_token() * state.position()) + 4 * spec.state_numbers();

    let line = |what: &str, bytes: u64| println!("{what:52} {:>9.1} MB", bytes as f64 / 1e6);
    println!(
        "{}, {} of {layers} layers, {} of {words} words: {} experts of {:.1} MB a layer, top {}",
        options.shape,
        spec.layers,
        spec.vocab,
        spec.moe.experts,
        experts as f64 / 1e6 / (spec.moe_blocks().count() * spec.moe.experts) as f64,
        spec.moe.top_k
    );
    line("all experts", experts);
    line("other weights", others);
    line("budget of experts", budget);
    line("most bytes of experts held", statistics.peak_bytes as u64);
    line("keys and values, and states", kept as u64);
    line("resident memory's peak before anything was loaded", before);
    line("  when the model was loaded", loaded);
    line("  after the prompt", after_prompt);
    line("  at the end", peak_bytes()?);
    line("budget + other weights", budget + others);
    println!(
        "{} tokens of prompt at {:.1} tokens/s in chunks of {}, {} new at {:.1} tokens/s, {:.1} % of experts hit, {:.1} GB read",
        options.prompt,
        options.prompt as f64 / prefill.as_secs_f64(),
        options.chunk_tokens,
        options.new_tokens,
        options.new_tokens as f64 / decode.as_secs_f64(),
        100.0 * statistics.hits as f64 / statistics.requests.max(1) as f64,
        statistics.bytes_read as f64 / 1e9
    );
    Ok(())
}

/// The most memory that this process has had resident.
fn peak_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status").context("/proc, which Linux has")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(1024 * kilobytes)
}
