//! Trains the bundled `models/tiny-moe` with this crate's own layer, on the CPU.
//!
//! ```text
//! models/tiny-moe/make_corpus.sh corpus                   # three kinds of freely licensed text
//! export RAYON_NUM_THREADS=1                              # the trainer's threads take whole shards: no threads within
//! export MIMALLOC_PURGE_DELAY=-1                          # keep freed pages: a step needs them again
//! cargo run --release --example train_tiny -- --corpus corpus --out models/tiny-moe
//! cargo run --release --example train_tiny -- --smoke     # a few steps on the evaluation text, writes nothing
//! ```
//!
//! Each step cuts its batch into fixed shards that run forward and backward on threads of their own; gradients are summed in
//! shard order, so the result does not depend on the number of threads.
//!
//! `--smoke` reads `models/tiny-moe/eval`, which a checkout of the repository has and the published package has not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};
use clap::Parser;
use phase_moe::eval::{Batching, EvalText, Perplexity};
use phase_moe::layer::{load_balancing_loss, router_z_loss};
use phase_moe::{Batch, Decoder, ModelSpec, zoo};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// A step allocates and frees thousands of tensors: the system's allocator would give each back to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Options {
    /// Directory with `train/KIND.txt` and `valid/KIND.txt`.
    #[arg(long, default_value = "corpus")]
    corpus: PathBuf,
    /// Where config.json, model.safetensors and tokenizer.json go.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Optimiser steps.
    #[arg(long, default_value_t = 2300)]
    steps: usize,
    /// Sequences per shard of a step.
    #[arg(long, default_value_t = 4)]
    shard: usize,
    /// Shards per step.
    #[arg(long, default_value_t = 4)]
    shards: usize,
    /// Threads that work on shards.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 3e-3)]
    rate: f64,
    /// Weight of the load-balancing loss.
    #[arg(long, default_value_t = 0.004)]
    balance: f64,
    /// Tokens in the vocabulary.
    #[arg(long, default_value_t = 2048)]
    vocab: usize,
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 32)]
    experts: usize,
    #[arg(long, default_value_t = 64)]
    width: usize,
    /// Seed of weights and batches.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A few steps of a small model on the bundled evaluation text.
    #[arg(long)]
    smoke: bool,
}

const POSITIONS: usize = 256;
const WARMUP_STEPS: usize = 100;
const Z_LOSS: f64 = 1e-4;
const CLIP_NORM: f64 = 1.0;

fn main() -> Result<()> {
    let mut options = Options::parse();
    let (mut train, mut valid) = (options.corpus.join("train"), options.corpus.join("valid"));
    if options.smoke {
        train = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe/eval");
        valid = train.clone();
        (options.steps, options.shard, options.shards, options.vocab) = (6, 1, 2, 512);
        (options.hidden, options.layers, options.experts, options.width) = (32, 2, 8, 16);
        options.out = None;
    }
    let (train, valid) = (read_texts(&train)?, read_texts(&valid)?);
    ensure!(train.keys().eq(valid.keys()) && !train.is_empty(), "train and valid must hold the same kinds of text");

    let tokenizer = train_tokenizer(&train, options.vocab)?;
    let encode = |text: &String| -> Result<Vec<u32>> {
        Ok(tokenizer.encode_fast(text.as_str(), false).map_err(anyhow::Error::msg)?.get_ids().to_vec())
    };
    let train: Vec<Vec<u32>> = train.values().map(encode).collect::<Result<_>>()?;
    let valid: Vec<EvalText> = valid
        .iter()
        .map(|(kind, text)| Ok(EvalText { name: kind.clone(), ids: encode(text)? }))
        .collect::<Result<_>>()?;
    for (text, ids) in valid.iter().zip(&train) {
        println!(
            "{}: {} training tokens, unigram perplexity {:.1}",
            text.name,
            ids.len(),
            unigram(ids, &text.ids, options.vocab)
        );
    }

    let config = config(&options);
    if let Some(out) = &options.out {
        std::fs::create_dir_all(out)?;
        tokenizer.save(out.join("tokenizer.json"), true).map_err(anyhow::Error::msg)?;
        std::fs::write(out.join("config.json"), format!("{config:#}\n"))?;
    }
    let spec = zoo::parse_config(&config.to_string(), "config.json")?;
    println!("{} parameters, {} active", spec.parameters(), spec.active_parameters());
    let vars = VarMap::new();
    let decoder = Decoder::new(&spec, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let vars = sorted(&vars);
    initialise(&vars, &spec, options.seed)?;
    train_model(&options, &decoder, &vars, &train, &valid)?;
    Ok(())
}

/// Writes the weights in bf16, under their Hugging Face names.
fn save(vars: &BTreeMap<String, Var>, out: &Path) -> Result<()> {
    let tensors = vars.iter().map(|(name, var)| Ok((name.clone(), var.to_dtype(DType::BF16)?)));
    Ok(candle_core::safetensors::save(&tensors.collect::<Result<_>>()?, out.join("model.safetensors"))?)
}

/// `KIND.txt` files of a directory by kind.
fn read_texts(directory: &Path) -> Result<BTreeMap<String, String>> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("{}: run make_corpus.sh first", directory.display()))?;
    let mut texts = BTreeMap::new();
    for path in entries.map(|entry| entry.map(|entry| entry.path())) {
        let path = path?;
        let kind = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        texts.insert(kind, std::fs::read_to_string(&path)?);
    }
    Ok(texts)
}

