//! The phase kernel as published, bit for bit: `n` tokens against `n` columns on a ring of `n` positions.
//!
//! Every row of the source side S and of the target side T has a degree; the offset of a row is the running sum of the
//! degrees before it, modulo n. Token j walks the `degree_S[j]` ring positions from `offset_S[j]`; position p names the
//! column `col = perm_S⁻¹[p]`, which is accepted when `(perm_T[j] − offset_T[col]) mod n < degree_T[col]`. Of the accepted
//! columns a reservoir keeps `top_k`: Algorithm R (Vitter 1985) on a ChaCha8 stream seeded with `seed + j`.
//! Output: `[n, top_k]` columns in `i32`, −1 where fewer were accepted.
//!
//! The naive form walks all Σ degree_S positions. Laid end to end without the modulo, the arcs of T cover each of
//! `perm_T[j]`, `perm_T[j] + n`, `perm_T[j] + 2n`, … exactly once, so the columns that accept token j can also be listed
//! directly, Σ degree_T of them over all tokens, and put in walking order by a sort. Each token takes the shorter way.
//!
//! The reference is the crate `phase_router_rs` (github.com/TSltd/phase_router_rs); its draws are those of `draws`.
//!
//! ```
//! use phase_moe::routing::{PhaseSide, permutations, phase_ring};
//!
//! let [source_order, target_order] = permutations(8, 42);
//! let sources = PhaseSide::new(vec![4; 8], source_order)?;
//! let targets = PhaseSide::new(vec![3; 8], target_order)?;
//! let columns = phase_ring(sources, targets, 2, 42)?;
//! assert_eq!(columns.len(), 8 * 2);
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of gates, experts or capacities: degrees come from the caller.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::routing::phase_kernel::draws::draw_u64;

/// One side of the kernel: a degree per row and a permutation of the `n` ring positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhaseSide {
    degrees: Vec<u32>,
    permutation: Vec<u32>,
}

impl PhaseSide {
    /// Checks and takes `degrees`, each at most n, and `permutation`, both of length n.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths differ, [`Error::Parameter`] for more than `i32::MAX` rows, a degree above n, or
    /// a permutation that is not one.
    pub fn new(degrees: Vec<u32>, permutation: Vec<u32>) -> Result<Self> {
        let rows = degrees.len();
        if i32::try_from(rows).is_err() {
            return Err(Error::parameter("rows", rows, format!("at most {}", i32::MAX)));
        }
        if permutation.len() != rows {
            return Err(Error::shape("permutation", format!("{rows} values"), format!("{} values", permutation.len())));
        }
        if let Some(degree) = degrees.iter().find(|&&degree| degree as usize > rows) {
            return Err(Error::parameter("degree", degree, format!("at most rows {rows}")));
        }
        let mut seen = vec![false; rows];
        for &position in &permutation {
            match seen.get_mut(position as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    return Err(Error::parameter(
                        "permutation entry",
                        position,
                        format!("each of 0 to {rows} - 1 once"),
                    ));
                }
            }
        }
        Ok(Self { degrees, permutation })
    }

    /// From a bit matrix, `[n, ⌈n / 64⌉]` words, lowest bit first: the degree of a row is the number of its bits, wherever
    /// they are. n is the length of `permutation`.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words or a bit past n in the last word of a row; those of
    /// [`PhaseSide::new`].
    pub fn from_bits(bits: &[u64], permutation: Vec<u32>) -> Result<Self> {
        let rows = permutation.len();
        let words = rows.div_ceil(64);
        if rows.checked_mul(words) != Some(bits.len()) {
            return Err(Error::shape("bits", format!("{rows} rows · {words} words"), format!("{} words", bits.len())));
        }
        let mut degrees = Vec::with_capacity(rows);
        for (row, bits) in bits.chunks_exact(words.max(1)).enumerate() {
            let past = bits.last().map_or(0, |&last| if rows.is_multiple_of(64) { 0 } else { last >> (rows % 64) });
            if past != 0 {
                let bit = rows + past.trailing_zeros() as usize;
                return Err(Error::shape(
                    format!("bits of row {row}"),
                    format!("none from {rows} on"),
                    format!("bit {bit}"),
                ));
            }
            degrees.push(bits.iter().map(|word| word.count_ones()).sum());
        }
        Self::new(degrees, permutation)
    }

    /// Rows, and positions on the ring.
    pub(crate) fn rows(&self) -> usize {
        self.degrees.len()
    }

    /// Running sum of the degrees before each row, not reduced.
    fn starts(&self) -> impl Iterator<Item = u64> + '_ {
        self.degrees.iter().scan(0u64, |sum, &degree| {
            let start = *sum;
            *sum += u64::from(degree);
            Some(start)
        })
    }
}

