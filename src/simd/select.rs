//! The best few of one row at given prices, best first: `rank (score − price)`.
//!
//! A threshold that a dozen values reach splits the row; those are pushed together and ranked by counting, for each, the
//! larger ones. The threshold comes from a guess (the row's last one, in a sweep) or from the largest value of each of the
//! sixteen lanes: the width-th best of those is reached by at least `width` values, and a somewhat better one by about as
//! many as are wanted. The result depends on neither. Ties go to the lowest id; −∞ is never selected.

use super::{LANES, Lanes};

/// Thresholds tried before the row is given up.
const TRIES: usize = 12;

/// The best of a row, best first.
#[derive(Clone, Debug)]
pub(crate) struct Best {
    /// Their values after the price; the first `count` count.
    pub(crate) values: [f32; LANES],
    /// Their places in the row.
    pub(crate) ids: [u16; LANES],
    /// How many there are.
    pub(crate) count: usize,
}

impl Default for Best {
    fn default() -> Self {
        Self { values: [0.0; LANES], ids: [0; LANES], count: 0 }
    }
}

/// Where to look for the threshold first.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Guess {
    /// Nothing is known: start from the lanes' largest values, at this rank among them.
    Lanes(usize),
    /// About here, and how far to step when that is wrong.
    About(f32, f32),
}

impl Guess {
    /// For rows of `experts` values of which `width` are wanted: the rank that about as many values reach as may be, if
    /// values are spread evenly over the lanes.
    pub(crate) fn cold(experts: usize, width: usize) -> Self {
        let rows = experts.div_ceil(LANES) as f64;
        let reached = |rank: usize| {
            let below = (LANES as f64 - rank as f64 - 0.5) / LANES as f64;
            LANES as f64 * rows * (1.0 - below.powf(1.0 / rows))
        };
        let wanted = 0.5 * (width + LANES) as f64;
        Self::Lanes((0..width).rev().find(|&rank| reached(rank) <= wanted).unwrap_or(0))
    }
}

/// Ranks the best `width ≤ 16` of `row − price`; false when no threshold leaves at most sixteen (too many equal values).
///
/// `adjusted` is room for the row, in whole vectors.
#[inline(always)]
pub(crate) fn best<L: Lanes>(
    lanes: L,
    (row, price): (&[f32], Option<&[f32]>),
    width: usize,
    guess: Guess,
    adjusted: &mut [[f32; LANES]],
    best: &mut Best,
) -> bool {
    let mut most = lanes.splat(f32::NEG_INFINITY);
    let (whole, rest) = row.as_chunks::<LANES>();
    match price {
        Some(price) => {
            let (prices, price_rest) = price.as_chunks::<LANES>();
            for ((row, price), adjusted) in whole.iter().zip(prices).zip(adjusted.iter_mut()) {
                let value = lanes.sub(lanes.load(row), lanes.load(price));
                most = lanes.max(most, value);
                lanes.store(value, adjusted);
            }
            if !rest.is_empty() {
                let value = lanes.sub(lanes.load_part(rest, f32::NEG_INFINITY), lanes.load_part(price_rest, 0.0));
                most = lanes.max(most, value);
                lanes.store(value, &mut adjusted[whole.len()]);
            }
        }
        None => {
            for (row, adjusted) in whole.iter().zip(adjusted.iter_mut()) {
                let value = lanes.load(row);
                most = lanes.max(most, value);
                lanes.store(value, adjusted);
            }
            if !rest.is_empty() {
                let value = lanes.load_part(rest, f32::NEG_INFINITY);
                most = lanes.max(most, value);
                lanes.store(value, &mut adjusted[whole.len()]);
            }
        }
    }
    let split = match adjusted.len() {
        1 => f32::MIN,
        _ => match threshold(lanes, adjusted, most, width, guess) {
            Some(split) => split,
            None => return false,
        },
    };
    // In registers: pieces stored one over the other could not be loaded again without waiting for all of them.
    let found = at_least(lanes, adjusted.as_flattened(), lanes.splat(split));
    let count = found.count.min(LANES);
    order(lanes, found.values, found.ids, count, best);
    best.count = count.min(width);
    true
}

/// 2^23 and the number of each lane: the lowest bits of such a float are the number.
pub(crate) const NUMBERS: [f32; LANES] = {
    let mut numbers = [0.0; LANES];
    let mut lane = 0;
    while lane < LANES {
        numbers[lane] = 8_388_608.0 + lane as f32;
        lane += 1;
    }
    numbers
};

