//! What products need of lanes: every instruction set against plain Rust, plain Rust against what the words say.

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::simd::dtype::HEAD;
use crate::simd::multiply::{LINE_BYTES, Line, Multiply};
use crate::simd::{Isa, Kernel, LANES};

type Words = [u32; LANES];

/// Operands of every operation.
#[derive(Clone)]
struct Operands {
    a: Words,
    b: Words,
    c: Words,
    /// Sixteen rows.
    rows: [Words; LANES],
    /// For both halves of each word.
    by: Words,
    /// A number of bytes that is none of alignment.
    memory: Vec<u8>,
    /// Thirty-two halves without NaN.
    halves: [u8; LINE_BYTES],
    floats: [[f32; LANES]; 2],
}

/// Operations whose bits are defined.
struct Exact<'a>(&'a Operands);

impl Kernel for Exact<'_> {
    type Output = Vec<(&'static str, Words)>;

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) -> Self::Output {
        let Operands { a, b, c, rows, by, memory, halves, floats } = self.0;
        let mut made = Vec::new();
        let [va, vb, vc] = [lanes.of_words(*a), lanes.of_words(*b), lanes.of_words(*c)];
        let bytes: &[u8; LINE_BYTES] = memory[1..].first_chunk().unwrap();
        let (low, high) = (memory[3..].first_chunk().unwrap(), memory[38..].first_chunk().unwrap());
        let sixteen: [u8; LANES] = *memory[5..].first_chunk().unwrap();
        let (first, second) = (halves.first_chunk().unwrap(), halves.last_chunk().unwrap());
        let mut stored = Line::default();
        lanes.store_line(va, &mut stored);
        made.push(("words of words", lanes.words(va)));
        made.push(("store_line", stored.0));
        made.push(("line", lanes.words(lanes.line(&Line(*a)))));
        made.push(("bytes", lanes.words(lanes.bytes(bytes))));
        made.push(("repeat", lanes.words(lanes.repeat(a[3]))));
        made.push(("dot_bytes", lanes.words(lanes.dot_bytes(va, vb, vc))));
        made.push(("floats", lanes.words(lanes.convert(va))));
        made.push(("and", lanes.words(lanes.and(va, vb))));
        made.push(("xor", lanes.words(lanes.xor(va, vb))));
        made.push(("shift_right", lanes.words(lanes.shift_right(va, lanes.line(&Line(*by))))));
        made.push(("shift_left_4", lanes.words(lanes.shift_left_4(va))));
        for by in [0, 7, 16, 31] {
            made.push(("shift_words", lanes.words(lanes.shift_words(va, by))));
        }
        for by in [0, 8, 24, 32] {
            made.push(("shift_words_left", lanes.words(lanes.shift_words_left(va, by))));
        }
        let nibbles = lanes.and(va, lanes.repeat(0x0f0f_0f0f));
        made.push(("lookup", lanes.words(lanes.lookup(&sixteen, nibbles))));
        for byte in 0..4 {
            made.push(("byte_floats", lanes.words(lanes.byte_floats(va, byte))));
        }
        made.push(("low_halves", lanes.words(lanes.low_halves(lanes.bytes(halves)))));
        let mut narrowed = [0; LANES];
        for (word, byte) in narrowed.iter_mut().zip(lanes.narrow_bytes(va)) {
            *word = u32::from(byte);
        }
        made.push(("narrow_bytes", narrowed));
        let mut quarters = [&[0; 16]; LANES];
        for (at, quarter) in quarters.iter_mut().enumerate() {
            *quarter = memory[3 * at..].first_chunk().unwrap();
        }
        for column in lanes.transpose_4(quarters) {
            made.push(("transpose_4", lanes.words(column)));
        }
        made.push(("halves", lanes.words(lanes.halves(low, high))));
        made.push(("eights", lanes.words(lanes.eights(floats[0][0], floats[0][1]))));
        made.push(("quads", lanes.words(lanes.quads(floats[0].first_chunk().unwrap()))));
        made.push(("nibbles", lanes.words(lanes.nibbles(low))));
        let second_sixteen: [u8; LANES] = *memory[22..].first_chunk().unwrap();
        made.push(("nibbles_of_two", lanes.words(lanes.nibbles_of_two(&sixteen, &second_sixteen))));
        for pair in 0..4 {
            made.push(("fives", lanes.words(lanes.fives(low, high, pair))));
        }
        for second in [false, true] {
            made.push(("sixes", lanes.words(lanes.sixes(bytes, high, second))));
        }
        let (sizes, plain) = (lanes.sizes(va), lanes.line(&Line(b.map(without_least))));
        made.push(("sizes", lanes.words(sizes)));
        made.push(("with_signs", lanes.words(lanes.with_signs(plain, va))));
        made.push(("dot_small", lanes.words(lanes.dot_small(sizes, plain))));
        let small = lanes.and(va, lanes.repeat(0x7f7f_7f7f));
        made.push(("small_products", lanes.words(lanes.small_products(small, vb))));
        made.push(("add_halves", lanes.words(lanes.add_halves(va, vb))));
        made.push(("fold_halves", lanes.words(lanes.fold_halves(va))));
        made.push(("add_words", lanes.words(lanes.add_words(va, vb))));
        made.push(("fours", lanes.words(lanes.fours(va, vb))));
        let [small, smaller] = [a, b].map(|words| words.map(|word| (word as i16 >> 1) as u32));
        made.push(("small_fours", lanes.words(lanes.small_fours(lanes.of_words(small), lanes.of_words(smaller)))));
        made.push(("eights_of_fours", lanes.words(lanes.eights_of_fours(lanes.fours(va, vb), lanes.fours(vb, vc)))));
        made.push(("in_order", lanes.words(lanes.in_order(lanes.fours(va, vb), lanes.fours(vb, vc)))));
        let mut head: [u8; HEAD] = *memory[9..].first_chunk().unwrap();
        head[..4].copy_from_slice(&halves[..4]);
        made.push(("scales_and_offsets", lanes.words(lanes.scales_and_offsets(&head))));
        made.push(("widen_u8", lanes.words(lanes.widen_u8(sixteen))));
        made.push(("widen_i8", lanes.words(lanes.widen_i8(sixteen))));
        for part in lanes.widen_bytes(lanes.bytes(bytes)) {
            made.push(("widen_bytes", lanes.words(part)));
        }
        let mut single = [0; LANES];
        for (single, half) in single.iter_mut().zip(first.as_chunks::<2>().0) {
            *single = lanes.half(*half).to_bits();
        }
        made.push(("half", single));
        made.push(("widen_f16", lanes.words(lanes.widen_f16(first))));
        made.push(("widen_f16", lanes.words(lanes.widen_f16(second))));
        made.push(("widen_bf16", lanes.words(lanes.widen_bf16(low))));
        made.push(("narrow_bf16", lanes.words(lanes.narrow_bf16(lanes.load(&floats[0]), lanes.load(&floats[1])))));
        let mut vectors = [va; LANES];
        for at in 0..LANES {
            vectors[at] = lanes.of_words(rows[at]);
        }
        for column in lanes.transpose(vectors) {
            made.push(("transpose", lanes.words(column)));
        }
        // Whatever the address, nothing happens.
        lanes.prefetch(std::ptr::null());
        made
    }
}

