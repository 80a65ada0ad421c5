//! Routers side by side on the same batches, with paired differences of perplexity and their noise; and `phase` on other
//! objectives than gate mass. What came out is in `benches/perplexity.md`.
//!
//! ```text
//! cargo run --release --example paired_perplexity                       # phase, expanded-drop, auction; per expert, 1.0
//! cargo run --release --example paired_perplexity -- --router phase,power:2 --devices 4 --batches mixed --seeds 0,1,2
//! ```
//!
//! `exact+` before a name lets the router select by gate score times the norm of the expert's output, `probe+` by a linear guess
//! of it; with a probe the first half of every text is what it is fitted on, and the second half is measured.
//!
//! Beside routers by name there are objectives, `NAME:NUMBER`: `phase` with what [`OBJECTIVES`] says an expert is worth to a
//! token in the place of its gate score. Combine weights stay the gate's own.
//!
//! A seed other than 0 shuffles the sequences of each text, so that others meet in a batch. A difference is taken sequence by
//! sequence, averaged over the seeds; its standard error is that of a mean over the sequences.
//!
//! Reads `models/tiny-moe`, which a checkout of the repository has and the published package has not.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Parser;
use phase_moe::eval::{Batching, EvalText, Mixing, Perplexity};
use phase_moe::layer::{OutputNorms, ProbeFit};
use phase_moe::{
    Assignment, Batch, CapacityRule, Decoder, LoadOptions, Logits, Model, PhaseRouter, RouteRequest, RouteState,
    Router, RouterKind, Scoring, Scratch,
};

/// Tokens of a sequence in [`Batching`].
const SEQUENCE_TOKENS: usize = 256;

#[derive(Parser)]
struct Options {
    /// Routers and objectives; the others are compared with the first
    #[arg(long, value_delimiter = ',', default_value = "phase,expanded-drop,auction")]
    router: Vec<String>,
    /// Room over demand
    #[arg(long, value_delimiter = ',', default_value = "1.0")]
    capacity_factor: Vec<f64>,
    /// Limits per device instead of per expert
    #[arg(long)]
    devices: Option<usize>,
    /// one-kind or mixed
    #[arg(long, default_value = "one-kind", value_parser = ["one-kind", "mixed"])]
    batches: String,
    /// Tokens per forward pass
    #[arg(long, default_value_t = 512)]
    batch_tokens: usize,
    /// Tokens of text [default: all]
    #[arg(long)]
    tokens: Option<usize>,
    /// Shuffles of the sequences; 0 keeps their order
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<u64>,
}

/// A token's gate scores and its own choice of experts, best first.
struct Token<'a> {
    gate: &'a [f32],
    chosen: &'a [usize],
}

impl Token<'_> {
    fn mass(&self) -> f32 {
        self.chosen.iter().map(|&expert| self.gate[expert]).sum()
    }

    /// Entropy of the gate scores over its largest possible value.
    fn entropy(&self) -> f32 {
        let terms = self.gate.iter().filter(|&&gate| gate > 0.0).map(|gate| -gate * gate.ln());
        terms.sum::<f32>() / (self.gate.len() as f32).ln()
    }

    fn wants(&self, expert: usize) -> bool {
        self.chosen.contains(&expert)
    }
}

