//! Perplexity is the judge: routers side by side over the same batches, with paired differences and their noise, and
//! variants of what `phase` maximises.
//!
//! ```text
//! cargo run --release --example objectives -- ROUTERS [seeds=0,1,2] [factors=1.0] [devices=4] [batches=mixed] [batch-tokens=512]
//! ```
//!
//! The first router is the one the others are compared with. Beside the names of the command line, `OBJECTIVE[:NUMBER]`
//! routes by `phase` with other selection scores (see `Objective`); combine weights are the gate's own as always.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use phase_moe::decoder::model::{LoadOptions, Model};
use phase_moe::decoder::{Batch, Decoder};
use phase_moe::error::{Error, Result};
use phase_moe::eval::text::{Batching, EvalText, Mixing};
use phase_moe::routing::assignment::Assignment;
use phase_moe::routing::capacity::CapacityRule;
use phase_moe::routing::logits::Logits;
use phase_moe::routing::phase::PhaseRouter;
use phase_moe::routing::registry::RouterKind;
use phase_moe::routing::router::{RouteRequest, RouteState, Router, Scratch};
use phase_moe::routing::scores::Scoring;
use rayon::prelude::*;

/// `phase` on other scores than the gate's.
struct Objective {
    name: String,
    number: f32,
    phase: PhaseRouter,
}

impl Objective {
    /// What the experts are worth to one token, in (0, 1); `best` are its experts by falling gate score.
    fn values(&self, gate: &[f32], best: &[usize], top_k: usize, batch: &Shared, values: &mut [f32]) {
        let x = self.number;
        let mass: f32 = best[..top_k].iter().map(|&e| gate[e]).sum();
        let entropy: f32 = -gate.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f32>();
        let wanted = |e: usize| best[..top_k].contains(&e);
        let (first, last) = (gate[best[0]], gate[best[top_k - 1]]);
        for (e, value) in values.iter_mut().enumerate() {
            let p = gate[e];
            *value = match self.name.as_str() {
                "mass" => p,
                "power" => p.powf(x),
                "share" => p / mass * 0.9,
                "relmax" => p / first * 0.9,
                "log" => (p.ln() + 16.0) / 16.5,
                "logodds" => ((p / (1.0 - p)).ln() + 20.0) / 40.0,
                "bymass" => p * mass.powf(x),
                "byentropy" => p * (entropy / 3.5).powf(x) * 0.5,
                "wanted" => if wanted(e) { p } else { x * p },
                "first" => if e == best[0] { (p * (1.0 + x)) * 0.4 } else { p * 0.4 },
                "quad" => if wanted(e) { p * p + 0.05 } else { 0.05 - x * p * p },
                "overlast" => p / last.max(1e-6) * 0.01,
                "like" => {
                    let like = best[..top_k].iter().map(|&t| gate[t] * batch.alike[t * gate.len() + e]).sum::<f32>();
                    if wanted(e) { p * 0.5 } else { 0.5 * (p + x * like) }
                }
                "drop" | "droplow" => p,
                other => panic!("unknown objective {other}"),
            };
        }
    }
}

/// Of the whole batch.
struct Shared {
    /// Correlation of the experts' scores, negative ones 0, `[experts, experts]`.
    alike: Vec<f32>,
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
    ) -> Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let (tokens, experts) = (scores.tokens(), scores.experts());
        let shared = Shared { alike: if self.name == "like" { alike(request) } else { Vec::new() } };
        let mut values = vec![0f32; tokens * experts];
        let mut best: Vec<usize> = Vec::new();
        let mut chosen_by_gate = Vec::with_capacity(tokens);
        for (token, values) in values.chunks_exact_mut(experts).enumerate() {
            let gate = scores.gate(token);
            best.clear();
            best.extend(0..experts);
            best.sort_by(|&a, &b| gate[b].total_cmp(&gate[a]));
            self.values(gate, &best, top_k, &shared, values);
            values.iter_mut().for_each(|value| {
                let p = f64::from(value.clamp(1e-7, 1.0 - 1e-6));
                *value = (p / (1.0 - p)).ln() as f32;
            });
            chosen_by_gate.push(best[..top_k].to_vec());
        }
        let other = Scoring::sigmoid().scores(&Logits::new(&values, tokens, experts)?, None)?;
        let request_of = RouteRequest::new(&other, top_k, request.capacity(), request.context())?;
        self.phase.route_into(&request_of, state, scratch, assignment)?;
        let mut ids: Vec<i32> = assignment.ids().collect();
        if self.name.starts_with("drop") {
            for (token, ids) in ids.chunks_exact_mut(top_k).enumerate() {
                let (gate, wanted) = (scores.gate(token), &chosen_by_gate[token]);
                let bar = if self.name == "droplow" { gate[wanted[0]] } else { gate[wanted[top_k - 1]] };
                for id in ids.iter_mut().filter(|id| **id >= 0 && !wanted.contains(&(**id as usize))) {
                    if gate[*id as usize] < self.number * bar {
                        *id = -1;
                    }
                }
            }
        }
        let weight = |(slot, &id): (usize, &i32)| if id < 0 { 0.0 } else { scores.gate(slot / top_k)[id as usize] };
        let weights: Vec<f32> = ids.iter().enumerate().map(weight).collect();
        *assignment = Assignment::from_parts(experts, top_k, &ids, &weights)?;
        Ok(())
    }
}

