//! Few tokens: tiles of some weight rows, sums along the lanes. Nothing is rearranged, so that it runs at the speed of memory.

#![allow(unsafe_code)]

use std::ops::Range;

use super::element::{Element, decode};
use super::rows::{BLOCK, CHUNK, Product, Rows};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::{Kernel, LANES};

/// Weight rows of a tile. Run by `benches/engine`.
const TILE_ROWS: usize = 4;
/// Tokens of such a tile. Run by `benches/engine`.
const TILE_TOKENS: usize = 6;
/// Bytes between a piece of a row and the one that is read ahead meanwhile: what comes while memory takes to answer. Run by `benches/engine`.
const FAR: usize = 8 << 10;

/// Rows to read ahead, whole tiles of them, where so many bytes of each row are read at a time.
#[inline(always)]
fn rows_ahead(bytes: usize) -> usize {
    FAR.div_ceil(bytes.max(1)).clamp(TILE_ROWS, BLOCK).next_multiple_of(TILE_ROWS)
}

/// `R` rows of weights in the type of an [`Element`], some of their columns, from row `first` of the block on.
struct Tile<'a, const R: usize> {
    first: usize,
    /// Where the rows' columns start.
    weights: [*const u8; R],
    /// The rows whose same columns are read next.
    ahead: [*const u8; R],
    input: Rows<'a>,
    columns: Range<usize>,
}

/// Columns that go through a tile at once: activations of all tokens and their weights fit the first cache.
fn tile_columns<E: Element>(columns: usize, tokens: usize) -> usize {
    const BYTES: usize = 16 << 10;
    let words = BYTES / (4 * tokens.max(1));
    let chunks = (words * E::COLUMNS / LANES / CHUNK).max(1);
    // Few tokens leave nothing to keep.
    if tokens <= 2 { columns } else { chunks.max(2) * CHUNK }
}

/// Tiles over weights as they are stored.
pub(super) struct StoredTiles<'p, 'a, E>(pub(super) &'p mut Product<'a>, pub(super) E);

impl<E: Element> Kernel for StoredTiles<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        stored_tiles::<E, L>(lanes, self.0);
    }
}

#[inline(always)]
fn stored_tiles<E: Element, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    // All tokens in one tile, as far as there are registers: weights come from memory once.
    match L::WIDE && product.tokens.len() > TILE_TOKENS {
        true => stored_tiles_of::<E, L, 2>(lanes, product),
        false => stored_tiles_of::<E, L, TILE_ROWS>(lanes, product),
    }
}

#[inline(always)]
fn stored_tiles_of<E: Element, L: Multiply, const R: usize>(lanes: L, product: &mut Product<'_>) {
    let columns = product.input.columns;
    let at_once = tile_columns::<E>(columns, product.tokens.len());
    let far = rows_ahead(at_once.min(columns) / E::COLUMNS * E::BYTES);
    for first in (0..columns).step_by(at_once) {
        let now = first..columns.min(first + at_once);
        let (offset, next) = (first / E::COLUMNS * E::BYTES, now.end / E::COLUMNS * E::BYTES);
        for row in (0..BLOCK).step_by(R) {
            let mut weights = [std::ptr::null(); R];
            let mut ahead = weights;
            for at in 0..R {
                weights[at] = product.row(row + at).wrapping_add(offset);
                let soon = row + far + at;
                ahead[at] = match soon < BLOCK {
                    true => product.row(soon).wrapping_add(offset),
                    false if now.end < columns => product.row(soon - BLOCK).wrapping_add(next),
                    false => product.row(soon),
                };
            }
            let tile = Tile { first: row, weights, ahead, input: product.input, columns: now.clone() };
            tokens_of_tile::<E, L, R>(lanes, &tile, product.tokens, product.sums);
        }
    }
}

/// Tiles over weights that are decoded into the cache first.
pub(super) struct DecodedTiles<'p, 'a, E>(pub(super) &'p mut Product<'a>, pub(super) E);

impl<E: Element> Kernel for DecodedTiles<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        decoded_tiles::<E, L>(lanes, self.0);
    }
}