/// What an expert is worth to a token, a number between 0 and 1.
type Worth = fn(&Token<'_>, expert: usize, number: f32) -> f32;

/// Name and worth. Where every slot is kept, a constant added to all worths changes nothing.
const OBJECTIVES: [(&str, Worth); 11] = [
    // Gate score to a power.
    ("power", |token, expert, number| token.gate[expert].powf(number)),
    // Share of the token's own top-k: every token counts alike.
    ("share", |token, expert, _| 0.9 * token.gate[expert] / token.mass()),
    // Gate score over the token's best.
    ("of-best", |token, expert, _| 0.9 * token.gate[expert] / token.gate[token.chosen[0]]),
    ("log", |token, expert, _| (token.gate[expert].ln() + 16.0) / 16.5),
    ("log-odds", |token, expert, _| ((token.gate[expert] / (1.0 - token.gate[expert])).ln() + 20.0) / 40.0),
    // Tokens weighted by a power of their source mass, or of their entropy.
    ("by-mass", |token, expert, number| 0.5 * token.gate[expert] * token.mass().powf(number)),
    ("by-entropy", |token, expert, number| 0.5 * token.gate[expert] * token.entropy().powf(number)),
    // Substitutes count less than the token's own experts; or as much against it, squared.
    ("own", |token, expert, number| token.gate[expert] * if token.wants(expert) { 1.0 } else { number }),
    ("own-squared", |token, expert, number| {
        let square = token.gate[expert] * token.gate[expert];
        0.05 + if token.wants(expert) { square } else { -number * square }
    }),
    // A bonus on the token's first choice.
    ("first", |token, expert, number| {
        0.4 * token.gate[expert] * if expert == token.chosen[0] { 1.0 + number } else { 1.0 }
    }),
    // Gate score; afterwards substitutes worth less than this many times the token's last own expert are dropped.
    ("drop", |token, expert, _| token.gate[expert]),
];

/// `phase` on an objective.
struct Objective {
    worth: Worth,
    number: f32,
    drops: bool,
    phase: PhaseRouter,
}

impl Router for Objective {
    fn name(&self) -> &'static str {
        "objective"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> phase_moe::Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let (tokens, experts) = (scores.tokens(), scores.experts());
        let mut logits = Vec::with_capacity(tokens * experts);
        let mut own = Vec::with_capacity(tokens);
        for token in 0..tokens {
            let gate = scores.gate(token);
            let mut chosen: Vec<usize> = (0..experts).collect();
            chosen.sort_by(|&a, &b| gate[b].total_cmp(&gate[a]));
            chosen.truncate(top_k);
            let token = Token { gate, chosen: &chosen };
            // Logits whose sigmoid is the worth.
            logits.extend((0..experts).map(|expert| {
                let worth = f64::from((self.worth)(&token, expert, self.number)).clamp(1e-7, 1.0 - 1e-6);
                (worth / (1.0 - worth)).ln() as f32
            }));
            own.push(chosen);
        }
        let worths = Scoring::sigmoid().scores(&Logits::new(&logits, tokens, experts)?, None)?;
        let by_worth = RouteRequest::new(&worths, top_k, request.capacity(), request.context())?;
        self.phase.route_into(&by_worth, state, scratch, assignment)?;

        let mut ids: Vec<i32> = assignment.ids().collect();
        for (token, ids) in ids.chunks_exact_mut(top_k).enumerate().filter(|_| self.drops) {
            let (gate, own) = (scores.gate(token), &own[token]);
            let least = self.number * gate[own[top_k - 1]];
            let substitutes = ids.iter_mut().filter(|id| **id >= 0 && !own.contains(&(**id as usize)));
            substitutes.filter(|id| gate[**id as usize] < least).for_each(|id| *id = -1);
        }
        let weight = |(slot, &id): (usize, &i32)| usize::try_from(id).map_or(0.0, |id| scores.gate(slot / top_k)[id]);
        let weights: Vec<f32> = ids.iter().enumerate().map(weight).collect();
        *assignment = Assignment::from_parts(experts, top_k, &ids, &weights)?;
        Ok(())
    }
}

fn router(name: &str) -> Result<Arc<dyn Router>> {
    let Some((objective, number)) = name.split_once(':') else {
        return Ok(Arc::from(name.parse::<RouterKind>()?.build(42)));
    };
    let number: f32 = number.parse().with_context(|| format!("{name}: expected a number after the colon"))?;
    let Some((_, worth)) = OBJECTIVES.into_iter().find(|(known, _)| *known == objective) else {
        bail!("{name}: expected one of {}", OBJECTIVES.map(|(known, _)| known).join(", "));
    };
    Ok(Arc::new(Objective { worth, number, drops: objective == "drop", phase: PhaseRouter::new(1e-4, 32)? }))
}

/// Nats of a sequence, one entry a seed, by its tokens.
type Nats = HashMap<Vec<u32>, Vec<f64>>;

/// Adds the nats of every sequence of `batches`; returns the mean share of gate mass kept.
fn measure(decoder: &Decoder, batches: &[Batch], nats: &mut Nats) -> Result<f64> {
    let mut state = decoder.batch_state().keeping_routed();
    let (mut kept, mut count) = (0.0, 0.0);
    for batch in batches {
        let logits = decoder.forward(batch, &mut state)?;
        for routed in state.routed() {
            kept += routed.metrics()?.gate_mass_share();
            count += 1.0;
        }
        for (row, ids) in batch.ids().chunks_exact(batch.positions()).enumerate() {
            let first = row * batch.positions();
            let live = (0..ids.len()).filter(|at| batch.padding().is_none_or(|padding| !padding[first + at])).count();
            let mut perplexity = Perplexity::default();
            perplexity.add(&logits.narrow(0, row, 1)?.narrow(1, 0, live)?, &Batch::new(&[&ids[..live]])?)?;
            let sum = perplexity.value()?.ln() * (live - 1) as f64;
            nats.entry(ids[..live].to_vec()).or_default().push(sum);
        }
    }
    Ok(kept / count)
}

