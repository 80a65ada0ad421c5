//! Products of weights in every dtype with activations in every form, on every instruction set, against double precision.
//!
//! `--nocapture` shows the largest errors.

use std::collections::BTreeMap;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::naive;
use crate::simd::dtype::Dtype;
use crate::simd::multiply::{Line, Multiply};
use crate::simd::product::{BLOCK, CHUNK, Convert, Form, Product, Rows, Workspace};
use crate::simd::{Isa, Kernel, quantized};

/// Rows of activations; products take some of them, in another order and some twice.
const ROWS: usize = if cfg!(miri) { 2 } else { 23 };
/// What memory holds before a kernel writes it: NaN in every form.
const DIRT: u32 = 0xffff_ffff;
const GUARD: usize = 64;

/// A block of weight rows and rows of activations, in numbers and as stored.
struct Case {
    dtype: Dtype,
    columns: usize,
    /// From the second byte on, so that they start at an odd address.
    bytes: Vec<u8>,
    weights: Vec<Vec<f64>>,
    input: Vec<Vec<f32>>,
}

impl Case {
    fn new(rng: &mut ChaCha8Rng, dtype: Dtype, columns: usize) -> Self {
        let stored = naive::drawn(rng, dtype.name(), BLOCK * columns, 1.0);
        let weights = naive::decoded(dtype.name(), &stored).chunks(columns).map(<[f64]>::to_vec).collect();
        let value = |rng: &mut ChaCha8Rng| rng.random_range(-1.7f32..1.7);
        let input = (0..ROWS).map(|_| (0..columns).map(|_| value(rng)).collect()).collect();
        Self { dtype, columns, bytes: [&[0][..], &stored].concat(), weights, input }
    }

    /// The rows of activations in a form, in segments.
    fn filled(&self, isa: Isa, form: Form, segment: usize) -> Vec<Line> {
        let stride = form.stride(segment.min(self.columns));
        let mut lines = vec![Line([DIRT; 16]); self.columns.div_ceil(segment) * ROWS * stride];
        for (at, lines) in lines.chunks_exact_mut(stride).enumerate() {
            let columns = at / ROWS * segment..self.columns.min((at / ROWS + 1) * segment);
            isa.run(Convert { form, values: &self.input[at % ROWS][columns], row: lines });
        }
        lines
    }

    /// The products of a kernel; says so if it writes past its sums.
    fn products(&self, isa: Isa, input: Rows<'_>, tokens: &[u32], workspace: &mut Workspace) -> Vec<f32> {
        let size = self.dtype.row_bytes(self.columns).unwrap();
        let row = |at: usize| &self.bytes[1 + at * size..][..size];
        let mut sums = vec![f32::NAN; tokens.len() * BLOCK + GUARD];
        sums[tokens.len() * BLOCK..].fill(7.0);
        isa.run(Product {
            dtype: self.dtype,
            weights: std::array::from_fn(row),
            ahead: [row(0), row(BLOCK / 2)],
            input,
            tokens,
            sums: &mut sums[..tokens.len() * BLOCK],
            workspace,
        });
        assert!(sums[tokens.len() * BLOCK..].iter().all(|&guard| guard == 7.0), "past the sums");
        sums.truncate(tokens.len() * BLOCK);
        sums
    }
}

/// What a form makes of a row of activations.
fn rounded(form: Form, row: &[f32]) -> Vec<f64> {
    match form {
        Form::Floats => row.iter().copied().map(f64::from).collect(),
        Form::Pairs => row.iter().map(|&x| bf16::from_f32(x).to_f64()).collect(),
        Form::Bytes => row.chunks(32).flat_map(rounded_to_bytes).collect(),
    }
}

fn rounded_to_bytes(group: &[f32]) -> Vec<f64> {
    let largest = group.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let (scale, inverse) = (largest / 127.0, 127.0 / largest);
    group.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(scale)).collect()
}

