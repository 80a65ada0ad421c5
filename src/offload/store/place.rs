//! Where an expert's pieces go: which slabs it takes, which runs of bytes fill them, and what stands where in them.
//!
//! Knows nothing of reading.

use std::ops::Range;
use std::sync::OnceLock;

use super::piece::{CHUNK_BYTES, Layout, Part, Piece};
use super::scatter::Scatter;
use crate::checkpoint::{NamedSource, PAGE_BYTES};
use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;

/// A piece in its slab.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) part: Part,
    pub(super) dtype: Dtype,
    pub(super) shape: [usize; 2],
    pub(super) slab: usize,
    pub(super) bytes: Range<usize>,
    /// Once all is read, blocks get their order.
    pub(super) to_turn: bool,
}

/// What is read in one go: whole pages around pieces that lie close together.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) source: usize,
    /// A multiple of the page.
    pub(super) offset: u64,
    /// Where in the slab, from the first page's beginning; the end is that of the last page or of the file.
    pub(super) bytes: Range<usize>,
    /// From the first piece's beginning to the last one's end: what the checksum is of.
    pub(super) pieces: Range<usize>,
    /// It is not read to where it stays: then `bytes` and `pieces` begin with the run.
    pub(super) scatter: Option<Scatter>,
}

/// What is read into one slab.
#[derive(Debug)]
pub(super) struct Filling {
    pub(super) runs: Vec<Run>,
    pub(super) checksum: OnceLock<u64>,
}

/// An expert's place.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) pieces: Vec<Placed>,
    /// One for each slab.
    pub(super) fillings: Vec<Filling>,
    pub(super) slab_bytes: Vec<usize>,
}

/// A piece and where its bytes come from: one run where it is read to where it stays, else what is scattered into it.
struct Measured {
    slab: usize,
    piece: Piece,
    /// Where a piece that lies row by row ends.
    end: u64,
    /// Source, offset and end of the rest.
    scattered: Vec<(usize, u64, u64, Scatter)>,
}

