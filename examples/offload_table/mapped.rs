//! Experts in mapped files, held to a budget: what runs on memory-mapped weights with less memory than weights gets at best.
//!
//! Experts that were used least recently leave when a step is over: their pages are dropped from the process and from the page
//! cache. That the system would drop pages of experts in use is not counted against it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use memmap2::{Advice, Mmap, UncheckedAdvice};
use phase_moe::checkpoint::Checkpoint;
use phase_moe::expert::ExpertSet;
use phase_moe::experts::activation::Activation;
use phase_moe::experts::engine::{ExpertWeights, Projection};
use phase_moe::experts::matrix::Matrix;
use phase_moe::experts::residency::{Policy, Residency, Step};
use phase_moe::experts::store::{Part, Piece};
use rustix::fs::{Advice as FileAdvice, fadvise};

pub struct Mapped {
    files: Vec<(File, Mmap)>,
    experts: Vec<Vec<Vec<Piece>>>,
    resident: Vec<Residency>,
}

impl Mapped {
    /// Maps the files of a checkpoint; nothing of them is in memory.
    pub fn new(checkpoint: &Checkpoint, experts: Vec<Vec<Vec<Piece>>>, cached: usize) -> Result<Self> {
        let mut files = Vec::new();
        for (name, _) in checkpoint.sources() {
            let file = File::open(Path::new(name)).with_context(|| name.clone())?;
            fadvise(&file, 0, None, FileAdvice::DontNeed)?;
            // SAFETY: nobody else writes these files while the example runs.
            let map = unsafe { Mmap::map(&file) }?;
            map.advise(Advice::Normal)?;
            files.push((file, map));
        }
        let resident = experts.iter().map(|layer| Residency::new(layer.len(), cached.min(layer.len()), Policy::Lru));
        let resident = resident.collect::<Result<_, _>>()?;
        Ok(Self { files, experts, resident })
    }

    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights<'_>> {
        let mut parts = BTreeMap::new();
        for piece in &self.experts[layer][expert] {
            let bytes = &self.files[piece.source].1[piece.offset as usize..];
            let size = piece.rows * piece.dtype.row_bytes(piece.columns).context("whole blocks")?;
            let matrix = Matrix::new(piece.dtype, piece.rows, piece.columns, &bytes[..size])?;
            parts.insert(format!("{:?}", piece.part), Projection::from(matrix));
        }
        let mut take = |part: Part| parts.remove(&format!("{part:?}")).context("a part");
        let (gate, up, down) = (take(Part::Gate)?, take(Part::Up)?, take(Part::Down)?);
        Ok(ExpertWeights::new(Activation::swiglu(), Some(gate), up, down)?)
    }

    /// Ends a step that used these experts.
    pub fn advance(&mut self, layer: usize, used: &ExpertSet) -> Result<Step> {
        let before = self.resident[layer].resident().clone();
        let step = self.resident[layer].advance(used)?;
        let after = self.resident[layer].resident();
        for gone in before.iter().chain(used.iter()).filter(|&expert| !after.contains(expert)) {
            for piece in &self.experts[layer][gone.index()] {
                let (file, map) = &self.files[piece.source];
                let size = piece.rows * piece.dtype.row_bytes(piece.columns).context("whole blocks")?;
                // Whole pages: those at the edges belong to neighbours too, who read them again.
                let start = (piece.offset as usize).next_multiple_of(4096);
                let end = (piece.offset as usize + size) / 4096 * 4096;
                if start < end {
                    // SAFETY: the map is read only; pages that are dropped are read again from the file.
                    unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) }?;
                    let length = std::num::NonZero::new((end - start) as u64);
                    fadvise(file, start as u64, length, FileAdvice::DontNeed)?;
                }
            }
        }
        Ok(step)
    }
}