/// The largest few of one row in registers.
pub(crate) struct Leading<L: Lanes> {
    /// Their values, in the order of the row; −∞ in the lanes behind them.
    pub(crate) values: L::Vector,
    /// Their places in the row, in the lowest bits of each float.
    pub(crate) ids: L::Vector,
    /// How many there are.
    pub(crate) count: usize,
}

/// At least the `width ≤ 16` largest of a row, and at most sixteen; `most` is the largest of each lane, all of it finite or −∞.
/// `None` for a row of more than sixteen with too many equals, or with fewer than `width` that are not masked.
#[inline(always)]
pub(crate) fn leading<L: Lanes>(
    lanes: L,
    row: &[f32],
    most: L::Vector,
    width: usize,
    guess: usize,
) -> Option<Leading<L>> {
    if row.len() <= LANES {
        let values = lanes.load_part(row, f32::NEG_INFINITY);
        return Some(Leading { values, ids: lanes.load(&NUMBERS), count: row.len() });
    }
    let mut rank = guess;
    // The rank that was guessed is right nearly always; one that too many reach is too low, and the other way round.
    let (mut tried_up, mut tried_down) = (false, false);
    loop {
        let found = at_least(lanes, row, lanes.ranked(most, rank));
        if found.count > LANES {
            if rank == 0 || tried_down {
                return None;
            }
            (rank, tried_up) = (rank - 1, true);
        } else if found.count < width {
            if rank + 1 >= width || tried_up {
                return None;
            }
            (rank, tried_down) = (rank + 1, true);
        } else {
            return Some(found);
        }
    }
}

/// The values of a row that are at least `split`, the first sixteen of them; the count is one of seventeen where there are more.
#[inline(always)]
pub(crate) fn at_least<L: Lanes>(lanes: L, row: &[f32], split: L::Vector) -> Leading<L> {
    at_least_of(lanes, row, None, split)
}

/// The same of those whose bit is set, bit `e % 64` of word `e / 64`.
#[inline(always)]
pub(crate) fn at_least_of<L: Lanes>(lanes: L, row: &[f32], bits: Option<&[u64]>, split: L::Vector) -> Leading<L> {
    let least = lanes.splat(f32::NEG_INFINITY);
    let (whole, rest) = row.as_chunks::<LANES>();
    let (mut values, mut ids) = (least, least);
    let (mut numbers, step) = (lanes.load(&NUMBERS), lanes.splat(LANES as f32));
    let mut count = 0;
    for (at, part) in whole.iter().enumerate() {
        let part = lanes.load(part);
        let mask = lanes.ge(part, split) & sixteen(bits, at);
        values = lanes.compress(mask, part, values, count);
        ids = lanes.compress(mask, numbers, ids, count);
        numbers = lanes.add(numbers, step);
        count = (count + mask.count_ones() as usize).min(LANES + 1);
    }
    if !rest.is_empty() {
        let part = lanes.load_part(rest, f32::NEG_INFINITY);
        let mask = lanes.ge(part, split) & sixteen(bits, whole.len());
        values = lanes.compress(mask, part, values, count);
        ids = lanes.compress(mask, numbers, ids, count);
        count = (count + mask.count_ones() as usize).min(LANES + 1);
    }
    let behind = (0xffff_u32 << count.min(LANES)) as u16;
    Leading { values: lanes.blend(behind, least, values), ids, count }
}

/// The bits of the lanes of a row's part `at`; all where there are none.
#[inline(always)]
pub(crate) fn sixteen(bits: Option<&[u64]>, at: usize) -> u16 {
    let word = |bits: &[u64]| bits.get(at * LANES / 64).copied().unwrap_or(0);
    bits.map_or(u16::MAX, |bits| (word(bits) >> (at * LANES % 64)) as u16)
}

/// The largest `row − price` below `below`, and its place (the first of equals); −∞ where there is none.
#[inline(always)]
pub(crate) fn largest_below<L: Lanes>(lanes: L, row: &[f32], price: &[f32], below: f32) -> (u32, f32) {
    let least = lanes.splat(f32::NEG_INFINITY);
    let limit = lanes.splat(below);
    let (whole, rest) = row.as_chunks::<LANES>();
    let (prices, price_rest) = price.as_chunks::<LANES>();
    let last = match rest {
        [] => least,
        rest => under(lanes, lanes.load_part(rest, f32::NEG_INFINITY), lanes.load_part(price_rest, 0.0), limit),
    };
    let mut most = last;
    for (row, price) in whole.iter().zip(prices) {
        most = lanes.max(most, under(lanes, lanes.load(row), lanes.load(price), limit));
    }
    let most = lanes.fold_max(most);
    let wanted = lanes.splat(most);
    // From the end, without leaving early: where it is cannot be foreseen.
    let mut place = (whole.len() * LANES) as u32 + lanes.ge(last, wanted).trailing_zeros();
    for (part, (row, price)) in whole.iter().zip(prices).enumerate().rev() {
        let at = lanes.ge(under(lanes, lanes.load(row), lanes.load(price), limit), wanted);
        place = if at != 0 { (part * LANES) as u32 + at.trailing_zeros() } else { place };
    }
    (place, most)
}

