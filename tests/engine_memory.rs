//! Memory of the expert engine beside the weights: `O(tokens · hidden + slots · width)` the first time, small lists afterwards.
//!
//! Counted by an allocator of this test, on all threads; one test alone, so that no other one's memory counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use phase_moe::{Activation, Dtype, Engine, ExpertWeights, Matrix, Work};

/// The system's allocator, counting bytes.
struct Counting;

/// Bytes that are allocated, the most there have been, and all that were ever allocated.
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
static EVER: AtomicUsize = AtomicUsize::new(0);

fn taken(size: usize) {
    EVER.fetch_add(size, Relaxed);
    MOST.fetch_max(NOW.fetch_add(size, Relaxed) + size, Relaxed);
}

// SAFETY: everything is the system's allocator; counting neither allocates nor touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller keeps to the contract of `GlobalAlloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there for as long as it copies.
        taken(size);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes beside what was there before, and all that were allocated, within `run`.
fn bytes(run: impl FnOnce()) -> (usize, usize) {
    let (before, ever) = (NOW.load(Relaxed), EVER.load(Relaxed));
    MOST.store(before, Relaxed);
    run();
    (MOST.load(Relaxed).saturating_sub(before), EVER.load(Relaxed) - ever)
}

const THREADS: usize = 2;
const HIDDEN: usize = 1024;
const WIDTH: usize = 512;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

#[test]
fn a_pass_takes_memory_for_tokens_and_slots_alone() {
    let (_, ever) = bytes(|| drop(std::hint::black_box(vec![0u8; 12345])));
    assert!((12345..20000).contains(&ever), "the counter counts {ever}");

    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap();
    let quantized = [Dtype::Q8_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K, Dtype::Mxfp4];
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().chain(quantized) {
        let weights = vec![0u8; WIDTH * dtype.row_bytes(HIDDEN).unwrap()];
        let first = Matrix::new(dtype, WIDTH, HIDDEN, &weights).unwrap();
        let down = Matrix::new(dtype, HIDDEN, WIDTH, &weights).unwrap();
        let expert = ExpertWeights::new(Activation::swiglu(), Some(first.into()), first.into(), down.into()).unwrap();
        for tokens in [64, 1024] {
            // One expert has three tokens, so that every form that is chosen is there.
            let mut named = vec![Vec::new(); EXPERTS];
            for token in 0..tokens as u32 {
                named[if token < 3 { 0 } else { 1 + token as usize % (EXPERTS - 1) }].push(token);
                named[1 + (token as usize + 1) % (EXPERTS - 1)].push(token);
            }
            let ones = vec![1.0; tokens];
            let work: Vec<Work<'_>> =
                named.iter().map(|tokens| Work { expert, tokens, weights: &ones[..tokens.len()] }).collect();
            let input = vec![1.0; tokens * HIDDEN];
            let mut output = vec![0.0; tokens * HIDDEN];
            let engine = Engine::default();
            let mut pass = || {
                let input = Matrix::from_f32(tokens, HIDDEN, &input).unwrap();
                pool.install(|| engine.forward(input, &work, &mut output)).unwrap();
            };
            let (most, _) = bytes(&mut pass);
            // Input in at most three forms and sums; what is between the projections; two threads' room.
            let hidden = 4 * tokens * HIDDEN;
            let slots = 4 * tokens * TOP_K * WIDTH;
            let limit = C_HIDDEN * hidden as f64 + C_SLOTS * slots as f64 + (THREADS * PER_THREAD) as f64;
            println!(
                "{dtype:5} {tokens:5} tokens: {most} of {limit}, {:.2} of tokens and slots",
                most as f64 / (hidden + slots) as f64
            );
            assert!(most as f64 <= limit, "{dtype}, {tokens} tokens: {most} bytes, more than {limit}");
            assert!(most > tokens * HIDDEN * 4, "{dtype}, {tokens} tokens: the sums alone are more than {most}");
            // A thread that came too late for the first pass gets its room in one of these.
            let later = 6;
            let ever: usize = (0..later).map(|_| bytes(&mut pass).1).sum();
            println!("{dtype:5} {tokens:5} tokens, {later} more times: {ever}");
            let limit = later * (LISTS + PER_TOKEN * tokens) + PER_THREAD;
            assert!(ever <= limit, "{dtype}, {tokens} tokens, {later} more times: {ever} bytes, more than {limit}");
        }
    }
}

/// Of `4 · tokens · hidden`: sums, and inputs as floats or as pairs and bytes, with a line more for each row.
const C_HIDDEN: f64 = 2.25;
/// Of `4 · slots · width`: floats, with a line more for each 256 columns.
const C_SLOTS: f64 = 1.07;
/// A panel with the rows that go into it, sums and activations of a group.
const PER_THREAD: usize = 700 << 10;
/// Lists of groups and of items, for each pass.
const LISTS: usize = 32 << 10;
/// And of rows, for each form of the input.
const PER_TOKEN: usize = 2 * 24 * 2;
