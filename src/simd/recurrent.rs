//! The gated delta rule of one head (arXiv 2412.06464): `S ← α·S + k·(β·(v − α·Sᵀk))ᵀ`, `o = Sᵀq`, position by position; and the gates around
//! it, `σ` and `silu`.
//!
//! Some positions go through a matrix together: what they write depends on what those before them wrote only by products of their keys, a small
//! triangular system (section 3.3 there), so the matrix is read and written once for all of them. One position is the case of a decode step.
//! Columns of a matrix know nothing of each other: sixteen are a line, and all rows of those lie together, which are small enough for the
//! nearest cache.

use super::lanes::{LANES, Lanes};
use super::multiply::{Line, Multiply};
use super::{Kernel, score};

/// Positions of one head through its matrix.
pub(crate) struct DeltaRule<'a> {
    /// `[columns of lines][key]` lines.
    pub(crate) matrix: &'a mut [Line],
    /// Of length 1, scaled; `stride` numbers from one position to the next.
    pub(crate) queries: &'a [f32],
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
    /// Numbers of a key.
    pub(crate) key: usize,
    /// Numbers of a value.
    pub(crate) value: usize,
    /// `α` and `β` of each position; `gate_stride` numbers from one to the next.
    pub(crate) decays: &'a [f32],
    pub(crate) strengths: &'a [f32],
    pub(crate) gate_stride: usize,
    /// `[positions, value]`.
    pub(crate) output: &'a mut [f32],
}

/// Lines of the matrix of a head.
pub(crate) fn matrix_lines(key: usize, value: usize) -> usize {
    value.div_ceil(LANES) * key
}

impl Kernel for DeltaRule<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(mut self, lanes: L) {
        let positions = self.output.len() / self.value.max(1);
        let mut at = 0;
        while at < positions {
            match positions - at {
                8.. if L::WIDE => self.positions::<L, 8>(lanes, &mut at),
                4.. => self.positions::<L, 4>(lanes, &mut at),
                _ => self.positions::<L, 1>(lanes, &mut at),
            }
        }
    }
}

impl DeltaRule<'_> {
    /// The next `P` positions.
    #[inline(always)]
    fn positions<L: Multiply, const P: usize>(&mut self, lanes: L, at: &mut usize) {
        let (first, key) = (*at, self.key);
        let of = |all: &'_ [f32]| -> [usize; P] {
            debug_assert!(all.len() >= (first + P - 1) * self.stride + key);
            std::array::from_fn(|position| (first + position) * self.stride)
        };
        let starts = of(self.keys);
        let keys: [&[f32]; P] = starts.map(|start| &self.keys[start..][..key]);
        let queries: [&[f32]; P] = starts.map(|start| &self.queries[start..][..key]);
        let gate = |all: &[f32]| -> [f32; P] { std::array::from_fn(|at| all[(first + at) * self.gate_stride]) };
        let (decays, strengths) = (gate(self.decays), gate(self.strengths));

        // What is left of the matrix before them, and of what position `j` wrote, after position `t`.
        let (mut left, mut after) = ([0.0; P], [[0.0; P]; P]);
        let (mut all, mut row) = (1.0, [0.0; P]);
        for (t, &decay) in decays.iter().enumerate() {
            all *= decay;
            row.iter_mut().for_each(|share| *share *= decay);
            row[t] = 1.0;
            (left[t], after[t]) = (all, row);
        }
        // What a position sees of those before it, by its key and by its query.
        let (mut corrected, mut read) = ([[0.0; P]; P], [[0.0; P]; P]);
        for t in 0..P {
            for j in 0..=t {
                read[t][j] = dot(lanes, keys[j], queries[t]) * after[t][j];
                if j < t {
                    corrected[t][j] = -strengths[t] * after[t][j] * dot(lanes, keys[j], keys[t]);
                }
            }
        }
        let (columns, value) = (self.value.div_ceil(LANES), self.value);
        for column in 0..columns {
            let width = LANES.min(value - column * LANES);
            let block = &mut self.matrix[column * key..][..key];
            let (by_key, by_query) = match P {
                1 => {
                    let [by_key, by_query] = project(lanes, block, [keys[0], queries[0]]);
                    ([by_key; P], [by_query; P])
                }
                _ => (project(lanes, block, keys), project(lanes, block, queries)),
            };
            let mut written = [lanes.splat(0.0); P];
            for t in 0..P {
                let values = &self.values[(first + t) * self.stride + column * LANES..][..width];
                let sought = load(lanes, values);
                let mut sum = lanes.mul(sought, lanes.splat(strengths[t]));
                sum = lanes.mul_add(by_key[t], lanes.splat(-strengths[t] * left[t]), sum);
                for j in 0..t {
                    sum = lanes.mul_add(written[j], lanes.splat(corrected[t][j]), sum);
                }
                written[t] = sum;
                let mut seen = lanes.mul(by_query[t], lanes.splat(left[t]));
                for j in 0..=t {
                    seen = lanes.mul_add(written[j], lanes.splat(read[t][j]), seen);
                }
                let output = &mut self.output[(first + t) * value + column * LANES..][..width];
                match output.as_chunks_mut::<LANES>().0 {
                    [whole] => lanes.store(seen, whole),
                    _ => lanes.store_part(seen, output),
                }
            }
            for (written, &after) in written.iter_mut().zip(&after[P - 1]) {
                *written = lanes.mul(*written, lanes.splat(after));
            }
            let kept = lanes.splat(left[P - 1]);
            for (row, line) in block.iter_mut().enumerate() {
                let mut sum = lanes.mul(lanes.line(line), kept);
                for j in 0..P {
                    sum = lanes.mul_add(written[j], lanes.splat(keys[j][row]), sum);
                }
                lanes.store_line(sum, line);
            }
        }
        *at += P;
    }
}

