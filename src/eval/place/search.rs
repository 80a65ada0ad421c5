//! The search for a placement of one layer: pairs of experts on different devices change places while that lowers
//!
//! ```text
//! cost = devices that a token's experts are on, mean over tokens  ×  crowding  ×  (1 + slots over)
//! crowding = (mean over kinds and devices of r^16)^(1/16),  r = share of the kind's slots / share of the speed
//! slots over = those beyond a device's share, of all slots of a kind, mean over kinds
//! ```
//!
//! so that one percent of each counts the same. The power mean stands for the largest `r`, what the fullest device takes longer, and unlike it
//! sees the others too; slots over its share are those that a router within limits has to move.
//! The first factor is what hypergraph partitioning calls connectivity, a token being a net of its experts (Çatalyürek, Aykanat 1999). Exchanges of
//! pairs, which keep the sizes of the parts, are Kernighan and Lin's (1970); that gains are kept in tables and mended net by net is Fiduccia and
//! Mattheyses' (1982). Every expert in turn takes the best exchange that there is, until none has any: a local optimum, no more.
//!
//! One round looks at `experts²` pairs, each in `kinds` steps; an exchange mends the tables of its tokens in `top_k²` steps each.
//!
//! Knows nothing of scores or routers.

/// What tokens use, and how fast devices are.
pub(super) struct Uses<'a> {
    pub(super) experts: usize,
    /// Experts of each token, `[tokens, top_k]`; what is no expert is no slot.
    pub(super) chosen: &'a [u16],
    pub(super) top_k: usize,
    /// Of each token which kind of text it is of.
    pub(super) kinds: &'a [usize],
    /// Relative speeds of the devices.
    pub(super) speeds: &'a [f64],
}

/// The power of the mean that stands for the largest.
const POWER: i32 = 16;

/// An exchange is one that lowers the logarithm of the cost by this much: less is rounding.
const LEAST_GAIN: f64 = 1e-9;

impl Uses<'_> {
    /// Slots of each expert, all kinds together.
    pub(super) fn slots(&self) -> Vec<f64> {
        let mut slots = vec![0.0; self.experts];
        self.chosen
            .iter()
            .for_each(|&expert| slots.get_mut(usize::from(expert)).into_iter().for_each(|sum| *sum += 1.0));
        slots
    }

    /// The best of what exchanges make of some placements, the first one where several are.
    pub(super) fn best(&self, starts: impl IntoIterator<Item = Vec<u16>>) -> Vec<u16> {
        let ended = starts.into_iter().map(|start| {
            let mut search = Search::new(self, start);
            while search.round() {}
            (search.cost(), search.device_of)
        });
        ended.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, device_of)| device_of).unwrap_or_default()
    }
}

/// What ratios come to: sums over kinds and devices.
#[derive(Clone, Copy, Debug, Default)]
struct Crowding {
    /// Of their powers.
    powers: f64,
    /// Of the slots above a device's share, as shares of the kind's.
    over: f64,
}

impl Crowding {
    fn of(ratio: f64, slowness: f64) -> Self {
        Self { powers: ratio.powi(POWER), over: f64::max(ratio - 1.0, 0.0) / slowness }
    }

    fn plus(self, other: Self, sign: f64) -> Self {
        Self { powers: self.powers + sign * other.powers, over: self.over + sign * other.over }
    }
}

/// A placement, and what every exchange would change.
struct Search<'a> {
    uses: &'a Uses<'a>,
    device_of: Vec<u16>,
    /// The tokens of expert `e` are `tokens[starts[e]..starts[e + 1]]`.
    starts: Vec<usize>,
    tokens: Vec<u32>,
    /// `[experts, experts]`: tokens with both experts of which the first is alone on its device; with itself, all where it is alone.
    alone: Vec<u32>,
    /// `[experts, devices]`: tokens of the expert that have an expert on the device.
    beside: Vec<u32>,
    /// Pairs of a token and a device that has experts of it.
    pairs: i64,
    /// `[experts, kinds]`: share of the kind's slots.
    share: Vec<f64>,
    /// `[devices, kinds]`: the same of a device, over its share of the speed.
    ratio: Vec<f64>,
    /// One over a device's share of the speed.
    slowness: Vec<f64>,
    kinds: usize,
    /// What all ratios come to.
    crowding: Crowding,
}

