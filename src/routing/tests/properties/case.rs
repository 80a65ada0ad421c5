//! Batches of any kind: a [`Case`] is a handful of numbers that shrink well, a [`Batch`] what they stand for.

use crate::routing::{GroupLimit, GroupScore, Profile, Rounding, ScoreFunction, Shares};
use crate::{
    Assignment, Capacity, CapacityRule, Logits, Placement, RouteContext, RouteRequest, RouteState, Router, Scores,
    Scoring,
};
use proptest::prelude::*;
use proptest::sample::select;

/// What the logits look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Smooth, some experts more popular than others.
    Skewed,
    /// Whole numbers from −2 to 2: ties everywhere.
    Ties,
    /// All zero.
    Flat,
    /// Every row the same.
    SameRows,
    /// Every token wants the same few experts.
    SameFew,
    /// Values at the ends of what `f32` holds, and denormals.
    Extreme,
}

/// Which experts are masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masks {
    None,
    /// So many of a hundred pairs.
    Percent(u8),
    /// Everything for a third of the tokens, a third of the rest.
    Rows,
    /// All but one to three neighbouring experts.
    Bands,
}

/// How much room there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Room {
    Unlimited,
    /// None anywhere.
    Zero,
    /// Anything from nothing to twice the fair share.
    Random,
    /// The same with nothing for half of the pools.
    ZeroSome,
    /// In one pool alone.
    One,
    /// In random parts that sum to the slots, plus this.
    Just(i8),
    /// More than there are tokens.
    Plenty,
    /// A quarter of what is asked for.
    Scarce,
    /// By a rule; weights of pools follow the profile (experts) or rise (devices).
    Rule {
        profile: Profile,
        rounding: Rounding,
        percent: u16,
    },
}

/// Where the limits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pools {
    Experts,
    /// So many devices with neighbouring experts.
    Contiguous(u8),
    /// So many devices, each expert on any of them; some may have none.
    Scattered(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    None,
    /// So many of a hundred tokens.
    Percent(u8),
    /// The last half.
    Tail,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    None,
    /// Smooth, up to this size.
    Upto(f32),
    /// Whole multiples of a quarter.
    Steps,
}

/// A batch in few words.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub tokens: usize,
    pub experts: usize,
    /// Clamped to the experts.
    pub top_k: usize,
    pub seed: u64,
    pub gate: Gate,
    pub masks: Masks,
    pub sigmoid: bool,
    pub normalize: bool,
    pub scale: f32,
    /// Groups and top groups; taken where they divide the experts.
    pub groups: Option<(usize, usize, GroupScore)>,
    pub bias: Bias,
    pub room: Room,
    pub pools: Pools,
    pub padding: Padding,
}

/// The batch itself.
pub struct Batch {
    pub values: Vec<f32>,
    pub scores: Scores,
    pub capacity: Capacity,
    pub top_k: usize,
    pub padding: Option<Vec<bool>>,
    pub token_ids: Vec<u32>,
}