/// `Σ row · line` for each of some vectors.
#[inline(always)]
fn project<L: Multiply, const P: usize>(lanes: L, block: &[Line], vectors: [&[f32]; P]) -> [L::Vector; P] {
    let mut sums = [lanes.splat(0.0); P];
    for (row, line) in block.iter().enumerate() {
        let line = lanes.line(line);
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = lanes.mul_add(line, lanes.splat(vector[row]), *sum);
        }
    }
    sums
}

#[inline(always)]
fn dot<L: Multiply>(lanes: L, a: &[f32], b: &[f32]) -> f32 {
    let ((a, last_a), (b, last_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sum = lanes.mul(lanes.load_part(last_a, 0.0), lanes.load_part(last_b, 0.0));
    for (a, b) in a.iter().zip(b) {
        sum = lanes.mul_add(lanes.load(a), lanes.load(b), sum);
    }
    lanes.fold_sum(sum)
}

#[inline(always)]
fn load<L: Lanes>(lanes: L, from: &[f32]) -> L::Vector {
    match from.as_chunks::<LANES>().0 {
        [whole] => lanes.load(whole),
        _ => lanes.load_part(from, 0.0),
    }
}

/// What a number is weighed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// `σ(gate)`.
    Sigmoid,
    /// `gate · σ(gate)`.
    Silu,
}

/// `x · gate(y)` in place of each `x`.
pub(crate) struct Weigh<'a> {
    pub(crate) rows: &'a mut [f32],
    pub(crate) gates: &'a [f32],
    pub(crate) gate: Gate,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        let silu = self.gate == Gate::Silu;
        let (rows, last_row) = self.rows.as_chunks_mut::<LANES>();
        let (gates, last_gate) = self.gates.as_chunks::<LANES>();
        for (row, gate) in rows.iter_mut().zip(gates) {
            lanes.store(lanes.mul(lanes.load(row), open(lanes, lanes.load(gate), silu)), row);
        }
        let gate = open(lanes, lanes.load_part(&last_gate[..last_row.len()], 0.0), silu);
        lanes.store_part(lanes.mul(lanes.load_part(last_row, 0.0), gate), last_row);
    }
}

/// `x · σ(x)` in place of each `x`.
pub(crate) struct Silu<'a>(pub(crate) &'a mut [f32]);

impl Kernel for Silu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        let (rows, last) = self.0.as_chunks_mut::<LANES>();
        for row in rows {
            lanes.store(open(lanes, lanes.load(row), true), row);
        }
        lanes.store_part(open(lanes, lanes.load_part(last, 0.0), true), last);
    }
}

