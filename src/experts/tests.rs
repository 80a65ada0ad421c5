//! The expert engine against a naive block in double precision: every dtype on every instruction set, odd sizes, any work.
//!
//! `--nocapture` shows the largest errors.

use std::collections::BTreeMap;

use crate::experts::{Function, ProjectionWeights};
use crate::simd::Isa;
use crate::simd::tests::naive;
use crate::{Activation, Dtype, Engine, Error, ExpertWeights, Matrix, Work};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// An expert's weights as stored and as numbers.
struct Stored {
    activation: Activation,
    hidden: usize,
    width: usize,
    dtypes: [Dtype; 2],
    gate_dtype: Dtype,
    gate: Vec<u8>,
    up: Vec<u8>,
    down: Vec<u8>,
    /// Of gate, up and down projection; none where empty.
    biases: [Vec<f32>; 3],
}

impl Stored {
    fn new(rng: &mut ChaCha8Rng, activation: Activation, [hidden, width]: [usize; 2], dtypes: [Dtype; 2]) -> Self {
        let mut drawn = |dtype: Dtype, columns: usize| {
            naive::drawn(rng, dtype.name(), hidden * width, (columns.max(1) as f32).powf(-0.5))
        };
        let (gate, up, down) = (drawn(dtypes[0], hidden), drawn(dtypes[0], hidden), drawn(dtypes[1], width));
        let gate_dtype = dtypes[0];
        Self { activation, hidden, width, dtypes, gate_dtype, gate, up, down, biases: Default::default() }
    }

    /// The same with a gate of another dtype.
    fn with_gate(mut self, rng: &mut ChaCha8Rng, dtype: Dtype) -> Self {
        self.gate = naive::drawn(rng, dtype.name(), self.hidden * self.width, (self.hidden as f32).powf(-0.5));
        self.gate_dtype = dtype;
        self
    }

    fn with_biases(mut self, rng: &mut ChaCha8Rng) -> Self {
        self.biases = [self.width, self.width, self.hidden]
            .map(|count| (0..count).map(|_| rng.random_range(-0.5f32..0.5)).collect());
        self
    }

    fn bias(&self, at: usize) -> Option<&[f32]> {
        Some(&self.biases[at][..]).filter(|bias| !bias.is_empty())
    }

    fn weights(&self) -> ExpertWeights<'_> {
        let first = |bytes| Matrix::new(self.dtypes[0], self.width, self.hidden, bytes).unwrap();
        let down = Matrix::new(self.dtypes[1], self.hidden, self.width, &self.down).unwrap();
        let gate = Matrix::new(self.gate_dtype, self.width, self.hidden, &self.gate).unwrap();
        let gate = ProjectionWeights { weight: gate, bias: self.bias(0) };
        let up = ProjectionWeights { weight: first(&self.up), bias: self.bias(1) };
        let down = ProjectionWeights { weight: down, bias: self.bias(2) };
        ExpertWeights::new(self.activation, self.activation.gated.then_some(gate), up, down).unwrap()
    }

    /// By the definition.
    fn naive(&self, x: &[f32]) -> Vec<f64> {
        let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
        let [gate, up, down] = [&self.gate, &self.up, &self.down];
        let gate = project(&naive::decoded(self.gate_dtype.name(), gate), &x, self.width, &self.biases[0]);
        let up = project(&naive::decoded(self.dtypes[0].name(), up), &x, self.width, &self.biases[1]);
        let between: Vec<f64> =
            gate.into_iter().zip(up).map(|(gate, up)| naive_activation(self.activation, gate, up)).collect();
        project(&naive::decoded(self.dtypes[1].name(), down), &between, self.hidden, &self.biases[2])
    }
}

fn project(weight: &[f64], x: &[f64], rows: usize, bias: &[f32]) -> Vec<f64> {
    let bias = |row: usize| bias.get(row).copied().map_or(0.0, f64::from);
    let sum = |row: usize| weight[row * x.len()..][..x.len()].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    (0..rows).map(|row| sum(row) + bias(row)).collect()
}

