//! Activations brought into the form that a product wants.

use super::bytes;
use super::rows::Form;
use crate::simd::multiply::{Line, Multiply};
use crate::simd::{Kernel, LANES};

/// Converts a row of activations to a form, zeros after its end.
pub(crate) struct Convert<'a> {
    pub(crate) form: Form,
    pub(crate) values: &'a [f32],
    /// At least [`Form::lines`] of them.
    pub(crate) row: &'a mut [Line],
}

impl Kernel for Convert<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        match self.form {
            Form::Floats => {
                for (values, line) in self.values.chunks(LANES).zip(self.row) {
                    lanes.store_line(lanes.load_part(values, 0.0), line);
                }
            }
            Form::Pairs => {
                for (values, line) in self.values.chunks(2 * LANES).zip(self.row) {
                    let (low, high) = values.split_at(values.len().min(LANES));
                    let pairs = lanes.narrow_bf16(lanes.load_part(low, 0.0), lanes.load_part(high, 0.0));
                    lanes.store_line(pairs, line);
                }
            }
            Form::Bytes => bytes::quantise(lanes, self.values, &mut self.row[..self.form.lines(self.values.len())]),
        }
    }
}