/// What the walk finds at one ring position: a column and its arc of accepted tokens.
#[derive(Clone, Copy)]
struct Place {
    column: u32,
    start: u32,
    degree: u32,
}

/// The columns that every token of the sources is sent to: up to `top_k` accepted ones, `[n, top_k]`, −1 where there are none left.
///
/// # Errors
/// [`Error::Shape`] when the two sides have different numbers of rows, [`Error::TopKZero`], and [`Error::Parameter`] where
/// `n · top_k` columns do not fit in memory.
pub fn phase_ring(sources: PhaseSide, targets: PhaseSide, top_k: usize, seed: u64) -> Result<Vec<i32>> {
    let tokens = sources.rows();
    PhaseRing::new(sources, targets)?.route_first(tokens, top_k, seed)
}

/// Two sides of the same size, ready to route.
pub(crate) struct PhaseRing {
    sources: PhaseSide,
    targets: PhaseSide,
    /// `offset_S`, `[n]`.
    offsets: Vec<u32>,
    /// By ring position, `[n]`.
    places: Vec<Place>,
    /// Where the arc of each column ends on the line that the arcs make end to end, `[n]`.
    ends: Vec<u64>,
    /// First column whose arc ends after `bucket << bucket_bits`, for each bucket of that line and one past the last.
    buckets: Vec<u32>,
    bucket_bits: u32,
}

impl PhaseRing {
    /// Joins the two sides.
    ///
    /// # Errors
    /// [`Error::Shape`] when they have different numbers of rows.
    pub(crate) fn new(sources: PhaseSide, targets: PhaseSide) -> Result<Self> {
        let rows = sources.rows();
        if targets.rows() != rows {
            return Err(Error::shape("target rows", rows, targets.rows()));
        }
        let reduce = |start: u64| (start % rows as u64) as u32;
        let offsets = sources.starts().map(reduce).collect();
        let mut places = vec![Place { column: 0, start: 0, degree: 0 }; rows];
        for (column, start) in targets.starts().enumerate() {
            places[sources.permutation[column] as usize] =
                Place { column: column as u32, start: reduce(start), degree: targets.degrees[column] };
        }
        let ends: Vec<u64> =
            targets.starts().zip(&targets.degrees).map(|(start, &degree)| start + u64::from(degree)).collect();
        // About as many buckets as columns, so that few columns end in one.
        let total = ends.last().copied().unwrap_or(0);
        let bucket_bits = (total / rows.max(1) as u64).max(1).ilog2();
        let mut buckets = Vec::with_capacity((total >> bucket_bits) as usize + 2);
        let mut column = 0;
        for bucket in 0..=(total >> bucket_bits) + 1 {
            while ends.get(column).is_some_and(|&end| end <= bucket << bucket_bits) {
                column += 1;
            }
            buckets.push(column as u32);
        }
        Ok(Self { sources, targets, offsets, places, ends, buckets, bucket_bits })
    }

