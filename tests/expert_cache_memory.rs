//! The expert cache's budget as the system sees it: memory aligned to pages, from the allocator or, from 2 MiB on, mapped by itself, is
//! slabs, and there is never more of it than the budget, not for a moment, while eight threads run steps and read ahead. One test
//! alone, for what is counted here counts for all.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use phase_moe::offload::Scope;
use phase_moe::{CacheOptions, Checkpoint, ExpertCache, ExpertId, ExpertSet, ExpertStore, Weights};

/// Bytes of slabs now, and the most since the last look.
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// How many of them the system has mapped.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);

fn add(bytes: usize) {
    let now = NOW.fetch_add(bytes, Ordering::SeqCst) + bytes;
    MOST.fetch_max(now, Ordering::SeqCst);
}

fn subtract(bytes: usize) {
    NOW.fetch_sub(bytes, Ordering::SeqCst);
}

struct Counting;

// SAFETY: everything is the system's allocator; counting neither allocates nor touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() == 4096 {
            add(layout.size());
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above with this layout, as the caller promises.
        unsafe { System.dealloc(pointer, layout) };
        if layout.align() == 4096 {
            subtract(layout.size());
        }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The C library's calls as this program's other crates find them: the linker takes these. Those of the C library itself, as for the
/// stacks of threads, do not come here.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod mapping {
    use std::ffi::c_void;
    use std::sync::atomic::Ordering;

    use libc::{MAP_ANONYMOUS, MAP_NORESERVE, c_int, c_long, off_t, size_t};

    const SLAB_BYTES: usize = 2 << 20;

    // SAFETY: the system's own call with the caller's arguments and its promises about them; counting touches no memory of theirs.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn mmap64(
        at: *mut c_void,
        bytes: size_t,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: off_t,
    ) -> *mut c_void {
        let arguments = (bytes as c_long, c_long::from(protection), c_long::from(flags), c_long::from(file));
        let (length, protection, how, file) = arguments;
        // SAFETY: as above.
        let mapped = unsafe { libc::syscall(libc::SYS_mmap, at, length, protection, how, file, offset as c_long) };
        if mapped != -1 && bytes >= SLAB_BYTES && flags & MAP_ANONYMOUS != 0 && flags & MAP_NORESERVE == 0 {
            super::MAPPINGS.fetch_add(1, Ordering::SeqCst);
            super::add(bytes);
        }
        mapped as *mut c_void
    }

    // SAFETY: as above.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn munmap(at: *mut c_void, bytes: size_t) -> c_int {
        // SAFETY: as above.
        let result = unsafe { libc::syscall(libc::SYS_munmap, at, bytes as c_long) } as c_int;
        if result == 0 && bytes >= SLAB_BYTES {
            super::subtract(bytes);
        }
        result
    }
}

fn set(ids: [usize; 3]) -> ExpertSet {
    let mut set = ExpertSet::new(8).unwrap();
    ids.into_iter().for_each(|id| assert!(set.insert(ExpertId::new(id, 8).unwrap())));
    set
}

/// The experts of a model in memory, three layers of eight, `width` wide.
fn store(width: usize) -> Arc<ExpertStore> {
    const HIDDEN: usize = 256;
    let values = vec![0.5f32; width * HIDDEN];
    let mut tensors = vec![NamedTensor::f32("model.embed_tokens.weight", [16, HIDDEN], &values[..16 * HIDDEN])];
    for layer in 0..3 {
        tensors.push(NamedTensor::f32(
            format!("model.layers.{layer}.input_layernorm.weight"),
            [HIDDEN],
            &values[..HIDDEN],
        ));
    }
    for (layer, id) in (0..3).flat_map(|layer| (0..8).map(move |id| (layer, id))) {
        let name = |projection| format!("model.layers.{layer}.mlp.experts.{id}.{projection}.weight");
        for projection in ["gate_proj", "up_proj"] {
            tensors.push(NamedTensor::f32(name(projection), [width, HIDDEN], &values));
        }
        tensors.push(NamedTensor::f32(name("down_proj"), [HIDDEN, width], &values));
    }
    let bytes: &'static [u8] = tensor_bytes(&tensors, None).unwrap().leak();
    let config = format!(
        r#"{{"model_type": "olmoe", "vocab_size": 16, "hidden_size": {HIDDEN}, "intermediate_size": {width},
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
            "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu"}}"#
    );
    let checkpoint = Checkpoint::from_sources(vec![("memory".into(), Box::new(bytes))]).unwrap();
    Arc::new(Weights::from_parts("made", config, checkpoint).expert_store().unwrap())
}

#[test]
fn slabs_never_take_more_than_the_budget() {
    // Matrices below and above the size from which a slab is mapped.
    for (width, mapped) in [(20, false), (2100, true)] {
        within_budgets(&store(width), mapped);
    }
}

fn within_budgets(store: &Arc<ExpertStore>, mapped: bool) {
    let largest = store.slab_bytes(2);
    for scope in [Scope::PerLayer, Scope::Global] {
        for budget_bytes in [largest, 3 * largest + 4095, 10 * largest] {
            MOST.store(NOW.load(Ordering::SeqCst), Ordering::SeqCst);
            let options = CacheOptions { scope, readers: 3, ..CacheOptions::new(budget_bytes) };
            let cache = ExpertCache::new(store.clone(), options).unwrap();
            std::thread::scope(|threads| {
                for thread in 0..8usize {
                    let cache = &cache;
                    threads.spawn(move || {
                        for turn in 0..if mapped { 5 } else { 25 } {
                            let at = 5 * thread + 3 * turn;
                            let wanted = set([at % 8, (at + 1) % 8, (at + 3) % 8]);
                            cache.prefetch((at + 1) % 3, &wanted).unwrap();
                            cache.run(at % 3, &wanted, |_| Ok(())).unwrap();
                        }
                    });
                }
            });
            let statistics = cache.statistics();
            // A slab that is promised may not have been made yet.
            assert!(statistics.bytes >= NOW.load(Ordering::SeqCst), "{scope:?}, {budget_bytes}");
            assert!(statistics.peak_bytes <= budget_bytes, "{statistics:?}");
            let most = MOST.load(Ordering::SeqCst);
            assert!(most > 0 && most <= budget_bytes, "{scope:?}: {most} of {budget_bytes}");
            drop(cache);
            let maps = mapped && cfg!(all(target_os = "linux", target_pointer_width = "64"));
            assert_eq!(MAPPINGS.swap(0, Ordering::SeqCst) > 0, maps, "{scope:?}, {budget_bytes}");
            assert_eq!(NOW.load(Ordering::SeqCst), 0);
        }
    }
}