/// What stands between the projections, by the published formulas.
pub(crate) fn naive_activation(activation: Activation, gate: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let act = |x: f64| match activation.function {
        Function::Silu => x * sigmoid(x),
        Function::Gelu => x * 0.5 * (1.0 + libm::erf(x / 2f64.sqrt())),
        Function::GeluTanh => {
            x * 0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Function::ReluSquared => x.max(0.0).powi(2),
        Function::ClampedSilu { alpha, limit } => {
            let x = x.min(f64::from(limit));
            x * sigmoid(f64::from(alpha) * x)
        }
    };
    match activation.function {
        Function::ClampedSilu { limit, .. } => act(gate) * (up.clamp(-f64::from(limit), f64::from(limit)) + 1.0),
        _ if activation.gated => act(gate) * up,
        _ => act(up),
    }
}

/// Every function with a gate, and without one where it may be. The limit is low, so that it cuts often.
fn kinds() -> Vec<Activation> {
    let functions = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::ReluSquared];
    let plain = functions.into_iter().flat_map(|function| [true, false].map(|gated| Activation { function, gated }));
    plain.chain([Activation::clamped_swiglu(1.702, 0.6)]).collect()
}

/// Tokens and their weights, for each expert.
type Lists = Vec<(Vec<u32>, Vec<f32>)>;

fn work<'a>(experts: &'a [Stored], lists: &'a Lists) -> Vec<Work<'a>> {
    let all = experts.iter().zip(lists);
    all.map(|(expert, (tokens, weights))| Work { expert: expert.weights(), tokens, weights }).collect()
}

fn naive_block(experts: &[Stored], lists: &Lists, input: &[f32], hidden: usize) -> Vec<f64> {
    let mut output = vec![0.0; input.len()];
    for (expert, (tokens, weights)) in experts.iter().zip(lists) {
        for (&token, &weight) in tokens.iter().zip(weights) {
            let at = token as usize * hidden;
            let made = expert.naive(&input[at..at + hidden]);
            output[at..at + hidden].iter_mut().zip(made).for_each(|(sum, made)| *sum += f64::from(weight) * made);
        }
    }
    output
}

fn drawn_input(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.7f32..1.7)).collect()
}

fn run(engine: &Engine, input: &[f32], hidden: usize, work: &[Work<'_>]) -> Vec<f32> {
    let rows = input.len() / hidden;
    let mut output = vec![f32::NAN; input.len()];
    engine.forward(Matrix::from_f32(rows, hidden, input).unwrap(), work, &mut output).unwrap();
    output
}

/// The root of the mean square of differences, over that of what is wanted.
fn distance(got: &[f32], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let difference: f64 = got.iter().zip(wanted).map(|(&got, wanted)| (f64::from(got) - wanted).powi(2)).sum();
    let size: f64 = wanted.iter().map(|wanted| wanted * wanted).sum();
    assert!(size > 0.0 || difference > 0.0 || wanted.is_empty(), "nothing to compare");
    if wanted.is_empty() { 0.0 } else { (difference / size).sqrt() }
}

/// How far from double precision an engine may be: as far as its activations are rounded.
fn limit(isa: Isa, dtypes: [Dtype; 2]) -> f64 {
    let of = |dtype: Dtype| -> f64 {
        match dtype {
            Dtype::F32 | Dtype::F16 => 2e-6,
            Dtype::Bf16 if isa.has_dots() => 6e-3,
            _ if dtype.is_quantized() && isa.has_bytes() => 1.5e-2,
            _ => 2e-6,
        }
    };
    of(dtypes[0]).max(of(dtypes[1]))
}

fn sizes(dtypes: [Dtype; 2]) -> &'static [[usize; 2]] {
    match dtypes.map(Dtype::block).into_iter().max().unwrap() {
        1 => &[[1, 1], [7, 5], [33, 300], [300, 17], [100, 513]],
        32 => &[[32, 32], [96, 64], [288, 320]],
        _ => &[[256, 256], [512, 768]],
    }
}

/// For four experts: no token, all tokens, some in falling order, one of them three times.
fn lists_of(rng: &mut ChaCha8Rng, tokens: u32) -> Lists {
    let named = [Vec::new(), (0..tokens).collect(), (0..tokens).rev().step_by(3).collect(), vec![tokens / 2; 3]];
    named.map(|tokens| (tokens.clone(), tokens.iter().map(|_| rng.random_range(-1f32..1.0)).collect())).to_vec()
}

fn pairs_of_dtypes() -> Vec<[Dtype; 2]> {
    let mixed =
        [[Dtype::Q4K, Dtype::Q6K], [Dtype::Bf16, Dtype::F32], [Dtype::F16, Dtype::Q8_0], [Dtype::Q8_0, Dtype::Bf16]];
    Dtype::ALL.into_iter().map(|dtype| [dtype; 2]).chain(mixed).collect()
}

