//! Every instruction set of this CPU against plain Rust, and plain Rust against the definition.

mod features;
mod multiply;
pub(crate) mod naive;
mod product;

use proptest::prelude::*;

use super::score::{all_allowed, any_masked, exp, extremes, largest, sigmoid, softmax};
use super::select::{Best, Guess, best};
use super::{Isa, Kernel, LANES, Lanes};

/// Everything that scores a row, on one instruction set: bits of softmax, sigmoid, exp of −|x|, the largest, both checks.
struct ScoreAll<'a>(&'a [f32]);

impl Kernel for ScoreAll<'_> {
    type Output = (Vec<u32>, f32, bool, bool, Option<(f32, f32)>);

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let row = self.0;
        let mut out = vec![0.0; 3 * row.len()];
        softmax(lanes, row, &mut out[..row.len()]);
        sigmoid(lanes, row, &mut out[row.len()..2 * row.len()]);
        for (x, out) in row.chunks(LANES).zip(out[2 * row.len()..].chunks_mut(LANES)) {
            let falling: Vec<f32> = x.iter().map(|x| -x.abs()).collect();
            lanes.store_part(exp(lanes, lanes.load_part(&falling, 0.0)), out);
        }
        let bits = out.into_iter().map(f32::to_bits).collect();
        (bits, largest(lanes, row), all_allowed(lanes, row), any_masked(lanes, row), extremes(lanes, row))
    }
}

/// What a kernel does with whole registers: appended lanes, an order, the lanes in it, a rank, both folds; as bits.
struct Registers {
    values: [f32; LANES],
    mask: u16,
    at: usize,
    count: usize,
}

impl Kernel for Registers {
    type Output = (u64, Vec<[u32; LANES]>, [u32; 2]);

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let all = lanes.load(&self.values);
        let order = lanes.argsort(all, self.count);
        let made = [
            lanes.compress(self.mask, all, lanes.splat(-7.0), self.at),
            lanes.permute(all, order),
            lanes.ranked(all, self.at),
        ];
        let bits = |vector| {
            let mut stored = [0.0; LANES];
            lanes.store(vector, &mut stored);
            stored.map(f32::to_bits)
        };
        (order, made.map(bits).to_vec(), [lanes.fold_max(all).to_bits(), lanes.fold_sum(all).to_bits()])
    }
}

struct Rank<'a> {
    row: &'a [f32],
    price: Option<&'a [f32]>,
    width: usize,
    guess: Guess,
}

impl Kernel for Rank<'_> {
    type Output = Option<Vec<(u32, u32)>>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let mut adjusted = vec![[f32::NEG_INFINITY; LANES]; self.row.len().div_ceil(LANES)];
        let mut found = Best::default();
        let enough = best(lanes, (self.row, self.price), self.width, self.guess, &mut adjusted, &mut found);
        enough.then(|| (0..found.count).map(|at| (found.ids[at].into(), found.values[at].to_bits())).collect())
    }
}

/// The definition: sort all of it.
fn sorted(row: &[f32], price: &[f32], width: usize) -> Vec<(u32, u32)> {
    let mut all: Vec<(u32, f32)> = row
        .iter()
        .zip(price)
        .map(|(score, price)| score - price)
        .enumerate()
        .filter(|(_, value)| *value > f32::NEG_INFINITY)
        .map(|(id, value)| (id as u32, value))
        .collect();
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    all.into_iter().take(width).map(|(id, value)| (id, value.to_bits())).collect()
}