/// No byte of it is −128.
fn without_least(word: u32) -> u32 {
    u32::from_le_bytes(word.to_le_bytes().map(|byte| if byte == 0x80 { 0x81 } else { byte }))
}

/// A float with neither a small nor a NaN exponent; every eighth a tie of bf16.
fn ordinary(rng: &mut ChaCha8Rng) -> f32 {
    loop {
        let mut bits: u32 = rng.random();
        if bits.is_multiple_of(8) {
            bits = bits & 0xffff_0000 | 0x8000;
        }
        let float = f32::from_bits(bits);
        if float.is_normal() {
            return float;
        }
    }
}

fn operands(rng: &mut ChaCha8Rng) -> Operands {
    let mut halves = [0; LINE_BYTES];
    for half in halves.as_chunks_mut::<2>().0 {
        *half = rng.random();
        if f16::from_le_bytes(*half).is_nan() {
            *half = [0, 0x7c]; // infinity
        }
    }
    Operands {
        a: rng.random(),
        b: rng.random(),
        c: rng.random(),
        rows: std::array::from_fn(|_| rng.random()),
        by: std::array::from_fn(|_| rng.random_range(0u32..20) << 16 | rng.random_range(0u32..20)),
        memory: (0..80).map(|_| rng.random()).collect(),
        halves,
        floats: std::array::from_fn(|_| std::array::from_fn(|_| ordinary(rng))),
    }
}

