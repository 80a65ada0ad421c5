//! Products of stored weights with rows of activations: `sums[t, r] = Σ_k weights[r, k] · input[t, k]`, a [`BLOCK`] of weight
//! rows at a time.
//!
//! Weights are read as they lie, row by row. Few rows of activations: tiles of [`TILE_ROWS`] weight rows, sums run along the
//! lanes and are folded at the end; nothing is rearranged, so that it runs at the speed of memory. Many rows: a piece of the block is
//! turned into a panel that stays in the cache, `panel[k][r]`, and one word of an activation meets 32 weights in two
//! instructions (the packing of Goto and van de Geijn 2008, of the weights alone).
//!
//! Activations come in the [`Form`] that the product wants, each row on lines of its own whose number is odd, so that rows
//! of a power of two do not all meet in the same sets of a cache.

#![allow(unsafe_code)]

use std::ops::Range;

use super::dtype::Dtype;
use super::multiply::{LINE_BYTES, Line, Multiply};
use super::{Kernel, LANES, bytes, quantized};

/// Weight rows of one product.
pub(crate) const BLOCK: usize = 32;
/// Columns of activations that one segment holds at least, and whole numbers of which all but the last do.
pub(crate) const CHUNK: usize = 256;
/// Weight rows of a tile.
const TILE_ROWS: usize = 4;
/// Tokens of such a tile.
const TILE_TOKENS: usize = 6;
/// Bytes between a piece of a row and the one that is read ahead meanwhile: what comes while memory takes to answer.
const FAR: usize = 8 << 10;
/// Words of a panel's rows: two lines each, 256 KiB in all.
const PANEL_WORDS: usize = 2048;
/// Lines of a row of weights on their way into a panel.
const STAGE_STRIDE: usize = CHUNK / LANES + 1;

/// How activations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Floats, sixteen to a line.
    Floats,
    /// Pairs of bf16, thirty-two to a line.
    Pairs,
    /// Bytes with a scale for each 32, a line of [`bytes`] for them; lines come in pairs.
    Bytes,
}

impl Form {
    /// Lines of a row without padding.
    pub(crate) fn lines(self, columns: usize) -> usize {
        match self {
            Self::Floats => columns.div_ceil(LANES),
            Self::Pairs => columns.div_ceil(2 * LANES),
            Self::Bytes => 2 * columns.div_ceil(2 * bytes::GROUP),
        }
    }

    /// Lines from one row to the next.
    pub(crate) fn stride(self, columns: usize) -> usize {
        self.lines(columns) | 1
    }
}

/// Writes a row of activations in a form, zeros after its end.
pub(crate) struct Fill<'a> {
    pub(crate) form: Form,
    pub(crate) values: &'a [f32],
    /// At least [`Form::lines`] of them.
    pub(crate) row: &'a mut [Line],
}

impl Kernel for Fill<'_> {
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
            Form::Bytes => bytes::fill(lanes, self.values, &mut self.row[..self.form.lines(self.values.len())]),
        }
    }
}

/// Rows of activations in one form, cut into segments of columns: row `r` of segment `s` starts at line
/// `s · segment_stride + r · row_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    lines: &'a [Line],
    form: Form,
    columns: usize,
    segment: usize,
    rows: usize,
    row_stride: usize,
    segment_stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows in one segment.
    pub(crate) fn whole(lines: &'a [Line], form: Form, columns: usize, rows: usize) -> Self {
        Self::segmented(lines, form, columns, columns.next_multiple_of(CHUNK).max(CHUNK), rows)
    }

    /// Rows in segments of `segment` columns, a multiple of [`CHUNK`]; each segment holds all rows, one after another.
    pub(crate) fn segmented(lines: &'a [Line], form: Form, columns: usize, segment: usize, rows: usize) -> Self {
        let row_stride = form.stride(segment.min(columns));
        let segment_stride = rows * row_stride;
        assert!(segment.is_multiple_of(CHUNK), "a segment of {segment} columns");
        assert!(lines.len() >= columns.div_ceil(segment) * segment_stride, "too few lines for {rows} rows");
        Self { lines, form, columns, segment, rows, row_stride, segment_stride }
    }

    /// Columns of a row.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The line of a row that a column is in, where a line holds so many of them.
    #[inline(always)]
    pub(super) fn column(&self, row: u32, column: usize, of_line: usize) -> *const Line {
        self.at(row, column / self.segment).wrapping_add(column % self.segment / of_line)
    }

    /// Where a row's segment starts.
    #[inline(always)]
    fn at(&self, row: u32, segment: usize) -> *const Line {
        self.lines.as_ptr().wrapping_add(segment * self.segment_stride + row as usize * self.row_stride)
    }
}