#[test]
fn every_dtype_on_every_instruction_set_is_the_naive_block() {
    let mut seen: BTreeMap<String, f64> = BTreeMap::new();
    for (seed, dtypes) in pairs_of_dtypes().into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        for &[hidden, width] in sizes(dtypes) {
            for tokens in [1u32, 3, 5, 11, 29, 40] {
                let kinds = [Activation::swiglu(), Activation { function: Function::Silu, gated: false }];
                let kind = |at: u32| kinds[(at + tokens) as usize % 2];
                let mut experts: Vec<Stored> =
                    (0..4).map(|at| Stored::new(&mut rng, kind(at), [hidden, width], dtypes)).collect();
                if tokens % 2 == 1 {
                    experts = experts.into_iter().map(|expert| expert.with_biases(&mut rng)).collect();
                }
                let lists = lists_of(&mut rng, tokens);
                let input = drawn_input(&mut rng, tokens as usize * hidden);
                let wanted = naive_block(&experts, &lists, &input, hidden);
                for isa in Isa::all() {
                    let got = run(&Engine::on(isa), &input, hidden, &work(&experts, &lists));
                    let error = distance(&got, &wanted);
                    // One product alone has no others for its rounding to even out with.
                    let limit = if hidden == 1 { 3.0 } else { 1.0 } * limit(isa, dtypes);
                    assert!(error <= limit, "{dtypes:?} {hidden} {width} {tokens} on {isa}: {error:.2e}");
                    let most = seen.entry(format!("{}+{} {isa}", dtypes[0], dtypes[1])).or_default();
                    *most = most.max(error);
                }
            }
        }
    }
    seen.iter().for_each(|(name, error)| println!("{name:32} {error:.1e}"));
}

#[test]
fn gate_and_up_projection_may_be_of_two_dtypes() {
    for gate in Dtype::ALL {
        for up in Dtype::ALL.into_iter().filter(|&up| up != gate) {
            let mut rng = ChaCha8Rng::seed_from_u64(17);
            // Widths that no block divides, where the down projection lets them.
            let hidden = if gate.is_quantized() || up.is_quantized() { 256 } else { 37 };
            for (width, tokens) in [(16, 1u32), (45, 3), (300, 19), (33, 70)] {
                let dtypes = [up, Dtype::F32];
                let expert = |rng: &mut ChaCha8Rng| {
                    Stored::new(rng, Activation::swiglu(), [hidden, width], dtypes).with_gate(rng, gate)
                };
                let mut experts: Vec<Stored> = (0..4).map(|_| expert(&mut rng)).collect();
                if tokens == 3 {
                    experts = experts.into_iter().map(|expert| expert.with_biases(&mut rng)).collect();
                }
                let lists = lists_of(&mut rng, tokens);
                let input = drawn_input(&mut rng, tokens as usize * hidden);
                let wanted = naive_block(&experts, &lists, &input, hidden);
                for isa in Isa::all() {
                    let got = run(&Engine::on(isa), &input, hidden, &work(&experts, &lists));
                    let error = distance(&got, &wanted);
                    assert!(error <= limit(isa, [gate, up]), "{gate} {up} {width} {tokens} on {isa}: {error:.2e}");
                }
            }
        }
    }
}

#[test]
fn floats_of_two_dtypes_are_the_widest_one_to_the_last_bit() {
    let mut rng = ChaCha8Rng::seed_from_u64(18);
    for [gate, up, down] in [
        [Dtype::Bf16, Dtype::F32, Dtype::F32],
        [Dtype::F32, Dtype::Bf16, Dtype::Bf16],
        [Dtype::F16, Dtype::Bf16, Dtype::F32],
        [Dtype::Bf16, Dtype::Bf16, Dtype::F32],
        [Dtype::F32, Dtype::F32, Dtype::Bf16],
    ] {
        for tokens in [1u32, 7, 20, 50] {
            let [hidden, width] = [70, 90];
            let stored = Stored::new(&mut rng, Activation::swiglu(), [hidden, width], [up, down]);
            let stored = [stored.with_gate(&mut rng, gate)];
            let widened = |dtype: Dtype, bytes: &[u8]| -> Vec<u8> {
                naive::decoded(dtype.name(), bytes).into_iter().flat_map(|value| (value as f32).to_le_bytes()).collect()
            };
            let wide = [Stored {
                activation: Activation::swiglu(),
                hidden,
                width,
                dtypes: [Dtype::F32; 2],
                gate_dtype: Dtype::F32,
                gate: widened(gate, &stored[0].gate),
                up: widened(up, &stored[0].up),
                down: widened(down, &stored[0].down),
                biases: Default::default(),
            }];
            let lists = vec![((0..tokens).collect(), vec![0.5; tokens as usize])];
            let input = drawn_input(&mut rng, tokens as usize * hidden);
            for isa in Isa::all() {
                let [got, expected] =
                    [&stored, &wide].map(|experts| run(&Engine::on(isa), &input, hidden, &work(experts, &lists)));
                assert!(got == expected, "{gate} {up} {down} {tokens} on {isa}");
            }
        }
    }
}

