//! What the bundled model must show: survival, perplexity and certificates in real forward passes.

mod decode;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::eval::{Batching, Dropless, EvalText, GateTrace, RouterFigures, Setting, compare, dropless};
use crate::layer::{OutputNorms, ProbeFit};
use crate::routing::{Knowledge, Shares};
use crate::{
    Batch, CacheRouter, CapacityRule, GenerateOptions, LoadOptions, Logits, Model, PhaseRouter, RouteContext,
    RouteMetrics, RouteRequest, RouteState, Router, RouterKind, Sampler, generate,
};

const KINDS: [&str; 3] = ["scripture", "code", "reference"];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe")
}

fn model() -> Model {
    Model::load(&directory(), &LoadOptions::default()).unwrap()
}

fn texts(model: &Model) -> Vec<EvalText> {
    let read = |kind: &str| std::fs::read_to_string(directory().join("eval").join(kind).with_extension("txt")).unwrap();
    KINDS.iter().map(|kind| EvalText { name: kind.to_string(), ids: model.encode(&read(kind)).unwrap() }).collect()
}

fn figures(model: &Model, batches: &[Batch], base: &Dropless, router: RouterKind, rule: CapacityRule) -> RouterFigures {
    let setting =
        Setting { router, capacity: Some(rule), seed: 42, cache: CacheRouter::default(), memory: None, devices: None };
    compare(model.decoder(), batches, &setting, Some(base), |_, _, _| Ok(())).unwrap()
}

#[test]
fn the_bundle_is_small_and_its_text_is_large_enough() {
    let model = model();
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    let names = ["config.json", "model.safetensors", "tokenizer.json"];
    let texts_size: u64 =
        KINDS.iter().map(|kind| size(&directory().join("eval").join(kind).with_extension("txt"))).sum();
    let total: u64 = names.iter().map(|name| size(&directory().join(name))).sum::<u64>() + texts_size;
    assert!(total <= 8_000_000, "{total} bytes");
    let texts = texts(&model);
    assert!(texts.iter().map(|text| text.ids.len()).sum::<usize>() >= 20_000);
    let spec = model.decoder().spec();
    assert!(spec.layers >= 4 && spec.moe.experts >= 24 && spec.moe.top_k == 4);
}

#[test]
fn every_kind_is_learnt_to_a_quarter_of_its_unigram_perplexity() {
    let model = model();
    for text in texts(&model) {
        // The text's own frequencies: a lower unigram perplexity, so a harder bar, than those of the training text.
        let mut counts = vec![0f64; model.decoder().spec().vocab];
        text.ids.iter().for_each(|&id| counts[id as usize] += 1.0);
        let total = text.ids.len() as f64;
        let entropy: f64 =
            counts.iter().filter(|&&count| count > 0.0).map(|count| -count / total * (count / total).ln()).sum();
        let batches =
            Batching { tokens: Some(4096), ..Batching::default() }.batches(&[], std::slice::from_ref(&text)).unwrap();
        let perplexity = dropless(model.decoder(), &batches, |_| ()).unwrap().perplexity;
        assert!(perplexity <= entropy.exp() / 4.0, "{}: {perplexity} against unigram {}", text.name, entropy.exp());
    }
}

#[test]
fn under_limits_per_expert_phase_keeps_all_slots_and_loses_less_than_dropping() {
    let model = model();
    let batches = Batching { tokens: Some(6144), ..Batching::default() }.batches(&[], &texts(&model)).unwrap();
    let base = dropless(model.decoder(), &batches, |_| ()).unwrap();
    let figures = |router| figures(&model, &batches, &base, router, CapacityRule::per_expert(1.0));
    let phase = figures(RouterKind::Phase);
    assert_eq!((phase.survival, phase.dropped_slots, phase.tokens_without_expert), (1.0, 0, 0));
    assert!(phase.max_violation.abs() < 1e-12, "loads equal capacities at factor 1.0");
    assert!(phase.gate_mass_vs_bound.is_some_and(|share| share > 0.999 && share <= 1.0), "{phase:?}");
    for router in [RouterKind::TopKArrival, RouterKind::TopKRank, RouterKind::TopKScore] {
        let other = figures(router);
        assert!(
            phase.perplexity < other.perplexity,
            "{} {} against {}",
            other.router,
            other.perplexity,
            phase.perplexity
        );
        assert!(other.survival < 0.9 && other.gate_mass < phase.gate_mass);
    }
}

