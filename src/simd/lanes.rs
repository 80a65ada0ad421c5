//! Sixteen floats side by side: what an instruction set can do with them.

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen floats side by side on one instruction set. A mask has bit `i` for lane `i`.
///
/// Each operation rounds once, as `f32` arithmetic does: implementations never fuse a product into a sum.
pub(crate) trait Lanes: Copy {
    /// Sixteen floats.
    type Vector: Copy;

    /// The same value in every lane.
    fn splat(self, value: f32) -> Self::Vector;
    /// Lanes from memory.
    fn load(self, from: &[f32; LANES]) -> Self::Vector;
    /// Lanes to memory.
    fn store(self, vector: Self::Vector, into: &mut [f32; LANES]);
    /// `a + b`.
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a − b`.
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b`.
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`.
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The larger of each pair of numbers; which zero of two is not defined, nor anything with NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Where `a ≥ b`.
    fn ge(self, a: Self::Vector, b: Self::Vector) -> u16;
    /// `a` where the mask is set, `b` elsewhere.
    fn blend(self, mask: u16, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `2^n` where a lane holds `n + 1.5 · 2^23`, for whole `n` from −126 to 127.
    fn power_of_two(self, shifted: Self::Vector) -> Self::Vector;
    /// The first `at` lanes of `into`, then the lanes of the mask, first lane first, as far as there is room; what comes after
    /// them is not defined.
    #[inline(always)]
    fn compress(self, mask: u16, from: Self::Vector, into: Self::Vector, at: usize) -> Self::Vector {
        let (mut all, mut kept) = ([0.0; LANES], [0.0; LANES]);
        self.store(from, &mut all);
        self.store(into, &mut kept);
        let (mut left, mut at) = (mask, at);
        while left != 0 && at < LANES {
            kept[at] = all[left.trailing_zeros() as usize];
            (at, left) = (at + 1, left & (left - 1));
        }
        self.load(&kept)
    }

    /// The lanes by falling value, equals in the order they stand in: four bits each, the largest one's in the lowest. Without
    /// NaN, and with −∞ in the lanes from `count` on.
    #[inline(always)]
    fn argsort(self, values: Self::Vector, _count: usize) -> u64 {
        let (mut all, mut ranks) = ([0.0; LANES], [0; LANES]);
        self.store(values, &mut all);
        self.ranks(&all, &mut ranks);
        let (mut order, mut taken) = (0, 0u32);
        for (lane, &rank) in ranks.iter().enumerate() {
            // Equals have one rank between them; each takes the next free one.
            let place = (rank + (!(taken >> rank)).trailing_zeros()) % LANES as u32;
            order |= (lane as u64) << (4 * place);
            taken |= 1 << place;
        }
        order
    }

    /// The lanes in an order, as [`Lanes::argsort`] gives one.
    #[inline(always)]
    fn permute(self, vector: Self::Vector, order: u64) -> Self::Vector {
        let (mut all, mut placed) = ([0.0; LANES], [0.0; LANES]);
        self.store(vector, &mut all);
        for (place, value) in placed.iter_mut().enumerate() {
            *value = all[(order >> (4 * place)) as usize % LANES];
        }
        self.load(&placed)
    }

    /// The value of a rank, 0 for the largest, in every lane. Without NaN.
    #[inline(always)]
    fn ranked(self, values: Self::Vector, rank: usize) -> Self::Vector {
        let mut all = [0.0; LANES];
        self.store(values, &mut all);
        self.splat(all[(self.argsort(values, LANES) >> (4 * rank)) as usize % LANES])
    }

    /// The largest of all lanes.
    #[inline(always)]
    fn fold_max(self, vector: Self::Vector) -> f32 {
        let mut all = [0.0; LANES];
        self.store(vector, &mut all);
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                all[lane] = if all[lane] > all[lane + half] { all[lane] } else { all[lane + half] };
            }
            half /= 2;
        }
        all[0]
    }

    /// The sum of all lanes: the upper half is added to the lower one, down to one lane.
    #[inline(always)]
    fn fold_sum(self, vector: Self::Vector) -> f32 {
        let mut all = [0.0; LANES];
        self.store(vector, &mut all);
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                all[lane] += all[lane + half];
            }
            half /= 2;
        }
        all[0]
    }

    /// For each of the sixteen values how many of them are larger.
    fn ranks(self, values: &[f32; LANES], ranks: &mut [u32; LANES]);
    /// The first lanes from a slice of at most sixteen values, `fill` in the others.
    #[inline(always)]
    fn load_part(self, from: &[f32], fill: f32) -> Self::Vector {
        let mut whole = [fill; LANES];
        whole[..from.len()].copy_from_slice(from);
        self.load(&whole)
    }

    /// The first lanes to a slice of at most sixteen values.
    #[inline(always)]
    fn store_part(self, vector: Self::Vector, into: &mut [f32]) {
        let mut whole = [0.0; LANES];
        self.store(vector, &mut whole);
        into.copy_from_slice(&whole[..into.len()]);
    }
}