#[test]
fn every_activation_with_and_without_biases() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for activation in kinds() {
        for with_biases in [false, true] {
            for [hidden, width] in [[9, 16], [40, 33], [17, 47], [16, 300]] {
                let mut expert = Stored::new(&mut rng, activation, [hidden, width], [Dtype::F32; 2]);
                if with_biases {
                    expert = expert.with_biases(&mut rng);
                }
                let (experts, lists) = ([expert], vec![((0..19).collect(), vec![0.5; 19])]);
                // Large ones too, where functions are flat.
                let input: Vec<f32> = drawn_input(&mut rng, 19 * hidden).iter().map(|x| x * 8.0).collect();
                let wanted = naive_block(&experts, &lists, &input, hidden);
                for isa in Isa::all() {
                    let error = distance(&run(&Engine::on(isa), &input, hidden, &work(&experts, &lists)), &wanted);
                    assert!(error < 3e-6, "{activation:?} {with_biases} {hidden} {width} on {isa}: {error:.2e}");
                }
            }
        }
    }
}

#[test]
fn one_expert_with_more_tokens_than_a_group_is_the_dense_ffn() {
    for dtypes in [
        [Dtype::F32; 2],
        [Dtype::Bf16; 2],
        [Dtype::Q8_0; 2],
        [Dtype::Q4K, Dtype::Q6K],
        [Dtype::Q5K; 2],
        [Dtype::Mxfp4; 2],
    ] {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let (hidden, width, tokens) = (256, 256, 301u32);
        let experts = [Stored::new(&mut rng, Activation::swiglu(), [hidden, width], dtypes)];
        let input = drawn_input(&mut rng, tokens as usize * hidden);
        let lists = vec![((0..tokens).collect(), vec![1.0; tokens as usize])];
        for isa in Isa::all() {
            let got = run(&Engine::on(isa), &input, hidden, &work(&experts, &lists));
            for token in [0, 1, 254, 255, 256, 257, 299, 300] {
                let wanted = experts[0].naive(&input[token * hidden..][..hidden]);
                let error = distance(&got[token * hidden..][..hidden], &wanted);
                assert!(error < 1.5 * limit(isa, dtypes), "{dtypes:?} token {token} on {isa}: {error:.2e}");
            }
        }
    }
}

