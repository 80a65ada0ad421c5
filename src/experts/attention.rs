//! Attention of many query rows on the engine: cut into tiles of query rows that share a head of keys and values, and for a position alone
//! into pieces of the positions that it sees, so that all threads have work whatever the model's heads.
//!
//! Where a piece ends depends on positions alone, and pieces are put together in their order: the result does not depend on the number of
//! threads. Knows nothing of where queries come from, nor of how long keys and values are kept.

use std::ops::Range;

use super::engine::Engine;
use super::threads::{Buffers, grow, share_out};
use crate::simd::attention::{Attend, HeadLayout};
use crate::simd::multiply::Line;

/// Query rows of a tile, at most.
const ROWS: usize = 32;
/// Positions that one thread looks at for a query position alone.
const PIECE: usize = 512;

/// The query positions of one text, and the keys and values that are kept of it.
pub(crate) struct Sequence<'a> {
    /// Blocks of positions from the text's beginning on; those of the queries are among them.
    pub(crate) blocks: &'a [Box<[Line]>],
    /// Its first row of queries.
    pub(crate) row: usize,
    /// The position of that row.
    pub(crate) start: usize,
    /// Rows that follow each other.
    pub(crate) length: usize,
}

/// Queries of all heads over what is kept.
pub(crate) struct Attention<'a> {
    pub(crate) layout: HeadLayout,
    /// Heads of keys and values.
    pub(crate) kv_heads: usize,
    /// Query heads for each of them.
    pub(crate) group: usize,
    /// Positions that one sees, itself among them.
    pub(crate) window: Option<usize>,
    /// A score of each query head whose share goes nowhere.
    pub(crate) sinks: Option<&'a [f32]>,
    /// Scaled, `[rows, kv_heads · group · key]`.
    pub(crate) queries: &'a [f32],
    pub(crate) sequences: &'a [Sequence<'a>],
}

/// Query rows of one sequence, head of keys and values and some positions.
struct Tile<'a> {
    sequence: &'a Sequence<'a>,
    head: usize,
    /// Which query heads, of all.
    heads: Range<usize>,
    /// Which rows of the sequence.
    rows: Range<usize>,
    /// Which positions they look at, one piece after another.
    pieces: Vec<Range<usize>>,
}

impl Tile<'_> {
    fn count(&self) -> usize {
        self.heads.len() * self.rows.len()
    }
}

impl Attention<'_> {
    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    fn tiles(&self) -> Vec<Tile<'_>> {
        let (heads, positions) = (self.group.min(ROWS), (ROWS / self.group).max(1));
        let mut tiles = Vec::new();
        for sequence in self.sequences {
            for first in (0..sequence.length).step_by(positions) {
                let rows = first..sequence.length.min(first + positions);
                let (own, end) = (sequence.start + rows.start, sequence.start + rows.end);
                let from = self.window.map_or(0, |window| (own + 1).saturating_sub(window));
                let piece = if sequence.length == 1 { PIECE } else { end };
                let cut = |start: usize| start.max(from)..end.min(start + piece);
                for head in 0..self.kv_heads {
                    for first in (0..self.group).step_by(heads) {
                        let heads = head * self.group + first..head * self.group + self.group.min(first + heads);
                        let pieces = (from / piece * piece..end).step_by(piece).map(cut).collect();
                        tiles.push(Tile { sequence, head, heads, rows: rows.clone(), pieces });
                    }
                }
            }
        }
        tiles
    }
}

impl Engine {
    /// `softmax(q·kᵀ)·v` of all query rows and heads into `mixed`, `[rows, kv_heads · group · value]`; rows that are of no sequence stay what
    /// they are.
    pub(crate) fn attend(&self, attention: &Attention<'_>, mixed: &mut [f32]) {
        let Attention { layout, group, window, .. } = *attention;
        let (heads, row) = (attention.heads(), layout.row());
        let mut buffers = self.take_buffers();
        let tiles = attention.tiles();
        let products: usize = tiles
            .iter()
            .map(|tile| tile.pieces.iter().map(Range::len).sum::<usize>() * tile.count() * (layout.key + row))
            .sum();
        let threads = buffers.threads_for(products, 2 * products / group.max(1));
        let total = tiles.iter().map(|tile| tile.pieces.len() * tile.count() * (row + 2)).sum();
        let Buffers { sums, threads: rooms, .. } = &mut buffers;
        grow(sums, total);
        let mut left = &mut sums[..total];
        let parts = tiles.iter().flat_map(|tile| tile.pieces.iter().map(move |piece| (tile, piece.clone())));
        let items = parts.map(|(tile, piece)| {
            let (mine, rest) = std::mem::take(&mut left).split_at_mut(tile.count() * (row + 2));
            left = rest;
            (tile, piece, mine)
        });
        share_out(items, &mut rooms[..threads], |room, (tile, positions, part)| {
            let (rows, Tile { sequence, head, .. }) = (tile.count(), tile);
            let (sums, ends) = part.split_at_mut(rows * row);
            let (tops, totals) = ends.split_at_mut(rows);
            let first = (sequence.row + tile.rows.start) * heads + tile.heads.start;
            self.isa().run(Attend {
                layout,
                blocks: sequence.blocks,
                head: *head,
                positions,
                queries: &attention.queries[first * layout.key..],
                query_stride: heads * layout.key,
                group: tile.heads.len(),
                rows,
                first: sequence.start + tile.rows.start,
                window,
                sums,
                tops,
                totals,
                workspace: &mut room.workspace,
            });
        });
        let mut done = &sums[..total];
        for tile in &tiles {
            let (rows, size) = (tile.count(), tile.count() * (row + 2));
            let (parts, rest) = done.split_at(tile.pieces.len() * size);
            done = rest;
            for at in 0..rows {
                let (position, head) =
                    (tile.rows.start + at / tile.heads.len(), tile.heads.start + at % tile.heads.len());
                let into = ((tile.sequence.row + position) * heads + head) * layout.value;
                let sink = attention.sinks.map(|sinks| sinks[head]);
                join(parts, size, rows, row, at, sink, &mut mixed[into..][..layout.value]);
            }
        }
        self.give_back(buffers);
    }
}

/// One row of a tile of all its pieces: sums by the largest score of all, over the total with the sink's.
fn join(parts: &[f32], size: usize, rows: usize, row: usize, at: usize, sink: Option<f32>, mixed: &mut [f32]) {
    let top_of = |part: &[f32]| part[rows * row + at];
    let top = parts.chunks_exact(size).map(top_of).fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    let mut total = sink.map_or(0.0, |sink| (sink - top).exp());
    mixed.fill(0.0);
    for part in parts.chunks_exact(size) {
        let factor = (top_of(part) - top).exp();
        if factor > 0.0 {
            total += factor * part[rows * row + rows + at];
            mixed.iter_mut().zip(&part[at * row..]).for_each(|(mixed, sum)| *mixed += factor * sum);
        } else if factor.is_nan() {
            total = f32::NAN;
        }
    }
    mixed.iter_mut().for_each(|mixed| *mixed /= total);
}
