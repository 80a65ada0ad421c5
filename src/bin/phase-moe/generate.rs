//! `generate`: continues a prompt.

use std::io::{IsTerminal, Write};

use anyhow::Result;
use clap::Args;
use phase_moe::decoder::generate::generate_in;
use phase_moe::decoder::memory::ExpertMemory;
use phase_moe::decoder::sampling::Sampler;
use phase_moe::routing::registry::RouterKind;
use serde::Serialize;

use crate::options::{
    CacheOptions, CapacityOptions, Global, MemoryOptions, ModelOptions, UserMistake, parse, print_json, set_routing,
    warn_streamed, warn_unlimited,
};

/// Continues a prompt with a chosen router and prints statistics at the end.
///
/// Example: phase-moe generate --prompt "And it came to pass" --new-tokens 60 --temperature 0.7
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelOptions,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    new_tokens: usize,
    /// 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw from the fewest tokens that hold this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Router to use
    #[arg(long, value_name = "NAME", default_value = "top-k", value_parser = parse::<RouterKind>)]
    router: RouterKind,
    /// Experts per token [default: the model's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Room over demand while the prompt is read; decoding one text has no limit [default: none]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    capacity_factor: Option<f64>,
    #[command(flatten)]
    capacity: CapacityOptions,
    /// Keep account of a memory with room for this many experts of a layer, for its hit rate and for the routers cache and
    /// cache+phase [default: none]
    #[arg(long, value_name = "N")]
    cached_experts: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// One JSON document instead of the text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    text: String,
    prompt_tokens: usize,
    new_tokens: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: Option<f64>,
    survival: f64,
    /// Needs `--expert-cache` or `--cached-experts`.
    hit_rate: Option<f64>,
    /// These two need `--expert-cache`.
    expert_bytes_read: Option<u64>,
    peak_resident_expert_bytes: Option<u64>,
}

impl Generate {
    pub fn run(self, global: &Global) -> Result<()> {
        let rule = self.capacity.rule_if(self.capacity_factor, "--capacity-factor")?;
        let settings = self.cache.settings(self.router)?;
        let mut sampler = Sampler::new(self.temperature, self.top_p, self.capacity.seed)?;
        self.model.refuse_two_memories(self.cached_experts)?;
        let mut model = self.model.load_with(&self.memory)?;
        let router = self.router.build_with(self.capacity.seed, &settings);
        set_routing(&mut model, router, rule.clone(), self.top_k)?;
        let mut state = model.decoder().generation_state();
        if let Some(cached) = self.cached_experts {
            let (layers, experts) = (model.decoder().spec().layers, model.decoder().spec().moe.experts);
            let MemoryOptions { policy, admission } = self.memory;
            state = state.with_memory(ExpertMemory::new(layers, experts, cached, policy, admission)?);
        }
        let prompt = model.encode(&self.prompt)?;
        if prompt.is_empty() {
            return Err(UserMistake("--prompt: expected at least one token of text, got none".into()).into());
        }
        if let Some(rule) = &rule {
            let moe = &model.decoder().spec().moe;
            let capacity = rule.capacity(prompt.len(), moe.experts, moe.top_k)?;
            warn_unlimited(rule, usize::from(capacity.limits().is_none()), 1);
        }
        let bar = global.progress(self.new_tokens as u64);
        bar.set_message("generating");
        let generation = generate_in(&model, &prompt, self.new_tokens, &mut state, &mut sampler, |_| bar.inc(1))?;
        drop(bar);
        warn_streamed(model.decoder());
        let cache = model.decoder().expert_cache().map(|cache| cache.statistics());
        let output = Output {
            text: model.decode(&generation.ids)?,
            prompt_tokens: generation.prompt_tokens,
            new_tokens: generation.ids.len(),
            prefill_tokens_per_second: generation.prefill_tokens_per_second(),
            decode_tokens_per_second: generation.decode_tokens_per_second(),
            survival: generation.survival(),
            hit_rate: match &cache {
                Some(cache) => cache.hit_rate(),
                None => state.memory().and_then(ExpertMemory::hit_rate),
            },
            expert_bytes_read: cache.as_ref().map(|cache| cache.bytes_read),
            peak_resident_expert_bytes: cache.as_ref().map(|cache| cache.peak_bytes as u64),
        };
        if self.json {
            return print_json(&output);
        }
        let positions = model.decoder().spec().max_positions;
        if output.new_tokens < self.new_tokens && output.prompt_tokens + output.new_tokens >= positions {
            eprintln!("stopped at the model's {positions} positions");
        }
        let mut out = std::io::stdout();
        // On a terminal the prompt reads on into the continuation; in a pipe there is the continuation alone.
        if out.is_terminal() {
            write!(out, "{}", self.prompt)?;
        }
        writeln!(out, "{}", output.text)?;
        let decode = output.decode_tokens_per_second.map_or("–".into(), |rate| format!("{rate:.0}"));
        let hits = output.hit_rate.map_or(String::new(), |rate| format!(", {:.1} % of experts hit", 100.0 * rate));
        let ahead = cache.map(|cache| cache.prefetch).filter(|ahead| ahead.issued > 0);
        let ahead =
            ahead.map_or(String::new(), |ahead| format!(", {} of {} reads ahead used", ahead.used, ahead.issued));
        eprintln!(
            "{} tokens of prompt at {:.0} tokens/s, {} new at {decode} tokens/s, {:.1} % of slots kept{hits}{ahead}",
            output.prompt_tokens,
            output.prefill_tokens_per_second,
            output.new_tokens,
            100.0 * output.survival
        );
        Ok(())
    }
}
