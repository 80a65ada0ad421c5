//! The result of `replay`: what a router asked of the expert cache, beside those that see no cache, with the same policy.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use phase_moe::eval::ReplayFigures;

/// The whole result; as JSON it is the router's alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplayReport {
    /// What was replayed, in words.
    #[serde(skip)]
    pub source: String,
    /// Name of the router.
    #[serde(skip)]
    pub router: &'static str,
    /// Name of the eviction policy.
    pub policy: String,
    /// Name of what lets experts in.
    #[serde(skip)]
    pub admission: String,
    /// Experts of a layer that fit.
    pub cached_experts: usize,
    /// Bonus of a resident expert, in score ranges; `None` for a router that is not memory-aware.
    pub cache_bonus: Option<f64>,
    /// Largest share of a token's gate mass that swaps may cost; `None` for a router that is not memory-aware.
    pub max_mass_loss: Option<f64>,
    /// What the router did.
    #[serde(flatten)]
    pub figures: ReplayFigures,
    /// Misses times the bytes of an expert; `None` where those are not known.
    pub bytes_read: Option<u64>,
    /// Routers that see no cache, by name, under the same policy and with every miss admitted; the last is what the router's saving is measured against.
    #[serde(skip)]
    pub beside: Vec<(&'static str, ReplayFigures)>,
    /// Bytes of an expert, where they are known.
    #[serde(skip)]
    pub bytes_per_expert: Option<u64>,
}

impl Display for ReplayReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.source)?;
        let (cached, policy, admission) = (self.cached_experts, &self.policy, &self.admission);
        writeln!(f, "{cached} experts a layer in fast memory, policy {policy}, admission {admission}")?;
        if let (Some(bonus), Some(loss)) = (self.cache_bonus, self.max_mass_loss) {
            let now = self.figures.bonus.map_or(String::new(), |now| format!(" at the start, {now:.3} at the end"));
            writeln!(f, "bonus {bonus:?} score ranges{now}, at most {} of a token's gate mass", percent(Some(loss)))?;
        }
        writeln!(
            f,
            "\n  {:<12}{:>10}{:>10}{:>10}{:>10}{:>11}{:>11}{:>10}{:>12}",
            "router", "requests", "misses", "hit rate", "Belady", "gate mass", "agreement", "saved", "read"
        )?;
        for (router, figures) in &self.beside {
            self.row(f, router, figures, None)?;
        }
        let against = self.beside.last().map(|(_, figures)| figures.misses).filter(|&misses| misses > 0);
        let saved = against.map(|misses| 1.0 - self.figures.misses as f64 / misses as f64);
        self.row(f, self.router, &self.figures, saved)
    }
}

impl ReplayReport {
    fn row(&self, f: &mut Formatter<'_>, router: &str, figures: &ReplayFigures, saved: Option<f64>) -> fmt::Result {
        let read = self.bytes_per_expert.map(|bytes| bytes.saturating_mul(figures.misses));
        writeln!(
            f,
            "  {router:<12}{:>10}{:>10}{:>10}{:>10}{:>11}{:>11}{:>10}{:>12}",
            figures.requests,
            figures.misses,
            percent(figures.hit_rate),
            percent(figures.belady_hit_rate),
            percent(figures.gate_mass_kept),
            percent(figures.agreement),
            percent(saved),
            read.map_or("–".into(), |bytes| format!("{:.1} MB", bytes as f64 / 1e6))
        )
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".into(), |share| format!("{:.2} %", 100.0 * share))
}
