//! Experts in mapped files, held to a budget: what runs on memory-mapped weights with less memory than weights gets at best.
//!
//! The experts of a step are asked for all at once (`MADV_WILLNEED`), and nothing beside them is read: a system that reads ahead
//! keeps far more in its page cache than the budget. Experts that were used least recently leave when a step is over, with all
//! pages that no resident expert has bytes in, from the process and from the page cache. That the system would drop pages of
//! experts in use is not counted against it.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use memmap2::{Advice, Mmap, UncheckedAdvice};
use phase_moe::checkpoint::TensorEntry;
use phase_moe::{Activation, Checkpoint, Dtype, ExpertId, ExpertSet, ExpertWeights, Matrix};
use rustix::fs::{Advice as FileAdvice, fadvise};

pub const PAGE: usize = 4096;

/// Pages that are asked for in one call.
const ASKED: usize = 64;

pub struct Mapped {
    files: Vec<MappedFile>,
    experts: Vec<Vec<[Piece; 3]>>,
    /// Experts of each layer in memory, those used last at the end.
    resident: Vec<Vec<ExpertId>>,
    /// The most of a layer.
    cached: usize,
}

/// A matrix in a file.
pub struct Piece {
    file: usize,
    offset: usize,
    dtype: Dtype,
    rows: usize,
    columns: usize,
}

impl Piece {
    pub fn new(entry: &TensorEntry) -> Result<Self> {
        let stored = format!("{:?}", entry.dtype);
        let mut dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter();
        let dtype = dtypes.find(|dtype| dtype.to_string().eq_ignore_ascii_case(&stored));
        let [rows, columns] = entry.shape[..] else { anyhow::bail!("expected a matrix, got {:?}", entry.shape) };
        let (file, offset) = (entry.source, entry.offset as usize);
        Ok(Self { file, offset, dtype: dtype.with_context(|| stored)?, rows, columns })
    }
}

struct MappedFile {
    file: File,
    map: Mmap,
    /// Resident experts with bytes in each page.
    users: Vec<u16>,
}

/// Bytes of a piece.
fn bytes_of(piece: &Piece) -> Result<Range<usize>> {
    let size = piece.rows * piece.dtype.row_bytes(piece.columns).context("whole blocks")?;
    Ok(piece.offset..piece.offset + size)
}

/// The file and the pages of a piece, those that it shares with others included.
fn pages_of(piece: &Piece) -> Result<(usize, Range<usize>)> {
    let bytes = bytes_of(piece)?;
    Ok((piece.file, bytes.start / PAGE..bytes.end.div_ceil(PAGE)))
}

/// The same of all pieces of an expert, those that touch in one.
fn runs_of(pieces: &[Piece]) -> Result<Vec<(usize, Range<usize>)>> {
    let mut runs = pieces.iter().map(pages_of).collect::<Result<Vec<_>>>()?;
    runs.sort_by_key(|(file, pages)| (*file, pages.start));
    runs.dedup_by(|(file, next), (last, pages)| {
        let touch = file == last && next.start <= pages.end;
        pages.end = if touch { pages.end.max(next.end) } else { pages.end };
        touch
    });
    Ok(runs)
}

impl MappedFile {
    /// Has `pages` read, in calls that are small enough for the system not to shorten them.
    fn will_need(&self, pages: &Range<usize>) -> Result<()> {
        for start in pages.clone().step_by(ASKED) {
            let (start, end) = (start * PAGE, ((start + ASKED).min(pages.end) * PAGE).min(self.map.len()));
            self.map.advise_range(Advice::WillNeed, start, end - start)?;
        }
        Ok(())
    }

