//! What a router did with one layer, batch by batch: loads, room, prices, masses, and what became of the tokens that are shown.
//!
//! Knows nothing of commands or of text.

use phase_moe::{Assignment, ExpertSet, Result, RouteRequest, RouteState, Router, TopK};
use serde::Serialize;

/// Sums over batches; lists are per expert, or per pool (an expert or a device).
#[derive(Default, Serialize)]
pub struct LayerSeen {
    /// Slots that the gate's own choice asks for, and that were kept.
    demand: Vec<u64>,
    loads: Vec<u64>,
    /// Room of each pool; what a batch without limits asked for counts as its room.
    room: Option<Vec<u64>>,
    /// Each expert's pool.
    pool_of: Option<Vec<usize>>,
    /// Mean over the batches that had some.
    prices: Option<Vec<f64>>,
    slots: u64,
    kept: u64,
    kept_mass: f64,
    top_k_mass: f64,
    /// The most gate mass that any router could have kept; `None` where that is not known of every batch.
    bound: Option<f64>,
    #[serde(skip)]
    tokens: u64,
    #[serde(skip)]
    batches: u64,
    #[serde(skip)]
    priced: u64,
}

/// What became of shown tokens in one layer, in their order.
#[derive(Default, Serialize)]
pub struct Words {
    /// A character a token: `=` as the gate chose, `~` got another expert, `-` lost a slot, `x` got no expert.
    fate: String,
    /// `top_k` ids a token, −1 where dropped.
    experts: Vec<i32>,
    /// How many of its experts were not in fast memory, 0 to 9, then a to z; `None` where no account is kept of one.
    misses: Option<String>,
}

/// One batch of one layer, and what a router made of it.
#[derive(Clone, Copy)]
pub struct Answered<'a> {
    pub request: &'a RouteRequest<'a>,
    pub assignment: &'a Assignment,
    /// Per pool; empty where the router has none.
    pub prices: &'a [f32],
    /// On the gate mass of this batch.
    pub bound: Option<f64>,
}

impl Answered<'_> {
    /// What the gate would choose without a limit.
    pub fn choice(&self) -> Result<Assignment> {
        TopK { drop: None }.route(self.request, &mut RouteState::default())
    }

    fn mass(&self, assignment: &Assignment) -> f64 {
        let scores = self.request.scores();
        let of = |token| {
            let gate = scores.gate(token);
            assignment.slots(token).map(move |(expert, _)| f64::from(gate[expert.index()])).sum::<f64>()
        };
        (0..scores.tokens()).map(of).sum()
    }
}

