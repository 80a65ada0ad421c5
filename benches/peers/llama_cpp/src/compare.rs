//! Both programs beside each other.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cells::STEADY;

/// Shape, dtype, what, depth, tokens.
type Key = (String, String, String, u64, u64);

/// Tokens a second by cell, of documents of one program: their median. Cells whose repetitions differ too much are left out.
fn cells(files: &[impl AsRef<Path>]) -> Result<BTreeMap<Key, f64>> {
    let mut rates = BTreeMap::<Key, Vec<f64>>::new();
    for file in files {
        let file = file.as_ref();
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let document: Value = serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
        for cell in document["cells"].as_array().context("cells: expected a list, got none")? {
            let text = |name: &str| cell[name].as_str().map(str::to_owned).with_context(|| format!("a cell's {name}"));
            let count = |name: &str| cell[name].as_u64().with_context(|| format!("a cell's {name}"));
            let key = (text("shape")?, text("dtype")?, text("what")?, count("depth")?, count("tokens")?);
            let rates = rates.entry(key).or_default();
            if cell["spread"].as_f64().is_some_and(|spread| spread <= STEADY) {
                rates.push(cell["tokens_per_second"].as_f64().context("a cell's tokens_per_second")?);
            }
        }
    }
    Ok(rates.into_iter().filter_map(|(key, rates)| Some((key, median(rates)?))).collect())
}

/// The middle of all, or between the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { (values[middle - 1] + upper) / 2.0 })
}

/// Prints both columns, ratios and their median.
///
/// # Errors
/// Documents that cannot be read.
pub fn tables(ours: &[impl AsRef<Path>], theirs: &[impl AsRef<Path>]) -> Result<()> {
    let (ours, theirs) = (cells(ours)?, cells(theirs)?);
    println!(
        "| shape | type | what | depth | tokens | phase-moe | llama.cpp | ratio |\n|---|---|---|---|---|---|---|---|"
    );
    let mut ratios = Vec::new();
    for (key, their) in &theirs {
        let Some(our) = ours.get(key) else { continue };
        let (shape, dtype, what, depth, tokens) = key;
        println!("| {shape} | {dtype} | {what} | {depth} | {tokens} | {our:.2} | {their:.2} | {:.2} |", our / their);
        ratios.push(our / their);
    }
    let (cells, ahead) = (ratios.len(), ratios.iter().filter(|&&ratio| ratio >= 1.0).count());
    let median = median(ratios).context("expected a cell that both have and that is steady, got none")?;
    println!("\nmedian ratio {median:.2}; ahead in {ahead} of {cells} cells");
    Ok(())
}

/// Mean Kullback-Leibler divergence of these logits from those, and how often both have the same token highest.
///
/// # Errors
/// Lists of different lengths.
pub fn divergence(theirs: &[f32], ours: &[f32], vocab: usize) -> Result<(f64, f64)> {
    ensure!(theirs.len() == ours.len(), "logits: expected {}, got {}", theirs.len(), ours.len());
    let (mut sum, mut same, rows) = (0.0, 0, theirs.len() / vocab);
    for (theirs, ours) in theirs.chunks(vocab).zip(ours.chunks(vocab)) {
        let (p, q) = (log_softmax(theirs), log_softmax(ours));
        sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let highest = |row: &[f64]| (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        same += usize::from(highest(&p) == highest(&q));
    }
    Ok((sum / rows as f64, same as f64 / rows as f64))
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let total = logits.iter().map(|&logit| (logit as f64 - most).exp()).sum::<f64>().ln() + most;
    logits.iter().map(|&logit| logit as f64 - total).collect()
}
