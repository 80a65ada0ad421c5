//! Experts over ranks give the assignment and the logits that all of them in one process give, whatever the ranks, the batch and the
//! placement; ranks are threads here, and processes in the command's own tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::decoder::generate_batch;
use crate::parallel::tests::{Thread, each};
use crate::parallel::{ExpertParallel, Ranks};
use crate::routing::Shares;
use crate::{
    Batch, CacheOptions, CacheRouter, CapacityRule, Decoder, DropRule, GenerateOptions, LoadOptions, Model,
    PhaseRouter, Placement, Router, Sampler, TopK, Weights,
};

/// A fixture of every kind of experts: without, with a gated and with a plain shared expert, with biases, in groups; of odd numbers.
const FAMILIES: [&str; 7] = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "lfm2_moe", "qwen3_next"];

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn fixture(family: &str) -> PathBuf {
    root("tests/goldens/zoo").join(family)
}

/// Every third expert on each rank, so that a rank's experts are not neighbours, and of odd numbers.
fn dealt(experts: usize, ranks: usize) -> Placement {
    Placement::new((0..experts).map(|expert| (expert * 7 % 11 % ranks) as u16).collect(), ranks).unwrap()
}

/// The model on one rank.
fn over(world: Thread, path: &Path, options: &LoadOptions) -> Decoder {
    let weights = Weights::open(path).unwrap();
    let ranks = Arc::new(Ranks::new(world).unwrap());
    let placement = dealt(weights.spec().unwrap().moe.experts, ranks.count());
    // Where there are several ranks by turns at once and own rows first.
    let overlap = if ranks.count().is_multiple_of(2) { 1 } else { usize::MAX };
    let parallel = ExpertParallel::new(ranks, on(placement)).unwrap().with_overlap(overlap);
    Decoder::load(&weights, &options.clone().with_parallel(parallel)).unwrap()
}

/// Equal ranks with experts where a placement puts them.
fn on(placement: Placement) -> Shares {
    let speeds = vec![1.0; placement.devices()];
    CapacityRule::placed(1.0, placement, speeds).shares
}

