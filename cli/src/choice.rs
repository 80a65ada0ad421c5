//! Which setting of `tune` to take, and why: what leads what beyond the noise, the front, and the choice by what the user prefers.
//!
//! One rule for every criterion: **a row leads another where it is better by more than its own spread, or the median spread of all rows
//! where that is larger** (few runs may agree by luck). What no row leads counts as equal, and the next criterion decides among
//! them. So among rows within the tolerance the one taken is led by none in the first criterion; among those that are led by
//! none there, by none in the second; and so on. No other is at least as good in all of them and better in one.

use std::cmp::Ordering;

use clap::ValueEnum;
use phase_moe::eval::TuneRow;

/// What the recommended setting should be best in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Prefer {
    /// Most tokens a second; fewest misses where experts are only counted
    Speed,
    /// Lowest perplexity
    Quality,
    /// Fewest experts in memory
    Memory,
}

/// What rows are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    TokensPerSecond,
    Misses,
    Perplexity,
    Memory,
}

use Criterion::{Memory, Misses, Perplexity, TokensPerSecond};

impl Prefer {
    /// The order in which criteria decide. Where all experts are in memory and misses are only counted, tokens per second tell nothing of
    /// what a smaller memory would cost; misses do.
    fn criteria(self, measured: bool) -> [Criterion; 4] {
        let [first, second] = if measured { [TokensPerSecond, Misses] } else { [Misses, TokensPerSecond] };
        match self {
            Self::Speed => [first, second, Perplexity, Memory],
            Self::Quality => [Perplexity, first, second, Memory],
            Self::Memory => [Memory, first, second, Perplexity],
        }
    }
}

impl Criterion {
    /// What the best row in it has.
    pub fn best(self) -> &'static str {
        match self {
            TokensPerSecond => "most tokens/s",
            Misses => "fewest misses",
            Perplexity => "lowest perplexity",
            Memory => "least memory",
        }
    }

    /// What those have that count as equal to it.
    pub fn equal(self) -> String {
        let noise = match self {
            TokensPerSecond => " within the spread",
            Perplexity => " within the error",
            Misses | Memory => "",
        };
        format!("the {}{noise}", self.best())
    }

    /// More is better.
    fn value(self, row: &TuneRow) -> f64 {
        match self {
            TokensPerSecond => row.tokens_per_second,
            Misses => -misses(row),
            Perplexity => -row.perplexity_increase,
            Memory => -(row.expert_cache_bytes.unwrap_or(row.cached_experts as u64) as f64),
        }
    }

    /// What of a row's value is noise; misses and memory have none.
    fn noise(self, row: &TuneRow) -> f64 {
        match self {
            TokensPerSecond => row.spread * row.tokens_per_second,
            // Of a single sequence nothing is known.
            Perplexity => row.perplexity_error.unwrap_or(f64::INFINITY),
            Misses | Memory => 0.0,
        }
    }
}

/// Misses of a token, in a layer.
pub fn misses(row: &TuneRow) -> f64 {
    row.top_k as f64 * (1.0 - row.hit_rate.unwrap_or(0.0))
}

/// How rows compare.
pub struct Judge {
    /// Median spread of tokens per second, as a share.
    spread: f64,
    /// Median error of an increase of perplexity, plain top-k's own aside, which has none.
    error: f64,
}

/// The row to take.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Its number.
    pub row: usize,
    /// How many rows there were to choose from.
    pub of: usize,
    /// What decided, and between how many; `None` where they are equal in everything.
    pub decided: Option<(Criterion, usize)>,
    /// What those had been equal in before, beyond the noise.
    pub equal_in: Vec<Criterion>,
}