    /// Up to `top_k` accepted columns for each of the first `tokens` tokens.
    ///
    /// # Errors
    /// As [`phase_ring`] for `top_k`.
    pub(super) fn route_first(&self, tokens: usize, top_k: usize, seed: u64) -> Result<Vec<i32>> {
        if top_k == 0 {
            return Err(Error::TopKZero);
        }
        let mut chosen = Vec::new();
        let slots = tokens.checked_mul(top_k).filter(|&slots| chosen.try_reserve_exact(slots).is_ok());
        let Some(slots) = slots else {
            return Err(Error::parameter("top_k", top_k, format!("few enough that {tokens} tokens fit in memory")));
        };
        chosen.resize(slots, -1);
        chosen.par_chunks_exact_mut(top_k).enumerate().for_each_init(Vec::new, |accepted, (token, chosen)| {
            self.accepted_columns(token, accepted);
            reservoir(accepted, chosen, seed.wrapping_add(token as u64));
        });
        Ok(chosen)
    }

    /// The columns that accept `token`, in walking order; the high half of a value may hold its place in that order.
    fn accepted_columns(&self, token: usize, accepted: &mut Vec<u64>) {
        let covering = self.ends.last().copied().unwrap_or(0) / self.places.len() as u64 + 1;
        accepted.clear();
        if covering.saturating_mul(COVER_COST) < u64::from(self.sources.degrees[token]) {
            self.cover(token, accepted);
        } else {
            self.walk(token, accepted);
        }
    }

    /// Walks the token's ring positions.
    fn walk(&self, token: usize, accepted: &mut Vec<u64>) {
        let (rows, phase) = (self.places.len(), self.targets.permutation[token]);
        let (start, length) = (self.offsets[token] as usize, self.sources.degrees[token] as usize);
        let to_end = length.min(rows - start);
        accepted.resize(length, 0);
        let mut count = 0;
        for place in self.places[start..start + to_end].iter().chain(&self.places[..length - to_end]) {
            let mut distance = phase.wrapping_sub(place.start);
            if phase < place.start {
                distance = distance.wrapping_add(rows as u32);
            }
            // Always written, counted if accepted: no branch to mispredict.
            accepted[count] = u64::from(place.column);
            count += usize::from(distance < place.degree);
        }
        accepted.truncate(count);
    }

    /// Lists the columns whose arc covers the token's phase, keeps those on its walk, and sorts them by when it meets them.
    fn cover(&self, token: usize, accepted: &mut Vec<u64>) {
        let rows = self.places.len() as u32;
        let (start, length) = (self.offsets[token], self.sources.degrees[token]);
        let total = self.ends.last().copied().unwrap_or(0);
        let mut point = u64::from(self.targets.permutation[token]);
        while point < total {
            let bucket = (point >> self.bucket_bits) as usize;
            let (first, last) = (self.buckets[bucket] as usize, self.buckets[bucket + 1] as usize);
            let column = first + self.ends[first..last].partition_point(|&end| end <= point);
            let position = self.sources.permutation[column];
            let step = if position < start { position + rows - start } else { position - start };
            if step < length {
                accepted.push(u64::from(step) << 32 | column as u64);
            }
            point += u64::from(rows);
        }
        accepted.sort_unstable();
    }
}

/// Steps of the walk that one step of the cover costs, roughly.
const COVER_COST: u64 = 8;