fn ids(vocab: usize, seed: usize, count: usize) -> Vec<u32> {
    (0..count).map(|at| ((seed * 7919 + at * at * 31 + at * 7) % vocab) as u32).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Of a layer: gate logits, experts, limits.
type Layer = (Vec<f32>, Vec<i32>, Option<Vec<u32>>);

/// What a pass gave: logits of each rank's own sequences one after the other, and of each layer the gate logits and the experts.
struct Passed {
    logits: Vec<f32>,
    layers: Vec<Layer>,
}

fn passed(decoder: &Decoder, batch: &Batch) -> Passed {
    let mut state = decoder.batch_state().keeping_routed();
    let logits = values(&decoder.forward(batch, &mut state).unwrap());
    let layers = state.routed().iter().map(|routed| {
        let limits = routed.capacity.limits().map(<[u32]>::to_vec);
        (values(&routed.logits), routed.assignment.ids().collect(), limits)
    });
    Passed { logits, layers: layers.collect() }
}

fn batches(vocab: usize) -> Vec<Batch> {
    let sequences: Vec<Vec<u32>> =
        [13, 7, 13, 1, 9].iter().enumerate().map(|(seed, &count)| ids(vocab, seed, count)).collect();
    let of = |range: std::ops::Range<usize>| {
        Batch::new(&sequences[range].iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
    };
    // Split with padding and uneven parts; fewer sequences than ranks; one token.
    vec![of(0..5), of(0..4), of(0..2), of(0..1), of(3..4)]
}

fn routers(ranks: usize) -> Vec<(Arc<dyn Router>, Option<CapacityRule>)> {
    let per_expert = CapacityRule::per_expert(1.0).with_minimum_mean(0.0);
    vec![
        (Arc::new(TopK::default()), None),
        (Arc::new(TopK { drop: Some(DropRule::Arrival) }), Some(per_expert.clone())),
        (Arc::new(PhaseRouter::default()), Some(per_expert)),
        (Arc::new(PhaseRouter::default()), Some(CapacityRule::per_device(1.0, ranks).with_minimum_mean(0.0))),
    ]
}

#[test]
fn ranks_give_what_one_process_gives() {
    let (mut slots, mut elsewhere) = (0, 0);
    for family in FAMILIES {
        let path = fixture(family);
        let plain = Decoder::load(&Weights::open(&path).unwrap(), &LoadOptions::default()).unwrap();
        for ranks in 1..=4 {
            for (at, (router, rule)) in routers(ranks).into_iter().enumerate() {
                let set = |mut decoder: Decoder| {
                    decoder.set_router(router.clone());
                    decoder.set_capacity(rule.clone());
                    decoder
                };
                let alone = set(plain.clone());
                let batches = batches(alone.spec().vocab);
                let expected: Vec<Passed> = batches.iter().map(|batch| passed(&alone, batch)).collect();
                let of_ranks = each(Thread::ranks(ranks), |world| {
                    let decoder = set(over(world, &path, &LoadOptions::default()));
                    batches
                        .iter()
                        .map(|batch| (passed(&decoder, batch), decoder.own_sequences(batch)))
                        .collect::<Vec<_>>()
                });
                for (number, (batch, expected)) in batches.iter().zip(&expected).enumerate() {
                    let what = format!("{family}, {ranks} ranks, router {at}, batch {number}");
                    for (rank, passes) in of_ranks.iter().enumerate() {
                        let (got, own) = &passes[number];
                        assert_eq!(own.len() < batch.sequences(), ranks > 1 && batch.sequences() >= ranks, "{what}");
                        let vocab = alone.spec().vocab;
                        for (at, (ours, theirs)) in (own.start * batch.positions()..).zip(
                            got.logits
                                .chunks_exact(vocab)
                                .zip(expected.logits[own.start * batch.positions() * vocab..].chunks_exact(vocab)),
                        ) {
                            let is_padding = batch.padding().is_some_and(|padding| padding[at]);
                            let off = |(a, b): (&f32, &f32)| (a - b).abs() / (1.0 + b.abs());
                            let off = ours.iter().zip(theirs).map(off).fold(0.0, f32::max);
                            assert!(is_padding || off <= 1e-4, "{what}, rank {rank}, row {at}: off by {off}");
                        }
                        for (layer, (got, expected)) in got.layers.iter().zip(&expected.layers).enumerate() {
                            assert_eq!(got.2, expected.2, "{what}, layer {layer}: limits");
                            // Every rank has decided the same.
                            assert_eq!(
                                got.1, of_ranks[0][number].0.layers[layer].1,
                                "{what}, rank {rank}, layer {layer}"
                            );
                            if got.0 == expected.0 {
                                assert_eq!(got.1, expected.1, "{what}, layer {layer}: same logits, other experts");
                            }
                            slots += got.1.len();
                            elsewhere += got.1.iter().zip(&expected.1).filter(|(a, b)| a != b).count();
                        }
                    }
                }
            }
        }
    }
    assert!(slots > 100_000 && elsewhere * 1000 <= slots, "{elsewhere} of {slots} slots went elsewhere");
}

#[test]
fn real_text_goes_where_it_goes_in_one_process() {
    let path = root("models/tiny-moe");
    let model = Model::load(&path, &LoadOptions::default()).unwrap();
    let text = std::fs::read_to_string(path.join("eval/code.txt")).unwrap();
    let ids = model.encode(&text).unwrap();
    let sequences: Vec<&[u32]> = ids.chunks_exact(128).take(24).collect();
    let batches: Vec<Batch> = sequences.chunks(4).map(|sequences| Batch::new(sequences).unwrap()).collect();
    for ranks in [2, 3, 4] {
        for router in [Arc::new(PhaseRouter::default()) as Arc<dyn Router>, Arc::new(TopK::default())] {
            let rule = router.respects_capacity().then(|| CapacityRule::per_device(1.0, ranks));
            let rule = rule.filter(|_| router.name() == "phase");
            let assignments = |mut decoder: Decoder| {
                decoder.set_router(router.clone());
                decoder.set_capacity(rule.clone());
                let mut state = decoder.batch_state().keeping_routed();
                let mut ids = Vec::new();
                for batch in &batches {
                    decoder.forward(batch, &mut state).unwrap();
                    ids.push(
                        state
                            .routed()
                            .iter()
                            .map(|routed| routed.assignment.ids().collect::<Vec<_>>())
                            .collect::<Vec<_>>(),
                    );
                }
                ids
            };
            let alone = assignments(model.decoder().clone());
            let all = each(Thread::ranks(ranks), |world| assignments(over(world, &path, &LoadOptions::default())));
            // Sums over experts are of other pairs first, so that later layers' logits differ in their last bits; of several assignments within its
            // certificate `phase` may then take another one.
            let most = if router.name() == "phase" { 20 } else { 1 };
            for layer in 0..alone[0].len() {
                let (mut slots, mut elsewhere) = (0, 0);
                for (alone, ours) in alone.iter().zip(&all[0]) {
                    for (token, ours) in alone[layer].chunks(4).zip(ours[layer].chunks(4)) {
                        slots += 4;
                        elsewhere += ours.iter().filter(|id| !token.contains(id)).count();
                    }
                }
                let allowed = if layer == 0 { 0 } else { slots * most / 1000 };
                assert!(
                    elsewhere <= allowed,
                    "{}, {ranks} ranks, layer {layer}: {elsewhere} of {slots}",
                    router.name()
                );
            }
            assert!(all.iter().all(|ranks| *ranks == all[0]), "ranks decide alike");
        }
    }
}

#[test]
fn texts_go_on_over_ranks_as_they_do_in_one_process() {
    let path = root("models/tiny-moe");
    let model = Model::load(&path, &LoadOptions::default()).unwrap();
    let prompts: Vec<Vec<u32>> = [11, 3, 40].iter().enumerate().map(|(seed, &count)| ids(500, seed, count)).collect();
    for prompts in [&prompts[..], &prompts[..1]] {
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        // Texts that end at different steps leave ranks without a token.
        let generate = |model: &Model| {
            let mut state = model.decoder().generation_state();
            let mut samplers = vec![Sampler::new(0.0, 1.0, 3).unwrap(); prompts.len()];
            let options = GenerateOptions { new_tokens: 12, chunk_tokens: 16 };
            generate_batch(model, &prompts, options, &mut state, &mut samplers, |_, _, _| {
                std::ops::ControlFlow::Continue(())
            })
            .unwrap()
            .texts
        };
        let expected = generate(&model);
        for ranks in [2, 3] {
            let texts = each(Thread::ranks(ranks), |world| {
                let ranks = Arc::new(Ranks::new(world).unwrap());
                let placement = dealt(model.decoder().spec().moe.experts, ranks.count());
                let parallel = ExpertParallel::new(ranks, on(placement)).unwrap();
                generate(&Model::load(&path, &LoadOptions::default().with_parallel(parallel)).unwrap())
            });
            assert!(texts.iter().all(|texts| *texts == expected), "{ranks} ranks");
        }
    }
}

#[test]
fn a_rank_holds_its_own_experts_and_its_cache_reads_no_others() {
    let path = root("models/tiny-moe");
    let weights = Weights::open(&path).unwrap();
    let experts = weights.spec().unwrap().moe.experts;
    let batch = Batch::new(&[&ids(500, 1, 40), &ids(500, 2, 40)]).unwrap();
    let plain = Decoder::load(&weights, &LoadOptions::default()).unwrap();
    let expected = values(&plain.forward(&batch, &mut plain.batch_state()).unwrap());
    let placement = dealt(experts, 2);
    let cache = CacheOptions::new(weights.expert_sizes().unwrap().all as usize);
    for options in [LoadOptions::default(), LoadOptions::default().with_expert_cache(cache)] {
        let done = each(Thread::ranks(2), |world| {
            let mut decoder = over(world, &path, &options);
            let held: Vec<usize> = decoder.moe_layers().map(|layer| layer.experts().len()).collect();
            let logits = values(&decoder.forward(&batch, &mut decoder.batch_state()).unwrap());
            let read = decoder.expert_cache().map(|cache| cache.statistics().misses);
            // A memory-aware router sees what is in memory anywhere, and so decides alike.
            decoder.set_router(Arc::new(CacheRouter::new(0.5, 0.2).unwrap()));
            let mut state = decoder.batch_state().keeping_routed();
            decoder.forward(&batch, &mut state).unwrap();
            let ids: Vec<i32> =
                state.routed().iter().flat_map(|routed| routed.assignment.ids().collect::<Vec<_>>()).collect();
            (held, logits, read, ids)
        });
        assert_eq!(done[0].3, done[1].3);
        for (rank, (held, logits, read, _)) in done.iter().enumerate() {
            let own = placement.device_of().iter().filter(|&&device| usize::from(device) == rank).count();
            let layers = plain.spec().moe_layers();
            match options.expert_cache {
                None => assert_eq!((held, read), (&vec![own; layers], &None)),
                Some(_) => assert!(held.iter().all(|&held| held == 0) && read.unwrap() <= (own * layers) as u64),
            }
            let half = expected.len() / 2;
            let off = logits.iter().zip(&expected[rank * half..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= 1e-4, "rank {rank}: off by {off}");
        }
    }
}

#[test]
fn rows_travel_in_the_dtype_of_activations() {
    let path = root("models/tiny-moe");
    let weights = Weights::open(&path).unwrap();
    let mut floats = [None; 2];
    // Means: where rounding turns a choice of experts, single logits are far off.
    for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 0.02), (DType::F16, 0.001)] {
        let options = LoadOptions::default().with_dtype(dtype);
        let plain = Decoder::load(&weights, &options).unwrap();
        // Split, and whole.
        for sequences in [2, 1] {
            let ids: Vec<Vec<u32>> = (0..sequences).map(|seed| ids(500, seed, 40)).collect();
            let batch = Batch::new(&ids.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
            let expected = values(&plain.forward(&batch, &mut plain.batch_state()).unwrap());
            let done = each(Thread::ranks(2), |world| {
                let decoder = over(world, &path, &options);
                let own = decoder.own_sequences(&batch);
                let logits = values(&decoder.forward(&batch, &mut decoder.batch_state()).unwrap());
                (own, logits, decoder.parallel().unwrap().totals().bytes)
            });
            for (own, logits, bytes) in &done {
                let expected = &expected[own.start * expected.len() / sequences..][..logits.len()];
                let off = logits.iter().zip(expected).map(|(a, b)| (a - b).abs()).sum::<f32>() / logits.len() as f32;
                assert!(off <= most, "{dtype:?}, {sequences} sequences: off by {off}");
                assert_eq!(*bytes, done[0].2, "every rank counts the same");
            }
            // Rows of two bytes a number; heads and logits are what they are.
            let in_floats = *floats[sequences - 1].get_or_insert(done[0].2);
            let share = done[0].2 as f64 / in_floats as f64;
            assert!(share <= if dtype == DType::F32 { 1.0 } else { 0.75 }, "{dtype:?}, {sequences} sequences: {share}");
        }
    }
}

#[test]
fn what_does_not_fit_the_ranks_is_refused() {
    let ranks = Arc::new(Ranks::new(Thread::ranks(1).remove(0)).unwrap());
    let error = |shares: Shares| ExpertParallel::new(ranks.clone(), shares).unwrap_err().to_string();
    assert_eq!(error(on(dealt(8, 2))), "shares of the ranks: expected 1 ranks, got 2 devices");
    assert_eq!(
        error(CapacityRule::per_expert(1.0).shares),
        "shares of the ranks: expected those of devices, got those of experts"
    );
    assert_eq!(error(Shares::PerDevice { speeds: vec![0.0] }), "rank speed is 0: expected a positive finite number");
    let weights = Weights::open(&root("models/tiny-moe")).unwrap();
    let load = |shares: Shares| {
        let parallel = ExpertParallel::new(ranks.clone(), shares).unwrap();
        Decoder::load(&weights, &LoadOptions::default().with_parallel(parallel)).unwrap_err().to_string()
    };
    assert_eq!(load(on(dealt(7, 1))), "placement: expected 32 experts, got 7 experts");
    let layers = weights.spec().unwrap().moe_layers();
    let several = Shares::Placed { placements: vec![dealt(32, 1); layers + 1], speeds: vec![1.0] };
    let expected = format!("placements: expected one, or one for each of {layers} MoE layers, got {}", layers + 1);
    assert_eq!(load(several), expected);
}
