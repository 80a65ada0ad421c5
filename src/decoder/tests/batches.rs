//! Several sequences in a batch and prompts in chunks: the logits, the routing and the text are those of each sequence alone and of
//! the prompt at once, and padding costs nobody anything.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use crate::decoder::{DecoderState, ExpertMemory, generate_batch, var_builder};
use crate::offload::Prefetch;
use crate::{
    Admission, Batch, CacheOptions, CacheRouter, CapacityRule, Decoder, DropRule, GenerateOptions, LoadOptions, Model,
    PhaseRouter, Policy, Router, Sampler, TopK, Weights, generate, zoo,
};
use candle_core::{DType, Device, Tensor};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

static MODEL: LazyLock<Model> =
    LazyLock::new(|| Model::load(&root("models/tiny-moe"), &LoadOptions::default()).unwrap());

fn decoders() -> Vec<(&'static str, Decoder)> {
    let fixture = |family: &'static str| {
        let files = Weights::open(&root("tests/goldens/zoo").join(family)).unwrap();
        let vb = var_builder(&files, DType::F32, &Device::Cpu);
        let by_candle = Decoder::new(files.spec().unwrap(), vb).unwrap();
        [(family, Decoder::load(&files, &LoadOptions::default()).unwrap()), (family, by_candle)]
    };
    // OLMoE is the bundled model's family.
    let families = zoo::FAMILIES.iter().filter(|family| family.name != "olmoe");
    let mut all: Vec<_> = families.flat_map(|family| fixture(family.name)).collect();
    all.push(("tiny-moe", MODEL.decoder().clone()));
    all
}

