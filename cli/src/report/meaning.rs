//! What `compare`'s rows mean, in two sentences: which router to take, and what the limit costs.
//!
//! Everything is derived from the rows. Two of them are told apart only where the difference of their losses exceeds its noise: both read
//! the same batches, so the noise is that of the paired differences, batch by batch.

use phase_moe::eval::RouterFigures;

use super::signed_percent;

/// What one run of `compare` found.
pub struct Evidence<'a> {
    /// The gate's own choice, without any limit.
    pub dropless: &'a RouterFigures,
    /// Rows without a limit.
    pub unlimited: Vec<&'a RouterFigures>,
    /// Rows with one, by limit, in the order of the table.
    pub limits: Vec<Limit<'a>>,
}

/// A limit and the rows under it.
pub struct Limit<'a> {
    /// `per 4 devices at 1.0`.
    pub label: String,
    /// True when any batch was large enough for it.
    pub applied: bool,
    /// Its rows, one at least.
    pub rows: Vec<&'a RouterFigures>,
}

/// Limits after the first whose cost is told.
const TOLD: usize = 4;

impl Evidence<'_> {
    /// The two sentences.
    pub fn meaning(&self) -> String {
        let applied: Vec<&Limit<'_>> = self.limits.iter().filter(|limit| limit.applied).collect();
        let meaning = match (applied.as_slice(), self.limits.first()) {
            ([], None) => self.without_limits(),
            ([], Some(limit)) => format!(
                "No batch was large enough for limits {}, so no row has one. Raise --batch-tokens to see what they cost.",
                limit.label
            ),
            ([first, rest @ ..], _) => match first.pick() {
                Some(pick) => format!("{} {}", self.under(first, pick), self.take(pick, rest)),
                None => format!(
                    "Limits {}: expert-choice looks at later tokens of a batch too, so its perplexity says nothing of text that a \
                     model writes. Take none of these rows: add --router phase.",
                    first.label
                ),
            },
        };
        match self.dropless.batch_nats.len() {
            0 | 1 => format!("{meaning} (One batch: how much of it is noise cannot be told.)"),
            _ => meaning,
        }
    }

    /// What a limit costs, with the best router and with another one.
    fn under(&self, limit: &Limit<'_>, pick: &RouterFigures) -> String {
        let room = match pick.capacity_factor {
            Some(factor) if factor < 1.0 => format!(" (there is room for {:.0} %)", 100.0 * factor),
            _ => String::new(),
        };
        let kept = match pick.dropped_slots {
            0 => "keeps every slot".into(),
            _ => format!("keeps {:.2} % of the slots", 100.0 * pick.survival),
        };
        let against = limit.contrast(pick).map_or(String::new(), |other| match ties(other, pick) {
            true => format!("; {} cannot be told from it by perplexity", way(other)),
            false => format!("; {} {}", way(other), self.cost(other)),
        });
        format!("Limits {}: {} {kept}{room} and {}{against}.", limit.label, pick.router, self.cost(pick))
    }

    /// Which router to take, here and under the other limits.
    fn take(&self, pick: &RouterFigures, rest: &[&Limit<'_>]) -> String {
        let mut others = Vec::new();
        for limit in rest.iter().take(TOLD) {
            let Some(best) = limit.pick() else { continue };
            let same = limit.rows.iter().find(|row| row.router == pick.router).filter(|row| ties(row, best));
            let row = same.unwrap_or(&best);
            let cost = format!("{}{}", signed_percent(row.perplexity_increase), self.noise(row));
            others.push(match same {
                Some(_) => format!("{} it costs {cost}", limit.label),
                None => format!("{} {} is better, {cost}", limit.label, row.router),
            });
        }
        let others = if others.is_empty() { String::new() } else { format!("; {}", others.join(", ")) };
        let free = if self.unlimited.is_empty() && self.dropless.devices.is_none() {
            String::new()
        } else {
            format!("; without a limit {}", self.best_unlimited())
        };
        format!("Take {}{others}{free}.", pick.router)
    }

    /// `top-k is best`, and how full its devices are.
    fn best_unlimited(&self) -> String {
        let better = self.better_than_dropless();
        let best = match better {
            Some(row) => format!("{} is best ({})", row.router, signed_percent(row.perplexity_increase)),
            None => "top-k is best".into(),
        };
        let row = better.unwrap_or(self.dropless);
        let fullest = fullest_device(row).map_or(String::new(), |fullest| format!(", {fullest}"));
        best + &fullest
    }

    fn better_than_dropless(&self) -> Option<&RouterFigures> {
        let usable = self.unlimited.iter().copied().filter(|row| is_causal(row));
        let better = usable.filter(|row| row.perplexity < self.dropless.perplexity && !ties(row, self.dropless));
        better.min_by(|a, b| a.perplexity.total_cmp(&b.perplexity))
    }

    fn without_limits(&self) -> String {
        let better = self.better_than_dropless();
        let best = better.unwrap_or(self.dropless);
        let others: Vec<String> = self
            .unlimited
            .iter()
            .filter(|row| row.router != best.router)
            .map(|row| format!("{} {}", row.router, self.cost(row)))
            .collect();
        let others = if others.is_empty() { String::new() } else { format!("; {}", others.join(", ")) };
        let first = format!("Without a limit {} is best, perplexity {:.3}{others}.", best.router, best.perplexity);
        let aware = self.unlimited.iter().any(|row| row.router.starts_with("cache"));
        let saves = if aware { " unless reading experts takes the time: what cache saves, `tune` tells" } else { "" };
        let full = match fullest_device(best) {
            Some(fullest) => format!("; {fullest}, and --router phase shows what a limit costs"),
            None if aware => String::new(),
            None => "; nothing is limited here, and --router phase shows what a limit costs".into(),
        };
        format!("{first} Take {}{saves}{full}.", best.router)
    }

    fn cost(&self, row: &RouterFigures) -> String {
        let increase = row.perplexity_increase;
        match () {
            _ if ties(row, self.dropless) && increase.abs() < SMALL => {
                format!("costs nothing beyond noise ({})", signed_percent(increase))
            }
            _ if ties(row, self.dropless) => {
                format!("costs {} perplexity, within the noise of so short a text", signed_percent(increase))
            }
            _ if increase < 0.0 => format!("lowers perplexity by {:.2} %", -100.0 * increase),
            _ => format!("costs {} perplexity", signed_percent(increase)),
        }
    }

    fn noise(&self, row: &RouterFigures) -> &'static str {
        if ties(row, self.dropless) { " (noise)" } else { "" }
    }
}

