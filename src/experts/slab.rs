//! Memory that experts are read into: whole pages, aligned, so that the system can write into it without a copy of its own.
//!
//! Knows nothing of what is read.

use bytemuck::allocation::zeroed_vec;
use bytemuck::{Pod, Zeroable};

use crate::checkpoint::PAGE_BYTES;

/// A page.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Some pages.
pub struct Slab(Vec<Page>);

impl Slab {
    /// Pages for at least so many bytes, all 0.
    pub fn new(bytes: usize) -> Self {
        // Pages that nobody has touched yet: the first read into them is what makes them.
        Self(zeroed_vec(bytes.div_ceil(PAGE_BYTES)))
    }

    /// Its size in bytes, whole pages.
    pub fn size(&self) -> usize {
        self.0.len() * PAGE_BYTES
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }

    /// The same, to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
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
        for (bytes, size) in [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)] {
            let mut slab = Slab::new(bytes);
            assert_eq!((slab.size(), slab.bytes().len()), (size, size));
            assert_eq!(slab.bytes_mut().as_ptr().align_offset(PAGE_BYTES), 0);
        }
    }
}
