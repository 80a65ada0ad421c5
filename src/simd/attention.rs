//! Attention of some query rows over a head's kept keys and values, `softmax(q·kᵀ)·v` in one pass: the softmax is put right on the way
//! whenever a larger score comes (Milakov and Gimelshein 2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682).
//!
//! Keys of sixteen positions lie side by side, `[width][16]`, so that a lane is a position and scores need no folding; values lie row by
//! row, `[position][width]`. Both are kept in one dtype of floats and widened a chunk of [`CHUNK`] positions at a time, which all query
//! rows then meet. Sums are in `f32`.
//!
//! Knows nothing of heads that share keys, of sequences or of who asks.

use std::ops::Range;

use super::dtype::Dtype;
use super::lanes::LANES;
use super::multiply::{LINE_BYTES, Line, Multiply};
use super::product::Workspace;
use super::{Kernel, score};

/// Positions of a block of keys and values.
pub(crate) const POSITIONS: usize = 128;
/// Positions whose keys and values are widened together.
const CHUNK: usize = 2 * LANES;

/// How the keys and values of one head lie in a block of [`POSITIONS`] positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadLayout {
    /// `f32`, `f16` or `bf16`.
    pub(crate) dtype: Dtype,
    /// Numbers of a key.
    pub(crate) key: usize,
    /// Numbers of a value.
    pub(crate) value: usize,
    /// A value is the front of its key, as in latent attention, and not kept beside it.
    pub(crate) shared: bool,
}

impl HeadLayout {
    /// Lines of a block.
    pub(crate) fn lines(self) -> usize {
        let kept = self.key + if self.shared { 0 } else { self.row() };
        POSITIONS * kept * self.dtype.block_bytes() / LINE_BYTES
    }

    /// Numbers from one value to the next, and from one row of sums to the next.
    pub(crate) fn row(self) -> usize {
        self.value.next_multiple_of(LANES)
    }

    /// Whether a number can be kept: what becomes infinite, or is no number, would make scores that mean nothing.
    pub(crate) fn holds(self, number: f32) -> bool {
        let largest = if self.dtype == Dtype::F16 { half::f16::MAX.to_f32() } else { f32::MAX };
        number.abs() <= largest
    }

    /// Keeps the key and value of a position of the block that `lines` are.
    pub(crate) fn keep(self, lines: &mut [Line], position: usize, key: &[f32], value: &[f32]) {
        let (group, lane, row) = (position / LANES, position % LANES, self.row());
        let (keys, values) = lines.split_at_mut(POSITIONS * self.key * self.dtype.block_bytes() / LINE_BYTES);
        let first = group * LANES * self.key + lane;
        fn both<T: bytemuck::Pod>(
            [keys, values]: [&mut [Line]; 2],
            (first, start): (usize, usize),
            (key, value): (&[f32], &[f32]),
            narrow: impl Fn(f32) -> T,
        ) {
            let keys: &mut [T] = bytemuck::cast_slice_mut(keys);
            for (into, &number) in keys[first..].iter_mut().step_by(LANES).zip(key) {
                *into = narrow(number);
            }
            let values: &mut [T] = bytemuck::cast_slice_mut(values);
            for (into, &number) in values.get_mut(start..).unwrap_or_default().iter_mut().zip(value) {
                *into = narrow(number);
            }
        }
        let (lines, at) = ([keys, values], (first, position * row));
        let value = if self.shared { &[] } else { value };
        match self.dtype {
            Dtype::F16 => both(lines, at, (key, value), half::f16::from_f32),
            Dtype::Bf16 => both(lines, at, (key, value), half::bf16::from_f32),
            _ => both(lines, at, (key, value), |number| number),
        }
    }
}

