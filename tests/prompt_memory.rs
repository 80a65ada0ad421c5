//! Memory of a long prompt in chunks: beside weights, keys and values it does not grow with the square of the prompt.
//!
//! Counted by an allocator of this test, on all threads; one test alone, so that no other one's memory counts.
#![cfg(feature = "model")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use phase_moe::{Batch, Decoder, zoo};

/// The system's allocator, counting bytes.
struct Counting;

/// Bytes that are allocated, and the most there have been.
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn taken(size: usize) {
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

const CONFIG: &str = r#"{
    "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32, "num_experts": 2,
    "num_experts_per_tok": 1, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 4,
    "vocab_size": 16, "max_position_embeddings": 10000, "norm_topk_prob": true, "hidden_act": "silu"
}"#;

#[test]
fn a_long_prompt_in_chunks_takes_no_square_of_its_length() {
    let spec = zoo::parse_config(CONFIG, "config.json").unwrap();
    let decoder = Decoder::new(&spec, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
    let most = |tokens: usize, chunk: usize| {
        let ids: Vec<u32> = (0..tokens as u32).map(|at| at % 16).collect();
        let (batch, mut state) = (Batch::new(&[&ids]).unwrap(), decoder.generation_state());
        let before = NOW.load(Relaxed);
        MOST.store(before, Relaxed);
        decoder.prefill(&batch, chunk, &mut state).unwrap();
        assert_eq!(state.position(), tokens);
        MOST.load(Relaxed) - before
    };
    // All scores of 4,000 tokens at once would be 1 GB, those of a chunk of 1,024 a quarter of it, four times over on their way to shares.
    let (short, long) = (most(1000, 1024), most(4000, 1024));
    assert!(long < 400 << 20, "{long} bytes");
    assert!(long < 3 * short, "{long} bytes after {short}");
    let small = most(4000, 64);
    assert!(small < 150 << 20, "{small} bytes");
}
