//! The expert engine: `output[t] = Σ_slots weight · down(act(gate(x_t), up(x_t)))` on slices, for any number of experts at once.
//!
//! Two passes. The first makes the activations between the projections, `[slots, width]`, in pieces of an expert's width; the second
//! multiplies them with the down projection and adds them up, in pieces of the hidden width, each of which one thread does for
//! all experts in their order. So work is cut across experts *and* rows of weights: one expert that has all tokens keeps all
//! threads busy, no copy `[slots, hidden]` is made, and the result does not depend on the number of threads.
//!
//! Weights are read as stored, in any [`Dtype`], and multiplied in the form that is fastest for that dtype, that number of
//! tokens and this CPU: floats, bf16 pairs or bytes, always summed in `f32`. Memory beside the weights is
//! `O(tokens · hidden + slots · width)`.
//!
//! ```
//! use phase_moe::{Activation, Engine, ExpertWeights, Matrix, Work};
//! use phase_moe::experts::{Function, ProjectionWeights};
//!
//! // One expert of width 1 on a hidden width of 2, tokens 0 and 2 of three.
//! let (up, down) = ([1.0, 0.0], [2.0, 3.0]);
//! let projection = |rows, columns, values| Matrix::from_f32(rows, columns, values).map(ProjectionWeights::from);
//! let activation = Activation { function: Function::ReluSquared, gated: false };
//! let expert = ExpertWeights::new(activation, None, projection(1, 2, &up)?, projection(2, 1, &down)?)?;
//! let input = [1.0, 9.0, 2.0, 9.0, 3.0, 9.0];
//! let mut output = [0.0; 6];
//! let work = [Work { expert, tokens: &[0, 2], weights: &[1.0, 0.5] }];
//! Engine::default().forward(Matrix::from_f32(3, 2, &input)?, &work, &mut output)?;
//! assert_eq!(output, [2.0, 3.0, 0.0, 0.0, 9.0, 13.5]);
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of tensors, gates or where weights come from.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::experts::fused::Activate;
use crate::experts::matrix::{Dtype, Matrix, Widen};
use crate::experts::threads::{Buffers, ThreadBuffers, grow, in_columns, share_out};
use crate::experts::work::{ExpertWeights, Linear, ProjectionWeights, Work, check};
use crate::simd::multiply::Line;
use crate::simd::product::{BLOCK, CHUNK, Convert, Form, Product, Rows, Workspace};
use crate::simd::{Isa, LANES};

/// Rows of activations that go through an expert together.
pub(super) const GROUP_ROWS: usize = 256;
/// Runs experts on this CPU, on the threads of the Rayon pool that it is called in.
#[derive(Debug, Default)]
pub struct Engine {
    isa: Isa,
    /// Activations are not rounded to bf16, whatever meets them.
    exact: bool,
    /// What forward passes worked in, for those that come.
    buffers: Mutex<Vec<Buffers>>,
}

/// Some of an expert's tokens, and the forms in which its products want them.
struct Group<'a> {
    expert: &'a ExpertWeights<'a>,
    tokens: &'a [u32],
    weights: &'a [f32],
    input: Form,
    /// What the gate wants, where that is another form.
    gate_input: Form,
    between: Form,
}

impl Engine {
    /// An engine on another instruction set than the widest.
    #[cfg(test)]
    pub(crate) fn on(isa: Isa) -> Self {
        Self { isa, ..Self::default() }
    }

    /// An engine that multiplies weights in bf16 with floats where the CPU has products of bf16 pairs too.
    pub(crate) fn exact() -> Self {
        Self { exact: true, ..Self::default() }
    }