fn alike(request: &RouteRequest<'_>) -> Vec<f32> {
    let (scores, experts) = (request.scores(), request.scores().experts());
    let rows: Vec<usize> = (0..scores.tokens()).filter(|&token| !request.is_padding(token)).collect();
    let count = rows.len() as f32;
    let mut mean = vec![0f32; experts];
    rows.iter().for_each(|&row| mean.iter_mut().zip(scores.gate(row)).for_each(|(m, p)| *m += p / count));
    let mut cov = vec![0f32; experts * experts];
    for &row in &rows {
        let off: Vec<f32> = scores.gate(row).iter().zip(&mean).map(|(p, m)| p - m).collect();
        for (a, line) in cov.chunks_exact_mut(experts).enumerate() {
            line.iter_mut().zip(&off).for_each(|(c, b)| *c += off[a] * b);
        }
    }
    let var: Vec<f32> = (0..experts).map(|e| cov[e * experts + e].max(1e-12).sqrt()).collect();
    for (at, c) in cov.iter_mut().enumerate() {
        *c = (*c / var[at / experts] / var[at % experts]).max(0.0);
    }
    cov
}

fn router(name: &str) -> Result<Arc<dyn Router>> {
    if let Ok(kind) = name.parse::<RouterKind>() {
        return Ok(Arc::from(kind.build(42)));
    }
    let (name, number) = name.split_once(':').unwrap_or((name, "1"));
    let number: f32 = number.parse().map_err(|_| Error::parameter("number", number, "a number"))?;
    if name == "gap" {
        return Ok(Arc::new(PhaseRouter::new(f64::from(number), 64)?));
    }
    Ok(Arc::new(Objective { name: name.into(), number, phase: PhaseRouter::new(1e-4, 32)? }))
}

/// Nats and scored tokens of each sequence, by its content.
type Losses = HashMap<Vec<u32>, (f64, f64)>;

fn losses(decoder: &Decoder, batches: &[Batch], losses: &mut Vec<(Vec<u32>, f64, f64)>) -> Result<(f64, f64)> {
    let mut state = decoder.batch_state();
    let (mut kept, mut wanted) = (0.0, 0.0);
    for batch in batches {
        let logits = decoder.forward(batch, &mut state, |layer, routing| {
            let metrics = routing.metrics(batch.context(layer))?;
            kept += metrics.gate_mass_share();
            wanted += 1.0;
            Ok(())
        })?;
        let vocab = logits.dims3()?.2;
        let values: Tensor = logits.to_dtype(DType::F32)?.flatten_all()?;
        let values = values.to_vec1::<f32>()?;
        let positions = batch.positions();
        let rows: Vec<_> = batch
            .ids()
            .par_chunks_exact(positions)
            .zip(values.par_chunks_exact(positions * vocab))
            .enumerate()
            .map(|(row, (ids, values))| {
                let live = batch.padding().map_or(positions, |padding| {
                    padding[row * positions..][..positions].iter().filter(|pad| !**pad).count()
                });
                let nats: f64 = (1..live)
                    .map(|at| {
                        let line = &values[(at - 1) * vocab..at * vocab];
                        let max = line.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        let sum: f32 = line.iter().map(|&logit| (logit - max).exp()).sum();
                        f64::from(max) + f64::from(sum).ln() - f64::from(line[ids[at] as usize])
                    })
                    .sum();
                (ids[..live].to_vec(), nats, (live - 1) as f64)
            })
            .collect();
        losses.extend(rows);
    }
    Ok((kept, wanted))
}

