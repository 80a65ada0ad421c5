//! Vector code: sixteen `f32` lanes on whatever the CPU has, and the kernels written once on top of them.
//!
//! `Lanes` is what an instruction set can do with sixteen floats. A value of a type that implements it proves that the
//! CPU has the instructions: only detection makes one ([`Isa::detect`]). A `Kernel` is written once, over any `Lanes`;
//! `Isa::run` compiles it for each set. `Scalar` is the twin of all: no lane operation fuses or reorders, so every set
//! gives the same bits.
//!
//! The only room with `unsafe` in it. Knows nothing of routing.

/// What a set needs of the CPU, said once: `has` detects the features that `compiled` has a kernel compiled for.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! features {
    ($detected:ident, $lanes:ty: $($feature:tt)+) => {
        #[cfg(test)]
        pub(in crate::simd) const FEATURES: &[&str] = &[$($feature),+];

        #[inline]
        pub(super) fn has() -> bool {
            $(std::arch::$detected!($feature))&&+
        }

        #[target_feature($(enable = $feature),+)]
        pub(super) fn compiled<K: crate::simd::Kernel>(lanes: $lanes, kernel: K) -> K::Output {
            kernel.run(lanes)
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod dtype;
pub(crate) mod multiply;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod product;
pub(crate) mod quantized;
mod scalar;
pub(crate) mod score;
pub(crate) mod select;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use multiply::Multiply;
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use scalar::Scalar;

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

/// Code that [`Isa::run`] compiles for every instruction set. `run` and all that touches lanes must be `#[inline(always)]`
/// functions, not closures: what is not part of the compiled function has no vector instructions.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Runs on `lanes`.
    fn run<L: Multiply>(self, lanes: L) -> Self::Output;
}

/// An instruction set that this CPU has. What routers compute is the same bits on all of them, only times differ; products of
/// experts' weights differ in their last bits.
///
/// ```
/// use phase_moe::simd::Isa;
///
/// assert!(Isa::all().any(|isa| isa == Isa::scalar()));
/// println!("{}", Isa::detect());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Dots(Avx512<true>),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Isa {
    /// The widest set there is.
    pub fn detect() -> Self {
        let mut widest = Self::scalar();
        Self::all().for_each(|isa| widest = isa);
        widest
    }

    /// Plain Rust, which every CPU has.
    pub fn scalar() -> Self {
        Self(Set::Scalar(Scalar))
    }

    /// All sets of this CPU, plain Rust first, the widest last.
    pub fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let wide = [Avx2::new().map(Set::Avx2), Avx512::new().map(Set::Avx512), Avx512::new().map(Set::Avx512Dots)]
            .into_iter()
            .flatten();
        #[cfg(target_arch = "aarch64")]
        let wide = Neon::new().map(Set::Neon).into_iter();
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let wide = std::iter::empty();
        std::iter::once(Set::Scalar(Scalar)).chain(wide).map(Self)
    }

    /// Whether products of bf16 and of bytes are instructions of this set.
    pub(crate) fn has_dots(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Dots(_) => true,
            _ => false,
        }
    }

    /// Runs a kernel as compiled for this set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Set::Scalar(lanes) => lanes.call(kernel),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Dots(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Set::Neon(lanes) => lanes.run(kernel),
        }
    }
}

impl Default for Isa {
    fn default() -> Self {
        Self::detect()
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Set::Scalar(_) => "scalar",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Dots(_) => "avx512+bf16+vnni",
            #[cfg(target_arch = "aarch64")]
            Set::Neon(_) => "neon",
        })
    }
}