#[test]
fn four_devices_are_filled_exactly_for_next_to_nothing() {
    let model = model();
    let batches = Batching::default().batches(&[], &texts(&model)).unwrap();
    let base = dropless(model.decoder(), &batches, |_| ()).unwrap();
    let figures = |router| figures(&model, &batches, &base, router, CapacityRule::per_device(1.0, 4));
    let phase = figures(RouterKind::Phase);
    assert_eq!((phase.survival, phase.device_max_violation), (1.0, Some(0.0)));
    assert!(phase.perplexity_increase < 0.005, "{phase:?}");
    let arrival = figures(RouterKind::TopKArrival);
    assert!(arrival.perplexity_increase >= 10.0 * phase.perplexity_increase.max(0.0), "{arrival:?}");
}

#[test]
fn loads_of_devices_are_counted_without_a_limit_too() {
    let model = model();
    let batches = Batching { tokens: Some(1200), ..Batching::default() }.batches(&[], &texts(&model)).unwrap();
    let setting = |devices: Option<usize>| Setting {
        router: RouterKind::TopK,
        capacity: None,
        seed: 42,
        cache: CacheRouter::default(),
        memory: None,
        devices: devices.map(|devices| Shares::PerDevice { speeds: vec![1.0; devices] }),
    };
    let run = |devices| compare(model.decoder(), &batches, &setting(devices), None, |_, _, _| Ok(())).unwrap();
    let (plain, counted) = (run(None), run(Some(4)));
    let base = dropless(model.decoder(), &batches, |_| ()).unwrap();
    assert_eq!((plain.devices, plain.device_max_violation), (None, None));
    assert_eq!((plain.perplexity, plain.perplexity_increase), (base.perplexity, 0.0));
    assert_eq!((counted.perplexity, &counted.loads, counted.devices), (plain.perplexity, &plain.loads, Some(4)));

    let (mut violations, mut loads) = (Vec::new(), vec![vec![0u64; 32]; 4]);
    for batch in &batches {
        let mut state = model.decoder().batch_state().keeping_routed();
        model.decoder().forward(batch, &mut state).unwrap();
        for (layer, routed) in state.routed().iter().enumerate() {
            let load = routed.assignment.load();
            let fullest = load.chunks(8).map(|device| device.iter().sum::<u32>()).max().unwrap();
            violations.push(f64::from(fullest) / (batch.live_tokens() as f64) - 1.0);
            loads[layer].iter_mut().zip(load).for_each(|(sum, load)| *sum += u64::from(load));
        }
    }
    let mean = violations.iter().sum::<f64>() / violations.len() as f64;
    assert!(mean > 0.2 && (counted.device_max_violation.unwrap() - mean).abs() < 1e-12, "{counted:?} {mean}");
    assert_eq!(counted.loads, loads);
    let (nats, tokens) = counted.batch_nats.iter().fold((0.0, 0), |(nats, tokens), of| (nats + of.0, tokens + of.1));
    assert!(
        counted.batch_nats.len() == batches.len()
            && ((nats / tokens as f64).exp() / base.perplexity - 1.0).abs() < 1e-9
    );
}

#[test]
fn a_forward_pass_is_the_same_on_any_number_of_threads() {
    let model = model();
    let batches = Batching { tokens: Some(1024), ..Batching::default() }.batches(&[], &texts(&model)).unwrap();
    for kind in RouterKind::ALL {
        let mut decoder = model.decoder().clone();
        decoder.set_router(Arc::from(kind.build(7)));
        let limited = kind.understands(Knowledge::Limits);
        decoder.set_capacity(limited.then(|| CapacityRule::per_expert(1.0)));
        let outcome = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut state = decoder.batch_state().keeping_routed();
                decoder.forward(&batches[0], &mut state).unwrap();
                state.routed().iter().map(|routed| routed.assignment.clone()).collect::<Vec<_>>()
            })
        };
        assert_eq!(outcome(1), outcome(3), "{}", kind.name());
    }
}