fn add(sums: &mut Vec<u64>, values: impl ExactSizeIterator<Item = u64>) {
    sums.resize(values.len(), 0);
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

impl LayerSeen {
    /// Adds a batch whose gate would have made this `choice`.
    pub fn add(&mut self, answered: &Answered<'_>, choice: &Assignment) {
        let Answered { request, assignment, prices, bound } = *answered;
        let (capacity, demand) = (request.capacity(), choice.load());
        let (kept_mass, top_k_mass) = (answered.mass(assignment), answered.mass(choice));
        add(&mut self.demand, demand.iter().map(|&load| load.into()));
        add(&mut self.loads, assignment.load().iter().map(|&load| load.into()));
        self.slots += request.live_tokens() as u64 * request.top_k() as u64;
        self.tokens += request.live_tokens() as u64;
        self.kept += assignment.kept() as u64;
        (self.kept_mass, self.top_k_mass) = (self.kept_mass + kept_mass, self.top_k_mass + top_k_mass);
        let bound = if capacity.limits().is_none() { Some(top_k_mass.max(kept_mass)) } else { bound };
        self.bound = match (self.batches, self.bound, bound) {
            (0, _, bound) => bound,
            (_, Some(sum), Some(bound)) => Some(sum + bound),
            _ => None,
        };
        self.batches += 1;
        if let Some(limits) = capacity.limits() {
            let pools: Vec<usize> = (0..demand.len()).map(|expert| capacity.pool_of(expert as u16)).collect();
            add(self.room.get_or_insert_default(), limits.iter().map(|&limit| limit.into()));
            self.pool_of = Some(pools);
        } else if let (Some(room), Some(pool_of)) = (&mut self.room, &self.pool_of) {
            pool_of.iter().zip(&demand).for_each(|(&pool, &demand)| room[pool] += u64::from(demand));
        }
        // Prices of a batch without limits are those of one before it.
        if capacity.limits().is_some_and(|limits| limits.len() == prices.len()) {
            let means = self.prices.get_or_insert_with(|| vec![0.0; prices.len()]);
            self.priced += 1;
            let share = 1.0 / self.priced as f64;
            means.iter_mut().zip(prices).for_each(|(mean, &price)| *mean += (f64::from(price) - *mean) * share);
        }
    }

    /// Tokens of all batches, padding not among them.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }
}

impl Words {
    /// Adds the tokens in these rows of a batch.
    pub fn add(
        &mut self,
        answered: &Answered<'_>,
        choice: &Assignment,
        rows: impl Iterator<Item = usize>,
        resident: Option<&ExpertSet>,
    ) {
        let (assignment, top_k) = (answered.assignment, answered.request.top_k());
        for row in rows {
            let sorted = |assignment: &Assignment| {
                let mut ids: Vec<usize> = assignment.slots(row).map(|(expert, _)| expert.index()).collect();
                ids.sort_unstable();
                ids
            };
            let (got, wanted) = (sorted(assignment), sorted(choice));
            self.fate.push(match got.len() {
                0 => 'x',
                few if few < wanted.len() => '-',
                _ if got != wanted => '~',
                _ => '=',
            });
            let ids = assignment.slots(row).map(|(expert, _)| expert.index() as i32);
            self.experts.extend(ids.chain(std::iter::repeat(-1)).take(top_k));
            if let Some(resident) = resident {
                let missed = assignment.slots(row).filter(|&(expert, _)| !resident.contains(expert)).count() as u32;
                self.misses.get_or_insert_default().extend(char::from_digit(missed.min(35), 36));
            }
        }
    }

    pub fn len(&self) -> usize {
        self.fate.len()
    }
}

#[cfg(test)]
mod tests {
    use phase_moe::routing::DropRule;
    use phase_moe::{Capacity, ExpertId, Logits, RouteContext, Scoring};

    use super::*;

    #[test]
    fn sums_and_fates_are_those_of_the_batch() {
        // Three tokens, all of whom want expert 0 and then 1, 2, 3; room for two slots in each.
        let logits = [3.0, 2.0, 0.0, -1.0, 3.0, 0.0, 2.0, -1.0, 2.5, 0.0, -1.0, 2.0];
        let scores = Scoring::softmax().scores(&Logits::new(&logits, 3, 4).unwrap(), None).unwrap();
        let (limited, free) = (Capacity::per_expert(vec![2; 4]).unwrap(), Capacity::unlimited(4).unwrap());
        let (mut layer, mut words) = (LayerSeen::default(), Words::default());
        let mut resident = ExpertSet::new(4).unwrap();
        resident.insert(ExpertId::new(0, 4).unwrap());
        for (capacity, bound) in [(&limited, Some(9.0)), (&free, None)] {
            let request = RouteRequest::new(&scores, 2, capacity, RouteContext::default()).unwrap();
            let router = TopK { drop: capacity.limits().map(|_| DropRule::Arrival) };
            let assignment = router.route(&request, &mut RouteState::default()).unwrap();
            let prices = if bound.is_some() { vec![0.5, 0.0, 0.0, 0.0] } else { Vec::new() };
            let answered = Answered { request: &request, assignment: &assignment, prices: &prices, bound };
            let choice = answered.choice().unwrap();
            layer.add(&answered, &choice);
            words.add(&answered, &choice, 0..3, Some(&resident));
        }
        assert_eq!((layer.slots, layer.kept), (12, 11));
        assert_eq!((layer.demand.as_slice(), layer.loads.as_slice()), (&[6, 2, 2, 2][..], &[5, 2, 2, 2][..]));
        assert_eq!(layer.room, Some(vec![5, 3, 3, 3]));
        assert_eq!(layer.prices, Some(vec![0.5, 0.0, 0.0, 0.0]));
        assert!(layer.kept_mass < layer.top_k_mass);
        assert_eq!(layer.bound, Some(9.0 + layer.top_k_mass / 2.0));
        assert_eq!((words.fate.as_str(), words.misses.as_deref()), ("==-===", Some("111111")));
        assert_eq!(words.experts, [0, 1, 0, 2, 3, -1, 0, 1, 0, 2, 0, 3]);
    }
}