#[inline(always)]
fn decoded_tiles<E: Element, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let columns = product.input.columns;
    let at_once = tile_columns::<E>(columns, product.tokens.len().max(3));
    let far = rows_ahead(product.weights[0].len());
    let stride = E::FORM.stride(at_once);
    let mut lines = product.workspace.take(TILE_ROWS * stride);
    for row in (0..BLOCK).step_by(TILE_ROWS) {
        let rows = &product.weights[row..row + TILE_ROWS];
        let ahead = [0, 1, 2, 3].map(|at| product.row(row + far + at));
        for first in (0..columns).step_by(at_once) {
            let now = first..columns.min(first + at_once);
            for ((at, lines), weights) in lines.chunks_exact_mut(stride).enumerate().zip(rows) {
                let chunks = first / CHUNK..now.end.div_ceil(CHUNK);
                for (chunk, lines) in chunks.zip(lines.chunks_mut(E::FORM.lines(CHUNK))) {
                    read_ahead(lanes, product.dtype, ahead[at], chunk);
                    decode::<E, L>(lanes, product.dtype, weights, chunk, columns, lines);
                }
            }
            let start = lines.as_ptr().cast::<u8>();
            let at = |row: usize| start.wrapping_add(row * stride * LINE_BYTES);
            let weights = [at(0), at(1), at(2), at(3)];
            let tile = Tile { first: row, weights, ahead: weights, input: product.input, columns: now };
            tokens_of_tile::<E, L, TILE_ROWS>(lanes, &tile, product.tokens, product.sums);
        }
    }
    product.workspace.give_back(lines);
}

/// Reads a chunk of a row of weights ahead.
#[inline(always)]
fn read_ahead<L: Multiply>(lanes: L, dtype: Dtype, row: *const u8, chunk: usize) {
    let bytes = CHUNK / dtype.block() * dtype.block_bytes();
    for at in (0..bytes).step_by(LINE_BYTES) {
        lanes.prefetch(row.wrapping_add(chunk * bytes + at));
    }
}

/// All tokens against a tile's rows: as many at a time as there are registers for.
#[inline(always)]
fn tokens_of_tile<E: Element, L: Multiply, const R: usize>(
    lanes: L,
    tile: &Tile<'_, R>,
    tokens: &[u32],
    sums: &mut [f32],
) {
    let most = match (L::WIDE, R) {
        (true, 2) => 2 * TILE_TOKENS,
        (true, _) => TILE_TOKENS,
        (false, _) => 2,
    };
    let mut left = (tokens, sums);
    while !left.0.is_empty() {
        // Alike, where that many do not divide them: a tile of one token costs as many loads as one of three.
        let count = left.0.len().div_ceil(left.0.len().div_ceil(most));
        let (now, rest) = left.0.split_at(count);
        let (sums, behind) = left.1.split_at_mut(count * BLOCK);
        left = (rest, behind);
        match count {
            1 => tile.sums::<E, L, 1>(lanes, now, sums),
            2 => tile.sums::<E, L, 2>(lanes, now, sums),
            3 => tile.sums::<E, L, 3>(lanes, now, sums),
            4 => tile.sums::<E, L, 4>(lanes, now, sums),
            5 => tile.sums::<E, L, 5>(lanes, now, sums),
            6 => tile.sums::<E, L, 6>(lanes, now, sums),
            7 => tile.sums::<E, L, 7>(lanes, now, sums),
            8 => tile.sums::<E, L, 8>(lanes, now, sums),
            9 => tile.sums::<E, L, 9>(lanes, now, sums),
            10 => tile.sums::<E, L, 10>(lanes, now, sums),
            11 => tile.sums::<E, L, 11>(lanes, now, sums),
            _ => tile.sums::<E, L, 12>(lanes, now, sums),
        }
    }
}