#[test]
fn threads_and_what_buffers_held_change_no_bit() {
    for dtypes in [[Dtype::F32; 2], [Dtype::Bf16; 2], [Dtype::Q4K, Dtype::Q6K], [Dtype::Mxfp4; 2]] {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let quantized = dtypes[0].is_quantized();
        // Large enough for threads, with widths that no piece divides.
        let shapes = if quantized { [[512, 768], [256, 256]] } else { [[500, 777], [31, 65]] };
        let made: Vec<_> = [(shapes[0], 70u32), (shapes[1], 300), (shapes[0], 3)]
            .into_iter()
            .map(|(shape, tokens)| {
                let experts: Vec<Stored> =
                    (0..4).map(|_| Stored::new(&mut rng, Activation::swiglu(), shape, dtypes)).collect();
                let lists = lists_of(&mut rng, tokens);
                (shape[0], experts, lists, drawn_input(&mut rng, tokens as usize * shape[0]))
            })
            .collect();
        for isa in Isa::all() {
            let bits = |engine: &Engine, at: usize| {
                let (hidden, experts, lists, input) = &made[at];
                let output = run(engine, input, *hidden, &work(experts, lists));
                output.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let expected: Vec<_> = pool(1).install(|| (0..3).map(|at| bits(&Engine::on(isa), at)).collect());
            assert!(expected.iter().all(|bits: &Vec<u32>| bits.iter().any(|&bits| bits != 0)));
            let engine = Engine::on(isa);
            for threads in [1, 2, 3] {
                for at in [0, 1, 2, 0, 2, 1, 1] {
                    let got = pool(threads).install(|| bits(&engine, at));
                    assert!(got == expected[at], "{dtypes:?} {at} on {threads} threads, {isa}");
                }
            }
        }
    }
}

#[test]
fn views_of_fused_and_stacked_weights_are_the_weights() {
    for dtype in Dtype::ALL {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (hidden, width, experts) = if dtype.is_quantized() { (256, 256, 3) } else { (37, 45, 3) };
        let stored: Vec<Stored> =
            (0..experts).map(|_| Stored::new(&mut rng, Activation::swiglu(), [hidden, width], [dtype; 2])).collect();
        let row_bytes = dtype.row_bytes(hidden).unwrap();
        let all = |part: fn(&Stored) -> Vec<u8>| stored.iter().flat_map(part).collect::<Vec<u8>>();
        let down = all(|expert| expert.down.clone());
        let stacked = all(|expert| [&expert.gate[..], &expert.up].concat());
        // Gate and up projection row by row in turn.
        let interleaved: Vec<u8> = stored
            .iter()
            .flat_map(|expert| expert.gate.chunks(row_bytes).zip(expert.up.chunks(row_bytes)))
            .flat_map(|(gate, up)| [gate, up].concat())
            .collect();
        let matrix = |rows, columns, bytes| Matrix::new(dtype, rows, columns, bytes).unwrap();
        let stacked = matrix(experts * 2 * width, hidden, &stacked);
        let interleaved = matrix(experts * 2 * width, hidden, &interleaved);
        let down = matrix(experts * hidden, width, &down);
        let lists = lists_of(&mut rng, 21)[1..].to_vec();
        let input = drawn_input(&mut rng, 21 * hidden);
        let expected = run(&Engine::default(), &input, hidden, &work(&stored, &lists));
        assert!(expected.iter().any(|&value| value != 0.0));
        for fused in [false, true] {
            let work: Vec<Work<'_>> = (0..experts)
                .map(|at| {
                    let rows = 2 * width * at..2 * width * (at + 1);
                    let (gate, up) = match fused {
                        true => {
                            let both = interleaved.rows(rows).unwrap();
                            (both.interleaved(0).unwrap(), both.interleaved(1).unwrap())
                        }
                        false => {
                            let both = stacked.rows(rows).unwrap();
                            (both.rows(0..width).unwrap(), both.rows(width..2 * width).unwrap())
                        }
                    };
                    let down = down.rows(hidden * at..hidden * (at + 1)).unwrap();
                    let expert =
                        ExpertWeights::new(Activation::swiglu(), Some(gate.into()), up.into(), down.into()).unwrap();
                    assert_eq!([expert.hidden(), expert.width()], [hidden, width]);
                    assert_eq!(expert.size_in_bytes(), 3 * stored[0].gate.len());
                    Work { expert, tokens: &lists[at].0, weights: &lists[at].1 }
                })
                .collect();
            assert_eq!(run(&Engine::default(), &input, hidden, &work), expected, "{dtype}, fused: {fused}");
        }
        // Rows of every second row, down to the last.
        let up = interleaved.interleaved(1).unwrap().rows(width..experts * width).unwrap();
        assert_eq!(up.row(up.shape()[0] - 1), stored[experts - 1].up.chunks(row_bytes).last().unwrap());
        assert_eq!(up.rows(up.shape()[0]..up.shape()[0]).unwrap().shape(), [0, hidden]);
    }
}

#[test]
fn nothing_to_do_is_zeros() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let experts = [Stored::new(&mut rng, Activation::swiglu(), [24, 10], [Dtype::F32; 2]).with_biases(&mut rng)];
    for isa in Isa::all() {
        let engine = Engine::on(isa);
        // After work that leaves something in the buffers.
        let input = drawn_input(&mut rng, 24 * 50);
        let busy = run(&engine, &input, 24, &work(&experts, &vec![((0..50).collect(), vec![1.0; 50])]));
        assert!(busy.iter().all(|&value| value != 0.0));
        assert_eq!(run(&engine, &input, 24, &[]), vec![0.0; 24 * 50]);
        let none = vec![(Vec::new(), Vec::new())];
        assert_eq!(run(&engine, &input, 24, &work(&experts, &none)), vec![0.0; 24 * 50]);
        assert_eq!(run(&engine, &[], 24, &work(&experts, &none)), Vec::<f32>::new());
        let one = vec![(vec![49], vec![1.0])];
        let got = run(&engine, &input, 24, &work(&experts, &one));
        assert_eq!(got[..49 * 24], vec![0.0; 49 * 24]);
        assert!(got[49 * 24..].iter().all(|&value| value != 0.0));
    }
}

