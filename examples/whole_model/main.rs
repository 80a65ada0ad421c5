//! Tokens a second of a whole model of a true shape, beside what this machine could do.
//!
//! The model is written first, as GGUF with random weights, so that llama.cpp can run the same file (`benches/peers/llama_cpp`); a
//! file that is there is used. Then prompts are read, and tokens decoded one by one after so many others. A decoded token's floor is
//! what it reads at least (attention, its experts, gates, the output matrix and a row of the embedding as stored, keys and values of the
//! depth at two bytes a number), at the speed at which all threads read memory. Beside it stands the floor of products: the same
//! weights at the speed of a product whose matrix lies in the second cache. Both are measured between the models, the best counts.
//!
//! ```text
//! cargo run --release --example whole_model                                        # OLMoE's shape, 13 GB of disk, 10 of memory
//! cargo run --release --example whole_model -- --shape qwen3-30b --vocab 32000 --types q4_K_M
//! cargo run --release --example whole_model -- --isa avx2 --threads 2 --json       # one JSON document
//! ```

#[path = "../../benches/common/cells.rs"]
mod cells;
mod floor;
mod gguf;
mod ours;
#[path = "../../benches/common/reads.rs"]
mod reads;
mod shape;
mod table;
#[path = "../../benches/common/threads.rs"]
mod threads;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use cells::{Plan, Program, compared_tokens};
use clap::Parser;
use floor::Floors;
use ours::Ours;
use phase_moe::Isa;
use shape::{Mixture, SMOKE, Shape};
use table::{Row, Table};

#[derive(Parser)]
struct Options {
    /// olmoe, qwen3-30b, qwen3.5-35b
    #[arg(long, default_value = "olmoe", value_parser = Shape::named)]
    shape: Shape,
    /// Layers, of 16, 48 and 40 [default: 8, 6 and 4]
    #[arg(long)]
    layers: Option<usize>,
    /// Words of the vocabulary [default: 50304, 151936 and 248320]
    #[arg(long)]
    vocab: Option<usize>,
    /// How weights are stored: bf16, q8_0, q4_K_M
    #[arg(long, visible_alias = "type", value_delimiter = ',', default_value = "q4_K_M,q8_0,bf16")]
    types: Vec<Mixture>,
    /// Of activations: f32, bf16
    #[arg(long, default_value = "bf16")]
    dtype: String,
    #[command(flatten)]
    plan: Plan,
    /// Experts stay in the file but for so much memory (855MB): beside mapping in llama.cpp, both held to one limit
    #[arg(long)]
    expert_cache: Option<bytesize::ByteSize>,
    /// All of the CPU's unless given
    #[arg(long)]
    threads: Option<usize>,
    /// Nothing wider than this instruction set
    #[arg(long)]
    isa: Option<Isa>,
    /// Where models are written
    #[arg(long, default_value = "target/whole-model")]
    directory: PathBuf,
    /// Only writes the models
    #[arg(long)]
    write: bool,
    /// Only writes logits of some tokens beside each model, for a peer to compare
    #[arg(long)]
    logits: bool,
    /// One JSON document
    #[arg(long)]
    json: bool,
    /// A tiny model, to see that everything runs
    #[arg(long)]
    smoke: bool,
}

fn main() -> Result<()> {
    let mut options = Options::parse();
    threads::fix_threads(options.threads)?;
    // Before anything is made.
    if let Some(isa) = options.isa {
        isa.limit();
    }
    if options.smoke {
        options.shape = SMOKE;
        options.plan = Plan { prompts: vec![8], depths: vec![8, 16], new_tokens: 2, repeat: 1 };
    }
    let shape = &mut options.shape;
    shape.layers = options.layers.unwrap_or(shape.layers);
    shape.vocab = options.vocab.unwrap_or(shape.vocab);
    ensure!(
        shape.layers > 0 && shape.vocab >= 512,
        "expected a layer and 512 words, got {} and {}",
        shape.layers,
        shape.vocab
    );
    let dtype = match options.dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        other => anyhow::bail!("unknown dtype `{other}`: expected f32, bf16"),
    };
    std::fs::create_dir_all(&options.directory)?;

    let floors = Floors::new(options.smoke);
    let mut table = Table { shape: options.shape.clone(), activations: options.dtype, floors, rows: Vec::new() };
    for &mixture in &options.types {
        let Shape { name, layers, vocab, .. } = options.shape;
        let path = options.directory.join(format!("{name}-{layers}x{vocab}-{}.gguf", mixture.name()));
        if !path.exists() {
            eprintln!("writing {}", path.display());
            gguf::write(&path, &options.shape, mixture).with_context(|| format!("writing {}", path.display()))?;
        }
        if options.write {
            continue;
        }
        if options.logits {
            let logits = Ours::load(&path, dtype, None)?.logits(&compared_tokens(vocab))?;
            let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
            std::fs::write(path.with_extension("logits"), bytes)?;
            continue;
        }
        table.floors.raise(&options.shape)?;
        eprintln!("{}", path.display());
        let cells = options.plan.measure(vocab, &mut Ours::load(&path, dtype, options.expert_cache)?)?;
        table.rows.extend(cells.into_iter().map(|cell| Row { mixture, cell }));
        table.floors.raise(&options.shape)?;
    }
    if options.write || options.logits {
        return Ok(());
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        println!("{table}");
    }
    Ok(())
}