/// Algorithm R: the first columns fill `chosen`, every later one replaces a random earlier one or is passed over.
fn reservoir(accepted: &[u64], chosen: &mut [i32], seed: u64) {
    let first = accepted.len().min(chosen.len());
    for (slot, &column) in chosen.iter_mut().zip(accepted) {
        *slot = column as u32 as i32;
    }
    if first == accepted.len() {
        return;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for (seen, &column) in accepted.iter().enumerate().skip(first) {
        if let Some(slot) = chosen.get_mut(draw_u64(&mut rng, seen as u64 + 1) as usize) {
            *slot = column as u32 as i32;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::routing::phase_kernel::draws::{draw_u32, permutations};
    use proptest::prelude::*;

    /// So many cases, times `PHASE_MOE_CASES`.
    pub(in crate::routing::phase_kernel) fn cases(count: u32) -> ProptestConfig {
        let times = std::env::var("PHASE_MOE_CASES").map_or(1, |times| times.parse::<u32>().unwrap());
        ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(count * times) }
    }

    /// The oracle: builds both bit matrices, row by row, permutes and rotates them, and intersects.
    pub(in crate::routing::phase_kernel) fn naive(
        degrees: [&[u32]; 2],
        orders: [&[u32]; 2],
        top_k: usize,
        seed: u64,
    ) -> Vec<i32> {
        let rows = degrees[0].len();
        let rotated = |degrees: &[u32]| {
            let mut matrix = vec![vec![false; rows]; rows];
            let mut offset = 0;
            for (row, &degree) in matrix.iter_mut().zip(degrees) {
                (0..degree as usize).for_each(|bit| row[(offset + bit) % rows] = true);
                offset += degree as usize;
            }
            matrix
        };
        let (sources, targets) = (rotated(degrees[0]), rotated(degrees[1]));
        let column_at = |position: usize| orders[0].iter().position(|&p| p as usize == position).unwrap();
        let columns: Vec<usize> = (0..rows).map(column_at).collect();
        let mut chosen = vec![-1; rows * top_k];
        for token in 0..rows {
            let start = degrees[0][..token].iter().sum::<u32>() as usize;
            let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(token as u64));
            let mut count = 0;
            for position in (start..start + rows).map(|position| position % rows) {
                let column = columns[position];
                if sources[token][position] && targets[column][orders[1][token] as usize] {
                    let slot = if count < top_k { count } else { draw_u64(&mut rng, count as u64 + 1) as usize };
                    if slot < top_k {
                        chosen[token * top_k + slot] = column as i32;
                    }
                    count += 1;
                }
            }
        }
        chosen
    }

    /// A bit matrix with `degrees[row]` bits anywhere in each row.
    fn bits_of(degrees: &[u32], rng: &mut ChaCha8Rng) -> Vec<u64> {
        let words = degrees.len().div_ceil(64);
        let mut bits = vec![0u64; degrees.len() * words];
        for (row, &degree) in bits.chunks_exact_mut(words).zip(degrees) {
            let mut columns: Vec<usize> = (0..degrees.len()).collect();
            for at in 0..degree as usize {
                let other = at + draw_u32(rng, (degrees.len() - at) as u32) as usize;
                columns.swap(at, other);
                row[columns[at] / 64] |= 1 << (columns[at] % 64);
            }
        }
        bits
    }

    proptest! {
        #![proptest_config(cases(2_000))]
        #[test]
        fn routes_match_the_matrices(
            rows in prop_oneof![2 => 1usize..=64, 1 => 1usize..=300, 1 => prop::sample::select(vec![64usize, 65, 128, 192, 256, 300])],
            top_k in prop_oneof![4 => 1usize..9, 1 => 1usize..320],
            seed: u64,
            shape in 0u32..4,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut degrees = |cut: u32| -> Vec<u32> {
                (0..rows).map(|_| draw_u32(&mut rng, rows as u32 + 1) >> cut).collect()
            };
            let (source_degrees, target_degrees) = (degrees(shape % 2), degrees(shape * 2));
            let [source_order, target_order] = permutations(rows as u32, seed);
            let oracle =
                naive([&source_degrees, &target_degrees], [&source_order, &target_order], top_k, seed);
            let from_bits = |degrees: &[u32], order: &[u32], rng: &mut ChaCha8Rng| {
                PhaseSide::from_bits(&bits_of(degrees, rng), order.to_vec()).unwrap()
            };
            let source_bits = from_bits(&source_degrees, &source_order, &mut rng);
            let target_bits = from_bits(&target_degrees, &target_order, &mut rng);
            let sources = PhaseSide::new(source_degrees, source_order).unwrap();
            let targets = PhaseSide::new(target_degrees, target_order).unwrap();
            prop_assert_eq!((&source_bits, &target_bits), (&sources, &targets));
            prop_assert_eq!(&phase_ring(source_bits, target_bits, top_k, seed).unwrap(), &oracle);
            let kernel = PhaseRing::new(sources, targets).unwrap();
            prop_assert_eq!(kernel.route_first(kernel.sources.rows(), top_k, seed).unwrap(), oracle);
            // Both ways of listing columns, whichever the costs would have taken.
            let (mut walked, mut covered) = (Vec::new(), Vec::new());
            for token in 0..rows {
                covered.clear();
                kernel.walk(token, &mut walked);
                kernel.cover(token, &mut covered);
                covered.iter_mut().for_each(|value| *value &= u64::from(u32::MAX));
                prop_assert_eq!(&walked, &covered);
            }
        }
    }

    /// FNV-1a of the little-endian bytes.
    fn digest(values: &[i32]) -> u64 {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    #[test]
    fn routes_match_the_reference_bit_for_bit() {
        // From `tests/goldens/phase_kernel_digests.py`, and before that from the reference itself on rand 0.8.8 and rand_chacha 0.3.1.
        let golden = [
            (8, 2, 42, 0x1b5c_c901_fb89_b5f8),
            (64, 4, 7, 0xb64f_26d4_976b_3d04),
            (300, 2, 42, 0xb204_15ce_f003_aa04),
            (1024, 2, u64::MAX - 3, 0xbb1c_21de_dc45_ddbe),
        ];
        for (rows, top_k, seed, expected) in golden {
            let [source_order, target_order] = permutations(rows, seed.wrapping_add(7777));
            let degrees = |factor, plus| (0..rows).map(|row| (row * factor + plus) % (rows + 1)).collect();
            let sources = PhaseSide::new(degrees(7, 3), source_order).unwrap();
            let targets = PhaseSide::new(degrees(5, 1), target_order).unwrap();
            let chosen = phase_ring(sources, targets, top_k, seed).unwrap();
            assert_eq!(digest(&chosen), expected, "{rows} rows");
        }
        assert_eq!(permutations(8, 42 + 7777)[0], [1, 6, 4, 2, 5, 0, 7, 3]);
    }

    #[test]
    fn only_the_number_of_bits_counts() {
        let order = || (0..70).collect::<Vec<u32>>();
        let mut bits = vec![0; 70 * 2];
        bits[3 * 2] = 0b1011 << 40;
        bits[3 * 2 + 1] = 0b10_0000;
        let side = PhaseSide::from_bits(&bits, order()).unwrap();
        assert_eq!((side.degrees[3], side.degrees[4]), (4, 0));
        bits[5 * 2 + 1] = 1 << 6;
        let error = PhaseSide::from_bits(&bits, order()).unwrap_err();
        assert_eq!(error.to_string(), "bits of row 5: expected none from 70 on, got bit 70");
        let error = PhaseSide::from_bits(&bits[1..], order()).unwrap_err();
        assert_eq!(error.to_string(), "bits: expected 70 rows · 2 words, got 139 words");
        assert!(PhaseSide::from_bits(&[u64::MAX; 64], (0..64).collect()).is_ok());
    }

    #[test]
    fn what_the_reference_lets_through_is_an_error() {
        let message = |degrees: Vec<u32>, order: Vec<u32>| PhaseSide::new(degrees, order).unwrap_err().to_string();
        assert_eq!(message(vec![1; 3], vec![0, 1, 1]), "permutation entry is 1: expected each of 0 to 3 - 1 once");
        assert_eq!(message(vec![1; 3], vec![0, 1, 3]), "permutation entry is 3: expected each of 0 to 3 - 1 once");
        assert_eq!(message(vec![1; 3], vec![0, 1]), "permutation: expected 3 values, got 2 values");
        assert_eq!(message(vec![1, 4, 1], vec![0, 1, 2]), "degree is 4: expected at most rows 3");
        let side = |rows: u32| PhaseSide::new(vec![1; rows as usize], (0..rows).collect()).unwrap();
        assert_eq!(PhaseRing::new(side(3), side(4)).err().unwrap().to_string(), "target rows: expected 3, got 4");
        let kernel = PhaseRing::new(side(3), side(3)).unwrap();
        assert!(matches!(kernel.route_first(kernel.sources.rows(), 0, 1), Err(Error::TopKZero)));
        assert!(matches!(
            kernel.route_first(kernel.sources.rows(), usize::MAX, 1),
            Err(Error::Parameter { name: "top_k", .. })
        ));
        assert_eq!(phase_ring(side(0), side(0), 2, 1).unwrap(), [0i32; 0]);
    }
}
