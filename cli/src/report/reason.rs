//! Why `tune` says to take a setting: one sentence of figures against plain top-k, what decided, and the command.

use crate::choice::{Choice, Criterion, Judge, misses};
use phase_moe::eval::TuneRow;

/// A memory as it was asked for.
pub struct Memory {
    /// The option.
    pub option: &'static str,
    /// Its value, in the words that were typed.
    pub given: String,
}

/// What was measured.
pub struct Swept {
    /// What was swept, in words.
    pub source: String,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts per token of the model as it is.
    pub plain_top_k: usize,
    /// Tokens of the text.
    pub tokens: u64,
    /// Runs of each setting for the clock.
    pub runs: usize,
    /// The memories.
    pub memories: Vec<Memory>,
    /// Their rows, as many of each.
    pub rows: Vec<TuneRow>,
}

/// What reasons are made of.
pub struct Reasons<'a> {
    /// What was measured.
    pub swept: &'a Swept,
    /// What leads what.
    pub judge: &'a Judge,
    /// The tolerance.
    pub most: f64,
}

impl Reasons<'_> {
    /// Why this row, which is to be compared with `base`.
    pub fn of(&self, choice: &Choice, memory: &Memory, base: Option<&TuneRow>) -> String {
        let row = &self.swept.rows[choice.row];
        let experts = kept(row, self.swept.experts);
        let room = match row.expert_cache_bytes {
            Some(_) => format!("in {}, {experts} a layer", memory.given),
            None => format!("with {experts}"),
        };
        let hits = row.hit_rate.map_or(String::new(), |hits| format!("{:.0} % hits, ", 100.0 * hits));
        let figures = match base.filter(|_| !row.baseline) {
            None => "the model as it is".into(),
            Some(base) => format!("{} perplexity, {}", percents(row), self.against(row, base)),
        };
        format!("{} {room}: {hits}{figures}; {}", self.setting(row), self.why(choice))
    }

    /// Why none.
    pub fn none(&self, settings: usize) -> String {
        format!(
            "none of {settings} settings is within {} perplexity: raise --max-perplexity-increase",
            tolerance(self.most)
        )
    }

    fn setting(&self, row: &TuneRow) -> String {
        let top_k = if row.top_k == self.swept.plain_top_k { String::new() } else { format!("top {}, ", row.top_k) };
        match row.cache_bonus > 0.0 {
            true => format!("{top_k}bonus {}", row.cache_bonus),
            false if top_k.is_empty() => "plain top-k".into(),
            false => format!("{top_k}no bonus"),
        }
    }

    /// Speed and misses as multiples of plain top-k's on the same memory.
    fn against(&self, row: &TuneRow, base: &TuneRow) -> String {
        let speed = Criterion::TokensPerSecond;
        let differs = self.judge.leads(speed, row, base) || self.judge.leads(speed, base, row);
        let rate = match (differs, row.expert_cache_bytes.is_some()) {
            (true, _) => format!("{} the tokens/s", times(row.tokens_per_second / base.tokens_per_second)),
            (false, true) => "as many tokens/s, within the spread,".into(),
            // With all experts in memory that says nothing.
            (false, false) => String::new(),
        };
        let fewer = Some(misses(row) / misses(base)).filter(|ratio| ratio.is_finite());
        let fewer = fewer.map(|ratio| format!("{} the misses", times(ratio)));
        let said: Vec<String> = [rate].into_iter().filter(|rate| !rate.is_empty()).chain(fewer).collect();
        format!("{} of top-k", said.join(" and "))
    }

    fn why(&self, choice: &Choice) -> String {
        let Choice { of, decided, equal_in, .. } = choice;
        let within = format!("within {} perplexity", tolerance(self.most));
        let equal: Vec<String> = equal_in.iter().map(|by| by.equal()).collect();
        match decided {
            _ if *of == 1 => format!("the only setting {within}"),
            Some((by, before)) if before == of => format!("the {} of {of} settings {within}", by.best()),
            Some((by, before)) => format!(
                "the {} of the {before} that have {}, of {of} settings {within}",
                by.best(),
                equal.join(" and ")
            ),
            None => format!("led by none of {of} settings {within} in anything, beyond the noise"),
        }
    }
}

/// How many experts of a layer are in memory.
pub fn kept(row: &TuneRow, experts: usize) -> String {
    let (least, most) = (row.cached_experts, row.cached_experts_by_layer.iter().copied().max().unwrap_or(0));
    match least == most {
        true => format!("{least} of {experts} experts"),
        false => format!("{least} to {most} of {experts} experts"),
    }
}

/// The change of perplexity with its error, in percent.
pub fn percents(row: &TuneRow) -> String {
    let change = 100.0 * row.perplexity_increase;
    match row.perplexity_error {
        Some(error) if error > 0.0 => format!("{change:+.2} ± {:.2} %", 100.0 * error),
        _ => format!("{change:+.2} %"),
    }
}

/// What to beware of: a text too short for the tolerance, where that may have decided about a row.
pub fn warning(rows: &[TuneRow], most: f64, tokens: u64) -> Option<String> {
    let swaps = || rows.iter().filter(|row| !row.baseline);
    if swaps().any(|row| row.perplexity_error.is_none()) {
        let message = "the text is a single sequence: nothing says how sure its perplexities are; give more text";
        return Some(message.into());
    }
    // No text is long enough for no increase at all.
    let close = |row: &TuneRow, error: f64| (row.perplexity_increase - most).abs() <= 2.0 * error;
    let errors = swaps().filter_map(|row| row.perplexity_error.filter(|&error| close(row, error)));
    let error = errors.fold(0.0, f64::max);
    (most > 0.0 && error > most && error.is_finite()).then(|| {
        let needed = tokens as f64 * (2.0 * error / most).powi(2);
        let step = 10f64.powf(needed.log10().floor() - 1.0);
        format!(
            "the text is too short for {}: the standard error of a perplexity is {:.2} %; about {:.0} tokens would bring it to \
             half the tolerance",
            tolerance(most),
            100.0 * error,
            (needed / step).ceil() * step
        )
    })
}

fn tolerance(most: f64) -> String {
    let digits = format!("{:+.3}", 100.0 * most);
    format!("{} %", digits.trim_end_matches('0').trim_end_matches('.'))
}

fn times(ratio: f64) -> String {
    if ratio < 10.0 { format!("{ratio:.2} ×") } else { format!("{ratio:.0} ×") }
}
