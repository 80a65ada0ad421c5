//! Routers that are not of this crate, whose answers are wrong in every way there is: each user of a router says so, with the
//! router's name, before anything is made of the answer.
#![cfg(feature = "model")]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use phase_moe::error::{AnswerFault, Breach};
use phase_moe::eval::{BatchCapacity, Decoding, GateTrace, LayerTrace, Replay};
use phase_moe::{
    Admission, Assignment, Batch, CapacityRule, Error, LayerState, LoadOptions, Model, MoeLayer, MoeSpec, Policy,
    Result, RouteContext, RouteRequest, RouteState, Router, Scoring, Scratch, TokenRequest, TopK,
};

/// What is wrong with top-k's answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spoilt {
    Nothing,
    /// For a layer of one expert more, which every token gets.
    AnExpertThatIsNot,
    OneMoreExpert,
    TooFewTokens,
    NothingWritten,
    /// Whatever the limits: it says that it respects them.
    NoLimit,
    Padding,
    EqualWeights,
    TwiceTheWeight,
    /// An expert twice: there is no assignment of that kind to answer with.
    Twice,
    NoNumber,
}

/// As someone else would write it: from ids and weights.
struct Outside(Spoilt);

impl Router for Outside {
    fn name(&self) -> &'static str {
        "outside"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        _: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (mut experts, mut top_k) = (request.scores().experts(), request.top_k());
        let right = TopK::default().route(request, state)?;
        let (mut ids, mut weights): (Vec<i32>, Vec<f32>) = (right.ids().collect(), right.weights().to_vec());
        match self.0 {
            Spoilt::Nothing | Spoilt::NoLimit => {}
            Spoilt::AnExpertThatIsNot => {
                ids.iter_mut().step_by(top_k).for_each(|id| *id = experts as i32);
                experts += 1;
            }
            Spoilt::OneMoreExpert => {
                let more = |ids: &[i32]| (0..experts as i32).find(|id| !ids.contains(id)).unwrap_or(-1);
                ids = ids.chunks(top_k).flat_map(|ids| [ids, &[more(ids)]].concat()).collect();
                weights = weights.chunks(top_k).flat_map(|weights| [weights, &[0.0]].concat()).collect();
                top_k += 1;
            }
            Spoilt::TooFewTokens => {
                ids.truncate(ids.len() - top_k);
                weights.truncate(ids.len());
            }
            Spoilt::NothingWritten => return Ok(()),
            Spoilt::Padding => {
                let last = ids.len() - top_k;
                ids[last] = 0;
            }
            Spoilt::EqualWeights => {
                let kept = weights.iter_mut().zip(&ids).filter(|(_, id)| **id >= 0);
                kept.for_each(|(weight, _)| *weight = 1.0 / top_k as f32);
            }
            Spoilt::TwiceTheWeight => weights.iter_mut().for_each(|weight| *weight *= 2.0),
            Spoilt::Twice => ids[1] = ids[0],
            Spoilt::NoNumber => weights[0] = f32::NAN,
        }
        *assignment = Assignment::from_parts(experts, top_k, &ids, &weights)?;
        Ok(())
    }
}

/// Answers that no request wants, and a word of the error each gives.
const WRONG: [(Spoilt, &str); 8] = [
    (Spoilt::AnExpertThatIsNot, "experts of the assignment"),
    (Spoilt::OneMoreExpert, "top_k of the assignment"),
    (Spoilt::TooFewTokens, "tokens of the assignment"),
    (Spoilt::NothingWritten, "tokens of the assignment"),
    (Spoilt::EqualWeights, "combine weight"),
    (Spoilt::TwiceTheWeight, "combine weight"),
    (Spoilt::Twice, "distinct experts in token 0"),
    (Spoilt::NoNumber, "combine weight is NaN"),
];

/// Tries a use of a router with each of them.
fn all_are_refused(user: &str, used: impl Fn(Outside) -> Result<()>) {
    for (spoilt, word) in WRONG {
        let error = used(Outside(spoilt)).expect_err(user);
        let message = error.to_string();
        assert!(message.contains(word) && !message.contains('\n'), "{user}, {spoilt:?}: {message}");
        match spoilt {
            // There the router itself meets an error.
            Spoilt::Twice | Spoilt::NoNumber => {}
            _ => assert!(matches!(error, Error::Answer(AnswerFault { router: "outside", .. })), "{user}: {message}"),
        }
    }
    used(Outside(Spoilt::Nothing)).unwrap_or_else(|error| panic!("{user}, nothing wrong: {error}"));
}

/// A layer of plain tensors, which runs on the engine, or of variables.
fn layer(variables: bool, normalize: bool) -> MoeLayer {
    let spec = MoeSpec { scoring: Scoring::softmax().normalized(normalize), ..MoeSpec::new(16, 8, 2, 32).unwrap() };
    let vars = VarMap::new();
    let layer = MoeLayer::load(&spec, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)).unwrap();
    // Not drawn: two best experts that weigh the same by chance would make equal weights right.
    let gate: Vec<f32> = (0..8 * 16).map(|at| (at as f32 * 1.7).sin()).collect();
    vars.data().lock().unwrap()["gate.weight"].set(&Tensor::from_vec(gate, (8, 16), &Device::Cpu).unwrap()).unwrap();
    if variables {
        return layer;
    }
    let tensors =
        vars.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    MoeLayer::load(&spec, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap()
}

fn hidden(tokens: usize) -> Tensor {
    let values: Vec<f32> = (0..tokens * 16).map(|at| (at as f32 * 0.37).sin()).collect();
    Tensor::from_vec(values, (tokens, 16), &Device::Cpu).unwrap()
}

