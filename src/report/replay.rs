//! The result of `replay`: what a router asked of the expert cache, beside plain top-k with the same policy.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use crate::eval::replay::ReplayFigures;

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
    pub policy: &'static str,
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
    /// Plain top-k under the same policy; `None` where that is what was replayed.
    #[serde(skip)]
    pub plain: Option<ReplayFigures>,
    /// Bytes of an expert, where they are known.
    #[serde(skip)]
    pub bytes_per_expert: Option<u64>,
}

impl Display for ReplayReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.source)?;
        writeln!(f, "{} experts a layer in fast memory, policy {}", self.cached_experts, self.policy)?;
        if let (Some(bonus), Some(loss)) = (self.cache_bonus, self.max_mass_loss) {
            let now = self.figures.bonus.map_or(String::new(), |now| format!(" at the start, {now:.3} at the end"));
            writeln!(f, "bonus {bonus:?} score ranges{now}, at most {} of a token's gate mass", percent(Some(loss)))?;
        }
        writeln!(
            f,
            "\n  {:<14}{:>10}{:>10}{:>10}{:>10}{:>10}{:>11}{:>11}{:>12}",
            "router", "requests", "misses", "hit rate", "Belady", "gate mass", "agreement", "saved", "read"
        )?;
        let plain = self.plain.unwrap_or(self.figures);
        if self.plain.is_some() {
            self.row(f, "top-k", &plain, None)?;
        }
        let saved = self.plain.filter(|plain| plain.misses > 0);
        let saved = saved.map(|plain| 1.0 - self.figures.misses as f64 / plain.misses as f64);
        self.row(f, self.router, &self.figures, saved)
    }
}

impl ReplayReport {
    fn row(&self, f: &mut Formatter<'_>, router: &str, figures: &ReplayFigures, saved: Option<f64>) -> fmt::Result {
        let read = self.bytes_per_expert.map(|bytes| bytes.saturating_mul(figures.misses));
        writeln!(
            f,
            "  {router:<14}{:>10}{:>10}{:>10}{:>10}{:>10}{:>11}{:>11}{:>12}",
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