fn values() -> impl Strategy<Value = Vec<f32>> {
    let value = || {
        prop_oneof![
            8 => -6.0f32..6.0,
            1 => Just(f32::NEG_INFINITY),
            1 => prop_oneof![Just(0.0f32), Just(-0.0), Just(1.0), Just(f32::MAX), Just(f32::MIN), Just(1e-40), -100.0f32..-80.0],
        ]
    };
    prop_oneof![
        prop::collection::vec(value(), 1..150),
        prop::collection::vec((0u8..4).prop_map(f32::from), 1..150),
        prop::collection::vec(-9.0f32..9.0, 64..520),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 2000 }))]

    #[test]
    fn scores_are_the_same_bits_everywhere(row in values()) {
        let expected = Isa::scalar().run(ScoreAll(&row));
        for isa in Isa::all() {
            prop_assert_eq!(&isa.run(ScoreAll(&row)), &expected, "{:?}", isa);
        }
        prop_assert!(expected.2);
        prop_assert_eq!(expected.3, row.contains(&f32::NEG_INFINITY));
        prop_assert_eq!(expected.1, row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let allowed = || row.iter().copied().filter(|&x| x > f32::NEG_INFINITY);
        let least = allowed().reduce(f32::min);
        prop_assert_eq!(expected.4, least.zip(allowed().reduce(f32::max)));
        // Against the definition in f64.
        let most = f64::from(expected.1);
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - most).exp()).sum();
        for (at, &x) in row.iter().enumerate() {
            let score = |part: usize| f64::from(f32::from_bits(expected.0[part * row.len() + at]));
            let close = |got: f64, wanted: f64, relative: f64| (got - wanted).abs() <= relative * wanted + 2e-38;
            if most > f64::from(f32::NEG_INFINITY) {
                prop_assert!(close(score(0), (f64::from(x) - most).exp() / sum, 2e-6), "softmax of {} in {:?}", x, row);
            } else {
                prop_assert_eq!(score(0), 0.0);
            }
            prop_assert!(close(score(1), 1.0 / (1.0 + (-f64::from(x)).exp()), 4e-7), "sigmoid of {}", x);
            prop_assert!(close(score(2), (-f64::from(x).abs()).exp(), 2.4e-7), "exp of {}", x);
        }
    }

    #[test]
    fn registers_are_the_same_bits_everywhere(
        values in prop::array::uniform16(prop_oneof![
            4 => -9.0f32..9.0, 2 => (0u8..3).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY), 1 => Just(f32::MAX), 1 => Just(1e-40f32),
        ]),
        mask: u16,
        at in 0usize..LANES,
        count in 0usize..=LANES,
    ) {
        let mut values = values;
        values[count..].fill(f32::NEG_INFINITY);
        let mut wanted: Vec<usize> = (0..LANES).collect();
        wanted.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap());
        for isa in Isa::all() {
            let (order, made, folds) = isa.run(Registers { values, mask, at, count });
            let sorted: Vec<usize> = (0..LANES).map(|place| (order >> (4 * place)) as usize % LANES).collect();
            prop_assert_eq!(&sorted, &wanted, "{:?}", isa);
            let mut placed = [-7.0; LANES];
            let from = (0..LANES).filter(|lane| mask >> lane & 1 == 1).map(|lane| values[lane]);
            placed[at..].iter_mut().zip(from).for_each(|(placed, value)| *placed = value);
            let end = (at + mask.count_ones() as usize).min(LANES);
            prop_assert_eq!(&made[0][..end], &placed.map(f32::to_bits)[..end], "{:?}", isa);
            let permuted: [f32; LANES] = std::array::from_fn(|place| values[wanted[place]]);
            prop_assert_eq!(made[1], permuted.map(f32::to_bits), "{:?}", isa);
            prop_assert_eq!(made[2], [permuted[at].to_bits(); LANES], "{:?}", isa);
            prop_assert_eq!(&folds, &Isa::scalar().run(Registers { values, mask, at, count }).2, "{:?}", isa);
            prop_assert_eq!(folds[0], permuted[0].to_bits());
        }
    }

    #[test]
    fn ranks_are_those_of_a_sort(
        row in values(),
        width in 1usize..=LANES,
        priced: bool,
        steps in prop::collection::vec(0u8..8, 520),
        about in prop_oneof![Just(None), (-8.0f32..8.0, 1e-6f32..2.0).prop_map(Some), Just(Some((f32::MAX, 1.0)))],
    ) {
        let price: Vec<f32> = steps[..row.len()].iter().map(|&step| if priced { f32::from(step) * 0.5 } else { 0.0 }).collect();
        let width = width.min(row.len());
        let guess = about.map_or(Guess::cold(row.len(), width), |(at, step)| Guess::About(at, step));
        let wanted = sorted(&row, &price, width);
        for isa in Isa::all() {
            let got = isa.run(Rank { row: &row, price: priced.then_some(&price[..]), width, guess });
            if let Some(got) = got {
                prop_assert_eq!(&got, &wanted, "{:?}", isa);
            } else {
                // Giving up is for rows where too many are equal, or the values are too far apart for the tries.
                prop_assert!(row.len() > LANES);
            }
        }
    }
}

#[test]
fn ordinary_rows_are_never_given_up() {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let shapes = [(8, 2), (32, 4), (60, 4), (64, 8), (64, 11), (128, 8), (256, 8), (512, 10)];
    for (experts, width) in shapes.into_iter().take(if cfg!(miri) { 3 } else { 8 }) {
        for _ in 0..if cfg!(miri) { 1 } else { 500 } {
            let row: Vec<f32> = (0..experts).map(|_| rng.random_range(-4.0f32..4.0).exp()).collect();
            for isa in Isa::all() {
                let got = isa.run(Rank { row: &row, price: None, width, guess: Guess::cold(experts, width) });
                assert_eq!(got, Some(sorted(&row, &vec![0.0; experts], width)), "{isa:?} {experts} {width}");
            }
        }
    }
}

#[test]
fn numbers_that_are_none_are_seen() {
    for isa in Isa::all() {
        for length in [1, 15, 16, 17, 64, 70] {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                for at in (0..length).step_by(if cfg!(miri) { 7 } else { 1 }) {
                    let mut row = vec![1.0; length];
                    row[at] = bad;
                    struct Check<'a>(&'a [f32]);
                    impl Kernel for Check<'_> {
                        type Output = bool;
                        #[inline(always)]
                        fn run<L: Lanes>(self, lanes: L) -> bool {
                            all_allowed(lanes, self.0)
                        }
                    }
                    assert!(!isa.run(Check(&row)), "{isa:?} {length} {at} {bad}");
                }
            }
        }
    }
}