/// Mean of `nats − other` a token and its standard error over the sequences.
fn paired(nats: &Nats, other: impl Fn(&[u32], usize) -> f64) -> (f64, f64) {
    let off: Vec<(f64, f64)> = nats
        .iter()
        .map(|(ids, nats)| {
            let sum: f64 = nats.iter().enumerate().map(|(seed, nats)| nats - other(ids, seed)).sum();
            (sum / nats.len() as f64, (ids.len() - 1) as f64)
        })
        .collect();
    let tokens: f64 = off.iter().map(|(_, tokens)| tokens).sum();
    let mean = off.iter().map(|(off, _)| off).sum::<f64>() / tokens;
    let square: f64 = off.iter().map(|(off, tokens)| (off - mean * tokens).powi(2)).sum();
    let count = off.len() as f64;
    (mean, (square * count / (count - 1.0)).sqrt() / tokens)
}

/// One probe a layer, fitted on what the layers see in `batches`.
fn probes(decoder: &Decoder, batches: &[Batch]) -> Result<Vec<Arc<OutputNorms>>> {
    let moe = &decoder.spec().moe;
    let mut fits: Vec<_> = decoder.moe_layers().map(|_| ProbeFit::new(moe.hidden, moe.experts)).collect();
    let layers: Vec<_> = decoder.moe_layers().collect();
    for batch in batches {
        let mut state = decoder.batch_state().keeping_routed();
        decoder.forward(batch, &mut state)?;
        for ((fit, layer), routed) in fits.iter_mut().zip(&layers).zip(state.routed()) {
            fit.add(&routed.input, layer.experts())?;
        }
    }
    Ok(fits.into_iter().map(|fit| Arc::new(OutputNorms::from(fit))).collect())
}

/// The first or the second half of every text, cut between sequences.
fn half(texts: &[EvalText], second: bool) -> Vec<EvalText> {
    let cut = |text: &EvalText| {
        let (before, after) = text.ids.split_at(text.ids.len() / (2 * SEQUENCE_TOKENS) * SEQUENCE_TOKENS);
        EvalText { name: text.name.clone(), ids: if second { after } else { before }.to_vec() }
    };
    texts.iter().map(cut).collect()
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
    let mixing = if options.batches == "mixed" { Mixing::Mixed } else { Mixing::OneKind };
    let batching = |seed: u64| {
        let shuffle = (seed != 0).then_some(seed);
        Batching { tokens: options.tokens, batch_tokens: options.batch_tokens, mixing, shuffle }
    };
    let mut decoder = model.decoder().clone();
    let mut guesses = Vec::new();
    if options.router.iter().any(|name| name.starts_with("probe+")) {
        guesses = probes(&decoder, &batching(0).batches(&[], &half(&texts, false))?)?;
        texts = half(&texts, true);
    }
    let batches: Vec<Vec<Batch>> =
        options.seeds.iter().map(|&seed| Ok(batching(seed).batches(&[], &texts)?)).collect::<Result<_>>()?;
    let exact: Vec<_> = decoder.moe_layers().map(|_| Arc::new(OutputNorms::Exact)).collect();
    let routers = options.router.iter().map(|name| match name.split_once('+') {
        Some(("exact", name)) => Ok((router(name)?, exact.clone())),
        Some(("probe", name)) => Ok((router(name)?, guesses.clone())),
        _ => Ok((router(name)?, Vec::new())),
    });
    let routers: Vec<_> = routers.collect::<Result<_>>()?;

    let mut dropless = Nats::new();
    measure(&decoder, batches.first().context("no seeds")?, &mut dropless)?;
    for &factor in &options.capacity_factor {
        let rule = options.devices.map_or(CapacityRule::per_expert(factor), |n| CapacityRule::per_device(factor, n));
        let pools = options.devices.map_or("expert".into(), |devices| format!("{devices} devices"));
        println!(
            "\nper {pools}, capacity factor {factor}, {} batches of {} tokens, seeds {:?}",
            options.batches, options.batch_tokens, options.seeds
        );
        println!("{:>16}  perplexity over dropless   gate mass   over {}, %", "router", options.router[0]);
        let mut reference: Option<Nats> = None;
        for (name, (router, norms)) in options.router.iter().zip(&routers) {
            decoder.set_router(router.clone());
            decoder.set_capacity(Some(rule.clone()));
            for (layer, moe) in decoder.moe_layers_mut().enumerate() {
                moe.set_output_norms(norms.get(layer).cloned());
            }
            let (mut nats, mut kept) = (Nats::new(), 0.0);
            for batches in &batches {
                kept += measure(&decoder, batches, &mut nats)?;
            }
            let (mean, error) = paired(&nats, |ids, _| dropless[ids][0]);
            let share = 100.0 * kept / batches.len() as f64;
            print!("{name:>16}  {:+9.2} % ± {:.2} {share:>16.2} %", 100.0 * mean.exp_m1(), 100.0 * error * mean.exp());
            match &reference {
                None => reference = Some(nats),
                Some(reference) => {
                    let (mean, error) = paired(&nats, |ids, seed| reference[ids][seed]);
                    print!("   {:+.3} ± {:.3}", 100.0 * mean.exp_m1(), 100.0 * error * mean.exp());
                }
            }
            println!();
        }
    }
    Ok(())
}