impl Judge {
    /// Takes the noise of a table from its rows.
    pub fn new(rows: &[TuneRow]) -> Self {
        let median = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(0.0)
        };
        let errors = rows.iter().filter(|row| !row.baseline);
        Self {
            spread: median(rows.iter().map(|row| row.spread).collect()),
            error: median(errors.map(|row| Perplexity.noise(row)).collect()),
        }
    }

    /// Whether `row` is better than `other` in a criterion, beyond the noise.
    pub fn leads(&self, by: Criterion, row: &TuneRow, other: &TuneRow) -> bool {
        self.sure_of(by, row) > by.value(other)
    }

    /// What a row's value is at least, noise taken off.
    fn sure_of(&self, by: Criterion, row: &TuneRow) -> f64 {
        let least = match by {
            TokensPerSecond => self.spread * row.tokens_per_second,
            Perplexity => self.error,
            Misses | Memory => 0.0,
        };
        by.value(row) - by.noise(row).max(least)
    }

    /// Of every row whether it is on the front: no other one leads it in a criterion and is led by it in none.
    pub fn front(&self, rows: &[TuneRow]) -> Vec<bool> {
        let all = [TokensPerSecond, Misses, Perplexity, Memory];
        let beats = |a: &TuneRow, b: &TuneRow| {
            all.iter().any(|&by| self.leads(by, a, b)) && !all.iter().any(|&by| self.leads(by, b, a))
        };
        rows.iter().map(|row| !rows.iter().any(|other| beats(other, row))).collect()
    }

    /// The row of `among` to take of those that raise perplexity by at most `most`; `None` where none does.
    pub fn choose(&self, rows: &[TuneRow], among: &[usize], prefer: Prefer, most: f64) -> Option<Choice> {
        let mut left: Vec<usize> = among.iter().copied().filter(|&row| rows[row].perplexity_increase <= most).collect();
        let criteria = prefer.criteria(rows.iter().all(|row| row.expert_cache_bytes.is_some()));
        let (of, mut decided, mut equal_in) = (left.len(), None, Vec::new());
        for by in criteria {
            let before = left.len();
            let sure = left.iter().map(|&row| self.sure_of(by, &rows[row])).fold(f64::NEG_INFINITY, f64::max);
            left.retain(|&row| by.value(&rows[row]) >= sure);
            match left.len() {
                1 if before > 1 => decided = Some((by, before)),
                now if now > 1 => equal_in.push(by),
                _ => {}
            }
        }
        let compare = |a: &usize, b: &usize| {
            let in_turn = |order: Ordering, by: &Criterion| {
                order.then_with(|| by.value(&rows[*b]).total_cmp(&by.value(&rows[*a])))
            };
            criteria.iter().fold(Ordering::Equal, in_turn)
        };
        left.into_iter().min_by(compare).map(|row| Choice { row, of, decided, equal_in })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    pub fn row(cached_experts: usize, hit_rate: f64, perplexity_increase: f64, tokens_per_second: f64) -> TuneRow {
        TuneRow {
            baseline: false,
            top_k: 2,
            cache_bonus: 0.1,
            cached_experts,
            cached_experts_by_layer: vec![cached_experts],
            expert_cache_bytes: Some(cached_experts as u64),
            hit_rate: Some(hit_rate),
            belady_hit_rate: None,
            perplexity: 10.0 * (1.0 + perplexity_increase),
            perplexity_increase,
            perplexity_error: Some(0.0),
            gate_mass_kept: None,
            tokens_per_second,
            spread: 0.0,
            bytes_read_per_token: 1.0 - hit_rate,
        }
    }

    fn choose(rows: &[TuneRow], prefer: Prefer, most: f64) -> Option<Choice> {
        let all: Vec<usize> = (0..rows.len()).collect();
        Judge::new(rows).choose(rows, &all, prefer, most)
    }

    #[test]
    fn a_preference_decides_and_the_tolerance_holds() {
        let rows =
            [row(8, 0.5, 0.0, 90.0), row(8, 0.9, 0.02, 120.0), row(4, 0.4, 0.005, 80.0), row(8, 0.8, 0.004, 100.0)];
        let taken = |prefer, most| choose(&rows, prefer, most).map(|choice| choice.row);
        assert_eq!(taken(Prefer::Speed, 0.01), Some(3));
        assert_eq!(taken(Prefer::Speed, 0.1), Some(1));
        assert_eq!(taken(Prefer::Quality, 0.1), Some(0));
        assert_eq!(taken(Prefer::Memory, 0.1), Some(2));
        assert_eq!(taken(Prefer::Speed, -0.1), None);
    }

    #[test]
    fn the_fewest_bytes_do_not_win_against_tokens_per_second() {
        // What `tune --expert-cache 2MiB` once recommended: the fewest misses within the tolerance, at the fewest tokens/s.
        let rows = [row(7, 0.464, 0.0, 2602.0), row(7, 0.569, 0.0011, 770.0)];
        let choice = choose(&rows, Prefer::Speed, 0.01).unwrap();
        assert_eq!((choice.row, choice.of, choice.decided), (0, 2, Some((TokensPerSecond, 2))));
    }

    #[test]
    fn a_difference_within_the_spread_leaves_it_to_the_next_criterion() {
        let mut rows = [row(7, 0.4, 0.0, 1000.0), row(7, 0.6, 0.0, 960.0)];
        assert_eq!(choose(&rows, Prefer::Speed, 0.01).unwrap().row, 0);
        rows[0].spread = 0.05;
        rows[1].spread = 0.01;
        let choice = choose(&rows, Prefer::Speed, 0.01).unwrap();
        assert_eq!((choice.row, choice.decided, choice.equal_in), (1, Some((Misses, 2)), vec![TokensPerSecond]));
        // Runs of one setting that agree by luck prove nothing where the others' do not.
        (rows[0].spread, rows[1].spread) = (0.0, 0.05);
        assert_eq!(choose(&rows, Prefer::Speed, 0.01).unwrap().row, 1);
    }

    #[test]
    fn a_star_takes_more_than_noise() {
        let stars = |rows: &[TuneRow]| Judge::new(rows).front(rows);
        let mut rows = vec![row(8, 0.5, 0.0, 100.0), row(8, 0.5, 0.001, 101.0), row(8, 0.6, 0.002, 99.0)];
        assert_eq!(stars(&rows), [true, true, true]);
        rows.iter_mut().for_each(|row| (row.spread, row.perplexity_error) = (0.05, Some(0.01)));
        assert_eq!(stars(&rows), [false, false, true], "more hits, and all else is noise");
        let (small, large) = (row(4, 0.5, 0.0, 100.0), row(8, 0.7, 0.0, 100.0));
        assert_eq!(stars(&[small.clone(), large]), [true, true], "less memory, fewer misses");
        assert_eq!(stars(&[small.clone(), row(8, 0.4, 0.0, 100.0)]), [true, false]);
        assert_eq!(stars(&[small.clone(), small]), [true, true], "equals stay");
    }

    /// Few values of each, so that many rows are equal or close in one criterion and not in another.
    fn random_rows(random: &mut ChaCha8Rng) -> Vec<TuneRow> {
        let measured = random.random_bool(0.5);
        (0..random.random_range(1..12))
            .map(|_| {
                let hits = f64::from(random.random_range(0..4)) / 4.0;
                let increase = f64::from(random.random_range(-2..8)) / 400.0;
                let mut row = row(random.random_range(1..4), hits, increase, random.random_range(90.0..110.0));
                row.top_k = random.random_range(1..3);
                row.spread = random.random_range(0.0..0.1);
                row.perplexity_error = random.random_bool(0.9).then(|| random.random_range(0.0..0.01));
                row.expert_cache_bytes = row.expert_cache_bytes.filter(|_| measured);
                row
            })
            .collect()
    }

    #[test]
    fn the_row_taken_is_within_the_tolerance_and_loses_to_none() {
        let mut random = ChaCha8Rng::seed_from_u64(17);
        for _ in 0..3000 {
            let rows = random_rows(&mut random);
            let most = f64::from(random.random_range(-2..6)) / 400.0;
            let prefer = [Prefer::Speed, Prefer::Quality, Prefer::Memory][random.random_range(0..3)];
            let judge = Judge::new(&rows);
            let within: Vec<&TuneRow> = rows.iter().filter(|row| row.perplexity_increase <= most).collect();
            let Some(choice) = choose(&rows, prefer, most) else {
                assert!(within.is_empty());
                continue;
            };
            let taken = &rows[choice.row];
            assert!(taken.perplexity_increase <= most);
            let criteria = prefer.criteria(rows[0].expert_cache_bytes.is_some());
            // In the preferred order: of those that nothing leads so far, none leads it.
            let mut left = within.clone();
            for by in criteria {
                assert!(
                    !left.iter().any(|other| judge.leads(by, other, taken)),
                    "{prefer:?} {by:?} {taken:?} {rows:#?}"
                );
                let all = left.clone();
                left.retain(|row| !all.iter().any(|other| judge.leads(by, other, row)));
            }
            // And noise or not: none is as good in every figure and better in one.
            let dominates = |other: &&TuneRow| {
                criteria.iter().all(|by| by.value(other) >= by.value(taken))
                    && criteria.iter().any(|by| by.value(other) > by.value(taken))
            };
            assert!(!within.iter().any(dominates), "{prefer:?} {taken:?} {rows:#?}");
        }
    }
}
