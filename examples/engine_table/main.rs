//! The speed of a whole MoE block on this machine, beside what the machine could do and beside Candle.
//!
//! The ceilings are measured between the cells: reading memory, and the best matrix product; the best of the run counts. A cell's
//! floor is the bytes of the experts that its tokens touch at the one, or its operations at the other, whichever is longer.
//! A neighbour takes bandwidth away for minutes, so memory is read in turns with each cell too: the floor then. Then `MoeLayer::forward` and the
//! loop of candle-transformers' `qwen3_moe.rs` run in turns on the same weights, so that a busy neighbour meets both, after
//! their outputs were compared; times are medians. Blocks and inputs take turns too, so that no weight is in a cache when it
//! is touched. Tokens choose experts nearly evenly. Candle's quantised products run on a pool of their own, of one thread
//! unless `CANDLE_NUM_THREADS` says otherwise: its threads wait by spinning, which a busy neighbour makes far slower.
//!
//! ```text
//! cargo run --release --example engine_table                                  # a table, some ten minutes, 8 GB
//! cargo run --release --example engine_table -- --json                        # one JSON document
//! cargo run --release --example engine_table -- --shapes B --dtypes f32,bf16 --tokens 1,8
//! cargo run --release --example engine_table -- --shapes mixtral --no-candle --threads 2
//! cargo run --release --example engine_table -- --isa avx2                      # as on a CPU without what is wider
//! ```
//!
//! Shapes: tiny, quarter, B (OLMoE's), C (Qwen3-30B-A3B's), mixtral, gpt-oss. Dtypes: f32, bf16, f16, q8_0, q4_K, q5_K, q6_K, and mxfp4, of which
//! Candle has none.

mod ceilings;
#[path = "../../benches/common/mod.rs"]
mod common;
mod options;
#[path = "../../benches/common/reads.rs"]
mod reads;
mod table;
#[path = "../../benches/common/threads.rs"]
mod threads;

use std::collections::HashSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{Module, Tensor};
use ceilings::Ceilings;
use common::block::Block;
use common::shape::{Format, Shape};
use options::Options;
use table::{Row, Table, Times};

type Failure = Box<dyn std::error::Error>;

/// What is timed, at which size.
struct Cell<'a> {
    top_k: usize,
    tokens: usize,
    blocks: &'a [Block],
    /// Those of each block.
    inputs: Vec<Vec<Tensor>>,
}

/// Whose forward pass.
#[derive(Clone, Copy)]
enum Side {
    Ours,
    Candle,
}

impl<'a> Cell<'a> {
    fn new(shape: Shape, tokens: usize, blocks: &'a [Block]) -> Result<Self, Failure> {
        let inputs = blocks.iter().map(|block| block.inputs(tokens)).collect::<Result<_, _>>()?;
        Ok(Self { top_k: shape.top_k, tokens, blocks, inputs })
    }

    /// Block and input of one turn: all blocks have theirs before one comes again.
    fn at(&self, turn: usize) -> (&Block, &Tensor) {
        let block = turn % self.blocks.len();
        let inputs = &self.inputs[block];
        (&self.blocks[block], &inputs[turn / self.blocks.len() % inputs.len()])
    }

    /// Turns until everything was touched.
    fn turns(&self) -> usize {
        self.inputs.iter().map(Vec::len).sum()
    }

    /// Experts that an input touches, on average.
    fn touched(&self) -> Result<f64, Failure> {
        let (block, inputs, mut touched) = (&self.blocks[0], &self.inputs[0], 0);
        for input in inputs {
            let chosen = block.ranked(input)?.into_iter().flat_map(|row| row.into_iter().take(self.top_k));
            touched += chosen.map(|(_, expert)| expert).collect::<HashSet<_>>().len();
        }
        Ok(touched as f64 / inputs.len() as f64)
    }

    fn run(&self, side: Side, turn: usize) -> candle_core::Result<Tensor> {
        let (block, input) = self.at(turn);
        match side {
            Side::Ours => block.layer().forward(black_box(input)),
            Side::Candle => block.candle_loop(black_box(input)),
        }
    }

    /// Runs every turn once, for what is packed at first use, and compares both sides on the first block. Returns who can
    /// run the cell.
    fn compare(&self, options: &Options) -> Result<Vec<Side>, Failure> {
        let mut able = vec![Side::Ours];
        if options.candle && self.run(Side::Candle, 0).is_ok() {
            able.push(Side::Candle);
        }
        for turn in 0..self.turns() {
            let outputs = able.iter().map(|&side| self.run(side, turn)).collect::<Result<Vec<_>, _>>()?;
            if let ([ours, candle], 0) = (outputs.as_slice(), turn % self.blocks.len()) {
                self.blocks[0].check_equal(self.at(turn).1, ours, candle)?;
            }
        }
        Ok(able)
    }

    fn measure(
        &self,
        able: &[Side],
        (budget, least): (Duration, usize),
        read: impl Fn(usize) -> f64,
    ) -> Result<Times, Failure> {
        // Short calls run in runs whose first call is not counted: threads of the other side are still awake then.
        let run = if self.tokens <= 8 { 5 } else { 1 };
        let (mut turn, mut times, mut reads) = (0, [vec![], vec![]], vec![]);
        let start = Instant::now();
        while !able.is_empty() && (start.elapsed() < budget || times[able[0] as usize].len() < least) {
            for &side in able {
                for call in 0..run {
                    let start = Instant::now();
                    black_box(self.run(side, turn))?;
                    let millis = start.elapsed().as_secs_f64() * 1e3;
                    turn += 1;
                    if call > 0 || run == 1 {
                        times[side as usize].push(millis);
                    }
                }
                reads.push(read(reads.len()));
            }
        }
        let [ours, candle] = times.map(median);
        Ok(Times { ours, candle, read_gb_per_second: median(reads).unwrap_or_default() })
    }
}

fn median(mut times: Vec<f64>) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}

/// The blocks of one shape and format; there are never two such sets at once.
fn blocks(shape: Shape, format: Format, smoke: bool) -> Result<Vec<Block>, Failure> {
    let count = if smoke { 2 } else { shape.blocks(format) };
    Ok((1..=count as u64).map(|seed| Block::random(shape, format, seed)).collect::<Result<_, _>>()?)
}

fn main() -> Result<(), Failure> {
    let options = Options::parse(std::env::args().skip(1))?;
    threads::fix_threads(options.threads)?;
    let mut table = Table { ceilings: Ceilings::new(options.smoke), rows: Vec::new() };
    for &shape in &options.shapes {
        for &format in options.formats.iter().filter(|format| format.fits(shape)) {
            table.ceilings.raise(options.smoke)?;
            let blocks = blocks(shape, format, options.smoke)?;
            for &tokens in &options.tokens {
                let cell = Cell::new(shape, tokens, &blocks)?;
                let able = cell.compare(&options)?;
                let touched = cell.touched()?;
                let read = |turn| table.ceilings.reads.now(touched * shape.expert_bytes(format), turn);
                let times = cell.measure(&able, options.patience(), read)?;
                let row = Row { shape, format, tokens, touched, times };
                eprintln!("{row}");
                table.rows.push(row);
            }
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        println!("{table}");
    }
    Ok(())
}
