//! llama.cpp on the files of `examples/whole_model`: the same cells, and both programs beside each other.

#[path = "../../../common/cells.rs"]
mod cells;
mod compare;
mod llama;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cells::{COMPARED_TOKENS, Plan, Program, compared_tokens};
use clap::Parser;
use llama::Llama;
use llama_cpp_2::llama_backend::LlamaBackend;
use serde_json::json;

#[derive(Parser)]
enum Command {
    /// Times the cells and prints one JSON document
    Measure {
        /// SHAPE-LAYERSxVOCAB-TYPE.gguf
        #[arg(required = true)]
        models: Vec<PathBuf>,
        #[command(flatten)]
        plan: Plan,
        #[arg(long, default_value_t = 2)]
        threads: i32,
        /// Weights stay mapped as they lie in the file, for a limit on memory: no layouts of its own
        #[arg(long)]
        mapped: bool,
    },
    /// Compares logits with those that `whole_model --logits` has left beside the models
    Logits {
        #[arg(required = true)]
        models: Vec<PathBuf>,
        #[arg(long, default_value_t = 2)]
        threads: i32,
    },
    /// Prints documents of both programs beside each other; of several the medians
    Compare {
        #[arg(long, num_args = 1.., required = true)]
        ours: Vec<PathBuf>,
        #[arg(long, num_args = 1.., required = true)]
        theirs: Vec<PathBuf>,
    },
}

/// Shape and type of a model that the example has written, from its name.
fn named(path: &Path) -> Result<(&str, &str)> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let parts: Vec<&str> = stem.rsplitn(3, '-').collect();
    let [dtype, _, shape] = parts[..] else {
        anyhow::bail!("model: expected SHAPE-LAYERSxVOCAB-TYPE.gguf, got {}", path.display());
    };
    Ok((shape, dtype))
}

fn backend() -> Result<LlamaBackend> {
    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    eprintln!("{}", llama::system_info());
    Ok(backend)
}

fn measure(models: &[PathBuf], plan: &Plan, threads: i32, mapped: bool) -> Result<()> {
    let backend = backend()?;
    let mut all = Vec::new();
    for path in models {
        let (shape, dtype) = named(path)?;
        eprintln!("{}", path.display());
        let model = llama::load(&backend, path, mapped)?;
        let vocab = model.n_vocab() as usize;
        let mut llama = Llama::new(&backend, &model, plan.positions(), threads)?;
        let cells = plan.measure(vocab, &mut llama)?;
        all.extend(cells.iter().map(|cell| cell.json(shape, dtype, "llama.cpp", None)));
    }
    let document = json!({ "system_info": llama::system_info(), "threads": threads, "cells": all });
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}

fn logits(models: &[PathBuf], threads: i32) -> Result<()> {
    let backend = backend()?;
    for path in models {
        let file = path.with_extension("logits");
        let ours = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        let ours: Vec<f32> = ours.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        let model = llama::load(&backend, path, false)?;
        let vocab = model.n_vocab() as usize;
        let theirs = Llama::new(&backend, &model, COMPARED_TOKENS, threads)?.logits(&compared_tokens(vocab))?;
        let (mean, same) = compare::divergence(&theirs, &ours, vocab)?;
        println!("{}: mean KL {mean:.2e}, the same token highest in {:.0} %", path.display(), 100.0 * same);
    }
    Ok(())
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Measure { models, plan, threads, mapped } => measure(&models, &plan, threads, mapped),
        Command::Logits { models, threads } => logits(&models, threads),
        Command::Compare { ours, theirs } => compare::tables(&ours, &theirs),
    }
}