    /// The instruction set that it runs on.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// `output[t, :] = Σ weight · expert(input[t, :])` over all `work` that names `t`, `[tokens, hidden]` each; zeros for tokens that
    /// none names. `input` is `f32`, `f16` or `bf16`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::error::Error::Shape) for an expert of another hidden width, weights that are not as many as tokens, an output of
    /// another size or an input that is quantised; [`Error::Parameter`](crate::error::Error::Parameter) for a token
    /// that there is not.
    pub fn forward(&self, input: Matrix<'_>, work: &[Work<'_>], output: &mut [f32]) -> Result<()> {
        self.sum(input, work, output, false)
    }

    /// The same added to what `output` holds: experts that come in groups, one group after another, make the same bits as all at
    /// once.
    ///
    /// # Errors
    /// Those of [`Engine::forward`].
    pub fn add(&self, input: Matrix<'_>, work: &[Work<'_>], output: &mut [f32]) -> Result<()> {
        self.sum(input, work, output, true)
    }

    fn sum(&self, input: Matrix<'_>, work: &[Work<'_>], output: &mut [f32], add: bool) -> Result<()> {
        let [tokens, hidden] = input.shape();
        check(input, work, output)?;
        if hidden == 0 {
            return Ok(()); // No column to cut into pieces.
        }
        let mut buffers = self.take_buffers();
        let groups = self.groups(work);
        let products: usize = groups.iter().map(|group| group.tokens.len() * group.expert.parameters()).sum();
        let bytes: usize = groups.iter().map(|group| group.expert.size_in_bytes()).sum();
        let threads = buffers.threads_for(products, bytes);

        let inputs =
            self.inputs(input, groups.iter().flat_map(|group| [group.input, group.gate_input]), threads, &mut buffers);
        let rows = |form: Form| {
            let (_, lines) = inputs.iter().find(|(made, _)| *made == form).expect("every form that a group wants");
            Rows::whole(&buffers.input[lines.clone()], form, hidden, tokens)
        };

        // First pass: what is between the projections, one item for each group and piece of its width.
        let lines = |group: &Group<'_>| group.tokens.len() * group.between.stride(CHUNK.min(group.expert.width()));
        let total: usize = groups.iter().map(|group| group.expert.width().div_ceil(CHUNK) * lines(group)).sum();
        grow(&mut buffers.between, total);
        let mut items = Vec::new();
        let mut left = &mut buffers.between[..total];
        for group in &groups {
            for first in (0..group.expert.width()).step_by(CHUNK) {
                let (mine, rest) = left.split_at_mut(lines(group));
                left = rest;
                items.push((group, first..group.expert.width().min(first + CHUNK), mine));
            }
        }
        share_out(items.into_iter(), &mut buffers.threads[..threads], |room, (group, columns, between)| {
            self.first_pass(group, [rows(group.gate_input), rows(group.input)], columns, room, between);
        });

        // Second pass: the down projection and the weighted sum, one item for each piece of the hidden width.
        let mut starts = Vec::with_capacity(groups.len());
        let mut start = 0;
        for group in &groups {
            starts.push(start);
            start += group.expert.width().div_ceil(CHUNK) * lines(group);
        }
        let Buffers { between, sums, threads: rooms, .. } = &mut buffers;
        let between = &*between;
        in_columns(tokens, hidden, output, add, sums, &mut rooms[..threads], |room, columns, sums| {
            if !add {
                sums.fill(0.0);
            }
            for (at, (group, &start)) in groups.iter().zip(&starts).enumerate() {
                let next = groups.get(at + 1).map(|group| group.expert.down.weight);
                let width = group.expert.width();
                let rows = Rows::segmented(&between[start..], group.between, width, CHUNK, group.tokens.len());
                self.second_pass(group, next, rows, columns.clone(), room, sums);
            }
        });
        self.give_back(buffers);
        Ok(())
    }

    /// `output[t, r] = Σ_k weight[r, k] · input[t, k]`: one linear layer, `[tokens, columns]` times `[rows, columns]`ᵀ.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::error::Error::Shape) for a weight of another number of columns, an output that is not `[tokens, rows]` or an input that is
    /// quantised.
    pub fn product(&self, input: Matrix<'_>, weight: Matrix<'_>, output: &mut [f32]) -> Result<()> {
        self.products(&mut [Linear { input, projection: weight.into(), output }])
    }

    /// The form of activations that products with a dtype want.
    pub(super) fn form(&self, dtype: Dtype) -> Form {
        match dtype {
            Dtype::Bf16 if self.isa.has_dots() && !self.exact => Form::Pairs,
            dtype if dtype.is_quantized() && self.isa.has_bytes() => Form::Bytes,
            _ => Form::Floats,
        }
    }

    pub(super) fn take_buffers(&self) -> Buffers {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub(super) fn give_back(&self, buffers: Buffers) {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(buffers);
    }

    /// A block of a matrix's rows, those before `columns.end` of them, times some rows of activations. Meanwhile the next block is
    /// read ahead, or the first one of the matrix that comes next.
    #[expect(clippy::too_many_arguments, reason = "a product's operands")]
    pub(super) fn block(
        &self,
        weight: Matrix<'_>,
        next: Option<Matrix<'_>>,
        columns: &Range<usize>,
        first: usize,
        input: Rows<'_>,
        tokens: &[u32],
        sums: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let row = |row: usize| row_at(weight, row, columns.end - 1);
        let ahead = |from: usize| match next {
            Some(next) if first + BLOCK >= columns.end => row_at(next, columns.start + from, columns.end - 1),
            _ => row(first + BLOCK + from),
        };
        self.isa.run(Product {
            dtype: weight.dtype(),
            weights: std::array::from_fn(|at| row(first + at)),
            ahead: [ahead(0), ahead(BLOCK / 2)],
            input,
            tokens,
            sums,
            workspace,
        });
    }

    /// Cuts work into groups of rows.
    fn groups<'a>(&self, work: &'a [Work<'a>]) -> Vec<Group<'a>> {
        let mut groups = Vec::new();
        for Work { expert, tokens, weights } in work {
            for (tokens, weights) in tokens.chunks(GROUP_ROWS).zip(weights.chunks(GROUP_ROWS)) {
                let floats = expert.mixes_floats();
                let form = |weight: Matrix<'_>| match floats && !weight.dtype().is_quantized() {
                    true => Form::Floats,
                    false => self.form(weight.dtype()),
                };
                let (input, between) = (form(expert.up.weight), form(expert.down.weight));
                let gate_input = form(expert.gate.unwrap_or(expert.up).weight);
                groups.push(Group { expert, tokens, weights, input, gate_input, between });
            }
        }
        groups
    }

    /// The input in every form that is wanted, and where each lies.
    fn inputs(
        &self,
        input: Matrix<'_>,
        wanted: impl Iterator<Item = Form>,
        threads: usize,
        buffers: &mut Buffers,
    ) -> Vec<(Form, Range<usize>)> {
        let [tokens, columns] = input.shape();
        let mut forms: Vec<(Form, Range<usize>)> = Vec::new();
        let mut end = 0;
        for wanted in wanted {
            if !forms.iter().any(|(form, _)| *form == wanted) {
                let lines = tokens * wanted.stride(columns);
                forms.push((wanted, end..end + lines));
                end += lines;
            }
        }
        grow(&mut buffers.input, end);
        for (form, lines) in &forms {
            self.convert(input, *form, &mut buffers.input[lines.clone()], &mut buffers.threads[..threads]);
        }
        forms
    }

    /// Rows of activations in a form.
    pub(super) fn convert(&self, input: Matrix<'_>, form: Form, lines: &mut [Line], rooms: &mut [ThreadBuffers]) {
        let [tokens, columns] = input.shape();
        // A few rows are not worth a second thread.
        let threads = rooms.len().min(tokens.div_ceil(8)).max(1);
        let rows = lines.chunks_exact_mut(form.stride(columns)).enumerate();
        share_out(rows, &mut rooms[..threads], |room, (row, lines)| {
            room.values.resize(columns, 0.0);
            self.isa.run(Widen { from: input, row, values: &mut room.values });
            self.isa.run(Convert { form, values: &room.values, row: lines });
        });
    }

    /// The products and activations of a first pass: a block holds rows of gate and up projection.
    fn joined_products(&self, group: &Group<'_>, input: Rows<'_>, columns: Range<usize>, room: &mut ThreadBuffers) {
        let expert = group.expert;
        let ThreadBuffers { workspace, sums, values, .. } = room;
        let at_once = if expert.gate.is_some() { BLOCK / 2 } else { BLOCK };
        for first in columns.clone().step_by(at_once) {
            // The first sixteen rows are the gate's, the others the up projection's of the same columns; past the last column the
            // last one stands in.
            let first_half = expert.gate.unwrap_or(expert.up).weight;
            let second = if expert.gate.is_some() { first } else { first + BLOCK / 2 };
            let last = columns.end - 1;
            let weights = std::array::from_fn(|at| match at < BLOCK / 2 {
                true => row_at(first_half, first + at, last),
                false => row_at(expert.up.weight, second + at - BLOCK / 2, last),
            });
            let ahead = [row_at(first_half, first + at_once, last), row_at(expert.up.weight, second + at_once, last)];
            self.isa.run(Product {
                dtype: expert.up.weight.dtype(),
                weights,
                ahead,
                input,
                tokens: group.tokens,
                sums,
                workspace,
            });
            let into = first - columns.start..(first - columns.start + at_once).min(columns.len());
            let biases = match &expert.gate {
                Some(gate) => [gate.biases(first), expert.up.biases(first)],
                None => [expert.up.biases(first), expert.up.biases(first + LANES)],
            };
            let stride = columns.len();
            self.isa.run(Activate { activation: expert.activation, biases, sums, values, stride, into });
        }
    }

    /// The same where the gate is of another dtype: a block of each, then activations of half a block at a time.
    fn mixed_products(
        &self,
        group: &Group<'_>,
        gate: ProjectionWeights<'_>,
        [gate_input, input]: [Rows<'_>; 2],
        columns: Range<usize>,
        room: &mut ThreadBuffers,
    ) {
        let (activation, up, tokens) = (group.expert.activation, group.expert.up, group.tokens);
        let ThreadBuffers { workspace, sums, gates, values } = room;
        gates.resize(tokens.len() * BLOCK, 0.0);
        for first in columns.clone().step_by(BLOCK) {
            self.block(gate.weight, Some(up.weight), &columns, first, gate_input, tokens, gates, workspace);
            self.block(up.weight, None, &columns, first, input, tokens, sums, workspace);
            let (gates, sums) = (gates.as_chunks_mut::<BLOCK>().0, sums.as_chunks_mut::<BLOCK>().0);
            // Gates of the first half meet the up products of the first half, where the others were.
            for (gates, sums) in gates.iter_mut().zip(&mut *sums) {
                gates[BLOCK / 2..].swap_with_slice(&mut sums[..BLOCK / 2]);
            }
            for (half, sums) in [&mut *gates, sums].into_iter().enumerate() {
                let first = first + half * LANES;
                if first >= columns.end {
                    break;
                }
                let into = first - columns.start..(first - columns.start + LANES).min(columns.len());
                let (biases, stride) = ([gate.biases(first), up.biases(first)], columns.len());
                let sums = sums.as_flattened_mut();
                self.isa.run(Activate { activation, biases, sums, values, stride, into });
            }
        }
    }

    /// `act(gate(x), up(x))` of a group in some columns of its width, from the input as the gate and as the up projection want it.
    fn first_pass(
        &self,
        group: &Group<'_>,
        [gate_input, input]: [Rows<'_>; 2],
        columns: Range<usize>,
        room: &mut ThreadBuffers,
        between: &mut [Line],
    ) {
        let (expert, tokens, stride) = (group.expert, group.tokens.len(), columns.len());
        room.sums.resize(tokens * BLOCK, 0.0);
        room.values.resize(tokens * stride, 0.0);
        match expert.other_gate() {
            Some(gate) => self.mixed_products(group, gate, [gate_input, input], columns.clone(), room),
            None => self.joined_products(group, input, columns.clone(), room),
        }
        let values = &room.values;
        let stride = group.between.stride(CHUNK.min(expert.width()));
        for (values, row) in values.chunks_exact(columns.len()).zip(between.chunks_exact_mut(stride)) {
            self.isa.run(Convert { form: group.between, values, row });
        }
    }

    /// Adds a group's weighted output in some columns of the hidden width to `sums`, `[tokens, columns]`.
    fn second_pass(
        &self,
        group: &Group<'_>,
        next: Option<Matrix<'_>>,
        input: Rows<'_>,
        columns: Range<usize>,
        room: &mut ThreadBuffers,
        sums: &mut [f32],
    ) {
        let down = group.expert.down;
        let ThreadBuffers { workspace, sums: products, .. } = room;
        products.resize(group.tokens.len() * BLOCK, 0.0);
        for first in columns.clone().step_by(BLOCK) {
            let tokens = &ROWS[..group.tokens.len()];
            self.block(down.weight, next, &columns, first, input, tokens, products, workspace);
            let at = first - columns.start..(first - columns.start + BLOCK).min(columns.len());
            let bias = down.bias.map(|bias| &bias[first..first + at.len()]);
            let rows = group.tokens.iter().zip(group.weights).zip(products.as_chunks::<BLOCK>().0);
            for ((&token, &weight), products) in rows {
                let sums = &mut sums[token as usize * columns.len()..][at.clone()];
                match bias {
                    None => sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += weight * product),
                    Some(bias) => {
                        let products = products.iter().zip(bias).map(|(product, bias)| product + bias);
                        sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += weight * product);
                    }
                }
            }
        }
    }
}

/// Row numbers of a group.
const ROWS: [u32; GROUP_ROWS] = {
    let mut rows = [0; GROUP_ROWS];
    let mut row = 0;
    while row < GROUP_ROWS {
        rows[row] = row as u32;
        row += 1;
    }
    rows
};

/// A row, or the last one that there is to do.
fn row_at(matrix: Matrix<'_>, row: usize, last: usize) -> &[u8] {
    matrix.row(row.min(last))
}