/// Attention of query rows that share keys. Row `r` is of the position `first + r / group`, which sees the positions before it and itself,
/// of them the last `window`.
pub(crate) struct Attend<'a> {
    pub(crate) layout: HeadLayout,
    /// Blocks of [`POSITIONS`] positions each, with the keys and values of several heads.
    pub(crate) blocks: &'a [Box<[Line]>],
    /// Which of them.
    pub(crate) head: usize,
    /// Which positions to look at: all of them are kept.
    pub(crate) positions: Range<usize>,
    /// Scaled queries: row `r` begins at `(r / group) · query_stride + (r % group) · key`.
    pub(crate) queries: &'a [f32],
    pub(crate) query_stride: usize,
    pub(crate) group: usize,
    pub(crate) rows: usize,
    pub(crate) first: usize,
    pub(crate) window: Option<usize>,
    /// `[rows, row]` of the layout: `Σ exp(score − top) · value`, overwritten as the others are.
    pub(crate) sums: &'a mut [f32],
    /// The largest score of each row, −∞ where it sees none of the positions.
    pub(crate) tops: &'a mut [f32],
    /// `Σ exp(score − top)` of each row.
    pub(crate) totals: &'a mut [f32],
    pub(crate) workspace: &'a mut Workspace,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(mut self, lanes: L) {
        let HeadLayout { key, .. } = self.layout;
        let columns = self.layout.row() / LANES;
        self.sums.fill(0.0);
        self.tops.fill(f32::NEG_INFINITY);
        self.totals.fill(0.0);
        let mut lines = self.workspace.take(2 * key + CHUNK * columns + 2 * self.rows);
        let (keys, rest) = lines.split_at_mut(2 * key);
        let (values, rest) = rest.split_at_mut(CHUNK * columns);
        let shares = &mut rest[..2 * self.rows];
        let mut start = self.positions.start / CHUNK * CHUNK;
        while start < self.positions.end {
            self.widen(lanes, start, keys, values);
            let mut row = 0;
            while row < self.rows {
                match self.rows - row {
                    4.. if L::WIDE => self.scores::<L, 4>(lanes, start, &mut row, keys, shares),
                    2.. => self.scores::<L, 2>(lanes, start, &mut row, keys, shares),
                    _ => self.scores::<L, 1>(lanes, start, &mut row, keys, shares),
                }
            }
            let count = CHUNK.min(self.positions.end - start);
            let mut row = 0;
            while row < self.rows {
                match self.rows - row {
                    4.. if L::WIDE => self.mix::<L, 4>(lanes, count, &mut row, values, shares),
                    2.. => self.mix::<L, 2>(lanes, count, &mut row, values, shares),
                    _ => self.mix::<L, 1>(lanes, count, &mut row, values, shares),
                }
            }
            start += CHUNK;
        }
        self.workspace.give_back(lines);
    }
}