/// Ids that repeat in no short period.
fn ids(decoder: &Decoder, seed: usize, count: usize) -> Vec<u32> {
    (0..count).map(|at| ((seed * 7919 + at * at * 31 + at * 7) % decoder.spec().vocab) as u32).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A recurrence makes more of the last bits that sums over other numbers of rows differ in.
fn assert_close(what: &str, decoder: &Decoder, ours: &[f32], expected: &[f32]) {
    assert_eq!(ours.len(), expected.len(), "{what}: length");
    let worst = ours.iter().zip(expected).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
    let limit = if decoder.spec().recurrent.is_some() { 1e-4 } else { 1e-5 };
    assert!(worst <= limit, "{what}: off by {worst}");
}

#[test]
fn a_prompt_in_chunks_gives_the_logits_of_the_prompt_at_once() {
    for (family, decoder) in decoders() {
        let prompt = ids(&decoder, 3, 23);
        let batch = Batch::new(&[&prompt]).unwrap();
        let mut state = decoder.generation_state();
        let at_once = values(&decoder.forward_last(&batch, &mut state).unwrap());
        let next = Batch::new(&[&[5]]).unwrap();
        let after = values(&decoder.forward_last(&next, &mut state).unwrap());
        for chunk in [1, 2, 7, 22, 23, 512] {
            let mut state = decoder.generation_state().keeping_routed();
            let logits = decoder.prefill(&batch, chunk, &mut state).unwrap();
            assert_eq!(logits.dims(), [1, decoder.spec().vocab]);
            assert_close(&format!("{family} in chunks of {chunk}"), &decoder, &values(&logits), &at_once);
            assert_eq!(state.routed().len(), decoder.spec().moe_layers() * 23usize.div_ceil(chunk));
            assert_eq!((state.position(), state.step), (23, 23u64.div_ceil(chunk as u64)));
            let logits = decoder.forward_last(&next, &mut state).unwrap();
            assert_close(&format!("{family} after chunks of {chunk}"), &decoder, &values(&logits), &after);
        }
    }
}

/// What a router has learnt and what is in memory goes from chunk to chunk as from one forward pass to the next.
#[test]
fn a_chunk_is_a_forward_pass_to_routers_and_memory() {
    let mut decoder = MODEL.decoder().clone();
    let prompt = ids(&decoder, 5, 300);
    let routers: [(Arc<dyn Router>, Option<CapacityRule>); 3] = [
        (Arc::new(CacheRouter::default()), None),
        (Arc::new(PhaseRouter::default()), Some(CapacityRule::per_expert(1.0))),
        (Arc::new(TopK { drop: Some(DropRule::Score) }), Some(CapacityRule::per_device(1.0, 4))),
    ];
    for (router, rule) in routers {
        decoder.set_router(router);
        decoder.set_capacity(rule.clone());
        let memory = ExpertMemory::new(4, 32, 12, Policy::Lru, Admission::default()).unwrap();
        let [mut ours, mut theirs] =
            [memory.clone(), memory].map(|memory| decoder.generation_state().with_memory(memory).keeping_routed());
        let logits = decoder.prefill(&Batch::new(&[&prompt]).unwrap(), 128, &mut ours).unwrap();
        let capacities: Vec<_> = ours.routed().iter().map(|routed| routed.capacity.clone()).collect();
        let (mut last, mut expected) = (None, Vec::new());
        for part in prompt.chunks(128) {
            last = Some(decoder.forward_last(&Batch::new(&[part]).unwrap(), &mut theirs).unwrap());
            for routed in theirs.routed() {
                let capacity = rule.as_ref().map(|rule| rule.capacity(part.len(), 32, 4).unwrap());
                assert!(capacity.is_none_or(|capacity| capacity == routed.capacity), "of {} tokens", part.len());
                expected.push(routed.capacity.clone());
            }
        }
        assert_eq!(values(&logits), values(&last.unwrap()));
        assert_eq!((ours.routes(), ours.step, capacities), (theirs.routes(), theirs.step, expected));
        for layer in 0..4 {
            let resident = |memory: Option<&ExpertMemory>| memory.unwrap().resident(layer).cloned();
            assert_eq!(resident(ours.memory()), resident(theirs.memory()));
        }
    }
}

/// Sequences of different lengths, of which some end before others and one goes on by several tokens at a time.
#[test]
fn each_sequence_of_a_batch_is_as_it_is_alone() {
    for (family, decoder) in decoders() {
        let texts = [ids(&decoder, 1, 17), ids(&decoder, 2, 5), ids(&decoder, 3, 1), ids(&decoder, 4, 11)];
        let alone: Vec<Vec<Vec<f32>>> = texts
            .iter()
            .map(|text| {
                let logits = decoder.forward(&Batch::new(&[text]).unwrap(), &mut decoder.batch_state()).unwrap();
                logits.squeeze(0).unwrap().to_vec2().unwrap()
            })
            .collect();
        let parts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let batch = Batch::new(&parts).unwrap();
        let logits = decoder.forward(&batch, &mut decoder.batch_state()).unwrap();
        for (row, alone) in alone.iter().enumerate() {
            let ours: Vec<Vec<f32>> = logits.get(row).unwrap().to_vec2().unwrap();
            for (position, expected) in alone.iter().enumerate() {
                assert_close(&format!("{family}, sequence {row} at {position}"), &decoder, &ours[position], expected);
            }
        }
        // In chunks, then the second half of each text a token a step, whoever has one left.
        for (chunk, first) in [(512, [9, 2, 1, 6]), (7, [3, 5, 1, 10]), (4, [12, 1, 1, 1])] {
            let mut state = decoder.generation_state();
            let prompts: Vec<&[u32]> = texts.iter().zip(first).map(|(text, first)| &text[..first]).collect();
            let logits = decoder.prefill(&Batch::new(&prompts).unwrap(), chunk, &mut state).unwrap();
            let check = |logits: &Tensor, row: usize, position: usize| {
                let what = format!("{family}, sequence {row} at {position} after {first:?}");
                assert_close(&what, &decoder, &values(&logits.get(row).unwrap()), &alone[row][position]);
            };
            (0..4).for_each(|row| check(&logits, row, first[row] - 1));
            for step in 0.. {
                let tokens: Vec<Option<u32>> =
                    texts.iter().zip(first).map(|(text, first)| text.get(first + step).copied()).collect();
                let Ok(batch) = Batch::step(&tokens) else { break };
                let logits = decoder.forward_last(&batch, &mut state).unwrap();
                (0..4).filter(|&row| tokens[row].is_some()).for_each(|row| check(&logits, row, first[row] + step));
            }
            assert_eq!(state.lengths(), [17, 5, 1, 11]);
        }
    }
}

#[test]
fn padding_takes_no_room_counts_nowhere_and_has_no_expert_read() {
    let mut decoder = MODEL.decoder().clone();
    let (long, short) = (ids(&decoder, 1, 200), ids(&decoder, 2, 9));
    let rule = CapacityRule::per_expert(1.0);
    decoder.set_router(Arc::new(TopK { drop: Some(DropRule::Score) }));
    decoder.set_capacity(Some(rule.clone()));
    let mut state = decoder.batch_state().keeping_routed();
    decoder.forward(&Batch::new(&[&long, &short]).unwrap(), &mut state).unwrap();
    assert_eq!(state.routed().len(), 4);
    for routed in state.routed() {
        let padding = routed.padding.as_ref().unwrap();
        assert_eq!(padding.iter().filter(|&&pad| !pad).count(), 209);
        assert_eq!(routed.capacity, rule.capacity(209, 32, 4).unwrap());
        let assignment = &routed.assignment;
        let mut pads = (0..400).filter(|&token| padding[token]);
        assert!(pads.all(|token| assignment.slots(token).next().is_none()));
        assert!(assignment.kept() > 0 && assignment.kept() < 209 * 4);
    }

    // With the long one at its end, steps ask for the short one's experts alone.
    let directory = root("models/tiny-moe");
    let cache = CacheOptions { prefetch: Prefetch::Off, ..CacheOptions::new(64 << 20) };
    let options = LoadOptions::default().with_dtype(DType::BF16).with_expert_cache(cache);
    let requests = |prompts: &[&[u32]], step: &[Option<u32>]| {
        let model = Model::load(&directory, &options).unwrap();
        let (decoder, mut state) = (model.decoder(), model.decoder().generation_state());
        decoder.prefill(&Batch::new(prompts).unwrap(), 512, &mut state).unwrap();
        let before = decoder.expert_cache().unwrap().statistics().requests;
        decoder.forward_last(&Batch::step(step).unwrap(), &mut state).unwrap();
        decoder.expert_cache().unwrap().statistics().requests - before
    };
    assert_eq!(requests(&[&short], &[Some(7)]), 16);
    assert_eq!(requests(&[&long, &short], &[None, Some(7)]), 16);
}

#[test]
fn texts_generated_side_by_side_are_those_generated_alone() {
    let greedy = || Sampler::new(0.0, 1.0, 1).unwrap();
    let drawn = || Sampler::new(0.8, 0.9, 7).unwrap();
    let prompts =
        ["And it came to pass", "fn main() {\n    let", "I", "abandon, to leave; to give up; as, to abandon a"];
    let prompts = prompts.map(|prompt| MODEL.encode(prompt).unwrap());
    let parts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    for sampler in [greedy(), drawn()] {
        let alone = |prompt: &&[u32]| {
            let (mut state, mut sampler) = (MODEL.decoder().generation_state(), sampler.clone());
            let go_on = |_| ControlFlow::Continue(());
            generate(&MODEL, prompt, GenerateOptions::new(24), &mut state, &mut sampler, go_on).unwrap()
        };
        let alone: Vec<_> = parts.iter().map(alone).collect();
        for chunk_tokens in [512, 16] {
            let mut seen = vec![Vec::new(); 4];
            let mut state = MODEL.decoder().generation_state();
            let mut samplers = vec![sampler.clone(); 4];
            let options = GenerateOptions { chunk_tokens, ..GenerateOptions::new(24) };
            let done = generate_batch(&MODEL, &parts, options, &mut state, &mut samplers, |text, id, _| {
                seen[text].push(id);
                ControlFlow::Continue(())
            })
            .unwrap();
            assert_eq!(seen, done.texts);
            for (ours, alone) in done.texts.iter().zip(&alone) {
                assert_eq!(*ours, alone.texts[0]);
            }
            let slots = alone.iter().map(|alone| alone.slots.asked).sum::<u64>();
            assert_eq!((done.slots.asked, done.slots.survival()), (slots, 1.0), "padding has no slots");
            assert_eq!(done.decode_tokens, alone.iter().map(|alone| alone.decode_steps).sum::<usize>());
        }
    }
}

#[test]
fn texts_end_each_at_its_own_place() {
    let positions = MODEL.decoder().spec().max_positions;
    let (long, short) = (ids(MODEL.decoder(), 1, positions - 3), ids(MODEL.decoder(), 2, 4));
    let mut samplers = vec![Sampler::new(0.0, 1.0, 1).unwrap(); 2];
    let mut state = MODEL.decoder().generation_state();
    let go_on = |_, _, _: &DecoderState| ControlFlow::Continue(());
    let done =
        generate_batch(&MODEL, &[&long, &short], GenerateOptions::new(9), &mut state, &mut samplers, go_on).unwrap();
    assert_eq!(done.texts.iter().map(Vec::len).collect::<Vec<_>>(), [4, 9], "the model's positions, then new tokens");
    assert_eq!(state.lengths(), [positions, 12]);

    let none = generate_batch(
        &MODEL,
        &[&short],
        GenerateOptions::new(0),
        &mut MODEL.decoder().generation_state(),
        &mut samplers[..1],
        go_on,
    );
    assert_eq!((none.as_ref().unwrap().texts[0].len(), none.unwrap().decode_steps), (0, 0));
}

#[test]
fn a_generation_stops_when_it_is_told_to() {
    let (mut state, mut sampler) = (MODEL.decoder().generation_state(), Sampler::new(0.0, 1.0, 1).unwrap());
    let mut seen = Vec::new();
    let on_token = |id| {
        seen.push(id);
        if seen.len() < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let prompt = MODEL.encode("And it came to pass").unwrap();
    let done = generate(&MODEL, &prompt, GenerateOptions::new(24), &mut state, &mut sampler, on_token).unwrap();
    assert_eq!((seen.len(), &done.texts[0], done.decode_steps), (3, &seen, 2));
    assert_eq!(state.position(), prompt.len() + 2);
}

#[test]
fn mistakes_are_named() {
    let decoder = MODEL.decoder();
    let error = |result: crate::Result<Tensor>| result.unwrap_err().to_string();
    let prompts = Batch::new(&[&[1, 2, 3], &[4]]).unwrap();
    let mut state = decoder.generation_state();
    decoder.prefill(&prompts, 512, &mut state).unwrap();
    assert_eq!(
        error(decoder.forward_last(&Batch::new(&[&[1]]).unwrap(), &mut state)),
        "batch: expected the 2 sequences whose keys and values are kept, got 1"
    );
    state.truncate(0).unwrap();
    decoder.forward_last(&Batch::new(&[&[1]]).unwrap(), &mut state).unwrap();
    let mut limited = decoder.clone();
    limited.set_capacity(Some(CapacityRule::per_expert(1.0)));
    assert_eq!(
        error(limited.forward_last(&Batch::new(&[&[2]]).unwrap(), &mut state)),
        "capacity: expected a router that keeps within it, got top-k"
    );
    let torn = error(decoder.forward_last(&Batch::new(&[&[2]]).unwrap(), &mut state));
    assert!(torn.ends_with("(`truncate(0)` begins another), got one whose last forward pass failed"), "{torn}");
    state.truncate(0).unwrap();
    let again = decoder.forward_last(&Batch::new(&[&[1]]).unwrap(), &mut state).unwrap();
    let fresh = decoder.forward_last(&Batch::new(&[&[1]]).unwrap(), &mut decoder.generation_state()).unwrap();
    assert!(values(&again) == values(&fresh), "other bits");
    let long = vec![1; decoder.spec().max_positions + 1];
    let mut state = decoder.generation_state();
    let batch = Batch::new(&[&long, &[1]]).unwrap();
    assert_eq!(
        error(decoder.prefill(&batch, 512, &mut state)),
        "text length is 1025: expected at most the model's 1024"
    );
    assert_eq!((state.position(), state.step), (0, 0), "nothing went through");
    assert_eq!(
        error(decoder.prefill(&prompts, 2, &mut decoder.batch_state())),
        "decoder state: expected one that keeps keys and values, got one that keeps none"
    );
    let mut sampler = [Sampler::new(0.0, 1.0, 1).unwrap()];
    let wrong = generate_batch(&MODEL, &[&[1], &[2]], GenerateOptions::new(3), &mut state, &mut sampler, |_, _, _| {
        ControlFlow::Continue(())
    });
    assert_eq!(wrong.unwrap_err().to_string(), "samplers: expected one for each of 2 prompts, got 1");
}

/// Numbers of experts per token: one or one a layer, set in the decoder or in a state.
#[test]
fn a_state_with_another_top_k_gives_what_another_model_would() {
    for (family, decoder) in decoders() {
        let layers = decoder.spec().moe_layers();
        let most = if family == "phimoe" { 2 } else { decoder.spec().moe.top_k };
        let each: Vec<usize> = (0..layers).map(|layer| 1 + (layer + 1) % most).collect();
        let prompt = Batch::new(&[&ids(&decoder, 3, 23)]).unwrap();
        let run = |decoder: &Decoder, mut state: DecoderState| {
            let mut logits = values(&decoder.prefill(&prompt, 7, &mut state).unwrap());
            let widths: Vec<usize> = state.routed()[..layers].iter().map(|routed| routed.assignment.top_k()).collect();
            logits.extend(values(&decoder.forward(&Batch::new(&[&[5]]).unwrap(), &mut state).unwrap()));
            (logits, widths, state.slots)
        };
        let plain = run(&decoder, decoder.generation_state().keeping_routed());
        assert_eq!(plain.1, vec![decoder.spec().moe.top_k; layers], "{family}");
        for top_k in [vec![1], vec![most; layers], each] {
            let mut other = decoder.clone();
            other.set_top_k(&top_k).unwrap();
            let expected = run(&other, other.generation_state().keeping_routed());
            let all = if top_k.len() == 1 { vec![top_k[0]; layers] } else { top_k.clone() };
            assert_eq!(expected.1, all, "{family}");
            let mut state = decoder.generation_state().keeping_routed();
            state.top_k = top_k;
            assert!(run(&decoder, state) == expected, "{family}: other bits, widths or slots");
            // What shares the model's weights is as it was.
            assert!(run(&decoder, decoder.generation_state().keeping_routed()) == plain, "{family}");
        }
    }
}

#[test]
fn what_is_said_of_top_k_is_checked_and_stands_in_the_spec() {
    let mut decoder = MODEL.decoder().clone();
    let (plain, expert) = (decoder.spec().clone(), decoder.spec().moe.parameters_per_expert());
    for (top_k, expected) in [
        (vec![33], "top_k 33 exceeds experts 32"),
        (vec![4, 0, 4, 4], "top_k is 0: expected at least 1"),
        (vec![4, 4], "top_k: expected one number, or one for each of 4 MoE layers, got 2 numbers"),
        (vec![], "top_k: expected one number, or one for each of 4 MoE layers, got 0 numbers"),
    ] {
        assert_eq!(decoder.set_top_k(&top_k).unwrap_err().to_string(), expected);
        let mut state = decoder.generation_state();
        state.top_k = top_k.clone();
        let error = decoder.forward(&Batch::new(&[&[1]]).unwrap(), &mut state);
        let expected = expected.replace("top_k:", "top_k of the decoder state:");
        assert_eq!(error.err().map(|error| error.to_string()), Some(expected).filter(|_| !top_k.is_empty()));
    }
    assert_eq!(decoder.spec(), &plain);
    decoder.set_top_k(&[4, 2, 1, 3]).unwrap();
    let spec = decoder.spec();
    assert_eq!((spec.moe.top_k, spec.layer_top_k.as_slice()), (4, [4, 2, 1, 3].as_slice()));
    assert_eq!(plain.active_parameters() - spec.active_parameters(), 6 * expert);
    decoder.set_top_k(&[2; 4]).unwrap();
    assert_eq!((decoder.spec().moe.top_k, decoder.spec().layer_top_k.len()), (2, 0));
    assert_eq!(plain.active_parameters() - decoder.spec().active_parameters(), 8 * expert);
}

#[test]
fn a_text_that_is_cut_goes_on_as_if_the_rest_had_never_been() {
    for (family, decoder) in decoders() {
        let [first, second] = [3, 4].map(|seed| ids(&decoder, seed, 17));
        let prompts = [Batch::new(&[&first]).unwrap(), Batch::new(&[&first, &second[..6]]).unwrap()];
        for prompt in prompts {
            let more: Vec<&[u32]> = vec![&second[6..11]; prompt.sequences()];
            let (more, sequences) = (Batch::new(&more).unwrap(), prompt.sequences());
            for cut_to in [0, 1, 5, 9, 17, 40] {
                let mut state = decoder.generation_state();
                decoder.forward(&prompt, &mut state).unwrap();
                // What a recurrence keeps does not go back without a mark.
                let kept = if decoder.spec().recurrent.is_some() && cut_to < 17 { 0 } else { cut_to };
                assert_eq!(state.truncate(cut_to).unwrap(), kept.min(17), "{family}");
                assert_eq!(state.position(), kept.min(17));
                let cut = values(&decoder.forward(&more, &mut state).unwrap());
                let mut state = decoder.generation_state();
                if kept > 0 {
                    let short: Vec<&[u32]> = [first.as_slice(), &second[..6]][..sequences]
                        .iter()
                        .map(|ids| &ids[..kept.min(ids.len())])
                        .collect();
                    decoder.forward(&Batch::new(&short).unwrap(), &mut state).unwrap();
                }
                let expected = values(&decoder.forward(&more, &mut state).unwrap());
                assert_close(&format!("{family}: {sequences} sequences cut to {kept}"), &decoder, &cut, &expected);
            }
        }
    }
}

#[test]
fn a_text_goes_back_to_where_it_was_marked() {
    for (family, decoder) in decoders() {
        let is_recurrent = decoder.spec().recurrent.is_some();
        let [first, second] = [3, 4].map(|seed| ids(&decoder, seed, 17));
        for prompt in [Batch::new(&[&first]).unwrap(), Batch::new(&[&first, &second[..6]]).unwrap()] {
            // Keys and values go back to a number of tokens, whoever has them.
            if !is_recurrent && prompt.sequences() > 1 {
                continue;
            }
            let more = |from: usize| Batch::new(&vec![&second[from..from + 5]; prompt.sequences()]).unwrap();
            let mut state = decoder.generation_state();
            // Where nothing was read there is nothing to go back to.
            state.mark();
            decoder.forward(&Batch::new(&vec![&second[..3]; prompt.sequences()]).unwrap(), &mut state).unwrap();
            state.mark();
            // That mark is of a text that is gone.
            assert_eq!(state.truncate(0).unwrap(), 0);
            decoder.forward(&prompt, &mut state).unwrap();
            let before = if is_recurrent { 0 } else { 9 };
            assert_eq!(state.truncate(9).unwrap(), before, "{family}");
            state.truncate(0).unwrap();
            decoder.forward(&prompt, &mut state).unwrap();
            state.mark();
            let expected = values(&decoder.forward(&more(6), &mut state).unwrap());
            for (from, to) in [(1, 17), (2, 20), (3, 18)] {
                decoder.forward(&more(from), &mut state).unwrap();
                let kept = state.truncate(to).unwrap();
                assert_eq!(kept, if is_recurrent { 17 } else { to }, "{family}");
                assert_eq!(state.position(), kept);
                state.truncate(17).unwrap();
                let again = values(&decoder.forward(&more(6), &mut state).unwrap());
                assert_close(&format!("{family}: back to the mark"), &decoder, &again, &expected);
            }
            // A mark further on takes the place of the first, and a text that is shorter than it loses it.
            state.mark();
            let (further, shorter) = (state.position(), if is_recurrent { 0 } else { 17 });
            assert_eq!(state.truncate(further + 3).unwrap(), further, "{family}: nothing has to go");
            assert_eq!(state.truncate(17).unwrap(), shorter, "{family}");
            assert_eq!(state.truncate(further).unwrap(), shorter, "{family}");
        }
    }
}

/// A pass that fails on its way has changed the states of some blocks: nothing of the text is left. One that is refused before has not, nor has
/// an answer that stops between passes.
#[test]
fn a_recurrent_state_is_that_of_whole_passes_or_none() {
    for (family, decoder) in decoders().into_iter().filter(|(_, decoder)| decoder.spec().recurrent.is_some()) {
        let (text, more) = (ids(&decoder, 3, 11), Batch::new(&[&ids(&decoder, 5, 4)]).unwrap());
        let begun = || {
            let mut state = decoder.generation_state();
            decoder.forward(&Batch::new(&[&text]).unwrap(), &mut state).unwrap();
            state
        };
        let expected = values(&decoder.forward(&more, &mut begun()).unwrap());
        let mut state = begun();
        let long = vec![1; decoder.spec().max_positions];
        assert!(decoder.forward(&Batch::new(&[&long]).unwrap(), &mut state).is_err(), "{family}: too long");
        assert!(decoder.forward(&Batch::new(&[&[u32::MAX]]).unwrap(), &mut state).is_err(), "{family}: no such token");
        assert!(
            values(&decoder.forward(&more, &mut state).unwrap()) == expected,
            "{family}: refused passes left a trace"
        );

        let mut state = begun();
        let mut limited = decoder.clone();
        limited.set_capacity(Some(CapacityRule::per_expert(1.0)));
        assert!(limited.forward(&more, &mut state).is_err(), "{family}: top-k keeps within no limit");
        let torn = decoder.forward(&more, &mut state).unwrap_err().to_string();
        assert!(torn.ends_with("got one whose last forward pass failed"), "{family}: {torn}");
        state.mark();
        assert_eq!(state.truncate(text.len()).unwrap(), 0, "{family}: what some blocks forgot is not there");

        let mut state = begun();
        state.mark();
        assert!(limited.forward(&more, &mut state).is_err());
        assert_eq!(state.truncate(usize::MAX).unwrap(), text.len(), "{family}: but where it was marked");
        let again = values(&decoder.forward(&more, &mut state).unwrap());
        assert!(again == expected, "{family}: back before a pass that failed");
        state.truncate(0).unwrap();
        decoder.forward(&Batch::new(&[&text]).unwrap(), &mut state).unwrap();
        assert!(values(&decoder.forward(&more, &mut state).unwrap()) == expected, "{family}: begun again");
    }
}
