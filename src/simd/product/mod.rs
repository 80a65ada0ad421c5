//! Products of stored weights with rows of activations: `sums[t, r] = Σ_k weights[r, k] · input[t, k]`, a [`BLOCK`] of weight
//! rows at a time.
//!
//! Weights are read as they lie, row by row. Floats with few tokens go through [`tiles`], with many through [`panels`]; quantised
//! weights meet [`bytes`].
//!
//! Activations come in the [`Form`] that the product wants, each row on lines of its own whose number is odd, so that rows
//! of a power of two do not all meet in the same sets of a cache.

mod bytes;
mod convert;
mod element;
mod panels;
pub(super) mod rows;
mod tiles;

use super::Kernel;
use super::dtype::Dtype;
use super::multiply::Multiply;
pub(crate) use convert::Convert;
use element::{Bf16AsF32, Bf16Pairs, F16AsF32, F32AsF32};
use panels::Panels;
pub(crate) use rows::{BLOCK, CHUNK, Form, Product, Rows, Workspace};
use tiles::{DecodedTiles, StoredTiles};

impl Product<'_> {
    /// Rows of activations up to which tiles are faster than panels.
    fn fits_tiles<L: Multiply>(&self) -> bool {
        self.tokens.len() <= if L::WIDE { 16 } else { 32 }
    }
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(mut self, lanes: L) {
        let (columns, rows) = (self.input.columns, self.input.rows);
        let bytes = self.dtype.row_bytes(columns).expect("whole blocks in a row");
        assert!(self.weights.iter().all(|row| row.len() == bytes), "a weight row of another length than {bytes} bytes");
        assert!(self.tokens.iter().all(|&token| (token as usize) < rows), "a token past the {rows} rows");
        assert!(self.sums.len() == self.tokens.len() * BLOCK, "sums for another number of tokens");
        if columns == 0 {
            return self.sums.fill(0.0); // Kernels write sums for the columns that they meet.
        }
        let tiles = self.fits_tiles::<L>();
        match (self.input.form, self.dtype) {
            (Form::Floats, Dtype::F32) if tiles => lanes.call(StoredTiles(&mut self, F32AsF32)),
            (Form::Floats, Dtype::F16) if tiles => lanes.call(StoredTiles(&mut self, F16AsF32)),
            (Form::Floats, Dtype::Bf16) if tiles => lanes.call(StoredTiles(&mut self, Bf16AsF32)),
            (Form::Pairs, Dtype::Bf16) if tiles => lanes.call(StoredTiles(&mut self, Bf16Pairs)),
            (Form::Floats, _) if tiles => lanes.call(DecodedTiles(&mut self, F32AsF32)),
            (Form::Floats, _) => lanes.call(Panels(&mut self, F32AsF32)),
            (Form::Pairs, Dtype::Bf16) => lanes.call(Panels(&mut self, Bf16Pairs)),
            // On other sets this is not compiled.
            (Form::Bytes, dtype) if (L::DOTS || L::ALONG) && dtype.is_quantized() => bytes::product(lanes, &mut self),
            (form, dtype) => unreachable!("{dtype} meets {form:?}"),
        }
    }
}
