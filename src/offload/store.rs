//! Experts in their files: where each one's projections lie, how they are read into a [`Slab`], and what they must be.
//!
//! An expert is a list of [`Piece`]s, each a matrix `[rows, columns]` that lies in one run of bytes of a file;
//! [`Weights::expert_store`](crate::weights::Weights::expert_store) has those of a model. Every piece is read with the whole pages around it, so that a file that can be read past
//! the page cache needs no copy; a piece then begins anywhere in its first page, which the engine does not mind. A small expert takes
//! one slab, and pieces that share pages are read at once; of a large one every piece has its own, so that several readers can work on
//! it. All experts of the same shapes take slabs of the same sizes. A piece of another [`Layout`] than row by row is read through a buffer of at most
//! 1 MiB beside its slab and brought into form on the way.
//!
//! A checksum of each slab's pieces is taken when it is first loaded, and every later load must give the same.
//!
//! Knows nothing of budgets, threads or which experts are worth keeping.

use std::hash::Hasher;
use std::ops::Range;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use self::piece::CHUNK_BYTES;
pub use self::piece::Part;
pub(crate) use self::piece::{Layout, Piece};
use self::place::{Filling, Stored, place};
use crate::checkpoint::NamedSource;
use crate::error::{Error, ExpertFault, Fault, Result};
use crate::expert::check_expert_count;
use crate::experts::matrix::{Dtype, Matrix};
use crate::experts::mxfp4;
use crate::offload::slab::Slab;

mod piece;
mod place;
mod scatter;

/// All experts of a model, in their files.
#[derive(Debug)]
pub struct ExpertStore {
    sources: Vec<NamedSource>,
    experts: Vec<Stored>,
    /// Key of each layer's first expert, and at the end the number of all.
    first: Vec<usize>,
}

/// How far the load of one of an expert's slabs has come.
#[derive(Default)]
pub(crate) struct Load {
    run: usize,
    /// Bytes of the run that have been read.
    done: usize,
    hash: XxHash3_64,
    /// A chunk on its way into form.
    beside: Option<Slab>,
}

/// What a step of a load did.
pub(crate) struct Chunk {
    pub(crate) bytes: usize,
    /// The slab is there, whole and as it was.
    pub(crate) last: bool,
}

impl ExpertStore {
    /// A store of `layers`, each a list of experts, each a list of pieces in `sources`. Nothing is read.
    ///
    /// # Errors
    /// [`Error::ExpertCount`] for a layer without experts or too many of them, [`Error::Shape`] for an expert without pieces or with two
    /// of the same part and for columns that are no whole number of blocks, [`Error::Checkpoint`] for a piece outside its source.
    pub(crate) fn new(sources: Vec<NamedSource>, layers: Vec<Vec<Vec<Piece>>>) -> Result<Self> {
        let lengths = sources.iter().map(|(name, source)| source.len().map_err(|error| Error::io(name, error)));
        let lengths = lengths.collect::<Result<Vec<u64>>>()?;
        let (mut experts, mut first) = (Vec::new(), vec![0]);
        for (layer, pieces) in layers.into_iter().enumerate() {
            check_expert_count(pieces.len())?;
            for (expert, pieces) in pieces.into_iter().enumerate() {
                experts.push(place(pieces, &sources, &lengths, &format!("expert {expert} of layer {layer}"))?);
            }
            first.push(experts.len());
        }
        Ok(Self { sources, experts, first })
    }

    /// Layers.
    pub(crate) fn layers(&self) -> usize {
        self.first.len() - 1
    }

    /// Experts of a layer; 0 for one that is not there.
    pub(crate) fn experts(&self, layer: usize) -> usize {
        self.keys(layer).len()
    }

    /// Bytes of memory that the largest expert of a layer takes, whole pages; 0 for a layer that is not there.
    pub fn slab_bytes(&self, layer: usize) -> usize {
        self.keys(layer).map(|key| self.slab_bytes_of(key).iter().sum()).max().unwrap_or(0)
    }

    /// Type and shape `[rows, columns]` of a part of an expert; `None` where there is none.
    pub(crate) fn piece(&self, layer: usize, expert: usize, part: Part) -> Option<(Dtype, [usize; 2])> {
        let placed = &self.experts[self.keys(layer).nth(expert)?].pieces;
        placed.iter().find(|placed| placed.part == part).map(|placed| (placed.dtype, placed.shape))
    }

    /// Memory for an expert, all 0.
    ///
    /// # Errors
    /// [`Error::ExpertOutOfRange`] for an expert that is not there.
    pub(crate) fn slabs(&self, layer: usize, expert: usize) -> Result<Vec<Slab>> {
        Ok(self.slab_bytes_of(self.key(layer, expert)?).iter().map(|&bytes| Slab::new(bytes)).collect())
    }

    /// Loads an expert into memory as [`ExpertStore::slabs`] makes it.
    ///
    /// # Errors
    /// [`Error::Expert`] when a read fails or the bytes are not those of the first load, [`Error::ExpertOutOfRange`] for an expert that is
    /// not there, [`Error::Shape`] for slabs that are too few or too small.
    pub(crate) fn load<'a>(&'a self, layer: usize, expert: usize, slabs: &'a mut [Slab]) -> Result<LoadedExpert<'a>> {
        let key = self.key(layer, expert)?;
        let bytes = self.slab_bytes_of(key);
        let got: Vec<usize> = slabs.iter().map(Slab::size).collect();
        if got.len() != bytes.len() || got.iter().zip(bytes).any(|(got, bytes)| got < bytes) {
            return Err(Error::shape("slabs", format!("{bytes:?} bytes"), format!("{got:?}")));
        }
        for (at, slab) in slabs.iter_mut().enumerate() {
            let mut load = Load::default();
            while !self.read_chunk(key, at, &mut load, slab).map_err(Error::Expert)?.last {}
        }
        Ok(self.view(key, slabs))
    }