#[test]
fn a_prompt_is_continued_in_its_own_kind_of_text() {
    let model = model();
    let continued = |prompt: &str| {
        let mut sampler = Sampler::new(0.0, 1.0, 0).unwrap();
        let (prompt, mut state) = (model.encode(prompt).unwrap(), model.decoder().generation_state());
        let go_on = |_| ControlFlow::Continue(());
        let done = generate(&model, &prompt, GenerateOptions::new(40), &mut state, &mut sampler, go_on).unwrap();
        model.decode_after(&[], &done.texts[0]).unwrap()
    };
    let scripture = continued("And the LORD spake unto Moses, saying, ");
    let code = continued("impl<T> Iterator for Range<T> {\n    type Item = T;\n\n    fn next(");
    let has = |text: &str, words: [&str; 4]| words.iter().any(|word| text.contains(word));
    let (scriptural, programmed) = (["the LORD", "unto", "thou", "shall"], ["self", "->", "::", ") {"]);
    assert!(has(&scripture, scriptural) && !has(&scripture, programmed), "{scripture:?}");
    assert!(has(&code, programmed) && !has(&code, scriptural), "{code:?}");
    let reference = continued("river (noun): a large natural stream of ");
    assert!(!has(&reference, programmed), "{reference:?}");
}

#[test]
fn under_limits_the_size_of_outputs_tells_who_may_move() {
    let mut model = model();
    let texts = texts(&model);
    let batches = Batching { tokens: Some(6144), ..Batching::default() }.batches(&[], &texts).unwrap();
    let (fitted_on, measured): (Vec<_>, Vec<_>) = batches.into_iter().enumerate().partition(|(at, _)| at % 2 == 0);
    let batches = |part: Vec<(usize, Batch)>| part.into_iter().map(|(_, batch)| batch).collect::<Vec<_>>();
    let (fitted_on, measured) = (batches(fitted_on), batches(measured));
    let base = dropless(model.decoder(), &measured, |_| ()).unwrap();
    let rule = CapacityRule::per_expert(1.25);
    let plain = figures(&model, &measured, &base, RouterKind::Phase, rule.clone());

    let layers: Vec<_> = model.decoder().moe_layers().collect();
    let mut fits: Vec<_> = layers.iter().map(|_| ProbeFit::new(128, 32)).collect();
    for batch in &fitted_on {
        let mut state = model.decoder().batch_state().keeping_routed();
        model.decoder().forward(batch, &mut state).unwrap();
        for ((fit, layer), routed) in fits.iter_mut().zip(&layers).zip(state.routed()) {
            fit.add(&routed.input, layer.experts()).unwrap();
        }
    }
    let probes: Vec<_> = fits.into_iter().map(|fit| Arc::new(OutputNorms::from(fit))).collect();
    let exact: Vec<_> = layers.iter().map(|_| Arc::new(OutputNorms::Exact)).collect();
    for norms in [exact, probes] {
        for (layer, norms) in model.decoder_mut().moe_layers_mut().zip(norms) {
            layer.set_output_norms(Some(norms));
        }
        let weighed = figures(&model, &measured, &base, RouterKind::Phase, rule.clone());
        assert_eq!((weighed.survival, weighed.dropped_slots), (1.0, 0));
        assert!(weighed.max_violation <= 0.25 + 1e-9);
        assert!(weighed.gate_mass < plain.gate_mass && weighed.gate_mass_vs_bound.unwrap() <= 1.0);
        assert!(weighed.perplexity < plain.perplexity, "{} {}", weighed.perplexity, plain.perplexity);
        // Without a limit nothing is touched; under one the weights are still the gate's.
        assert_eq!(dropless(model.decoder(), &measured, |_| ()).unwrap().perplexity, base.perplexity);
        let mut limited = model.decoder().clone();
        limited.set_router(Arc::from(RouterKind::Phase.build(0)));
        limited.set_capacity(Some(rule.clone()));
        let mut state = limited.batch_state().keeping_routed();
        limited.forward(&measured[0], &mut state).unwrap();
        for routed in state.routed() {
            let scores = routed.scores().unwrap();
            for token in 0..scores.tokens() {
                for (expert, weight) in routed.assignment.slots(token) {
                    assert_eq!(weight, scores.gate(token)[expert.index()]);
                }
            }
        }
    }
}