fn main() -> Result<()> {
    let mut routers = vec!["phase".to_string()];
    let mut options: HashMap<String, String> = HashMap::new();
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some((key, value)) => drop(options.insert(key.into(), value.into())),
            None => routers = argument.split(',').map(String::from).collect(),
        }
    }
    let option = |key: &str, default: &str| options.get(key).cloned().unwrap_or(default.into());
    let list = |text: String| text.split(',').map(|part| part.parse::<f64>().unwrap()).collect::<Vec<_>>();
    let seeds = list(option("seeds", "0"));
    let factors = list(option("factors", "1.0"));
    let devices: usize = option("devices", "0").parse().unwrap();
    let batch_tokens: usize = option("batch-tokens", "512").parse().unwrap();
    let tokens = options.get("tokens").map(|tokens| tokens.parse().unwrap());
    let mixing = if option("batches", "one-kind") == "mixed" { Mixing::Mixed } else { Mixing::OneKind };

    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let model = Model::load(&directory, &LoadOptions::default())?;
    let mut texts = Vec::new();
    for name in ["scripture", "code", "reference"] {
        let path = directory.join("eval").join(name).with_extension("txt");
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(path, error))?;
        texts.push(EvalText { name: name.into(), ids: model.encode(&text)? });
    }
    let batching = |seed: f64| Batching { batch_tokens, mixing, tokens, shuffle: (seed > 0.0).then_some(seed as u64) };
    let batches = seeds.iter().map(|&seed| batching(seed).batches(&texts)).collect::<Result<Vec<_>>>()?;

    let mut decoder = model.decoder().clone();
    let mut plain = Vec::new();
    losses(&decoder, &batches[0], &mut plain)?;
    let dropless: Losses = plain.into_iter().map(|(ids, nats, count)| (ids, (nats, count))).collect();
    let count: f64 = dropless.values().map(|(_, count)| count).sum();
    let base: f64 = dropless.values().map(|(nats, _)| nats).sum::<f64>() / count;
    println!("dropless {:.3}; {} sequences, {batch_tokens} a batch, {mixing:?}, seeds {seeds:?}", base.exp(), dropless.len());
    for &factor in &factors {
        let rule = if devices > 0 { CapacityRule::per_device(factor, devices) } else { CapacityRule::per_expert(factor) };
        println!("factor {factor} per {}", if devices > 0 { format!("{devices} devices") } else { "expert".into() });
        let mut reference: Option<HashMap<Vec<u32>, Vec<f64>>> = None;
        for name in &routers {
            decoder.set_router(router(name)?, Some(rule.clone()));
            let mut all: HashMap<Vec<u32>, Vec<f64>> = HashMap::new();
            let (mut kept, mut wanted) = (0.0, 0.0);
            let mut by_seed = Vec::new();
            let started = std::time::Instant::now();
            for batches in &batches {
                let mut made = Vec::new();
                let (k, w) = losses(&decoder, batches, &mut made)?;
                (kept, wanted) = (kept + k, wanted + w);
                let nats: f64 = made.iter().map(|(_, nats, _)| nats).sum();
                by_seed.push(nats / count);
                made.into_iter().for_each(|(ids, nats, _)| all.entry(ids).or_default().push(nats));
            }
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            let increase = (mean(&by_seed) - base).exp_m1();
            // Paired: per sequence, mean over seeds, against the reference (or dropless for the reference itself).
            let mut against = |other: &dyn Fn(&Vec<u32>, usize) -> f64| {
                let off: Vec<(f64, f64)> = all
                    .iter()
                    .map(|(ids, nats)| {
                        let off = nats.iter().enumerate().map(|(seed, nats)| nats - other(ids, seed)).sum::<f64>();
                        (off / nats.len() as f64, dropless[ids].1)
                    })
                    .collect();
                let rate = off.iter().map(|(off, _)| off).sum::<f64>() / count;
                let n = off.len() as f64;
                let spread: f64 = off.iter().map(|(off, tokens)| (off - rate * tokens).powi(2)).sum();
                (100.0 * rate, 100.0 * (spread * n / (n - 1.0)).sqrt() / count)
            };
            let (_, noise) = against(&|ids, _| dropless[ids].0);
            let (off, off_noise) = match &reference {
                Some(reference) => against(&|ids, seed| reference[ids][seed]),
                None => (0.0, 0.0),
            };
            let seeds: Vec<String> = by_seed.iter().map(|nats| format!("{:+.2}", 100.0 * (nats - base).exp_m1())).collect();
            println!(
                "  {name:16} {:+8.2} % ± {noise:.2}   vs first {off:+7.3} ± {off_noise:.3}  z {:+5.1}  mass {:.2} %  seeds {}  {:.1} s",
                100.0 * increase,
                if off_noise > 0.0 { off / off_noise } else { 0.0 },
                100.0 * kept / wanted,
                seeds.join(" "),
                started.elapsed().as_secs_f64() / batches.len() as f64
            );
            if reference.is_none() {
                reference = Some(all);
            }
        }
    }
    Ok(())
}