impl Limit<'_> {
    /// The router to take: of those whose perplexity cannot be told from the lowest, the ones that drop least, of these the ones that
    /// keep the most gate mass (to a thousandth), of these the fastest. `None` where no row is of use in generation.
    fn pick(&self) -> Option<&RouterFigures> {
        let usable = || self.rows.iter().copied().filter(|row| is_causal(row));
        let lowest = usable().min_by(|a, b| a.perplexity.total_cmp(&b.perplexity))?;
        let equal = || usable().filter(|row| ties(row, lowest));
        let fewest = equal().map(|row| row.dropped_slots).min()?;
        let keeping = || equal().filter(|row| row.dropped_slots == fewest);
        let most = keeping().map(|row| row.gate_mass).fold(0.0, f64::max);
        let wanted = keeping().filter(|row| row.gate_mass >= most - 1e-3);
        wanted.min_by(|a, b| a.route_nanos_per_token.total_cmp(&b.route_nanos_per_token))
    }

    /// What to hold the pick against: `phase` where that lost, else dropping as published systems do, else the worst.
    fn contrast(&self, pick: &RouterFigures) -> Option<&RouterFigures> {
        let others = || self.rows.iter().copied().filter(|row| row.router != pick.router && is_causal(row));
        let named = |name: &str| others().find(|row| row.router == name);
        let worst = || others().max_by(|a, b| a.perplexity.total_cmp(&b.perplexity));
        named("phase").or_else(|| named("top-k-arrival")).or_else(|| named("top-k-score")).or_else(worst)
    }
}

/// Whether a token's experts depend on no later token: `expert-choice` picks tokens out of a whole batch.
pub fn is_causal(row: &RouterFigures) -> bool {
    row.router != "expert-choice"
}

