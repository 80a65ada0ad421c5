//! What a generation came to: for people one line on standard error, for programs JSON.

use std::time::Duration;

use phase_moe::decoder::{DecoderState, Slots};
use phase_moe::offload::PrefetchStatistics;
use phase_moe::parallel::{ExpertParallel, RankShares, RankTotals};
use phase_moe::{Decoder, Generation};
use serde::Serialize;

use crate::notice::notice;

/// Requests for experts so far, of an expert cache or of a memory that account is kept of.
#[derive(Clone, Copy, Default)]
pub struct Reads {
    hits: u64,
    requests: u64,
    /// These need an expert cache.
    bytes: Option<u64>,
    peak_bytes: Option<u64>,
}

impl Reads {
    /// Those of `decoder`'s cache or `state`'s memory; none without either.
    pub fn of(decoder: &Decoder, state: &DecoderState) -> Self {
        match (decoder.expert_cache(), state.memory()) {
            (Some(cache), _) => {
                let cache = cache.statistics();
                let (bytes, peak_bytes) = (Some(cache.bytes_read), Some(cache.peak_bytes as u64));
                Self { hits: cache.hits, requests: cache.requests, bytes, peak_bytes }
            }
            (None, Some(memory)) => Self { hits: memory.hits(), requests: memory.requests(), ..Self::default() },
            (None, None) => Self::default(),
        }
    }

    /// Those that came after `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            requests: self.requests - before.requests,
            bytes: self.bytes.map(|bytes| bytes - before.bytes.unwrap_or(0)),
            peak_bytes: self.peak_bytes,
        }
    }

    /// Hits of requests; `None` without any.
    pub fn hit_rate(self) -> Option<f64> {
        (self.requests > 0).then(|| self.hits as f64 / self.requests as f64)
    }
}

/// Sums over one generation or several.
#[derive(Default)]
pub struct Sums {
    /// Tokens of prompts that went through the model.
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    prefill_time: Duration,
    decode_tokens: usize,
    decode_time: Duration,
    slots: Slots,
}

impl Sums {
    /// One more.
    pub fn add(&mut self, generation: &Generation) {
        self.prompt_tokens += generation.prompt_tokens.iter().sum::<usize>();
        self.new_tokens += generation.texts.iter().map(Vec::len).sum::<usize>();
        self.prefill_time += generation.prefill_time;
        self.decode_tokens += generation.decode_tokens;
        self.decode_time += generation.decode_time;
        self.slots.asked += generation.slots.asked;
        self.slots.kept += generation.slots.kept;
    }

    /// What ranks did with it, since `before`.
    pub fn over_ranks(&self, ranks: &ExpertParallel, before: &RankTotals) -> phase_moe::Result<RankShares> {
        let tokens = (self.prompt_tokens + self.decode_tokens) as u64;
        ranks.shares(before, tokens, self.prefill_time + self.decode_time)
    }

    /// As figures.
    pub fn figures(&self, reads: Reads, ranks: Option<RankShares>) -> Figures {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64();
        Figures {
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            prefill_tokens_per_second: rate(self.prompt_tokens, self.prefill_time),
            decode_tokens_per_second: (self.decode_tokens > 0).then(|| rate(self.decode_tokens, self.decode_time)),
            survival: self.slots.survival(),
            hit_rate: reads.hit_rate(),
            expert_bytes_read: reads.bytes,
            peak_resident_expert_bytes: reads.peak_bytes,
            ranks,
        }
    }
}

/// The figures of a generation.
#[derive(Serialize)]
pub struct Figures {
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: Option<f64>,
    survival: f64,
    /// Needs `--expert-cache` or `--cached-experts`.
    hit_rate: Option<f64>,
    /// These two need `--expert-cache`.
    expert_bytes_read: Option<u64>,
    peak_resident_expert_bytes: Option<u64>,
    /// Needs `--expert-parallel`.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    ranks: Option<RankShares>,
}

impl Figures {
    /// Says them in a line; `prompts` is what the prompts are called.
    pub fn say(&self, prompts: &str, ahead: Option<PrefetchStatistics>) {
        let decode = self.decode_tokens_per_second.map_or("–".into(), |rate| format!("{rate:.0}"));
        let hits = self.hit_rate.map_or(String::new(), |rate| format!(", {} of experts hit", percent(rate)));
        let ahead = ahead.filter(|ahead| ahead.issued > 0);
        let ahead =
            ahead.map_or(String::new(), |ahead| format!(", {} of {} reads ahead used", ahead.used, ahead.issued));
        let ranks = self.ranks.as_ref().map_or(String::new(), |ranks| {
            format!(
                "; {} ranks, the slowest with {:.2} of the mean, {:.1} KB a token between them, {} of the time in messages",
                ranks.ranks,
                ranks.straggler_ratio,
                ranks.bytes_exchanged_per_token / 1e3,
                percent(ranks.exchange_share_of_time)
            )
        });
        notice(format_args!(
            "{} tokens of {prompts} at {:.0} tokens/s, {} new at {decode} tokens/s, {} of slots kept{hits}{ahead}{ranks}",
            self.prompt_tokens,
            self.prefill_tokens_per_second,
            self.new_tokens,
            percent(self.survival)
        ));
    }
}

/// A share for people.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