impl<const R: usize> Tile<'_, R> {
    /// The rows times `T` tokens, written for the first columns, added for later ones; meanwhile the next weights are read into
    /// the cache.
    #[inline(always)]
    fn sums<E: Element, L: Multiply, const T: usize>(&self, lanes: L, tokens: &[u32], sums: &mut [f32]) {
        let is_met = match (L::WIDE, R) {
            (true, 2) => T > TILE_TOKENS / 2,
            (true, _) => T <= TILE_TOKENS,
            (false, _) => T <= 2,
        };
        // The others are not compiled.
        assert!(is_met, "no tile of {R} rows and {T} tokens");
        let tokens: &[u32; T] = tokens.try_into().expect("a tile of as many tokens");
        let zero = lanes.splat(0.0);
        let mut all = [[zero; R]; T];
        let mut column = self.columns.start;
        while column < self.columns.end {
            let (segment, within) = (column / self.input.segment, column % self.input.segment);
            let columns = (self.input.segment - within).min(self.columns.end - column);
            let offset = (column - self.columns.start) / E::COLUMNS * E::BYTES;
            let ahead = self.ahead.map(|row| row.wrapping_add(offset));
            let weights = self.weights.map(|row| row.wrapping_add(offset));
            let mut starts = [std::ptr::null::<Line>(); T];
            for (start, &token) in starts.iter_mut().zip(tokens) {
                *start = self.input.at(token, segment).wrapping_add(within / E::COLUMNS);
            }
            for step in 0..columns / E::COLUMNS {
                let mut loaded = [zero; R];
                for row in 0..R {
                    // SAFETY: a row holds the tile's columns, and this step's weights are `BYTES` of them.
                    loaded[row] = unsafe { E::load(lanes, weights[row].add(step * E::BYTES)) };
                }
                // A line of each row, at every step or, where a step is half a line, at every second.
                if (step * E::BYTES).is_multiple_of(LINE_BYTES) {
                    for row in ahead {
                        lanes.prefetch(row.wrapping_add(step * E::BYTES));
                    }
                }
                for token in 0..T {
                    // SAFETY: a row has a line for each step of each segment; `Rows` and `Product` have checked both numbers.
                    let values = lanes.line(unsafe { &*starts[token].add(step) });
                    for row in 0..R {
                        all[token][row] = E::mac(lanes, loaded[row], values, all[token][row]);
                    }
                }
            }
            let (steps, rest) = (columns / E::COLUMNS, columns % E::COLUMNS);
            if rest > 0 {
                let mut loaded = [zero; R];
                for row in 0..R {
                    let mut last = [0; LINE_BYTES];
                    let bytes = rest * E::BYTES / E::COLUMNS;
                    // SAFETY: those are the row's last bytes; what follows them here is zeros.
                    unsafe {
                        std::ptr::copy_nonoverlapping(weights[row].add(steps * E::BYTES), last.as_mut_ptr(), bytes);
                        loaded[row] = E::load(lanes, last.as_ptr());
                    }
                }
                for token in 0..T {
                    // SAFETY: as above; a part of a step has a line of its own.
                    let values = lanes.line(unsafe { &*starts[token].add(steps) });
                    for row in 0..R {
                        all[token][row] = E::mac(lanes, loaded[row], values, all[token][row]);
                    }
                }
            }
            column += columns;
        }
        fold_tile::<L, R, T>(lanes, all, self.first, self.columns.start == 0, sums);
    }
}

/// Folds the lanes of a tile's sums and writes them, or adds them to what is there.
#[inline(always)]
fn fold_tile<L: Multiply, const R: usize, const T: usize>(
    lanes: L,
    all: [[L::Vector; R]; T],
    first: usize,
    is_new: bool,
    sums: &mut [f32],
) {
    let at_once = LANES / R;
    let zero = lanes.splat(0.0);
    for start in (0..T).step_by(at_once) {
        let count = at_once.min(T - start);
        let mut flat = [zero; LANES];
        for token in 0..count {
            for row in 0..R {
                flat[token * R + row] = all[start + token][row];
            }
        }
        let mut folded = [0.0; LANES];
        lanes.store(lanes.fold_sums(flat), &mut folded);
        for token in 0..count {
            let sums = &mut sums[(start + token) * BLOCK + first..][..R];
            for (sum, &part) in sums.iter_mut().zip(&folded[token * R..]) {
                *sum = if is_new { part } else { *sum + part };
            }
        }
    }
}