impl<'a> Search<'a> {
    fn new(uses: &'a Uses<'a>, device_of: Vec<u16>) -> Self {
        let (experts, devices) = (uses.experts, uses.speeds.len());
        let kinds = uses.kinds.iter().max().map_or(1, |last| last + 1);
        let (mut starts, mut share, mut of_kind) = (vec![0; experts + 1], vec![0.0; experts * kinds], vec![0.0; kinds]);
        let slots = || uses.chosen.iter().enumerate().filter(|(_, expert)| usize::from(**expert) < experts);
        for (at, &expert) in slots() {
            let (expert, kind) = (usize::from(expert), uses.kinds[at / uses.top_k]);
            starts[expert + 1] += 1;
            share[expert * kinds + kind] += 1.0;
            of_kind[kind] += 1.0;
        }
        (1..=experts).for_each(|expert| starts[expert] += starts[expert - 1]);
        share.iter_mut().enumerate().for_each(|(at, share)| *share /= f64::max(of_kind[at % kinds], 1.0));
        let (mut next, mut tokens) = (starts.clone(), vec![0; starts[experts]]);
        for (at, &expert) in slots() {
            let next = &mut next[usize::from(expert)];
            tokens[*next] = (at / uses.top_k) as u32;
            *next += 1;
        }
        let speed: f64 = uses.speeds.iter().sum();
        let slowness: Vec<f64> = uses.speeds.iter().map(|own| speed / own).collect();
        let mut ratio = vec![0.0; devices * kinds];
        for (expert, &device) in device_of.iter().enumerate() {
            let device = usize::from(device);
            for kind in 0..kinds {
                ratio[device * kinds + kind] += share[expert * kinds + kind] * slowness[device];
            }
        }
        let (alone, beside) = (vec![0; experts * experts], vec![0; experts * devices]);
        let mut search = Self {
            uses,
            device_of,
            starts,
            tokens,
            alone,
            beside,
            pairs: 0,
            share,
            ratio,
            slowness,
            kinds,
            crowding: Crowding::default(),
        };
        search.crowding = search.crowding_now();
        (0..uses.kinds.len()).for_each(|token| search.count(token, true));
        search
    }

    /// Puts a token into the tables of gains, or takes it out.
    fn count(&mut self, token: usize, comes: bool) {
        let (experts, devices) = (self.uses.experts, self.uses.speeds.len());
        let change = |sum: &mut u32| *sum = if comes { *sum + 1 } else { *sum - 1 };
        let slots = &self.uses.chosen[token * self.uses.top_k..][..self.uses.top_k];
        let own = || slots.iter().map(|&expert| usize::from(expert)).filter(|&expert| expert < experts).enumerate();
        for (at, expert) in own() {
            let device = self.device_of[expert];
            if own().all(|(_, other)| other == expert || self.device_of[other] != device) {
                own().for_each(|(_, other)| change(&mut self.alone[expert * experts + other]));
            }
            if own().all(|(before, other)| before >= at || self.device_of[other] != device) {
                self.pairs += if comes { 1 } else { -1 };
                own().for_each(|(_, other)| change(&mut self.beside[other * devices + usize::from(device)]));
            }
        }
    }

    /// The logarithm of the cost, but for what no exchange changes.
    fn cost(&self) -> f64 {
        self.cost_of(self.pairs, self.crowding)
    }

    fn cost_of(&self, pairs: i64, crowding: Crowding) -> f64 {
        let power_mean = crowding.powers.max(f64::MIN_POSITIVE).ln() / f64::from(POWER);
        (pairs.max(1) as f64).ln() + power_mean + (1.0 + crowding.over / self.kinds as f64).ln()
    }

