//! What the memory-aware router saves and what it costs: misses against plain top-k with an LRU memory, and the paired difference of
//! perplexity, in decode over the bundled text. What came out is in `benches/memory.md`.
//!
//! ```text
//! cargo run --release --example memory_curve                    # a half and a quarter of the experts, one curve each
//! cargo run --release --example memory_curve -- --cached-experts 16 --admission all --policy lru,lfu --seeds 1,2
//! ```
//!
//! Beside it the published memory-aware router: a fixed bonus on the raw logits of resident experts, whatever their scale, in
//! front of an LRU memory. A seed other than 0 shuffles the sequences of each text, so that others come before. A difference is
//! taken sequence by sequence, averaged over the seeds; its standard error is that of a mean over the sequences.
//!
//! Reads `models/tiny-moe`, which a checkout of the repository has and the published package has not.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use clap::Parser;
use phase_moe::eval::{Batching, DecodeFigures, Decoding, EvalText, Perplexity};
use phase_moe::{
    Admission, Assignment, Batch, CacheRouter, Decoder, ExpertId, LoadOptions, Model, Policy, RouteRequest, RouteState,
    Router, Scratch, TopK,
};

#[derive(Parser)]
struct Options {
    /// Experts of a layer that fit
    #[arg(long, value_delimiter = ',', default_value = "16,8")]
    cached_experts: Vec<usize>,
    /// Bonuses, in score ranges
    #[arg(long, value_delimiter = ',', default_value = "0,0.05,0.1,0.15,0.2,0.3")]
    bonus: Vec<f64>,
    /// Bounds on a token's lost gate mass
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.2")]
    max_mass_loss: Vec<f64>,
    /// Experts of a token that always stay
    #[arg(long, value_delimiter = ',', default_value = "1")]
    keep_top: Vec<usize>,
    /// Who leaves
    #[arg(long, value_delimiter = ',', default_value = "lru")]
    policy: Vec<Policy>,
    /// Who enters
    #[arg(long, value_delimiter = ',', default_value = "affinity")]
    admission: Vec<Admission>,
    /// Bonuses of the published router, on raw logits; give 0 for none
    #[arg(long, value_delimiter = ',', default_value = "0.15,0.5,1")]
    published: Vec<f32>,
    /// Shuffles of the sequences; 0 keeps their order
    #[arg(long, value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,
    /// Tokens of text [default: all]
    #[arg(long)]
    tokens: Option<usize>,
}

/// `top-k of logit + bonus · [resident]`, one token at a time.
struct Published {
    bonus: f32,
}

impl Router for Published {
    fn name(&self) -> &'static str {
        "published"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> phase_moe::Result<()> {
        let (gate, experts) = (request.scores().gate(0), request.scores().experts());
        let mut adjusted = Vec::with_capacity(experts);
        for (expert, &score) in gate.iter().enumerate() {
            let id = ExpertId::new(expert, experts)?;
            let resident = request.context().resident.is_some_and(|resident| resident.contains(id));
            // The logit, but for what all experts of the token have in common.
            adjusted.push(score.ln() + if resident { self.bonus } else { 0.0 });
        }
        let mut ids: Vec<i32> = (0..experts as i32).collect();
        ids.sort_by(|&a, &b| adjusted[b as usize].total_cmp(&adjusted[a as usize]));
        ids.truncate(request.top_k());
        let weights: Vec<f32> = ids.iter().map(|&id| gate[id as usize]).collect();
        *assignment = Assignment::from_parts(experts, request.top_k(), &ids, &weights)?;
        Ok(())
    }
}

/// Nats of a sequence, one entry a seed, by its tokens.
type Nats = HashMap<Vec<u32>, Vec<f64>>;

/// Decodes the text in every order; returns the sums over the orders.
fn measure(decoder: &Decoder, orders: &[Vec<Batch>], decoding: &Decoding) -> Result<(Nats, DecodeFigures)> {
    let (mut nats, mut sum) = (Nats::new(), DecodeFigures::default());
    for batches in orders {
        let figures = decoding.run(decoder, batches, |batch, logits| {
            for (row, ids) in batch.ids().chunks_exact(batch.positions()).enumerate() {
                let first = row * batch.positions();
                let live =
                    (0..ids.len()).filter(|at| batch.padding().is_none_or(|padding| !padding[first + at])).count();
                let mut perplexity = Perplexity::default();
                perplexity.add(&logits.narrow(0, row, 1)?.narrow(1, 0, live)?, &Batch::new(&[&ids[..live]])?)?;
                let nats_of_sequence = perplexity.value()?.ln() * (live - 1) as f64;
                nats.entry(ids[..live].to_vec()).or_default().push(nats_of_sequence);
            }
            Ok(())
        })?;
        sum.requests += figures.requests;
        sum.hits += figures.hits;
        sum.misses += figures.misses;
        sum.belady_hits = Some(sum.belady_hits.unwrap_or(0) + figures.belady_hits.unwrap_or(0));
        let kept = figures.gate_mass_kept.unwrap_or(1.0) / orders.len() as f64;
        sum.gate_mass_kept = Some(sum.gate_mass_kept.unwrap_or(0.0) + kept);
    }
    Ok((nats, sum))
}