/// Room that products work in; what it holds between them does not matter.
#[derive(Default)]
pub(crate) struct Workspace {
    lines: Vec<Line>,
}

impl Workspace {
    /// At least `count` lines, taken out until they are given back.
    #[inline(always)]
    pub(super) fn take(&mut self, count: usize) -> Vec<Line> {
        let mut lines = std::mem::take(&mut self.lines);
        if lines.len() < count {
            lines.resize(count, Line::default());
        }
        lines
    }

    /// Keeps lines for the next product.
    #[inline(always)]
    pub(super) fn give_back(&mut self, lines: Vec<Line>) {
        self.lines = lines;
    }
}

/// `sums[t, r]` of some rows of activations with a block of weight rows.
pub(crate) struct Product<'a> {
    /// Type of the weights.
    pub(crate) dtype: Dtype,
    /// Rows of weights as stored.
    pub(crate) weights: [&'a [u8]; BLOCK],
    /// The first row of the block that comes next, and of its second half: read ahead.
    pub(crate) ahead: [&'a [u8]; 2],
    /// Where the rows of activations are.
    pub(crate) input: Rows<'a>,
    /// Which of them to take.
    pub(crate) tokens: &'a [u32],
    /// `[tokens, BLOCK]`, overwritten.
    pub(crate) sums: &'a mut [f32],
    /// Room to work in.
    pub(crate) workspace: &'a mut Workspace,
}

impl Product<'_> {
    /// Rows to read ahead, whole tiles of them, where so many bytes of each row are read at a time.
    #[inline(always)]
    fn rows_ahead(bytes: usize) -> usize {
        FAR.div_ceil(bytes.max(1)).clamp(TILE_ROWS, BLOCK).next_multiple_of(TILE_ROWS)
    }

    /// Where a row of this block starts, or of the next.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> *const u8 {
        let bytes = self.weights[0].len();
        match self.weights.get(row) {
            Some(row) => row.as_ptr(),
            None if row < BLOCK + BLOCK / 2 => self.ahead[0].as_ptr().wrapping_add((row - BLOCK) * bytes),
            None => self.ahead[1].as_ptr().wrapping_add((row - BLOCK - BLOCK / 2) * bytes),
        }
    }

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
            (Form::Floats, Dtype::F32) if tiles => stored_tiles::<AsFloats, L>(lanes, &mut self),
            (Form::Floats, Dtype::F16) if tiles => stored_tiles::<AsHalves, L>(lanes, &mut self),
            (Form::Floats, Dtype::Bf16) if tiles => stored_tiles::<AsBrains, L>(lanes, &mut self),
            (Form::Pairs, Dtype::Bf16) if tiles => stored_tiles::<AsPairs, L>(lanes, &mut self),
            (Form::Floats, _) if tiles => decoded_tiles::<AsFloats, L>(lanes, &mut self),
            (Form::Floats, _) => panels::<AsFloats, L>(lanes, &mut self),
            (Form::Pairs, Dtype::Bf16) => panels::<AsPairs, L>(lanes, &mut self),
            // On other sets this is not compiled.
            (Form::Bytes, dtype) if L::DOTS && dtype.is_quantized() => bytes::product(lanes, &mut self),
            (form, dtype) => unreachable!("{dtype} meets {form:?}"),
        }
    }
}

/// How sixteen words of activations meet the weights of the same columns.
trait Element {
    /// The form of the activations.
    const FORM: Form;
    /// Columns in sixteen words.
    const COLUMNS: usize;
    /// Bytes of stored weights for them.
    const BYTES: usize;