    fn crowding_now(&self) -> Crowding {
        let all = self.ratio.iter().enumerate();
        all.map(|(at, &ratio)| Crowding::of(ratio, self.slowness[at / self.kinds]))
            .fold(Crowding::default(), |sum, own| sum.plus(own, 1.0))
    }

    /// What pairs and crowding are once two experts have changed places.
    fn after(&self, a: usize, b: usize) -> (i64, Crowding) {
        let (experts, devices, kinds) = (self.uses.experts, self.uses.speeds.len(), self.kinds);
        let (from, to) = (usize::from(self.device_of[a]), usize::from(self.device_of[b]));
        // Its tokens leave the device where it is alone there, and come to the other one where they have nothing yet.
        let saved = |expert: usize, to: usize| {
            let tokens = (self.starts[expert + 1] - self.starts[expert]) as i64;
            i64::from(self.alone[expert * experts + expert]) - tokens + i64::from(self.beside[expert * devices + to])
        };
        // To a token that has both nothing happens.
        let both = i64::from(self.alone[a * experts + b]) + i64::from(self.alone[b * experts + a]);
        let pairs = self.pairs - saved(a, to) - saved(b, from) + both;
        let mut crowding = self.crowding;
        for kind in 0..kinds {
            let moved = self.share[a * kinds + kind] - self.share[b * kinds + kind];
            for (device, sign) in [(from, -1.0), (to, 1.0)] {
                let ratio = self.ratio[device * kinds + kind];
                let slowness = self.slowness[device];
                let moved = Crowding::of(ratio + sign * moved * slowness, slowness);
                crowding = crowding.plus(moved, 1.0).plus(Crowding::of(ratio, slowness), -1.0);
            }
        }
        (pairs, crowding)
    }

    fn exchange(&mut self, a: usize, b: usize) {
        let (from, to) = (self.device_of[a], self.device_of[b]);
        let of =
            |search: &Self, expert: usize| search.tokens[search.starts[expert]..search.starts[expert + 1]].to_vec();
        let (mut tokens, of_b) = (of(self, a), of(self, b));
        tokens.extend(of_b);
        tokens.sort_unstable();
        tokens.dedup();
        tokens.iter().for_each(|&token| self.count(token as usize, false));
        (self.device_of[a], self.device_of[b]) = (to, from);
        tokens.iter().for_each(|&token| self.count(token as usize, true));
        for kind in 0..self.kinds {
            let moved = self.share[a * self.kinds + kind] - self.share[b * self.kinds + kind];
            for (device, sign) in [(usize::from(from), -1.0), (usize::from(to), 1.0)] {
                self.ratio[device * self.kinds + kind] += sign * moved * self.slowness[device];
            }
        }
        self.crowding = self.crowding_now();
    }