#[test]
fn experts_without_width_add_their_bias_and_states_without_width_are_none() {
    for isa in Isa::all() {
        let engine = Engine::on(isa);
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
            let bias = [1.0, -2.0, 3.0];
            let weight = |rows, columns| Matrix::new(dtype, rows, columns, &[]).unwrap();
            let up = Matrix::from_f32(0, 3, &[]).unwrap();
            let down = ProjectionWeights { weight: weight(3, 0), bias: Some(&bias) };
            let expert =
                ExpertWeights::new(Activation { function: Function::ReluSquared, gated: false }, None, up.into(), down)
                    .unwrap();
            for count in [1u32, 2, 5, 40] {
                let (tokens, weights) = ((0..count).collect::<Vec<_>>(), vec![2.0; count as usize]);
                // Sums of another product are where these will be.
                run(&engine, &[1.0; 96], 32, &[]);
                let got = run(
                    &engine,
                    &vec![1.0; 3 * count as usize],
                    3,
                    &[Work { expert, tokens: &tokens, weights: &weights }],
                );
                assert_eq!(got, [2.0, -4.0, 6.0].repeat(count as usize), "{dtype} {count} on {isa}");
            }
            let (up, down) = (weight(4, 0), Matrix::from_f32(0, 4, &[]).unwrap());
            let narrow = ExpertWeights::new(
                Activation { function: Function::ReluSquared, gated: false },
                None,
                up.into(),
                down.into(),
            )
            .unwrap();
            let work = [Work { expert: narrow, tokens: &[0, 4], weights: &[1.0, 1.0] }];
            engine.forward(Matrix::from_f32(5, 0, &[]).unwrap(), &work, &mut []).unwrap();
        }
        engine.forward(Matrix::from_f32(0, 0, &[]).unwrap(), &[], &mut []).unwrap();
    }
}

#[test]
fn a_token_named_twice_gets_both_and_halves_are_their_floats() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
        let experts =
            [Stored::new(&mut rng, Activation { function: Function::Gelu, gated: true }, [96, 64], [dtype; 2])
                .with_biases(&mut rng)];
        let input = drawn_input(&mut rng, 6 * 96);
        for isa in Isa::all() {
            let engine = Engine::on(isa);
            let at_once = run(&engine, &input, 96, &work(&experts, &vec![(vec![4, 1, 4], vec![0.5, 1.0, 0.25])]));
            let each = run(&engine, &input, 96, &work(&experts, &vec![(vec![4, 1, 4], vec![0.75, 1.0, 0.0])]));
            for (a, b) in at_once.iter().zip(&each) {
                assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{a} {b}");
            }
            assert!(at_once[4 * 96..5 * 96].iter().any(|&value| value != 0.0));
            // Two experts that are one.
            let one = experts[0].weights();
            let twice = [
                Work { expert: one, tokens: &[4, 1], weights: &[0.5, 1.0] },
                Work { expert: one, tokens: &[4], weights: &[0.25] },
            ];
            let twice = run(&engine, &input, 96, &twice);
            assert!(distance(&twice, &at_once.iter().copied().map(f64::from).collect::<Vec<_>>()) < 1e-6);

            let lists = vec![((0..6).collect(), vec![1.0; 6])];
            let halves: Vec<f16> = input.iter().copied().map(f16::from_f32).collect();
            let brains: Vec<bf16> = input.iter().copied().map(bf16::from_f32).collect();
            let floats =
                [halves.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), brains.iter().map(|x| x.to_f32()).collect()];
            let rows = [Matrix::from_f16(6, 96, &halves).unwrap(), Matrix::from_bf16(6, 96, &brains).unwrap()];
            for (rows, floats) in rows.into_iter().zip(floats) {
                let mut output = vec![0.0; 6 * 96];
                engine.forward(rows, &work(&experts, &lists), &mut output).unwrap();
                assert_eq!(output, run(&engine, &floats, 96, &work(&experts, &lists)), "{} on {isa}", rows.dtype());
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_with_its_token() {
    for dtypes in pairs_of_dtypes() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let hidden = 256;
        for activation in [
            Activation::swiglu(),
            Activation { function: Function::ReluSquared, gated: false },
            Activation::clamped_swiglu(1.702, 7.0),
        ] {
            let experts: Vec<Stored> =
                (0..2).map(|_| Stored::new(&mut rng, activation, [hidden, 256], dtypes)).collect();
            for tokens in [2u32, 4, 14, 40] {
                let mut input = drawn_input(&mut rng, tokens as usize * hidden);
                let lists: Lists = vec![((0..tokens).collect(), vec![1.0; tokens as usize]); 2];
                for isa in Isa::all() {
                    let clean = run(&Engine::on(isa), &input, hidden, &work(&experts, &lists));
                    let before = std::mem::replace(&mut input[hidden + 100], f32::NAN);
                    let got = run(&Engine::on(isa), &input, hidden, &work(&experts, &lists));
                    input[hidden + 100] = before;
                    for (token, (got, clean)) in got.chunks(hidden).zip(clean.chunks(hidden)).enumerate() {
                        match token {
                            1 => assert!(got.iter().all(|value| value.is_nan()), "{dtypes:?} {tokens} on {isa}"),
                            _ => assert_eq!(got, clean, "{dtypes:?} {token} of {tokens} on {isa}"),
                        }
                    }
                }
            }
        }
    }
}