/// `σ(x)`, or `x · σ(x)`; no number where `x` is none.
#[inline(always)]
fn open<L: Lanes>(lanes: L, x: L::Vector, silu: bool) -> L::Vector {
    let (zero, one) = (lanes.splat(0.0), lanes.splat(1.0));
    let small = score::exp(lanes, lanes.sub(zero, lanes.max(x, lanes.sub(zero, x))));
    let above = lanes.div(one, lanes.add(one, small));
    let share = lanes.blend(lanes.ge(x, zero), above, lanes.mul(small, above));
    // 0 but where `x` is no number, which the exponential would not show.
    let share = lanes.add(share, lanes.sub(x, x));
    if silu { lanes.mul(x, share) } else { share }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use proptest::prelude::*;

    /// The rule as it is written, in `f64`.
    struct Plain {
        matrix: Vec<f64>,
        key: usize,
        value: usize,
    }

    impl Plain {
        fn step(&mut self, query: &[f32], key: &[f32], value: &[f32], decay: f32, strength: f32) -> Vec<f64> {
            self.matrix.iter_mut().for_each(|number| *number *= f64::from(decay));
            let read = |matrix: &[f64], by: &[f32]| -> Vec<f64> {
                let column = |c: usize| (0..self.key).map(|r| f64::from(by[r]) * matrix[r * self.value + c]).sum();
                (0..self.value).map(column).collect()
            };
            let expected = read(&self.matrix, key);
            for (row, &by) in self.matrix.chunks_exact_mut(self.value).zip(key) {
                for ((number, &value), &expected) in row.iter_mut().zip(value).zip(&expected) {
                    *number += f64::from(by) * f64::from(strength) * (f64::from(value) - expected);
                }
            }
            read(&self.matrix, query)
        }
    }

    fn unit(vector: &mut [f32]) {
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-3);
        vector.iter_mut().for_each(|x| *x /= length);
    }

    proptest! {
        /// Positions at once and one by one, on every set, are the rule.
        #[test]
        fn every_set_does_what_the_rule_says(
            key in 1usize..40,
            value in 1usize..40,
            positions in 1usize..20,
            seed in prop::collection::vec(-1f32..1.0, 97),
            alike in any::<bool>(),
        ) {
            let draw = |at: usize| seed[at % seed.len()] + if alike { 2.0 } else { 0.0 };
            let stride = 2 * key + value;
            let mut rows: Vec<f32> = (0..positions * stride).map(|at| draw(at * 31 + at / 7)).collect();
            for row in rows.chunks_exact_mut(stride) {
                unit(&mut row[..key]);
                unit(&mut row[key..2 * key]);
            }
            let gates: Vec<f32> = (0..2 * positions).map(|at| seed[at * 13 % seed.len()].abs()).collect();
            let mut plain = Plain { matrix: vec![0.0; key * value], key, value };
            let expected: Vec<f64> = rows
                .chunks_exact(stride)
                .zip(gates.chunks_exact(2))
                .flat_map(|(row, gates)| plain.step(&row[..key], &row[key..2 * key], &row[2 * key..], gates[0], gates[1]))
                .collect();
            for isa in Isa::all() {
                for piece in [positions, 1, 5] {
                    let mut matrix = vec![Line::default(); matrix_lines(key, value)];
                    let mut output = vec![0.0; positions * value];
                    for (at, output) in output.chunks_mut(piece * value).enumerate() {
                        let (rows, gates) = (&rows[at * piece * stride..], &gates[at * piece * 2..]);
                        isa.run(DeltaRule {
                            matrix: &mut matrix,
                            queries: rows,
                            keys: &rows[key..],
                            values: &rows[2 * key..],
                            stride,
                            key,
                            value,
                            decays: gates,
                            strengths: &gates[1..],
                            gate_stride: 2,
                            output,
                        });
                    }
                    for (got, expected) in output.iter().zip(&expected) {
                        let off = (f64::from(*got) - expected).abs() / expected.abs().max(1.0);
                        prop_assert!(off <= 2e-5, "{isa} in pieces of {piece}: {got} for {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn gates_open_as_defined_and_hide_nothing() {
        let gates: Vec<f32> = (0..37).map(|at| (at as f32 - 18.0) * 7.3).collect();
        for isa in Isa::all() {
            for gate in [Gate::Sigmoid, Gate::Silu] {
                let mut rows = vec![2.0; gates.len()];
                isa.run(Weigh { rows: &mut rows, gates: &gates, gate });
                let mut alone = gates.clone();
                isa.run(Silu(&mut alone));
                for ((row, alone), &gate_number) in rows.iter().zip(&alone).zip(&gates) {
                    let x = f64::from(gate_number);
                    let (sigmoid, silu) = (1.0 / (1.0 + (-x).exp()), x / (1.0 + (-x).exp()));
                    let expected = 2.0 * if gate == Gate::Silu { silu } else { sigmoid };
                    assert!((f64::from(*row) - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{isa} {x}: {row}");
                    assert!((f64::from(*alone) - silu).abs() <= 1e-5 * silu.abs().max(1.0), "{isa} {x}: {alone}");
                }
                let mut rows = [1.0; 3];
                isa.run(Weigh { rows: &mut rows, gates: &[f32::NAN, 0.0, f32::INFINITY], gate });
                assert!(rows[0].is_nan() && rows[1].is_finite() && rows[2].is_nan(), "{isa}: {rows:?}");
            }
        }
    }
}