impl Attend<'_> {
    /// Keys of a chunk as `[2][key]` lines of sixteen positions, values as `[CHUNK, row]`.
    #[inline(always)]
    fn widen<L: Multiply>(&self, lanes: L, start: usize, keys: &mut [Line], values: &mut [Line]) {
        let HeadLayout { dtype, key, shared, .. } = self.layout;
        let (lines, within, columns) = (self.layout.lines(), start % POSITIONS, self.layout.row() / LANES);
        let head = &self.blocks[start / POSITIONS][self.head * lines..][..lines];
        let bytes: &[u8] = bytemuck::cast_slice(head);
        let size = dtype.block_bytes();
        widen(lanes, dtype, &bytes[within * key * size..][..CHUNK * key * size], keys);
        if !shared {
            let row = columns * LANES;
            let first = POSITIONS * key + within * row;
            return widen(lanes, dtype, &bytes[first * size..][..CHUNK * row * size], values);
        }
        for (group, keys) in keys.chunks_exact(key).enumerate() {
            for column in 0..columns {
                let mut numbers = [lanes.splat(0.0); LANES];
                for (number, line) in numbers.iter_mut().zip(&keys[column * LANES..]) {
                    *number = lanes.line(line);
                }
                for (position, turned) in lanes.transpose(numbers).into_iter().enumerate() {
                    lanes.store_line(turned, &mut values[(group * LANES + position) * columns + column]);
                }
            }
        }
    }

    /// The positions that a row sees.
    #[inline(always)]
    fn sees(&self, row: usize) -> Range<usize> {
        let own = self.first + row / self.group;
        let from = self.window.map_or(0, |window| (own + 1).saturating_sub(window));
        from.max(self.positions.start)..(own + 1).min(self.positions.end)
    }

    /// Shares of a chunk's positions for `R` rows, and what is known of all so far put right.
    #[inline(always)]
    fn scores<L: Multiply, const R: usize>(
        &mut self,
        lanes: L,
        start: usize,
        row: &mut usize,
        keys: &[Line],
        shares: &mut [Line],
    ) {
        let key = self.layout.key;
        let (first, second) = keys.split_at(key);
        let second = &second[..key];
        let mut queries: [&[f32]; R] = [&[]; R];
        for (at, query) in queries.iter_mut().enumerate() {
            let row = *row + at;
            *query = &self.queries[row / self.group * self.query_stride + row % self.group * key..][..key];
        }
        let mut all = [[lanes.splat(0.0); 2]; R];
        for number in 0..key {
            let (low, high) = (lanes.line(&first[number]), lanes.line(&second[number]));
            for at in 0..R {
                let query = lanes.splat(queries[at][number]);
                all[at][0] = lanes.mul_add(low, query, all[at][0]);
                all[at][1] = lanes.mul_add(high, query, all[at][1]);
            }
        }
        let unseen = lanes.splat(f32::NEG_INFINITY);
        for (at, [mut low, mut high]) in all.into_iter().enumerate() {
            let at = *row + at;
            let sees = self.sees(at);
            let [from, to] = [sees.start, sees.end].map(|end| end.saturating_sub(start).min(CHUNK) as u32);
            let mask = if from < to { (u32::MAX >> (CHUNK as u32 - (to - from))) << from } else { 0 };
            if mask != u32::MAX {
                low = lanes.blend(mask as u16, low, unseen);
                high = lanes.blend((mask >> LANES) as u16, high, unseen);
            }
            let before = self.tops[at];
            let top = lanes.fold_max(lanes.max(low, high)).max(before);
            if top == f32::NEG_INFINITY {
                shares[2 * at..][..2].fill(Line::default());
                continue;
            }
            if top > before {
                self.tops[at] = top;
                if before > f32::NEG_INFINITY {
                    let factor = score::exp(lanes, lanes.splat(before - top));
                    let sums = &mut self.sums[at * self.layout.row()..][..self.layout.row()];
                    for sums in sums.as_chunks_mut::<LANES>().0 {
                        lanes.store(lanes.mul(lanes.load(sums), factor), sums);
                    }
                    self.totals[at] *= lanes.fold_max(factor);
                }
            }
            let top = lanes.splat(top);
            let low = score::exp(lanes, lanes.sub(low, top));
            let high = score::exp(lanes, lanes.sub(high, top));
            self.totals[at] += lanes.fold_sum(lanes.add(low, high));
            lanes.store_line(low, &mut shares[2 * at]);
            lanes.store_line(high, &mut shares[2 * at + 1]);
        }
        *row += R;
    }

    /// Adds the first `count` values of a chunk by their shares to the sums of `R` rows.
    #[inline(always)]
    fn mix<L: Multiply, const R: usize>(
        &mut self,
        lanes: L,
        count: usize,
        row: &mut usize,
        values: &[Line],
        shares: &[Line],
    ) {
        let columns = self.layout.row() / LANES;
        let mut column = 0;
        while column < columns {
            match columns - column {
                4.. if L::WIDE => self.mix_columns::<L, R, 4>(lanes, count, *row, &mut column, values, shares),
                2.. => self.mix_columns::<L, R, 2>(lanes, count, *row, &mut column, values, shares),
                _ => self.mix_columns::<L, R, 1>(lanes, count, *row, &mut column, values, shares),
            }
        }
        *row += R;
    }

    #[inline(always)]
    fn mix_columns<L: Multiply, const R: usize, const C: usize>(
        &mut self,
        lanes: L,
        count: usize,
        row: usize,
        column: &mut usize,
        values: &[Line],
        shares: &[Line],
    ) {
        let (stride, columns) = (self.layout.row(), self.layout.row() / LANES);
        let shares: &[f32] = bytemuck::cast_slice(&shares[2 * row..][..2 * R]);
        let mut all = [[lanes.splat(0.0); C]; R];
        for (at, all) in all.iter_mut().enumerate() {
            let sums = &self.sums[(row + at) * stride + *column * LANES..][..C * LANES];
            for (sum, from) in all.iter_mut().zip(sums.as_chunks::<LANES>().0) {
                *sum = lanes.load(from);
            }
        }
        for (position, values) in values.chunks_exact(columns).take(count).enumerate() {
            let mut value = [lanes.splat(0.0); C];
            for (value, line) in value.iter_mut().zip(&values[*column..][..C]) {
                *value = lanes.line(line);
            }
            for at in 0..R {
                let share = lanes.splat(shares[at * CHUNK + position]);
                for c in 0..C {
                    all[at][c] = lanes.mul_add(value[c], share, all[at][c]);
                }
            }
        }
        for (at, all) in all.iter().enumerate() {
            let sums = &mut self.sums[(row + at) * stride + *column * LANES..][..C * LANES];
            for (sum, into) in all.iter().zip(sums.as_chunks_mut::<LANES>().0) {
                lanes.store(*sum, into);
            }
        }
        *column += C;
    }
}