/// Byte-level BPE on the same amount of each kind.
fn train_tokenizer(texts: &BTreeMap<String, String>, vocab: usize) -> Result<Tokenizer> {
    let share = texts.values().map(String::len).min().unwrap_or(0);
    let lines = texts.values().flat_map(|text| {
        let end = (share..text.len()).find(|&end| text.is_char_boundary(end)).unwrap_or(text.len());
        text[..end].split_inclusive('\n').map(str::to_owned)
    });
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), lines).map_err(anyhow::Error::msg)?;
    Ok(tokenizer)
}

/// Perplexity of `valid` under the token frequencies of `train` (add one).
fn unigram(train: &[u32], valid: &[u32], vocab: usize) -> f64 {
    let mut counts = vec![1.0f64; vocab];
    train.iter().for_each(|&id| counts[id as usize] += 1.0);
    let total: f64 = counts.iter().sum();
    let nats: f64 = valid.iter().map(|&id| (total / counts[id as usize]).ln()).sum();
    (nats / valid.len() as f64).exp()
}

fn config(options: &Options) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "torch_dtype": "bfloat16",
        "vocab_size": options.vocab, "hidden_size": options.hidden, "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden / 32, "num_key_value_heads": options.hidden / 32,
        "intermediate_size": options.width, "num_experts": options.experts, "num_experts_per_tok": 4,
        "norm_topk_prob": false, "hidden_act": "silu", "attention_bias": false, "clip_qkv": null,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": null
    })
}

fn sorted(vars: &VarMap) -> BTreeMap<String, Var> {
    let data = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

/// Norms 1, matrices normal with 1/√in; what writes into the residual stream divided by √(2·layers).
fn initialise(vars: &BTreeMap<String, Var>, spec: &ModelSpec, seed: u64) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = || {
        let (a, b): (f64, f64) = (rng.random::<f64>().max(1e-12), rng.random());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    };
    for (name, var) in vars {
        if var.rank() == 1 {
            continue;
        }
        let mut deviation = (var.dim(1)? as f64).powf(-0.5);
        if name.contains("o_proj") || name.contains("down_proj") {
            deviation /= (2.0 * spec.layers as f64).sqrt();
        }
        if name.contains("embed_tokens") {
            deviation = 0.02;
        }
        let values: Vec<f32> = (0..var.elem_count()).map(|_| (normal() * deviation) as f32).collect();
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
    }
    Ok(())
}

fn train_model(
    options: &Options,
    decoder: &Decoder,
    vars: &BTreeMap<String, Var>,
    train: &[Vec<u32>],
    valid: &[EvalText],
) -> Result<()> {
    let (named, vars) = (vars, vars.values().collect::<Vec<&Var>>());
    let mut optimisers = Vec::new();
    for chunk in vars.chunks(vars.len().div_ceil(16)) {
        for (matrices, weight_decay) in [(true, 0.1), (false, 0.0)] {
            let group = chunk.iter().filter(|var| (var.rank() > 1) == matrices).map(|&var| var.clone()).collect();
            let params = ParamsAdamW { lr: 0.0, beta2: 0.95, weight_decay, ..ParamsAdamW::default() };
            optimisers.push(Mutex::new(AdamW::new(group, params)?));
        }
    }
    let (started, mut mean_loss, mut mean_balance) = (Instant::now(), 0.0, 0.0);
    for step in 0..options.steps {
        let (loss, balance, grads) = step_gradients(options, decoder, &vars, train, step)?;
        let warm = (step + 1) as f64 / WARMUP_STEPS.min(options.steps) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / options.steps as f64).cos());
        in_parallel(options.threads, optimisers.len(), |index| {
            let mut optimiser = optimisers[index].lock().unwrap_or_else(PoisonError::into_inner);
            optimiser.set_learning_rate(options.rate * warm.min(0.05 + 0.95 * cosine));
            Ok(optimiser.step(&grads)?)
        })?;
        (mean_loss, mean_balance) = (mean_loss + loss, mean_balance + balance);
        let every = if options.smoke { 2 } else { 50 };
        if (step + 1) % every == 0 {
            let tokens = (step + 1) * options.shard * options.shards * POSITIONS;
            let rate = tokens as f64 / started.elapsed().as_secs_f64();
            println!(
                "step {:5}  loss {:.4}  balance {:.3}  {:.0} tokens/s",
                step + 1,
                mean_loss / every as f64,
                mean_balance / every as f64,
                rate
            );
            (mean_loss, mean_balance) = (0.0, 0.0);
        }
        if (step + 1) % 500 == 0 || step + 1 == options.steps {
            for text in valid {
                println!("  {}: perplexity {:.2}", text.name, validate(decoder, text)?);
            }
            if let Some(out) = &options.out {
                save(named, out)?;
            }
        }
    }
    println!("{:.1} minutes", started.elapsed().as_secs_f64() / 60.0);
    Ok(())
}