    /// The weights at an address.
    ///
    /// # Safety
    /// There are `BYTES` bytes to read.
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector;
    /// Products into sums.
    fn mac<L: Multiply>(lanes: L, weights: L::Vector, input: L::Vector, sum: L::Vector) -> L::Vector;
}

struct AsFloats;
struct AsHalves;
struct AsBrains;
struct AsPairs;

impl Element for AsFloats {
    const FORM: Form = Form::Floats;
    const COLUMNS: usize = LANES;
    const BYTES: usize = LINE_BYTES;

    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.bytes(unsafe { &*from.cast() })
    }

    #[inline(always)]
    fn mac<L: Multiply>(lanes: L, weights: L::Vector, input: L::Vector, sum: L::Vector) -> L::Vector {
        lanes.mul_add(weights, input, sum)
    }
}

impl Element for AsHalves {
    const FORM: Form = Form::Floats;
    const COLUMNS: usize = LANES;
    const BYTES: usize = LINE_BYTES / 2;

    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.widen_f16(unsafe { &*from.cast() })
    }

    #[inline(always)]
    fn mac<L: Multiply>(lanes: L, weights: L::Vector, input: L::Vector, sum: L::Vector) -> L::Vector {
        lanes.mul_add(weights, input, sum)
    }
}

impl Element for AsBrains {
    const FORM: Form = Form::Floats;
    const COLUMNS: usize = LANES;
    const BYTES: usize = LINE_BYTES / 2;

    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.widen_bf16(unsafe { &*from.cast() })
    }

    #[inline(always)]
    fn mac<L: Multiply>(lanes: L, weights: L::Vector, input: L::Vector, sum: L::Vector) -> L::Vector {
        lanes.mul_add(weights, input, sum)
    }
}

impl Element for AsPairs {
    const FORM: Form = Form::Pairs;
    const COLUMNS: usize = 2 * LANES;
    const BYTES: usize = LINE_BYTES;

    #[inline(always)]
    unsafe fn load<L: Multiply>(lanes: L, from: *const u8) -> L::Vector {
        // SAFETY: the caller has that many bytes.
        lanes.bytes(unsafe { &*from.cast() })
    }