    /// Has every expert in turn take its best exchange; true where some did.
    fn round(&mut self) -> bool {
        let mut any = false;
        for a in 0..self.uses.experts {
            let others = (0..self.uses.experts).filter(|&b| self.device_of[b] != self.device_of[a]);
            let costs = others.map(|b| {
                let (pairs, crowding) = self.after(a, b);
                (self.cost_of(pairs, crowding), b)
            });
            match costs.min_by(|x, y| x.0.total_cmp(&y.0)) {
                Some((cost, b)) if cost < self.cost() - LEAST_GAIN => {
                    self.exchange(a, b);
                    any = true;
                }
                _ => {}
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::stream::Stream;
    use proptest::prelude::*;

    /// Tokens that use experts of one of `groups` groups, which are scattered over the numbers of experts.
    fn grouped(experts: usize, top_k: usize, groups: usize, tokens: usize) -> Vec<u16> {
        let mut numbers: Vec<u16> = (0..experts as u16).collect();
        Stream::new(1, 2).shuffle(&mut numbers);
        let size = experts / groups;
        let token = |token: usize| {
            let mut group = numbers[token % groups * size..][..size].to_vec();
            Stream::new(3, token as u64).shuffle(&mut group);
            group.truncate(top_k);
            group
        };
        (0..tokens).flat_map(token).collect()
    }

    #[test]
    fn what_is_used_together_ends_together() {
        let chosen = grouped(32, 4, 4, 2000);
        let uses = Uses { experts: 32, chosen: &chosen, top_k: 4, kinds: &[0; 2000], speeds: &[1.0; 4] };
        let start: Vec<u16> = (0..32).map(|expert| expert / 8).collect();
        assert!(Search::new(&uses, start.clone()).pairs > 2 * 2000);
        let placed = uses.best([start]);
        assert_eq!(Search::new(&uses, placed.clone()).pairs, 2000, "one device a token");
        assert!((0..4).all(|device| placed.iter().filter(|&&of| of == device).count() == 8));
    }

    #[test]
    fn the_worst_kind_counts() {
        // Of two kinds each uses its own half of the experts: however tokens go together, each kind must be spread over both devices.
        let chosen: Vec<u16> =
            (0..4000u16).flat_map(|token| [0, 1].map(|slot| (token % 2) * 4 + (token / 2 + slot) % 4)).collect();
        let kinds: Vec<usize> = (0..4000).map(|token| token % 2).collect();
        let uses = Uses { experts: 8, chosen: &chosen, top_k: 2, kinds: &kinds, speeds: &[1.0; 2] };
        let search = Search::new(&uses, uses.best([vec![0, 0, 0, 0, 1, 1, 1, 1]]));
        assert!(search.ratio.iter().all(|ratio| (ratio - 1.0).abs() < 0.01), "{:?}", search.ratio);
        // Taken for one kind, they stay apart.
        let blind = Uses { kinds: &[0; 4000], ..uses };
        assert_eq!(Search::new(&blind, blind.best([vec![0, 0, 0, 0, 1, 1, 1, 1]])).pairs, 4000);
    }

    proptest! {
        #[test]
        fn tables_tell_what_an_exchange_does(seed in 0u64..1000, top_k in 1usize..5, devices in 2usize..5, kinds in 1usize..4) {
            let (experts, tokens, mut draw) = (9, 60, Stream::new(seed, 1));
            let chosen: Vec<u16> = (0..tokens).flat_map(|_| {
                let mut experts: Vec<u16> = (0..9).collect();
                draw.shuffle(&mut experts);
                experts.truncate(top_k);
                // One that is no expert: a slot that a token has not got.
                if draw.below(9) == 0 { experts[0] = u16::MAX }
                experts
            }).collect();
            let kinds: Vec<usize> = (0..tokens).map(|token| token % kinds).collect();
            let speeds: Vec<f64> = (0..devices).map(|device| 1.0 + device as f64).collect();
            let uses = Uses { experts, chosen: &chosen, top_k, kinds: &kinds, speeds: &speeds };
            let start: Vec<u16> = (0..experts).map(|expert| (expert % devices) as u16).collect();
            let mut search = Search::new(&uses, start);
            for _ in 0..20 {
                let (a, b) = (draw.below(9) as usize, draw.below(9) as usize);
                if search.device_of[a] == search.device_of[b] {
                    continue;
                }
                let (pairs, after) = search.after(a, b);
                search.exchange(a, b);
                let fresh = Search::new(&uses, search.device_of.clone());
                prop_assert_eq!((pairs, search.pairs), (fresh.pairs, fresh.pairs));
                for crowding in [after, search.crowding] {
                    prop_assert!((crowding.powers / fresh.crowding.powers - 1.0).abs() < 1e-9);
                    prop_assert!((crowding.over - fresh.crowding.over).abs() < 1e-9);
                }
                prop_assert!(search.alone == fresh.alone && search.beside == fresh.beside);
            }
        }
    }
}