/// Mean of `nats − other` a token and its standard error over the sequences.
fn paired(nats: &Nats, other: &Nats) -> (f64, f64) {
    let mean_of = |nats: &[f64]| nats.iter().sum::<f64>() / nats.len() as f64;
    let off: Vec<(f64, f64)> =
        nats.iter().map(|(ids, nats)| (mean_of(nats) - mean_of(&other[ids]), (ids.len() - 1) as f64)).collect();
    let tokens: f64 = off.iter().map(|(_, tokens)| tokens).sum();
    let mean = off.iter().map(|(off, _)| off).sum::<f64>() / tokens;
    let square: f64 = off.iter().map(|(off, tokens)| (off - mean * tokens).powi(2)).sum();
    let count = off.len() as f64;
    (mean, (square * count / (count - 1.0)).sqrt() / tokens)
}

fn row(name: &str, figures: &DecodeFigures, (mean, error): (f64, f64), plain: &DecodeFigures) {
    let percent = |share: Option<f64>| share.map_or("–".into(), |share| format!("{:.2} %", 100.0 * share));
    let of_requests = |hits: u64| (figures.requests > 0).then(|| hits as f64 / figures.requests as f64);
    println!(
        "| {name} | {:.1} % | {:+.2} ± {:.2} % | {} | {} | {} |",
        100.0 * (1.0 - figures.misses as f64 / plain.misses as f64),
        100.0 * mean.exp_m1(),
        100.0 * error * mean.exp(),
        percent(of_requests(figures.hits)),
        percent(figures.belady_hits.and_then(of_requests)),
        percent(figures.gate_mass_kept),
    );
}

fn main() -> Result<()> {
    let options = Options::parse();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let model = Model::load(&directory, &LoadOptions::default())?;
    let mut texts = Vec::new();
    for name in ["scripture", "code", "reference"] {
        let text = std::fs::read_to_string(directory.join("eval").join(name).with_extension("txt"))?;
        texts.push(EvalText { name: name.into(), ids: model.encode(&text)? });
    }
    let order = |seed: u64| {
        let shuffle = (seed != 0).then_some(seed);
        Ok(Batching { tokens: options.tokens, shuffle, ..Batching::default() }.batches(&[], &texts)?)
    };
    let orders: Vec<Vec<Batch>> = options.seeds.iter().map(|&seed| order(seed)).collect::<Result<_>>()?;
    let tokens: u64 = orders[0].iter().map(Batch::live_tokens).sum();
    let decoder = model.decoder();
    for &cached_experts in &options.cached_experts {
        let decoding =
            |router: Arc<dyn Router>, policy, admission| Decoding { router, cached_experts, policy, admission };
        let plain = decoding(Arc::new(TopK { drop: None }), Policy::Lru, Admission::All);
        let (reference, plain) = measure(decoder, &orders, &plain)?;
        println!(
            "\n{cached_experts} of {} experts; {tokens} tokens, seeds {:?}",
            decoder.spec().moe.experts,
            options.seeds
        );
        println!("| router | misses saved | perplexity | hit rate | Belady | gate mass |\n|---|---|---|---|---|---|");
        row("top-k, lru", &plain, (0.0, 0.0), &plain);
        for &bonus in options.published.iter().filter(|&&bonus| bonus != 0.0) {
            let published = decoding(Arc::new(Published { bonus }), Policy::Lru, Admission::All);
            let (nats, figures) = measure(decoder, &orders, &published)?;
            row(&format!("published {bonus}, lru"), &figures, paired(&nats, &reference), &plain);
        }
        for (&policy, &admission) in options.policy.iter().flat_map(|p| options.admission.iter().map(move |a| (p, a))) {
            for (&loss, &keep) in
                options.max_mass_loss.iter().flat_map(|l| options.keep_top.iter().map(move |k| (l, k)))
            {
                for &bonus in &options.bonus {
                    let router = CacheRouter::new(bonus, loss)?.with_keep_top(keep);
                    let (nats, figures) = measure(decoder, &orders, &decoding(Arc::new(router), policy, admission))?;
                    let enters = if admission == Admission::All { "" } else { " + admission" };
                    let name = format!("cache {bonus} within {loss}, keep {keep}, {policy}{enters}");
                    row(&name, &figures, paired(&nats, &reference), &plain);
                }
            }
        }
    }
    Ok(())
}
