//! What products of matrices need of sixteen lanes beyond [`Lanes`].
//!
//! A vector here is sixteen words of 32 bits: floats, pairs of bf16, fours of bytes, or integers, as the operation has it. Unlike
//! the operations of [`Lanes`] these round as the instruction set does: sums are fused where there is an instruction for it,
//! so results differ between sets in their last bits. On one set they are the same on any number of threads.
//!
//! What is given here in plain Rust is the definition, and what [`super::scalar::Scalar`] runs.

use half::{bf16, f16};

use super::dtype::{HEAD, scales_of};
use super::lanes::{LANES, Lanes};

/// Sixteen words, on a cache line of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; LANES]);

/// Bytes of a [`Line`].
pub(crate) const LINE_BYTES: usize = 64;

/// Code that [`Isa::run`](super::Isa::run) compiles for every instruction set. `run` and all that touches lanes must be `#[inline(always)]`
/// functions, not closures: what is not part of the compiled function has no vector instructions.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Runs on `lanes`.
    fn run<L: Multiply>(self, lanes: L) -> Self::Output;
}

/// Lanes with products.
pub(crate) trait Multiply: Lanes {
    /// Runs a kernel compiled for this set, as a function of its own: what it keeps on the stack is not added to its caller's, which
    /// without optimisation would be megabytes.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// Whether there are registers for tiles of 24 vectors.
    const WIDE: bool = false;
    /// Whether activations meet quantised weights as bytes, sixteen rows side by side.
    const DOTS: bool = false;
    /// Whether few of them do so along each row; more meet sixteen rows here too.
    const ALONG: bool = false;
    /// Whether sums of neighbouring words are instructions, so that integers are added up before they become floats.
    const FOLDS: bool = false;

    /// The words of a vector.
    #[inline(always)]
    fn words(self, vector: Self::Vector) -> [u32; LANES] {
        let mut floats = [0.0; LANES];
        self.store(vector, &mut floats);
        floats.map(f32::to_bits)
    }

    /// A vector of words.
    #[inline(always)]
    fn of_words(self, words: [u32; LANES]) -> Self::Vector {
        self.load(&words.map(f32::from_bits))
    }

    /// A line from memory.
    #[inline(always)]
    fn line(self, from: &Line) -> Self::Vector {
        self.of_words(from.0)
    }

    /// A line to memory.
    #[inline(always)]
    fn store_line(self, vector: Self::Vector, into: &mut Line) {
        into.0 = self.words(vector);
    }

    /// Words from bytes.
    #[inline(always)]
    fn bytes(self, from: &[u8; LINE_BYTES]) -> Self::Vector {
        let words = from.as_chunks::<4>().0;
        self.of_words(std::array::from_fn(|lane| u32::from_le_bytes(words[lane])))
    }

    /// The same word in every lane.
    #[inline(always)]
    fn repeat(self, word: u32) -> Self::Vector {
        self.splat(f32::from_bits(word))
    }

