//! Reproducible random streams: one per (seed, key), and a seed per layer.
//!
//! Knows nothing of what draws from them.

/// SplitMix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014; the
/// constants are Stafford's variant 13): a bijection of the 64-bit integers in which every input bit moves every other.
const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// SplitMix64's increment, 2⁶⁴ over the golden ratio: successive multiples spread evenly.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The seed of one layer; layer 0 keeps the router's own.
pub(crate) const fn layer_seed(seed: u64, layer: usize) -> u64 {
    seed.wrapping_add((layer as u64).wrapping_mul(GOLDEN))
}

/// SplitMix64: a stream of 64-bit numbers that any (seed, key) pair starts at no cost.
pub(crate) struct Stream(u64);

impl Stream {
    /// The stream of `key` under `seed`.
    pub(crate) const fn new(seed: u64, key: u64) -> Self {
        Self(mix(mix(seed.wrapping_add(GOLDEN)) ^ key))
    }

    /// A number below `bound` (the high half of a 128-bit product; the bias is below `bound / 2⁶⁴`).
    pub(crate) const fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        ((mix(self.0) as u128 * bound as u128) >> 64) as u64
    }

    /// Shuffles `values` (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}