/// What a product of one weight row and one row of activations should be, and what to measure errors by.
#[derive(Clone, Copy, Default)]
struct Wanted {
    /// Of the activations as they are.
    exact: f64,
    /// Of activations, and of weights that meet pairs, rounded as the form has them.
    rounded: f64,
    /// The sum of the products' sizes.
    sizes: f64,
    /// The weights' norm times that of the activations.
    norms: f64,
}

fn wanted(case: &Case, form: Form) -> Vec<[Wanted; BLOCK]> {
    let weights: Vec<Vec<f64>> = match form {
        Form::Pairs => {
            let round = |w: &f64| bf16::from_f32(*w as f32).to_f64();
            case.weights.iter().map(|row| row.iter().map(round).collect()).collect()
        }
        _ => case.weights.clone(),
    };
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let of_row = |exact: &Vec<f32>| {
        let made = rounded(form, exact);
        let exact: Vec<f64> = exact.iter().copied().map(f64::from).collect();
        std::array::from_fn(|r| {
            let mut wanted = Wanted { norms: norm(&exact) * norm(&case.weights[r]), ..Wanted::default() };
            for k in 0..case.columns {
                let size = (case.weights[r][k] * exact[k]).abs();
                wanted.exact += case.weights[r][k] * exact[k];
                wanted.rounded += weights[r][k] * made[k];
                wanted.sizes += size;
            }
            wanted
        })
    };
    case.input.iter().map(of_row).collect()
}

/// The forms of activations that a dtype meets.
fn forms_of(dtype: Dtype) -> &'static [Form] {
    match dtype {
        Dtype::F32 | Dtype::F16 => &[Form::Floats],
        Dtype::Bf16 => &[Form::Floats, Form::Pairs],
        Dtype::Q8_0 | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K | Dtype::Mxfp4 => &[Form::Floats, Form::Bytes],
    }
}

/// Whether a set has products of this form.
fn meets(isa: Isa, form: Form) -> bool {
    form != Form::Bytes || isa.run(MeetsBytes)
}

struct MeetsBytes;

impl Kernel for MeetsBytes {
    type Output = bool;

    fn run<L: Multiply>(self, _lanes: L) -> bool {
        L::DOTS || L::ALONG
    }
}

fn columns_of(dtype: Dtype) -> &'static [usize] {
    match dtype {
        Dtype::Q8_0 | Dtype::Mxfp4 => &[32, 64, 96, 256, 288, 544, 1024, 2080, 4512],
        Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => &[256, 512, 768, 2048, 2304, 4608],
        _ => &[1, 2, 7, 16, 17, 31, 33, 64, 255, 256, 257, 300, 512, 513, 1025, 2047, 2049, 4097, 4500],
    }
}

/// All numbers of tokens, or those around which kernels change.
fn tokens_of(columns: usize) -> Vec<usize> {
    match columns {
        0..=300 => (0..=40).collect(),
        _ => vec![1, 2, 3, 5, 6, 7, 11, 12, 13, 16, 17, 25, 32, 33, 37],
    }
}

/// The largest of what was seen, by name.
type Seen = BTreeMap<String, f64>;

fn see(seen: &mut Seen, name: String, error: f64, limit: f64, about: impl Fn() -> String) {
    assert!(error <= limit, "{name} of {error:.2e}: {}", about());
    let most = seen.entry(name).or_default();
    *most = most.max(error);
}