/// `row − price` where that is below the limit, −∞ elsewhere.
#[inline(always)]
fn under<L: Lanes>(lanes: L, row: L::Vector, price: L::Vector, limit: L::Vector) -> L::Vector {
    let value = lanes.sub(row, price);
    lanes.blend(lanes.ge(value, limit), lanes.splat(f32::NEG_INFINITY), value)
}

/// How many of a row are at least `at`, which is above −∞.
#[inline(always)]
pub(crate) fn reached_in<L: Lanes>(lanes: L, row: &[f32], at: f32) -> usize {
    let (whole, rest) = row.as_chunks::<LANES>();
    let last = lanes.ge(lanes.load_part(rest, f32::NEG_INFINITY), lanes.splat(at)).count_ones() as usize;
    reached(lanes, whole, at) + last
}

/// How many values are at least `at`.
#[inline(always)]
fn reached<L: Lanes>(lanes: L, values: &[[f32; LANES]], at: f32) -> usize {
    let at = lanes.splat(at);
    let mut count = 0;
    for values in values {
        count += lanes.ge(lanes.load(values), at).count_ones() as usize;
    }
    count
}

/// A value that at least `width` of the row reach (all that are not −∞, where there are fewer) and at most sixteen.
#[inline(always)]
fn threshold<L: Lanes>(
    lanes: L,
    adjusted: &[[f32; LANES]],
    most: L::Vector,
    width: usize,
    guess: Guess,
) -> Option<f32> {
    let (mut low, mut high) = (f32::MIN, f32::MAX);
    let (mut at, mut step);
    match guess {
        Guess::About(value, by) => {
            at = (value - by).clamp(f32::MIN, f32::MAX);
            step = by;
        }
        Guess::Lanes(start) => {
            let mut largest = Best::default();
            order(lanes, most, lanes.load(&NUMBERS), LANES, &mut largest);
            let (mut rank, mut upwards, mut downwards) = (start, true, true);
            while upwards || downwards {
                let value = largest.values[rank].max(f32::MIN);
                match reached(lanes, adjusted, value) {
                    count if count < width => {
                        if value == f32::MIN {
                            return Some(value);
                        }
                        high = value;
                        // The last rank is reached by all that are wanted, unless there are fewer.
                        if !downwards || rank + 1 >= width {
                            break;
                        }
                        (rank, upwards) = (rank + 1, false);
                    }
                    count if count > LANES => {
                        low = value;
                        if !upwards || rank == 0 {
                            break;
                        }
                        (rank, downwards) = (rank - 1, false);
                    }
                    _ => return Some(value),
                }
            }
            at = 0.5 * low + 0.5 * high.min(largest.values[0]);
            step = 0.0;
        }
    }
    for _ in 0..TRIES {
        match reached(lanes, adjusted, at) {
            count if count < width => {
                if at == f32::MIN {
                    return Some(at);
                }
                high = at;
                at = if low > f32::MIN { 0.5 * low + 0.5 * high } else { at - step };
            }
            count if count > LANES => {
                low = at;
                at = if high < f32::MAX { 0.5 * low + 0.5 * high } else { at + step };
            }
            _ => return Some(at),
        }
        at = at.clamp(f32::MIN, f32::MAX);
        step *= 2.0;
    }
    None
}

/// Sorts the first `count` of `values` (−∞ behind them), largest first, with ids in the lowest bits of floats; equals stay in
/// the order they stand in.
#[inline(always)]
pub(crate) fn order<L: Lanes>(lanes: L, values: L::Vector, ids: L::Vector, count: usize, best: &mut Best) {
    let order = lanes.argsort(values, count);
    lanes.store(lanes.permute(values, order), &mut best.values);
    let mut numbers = [0.0; LANES];
    lanes.store(lanes.permute(ids, order), &mut numbers);
    for (id, number) in best.ids.iter_mut().zip(numbers) {
        *id = number.to_bits() as u16;
    }
}