fn way(row: &RouterFigures) -> &'static str {
    match row.router {
        "top-k-arrival" => "dropping by arrival",
        "top-k-score" => "dropping the lowest scores",
        name => name,
    }
}

fn fullest_device(row: &RouterFigures) -> Option<String> {
    let (devices, violation) = row.devices.zip(row.device_max_violation)?;
    Some(format!("its fullest of {devices} devices at {:.2} × its share", violation + 1.0))
        .filter(|_| violation.is_finite())
}

/// Student's t at 97.5 % by degrees of freedom, from 1 on.
const STUDENT: [f64; 10] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];

/// Within noise, so much of perplexity is nothing; of more it is the text that is too short.
const SMALL: f64 = 0.005;

/// Differences of less nats a token than this are none.
const LEAST: f64 = 1e-7;

/// Whether the perplexities of two rows cannot be told apart: their mean difference in nats a token is within its 95 % interval of
/// 0, by the spread of the batches' differences. Of a single batch nothing is known of noise, and only equals are equal.
fn ties(a: &RouterFigures, b: &RouterFigures) -> bool {
    let pairs = || a.batch_nats.iter().zip(&b.batch_nats).map(|(a, b)| (a.0 - b.0, a.1 as f64));
    let (difference, tokens) = pairs().fold((0.0, 0.0), |sums, pair| (sums.0 + pair.0, sums.1 + pair.1));
    let (mean, batches) = (difference / f64::max(tokens, 1.0), a.batch_nats.len().min(b.batch_nats.len()));
    if mean.abs() <= LEAST {
        return true;
    }
    if batches < 2 {
        return false;
    }
    let squares: f64 = pairs().map(|(nats, tokens)| (nats - mean * tokens).powi(2)).sum();
    let error = (squares * batches as f64 / (batches - 1) as f64).sqrt() / tokens;
    mean.abs() <= STUDENT.get(batches - 2).copied().unwrap_or(2.0) * error
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row whose loss is `increase` over one of 3 nats a token, in eight batches of 100 tokens that scatter by `noise` nats a token.
    fn row(router: &'static str, increase: f64, dropped: u64, noise: f64) -> RouterFigures {
        let noise = [noise, -noise];
        let nats = |batch: usize| (3.0 + (1.0 + increase).ln() + noise[batch % 2]) * 100.0;
        RouterFigures {
            router,
            capacity_factor: Some(1.0),
            profile: None,
            capacity_rule: Some("exact"),
            devices: None,
            device_max_violation: None,
            survival: 1.0 - dropped as f64 / 1000.0,
            dropped_slots: dropped,
            tokens_without_expert: 0,
            demand_max_violation: 0.0,
            gate_mass: 1.0,
            gate_mass_vs_bound: None,
            perplexity: 20.0 * (1.0 + increase),
            perplexity_increase: increase,
            max_violation: 0.0,
            load_cv: 0.0,
            gini: 0.0,
            jain: 1.0,
            route_nanos_per_token: 1000.0,
            tokens_per_second: 1.0,
            loads: Vec::new(),
            batch_nats: (0..8).map(|batch| (nats(batch), 100)).collect(),
            ranks: None,
        }
    }

    fn dropless() -> RouterFigures {
        RouterFigures { capacity_factor: None, capacity_rule: None, ..row("top-k", 0.0, 0, 0.0) }
    }

    fn on_devices(row: RouterFigures, violation: f64) -> RouterFigures {
        RouterFigures { devices: Some(4), device_max_violation: Some(violation), ..row }
    }

    fn meaning(dropless: &RouterFigures, unlimited: &[&RouterFigures], limits: &[(&str, &[&RouterFigures])]) -> String {
        let mut evidence = Evidence { dropless, unlimited: unlimited.to_vec(), limits: Vec::new() };
        for (label, rows) in limits {
            evidence.limits.push(Limit { label: label.to_string(), applied: true, rows: rows.to_vec() });
        }
        evidence.meaning()
    }

    const DEVICES: &str = "per 4 devices at 1.0";

    #[test]
    fn phase_wins_and_dropping_costs() {
        let (free, phase, arrival) =
            (dropless(), row("phase", 0.0015, 0, 1e-4), row("top-k-arrival", 0.258, 300, 0.01));
        let found = meaning(&free, &[&free], &[(DEVICES, &[&arrival, &phase])]);
        let expected = "Limits per 4 devices at 1.0: phase keeps every slot and costs +0.15 % perplexity; dropping by arrival costs \
                        +25.80 % perplexity. Take phase; without a limit top-k is best.";
        assert_eq!(found, expected);
        let free = on_devices(free, 0.35);
        let found = meaning(&free, &[], &[(DEVICES, &[&phase])]);
        let expected = "Limits per 4 devices at 1.0: phase keeps every slot and costs +0.15 % perplexity. Take phase; without a limit \
                        top-k is best, its fullest of 4 devices at 1.35 × its share.";
        assert_eq!(found, expected);
    }

    #[test]
    fn one_row_alone_is_enough() {
        let (free, phase) = (dropless(), row("phase", 0.0915, 0, 1e-3));
        let found = meaning(&free, &[], &[("per expert at 1.0", &[&phase])]);
        assert_eq!(found, "Limits per expert at 1.0: phase keeps every slot and costs +9.15 % perplexity. Take phase.");
        let found = meaning(&free, &[&free], &[]);
        let expected = "Without a limit top-k is best, perplexity 20.000. Take top-k; nothing is limited here, and --router phase \
                        shows what a limit costs.";
        assert_eq!(found, expected);
    }

    #[test]
    fn where_phase_loses_the_better_one_is_taken_and_phase_named() {
        let (free, phase, score) = (dropless(), row("phase", 0.03, 0, 1e-3), row("top-k-score", 0.01, 9, 1e-3));
        let found = meaning(&free, &[], &[("per expert at 2.0", &[&phase, &score])]);
        let expected = "Limits per expert at 2.0: top-k-score keeps 99.10 % of the slots and costs +1.00 % perplexity; phase costs \
                        +3.00 % perplexity. Take top-k-score.";
        assert_eq!(found, expected);
    }

    #[test]
    fn within_noise_the_one_that_keeps_its_slots_is_taken() {
        let (free, phase, score) = (dropless(), row("phase", 0.002, 0, 0.05), row("top-k-score", 0.001, 9, 0.0));
        let found = meaning(&free, &[], &[("per expert at 2.0", &[&score, &phase])]);
        let expected = "Limits per expert at 2.0: phase keeps every slot and costs nothing beyond noise (+0.20 %); dropping the lowest \
                        scores cannot be told from it by perplexity. Take phase.";
        assert_eq!(found, expected);
        let long = row("phase", 0.03, 0, 0.3);
        let found = meaning(&free, &[], &[(DEVICES, &[&long])]);
        assert!(
            found.contains("costs +3.00 % perplexity, within the noise of so short a text. Take phase."),
            "{found}"
        );
        // As good and as lossless, and ten times as slow; or faster, and of less gate mass.
        let slow = RouterFigures { route_nanos_per_token: 1e4, ..row("auction", 0.0019, 0, 0.0) };
        let hasty = RouterFigures { gate_mass: 0.9, route_nanos_per_token: 1.0, ..row("quota", 0.0019, 0, 0.0) };
        assert!(meaning(&free, &[], &[(DEVICES, &[&slow, &hasty, &phase])]).ends_with("Take phase."));
    }

    #[test]
    fn other_limits_are_told_beside_the_first() {
        let (free, phase) = (dropless(), row("phase", 0.0015, 0, 1e-4));
        let (tight, wide) = (row("phase", 0.0921, 0, 1e-3), row("phase", 0.0001, 0, 0.05));
        let (worse, better) = (row("phase", 0.03, 0, 1e-3), row("expanded-drop", 0.01, 5, 1e-3));
        let limits: [(&str, &[&RouterFigures]); 4] = [
            (DEVICES, &[&phase]),
            ("per expert at 1.0", &[&tight]),
            ("per expert at 1.25", &[&worse, &better]),
            ("per expert at 2.0", &[&wide]),
        ];
        let found = meaning(&free, &[], &limits);
        let expected = "Take phase; per expert at 1.0 it costs +9.21 %, per expert at 1.25 expanded-drop is better, +1.00 %, per \
                        expert at 2.0 it costs +0.01 % (noise).";
        assert!(found.ends_with(expected), "{found}");
    }

    #[test]
    fn where_there_is_no_room_it_says_so() {
        let half = RouterFigures { capacity_factor: Some(0.5), ..row("phase", 0.4, 500, 0.01) };
        let found = meaning(&dropless(), &[], &[("per expert at 0.5", &[&half])]);
        let expected = "Limits per expert at 0.5: phase keeps 50.00 % of the slots (there is room for 50 %) and costs +40.00 % \
                        perplexity. Take phase.";
        assert_eq!(found, expected);
    }

    #[test]
    fn a_limit_that_no_batch_was_large_enough_for_says_nothing() {
        let (free, phase) = (dropless(), row("phase", 0.0, 0, 0.0));
        let limit = Limit { label: "per expert at 1.0".into(), applied: false, rows: vec![&phase] };
        let found = Evidence { dropless: &free, unlimited: vec![], limits: vec![limit] }.meaning();
        let expected = "No batch was large enough for limits per expert at 1.0, so no row has one. Raise --batch-tokens to see what \
                        they cost.";
        assert_eq!(found, expected);
    }

    #[test]
    fn what_looks_ahead_is_never_taken() {
        let (free, choice, phase) = (dropless(), row("expert-choice", -0.05, 0, 1e-3), row("phase", 0.1, 0, 1e-3));
        assert!(meaning(&free, &[], &[(DEVICES, &[&choice, &phase])]).ends_with("Take phase."));
        let alone = meaning(&free, &[], &[(DEVICES, &[&choice])]);
        assert!(alone.contains("looks at later tokens") && alone.ends_with("add --router phase."), "{alone}");
    }

    #[test]
    fn without_limits_the_gate_s_own_choice_is_held_against_the_others() {
        let free = dropless();
        let unlimited = |row: RouterFigures| RouterFigures { capacity_factor: None, capacity_rule: None, ..row };
        let (hash, cache) = (unlimited(row("hash", 3.0, 0, 0.01)), unlimited(row("cache", 0.0004, 0, 0.05)));
        let found = meaning(&free, &[&free, &hash, &cache], &[]);
        let expected = "Without a limit top-k is best, perplexity 20.000; hash costs +300 % perplexity, cache costs nothing beyond \
                        noise (+0.04 %). Take top-k unless reading experts takes the time: what cache saves, `tune` tells.";
        assert_eq!(found, expected);
        let lucky = unlimited(row("cache", -0.02, 0, 1e-3));
        assert!(
            meaning(&free, &[&lucky], &[]).starts_with("Without a limit cache is best, perplexity 19.600. Take cache")
        );
        let crowded = on_devices(dropless(), 0.35);
        let found = meaning(&crowded, &[&crowded], &[]);
        assert!(
            found.ends_with(
                "Take top-k; its fullest of 4 devices at 1.35 × its share, and --router phase shows what a limit costs."
            ),
            "{found}"
        );
    }

    #[test]
    fn of_one_batch_the_noise_is_unknown() {
        let short = |row: RouterFigures| RouterFigures { batch_nats: row.batch_nats[..1].to_vec(), ..row };
        let (free, phase) = (short(dropless()), short(row("phase", 0.01, 0, 0.0)));
        let found = meaning(&free, &[], &[(DEVICES, &[&phase])]);
        assert!(
            found.contains("costs +1.00 %") && found.ends_with("(One batch: how much of it is noise cannot be told.)"),
            "{found}"
        );
    }

    #[test]
    fn noise_is_that_of_paired_differences() {
        // Both scatter alike, so their difference does not.
        assert!(!ties(&row("a", 0.001, 0, 0.3), &row("b", 0.0, 0, 0.3)));
        assert!(ties(&row("a", 0.001, 0, 0.3), &row("b", 0.0, 0, 0.0)));
        assert!(ties(&row("a", 0.0, 0, 0.0), &row("b", 0.0, 0, 0.0)));
    }
}