    fn key(&self, layer: usize, expert: usize) -> Result<usize> {
        self.keys(layer).nth(expert).ok_or_else(|| Error::ExpertOutOfRange {
            operand: format!("layer {layer}"),
            id: i64::try_from(expert).unwrap_or(i64::MAX),
            expected: format!("one of {}", self.experts(layer)),
        })
    }

    /// Keys of a layer's experts; keys count the experts of all layers.
    pub(crate) fn keys(&self, layer: usize) -> Range<usize> {
        match self.first.get(layer..) {
            Some([start, end, ..]) => *start..*end,
            _ => 0..0,
        }
    }

    /// Sizes of an expert's slabs.
    pub(crate) fn slab_bytes_of(&self, key: usize) -> &[usize] {
        &self.experts[key].slab_bytes
    }

    /// Reads the next chunk of one of an expert's slabs, which is large enough; the last one is followed by the checksum.
    pub(crate) fn read_chunk(
        &self,
        key: usize,
        at: usize,
        load: &mut Load,
        slab: &mut Slab,
    ) -> Result<Chunk, ExpertFault> {
        let filling = &self.experts[key].fillings[at];
        let Some(run) = filling.runs.get(load.run) else {
            self.verify(key, filling, load)?;
            return Ok(Chunk { bytes: 0, last: true });
        };
        let start = run.bytes.start + load.done;
        let bytes = start..run.bytes.end.min(start + CHUNK_BYTES);
        let offset = run.offset + load.done as u64;
        let part = match run.scatter {
            None => &mut slab.bytes_mut()[bytes.clone()],
            Some(_) => {
                let beside = load.beside.take().filter(|beside| beside.size() >= bytes.len());
                let beside = load.beside.insert(beside.unwrap_or_else(|| Slab::new(bytes.len())));
                &mut beside.bytes_mut()[..bytes.len()]
            }
        };
        let (file, source) = &self.sources[run.source];
        source.read_exact_at(part, offset).map_err(|reason| {
            self.fault(key, file.clone(), Fault::Read { offset, bytes: bytes.len(), reason: Arc::new(reason) })
        })?;
        let (start, end) = (run.pieces.start.max(bytes.start), run.pieces.end.min(bytes.end));
        let of_pieces = start.saturating_sub(bytes.start)..end.saturating_sub(bytes.start);
        load.hash.write(part.get(of_pieces.clone()).unwrap_or(&[]));
        if let (Some(scatter), Some(beside)) = (&run.scatter, &load.beside) {
            let numbers = beside.bytes().get(of_pieces).unwrap_or(&[]);
            scatter.put(numbers, start.saturating_sub(run.pieces.start), slab.bytes_mut());
        }
        load.done += bytes.len();
        if bytes.end == run.bytes.end {
            (load.run, load.done) = (load.run + 1, 0);
        }
        let last = load.run == filling.runs.len();
        if last {
            self.verify(key, filling, load)?;
            for placed in self.experts[key].pieces.iter().filter(|placed| placed.slab == at && placed.to_turn) {
                let blocks = slab.bytes_mut()[placed.bytes.clone()].as_chunks_mut::<{ Dtype::Mxfp4.block_bytes() }>().0;
                blocks.iter_mut().for_each(mxfp4::turn);
            }
        }
        Ok(Chunk { bytes: bytes.len(), last })
    }

    fn verify(&self, key: usize, filling: &Filling, load: &Load) -> Result<(), ExpertFault> {
        let got = load.hash.finish();
        let expected = *filling.checksum.get_or_init(|| got);
        if got == expected {
            return Ok(());
        }
        Err(self.fault(key, self.files(key), Fault::Checksum { expected, got }))
    }

    /// Names of the files that an expert is in.
    pub(crate) fn files(&self, key: usize) -> String {
        let runs = self.experts[key].fillings.iter().flat_map(|filling| &filling.runs);
        let mut files: Vec<&str> = runs.map(|run| self.sources[run.source].0.as_str()).collect();
        files.dedup();
        files.join(", ")
    }

    pub(crate) fn fault(&self, key: usize, file: String, fault: Fault) -> ExpertFault {
        let layer = self.first.partition_point(|&first| first <= key) - 1;
        ExpertFault { file, layer, expert: key - self.first[layer], fault }
    }

    /// The expert that was loaded into its slabs.
    pub(crate) fn view<'a>(&'a self, key: usize, slabs: &'a [Slab]) -> LoadedExpert<'a> {
        LoadedExpert { stored: &self.experts[key], slabs }
    }
}

/// An expert in memory.
#[derive(Clone, Copy)]
pub struct LoadedExpert<'a> {
    stored: &'a Stored,
    slabs: &'a [Slab],
}

impl<'a> LoadedExpert<'a> {
    /// The matrix of a part; `None` when the expert has no such part.
    pub fn matrix(&self, part: Part) -> Option<Matrix<'a>> {
        let placed = self.stored.pieces.iter().find(|placed| placed.part == part)?;
        let [rows, columns] = placed.shape;
        // Checked when the store was made.
        let bytes = &self.slabs[placed.slab].bytes()[placed.bytes.clone()];
        Matrix::new(placed.dtype, rows, columns, bytes).ok()
    }
}

impl std::fmt::Debug for LoadedExpert<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.stored.pieces).finish()
    }
}

#[cfg(test)]
mod tests;