/// Routes a stream of batches of 512 tokens with prices that stay warm per layer, or with none: for each batch and layer the
/// sweeps and kept / bound.
fn stream(trace: &GateTrace, rule: &CapacityRule, warm: bool) -> Vec<(usize, f64)> {
    const TOKENS: usize = 512;
    let (router, experts, top_k) = (PhaseRouter::default(), trace.experts, trace.top_k);
    let capacity = rule.capacity(TOKENS, experts, top_k).unwrap();
    let mut states = vec![RouteState::default(); trace.layers.len()];
    let mut seen = Vec::new();
    for first in (0..trace.tokens() / TOKENS * TOKENS).step_by(TOKENS) {
        for (layer, state) in trace.layers.iter().zip(&mut states) {
            if !warm {
                *state = RouteState::default();
            }
            let logits = &layer.logits[first * experts..(first + TOKENS) * experts];
            let logits = Logits::new(logits, TOKENS, experts).unwrap();
            let scores = trace.scoring.scores(&logits, layer.selection_bias.as_deref()).unwrap();
            let request = RouteRequest::new(&scores, top_k, &capacity, RouteContext::default()).unwrap();
            let assignment = router.route(&request, state).unwrap();
            let metrics = RouteMetrics::new(&request, &assignment);
            assert_eq!(metrics.survival(), 1.0);
            if rule.factor == 1.0 {
                let mut loads = vec![0; capacity.pool_sizes().len()];
                for (expert, load) in assignment.load().into_iter().enumerate() {
                    loads[capacity.pool_of(expert as u16)] += load;
                }
                assert_eq!(loads, capacity.limits().unwrap());
            }
            seen.push((state.sweeps, metrics.gate_mass / assignment.gate_mass_bound().unwrap()));
        }
    }
    seen
}

#[test]
fn on_a_stream_of_texts_every_batch_is_certified_and_warm_prices_save_sweeps() {
    let model = model();
    // One kind of text after the other: prices must find their way when the kind changes.
    let batches = Batching::default().batches(&[], &texts(&model)).unwrap();
    let trace = GateTrace::capture(model.decoder(), &batches, |_| ()).unwrap();
    let median = |seen: &[(usize, f64)]| {
        let mut sweeps: Vec<usize> = seen.iter().map(|(sweeps, _)| *sweeps).collect();
        sweeps.sort_unstable();
        sweeps[sweeps.len() / 2]
    };
    // The most sweeps of the median batch, looks at the start included.
    for (rule, most) in [
        (CapacityRule::per_expert(1.0), 10),
        (CapacityRule::per_expert(1.25), 6),
        (CapacityRule::per_device(1.0, 4), 3),
        (CapacityRule::per_device(1.25, 4), 3),
        (CapacityRule::per_device(1.0, 8), 4),
    ] {
        let (warm, cold) = (stream(&trace, &rule, true), stream(&trace, &rule, false));
        for (_, share) in warm.iter().chain(&cold) {
            assert!(*share >= 0.9995, "{rule:?}: {share}");
        }
        println!("{rule:?}: median sweeps {} warm, {} cold", median(&warm), median(&cold));
        assert!(median(&warm) <= most.min(median(&cold)), "{rule:?}: {} {}", median(&warm), median(&cold));
    }
}
