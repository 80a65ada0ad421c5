//! llama.cpp as a program that runs a model.

use std::ffi::CStr;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::Result;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

use crate::cells::{CHUNK_TOKENS, Program};

/// The instructions that it was built with.
pub fn system_info() -> String {
    // SAFETY: a string of the library's own, which stays.
    unsafe { CStr::from_ptr(llama_cpp_sys_2::llama_print_system_info()) }.to_string_lossy().into_owned()
}

/// # Errors
/// A file that it cannot read.
pub fn load(backend: &LlamaBackend, path: &Path, mapped: bool) -> Result<LlamaModel> {
    let mut params = std::pin::pin!(LlamaModelParams::default());
    if mapped {
        // All tensors as they lie in the file: a layout of its own is a copy in memory.
        params.as_mut().add_cpu_buft_override(c".*");
    }
    Ok(LlamaModel::load_from_file(backend, path, &params)?)
}

/// A context of a model, as its own commands make one: weights mapped and laid out anew where it has a better layout, keys and values
/// in f16.
pub struct Llama<'a> {
    context: LlamaContext<'a>,
    batch: LlamaBatch<'a>,
    position: i32,
}

impl<'a> Llama<'a> {
    /// # Errors
    /// No memory for so many positions.
    pub fn new(backend: &LlamaBackend, model: &'a LlamaModel, positions: usize, threads: i32) -> Result<Self> {
        let parameters = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(positions.try_into()?))
            .with_n_batch(CHUNK_TOKENS as u32)
            .with_n_ubatch(CHUNK_TOKENS as u32)
            .with_n_threads(threads)
            .with_n_threads_batch(threads);
        let context = model.new_context(backend, parameters)?;
        Ok(Self { context, batch: LlamaBatch::new(CHUNK_TOKENS, 1), position: 0 })
    }

    /// With logits of all tokens, or of the last.
    fn decode(&mut self, tokens: &[u32], all: bool) -> Result<()> {
        self.batch.clear();
        for (at, &token) in tokens.iter().enumerate() {
            let wanted = all || at + 1 == tokens.len();
            self.batch.add(LlamaToken(token.try_into()?), self.position, &[0], wanted)?;
            self.position += 1;
        }
        self.context.decode(&mut self.batch)?;
        // Waits for them.
        std::hint::black_box(self.context.get_logits_ith(-1));
        Ok(())
    }
}

impl Program for Llama<'_> {
    fn forget(&mut self) -> Result<()> {
        self.context.clear_kv_cache();
        self.position = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.decode(tokens, false)
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.forget()?;
        self.decode(tokens, true)?;
        Ok((0..tokens.len() as i32).flat_map(|at| self.context.get_logits_ith(at)).copied().collect())
    }
}
