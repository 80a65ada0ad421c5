//! Memory that experts are read into: whole pages, aligned, so that the system can write into it without a copy of its own.
//!
//! Knows nothing of what is read.

use bytemuck::allocation::zeroed_vec;
use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

use crate::checkpoint::PAGE_BYTES;

/// A page.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// From this size on memory comes from the system itself, in huge pages where it has some: thousands of small ones would be made one
/// after the other while the disk waits, and be looked up one after the other while the expert runs.
const HUGE_BYTES: usize = 2 << 20;

/// Some pages.
pub(crate) struct Slab(Pages);

enum Pages {
    Few(Vec<Page>),
    Many(MmapMut),
}

impl Slab {
    /// Pages for at least so many bytes, all 0.
    pub(crate) fn new(bytes: usize) -> Self {
        // Pages that nobody has touched yet: the first read into them is what makes them.
        let few = || Pages::Few(zeroed_vec(bytes.div_ceil(PAGE_BYTES)));
        if bytes < HUGE_BYTES {
            return Self(few());
        }
        Self(MmapMut::map_anon(bytes.next_multiple_of(PAGE_BYTES)).map_or_else(
            |_| few(),
            |map| {
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                Pages::Many(map)
            },
        ))
    }

    /// Its size in bytes, whole pages.
    pub(crate) fn size(&self) -> usize {
        self.bytes().len()
    }

    /// What is in it.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Pages::Few(pages) => bytemuck::cast_slice(pages),
            Pages::Many(map) => map,
        }
    }

    /// The same, to write to.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Pages::Few(pages) => bytemuck::cast_slice_mut(pages),
            Pages::Many(map) => map,
        }
    }
}

impl std::fmt::Debug for Slab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slab({} bytes)", self.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_whole_and_aligned() {
        let sizes = [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)];
        let large = [(HUGE_BYTES - 1, HUGE_BYTES), (HUGE_BYTES, HUGE_BYTES), (HUGE_BYTES + 1, HUGE_BYTES + PAGE_BYTES)];
        for (bytes, size) in sizes.into_iter().chain(large) {
            let mut slab = Slab::new(bytes);
            assert_eq!((slab.size(), slab.bytes().len()), (size, size));
            assert_eq!(slab.bytes_mut().as_ptr().align_offset(PAGE_BYTES), 0);
            assert!(slab.bytes().iter().all(|&byte| byte == 0));
            slab.bytes_mut().fill(7);
            assert!(slab.bytes().iter().all(|&byte| byte == 7));
        }
    }
}