/// Results of `work` for `0..count`, in that order, from a few threads.
fn in_parallel<T: Send>(threads: usize, count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, T)>> {
        // Relaxed: the counter only hands out numbers, nothing is published through it.
        let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        numbers.take_while(|&number| number < count).map(|number| Ok((number, work(number)?))).collect()
    };
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let joined = workers.into_iter().map(|worker| worker.join().expect("a worker panicked"));
        joined.collect::<Result<Vec<_>>>()
    })?;
    let mut results: Vec<(usize, T)> = results.into_iter().flatten().collect();
    results.sort_by_key(|&(number, _)| number);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// Mean loss, balance loss and summed, clipped gradients of one step.
fn step_gradients(
    options: &Options,
    decoder: &Decoder,
    vars: &[&Var],
    train: &[Vec<u32>],
    step: usize,
) -> Result<(f64, f64, GradStore)> {
    let mut shards = in_parallel(options.threads, options.shards, |shard| {
        let seed = options.seed ^ (((step * options.shards + shard) as u64) << 20);
        shard_gradients(options, decoder, train, &mut ChaCha8Rng::seed_from_u64(seed))
    })?;
    let count = shards.len() as f64;
    let (loss, balance) = shards.iter().fold((0.0, 0.0), |(loss, balance), shard| (loss + shard.0, balance + shard.1));
    let sums = in_parallel(options.threads, vars.len(), |var| {
        let mut grads = shards.iter().filter_map(|shard| shard.2.get(vars[var]));
        let Some(first) = grads.next() else { return Ok(None) };
        let mean = (grads.try_fold(first.clone(), |sum, grad| sum + grad)? / count)?;
        let squares = f64::from(mean.sqr()?.sum_all()?.to_scalar::<f32>()?);
        Ok(Some((mean, squares)))
    })?;
    let norm = sums.iter().flatten().map(|(_, squares)| squares).sum::<f64>().sqrt();
    let mut grads = shards.swap_remove(0).2;
    for (var, sum) in vars.iter().zip(sums) {
        match sum {
            Some((mean, _)) => grads.insert(var, (mean * (CLIP_NORM / norm).min(1.0))?),
            None => grads.remove(var),
        };
    }
    Ok((loss / count, balance / count, grads))
}

fn shard_gradients(
    options: &Options,
    decoder: &Decoder,
    train: &[Vec<u32>],
    rng: &mut ChaCha8Rng,
) -> Result<(f64, f64, GradStore)> {
    let cuts: Vec<&[u32]> = (0..options.shard)
        .map(|_| {
            let ids = &train[rng.random_range(0..train.len())];
            let start = rng.random_range(0..ids.len() - POSITIONS - 1);
            &ids[start..start + POSITIONS + 1]
        })
        .collect();
    let inputs: Vec<&[u32]> = cuts.iter().map(|cut| &cut[..POSITIONS]).collect();
    let targets: Vec<u32> = cuts.iter().flat_map(|cut| &cut[1..]).copied().collect();
    let mut state = decoder.batch_state().keeping_routed();
    let logits = decoder.forward(&Batch::new(&inputs)?, &mut state)?;
    let balance = state.routed().iter().map(load_balancing_loss).collect::<phase_moe::Result<Vec<_>>>()?;
    let z = state.routed().iter().map(router_z_loss).collect::<phase_moe::Result<Vec<_>>>()?;
    let count = targets.len();
    let loss = cross_entropy(&logits.reshape((count, ()))?, &Tensor::from_vec(targets, count, logits.device())?)?;
    let (balance, z) = (Tensor::stack(&balance, 0)?.mean_all()?, Tensor::stack(&z, 0)?.mean_all()?);
    let total = ((&loss + (&balance * options.balance)?)? + (z * Z_LOSS)?)?;
    let grads = total.backward()?;
    Ok((loss.to_scalar::<f32>()?.into(), balance.to_scalar::<f32>()?.into(), grads))
}

fn validate(decoder: &Decoder, text: &EvalText) -> Result<f64> {
    let mut perplexity = Perplexity::default();
    let batching = Batching { tokens: Some(16_384), batch_tokens: 2048, ..Batching::default() };
    for batch in batching.batches(std::slice::from_ref(text))? {
        let logits = decoder.forward(&batch, &mut decoder.batch_state())?;
        perplexity.add(&logits, &batch)?;
    }
    Ok(perplexity.value()?)
}
