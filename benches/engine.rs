//! The forward pass of a whole MoE layer, against the loop over experts as candle-transformers 0.11.1 writes it in
//! `qwen3_moe.rs`, with the same weights on the same inputs, out of cache. The example `engine_table` shows all formats and
//! what the machine could do at best.

mod common;

use std::cell::Cell;
use std::hint::black_box;
use std::time::Duration;

use candle_core::{Module, Result, Tensor};
use common::block::Block;
use common::shape::{Format, Shape};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn engine(criterion: &mut Criterion) {
    let named = |shape, format| Some((Shape::named(shape)?, Format::named(format)?));
    for (shape, tokens) in [("quarter", [1, 8, 64, 512].as_slice()), ("B", &[1, 8, 64])] {
        for format in ["f32", "bf16"] {
            let (shape, format) = named(shape, format).expect("a shape and a format of the tables");
            forward(criterion, shape, format, tokens).expect("memory for the weights, and passes");
        }
    }
}

fn forward(criterion: &mut Criterion, shape: Shape, format: Format, tokens: &[usize]) -> Result<()> {
    let Shape { hidden, width, experts, top_k, .. } = shape;
    let blocks = (1..=shape.blocks(format) as u64).map(|seed| Block::random(shape, format, seed));
    let blocks = blocks.collect::<Result<Vec<_>>>()?;
    let mut group = criterion.benchmark_group(format!("engine/cpu/{}", format.name));
    group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
    for &tokens in tokens {
        let inputs = blocks.iter().map(|block| block.inputs(tokens)).collect::<Result<Vec<_>>>()?;
        // Blocks and inputs take turns.
        let turn = Cell::new(0);
        let next = || {
            let at = turn.replace(turn.get() + 1);
            let inputs = &inputs[at % blocks.len()];
            (&blocks[at % blocks.len()], &inputs[at / blocks.len() % inputs.len()])
        };
        let ours = |(block, input): (&Block, &Tensor)| block.layer().forward(black_box(input));
        let (block, input) = next();
        block.check_equal(input, &ours((block, input))?, &block.candle_loop(input)?)?;

        let name = format!("hidden={hidden},width={width},tokens={tokens},experts={experts},top_k={top_k}");
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::new("moe-layer", &name), |bencher| bencher.iter(|| ours(next())));
        group.bench_function(BenchmarkId::new("candle-loop", &name), |bencher| {
            bencher.iter(|| {
                let (block, input) = next();
                block.candle_loop(black_box(input))
            });
        });
    }
    group.finish();
    Ok(())
}

criterion_group!(benches, engine);
criterion_main!(benches);
