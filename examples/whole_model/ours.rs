//! This crate as a program that runs a model.

use std::path::Path;

use anyhow::Result;
use bytesize::ByteSize;
use candle_core::DType;
use phase_moe::{Batch, CacheOptions, Decoder, DecoderState, LoadOptions, Weights};

use crate::cells::{CHUNK_TOKENS, Program};

pub struct Ours {
    decoder: Decoder,
    state: DecoderState,
}

impl Ours {
    /// # Errors
    /// Those of reading the file.
    pub fn load(path: &Path, dtype: DType, expert_cache: Option<ByteSize>) -> Result<Self> {
        let mut options = LoadOptions::default().with_dtype(dtype);
        if let Some(ByteSize(bytes)) = expert_cache {
            options = options.with_expert_cache(CacheOptions::new(bytes.try_into()?));
        }
        let decoder = Decoder::load(&Weights::open(path)?, &options)?;
        Ok(Self { state: decoder.generation_state(), decoder })
    }
}

impl Program for Ours {
    fn forget(&mut self) -> Result<()> {
        self.state = self.decoder.generation_state();
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.decoder.prefill(&Batch::new(&[tokens])?, CHUNK_TOKENS, &mut self.state)?;
        Ok(())
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.forget()?;
        let logits = self.decoder.forward(&Batch::new(&[tokens])?, &mut self.state)?;
        Ok(logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}