/// SplitMix64's mix of a few numbers: a value of its own for every place of every case.
pub fn noise(seed: u64, parts: [u64; 3]) -> u64 {
    parts.iter().fold(seed, |state, part| {
        let mixed = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

/// The same as a number in `[0, 1)`.
pub fn unit(seed: u64, parts: [u64; 3]) -> f32 {
    (noise(seed, parts) >> 40) as f32 / (1u64 << 24) as f32
}

impl Case {
    /// The same case at most this large.
    pub fn at_most(self, tokens: usize, experts: usize) -> Self {
        Self { tokens: self.tokens.min(tokens), experts: self.experts.min(experts), ..self }
    }

    pub fn top_k(&self) -> usize {
        self.top_k.clamp(1, self.experts)
    }

    fn logit(&self, token: usize, expert: usize) -> f32 {
        let at = |what: u64| [what, token as u64, expert as u64];
        let smooth = unit(self.seed, at(1)) + unit(self.seed, at(2)) + unit(self.seed, at(3)) - 1.5;
        let popular = 6.0 * unit(self.seed, [4, 0, expert as u64]).powi(3);
        match self.gate {
            Gate::Skewed => 2.0 * smooth + popular,
            Gate::Ties => (noise(self.seed, at(5)) % 5) as f32 - 2.0,
            Gate::Flat => 0.0,
            Gate::SameRows => popular,
            Gate::SameFew if expert < self.top_k() => 9.0 + smooth,
            Gate::SameFew => smooth,
            Gate::Extreme => {
                let values = [f32::MAX, f32::MIN, 1e-40, -1e-40, 0.0, -0.0, 88.0, -104.0, 1.0];
                values[(noise(self.seed, at(6)) % values.len() as u64) as usize]
            }
        }
    }

    fn masked(&self, token: usize, expert: usize) -> bool {
        let percent = |what: u64, expert: usize| noise(self.seed, [what, token as u64, expert as u64]) % 100;
        match self.masks {
            Masks::None => false,
            Masks::Percent(share) => percent(7, expert) < u64::from(share),
            Masks::Rows => percent(8, 0) < 33 || percent(9, expert) < 33,
            Masks::Bands => {
                let first = noise(self.seed, [10, token as u64, 0]) as usize % self.experts;
                let width = 1 + noise(self.seed, [11, token as u64, 0]) as usize % 3;
                (expert + self.experts - first) % self.experts >= width
            }
        }
    }

    pub fn scoring(&self) -> Scoring {
        let fits = |&(groups, top_groups, _): &(usize, usize, GroupScore)| {
            self.experts.is_multiple_of(groups) && top_groups <= groups
        };
        let limit = |(groups, top_groups, score)| GroupLimit { groups, top_groups, score };
        Scoring {
            function: match self.sigmoid {
                true => ScoreFunction::Sigmoid,
                // Where what is aimed at is not what counts in any case.
                false if self.bias != Bias::None && noise(self.seed, [15, 0, 0]).is_multiple_of(2) => {
                    ScoreFunction::SparseMixer { jitter: 0.3 * unit(self.seed, [16, 0, 0]) }
                }
                false => ScoreFunction::Softmax,
            },
            normalize: self.normalize,
            scale: self.scale,
            groups: self.groups.filter(fits).map(limit),
        }
    }

    pub fn bias(&self) -> Option<Vec<f32>> {
        let draw = |expert: u64| match self.bias {
            Bias::Upto(most) => most * (2.0 * unit(self.seed, [12, expert, 0]) - 1.0),
            _ => (noise(self.seed, [12, expert, 0]) % 5) as f32 * 0.25 - 0.5,
        };
        (self.bias != Bias::None).then(|| (0..self.experts as u64).map(draw).collect())
    }

    pub fn values(&self) -> Vec<f32> {
        let value = |at: usize| {
            let (token, expert) = (at / self.experts, at % self.experts);
            if self.masked(token, expert) { f32::NEG_INFINITY } else { self.logit(token, expert) }
        };
        (0..self.tokens * self.experts).map(value).collect()
    }

    fn placement(&self) -> Option<Placement> {
        match self.pools {
            Pools::Experts => None,
            Pools::Contiguous(devices) => {
                Some(Placement::contiguous(self.experts, usize::from(devices).min(self.experts)).unwrap())
            }
            Pools::Scattered(devices) => {
                let device = |expert: u64| (noise(self.seed, [13, expert, 0]) % u64::from(devices)) as u16;
                let device_of = (0..self.experts as u64).map(device).collect();
                Some(Placement::new(device_of, usize::from(devices)).unwrap())
            }
        }
    }

    fn limits(&self, pools: usize, live: usize) -> Vec<u32> {
        let slots = live * self.top_k();
        let fair = slots.div_ceil(pools);
        let draw =
            |what: u64, pool: usize, below: usize| (noise(self.seed, [what, pool as u64, 0]) % below as u64) as u32;
        match self.room {
            Room::Unlimited | Room::Rule { .. } => unreachable!("made without limits"),
            Room::Zero => vec![0; pools],
            Room::Random => (0..pools).map(|pool| draw(14, pool, 2 * fair + 2)).collect(),
            Room::ZeroSome => {
                let some = |pool| if draw(15, pool, 2) == 0 { 0 } else { draw(14, pool, 3 * fair + 2) };
                (0..pools).map(some).collect()
            }
            Room::One => {
                let mut limits = vec![0; pools];
                limits[draw(16, 0, pools) as usize] = draw(17, 0, 2 * slots + 2);
                limits
            }
            Room::Just(more) => {
                let total = (slots as i64 + i64::from(more)).max(0) as usize;
                let mut cuts: Vec<u32> = (1..pools).map(|cut| draw(18, cut, total + 1)).collect();
                cuts.extend([0, total as u32]);
                cuts.sort_unstable();
                cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
            }
            Room::Plenty => (0..pools).map(|pool| [slots as u32 + 1, u32::MAX][draw(19, pool, 2) as usize]).collect(),
            Room::Scarce => (0..pools).map(|pool| draw(20, pool, fair / 2 + 2)).collect(),
        }
    }

    fn capacity(&self, live: usize) -> Capacity {
        let (experts, placement) = (self.experts, self.placement());
        match self.room {
            Room::Unlimited => Capacity::unlimited(experts).unwrap(),
            Room::Rule { profile, rounding, percent } => {
                let shares = match &placement {
                    None => Shares::PerExpert { profile, seed: self.seed },
                    Some(placement) => {
                        let speeds = (1..=placement.devices()).map(|device| 1.0 + device as f64).collect();
                        Shares::Placed { placements: vec![placement.clone()], speeds }
                    }
                };
                let rule = CapacityRule::new(f64::from(percent) / 100.0, shares)
                    .with_rounding(rounding)
                    .with_minimum_mean(0.0);
                rule.capacity(live, experts, self.top_k()).unwrap()
            }
            _ => match placement {
                None => Capacity::per_expert(self.limits(experts, live)).unwrap(),
                Some(placement) => {
                    let limits = self.limits(placement.devices(), live);
                    Capacity::per_device(placement, limits).unwrap()
                }
            },
        }
    }

    pub fn batch(&self) -> Batch {
        let pads = |token: usize| match self.padding {
            Padding::None => false,
            Padding::Percent(share) => noise(self.seed, [21, token as u64, 0]) % 100 < u64::from(share),
            Padding::Tail => token >= self.tokens / 2,
            Padding::All => true,
        };
        let padding: Option<Vec<bool>> = (self.padding != Padding::None).then(|| (0..self.tokens).map(pads).collect());
        let live = (0..self.tokens).filter(|&token| !pads(token)).count();
        let values = self.values();
        let logits = Logits::new(&values, self.tokens, self.experts).unwrap();
        let scores = self.scoring().scores(&logits, self.bias().as_deref()).unwrap();
        let token_ids = (0..self.tokens as u64).map(|token| (noise(self.seed, [22, token, 0]) % 50) as u32).collect();
        Batch { scores, values, capacity: self.capacity(live), top_k: self.top_k(), padding, token_ids }
    }
}

impl Batch {
    pub fn request(&self) -> RouteRequest<'_> {
        let layer = self.token_ids.len() % 3;
        let token_ids = (layer == 1).then_some(self.token_ids.as_slice());
        let context = RouteContext { layer, token_ids, padding: self.padding.as_deref(), ..RouteContext::default() };
        RouteRequest::new(&self.scores, self.top_k, &self.capacity, context).unwrap()
    }
}

/// Routes from a cold start.
pub fn cold(router: &dyn Router, request: &RouteRequest<'_>) -> Assignment {
    router.route(request, &mut RouteState::default()).unwrap()
}

/// Ids and the bits of the weights.
pub fn bits(assignment: &Assignment) -> (Vec<i32>, Vec<u32>) {
    (assignment.ids().collect(), assignment.weights().iter().map(|weight| weight.to_bits()).collect())
}

fn rooms() -> impl Strategy<Value = Room> {
    let rule = (select(&Profile::ALL[..]), select(vec![Rounding::Exact, Rounding::Ceil]), 20u16..250)
        .prop_map(|(profile, rounding, percent)| Room::Rule { profile, rounding, percent });
    let fixed = |room| Just(room).boxed();
    prop_oneof![
        4 => fixed(Room::Random),
        2 => fixed(Room::ZeroSome),
        3 => (-2i8..3).prop_map(Room::Just),
        2 => fixed(Room::Scarce),
        1 => fixed(Room::Plenty),
        1 => fixed(Room::One),
        1 => fixed(Room::Zero),
        1 => fixed(Room::Unlimited),
        4 => rule,
    ]
}

fn gates() -> impl Strategy<Value = Gate> {
    prop_oneof![
        6 => Just(Gate::Skewed),
        3 => Just(Gate::Ties),
        1 => Just(Gate::Flat),
        1 => Just(Gate::SameRows),
        2 => Just(Gate::SameFew),
        1 => Just(Gate::Extreme),
    ]
}

/// Cases of any kind; most are small, some have 300 tokens or 130 experts.
pub fn cases() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![5 => 0usize..13, 5 => 13usize..65, 2 => 65usize..301];
    let experts = prop_oneof![5 => 1usize..9, 5 => 9usize..33, 2 => 33usize..131];
    let top_k = prop_oneof![6 => 1usize..5, 3 => 1usize..13, 1 => 1usize..131];
    let shape = (tokens, experts, top_k, any::<u64>());
    let masks = prop_oneof![
        6 => Just(Masks::None),
        3 => (5u8..95).prop_map(Masks::Percent),
        1 => Just(Masks::Rows),
        1 => Just(Masks::Bands),
    ];
    let score = select(vec![GroupScore::Max, GroupScore::TopTwo]);
    let groups = (select(vec![2usize, 3, 4, 8]), 1usize..4, score);
    let scale = select(vec![1.0f32, 1.0, 2.5, 0.5, 1e-3, -1.0, 0.0]);
    let bias = prop_oneof![
        6 => Just(Bias::None),
        2 => (0.01f32..1.0).prop_map(Bias::Upto),
        1 => Just(Bias::Upto(1000.0)),
        1 => Just(Bias::Steps),
    ];
    let scoring = (any::<bool>(), any::<bool>(), scale, prop::option::weighted(0.25, groups), bias);
    let pools = prop_oneof![
        4 => Just(Pools::Experts),
        2 => (1u8..9).prop_map(Pools::Contiguous),
        2 => (1u8..9).prop_map(Pools::Scattered),
    ];
    let padding = prop_oneof![
        5 => Just(Padding::None),
        2 => (5u8..60).prop_map(Padding::Percent),
        1 => Just(Padding::Tail),
        1 => Just(Padding::All),
    ];
    (shape, gates(), masks, scoring, rooms(), pools, padding).prop_map(
        |(
            (tokens, experts, top_k, seed),
            gate,
            masks,
            (sigmoid, normalize, scale, groups, bias),
            room,
            pools,
            padding,
        )| Case {
            tokens,
            experts,
            top_k,
            seed,
            gate,
            masks,
            sigmoid,
            normalize,
            scale,
            groups,
            bias,
            room,
            pools,
            padding,
        },
    )
}