fn check_dtype(dtype: Dtype) {
    let mut rng = ChaCha8Rng::seed_from_u64(dtype as u64);
    let mut seen = Seen::new();
    let mut workspace = Workspace::default();
    for &columns in columns_of(dtype) {
        let case = Case::new(&mut rng, dtype, columns);
        for &form in forms_of(dtype) {
            let wanted = wanted(&case, form);
            for count in tokens_of(columns) {
                let tokens: Vec<u32> = (0..count).map(|t| ((7 * t + 3) % ROWS) as u32).collect();
                // In turn, so that all meet.
                let segment = if count % 2 == 0 { CHUNK } else { columns.next_multiple_of(CHUNK) };
                let mut twin: Option<Vec<f32>> = None;
                for isa in Isa::all().filter(|&isa| meets(isa, form)) {
                    let lines = case.filled(isa, form, segment);
                    let rows = match count % 2 == 0 {
                        true => Rows::segmented(&lines, form, columns, CHUNK, ROWS),
                        false => Rows::whole(&lines, form, columns, ROWS),
                    };
                    let got = case.products(isa, rows, &tokens, &mut workspace);
                    let about = |at: usize| {
                        format!("{columns} columns, token {} of {count}, row {}, {isa}", at / BLOCK, at % BLOCK)
                    };
                    for (at, &sum) in got.iter().enumerate() {
                        let Wanted { exact, rounded, sizes, norms } = wanted[tokens[at / BLOCK] as usize][at % BLOCK];
                        let sum = f64::from(sum);
                        let error = (sum - rounded).abs() / sizes;
                        see(&mut seen, format!("{form:?}: arithmetic"), error, 1e-5, || about(at));
                        let limit = match form {
                            Form::Floats => 1e-5,
                            Form::Pairs => 1e-2,
                            Form::Bytes => 2e-2,
                        };
                        let error = (sum - exact).abs();
                        see(&mut seen, format!("{form:?}: to exact, of norms"), error / norms, limit, || about(at));
                        if let Some(twin) = &twin {
                            let limit = if form == Form::Floats { 1e-5 } else { 1e-4 };
                            let error = (sum - f64::from(twin[at])).abs() / sizes;
                            see(&mut seen, format!("{form:?}: to plain Rust"), error, limit, || about(at));
                        }
                    }
                    twin.get_or_insert(got);
                }
            }
        }
    }
    for (name, error) in seen {
        println!("{dtype:5} {name:32} {error:.1e}");
    }
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_f32() {
    check_dtype(Dtype::F32);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_f16() {
    check_dtype(Dtype::F16);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_bf16() {
    check_dtype(Dtype::Bf16);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_q8_0() {
    check_dtype(Dtype::Q8_0);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_q4_k() {
    check_dtype(Dtype::Q4K);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_q5_k() {
    check_dtype(Dtype::Q5K);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_q6_k() {
    check_dtype(Dtype::Q6K);
}

#[cfg_attr(miri, ignore = "hours")]
#[test]
fn products_of_mxfp4() {
    check_dtype(Dtype::Mxfp4);
}

/// Kernels once, over as little as there is: what Miri has the patience for.
fn check_memory(dtype: Dtype, form: Form, columns: usize, count: usize) {
    let case = Case::new(&mut ChaCha8Rng::seed_from_u64(11), dtype, columns);
    let (wanted, tokens) = (wanted(&case, form), (0..count).map(|t| (t % ROWS) as u32).collect::<Vec<_>>());
    for isa in Isa::all().filter(|&isa| meets(isa, form)) {
        let lines = case.filled(isa, form, columns.next_multiple_of(CHUNK));
        let rows = Rows::whole(&lines, form, columns, ROWS);
        let sums = case.products(isa, rows, &tokens, &mut Workspace::default());
        for (sums, &token) in sums.chunks(BLOCK).zip(&tokens) {
            for (&sum, wanted) in sums.iter().zip(&wanted[token as usize]) {
                let error = (f64::from(sum) - wanted.rounded).abs();
                assert!(error <= 1e-5 * wanted.sizes, "{dtype} {form:?} {columns} {count} on {isa}: {error}");
            }
        }
    }
}

#[test]
fn tiles_read_and_write_what_they_may() {
    check_memory(Dtype::F32, Form::Floats, 17, 1);
    check_memory(Dtype::F16, Form::Floats, 17, 1);
    check_memory(Dtype::Bf16, Form::Pairs, 33, 1);
    check_memory(Dtype::Q8_0, Form::Floats, 32, 1);
}

#[test]
fn panels_read_and_write_what_they_may() {
    check_memory(Dtype::F32, Form::Floats, 2, 33);
    check_memory(Dtype::Bf16, Form::Pairs, 2, 33);
}

#[test]
fn bytes_of_q8_0_read_and_write_what_they_may() {
    check_memory(Dtype::Q8_0, Form::Bytes, 32, 2); // a row that ends within a chunk
}

#[test]
fn bytes_of_mxfp4_read_and_write_what_they_may() {
    check_memory(Dtype::Mxfp4, Form::Bytes, 32, 1);
}

#[test]
fn bytes_of_q4_k_read_and_write_what_they_may() {
    check_memory(Dtype::Q4K, Form::Bytes, 256, 1);
}

#[test]
fn bytes_of_q5_k_read_and_write_what_they_may() {
    check_memory(Dtype::Q5K, Form::Bytes, 256, 1);
}

#[test]
fn bytes_of_q6_k_read_and_write_what_they_may() {
    check_memory(Dtype::Q6K, Form::Bytes, 256, 1);
}

#[test]
fn rows_without_columns_have_sums_of_zero() {
    for isa in Isa::all() {
        for (dtype, form) in [(Dtype::F32, Form::Floats), (Dtype::Bf16, Form::Pairs), (Dtype::Q8_0, Form::Bytes)] {
            let case = Case { dtype, columns: 0, bytes: vec![0], weights: Vec::new(), input: vec![Vec::new(); ROWS] };
            let rows = Rows::segmented(&[], form, 0, CHUNK, ROWS);
            if !meets(isa, form) {
                continue;
            }
            for count in [0, 1, 3, 12, 40] {
                let sums = case.products(isa, rows, &vec![0; count], &mut Workspace::default());
                assert_eq!(sums, vec![0.0; count * BLOCK], "{dtype} {form:?} {count} {isa}");
            }
        }
    }
}

#[cfg_attr(miri, ignore = "minutes, and no memory access that the products do not have")]
#[test]
fn what_is_no_number_stays_with_its_row_in_every_form() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for (dtype, columns) in [
        (Dtype::F32, 77),
        (Dtype::Bf16, 300),
        (Dtype::Q8_0, 96),
        (Dtype::Q4K, 512),
        (Dtype::Q5K, 256),
        (Dtype::Q6K, 256),
        (Dtype::Mxfp4, 96),
    ] {
        for &form in forms_of(dtype) {
            for column in (0..columns).step_by(5) {
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                    let mut case = Case::new(&mut rng, dtype, columns);
                    case.input[1][column] = bad;
                    for isa in Isa::all().filter(|&isa| meets(isa, form)) {
                        let lines = case.filled(isa, form, columns.next_multiple_of(CHUNK));
                        let rows = Rows::whole(&lines, form, columns, ROWS);
                        for count in [2, 7, 14, 40] {
                            let tokens: Vec<u32> = (0..count).map(|t| t % 3).collect();
                            let sums = case.products(isa, rows, &tokens, &mut Workspace::default());
                            for (sums, &token) in sums.chunks(BLOCK).zip(&tokens) {
                                let is_right = |sum: &f32| match token == 1 {
                                    true if bad.is_nan() => sum.is_nan(),
                                    true => !sum.is_finite(),
                                    false => sum.is_finite(),
                                };
                                let right = sums.iter().all(is_right);
                                assert!(right, "{bad} in column {column}, token {token}: {dtype} {form:?} {isa}");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Weights of a row from a column on.
struct Decode<'a> {
    dtype: Dtype,
    row: &'a [u8],
    first: usize,
    values: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Multiply>(self, lanes: L) {
        quantized::decode(lanes, self.dtype, self.row, self.first, self.values);
    }
}

#[cfg_attr(miri, ignore = "minutes")]
#[test]
fn weights_decode_to_the_numbers_that_they_stand_for() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for dtype in Dtype::ALL {
        let columns = if dtype.is_quantized() { 1536 } else { 1501 };
        let mut least_and_most = (f64::MAX, f64::MIN);
        for _ in 0..40 {
            let stored = [&[0][..], &naive::drawn(&mut rng, dtype.name(), columns, 1.0)].concat();
            let row = &stored[1..];
            let wanted = naive::decoded(dtype.name(), row);
            for isa in Isa::all() {
                for first in [0, CHUNK, 5 * CHUNK] {
                    for count in [CHUNK, columns - first] {
                        if count > columns - first {
                            continue;
                        }
                        let mut values = vec![f32::NAN; count];
                        isa.run(Decode { dtype, row, first, values: &mut values });
                        for (at, (&got, &wanted)) in values.iter().zip(&wanted[first..]).enumerate() {
                            let got = f64::from(got);
                            // `q4_K` and `q5_K` are differences, whose operands are at most so large; all others are rounded once or never.
                            let limit =
                                if matches!(dtype, Dtype::Q4K | Dtype::Q5K) { 2e-6 } else { wanted.abs() * 1.2e-7 };
                            assert!((got - wanted).abs() <= limit, "{dtype} {at} on {isa}: {got}, not {wanted}");
                        }
                    }
                }
            }
            for &value in &wanted {
                least_and_most = (least_and_most.0.min(value), least_and_most.1.max(value));
            }
        }
        assert!(least_and_most.0 < -1.5 && least_and_most.1 > 1.5, "{dtype} {least_and_most:?}");
    }
}

#[test]
fn the_least_scales_of_mxfp4_are_exact_and_the_last_is_no_number() {
    for isa in Isa::all() {
        for exponent in [0u8, 1, 2, 127, 252, 255] {
            let mut row = [exponent; 17];
            row[1..].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|at| (at + 16 * (15 - at)) as u8));
            let (wanted, mut values) = (naive::decoded("mxfp4", &row), [0.0; 32]);
            isa.run(Decode { dtype: Dtype::Mxfp4, row: &row, first: 0, values: &mut values });
            for (got, wanted) in values.into_iter().zip(wanted) {
                match exponent {
                    255 => assert!(got.is_nan(), "{got} on {isa}"),
                    _ => assert_eq!(f64::from(got), wanted, "exponent {exponent} on {isa}"),
                }
            }
        }
    }
}

#[test]
fn bytes_are_the_same_on_every_instruction_set() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for round in 0..if cfg!(miri) { 2 } else { 500 } {
        let count = rng.random_range(1..=CHUNK);
        let size = 10f32.powi(rng.random_range(-44..38));
        let mut values: Vec<f32> = (0..count).map(|_| size * rng.random_range(-1.0f32..1.0)).collect();
        if round % 3 == 0 {
            values[count / 2..].fill(0.0);
        }
        let filled = |isa: Isa| {
            let mut lines = vec![Line([DIRT; 16]); Form::Bytes.lines(count)];
            isa.run(Convert { form: Form::Bytes, values: &values, row: &mut lines });
            lines
        };
        let expected = filled(Isa::scalar());
        for isa in Isa::all() {
            assert_eq!(filled(isa), expected, "{isa}, {count} values of {size}");
        }
        // Each value is within half a step of its byte, and the sums are those of the bytes.
        for (group, Line(words)) in expected.iter().enumerate() {
            let bytes: Vec<i32> =
                words[7..15].iter().flat_map(|word| word.to_le_bytes()).map(|byte| i32::from(byte as i8)).collect();
            let (scale, total) = (f32::from_bits(words[0]), bytes.iter().sum::<i32>());
            assert_eq!(words[1], (scale * total as f32).to_bits());
            let sums = [-128 * total, -32 * bytes[..16].iter().sum::<i32>(), -32 * bytes[16..].iter().sum::<i32>()];
            assert_eq!(words[2..5], sums.map(|sum| sum as u32));
            assert_eq!([words[5], words[6], words[15]], [0; 3]);
            for (at, &byte) in bytes.iter().enumerate() {
                let value = values.get(32 * group + at).copied().unwrap_or(0.0);
                let error = (f64::from(value) - f64::from(byte) * f64::from(scale)).abs();
                assert!(error <= 0.5001 * f64::from(scale).max(254.0 * 1.2e-38), "{value} as {byte} · {scale}");
            }
        }
    }
}
