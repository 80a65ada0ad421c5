//! Many tokens: a piece of the weights is packed into a panel that stays in the cache, `panel[k][row]`, and one word of an activation
//! meets 32 weights in two instructions (the packing of Goto and van de Geijn 2008, of the weights alone).

#![allow(unsafe_code)]

use std::ops::Range;

use super::element::{Element, decode};
use super::rows::{BLOCK, CHUNK, Form, Product, Rows};
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::{Kernel, LANES};

/// Words of a panel's rows: two lines each, 256 KiB in all. Run by `benches/engine`.
const PANEL_WORDS: usize = 2048;
/// Lines of a row of weights on their way into a panel.
const STAGE_STRIDE: usize = CHUNK / LANES + 1;

/// All tokens against panels.
pub(super) struct Panels<'p, 'a, E>(pub(super) &'p mut Product<'a>, pub(super) E);

impl<E: Element> Kernel for Panels<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        panels::<E, L>(lanes, self.0);
    }
}

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
                pack::<E, L>(lanes, stage, (columns - chunk * CHUNK).min(CHUNK), half, &mut panel[at..]);
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
fn pack<E: Element, L: Multiply>(lanes: L, stage: &[Line], columns: usize, half: usize, panel: &mut [Line]) {
    for step in 0..columns.div_ceil(E::COLUMNS) {
        let mut rows = [lanes.splat(0.0); LANES];
        for (row, lines) in rows.iter_mut().zip(stage.chunks_exact(STAGE_STRIDE)) {
            *row = lanes.line(&lines[step]);
        }
        let packed = lanes.transpose(rows);
        for (lines, vector) in panel[2 * LANES * step..].chunks_exact_mut(2).zip(packed) {
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
        let part = PanelTokens { panel, words: words.clone(), input: product.input, tokens: now, ahead };
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
struct PanelTokens<'a> {
    panel: &'a [Line],
    /// The words of a row that the panel holds.
    words: Range<usize>,
    input: Rows<'a>,
    tokens: &'a [u32],
    /// What to read ahead, and how many lines of each for sixteen words.
    ahead: Option<([&'a [u8]; 2], usize)>,
}

impl PanelTokens<'_> {
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
