//! The result of `replay`: what a router asked of the expert cache, beside routers that see no cache, with the same policy: with every
//! miss admitted, and with the router's own admission, so that what either saves can be told apart.

use phase_moe::eval::ReplayFigures;
use serde::Serialize;

use super::table::{Best, Cell, Column, Table};
use super::{percent, percent_cell};
use crate::terminal::Terminal;

/// The whole result; as JSON the router's figures stand at the top.
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
    /// Routers that see no cache, under the same policy: first those that admit every miss, the last of which savings are measured against,
    /// then that one with the router's own admission, where it is another.
    pub beside: Vec<Beside>,
    /// What admission saves, and what the router saves beyond it; empty where nothing stands beside it.
    pub meaning: String,
    /// Bytes of an expert, where they are known.
    #[serde(skip)]
    pub bytes_per_expert: Option<u64>,
}

/// A router that sees no cache.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Beside {
    /// Its name.
    pub router: &'static str,
    /// Name of what lets experts in.
    pub admission: String,
    /// What it did.
    #[serde(flatten)]
    pub figures: ReplayFigures,
}

/// The admission that savings are measured against.
pub const ALL: &str = "all";

impl ReplayReport {
    /// With what it means.
    pub fn explained(self) -> Self {
        Self { meaning: self.savings(), ..self }
    }

    /// For people.
    pub fn text(&self, terminal: &Terminal) -> String {
        let (cached, policy, admission) = (self.cached_experts, &self.policy, &self.admission);
        let memory = format!("{cached} experts a layer in fast memory, policy {policy}, admission {admission}");
        let mut lines = vec![self.source.clone(), memory];
        if let (Some(bonus), Some(loss)) = (self.cache_bonus, self.max_mass_loss) {
            let now = self.figures.bonus.map_or(String::new(), |now| format!(" at the start, {now:.3} at the end"));
            lines.push(format!("bonus {bonus:?} score ranges{now}, at most {} of a token's gate mass", percent(loss)));
        }
        let mut text: String = lines.iter().map(|line| terminal.wrapped(line, 2) + "\n").collect();
        text += &format!("\n{}", self.table().text(terminal));
        if !self.meaning.is_empty() {
            text += &format!("\n{}\n", terminal.wrapped(&self.meaning, 0));
        }
        text
    }

    fn table(&self) -> Table {
        let base = self.base().map_or(String::new(), |base| format!(" of {} that admits all", base.router));
        let mut table = Table::new(vec![
            Column::names("router"),
            Column::names("admission").legend("which misses enter fast memory"),
            Column::figures("requests").legend("distinct experts per layer and step, all together").worth(1),
            Column::figures("misses").worth(5).best(Best::Lowest),
            Column::figures("hit rate").best(Best::Highest),
            Column::figures("Belady")
                .legend("hit rate of the best policy there could be on the same requests")
                .worth(4),
            Column::figures("gate\nmass")
                .legend("kept gate scores over those of plain top-k")
                .worth(6)
                .best(Best::Highest),
            Column::figures("agreement").legend("slots of plain top-k that the router chose too").worth(2),
            Column::figures("saved").legend(format!("misses, of those{base}")).worth(7).best(Best::Highest),
            Column::figures("read").legend("misses times the bytes of an expert").worth(3).best(Best::Lowest),
        ]);
        for Beside { router, admission, figures } in &self.beside {
            table.row(self.row(router, admission, figures));
        }
        table.row(self.row(self.router, &self.admission, &self.figures));
        table
    }

    fn row(&self, router: &str, admission: &str, figures: &ReplayFigures) -> Vec<Cell> {
        let base = self.base().filter(|base| (base.router, base.admission.as_str()) != (router, admission));
        let saved = base.and_then(|base| saved(&base.figures, figures));
        let read = self.bytes_per_expert.map(|bytes| bytes.saturating_mul(figures.misses) as f64);
        let count = |count: u64| Cell::figure(count.to_string(), count as f64);
        vec![
            Cell::name(router),
            Cell::name(admission),
            count(figures.requests),
            count(figures.misses),
            percent_cell(figures.hit_rate),
            percent_cell(figures.belady_hit_rate),
            percent_cell(figures.gate_mass_kept),
            percent_cell(figures.agreement),
            saved.map_or_else(Cell::none, |saved| Cell::figure(percent(saved), saved).bad(saved < 0.0)),
            read.map_or_else(Cell::none, |bytes| Cell::figure(format!("{:.1} MB", bytes / 1e6), bytes)),
        ]
    }

    /// What savings are measured against: a router that sees no cache and admits every miss.
    fn base(&self) -> Option<&Beside> {
        self.beside.iter().rfind(|beside| beside.admission == ALL)
    }