    #[inline(always)]
    fn mac<L: Multiply>(lanes: L, weights: L::Vector, input: L::Vector, sum: L::Vector) -> L::Vector {
        lanes.dot_pairs(weights, input, sum)
    }
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
    let far = Product::rows_ahead(at_once.min(columns) / E::COLUMNS * E::BYTES);
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
#[inline(always)]
fn decoded_tiles<E: Element, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let columns = product.input.columns;
    let at_once = tile_columns::<E>(columns, product.tokens.len().max(3));
    let far = Product::rows_ahead(product.weights[0].len());
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

/// One chunk of a weight row as lines of an [`Element`]'s form.
#[inline(always)]
fn decode<E: Element, L: Multiply>(
    lanes: L,
    dtype: Dtype,
    row: &[u8],
    chunk: usize,
    columns: usize,
    lines: &mut [Line],
) {
    let mut values = [0.0; CHUNK];
    let values = &mut values[..CHUNK.min(columns - chunk * CHUNK)];
    quantized::decode(lanes, dtype, row, chunk * CHUNK, values);
    Fill { form: E::FORM, values, row: lines }.run(lanes);
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

/// All tokens against panels.
#[inline(always)]
fn panels<E: Element, L: Multiply>(lanes: L, product: &mut Product<'_>) {
    let columns = product.input.columns;
    let per_word = E::COLUMNS / LANES;
    let words = columns.div_ceil(per_word);
    let mut lines = product.workspace.take(2 * PANEL_WORDS + LANES * STAGE_STRIDE);
    let (panel, stage) = lines.split_at_mut(2 * PANEL_WORDS);
    for first in (0..words).step_by(PANEL_WORDS) {
        let now = first..words.min(first + PANEL_WORDS);
        let chunks = first * per_word / CHUNK..(now.end * per_word).div_ceil(CHUNK);
        let start = chunks.start;
        for chunk in chunks {
            let at = 2 * (chunk - start) * CHUNK / per_word;
            for half in 0..2 {
                let rows = &product.weights[half * LANES..][..LANES];
                stage_rows::<E, L>(lanes, product.dtype, rows, chunk, columns, stage);
                turn::<E, L>(lanes, stage, (columns - chunk * CHUNK).min(CHUNK), half, &mut panel[at..]);
            }
        }
        panel_tokens::<E, L>(lanes, product, panel, now);
    }
    product.workspace.give_back(lines);
}

/// Sixteen rows of a chunk of weights in an [`Element`]'s form, each on lines of its own.
#[inline(always)]
fn stage_rows<E: Element, L: Multiply>(
    lanes: L,
    dtype: Dtype,
    rows: &[&[u8]],
    chunk: usize,
    columns: usize,
    stage: &mut [Line],
) {
    let count = CHUNK.min(columns - chunk * CHUNK);
    let is_same = matches!((E::FORM, dtype), (Form::Floats, Dtype::F32) | (Form::Pairs, Dtype::Bf16));
    for (row, stage) in rows.iter().zip(stage.chunks_exact_mut(STAGE_STRIDE)) {
        if !is_same || !count.is_multiple_of(E::COLUMNS) {
            decode::<E, L>(lanes, dtype, row, chunk, columns, stage);
            continue;
        }
        let bytes = &row[chunk * CHUNK / E::COLUMNS * E::BYTES..][..count / E::COLUMNS * E::BYTES];
        for (from, into) in bytes.as_chunks::<LINE_BYTES>().0.iter().zip(stage) {
            lanes.store_line(lanes.bytes(from), into);
        }
    }
}

/// Staged rows into one half of a panel's rows.
#[inline(always)]
fn turn<E: Element, L: Multiply>(lanes: L, stage: &[Line], columns: usize, half: usize, panel: &mut [Line]) {
    for step in 0..columns.div_ceil(E::COLUMNS) {
        let mut rows = [lanes.splat(0.0); LANES];
        for (row, lines) in rows.iter_mut().zip(stage.chunks_exact(STAGE_STRIDE)) {
            *row = lanes.line(&lines[step]);
        }
        let turned = lanes.transpose(rows);
        for (lines, vector) in panel[2 * LANES * step..].chunks_exact_mut(2).zip(turned) {
            lanes.store_line(vector, &mut lines[half]);
        }
    }
}

/// All tokens against one panel, twelve at a time or, with few registers, four.
#[inline(always)]
fn panel_tokens<E: Element, L: Multiply>(lanes: L, product: &mut Product<'_>, panel: &[Line], words: Range<usize>) {
    let most = if L::WIDE { 12 } else { 4 };
    let bytes = product.weights[0].len();
    // What this panel is for may be read while the first tokens are at work, where the next one is the next block's.
    let ahead = (product.input.columns.div_ceil(E::COLUMNS / LANES) <= PANEL_WORDS).then_some(product.ahead);
    let per_step = (LANES * bytes).div_ceil(words.len().div_ceil(LANES) * LINE_BYTES);
    let (mut tokens, mut sums) = (product.tokens, &mut *product.sums);
    let mut is_first = true;
    while !tokens.is_empty() {
        let count = tokens.len().div_ceil(tokens.len().div_ceil(most));
        let (now, rest) = tokens.split_at(count);
        let (into, behind) = std::mem::take(&mut sums).split_at_mut(count * BLOCK);
        (tokens, sums) = (rest, behind);
        let ahead = ahead.filter(|_| is_first).map(|ahead| (ahead, per_step));
        is_first = false;
        let part = PanelPart { panel, words: words.clone(), input: product.input, tokens: now, ahead };
        match count {
            1 => part.run::<E, L, 1>(lanes, into),
            2 => part.run::<E, L, 2>(lanes, into),
            3 => part.run::<E, L, 3>(lanes, into),
            4 => part.run::<E, L, 4>(lanes, into),
            5 => part.run::<E, L, 5>(lanes, into),
            6 => part.run::<E, L, 6>(lanes, into),
            7 => part.run::<E, L, 7>(lanes, into),
            8 => part.run::<E, L, 8>(lanes, into),
            9 => part.run::<E, L, 9>(lanes, into),
            10 => part.run::<E, L, 10>(lanes, into),
            11 => part.run::<E, L, 11>(lanes, into),
            _ => part.run::<E, L, 12>(lanes, into),
        }
    }
}

/// A few tokens against one panel.
struct PanelPart<'a> {
    panel: &'a [Line],
    /// The words of a row that the panel holds.
    words: Range<usize>,
    input: Rows<'a>,
    tokens: &'a [u32],
    /// What to read ahead, and how many lines of each for sixteen words.
    ahead: Option<([&'a [u8]; 2], usize)>,
}

impl PanelPart<'_> {
    #[inline(always)]
    fn run<E: Element, L: Multiply, const T: usize>(&self, lanes: L, sums: &mut [f32]) {
        // The others are not compiled: with fewer tokens there are no panels.
        assert!(if L::WIDE { T >= 8 } else { T <= 4 }, "no panel for {T} tokens");
        if L::WIDE {
            return self.halves::<E, L, T, 2>(lanes, 0, sums);
        }
        self.halves::<E, L, T, 1>(lanes, 0, sums);
        self.halves::<E, L, T, 1>(lanes, 1, sums);
    }

    /// `N` halves of the panel's rows from `half` on.
    #[inline(always)]
    fn halves<E: Element, L: Multiply, const T: usize, const N: usize>(&self, lanes: L, half: usize, sums: &mut [f32]) {
        let tokens: &[u32; T] = self.tokens.try_into().expect("as many tokens");
        let mut all = [[lanes.splat(0.0); N]; T];
        if self.words.start > 0 {
            for (all, sums) in all.iter_mut().zip(sums.as_chunks::<BLOCK>().0) {
                for (n, sum) in all.iter_mut().enumerate() {
                    *sum = lanes.load(&sums.as_chunks::<LANES>().0[half + n]);
                }
            }
        }
        let segment_words = self.input.segment * LANES / E::COLUMNS;
        let mut word = self.words.start;
        let mut step = 0;
        while word < self.words.end {
            let (segment, within) = (word / segment_words, word % segment_words);
            let count = (segment_words - within).min(self.words.end - word);
            let mut starts = [std::ptr::null::<u32>(); T];
            for (start, &token) in starts.iter_mut().zip(tokens) {
                *start = self.input.at(token, segment).cast::<u32>().wrapping_add(within);
            }
            let rows = &self.panel[2 * (word - self.words.start)..][..2 * count];
            for (at, rows) in rows.chunks(2 * LANES).enumerate() {
                if let Some((ahead, lines)) = self.ahead.filter(|_| half == 0) {
                    for line in step * lines..(step + 1) * lines {
                        lanes.prefetch(ahead[0].as_ptr().wrapping_add(line * LINE_BYTES));
                        lanes.prefetch(ahead[1].as_ptr().wrapping_add(line * LINE_BYTES));
                    }
                    step += 1;
                }
                for (k, row) in rows.as_chunks::<2>().0.iter().enumerate() {
                    let mut weights = [lanes.splat(0.0); N];
                    for n in 0..N {
                        weights[n] = lanes.line(&row[half + n]);
                    }
                    for token in 0..T {
                        // SAFETY: a row has a word for each of the panel's rows in this segment; `Rows` and `Product` have
                        // checked both numbers.
                        let value = lanes.repeat(unsafe { *starts[token].add(at * LANES + k) });
                        for n in 0..N {
                            all[token][n] = E::mac(lanes, weights[n], value, all[token][n]);
                        }
                    }
                }
            }
            word += count;
        }
        for (all, sums) in all.iter().zip(sums.as_chunks_mut::<BLOCK>().0) {
            for (n, &sum) in all.iter().enumerate() {
                lanes.store(sum, &mut sums.as_chunks_mut::<LANES>().0[half + n]);
            }
        }
    }
}