    /// `a · b + sum`, floats.
    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, sum: Self::Vector) -> Self::Vector {
        self.add(self.mul(a, b), sum)
    }

    /// `a₀ · b₀ + a₁ · b₁ + sum`, the words of `a` and `b` pairs of bf16.
    #[inline(always)]
    fn dot_pairs(self, a: Self::Vector, b: Self::Vector, sum: Self::Vector) -> Self::Vector {
        self.of_words(pairs_dot(self.words(a), self.words(b), self.words(sum)))
    }

    /// `Σ aᵢ · bᵢ + sum`, the words of `a` four bytes without sign, those of `b` four with sign, those of `sum` integers.
    #[inline(always)]
    fn dot_bytes(self, a: Self::Vector, b: Self::Vector, sum: Self::Vector) -> Self::Vector {
        self.of_words(bytes_dot(self.words(a), self.words(b), self.words(sum)))
    }

    /// Floats of integers.
    #[inline(always)]
    fn convert(self, integers: Self::Vector) -> Self::Vector {
        let words = self.words(integers);
        self.load(&words.map(|word| word as i32 as f32))
    }

    /// Bits that both have.
    #[inline(always)]
    fn and(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        self.of_words(std::array::from_fn(|lane| a[lane] & b[lane]))
    }

    /// Bits that one of them has and not the other.
    #[inline(always)]
    fn xor(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        self.of_words(std::array::from_fn(|lane| a[lane] ^ b[lane]))
    }

    /// Both halves of every word shifted right by the half of `by`.
    #[inline(always)]
    fn shift_right(self, a: Self::Vector, by: Self::Vector) -> Self::Vector {
        let (a, by) = (self.words(a), self.words(by));
        let half = |a: u32, by: u32| if by < 16 { (a & 0xffff) >> by } else { 0 };
        self.of_words(std::array::from_fn(|lane| {
            let (a, by) = (a[lane], by[lane]);
            half(a, by & 0xffff) | half(a >> 16, by >> 16) << 16
        }))
    }

    /// Both halves of every word shifted left by 4.
    #[inline(always)]
    fn shift_left_4(self, a: Self::Vector) -> Self::Vector {
        let words = self.words(a);
        self.of_words(words.map(|word| (word & 0x0fff) << 4 | (word & 0x0fff_0000) << 4))
    }

    /// Every word shifted right.
    #[inline(always)]
    fn shift_words(self, a: Self::Vector, by: u32) -> Self::Vector {
        self.of_words(self.words(a).map(|word| word >> by))
    }

    /// Every word shifted left; by 32 there is nothing left.
    #[inline(always)]
    fn shift_words_left(self, a: Self::Vector, by: u32) -> Self::Vector {
        self.of_words(self.words(a).map(|word| word.checked_shl(by).unwrap_or(0)))
    }

    /// For every byte, whose upper half is 0, that entry of the table.
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], a: Self::Vector) -> Self::Vector {
        self.of_words(
            self.words(a).map(|word| u32::from_le_bytes(word.to_le_bytes().map(|byte| table[usize::from(byte & 15)]))),
        )
    }

    /// Floats of one byte of every word, without sign.
    #[inline(always)]
    fn byte_floats(self, a: Self::Vector, byte: usize) -> Self::Vector {
        self.convert(self.and(self.shift_words(a, 8 * byte as u32), self.repeat(0xff)))
    }

    /// Floats of the halves in the lower bits of every word.
    #[inline(always)]
    fn low_halves(self, a: Self::Vector) -> Self::Vector {
        self.load(&self.words(a).map(|word| f16::from_bits(word as u16).to_f32()))
    }

    /// The lowest byte of every word.
    #[inline(always)]
    fn narrow_bytes(self, a: Self::Vector) -> [u8; LANES] {
        self.words(a).map(|word| word as u8)
    }

    /// Eight words from each.
    #[inline(always)]
    fn halves(self, low: &[u8; 32], high: &[u8; 32]) -> Self::Vector {
        let mut both = [0; LINE_BYTES];
        both[..32].copy_from_slice(low);
        both[32..].copy_from_slice(high);
        self.bytes(&both)
    }

    /// Both numbers, eight times each.
    #[inline(always)]
    fn eights(self, first: f32, second: f32) -> Self::Vector {
        self.of_words(eights(first.to_bits(), second.to_bits()))
    }

    /// Each of the numbers four times.
    #[inline(always)]
    fn quads(self, from: &[f32; 4]) -> Self::Vector {
        self.load(&std::array::from_fn(|lane| from[lane / 4]))
    }

    /// The lower halves of the bytes, then the upper ones.
    #[inline(always)]
    fn nibbles(self, from: &[u8; 32]) -> Self::Vector {
        const BY: Line = Line(eights(0, 0x0004_0004));
        self.and(self.shift_right(self.halves(from, from), self.line(&BY)), self.repeat(0x0f0f_0f0f))
    }

    /// Lanes `2 · pair` and `2 · pair + 1` of a vector, eight times each; `stored` is the vector as it lies in memory.
    #[inline(always)]
    fn eights_of(self, _vector: Self::Vector, stored: &[f32; LANES], pair: usize) -> Self::Vector {
        self.eights(stored[2 * pair], stored[2 * pair + 1])
    }

    /// Lanes from `4 · pair` on of a vector, four times each; as above.
    #[inline(always)]
    fn quads_of(self, _vector: Self::Vector, stored: &[f32; LANES], pair: usize) -> Self::Vector {
        self.quads(&stored.as_chunks::<4>().0[pair])
    }

    /// The lower halves of the bytes `first`, then the upper ones, then those of `second`.
    #[inline(always)]
    fn nibbles_of_two(self, first: &[u8; 16], second: &[u8; 16]) -> Self::Vector {
        const BY: Line = Line([
            0,
            0,
            0,
            0,
            0x0004_0004,
            0x0004_0004,
            0x0004_0004,
            0x0004_0004,
            0,
            0,
            0,
            0,
            0x0004_0004,
            0x0004_0004,
            0x0004_0004,
            0x0004_0004,
        ]);
        let mut twice = [[0; 32]; 2];
        for (twice, from) in twice.iter_mut().zip([first, second]) {
            twice[..16].copy_from_slice(from);
            twice[16..].copy_from_slice(from);
        }
        self.and(self.shift_right(self.halves(&twice[0], &twice[1]), self.line(&BY)), self.repeat(0x0f0f_0f0f))
    }

    /// Bytes of five bits: [`Multiply::nibbles`] of `low`, above them bit `2 · pair` of each byte of `high`, then bit `2 · pair + 1`.
    #[inline(always)]
    fn fives(self, low: &[u8; 32], high: &[u8; 32], pair: usize) -> Self::Vector {
        const BY: [Line; 4] = [
            Line(eights(0, 0x0001_0001)),
            Line(eights(0x0002_0002, 0x0003_0003)),
            Line(eights(0x0004_0004, 0x0005_0005)),
            Line(eights(0x0006_0006, 0x0007_0007)),
        ];
        let fifths = self.shift_right(self.halves(high, high), self.line(&BY[pair]));
        // The two have no bit in common.
        self.xor(self.nibbles(low), self.shift_left_4(self.and(fifths, self.repeat(0x0101_0101))))
    }

    /// Bytes of six bits: the lower four from halves of the bytes `low`, the lower halves or, where `second` says so, the upper ones; the
    /// upper two from `high`, first for 32 bytes and then for 32 more the pairs of bits 0 and 2, or 4 and 6.
    #[inline(always)]
    fn sixes(self, low: &[u8; LINE_BYTES], high: &[u8; 32], second: bool) -> Self::Vector {
        const BY: [Line; 2] = [Line(eights(0, 0x0002_0002)), Line(eights(0x0004_0004, 0x0006_0006))];
        let low = self.bytes(low);
        let nibbles = if second { self.shift_right(low, self.repeat(0x0004_0004)) } else { low };
        let pairs = self.shift_right(self.halves(high, high), self.line(&BY[usize::from(second)]));
        let pairs = self.shift_left_4(self.and(pairs, self.repeat(0x0303_0303)));
        // The two have no bit in common.
        self.xor(self.and(nibbles, self.repeat(0x0f0f_0f0f)), pairs)
    }

    /// Sizes of bytes with sign; of −128 it is 128.
    #[inline(always)]
    fn sizes(self, a: Self::Vector) -> Self::Vector {
        let size = |byte: u8| (byte as i8).unsigned_abs();
        self.of_words(self.words(a).map(|word| u32::from_le_bytes(word.to_le_bytes().map(size))))
    }

    /// The bytes `a`, which have signs and are not −128, times the signs of those of `by`: 0 where these are.
    #[inline(always)]
    fn with_signs(self, a: Self::Vector, by: Self::Vector) -> Self::Vector {
        let (a, by) = (self.words(a), self.words(by));
        self.of_words(std::array::from_fn(|lane| {
            let (a, by) = (a[lane].to_le_bytes(), by[lane].to_le_bytes());
            u32::from_le_bytes(std::array::from_fn(|at| ((a[at] as i8).wrapping_mul((by[at] as i8).signum())) as u8))
        }))
    }

    /// `Σ aᵢ · bᵢ`, the words of `a` four bytes without sign of at most 128, those of `b` four with sign and not −128: integers.
    #[inline(always)]
    fn dot_small(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        self.dot_bytes(a, b, self.splat(0.0))
    }

    /// Sums of two products in sixteen bits, the bytes of `a` without sign and below 128, those of `b` with sign.
    #[inline(always)]
    fn small_products(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        self.of_words(std::array::from_fn(|lane| {
            let (a, b) = (a[lane].to_le_bytes(), b[lane].to_le_bytes());
            let product = |at: usize| i32::from(a[at]) * i32::from(b[at] as i8);
            (product(0) + product(1)) as u32 & 0xffff | ((product(2) + product(3)) as u32) << 16
        }))
    }

    /// Both halves of every word added.
    #[inline(always)]
    fn add_halves(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        self.of_words(std::array::from_fn(|lane| {
            let (a, b) = (a[lane], b[lane]);
            a.wrapping_add(b) & 0xffff | (a >> 16).wrapping_add(b >> 16) << 16
        }))
    }

    /// The sum of the two halves of every word, which have signs.
    #[inline(always)]
    fn fold_halves(self, a: Self::Vector) -> Self::Vector {
        self.of_words(self.words(a).map(|word| (i32::from(word as i16) + i32::from((word >> 16) as i16)) as u32))
    }

    /// Words added, integers.
    #[inline(always)]
    fn add_words(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        self.of_words(std::array::from_fn(|lane| a[lane].wrapping_add(b[lane])))
    }

    /// Sums of each four words, integers: the first and third of `a` and of `b`, then the second and fourth of both, then zeros.
    #[inline(always)]
    fn fours(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let sum = |words: &[u32; 4]| words.iter().fold(0u32, |sum, &word| sum.wrapping_add(word));
        let (a, b) = (self.words(a), self.words(b));
        let (a, b) = (a.as_chunks::<4>().0, b.as_chunks::<4>().0);
        let mut sums = [0; LANES];
        for (sums, words) in sums.iter_mut().zip([&a[0], &a[2], &b[0], &b[2], &a[1], &a[3], &b[1], &b[3]]) {
            *sums = sum(words);
        }
        self.of_words(sums)
    }

    /// The same of words that fit sixteen bits with sign.
    #[inline(always)]
    fn small_fours(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        self.fours(a, b)
    }

    /// Sums of each eight words of four vectors, of which `a` and `b` are [`Multiply::fours`]; then zeros.
    #[inline(always)]
    fn eights_of_fours(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        let mut sums = [0; LANES];
        for at in 0..4 {
            (sums[at], sums[4 + at]) = (a[at].wrapping_add(a[4 + at]), b[at].wrapping_add(b[4 + at]));
        }
        self.of_words(sums)
    }

    /// Two of [`Multiply::fours`] in the order of the words.
    #[inline(always)]
    fn in_order(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        let (a, b) = (self.words(a), self.words(b));
        let of = |lane: usize| if lane < LANES / 2 { a } else { b }[lane % 8 / 2 + 4 * (lane % 2)];
        self.of_words(std::array::from_fn(of))
    }

    /// What a block of `q4_K` or `q5_K` begins with: scales of its eight groups, then what is taken off.
    #[inline(always)]
    fn scales_and_offsets(self, head: &[u8; HEAD]) -> Self::Vector {
        let (scales, offsets) = scales_of(head);
        let mut both = [0; LANES];
        both[..8].copy_from_slice(&scales);
        both[8..].copy_from_slice(&offsets);
        let [scale, least] = [self.half([head[0], head[1]]), self.half([head[2], head[3]])];
        self.mul(self.widen_u8(both), self.eights(scale, least))
    }

    /// Floats of sixteen bytes, without sign.
    #[inline(always)]
    fn widen_u8(self, from: [u8; LANES]) -> Self::Vector {
        self.load(&from.map(f32::from))
    }

    /// Floats of sixteen bytes, with sign.
    #[inline(always)]
    fn widen_i8(self, from: [u8; LANES]) -> Self::Vector {
        self.load(&from.map(|byte| f32::from(byte as i8)))
    }

    /// Floats of sixty-four bytes without sign, sixteen after sixteen.
    #[inline(always)]
    fn widen_bytes(self, bytes: Self::Vector) -> [Self::Vector; 4] {
        let words = self.words(bytes);
        let mut parts = [bytes; 4];
        for (part, words) in parts.iter_mut().zip(words.as_chunks::<4>().0) {
            let mut sixteen = [0; LANES];
            for (into, word) in sixteen.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                *into = word.to_le_bytes();
            }
            *part = self.widen_u8(sixteen);
        }
        parts
    }

    /// The float of a half.
    #[inline(always)]
    fn half(self, from: [u8; 2]) -> f32 {
        f16::from_le_bytes(from).to_f32()
    }

    /// Floats of halves.
    #[inline(always)]
    fn widen_f16(self, from: &[u8; 32]) -> Self::Vector {
        let halves = from.as_chunks::<2>().0;
        self.load(&std::array::from_fn(|lane| f16::from_le_bytes(halves[lane]).to_f32()))
    }

    /// Floats of bf16.
    #[inline(always)]
    fn widen_bf16(self, from: &[u8; 32]) -> Self::Vector {
        let halves = from.as_chunks::<2>().0;
        self.load(&std::array::from_fn(|lane| f32::from_bits(u32::from(u16::from_le_bytes(halves[lane])) << 16)))
    }

    /// Thirty-two floats as pairs of bf16, rounded to nearest, ties to even.
    #[inline(always)]
    fn narrow_bf16(self, low: Self::Vector, high: Self::Vector) -> Self::Vector {
        self.of_words(narrowed(self.words(low), self.words(high)))
    }

    /// The sum of each vector's lanes.
    #[inline(always)]
    fn fold_sums(self, vectors: [Self::Vector; LANES]) -> Self::Vector {
        let mut sums = [0.0; LANES];
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = self.fold_sum(vector);
        }
        self.load(&sums)
    }

    /// Word `i` of vector `j` as word `j` of vector `i`.
    #[inline(always)]
    fn transpose(self, rows: [Self::Vector; LANES]) -> [Self::Vector; LANES] {
        let mut turned = [[0; LANES]; LANES];
        for (j, row) in rows.into_iter().enumerate() {
            for (i, word) in self.words(row).into_iter().enumerate() {
                turned[i][j] = word;
            }
        }
        let mut columns = rows;
        for (column, words) in columns.iter_mut().zip(turned) {
            *column = self.of_words(words);
        }
        columns
    }

    /// Word `i` of row `j` as word `j` of vector `i`.
    #[inline(always)]
    fn transpose_4(self, rows: [&[u8; 16]; LANES]) -> [Self::Vector; 4] {
        std::array::from_fn(|i| {
            self.of_words(rows.map(|row| u32::from_le_bytes(*row[4 * i..].first_chunk().expect("four words"))))
        })
    }

    /// Says that the line at `at` will be read soon. Any address will do.
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}

