//! A disk in memory whose reads can be counted, held back and spoilt, and a cache over it.

use std::collections::HashSet;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Condvar, Mutex};

use crate::checkpoint::ByteSource;
use crate::offload::store::Layout;
use crate::offload::store::Piece;
use crate::offload::{LoadedExpert, Part, Step};
use crate::{CacheOptions, Dtype, ExpertCache, ExpertId, ExpertSet, ExpertStore};

/// What a read does beside reading.
pub type Fault = Box<dyn Fn(u64) -> Result<()> + Send + Sync>;

/// The disk.
pub struct Disk {
    pub bytes: Mutex<Vec<u8>>,
    fault: Mutex<Option<Arc<Fault>>>,
    /// Offsets of all reads, in the order in which they were asked for.
    pub reads: Mutex<Vec<u64>>,
    /// Reads that may begin, and those that wait to.
    gate: Mutex<(usize, usize)>,
    opened: Condvar,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Disk")
    }
}

impl ByteSource for Disk {
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        // What a file needs to be read past the page cache.
        assert!(offset.is_multiple_of(4096) && buffer.as_ptr().align_offset(4096) == 0, "{offset}");
        let mut gate = self.gate.lock().unwrap();
        // As they come: the system may let those that have waited at the gate go in another order.
        self.reads.lock().unwrap().push(offset);
        gate.1 += 1;
        while gate.0 == 0 {
            gate = self.opened.wait(gate).unwrap();
        }
        gate.0 -= 1;
        gate.1 -= 1;
        drop(gate);
        let fault = self.fault.lock().unwrap().clone();
        if let Some(fault) = fault {
            fault(offset)?;
        }
        let bytes = self.bytes.lock().unwrap();
        let part = bytes.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(part.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl Disk {
    pub fn set_fault(&self, fault: impl Fn(u64) -> Result<()> + Send + Sync + 'static) {
        *self.fault.lock().unwrap() = Some(Arc::new(Box::new(fault)));
    }

    pub fn repair(&self) {
        *self.fault.lock().unwrap() = None;
    }

    /// No read begins but `reads` of them.
    pub fn hold(&self, reads: usize) {
        self.gate.lock().unwrap().0 = reads;
        self.opened.notify_all();
    }

    pub fn open(&self) {
        self.hold(usize::MAX / 2);
    }

    /// Waits until so many reads stand at the gate.
    pub fn wait_for_held(&self, reads: usize) {
        wait_until(|| self.gate.lock().unwrap().1 == reads);
    }
}

/// The system's word for a disk that fails, EIO.
pub fn broken() -> Error {
    Error::from_raw_os_error(5)
}

/// Waits for what other threads are about to do.
pub fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// A model on a disk, and a cache over it.
pub struct Bed {
    pub cache: Arc<ExpertCache>,
    pub disk: Arc<Disk>,
    pub experts: usize,
    /// Rows of the up projection; a row has 1 KiB.
    rows: usize,
}

impl Drop for Bed {
    fn drop(&mut self) {
        // A test that fails must not leave readers at the gate.
        self.disk.open();
    }
}

/// Layers of experts on a disk: expert `e` of layer `l` is `[rows, 256]` and `[8, 16]` numbers, all of them `l · experts + e`, and they
/// begin anywhere in a page.
pub fn store(layers: usize, experts: usize, rows: usize) -> (ExpertStore, Arc<Disk>) {
    let (up, down) = (rows * 256, 8 * 16);
    let each = 4 * (up + down);
    let mut bytes = vec![0u8; 40];
    for expert in 0..layers * experts {
        bytes.extend((0..up + down).flat_map(|_| (expert as f32).to_le_bytes()));
    }
    let disk = Arc::new(Disk {
        bytes: Mutex::new(bytes),
        fault: Mutex::default(),
        reads: Mutex::default(),
        gate: Mutex::new((usize::MAX / 2, 0)),
        opened: Condvar::new(),
    });
    let piece = |part, offset: usize, rows, columns| Piece {
        part,
        source: 0,
        offset: offset as u64,
        dtype: Dtype::F32,
        rows,
        columns,
        layout: Layout::Rows,
    };
    let expert = |key: usize| {
        let at = 40 + key * each;
        vec![piece(Part::Up, at, rows, 256), piece(Part::Down, at + 4 * up, 8, 16)]
    };
    let layers = (0..layers).map(|layer| (0..experts).map(|id| expert(layer * experts + id)).collect()).collect();
    (ExpertStore::new(vec![("disk".into(), disk.clone())], layers).unwrap(), disk)
}

/// A cache with room for so many experts, all layers together.
pub fn bed(layers: usize, experts: usize, room: usize, change: impl FnOnce(&mut CacheOptions)) -> Bed {
    bed_of(layers, experts, 4, room, change)
}

/// The same, with so many rows an expert.
pub fn bed_of(layers: usize, experts: usize, rows: usize, room: usize, change: impl FnOnce(&mut CacheOptions)) -> Bed {
    let (store, disk) = store(layers, experts, rows);
    let mut options = CacheOptions::new(room * store.slab_bytes(0));
    change(&mut options);
    Bed { cache: Arc::new(ExpertCache::new(Arc::new(store), options).unwrap()), disk, experts, rows }
}

/// Some of the experts of a layer.
pub fn set(experts: usize, ids: impl IntoIterator<Item = usize>) -> ExpertSet {
    let mut set = ExpertSet::new(experts).unwrap();
    ids.into_iter().for_each(|id| assert!(set.insert(ExpertId::new(id, experts).unwrap())));
    set
}

impl Bed {
    /// Bytes of an expert's slab.
    pub fn slab(&self) -> usize {
        self.cache.store().slab_bytes(0)
    }

    pub fn set(&self, ids: impl IntoIterator<Item = usize>) -> ExpertSet {
        set(self.experts, ids)
    }

    /// Runs a step, checks that it sees every expert once, in order and whole, and returns what it did and its groups.
    pub fn run(&self, layer: usize, ids: &[usize]) -> crate::Result<(Step, Vec<usize>)> {
        let (mut seen, mut groups) = (Vec::new(), Vec::new());
        let step = self.cache.run(layer, &self.set(ids.iter().copied()), |group| {
            groups.push(group.len());
            for (id, expert) in group {
                self.check(layer, id.index(), expert);
                seen.push(id.index());
            }
            Ok(())
        })?;
        let mut wanted = ids.to_vec();
        wanted.sort_unstable();
        assert_eq!(seen, wanted);
        Ok((step, groups))
    }

    /// Checks that an expert is the one it should be.
    pub fn check(&self, layer: usize, id: usize, expert: &LoadedExpert<'_>) {
        let value = ((layer * self.experts + id) as f32).to_le_bytes();
        for (part, shape) in [(Part::Up, [self.rows, 256]), (Part::Down, [8, 16])] {
            let matrix = expert.matrix(part).unwrap();
            assert_eq!((matrix.shape(), matrix.dtype()), (shape, Dtype::F32));
            for row in 0..shape[0] {
                assert!(matrix.row(row).chunks(4).all(|number| number == value), "{part:?} of {layer}, {id}");
            }
        }
        assert!(expert.matrix(Part::Gate).is_none());
    }

    /// Reads so far.
    pub fn reads(&self) -> usize {
        self.disk.reads.lock().unwrap().len()
    }

    /// Distinct places read so far.
    pub fn places(&self) -> usize {
        self.disk.reads.lock().unwrap().iter().collect::<HashSet<_>>().len()
    }

    /// Makes reads of an expert fail, in whatever layer `key` counts it.
    pub fn break_expert(&self, key: usize, error: impl Fn() -> Error + Send + Sync + 'static) {
        let each = (4 * (self.rows * 256 + 8 * 16)) as u64;
        let start = (40 + key as u64 * each) / 4096 * 4096;
        let end = 40 + (key as u64 + 1) * each;
        self.disk.set_fault(move |offset| {
            // An expert's first page may be its neighbour's last; a read begins at an expert's first.
            let hit = offset == start || (offset > start && offset < end && (offset - start).is_multiple_of(1 << 20));
            if hit { Err(error()) } else { Ok(()) }
        });
    }
}
