//! Whether the limit that was asked for was one: in small batches it is none.

use anyhow::Result;
use phase_moe::{Batch, CapacityRule, Decoder};

use crate::options::{fewest_experts, warn_unlimited};

/// A rule, and how many chunks of prompts it was asked about.
pub struct Limits {
    pub rule: Option<CapacityRule>,
    chunks: usize,
    unlimited: usize,
}

impl Limits {
    /// Nothing has gone through yet.
    pub fn new(rule: Option<CapacityRule>) -> Self {
        Self { rule, chunks: 0, unlimited: 0 }
    }

    /// Takes note of prompts that go through `decoder` in chunks.
    pub fn count(&mut self, decoder: &Decoder, prompts: &[&[u32]], chunk_tokens: usize) -> Result<()> {
        let Some(rule) = &self.rule else { return Ok(()) };
        let (spec, top_k) = (decoder.spec(), fewest_experts(decoder));
        // Whether there is a limit is the same in all layers.
        let rule = rule.of_layer(0, spec.moe_blocks().count())?;
        for chunk in Batch::new(prompts)?.chunks(chunk_tokens) {
            let capacity = rule.capacity(chunk.live_tokens() as usize, spec.moe.experts, top_k)?;
            self.chunks += 1;
            self.unlimited += usize::from(capacity.limits().is_none());
        }
        Ok(())
    }

    /// Says where there was no limit.
    pub fn warn(&self) {
        if let Some(rule) = &self.rule {
            warn_unlimited(rule, self.unlimited, self.chunks);
        }
    }
}