    /// Drops those of `pages` that no resident expert needs.
    fn drop_unused(&self, pages: Range<usize>) -> Result<()> {
        let mut page = pages.start;
        while page < pages.end {
            let count = self.users[page..pages.end].iter().take_while(|&&users| users == 0).count();
            if count > 0 {
                let (start, length) = (page * PAGE, (count * PAGE).min(self.map.len() - page * PAGE));
                // SAFETY: the map is read only; pages that are dropped are read again from the file.
                unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) }?;
                fadvise(&self.file, start as u64, std::num::NonZero::new((count * PAGE) as u64), FileAdvice::DontNeed)?;
            }
            page += count.max(1);
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Whoever comes next must not find memory full of pages that nobody needs.
        for MappedFile { file, map, .. } in &self.files {
            // SAFETY: the map is read only; pages that are dropped are read again from the file.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
            let _ = fadvise(file, 0, None, FileAdvice::DontNeed);
        }
    }
}

impl Mapped {
    /// Maps the files of a checkpoint; nothing of them is in memory.
    pub fn new(checkpoint: &Checkpoint, experts: Vec<Vec<[Piece; 3]>>, cached: usize) -> Result<Self> {
        let mut files = Vec::new();
        for (name, _) in checkpoint.sources() {
            let file = File::open(Path::new(name)).with_context(|| name.clone())?;
            fadvise(&file, 0, None, FileAdvice::DontNeed)?;
            // SAFETY: nobody else writes these files while the example runs.
            let map = unsafe { Mmap::map(&file) }?;
            map.advise(Advice::Random)?;
            let users = vec![0; map.len().div_ceil(PAGE)];
            files.push(MappedFile { file, map, users });
        }
        let resident = vec![Vec::new(); experts.len()];
        Ok(Self { files, experts, resident, cached })
    }

    /// Has the experts of a step that are not in memory read, all at once.
    pub fn begin(&self, layer: usize, wanted: &ExpertSet) -> Result<()> {
        let resident = &self.resident[layer];
        for expert in wanted.iter().filter(|expert| !resident.contains(expert)) {
            for (file, pages) in runs_of(&self.experts[layer][expert.index()])? {
                self.files[file].will_need(&pages)?;
            }
        }
        Ok(())
    }

    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights<'_>> {
        let matrix = |piece: &Piece| -> Result<Matrix<'_>> {
            let bytes = &self.files[piece.file].map[bytes_of(piece)?];
            Ok(Matrix::new(piece.dtype, piece.rows, piece.columns, bytes)?)
        };
        let [gate, up, down] = &self.experts[layer][expert];
        let (gate, up, down) = (matrix(gate)?.into(), matrix(up)?.into(), matrix(down)?.into());
        Ok(ExpertWeights::new(Activation::swiglu(), Some(gate), up, down)?)
    }

    /// Ends a step that used these experts; returns its hits and its requests.
    pub fn advance(&mut self, layer: usize, used: &ExpertSet) -> Result<(usize, usize)> {
        let before = std::mem::take(&mut self.resident[layer]);
        let hits = before.iter().filter(|&&expert| used.contains(expert)).count();
        let mut after: Vec<_> = before.iter().copied().filter(|&expert| !used.contains(expert)).collect();
        after.extend(used.iter());
        after.drain(..after.len().saturating_sub(self.cached));
        let (experts, files) = (&self.experts[layer], &mut self.files);
        for expert in after.iter().filter(|expert| !before.contains(expert)) {
            for (file, pages) in experts[expert.index()].iter().map(pages_of).collect::<Result<Vec<_>>>()? {
                files[file].users[pages].iter_mut().for_each(|users| *users += 1);
            }
        }
        for expert in before.iter().filter(|expert| !after.contains(expert)) {
            for (file, pages) in experts[expert.index()].iter().map(pages_of).collect::<Result<Vec<_>>>()? {
                files[file].users[pages].iter_mut().for_each(|users| *users -= 1);
            }
        }
        for gone in before.iter().copied().chain(used.iter()).filter(|expert| !after.contains(expert)) {
            for (file, pages) in runs_of(&experts[gone.index()])? {
                files[file].drop_unused(pages)?;
            }
        }
        self.resident[layer] = after;
        Ok((hits, used.len()))
    }
}