fn message<T>(result: Result<T, Error>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn what_does_not_fit_is_named() {
    let floats = [0.0f32; 64];
    let matrix = |rows: usize, columns: usize| Matrix::from_f32(rows, columns, &floats[..rows * columns]).unwrap();
    let shape = |error| matches!(error, Error::Shape { .. });
    let (swiglu, plain) = (Activation::swiglu(), Activation { function: Function::ReluSquared, gated: false });
    let make =
        |activation,
         gate: Option<ProjectionWeights<'static>>,
         up: ProjectionWeights<'static>,
         down: ProjectionWeights<'static>| { ExpertWeights::new(activation, gate, up, down).map(|_| ()) };
    static FLOATS: [f32; 64] = [0.0; 64];
    let fixed = |rows: usize, columns: usize| -> ProjectionWeights<'static> {
        Matrix::from_f32(rows, columns, &FLOATS[..rows * columns]).unwrap().into()
    };
    let biased = |projection: ProjectionWeights<'static>, count: usize| ProjectionWeights {
        bias: Some(&FLOATS[..count]),
        ..projection
    };
    let cases = [
        (make(swiglu, Some(fixed(2, 3)), fixed(3, 2), fixed(2, 3)), "gate projection: expected [3, 2], got [2, 3]"),
        (make(plain, None, fixed(3, 2), fixed(3, 2)), "down projection: expected [2, 3], got [3, 2]"),
        (make(swiglu, None, fixed(3, 2), fixed(2, 3)), "gate projection: expected one, got none"),
        (make(plain, Some(fixed(3, 2)), fixed(3, 2), fixed(2, 3)), "gate projection: expected none, got one"),
        (make(plain, None, biased(fixed(3, 2), 2), fixed(2, 3)), "bias of the up projection: expected 3 values, got 2"),
        (
            make(plain, None, fixed(3, 2), biased(fixed(2, 3), 3)),
            "bias of the down projection: expected 2 values, got 3",
        ),
        (
            make(swiglu, Some(biased(fixed(3, 2), 4)), fixed(3, 2), fixed(2, 3)),
            "bias of the gate projection: expected 3 values, got 4",
        ),
    ];
    for (result, expected) in cases {
        assert!(result.as_ref().is_err_and(|error| matches!(error, Error::Shape { .. })));
        assert_eq!(message(result), expected);
    }
    let limit = make(Activation::clamped_swiglu(1.0, -1.0), Some(fixed(3, 2)), fixed(3, 2), fixed(2, 3));
    assert_eq!(message(limit), "activation limit is -1: expected a positive finite number");

    let expert = ExpertWeights::new(plain, None, fixed(3, 2), fixed(2, 3)).unwrap();
    let forward = |input, tokens: &[u32], weights: &[f32], output: usize| {
        let mut output = vec![7.0; output];
        let result = Engine::default().forward(input, &[Work { expert, tokens, weights }], &mut output);
        assert!(result.is_ok() || output.iter().all(|&value| value == 7.0), "an error leaves the output");
        result
    };
    assert!(forward(matrix(4, 2), &[3], &[1.0], 8).is_ok());
    let cases = [
        (forward(matrix(4, 3), &[0], &[1.0], 12), "hidden width of an expert: expected 3, got 2"),
        (forward(matrix(4, 2), &[0, 1], &[1.0], 8), "weights of an expert's tokens: expected 2, got 1"),
        (forward(matrix(4, 2), &[0], &[1.0], 7), "output of experts: expected 8 values, got 7"),
        (forward(matrix(4, 2), &[0], &[1.0], 9), "output of experts: expected 8 values, got 9"),
        (
            forward(Matrix::new(Dtype::Q8_0, 1, 32, &[0; 34]).unwrap(), &[0], &[1.0], 32),
            "input of experts: expected f32, f16 or bf16, got q8_0",
        ),
    ];
    for (result, expected) in cases {
        let error = result.expect_err(expected);
        assert_eq!(error.to_string(), expected);
        assert!(shape(error), "{expected}");
    }
    let error = forward(matrix(4, 2), &[0, 4], &[1.0, 1.0], 8).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }));
    assert_eq!(error.to_string(), "token of an expert is 4: expected below 4");

    let cases = [
        (Matrix::new(Dtype::Q4K, 1, 255, &[0; 144]), "matrix: expected a multiple of 256 columns for q4_K, got 255"),
        (Matrix::new(Dtype::Q8_0, 2, 64, &[0; 135]), "matrix: expected 2 rows of 68 bytes (q8_0), got 135 bytes"),
        (Matrix::from_f32(2, 3, &floats[..5]), "matrix: expected 2 rows of 12 bytes (f32), got 20 bytes"),
        (
            Matrix::from_f32(usize::MAX, 3, &floats),
            "matrix: expected 18446744073709551615 rows of 12 bytes (f32), got 256 bytes",
        ),
        (matrix(4, 2).rows(2..5), "rows of a matrix: expected within 0..4, got 2..5"),
        (matrix(3, 2).interleaved(0), "interleaved matrix: expected an even number of rows, got 3"),
        (matrix(4, 2).interleaved(2), "first row of an interleaved matrix: expected 0 or 1, got 2"),
    ];
    for (result, expected) in cases {
        let error = result.expect_err(expected);
        assert_eq!(error.to_string(), expected);
        assert!(shape(error), "{expected}");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "that is the mistake")]
    let reversed = matrix(4, 2).rows(3..2);
    assert_eq!(message(reversed), "rows of a matrix: expected within 0..4, got 3..2");
}