/// Lays an expert's pieces out in slabs.
pub(super) fn place(pieces: Vec<Piece>, sources: &[NamedSource], lengths: &[u64], name: &str) -> Result<Stored> {
    if pieces.is_empty() {
        return Err(Error::shape(name, "at least one piece", "none"));
    }
    // By shape alone, so that experts of the same shapes take the same wherever their bytes begin.
    let (mut slab_bytes, mut found) = (Vec::with_capacity(pieces.len()), Vec::with_capacity(pieces.len()));
    for (at, piece) in pieces.iter().enumerate() {
        let operand = || format!("{:?} of {name}", piece.part);
        if pieces[..at].iter().any(|other| other.part == piece.part) {
            return Err(Error::shape(name, format!("one {:?}", piece.part), "two"));
        }
        let bytes = piece.row_bytes()?.saturating_mul(piece.rows);
        let fits = match piece.layout {
            Layout::Rows => true,
            Layout::Columns => !piece.dtype.is_quantized(),
            Layout::Apart { .. } => piece.dtype == Dtype::Mxfp4,
        };
        if !fits {
            let got = format!("{:?}", piece.layout);
            return Err(Error::shape(operand(), format!("{} row by row", piece.dtype), got));
        }
        let end_of = |source: usize, offset: u64, bytes: usize| {
            let Some(((file, _), length)) = sources.get(source).zip(lengths.get(source)) else {
                return Err(Error::shape(operand(), format!("a source below {}", sources.len()), source));
            };
            offset.checked_add(bytes as u64).filter(|end| end <= length).ok_or_else(|| {
                let Piece { dtype, rows, columns, .. } = piece;
                let shape = format!("[{rows}, {columns}] {dtype} at {offset} within the file's {length} bytes");
                Error::Checkpoint { file: file.clone(), detail: format!("{}: expected {shape}", operand()) }
            })
        };
        let (mut end, mut scattered) = (0, Vec::new());
        // The bytes of what is scattered are no fewer than those of the matrix, so one that is too large does not get here.
        let pages = bytes.checked_next_multiple_of(PAGE_BYTES).unwrap_or(0);
        if piece.layout == Layout::Rows {
            end = end_of(piece.source, piece.offset, bytes)?;
            slab_bytes.push(pages + PAGE_BYTES);
        } else {
            for (source, offset, scatter) in Scatter::of(piece, bytes) {
                let end = end_of(source, offset, scatter.bytes.saturating_mul(scatter.count))?;
                scattered.push((source, offset, end, scatter));
            }
            slab_bytes.push(pages);
        }
        found.push(Measured { slab: at, piece: piece.clone(), end, scattered });
    }
    let total = slab_bytes.iter().sum();
    if total <= CHUNK_BYTES {
        slab_bytes = vec![total];
        found.iter_mut().for_each(|found| found.slab = 0);
    }
    // In the order of their bytes; those that are not read to where they stay come last.
    found.sort_by_key(|Measured { slab, piece, end, .. }| {
        (*slab, piece.layout != Layout::Rows, piece.source, piece.offset, *end)
    });
    let mut stored = Stored { pieces: Vec::new(), fillings: Vec::new(), slab_bytes };
    for of_slab in found.chunk_by(|found, next| found.slab == next.slab) {
        let (slab, mut runs) = (stored.fillings.len(), Vec::new());
        let mut place = |piece: &Piece, bytes: Range<usize>| {
            let (shape, to_turn) = ([piece.rows, piece.columns], matches!(piece.layout, Layout::Apart { .. }));
            stored.pieces.push(Placed { part: piece.part, dtype: piece.dtype, shape, slab, bytes, to_turn });
        };
        let (rows, others) = of_slab.split_at(of_slab.partition_point(|found| found.piece.layout == Layout::Rows));
        for Measured { piece, end, .. } in rows {
            place(piece, add(&mut runs, piece, *end, lengths[piece.source]));
        }
        let mut next = runs.last().map_or(0, |run| run.bytes.end.next_multiple_of(PAGE_BYTES));
        for Measured { piece, scattered, .. } in others {
            let bytes = next..next + scattered.first().map_or(0, |(.., scatter)| scatter.into.len());
            next = bytes.end.next_multiple_of(PAGE_BYTES);
            for (source, offset, end, scatter) in scattered {
                let first = offset / PAGE_BYTES as u64 * PAGE_BYTES as u64;
                let in_run = |position: u64| (position - first) as usize;
                let pieces = in_run(*offset)..in_run(*end);
                let pages = 0..in_run(end.next_multiple_of(PAGE_BYTES as u64).min(lengths[*source]));
                let scatter = scatter.clone().into_bytes_of(bytes.clone());
                runs.push(Run { source: *source, offset: first, bytes: pages, pieces, scatter: Some(scatter) });
            }
            place(piece, bytes);
        }
        stored.fillings.push(Filling { runs, checksum: OnceLock::new() });
    }
    Ok(stored)
}

/// Adds a piece that ends at `end` to the runs of its slab, behind all that begin before it; where in the slab it will be.
fn add(runs: &mut Vec<Run>, piece: &Piece, end: u64, file_end: u64) -> Range<usize> {
    let page = PAGE_BYTES as u64;
    let offset = piece.offset / page * page;
    let next = runs.last().map_or(0, |run| run.bytes.end.next_multiple_of(PAGE_BYTES));
    let shares = |run: &mut Run| run.source == piece.source && offset <= run.offset + (next - run.bytes.start) as u64;
    let mut run = runs.pop_if(shares).unwrap_or_else(|| {
        let start = next + (piece.offset - offset) as usize;
        Run { source: piece.source, offset, bytes: next..next, pieces: start..start, scatter: None }
    });
    let in_slab = |position: u64| run.bytes.start + (position - run.offset) as usize;
    let bytes = in_slab(piece.offset)..in_slab(end);
    run.bytes.end = run.bytes.end.max(in_slab(end.next_multiple_of(page).min(file_end)));
    run.pieces.end = run.pieces.end.max(bytes.end);
    runs.push(run);
    bytes
}
