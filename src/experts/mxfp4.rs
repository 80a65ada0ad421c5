//! MXFP4 as Hugging Face writes it, brought into the form that the engine reads, [`Dtype::Mxfp4`], which is ggml's.
//!
//! There a tensor is two: blocks of sixteen bytes, in which weights `2i` and `2i + 1` share byte `i`, and their scales, a byte
//! each. Here a block is its scale and then sixteen bytes in which weights `i` and `16 + i` share byte `i`, so that the halves
//! of four bytes are neighbours on both sides of a product.

use crate::error::{Error, Result};
use crate::experts::matrix::Dtype;

/// Weights of a block.
pub(crate) const WEIGHTS: usize = Dtype::Mxfp4.block();
/// Bytes of a block without its scale.
pub(crate) const BLOCK_BYTES: usize = WEIGHTS / 2;

/// Blocks and scales joined, a block after its scale.
///
/// # Errors
/// [`Error::Shape`] when there is not a scale for each sixteen bytes.
pub(crate) fn joined(blocks: &[u8], scales: &[u8]) -> Result<Vec<u8>> {
    let (blocks, rest) = blocks.as_chunks::<BLOCK_BYTES>();
    if !rest.is_empty() || blocks.len() != scales.len() {
        let expected = format!("{} bytes for {} scales", BLOCK_BYTES * scales.len(), scales.len());
        return Err(Error::shape("blocks of mxfp4", expected, BLOCK_BYTES * blocks.len() + rest.len()));
    }
    let mut joined = vec![0; blocks.len() * Dtype::Mxfp4.block_bytes()];
    for ((joined, block), &scale) in joined.as_chunks_mut::<{ 1 + BLOCK_BYTES }>().0.iter_mut().zip(blocks).zip(scales)
    {
        joined[0] = scale;
        joined[1..].copy_from_slice(block);
        turn(joined);
    }
    Ok(joined)
}

/// Gives a block after its scale the order of the engine, where it has Hugging Face's.
pub(crate) fn turn(block: &mut [u8; 1 + BLOCK_BYTES]) {
    let Some(bytes) = block.last_chunk_mut::<BLOCK_BYTES>() else { return };
    // Half a byte a weight, in order.
    let weights = u128::from_le_bytes(*bytes);
    let (first, last) = (weights as u64, (weights >> 64) as u64);
    *bytes = (spread(first) | spread(last) << 4).to_le_bytes();
}

/// Each half of a byte as the lower half of a byte of its own.
fn spread(halves: u64) -> u128 {
    let spread = |mut halves: u64| {
        halves = (halves | halves << 16) & 0x0000_ffff_0000_ffff;
        halves = (halves | halves << 8) & 0x00ff_00ff_00ff_00ff;
        (halves | halves << 4) & 0x0f0f_0f0f_0f0f_0f0f
    };
    u128::from(spread(halves & 0xffff_ffff)) | u128::from(spread(halves >> 32)) << 64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_weight_goes_to_its_place() {
        for at in 0..WEIGHTS {
            let mut block = [0; 1 + BLOCK_BYTES];
            block[0] = 200;
            block[1 + at / 2] = 9 << (4 * (at % 2));
            turn(&mut block);
            let mut expected = [0; 1 + BLOCK_BYTES];
            expected[0] = 200;
            expected[1 + at % 16] = 9 << (4 * (at / 16));
            assert_eq!(block, expected, "weight {at}");
        }
    }

    #[test]
    fn a_block_stands_behind_its_scale() {
        // Weights 0 to 15, twice.
        let blocks = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
        assert_eq!(joined(&blocks, &[127]).unwrap()[..4], [127, 0x00, 0x11, 0x22]);
    }

    #[test]
    fn every_block_needs_a_scale() {
        assert!(joined(&[], &[]).unwrap().is_empty());
        let message =
            |blocks: usize, scales: usize| joined(&vec![0; blocks], &vec![0; scales]).unwrap_err().to_string();
        assert_eq!(message(32, 1), "blocks of mxfp4: expected 16 bytes for 1 scales, got 32");
        assert_eq!(message(17, 1), "blocks of mxfp4: expected 16 bytes for 1 scales, got 17");
    }
}