#[cfg(feature = "model")]
#[test]
fn candle_reads_the_same_numbers_from_blocks() {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let (rows, columns) = (24, 512);
    for (dtype, theirs) in [
        (Dtype::Q8_0, GgmlDType::Q8_0),
        (Dtype::Q4K, GgmlDType::Q4K),
        (Dtype::Q5K, GgmlDType::Q5K),
        (Dtype::Q6K, GgmlDType::Q6K),
    ] {
        let values: Vec<f32> = drawn_input(&mut rng, rows * columns);
        let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
        let quantized = QTensor::quantize(&tensor, theirs).unwrap();
        let bytes = quantized.data().unwrap().into_owned();
        let theirs: Vec<f32> = quantized.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let ours = naive::decoded(dtype.name(), &bytes);
        for (at, (ours, &theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!((ours - f64::from(theirs)).abs() <= 1e-6, "{dtype} {at}: {ours}, {theirs}");
        }
        // An expert that hands on one column of the weights at a time shows what the engine reads.
        let up = Matrix::new(dtype, rows, columns, &bytes).unwrap();
        let one: Vec<f32> = (0..columns * rows).map(|at| f32::from(u8::from(at == 0))).collect();
        let down = Matrix::from_f32(columns, rows, &one).unwrap();
        let activation = Activation { function: Function::ReluSquared, gated: false };
        let expert = ExpertWeights::new(activation, None, up.into(), down.into()).unwrap();
        let input: Vec<f32> =
            (0..columns * columns).map(|at| f32::from(u8::from(at / columns == at % columns))).collect();
        let (tokens, weights) = ((0..columns as u32).collect::<Vec<_>>(), vec![1.0; columns]);
        let work = [Work { expert, tokens: &tokens, weights: &weights }];
        for isa in Isa::all().filter(|isa| !isa.to_string().contains("bf16")) {
            let got = run(&Engine::on(isa), &input, columns, &work);
            for column in 0..columns {
                let wanted = theirs[column].max(0.0).powi(2);
                let got = got[column * columns];
                assert!((got - wanted).abs() <= 1e-5, "{dtype} {column} on {isa}: {got}, {wanted}");
            }
        }
    }
}