impl Multiply for super::scalar::Scalar {
    const DOTS: bool = true;

    #[inline]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

/// Two words, eight times each.
const fn eights(first: u32, second: u32) -> [u32; LANES] {
    let mut lanes = [first; LANES];
    let mut lane = LANES / 2;
    while lane < LANES {
        lanes[lane] = second;
        lane += 1;
    }
    lanes
}

/// [`Multiply::dot_pairs`] in plain Rust.
#[inline(always)]
pub(super) fn pairs_dot(a: [u32; LANES], b: [u32; LANES], mut sum: [u32; LANES]) -> [u32; LANES] {
    for lane in 0..LANES {
        let [a0, b0] = [a, b].map(|words| f32::from_bits(words[lane] << 16));
        let [a1, b1] = [a, b].map(|words| f32::from_bits(words[lane] & 0xffff_0000));
        sum[lane] = (a0 * b0 + (a1 * b1 + f32::from_bits(sum[lane]))).to_bits();
    }
    sum
}

/// [`Multiply::dot_bytes`] in plain Rust.
#[inline(always)]
pub(super) fn bytes_dot(a: [u32; LANES], b: [u32; LANES], mut sum: [u32; LANES]) -> [u32; LANES] {
    for lane in 0..LANES {
        for (a, b) in a[lane].to_le_bytes().into_iter().zip(b[lane].to_le_bytes()) {
            sum[lane] = sum[lane].wrapping_add((i32::from(a) * i32::from(b as i8)) as u32);
        }
    }
    sum
}

/// [`Multiply::narrow_bf16`] in plain Rust.
#[inline(always)]
pub(super) fn narrowed(low: [u32; LANES], high: [u32; LANES]) -> [u32; LANES] {
    let narrow = |bits: u32| u32::from(bf16::from_f32(f32::from_bits(bits)).to_bits());
    std::array::from_fn(|lane| {
        let from = if lane < LANES / 2 { low } else { high };
        let at = 2 * lane % LANES;
        narrow(from[at]) | narrow(from[at + 1]) << 16
    })
}
