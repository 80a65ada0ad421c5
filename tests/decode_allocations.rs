//! A decode step makes the same number of allocations however long the text is, but where keys and values grow a block.
//!
//! Counted by an allocator of this test, on all threads.

#![cfg(feature = "model")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use phase_moe::{Batch, Decoder, LoadOptions, Weights};

/// The system's allocator, counting.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system's allocator; counting neither allocates nor touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `GlobalAlloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Positions of a block of keys and values.
const BLOCK: usize = 128;

/// Allocations of one token's pass, for each block of the model: what the engine cuts its work into, the experts at work, what it says of
/// the routing.
const MOST_PER_BLOCK: usize = 40;

#[test]
fn a_step_allocates_the_same_at_any_depth() {
    let files = Weights::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe")).unwrap();
    let decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
    let (spec, mut state) = (decoder.spec().clone(), decoder.generation_state());
    let positions = spec.max_positions.min(4 * BLOCK);
    assert!(positions > 2 * BLOCK, "a text that grows several blocks");
    let mut counts = Vec::new();
    for at in 0..positions {
        let batch = Batch::new(&[&[(at * 31 % spec.vocab) as u32]]).unwrap();
        let before = COUNT.load(Ordering::Relaxed);
        let logits = decoder.forward(&batch, &mut state).unwrap();
        counts.push(COUNT.load(Ordering::Relaxed) - before);
        drop(logits);
    }
    // Buffers have their size after the first tokens; experts have the same sizes, so which are chosen does not matter.
    let steady = counts[BLOCK / 2];
    for (at, &count) in counts.iter().enumerate().skip(BLOCK / 2) {
        match at % BLOCK {
            // A block of each layer, and now and then longer lists of them.
            0 => assert!(count <= steady + 2 * spec.layers, "{count} at {at}, {steady} elsewhere"),
            _ => assert_eq!(count, steady, "at position {at}"),
        }
    }
    assert!(steady <= MOST_PER_BLOCK * spec.layers, "{steady} in {} blocks", spec.layers);
    println!("{steady} allocations a token in {} blocks", spec.layers);
}