    /// "admission alone saves 17 % of the reads, swaps a further 56 % of those left, together 64 %".
    fn savings(&self) -> String {
        let Some(base) = self.base() else { return String::new() };
        let Some(together) = saved(&base.figures, &self.figures) else {
            return format!("{} that admits every miss has none: there is nothing to save.", base.router);
        };
        let what = if self.cache_bonus.is_some() { SWAPS } else { Subject("its choice of experts", "s") };
        let against = format!("Against {} that admits every miss", base.router);
        let same = self.beside.iter().find(|beside| beside.router == base.router && beside.admission == self.admission);
        match same {
            // The router's own admission is another one, and it is the same router.
            None if self.router == base.router => format!("{against}, {} of the reads.", ADMISSION.change(together)),
            Some(same) if same.admission != ALL => {
                let by_admission = saved(&base.figures, &same.figures).unwrap_or(0.0);
                let further = match saved(&same.figures, &self.figures) {
                    Some(further) if further >= 0.0 => format!("{} a further {} of those left", what.0, whole(further)),
                    Some(further) => format!("{} to those left", what.change(further)),
                    None => format!("with none left for {}", what.0),
                };
                let together = if together >= 0.0 { whole(together) } else { format!("−{}", whole(-together)) };
                format!("{against}, {} of the reads, {further}, together {together}.", ADMISSION.change(by_admission))
            }
            _ => format!("{against}, {} of the reads.", what.change(together)),
        }
    }
}

/// What saves, and the ending of its verb.
struct Subject(&'static str, &'static str);

const ADMISSION: Subject = Subject("admission alone", "s");
const SWAPS: Subject = Subject("swaps", "");

impl Subject {
    /// `swaps save 17 %` or `swaps add 3 %`.
    fn change(&self, saved: f64) -> String {
        let verb = if saved >= 0.0 { "save" } else { "add" };
        format!("{} {verb}{} {}", self.0, self.1, whole(saved.abs()))
    }
}

fn whole(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// The share of `base`'s misses that another run did not have; `None` where there were none.
fn saved(base: &ReplayFigures, other: &ReplayFigures) -> Option<f64> {
    (base.misses > 0).then(|| 1.0 - other.misses as f64 / base.misses as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(misses: u64) -> ReplayFigures {
        ReplayFigures {
            requests: 4000,
            hits: 4000 - misses,
            misses,
            hit_rate: Some(1.0 - misses as f64 / 4e3),
            ..Default::default()
        }
    }

    fn report(
        router: &'static str,
        bonus: Option<f64>,
        admission: &str,
        misses: u64,
        beside: &[(&'static str, &str, u64)],
    ) -> ReplayReport {
        let beside = beside.iter().map(|&(router, admission, misses)| Beside {
            router,
            admission: admission.into(),
            figures: figures(misses),
        });
        let report = ReplayReport {
            source: "tiny".into(),
            router,
            policy: "lru".into(),
            admission: admission.into(),
            cached_experts: 8,
            cache_bonus: bonus,
            max_mass_loss: bonus,
            figures: figures(misses),
            bytes_read: None,
            beside: beside.collect(),
            meaning: String::new(),
            bytes_per_expert: None,
        };
        report.explained()
    }

    #[test]
    fn admission_and_swaps_are_told_apart() {
        let both = report("cache", Some(0.1), "affinity", 360, &[("top-k", "all", 1000), ("top-k", "affinity", 830)]);
        let expected = "Against top-k that admits every miss, admission alone saves 17 % of the reads, swaps a further 57 % of those \
                        left, together 64 %.";
        assert_eq!(both.meaning, expected);
        let rows = [("top-k", "all", 2000), ("phase", "all", 1000), ("phase", "affinity", 1100)];
        let worse = report("cache+phase", Some(0.1), "affinity", 1210, &rows).meaning;
        let expected = "Against phase that admits every miss, admission alone adds 10 % of the reads, swaps add 10 % to those left, \
                        together −21 %.";
        assert_eq!(worse, expected);
    }

    #[test]
    fn one_of_them_alone_is_named_alone() {
        let swaps = report("cache", Some(0.1), "all", 400, &[("top-k", "all", 1000)]);
        assert_eq!(swaps.meaning, "Against top-k that admits every miss, swaps save 60 % of the reads.");
        let admission = report("top-k", None, "affinity", 830, &[("top-k", "all", 1000)]);
        assert_eq!(admission.meaning, "Against top-k that admits every miss, admission alone saves 17 % of the reads.");
        let choice = report("phase", None, "all", 1200, &[("top-k", "all", 1000)]);
        assert_eq!(
            choice.meaning,
            "Against top-k that admits every miss, its choice of experts adds 20 % of the reads."
        );
        assert_eq!(report("top-k", None, "all", 400, &[]).meaning, "");
        let none = report("cache", Some(0.1), "all", 0, &[("top-k", "all", 0)]);
        assert_eq!(none.meaning, "top-k that admits every miss has none: there is nothing to save.");
    }

    #[test]
    fn the_table_fits_80_columns_and_names_what_it_leaves_out() {
        let full = |misses| ReplayFigures {
            belady_hit_rate: Some(0.9),
            gate_mass_kept: Some(1.0),
            agreement: Some(1.0),
            requests: 578_304,
            ..figures(misses)
        };
        let mut report =
            report("cache+phase", Some(0.1), "affinity", 360, &[("top-k", "all", 1000), ("phase", "all", 900)]);
        report.bytes_per_expert = Some(49_152);
        report.figures = full(360);
        report.beside.iter_mut().for_each(|beside| beside.figures = full(1000));
        let text = report.text(&Terminal::plain(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(
            text.contains("  cache+phase  affinity") && text.contains("misses, of those of phase that admits all"),
            "{text}"
        );
        assert!(text.contains("no room in 80 columns for requests"), "{text}");
        let wide = report.text(&Terminal::plain(120));
        assert!(wide.contains("requests  misses") && !wide.contains("no room"), "{wide}");
    }
}