#[test]
fn operations_on_words_are_the_same_bits_everywhere() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for round in 0..if cfg!(miri) { 1 } else { 2000 } {
        let operands = operands(&mut rng);
        let expected = Isa::scalar().run(Exact(&operands));
        for isa in Isa::all() {
            for ((name, got), (_, wanted)) in isa.run(Exact(&operands)).into_iter().zip(&expected) {
                assert_eq!(got, *wanted, "{name} on {isa}, round {round}");
            }
        }
    }
}

#[test]
fn plain_rust_does_what_the_words_say() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for _ in 0..if cfg!(miri) { 1 } else { 200 } {
        let operands = operands(&mut rng);
        let Operands { a, b, c, rows, by, memory, halves, floats, .. } = &operands;
        let made = Isa::scalar().run(Exact(&operands));
        let of = |name: &str| made.iter().filter(|made| made.0 == name).map(|made| made.1).collect::<Vec<_>>();
        let one = |name: &str| of(name)[0];
        assert_eq!(one("line"), *a);
        assert_eq!(one("store_line"), *a);
        assert_eq!(one("bytes")[1], u32::from_le_bytes([memory[5], memory[6], memory[7], memory[8]]));
        assert_eq!(one("halves")[8], u32::from_le_bytes([memory[38], memory[39], memory[40], memory[41]]));
        for lane in 0..LANES {
            let products = a[lane].to_le_bytes().into_iter().zip(b[lane].to_le_bytes());
            let sum: i64 = products.map(|(a, b)| i64::from(a) * i64::from(b as i8)).sum();
            assert_eq!(one("dot_bytes")[lane], (sum + i64::from(c[lane])) as u32);
            let upper = (u64::from(a[lane] >> 16) >> (by[lane] >> 16)) as u32;
            let lower = (u64::from(a[lane] & 0xffff) >> (by[lane] & 0xffff)) as u32;
            assert_eq!(one("shift_right")[lane], upper << 16 | lower);
            assert_eq!(one("shift_left_4")[lane], (a[lane] << 4) & 0xfff0_fff0);
            assert_eq!(one("floats")[lane], (a[lane] as i32 as f32).to_bits());
            for (byte, words) in of("byte_floats").into_iter().enumerate() {
                assert_eq!(words[lane], f32::from(a[lane].to_le_bytes()[byte]).to_bits());
            }
            assert_eq!(of("shift_words")[1][lane], a[lane] >> 7);
            for (by, words) in [0, 8, 24, 32].into_iter().zip(of("shift_words_left")) {
                assert_eq!(words[lane], (u64::from(a[lane]) << by) as u32);
            }
            let looked_up = a[lane].to_le_bytes().map(|byte| memory[5 + usize::from(byte & 15)]);
            assert_eq!(one("lookup")[lane].to_le_bytes(), looked_up);
            assert_eq!(one("narrow_bytes")[lane], a[lane] & 0xff);
            let half = f16::from_le_bytes([halves[4 * lane], halves[4 * lane + 1]]);
            assert_eq!(one("low_halves")[lane], half.to_f32().to_bits());
            for (at, words) in of("transpose_4").into_iter().enumerate() {
                let bytes = *memory[3 * lane + 4 * at..].first_chunk().unwrap();
                assert_eq!(words[lane], u32::from_le_bytes(bytes));
            }
            assert_eq!(one("widen_i8")[lane], f32::from(memory[5 + lane] as i8).to_bits());
            for (part, words) in of("widen_bytes").into_iter().enumerate() {
                assert_eq!(words[lane], f32::from(memory[1 + LANES * part + lane]).to_bits());
            }
            assert!(of("transpose")[lane].iter().eq(rows.iter().map(|row| &row[lane])));
            let bits = |float: f32| u32::from(bf16::from_f32(float).to_bits());
            let from = &floats[lane / 8];
            let at = 2 * lane % LANES;
            assert_eq!(one("narrow_bf16")[lane], bits(from[at]) | bits(from[at + 1]) << 16);
        }
    }
}

