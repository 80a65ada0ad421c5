//! The result of `tune`: every setting with what it came to, the front of those that nothing beats, and the one to take.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use phase_moe::eval::TuneRow;

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuneReport {
    /// What was swept, in words.
    #[serde(skip)]
    pub source: String,
    /// Perplexity of the model as it is.
    #[serde(skip)]
    pub plain_perplexity: f64,
    /// All settings.
    pub rows: Vec<TuneRow>,
    /// The one to take; `None` where none is good enough.
    pub recommended: Option<TuneRow>,
}

impl Display for TuneReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; perplexity {:.3} as it is", self.source, self.plain_perplexity)?;
        writeln!(f, "* nothing with as few experts in memory beats it in tokens/s, hit rate and perplexity\n")?;
        write!(
            f,
            "  {:>5}{:>7}{:>8}{:>10}{:>10}{:>12}{:>10}{:>10}{:>11}{:>12}",
            "top-k",
            "bonus",
            "cached",
            "hit rate",
            "Belady",
            "perplexity",
            "change",
            "gate mass",
            "tokens/s",
            "read/token"
        )?;
        match self.rows.iter().any(|row| row.expert_cache_bytes.is_some()) {
            true => writeln!(f, "{:>12}", "budget")?,
            false => writeln!(f)?,
        }
        for row in &self.rows {
            self.row(f, if row.pareto { "*" } else { " " }, row)?;
        }
        match &self.recommended {
            None => writeln!(f, "\nnone is within the perplexity allowed: raise --max-perplexity-increase"),
            Some(row) => {
                writeln!(f, "\ntake")?;
                self.row(f, " ", row)
            }
        }
    }
}

impl TuneReport {
    fn row(&self, f: &mut Formatter<'_>, mark: &str, row: &TuneRow) -> fmt::Result {
        let percent = |share: Option<f64>| share.map_or("–".into(), |share| format!("{:.1} %", 100.0 * share));
        write!(
            f,
            "{mark} {:>5}{:>7}{:>8}{:>10}{:>10}{:>12.3}{:>10}{:>10}{:>11.0}{:>12}",
            row.top_k,
            row.cache_bonus,
            row.cached_experts,
            percent(row.hit_rate),
            percent(row.belady_hit_rate),
            row.perplexity,
            format!("{:+.2} %", 100.0 * (row.perplexity / self.plain_perplexity - 1.0)),
            percent(row.gate_mass_kept),
            row.tokens_per_second,
            format!("{:.1} KB", row.bytes_read_per_token / 1e3)
        )?;
        match row.expert_cache_bytes {
            Some(bytes) => writeln!(f, "{:>12}", format!("{:.1} MB", bytes as f64 / 1e6)),
            None => writeln!(f),
        }
    }
}
