//! The result of `tune`: every setting with what it came to, memory by memory; the front; which one to take and why.

use std::fmt::{self, Display, Formatter};

use bytesize::ByteSize;
use serde::Serialize;

use crate::choice::{Judge, Prefer};
use crate::report::reason::{Memory, Reasons, Swept, kept, percents, warning};
use phase_moe::eval::TuneRow;

/// The whole result.
#[derive(Serialize)]
pub struct TuneReport {
    #[serde(skip)]
    swept: Swept,
    /// All settings.
    rows: Vec<Judged>,
    /// The one to take; `None` where none is good enough.
    recommended: Option<Judged>,
    /// Why that one.
    reason: String,
    /// What runs it.
    command: Option<String>,
    /// The same for each memory.
    per_memory: Vec<PerMemory>,
    /// What to beware of.
    pub warning: Option<String>,
}

/// A setting, and whether no other is better.
#[derive(Clone, Serialize)]
struct Judged {
    #[serde(flatten)]
    row: TuneRow,
    /// Whether it is on the front.
    pareto: bool,
}

/// The setting to take on one memory.
#[derive(Serialize)]
struct PerMemory {
    /// The memory, as it was asked for.
    memory: String,
    /// The setting.
    recommended: Option<Judged>,
    /// Why that one.
    reason: String,
    /// What runs it.
    command: Option<String>,
    /// Its number, and those of all rows of this memory.
    #[serde(skip)]
    rows: (Option<usize>, std::ops::Range<usize>),
}

impl Swept {
    /// The front, the setting to take on each memory and of all, and why; `command` says what runs a row.
    pub fn judged(self, prefer: Prefer, most: f64, command: impl Fn(&TuneRow, &Memory) -> String) -> TuneReport {
        let judge = Judge::new(&self.rows);
        let rows: Vec<Judged> = self
            .rows
            .iter()
            .cloned()
            .zip(judge.front(&self.rows))
            .map(|(row, pareto)| Judged { row, pareto })
            .collect();
        let settings = self.rows.len() / self.memories.len().max(1);
        let reasons = Reasons { swept: &self, judge: &judge, most };
        let taken = |among: std::ops::Range<usize>| {
            let choice = judge.choose(&self.rows, &among.clone().collect::<Vec<_>>(), prefer, most);
            match choice {
                None => (None, reasons.none(among.len()), None),
                Some(choice) => {
                    let at = choice.row;
                    let memory = &self.memories[at / settings];
                    let base = self.rows[at / settings * settings..].iter().find(|row| row.baseline);
                    (Some(at), reasons.of(&choice, memory, base), Some(command(&self.rows[at], memory)))
                }
            }
        };
        let per_memory = self.memories.iter().enumerate().map(|(at, memory)| {
            let among = at * settings..(at + 1) * settings;
            let (row, reason, command) = taken(among.clone());
            let recommended = row.map(|row| rows[row].clone());
            PerMemory { memory: memory.given.clone(), recommended, reason, command, rows: (row, among) }
        });
        let per_memory: Vec<PerMemory> = per_memory.collect();
        let (best, reason, command) = taken(0..rows.len());
        let recommended = best.map(|row| rows[row].clone());
        let warning = warning(&self.rows, most, self.tokens);
        TuneReport { rows, recommended, reason, command, per_memory, warning, swept: self }
    }
}

impl Display for TuneReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let plain = self.swept.rows.iter().find(|row| row.baseline).map_or(f64::NAN, |row| row.perplexity);
        writeln!(f, "{}; perplexity {plain:.3} as it is", self.swept.source)?;
        self.legend(f)?;
        writeln!(
            f,
            "\n   {:>5}{:>7}{:>8}{:>8}{:>16}{:>8}{:>14}{:>11}",
            "top-k", "bonus", "hits", "Belady", "perplexity", "mass", "tokens/s", "read"
        )?;
        for of in &self.per_memory {
            let first = &self.rows[of.rows.1.start].row;
            let (taken, experts) = (of.rows.0, kept(first, self.swept.experts));
            match first.expert_cache_bytes {
                Some(_) => writeln!(f, "{}: {experts} a layer", of.memory)?,
                None => writeln!(f, "{experts} a layer")?,
            }
            for at in of.rows.1.clone() {
                self.row(f, &self.rows[at], Some(at) == taken)?;
            }
        }
        if self.per_memory.len() > 1 {
            for of in &self.per_memory {
                writeln!(f, "\n{}: {}", self.name(of), of.reason)?;
                of.command.iter().try_for_each(|command| writeln!(f, "  run: {command}"))?;
            }
        }
        match &self.command {
            Some(command) => writeln!(f, "\ntake {}\n  run: {command}", self.reason),
            None => writeln!(f, "\n{}", self.reason),
        }
    }
}

impl TuneReport {
    fn name(&self, of: &PerMemory) -> String {
        match self.rows[of.rows.1.start].row.expert_cache_bytes {
            Some(_) => of.memory.clone(),
            None => format!("{} experts", of.memory),
        }
    }

    fn is_measured(&self) -> bool {
        self.rows.iter().any(|judged| judged.row.expert_cache_bytes.is_some())
    }

    fn legend(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (read, clock) = match self.is_measured() {
            true => ("bytes read per token, while the clock ran", "decode on this cache"),
            false => ("bytes per token that the misses would read", "decode, all experts in memory"),
        };
        let runs = self.swept.runs;
        writeln!(f, "\n*           nothing beats it: is as good in tokens/s, misses, perplexity, memory")?;
        writeln!(f, "            and better in one by more than its spread, or the median spread")?;
        writeln!(f, ">           the setting to take on this memory, of those within the tolerance")?;
        writeln!(f, "bonus       of an expert in fast memory, in score ranges; 0 is plain top-k")?;
        writeln!(f, "hits        share of requests (an expert of a layer and token) found in memory")?;
        writeln!(f, "Belady      the most hits that any order of eviction could have had")?;
        writeln!(f, "perplexity  change against plain top-k, ± its standard error on this text")?;
        writeln!(f, "mass        gate mass of the experts taken / of those top-k would take")?;
        writeln!(f, "tokens/s    {clock}: median of {runs} runs, ± half the")?;
        writeln!(f, "            distance between their quartiles")?;
        writeln!(f, "read        {read}")
    }

    fn row(&self, f: &mut Formatter<'_>, Judged { row, pareto }: &Judged, taken: bool) -> fmt::Result {
        let percent = |share: Option<f64>| share.map_or("–".into(), |share| format!("{:.1} %", 100.0 * share));
        let rate = row.tokens_per_second;
        let rate = if rate < 100.0 { format!("{rate:.1}") } else { format!("{rate:.0}") };
        writeln!(
            f,
            "{}{} {:>5}{:>7}{:>8}{:>8}{:>16}{:>8}{:>14}{:>11}",
            if taken { ">" } else { " " },
            if *pareto { "*" } else { " " },
            row.top_k,
            row.cache_bonus,
            percent(row.hit_rate),
            percent(row.belady_hit_rate),
            percents(row),
            percent(row.gate_mass_kept),
            format!("{rate} ± {:>2.0} %", 100.0 * row.spread),
            self.bytes(row.bytes_read_per_token)
        )
    }

    /// Bytes in the family of units that budgets were typed in.
    fn bytes(&self, bytes: f64) -> String {
        let decimal = |memory: &Memory| !memory.given.contains(['i', 'I']);
        let size = ByteSize(bytes as u64).display();
        match self.is_measured() && self.swept.memories.iter().all(decimal) {
            true => size.si().to_string(),
            false => size.iec().to_string(),
        }
    }
}