/// Kept numbers as floats, sixteen to a line.
#[inline(always)]
fn widen<L: Multiply>(lanes: L, dtype: Dtype, bytes: &[u8], lines: &mut [Line]) {
    match dtype {
        Dtype::F16 => {
            for (bytes, line) in bytes.as_chunks::<32>().0.iter().zip(lines) {
                lanes.store_line(lanes.widen_f16(bytes), line);
            }
        }
        Dtype::Bf16 => {
            for (bytes, line) in bytes.as_chunks::<32>().0.iter().zip(lines) {
                lanes.store_line(lanes.widen_bf16(bytes), line);
            }
        }
        _ => {
            for (bytes, line) in bytes.as_chunks::<LINE_BYTES>().0.iter().zip(lines) {
                lanes.store_line(lanes.bytes(bytes), line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::simd::Isa;

    /// What a row has to be, in double precision.
    fn naive(query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], sees: Range<usize>) -> Vec<f64> {
        let score = |key: &Vec<f32>| -> f64 { query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
        let scores: Vec<f64> = keys[sees.clone()].iter().map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        let column = |at: usize| {
            let parts = scores.iter().zip(&values[sees.clone()]);
            parts.map(|(score, value)| (score - top).exp() * f64::from(value[at])).sum::<f64>() / total
        };
        (0..values[0].len()).map(column).collect()
    }

    #[test]
    fn every_set_attends_as_the_definition_in_any_layout() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for isa in Isa::all() {
            for (case, (dtype, key, value, shared)) in [
                (Dtype::F32, 128, 128, false),
                (Dtype::Bf16, 64, 64, false),
                (Dtype::F16, 20, 20, false),
                (Dtype::Bf16, 7, 24, false),
                (Dtype::F32, 40, 24, true),
                (Dtype::F16, 72, 64, true),
            ]
            .into_iter()
            .enumerate()
            {
                let layout = HeadLayout { dtype, key, value, shared };
                let (heads, seen, group) = (3, 171 + 40 * case, 1 + case % 3);
                let round = |number: f32| match dtype {
                    Dtype::F16 => half::f16::from_f32(number).to_f32(),
                    Dtype::Bf16 => half::bf16::from_f32(number).to_f32(),
                    _ => number,
                };
                let mut draw =
                    |count: usize| -> Vec<f32> { (0..count).map(|_| round(rng.random_range(-1.0..1.0))).collect() };
                let keys: Vec<Vec<f32>> = (0..seen).map(|_| draw(key)).collect();
                let values: Vec<Vec<f32>> = match shared {
                    true => keys.iter().map(|key| key[..value].to_vec()).collect(),
                    false => (0..seen).map(|_| draw(value)).collect(),
                };
                let mut blocks: Vec<Box<[Line]>> = Vec::new();
                for _ in 0..seen.div_ceil(POSITIONS) {
                    // What was there before a position was kept must not matter.
                    blocks.push(vec![Line([f32::NAN.to_bits(); LANES]); heads * layout.lines()].into());
                }
                for position in 0..seen {
                    let block = &mut blocks[position / POSITIONS][layout.lines()..][..layout.lines()];
                    layout.keep(block, position % POSITIONS, &keys[position], &values[position]);
                }
                for (rows, window) in [(group, None), (5 * group, None), (7 * group, Some(33)), (2 * group, Some(2))] {
                    let (first, stride) = (seen - rows / group, (group + 1) * key);
                    let queries = draw(rows / group * stride);
                    let row = layout.row();
                    let (mut sums, mut tops, mut totals) = (vec![1.0; rows * row], vec![0.0; rows], vec![0.0; rows]);
                    let mut workspace = Workspace::default();
                    isa.run(Attend {
                        layout,
                        blocks: &blocks,
                        head: 1,
                        positions: window.map_or(0, |window| (first + 1).saturating_sub(window))..seen,
                        queries: &queries,
                        query_stride: stride,
                        group,
                        rows,
                        first,
                        window,
                        sums: &mut sums,
                        tops: &mut tops,
                        totals: &mut totals,
                        workspace: &mut workspace,
                    });
                    for at in 0..rows {
                        let own = first + at / group;
                        let from = window.map_or(0, |window| (own + 1).saturating_sub(window));
                        let query = &queries[at / group * stride + at % group * key..][..key];
                        let expected = naive(query, &keys, &values, from..own + 1);
                        for (sum, expected) in sums[at * row..].iter().zip(expected) {
                            let got = f64::from(sum / totals[at]);
                            assert!((got - expected).abs() < 2e-5, "{isa} {layout:?} row {at}: {got} {expected}");
                        }
                    }
                }
            }
        }
    }
}