/// Operations that round as the instruction set does: products into sums, of floats and of pairs, and folds.
struct Rounded<'a>(&'a [[f32; LANES]; 3], &'a [[u32; LANES]; 2], &'a [[f32; LANES]; LANES]);

impl Kernel for Rounded<'_> {
    type Output = [[f32; LANES]; 3];

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) -> Self::Output {
        let Self(floats, pairs, rows) = self;
        let [a, b, c] = [lanes.load(&floats[0]), lanes.load(&floats[1]), lanes.load(&floats[2])];
        let mut vectors = [a; LANES];
        for at in 0..LANES {
            vectors[at] = lanes.load(&rows[at]);
        }
        let made = [
            lanes.mul_add(a, b, c),
            lanes.dot_pairs(lanes.of_words(pairs[0]), lanes.of_words(pairs[1]), c),
            lanes.fold_sums(vectors),
        ];
        let mut out = [[0.0; LANES]; 3];
        for (out, made) in out.iter_mut().zip(made) {
            lanes.store(made, out);
        }
        out
    }
}

#[test]
fn sums_are_those_of_double_precision_but_for_rounding() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..if cfg!(miri) { 1 } else { 2000 } {
        let mut floats = || std::array::from_fn::<f32, LANES, _>(|_| rng.random_range(-2.0f32..2.0));
        let (three, rows) = ([floats(), floats(), floats()], std::array::from_fn(|_| floats()));
        let pairs: [[[bf16; 2]; LANES]; 2] =
            std::array::from_fn(|_| std::array::from_fn(|lane| [floats()[lane], floats()[lane]].map(bf16::from_f32)));
        let words = pairs.map(|pairs| pairs.map(|[a, b]| u32::from(a.to_bits()) | u32::from(b.to_bits()) << 16));
        for isa in Isa::all() {
            let [added, dots, folded] = isa.run(Rounded(&three, &words, &rows));
            for lane in 0..LANES {
                let [a, b, c] = three.map(|floats| f64::from(floats[lane]));
                assert!((f64::from(added[lane]) - (a * b + c)).abs() < 6e-7, "mul_add on {isa}");
                let product = |at: usize| pairs[0][lane][at].to_f64() * pairs[1][lane][at].to_f64();
                let wanted = product(0) + product(1) + c;
                assert!((f64::from(dots[lane]) - wanted).abs() < 2e-6, "dot_pairs on {isa}");
                let wanted: f64 = rows[lane].iter().copied().map(f64::from).sum();
                assert!((f64::from(folded[lane]) - wanted).abs() < 1e-5, "fold_sums on {isa}");
            }
        }
    }
}

struct Narrow([f32; LANES]);

impl Kernel for Narrow {
    type Output = [u32; LANES];

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) -> Self::Output {
        lanes.words(lanes.narrow_bf16(lanes.load(&self.0), lanes.load(&self.0)))
    }
}

#[test]
fn bf16_of_special_floats() {
    let infinity = f32::INFINITY;
    // A tie to the even one below, one to the even one above, the largest that is not infinite, and what rounds past it.
    let [down, up] = [f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000)];
    let [most, past] = [f32::from_bits(0x7f7f_7fff), f32::MAX];
    let denormal = f32::from_bits(0x0010_0000);
    let mut floats = [0.0f32; LANES];
    floats[..11].copy_from_slice(&[
        0.0,
        -0.0,
        infinity,
        -infinity,
        down,
        up,
        most,
        past,
        f32::NAN,
        denormal,
        -denormal,
    ]);
    for isa in Isa::all() {
        let words = isa.run(Narrow(floats));
        let got = |at: usize| words[at / 2] >> (16 * (at % 2)) & 0xffff;
        let wanted = [0, 0x8000, 0x7f80, 0xff80, 0x3f80, 0x3f82, 0x7f7f, 0x7f80];
        for (at, wanted) in wanted.into_iter().enumerate() {
            assert_eq!(got(at), wanted, "{} on {isa}", floats[at]);
        }
        assert!(bf16::from_bits(got(8) as u16).is_nan(), "{isa}");
        // The instruction takes denormals for zeros.
        let kept = if isa.has_dots() { 0 } else { 0x0010 };
        assert_eq!([got(9), got(10)], [kept, 0x8000 | kept], "{isa}");
        assert_eq!(words[..8], words[8..], "both halves on {isa}");
    }
}
