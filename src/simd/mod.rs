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

pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod dtype;
mod lanes;
pub(crate) mod multiply;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod norm;
pub(crate) mod product;
pub(crate) mod quantized;
pub(crate) mod recurrent;
mod scalar;
pub(crate) mod score;
pub(crate) mod select;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
pub(crate) use lanes::{LANES, Lanes};
pub(crate) use multiply::Kernel;
use multiply::Multiply;
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use scalar::Scalar;

/// An instruction set that this CPU has. What routers compute is the same bits on all of them, only times differ; products of
/// experts' weights differ in their last bits.
///
/// ```
/// use phase_moe::Isa;
///
/// println!("{}", Isa::default());
/// "scalar".parse::<Isa>()?.limit();
/// assert_eq!(Isa::default().to_string(), "scalar");
/// # Ok::<(), String>(())
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

/// How many of the sets of this CPU may be used, from plain Rust on.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

impl Isa {
    /// The widest set there is, up to the [limit](Isa::limit).
    pub(crate) fn detect() -> Self {
        // Nothing else depends on what is written there.
        let most = LIMIT.load(Ordering::Relaxed);
        Self::all().take(most).last().unwrap_or(Self::scalar())
    }

    /// From here on nothing in this process is made for a wider set: to see what a narrower CPU would do. What there is already,
    /// engines, scores and buffers, stays on its own.
    pub fn limit(self) {
        let sets = Self::all().take_while(|&isa| isa != self).count() + 1;
        LIMIT.store(sets, Ordering::Relaxed);
    }

    /// Plain Rust, which every CPU has.
    pub(crate) fn scalar() -> Self {
        Self(Set::Scalar(Scalar))
    }

    /// All sets of this CPU, plain Rust first, the widest last.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
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

    /// Whether activations meet quantised weights as bytes.
    pub(crate) fn has_bytes(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) | Set::Avx512(_) | Set::Avx512Dots(_) => true,
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

impl std::str::FromStr for Isa {
    /// What was expected.
    type Err = String;

    /// The set of this name, if this CPU has it: `scalar`, `avx2`, `avx512`, `avx512+bf16+vnni`, `neon`.
    fn from_str(name: &str) -> Result<Self, String> {
        Self::all().find(|isa| isa.to_string() == name).ok_or_else(|| {
            let there: Vec<String> = Self::all().map(|isa| isa.to_string()).collect();
            format!("unknown instruction set `{name}`: expected one that this CPU has, {}", there.join(", "))
        })
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