#[test]
fn layers_refuse_wrong_answers() {
    for (variables, normalize) in [(false, false), (false, true), (true, false), (true, true)] {
        let layer = layer(variables, normalize);
        for tokens in [1, 5] {
            let user = format!("layer, variables {variables}, normalised {normalize}, {tokens} tokens");
            let hidden = hidden(tokens);
            all_are_refused(&user, |router| {
                layer.clone().with_router(Arc::new(router)).route(&hidden, &mut LayerState::default()).map(|_| ())
            });
        }
        let plain = layer.route(&hidden(5), &mut LayerState::default()).unwrap();
        let right = layer
            .with_router(Arc::new(Outside(Spoilt::Nothing)))
            .route(&hidden(5), &mut LayerState::default())
            .unwrap();
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((values(&right.0), right.1.assignment), (values(&plain.0), plain.1.assignment));
    }
}

/// Top-k, with a short way for a token that answers with this.
struct Short(fn() -> Assignment);

impl Router for Short {
    fn name(&self) -> &'static str {
        "short"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        TopK::default().route_into(request, state, scratch, assignment)
    }

    fn route_token(
        &self,
        _: &TokenRequest<'_>,
        _: &mut RouteState,
        _: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<bool> {
        *assignment = (self.0)();
        Ok(true)
    }
}

#[test]
fn the_short_way_of_a_token_is_checked_too() {
    type Case = (fn() -> Assignment, &'static str);
    let wrong: [Case; 4] = [
        (Assignment::default, "tokens of the assignment: expected 1, got 0"),
        (|| Assignment::from_parts(9, 2, &[8, 0], &[0.5; 2]).unwrap(), "experts of the assignment: expected 8, got 9"),
        (|| Assignment::from_parts(8, 1, &[0], &[1.0]).unwrap(), "top_k of the assignment: expected 2, got 1"),
        (
            || Assignment::from_parts(8, 2, &[0, 7], &[0.0; 2]).unwrap(),
            "combine weights of token 0: expected a sum of 1",
        ),
    ];
    // That a finite weight is not the gate's is seen in debug builds alone.
    let seen = if cfg!(debug_assertions) { wrong.len() } else { 3 };
    for (answer, word) in &wrong[..seen] {
        let layer = layer(false, true).with_router(Arc::new(Short(*answer)));
        let error = layer.route(&hidden(1), &mut LayerState::default()).unwrap_err().to_string();
        assert!(error.starts_with("router short: ") && error.contains(word), "{error}");
        layer.route(&hidden(2), &mut LayerState::default()).expect("a batch has no short way");
    }
}

#[test]
fn limits_that_a_router_says_it_respects_are_held() {
    // Every token is the same one, so that two experts are wanted by all.
    let hidden = Tensor::ones((64, 16), DType::F32, &Device::Cpu).unwrap();
    for (rule, pool) in [(CapacityRule::per_expert(1.0), "expert"), (CapacityRule::per_device(1.0, 4), "device")] {
        let layer = layer(false, true).with_router(Arc::new(Outside(Spoilt::NoLimit))).with_capacity(rule);
        let error = layer.route(&hidden, &mut LayerState::default()).unwrap_err();
        let Error::Answer(AnswerFault { breach: Breach::OverLimit { pool: named, limit, got, .. }, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!((named, limit), (pool, if pool == "expert" { 16 } else { 32 }));
        assert!(got >= 64, "{got}");
    }
}

#[test]
fn padding_gets_no_expert() {
    let (hidden, padding) = (hidden(3), [false, false, true]);
    let context = RouteContext { padding: Some(&padding), ..RouteContext::default() };
    let routed = |spoilt| {
        let layer = layer(false, false).with_router(Arc::new(Outside(spoilt)));
        layer.route_with(&hidden, context, &mut LayerState::default()).map(|_| ())
    };
    routed(Spoilt::Nothing).unwrap();
    assert_eq!(
        routed(Spoilt::Padding).unwrap_err().to_string(),
        "router outside: padding token 2: expected no expert, got expert 0"
    );
}

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe"), &LoadOptions::default()).unwrap()
});

#[test]
fn models_and_measurements_refuse_wrong_answers() {
    let batches = [Batch::new(&[&[1, 2, 3, 4][..], &[5, 6]]).unwrap()];
    all_are_refused("decoder", |router| {
        let mut decoder = MODEL.decoder().clone();
        decoder.set_router(Arc::new(router));
        decoder.forward(&batches[0], &mut decoder.batch_state()).map(|_| ())
    });
    let decoding = |router| Decoding {
        router: Arc::new(router),
        cached_experts: 8,
        policy: Policy::Lru,
        admission: Admission::default(),
    };
    all_are_refused("decoding in whole passes", |router| {
        decoding(router).run(MODEL.decoder(), &batches, |_, _| Ok(())).map(|_| ())
    });
}

#[test]
fn replays_refuse_wrong_answers() {
    let logits = (0..6 * 16).map(|at| (at as f32 * 0.73).sin()).collect();
    let trace = GateTrace {
        model: None,
        experts: 16,
        top_k: 2,
        layer_top_k: Vec::new(),
        scoring: Scoring::softmax(),
        batch_tokens: None,
        token_ids: None,
        kinds: None,
        layers: vec![LayerTrace { layer: 0, logits, selection_bias: None }],
    };
    for batch_tokens in [1, 4] {
        all_are_refused("replay", |router| {
            let (policy, admission) = (Policy::Lru, Admission::default());
            let capacity = BatchCapacity::Unlimited;
            let replay = Replay {
                router: &router,
                top_k: 2,
                capacity: &capacity,
                batch_tokens,
                cached_experts: 4,
                policy,
                admission,
            };
            replay.run(&trace, |_| ()).map(|_| ())
        });
    }
}
